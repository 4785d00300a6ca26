"""Constrained decoding: answers that are valid JSON of a schema, or valid calls of given tools, by construction.

Grammars are run by llguidance (https://github.com/guidance-ai/llguidance): an Earley parser over a derivative-based
lexer that masks, before each token, whatever the grammar does not allow. A mask of a 4096-entry vocabulary takes some
ten microseconds, and a grammar about a millisecond to compile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from ..errors import ConstraintError
from .base import LogitsProcessor
from .grammar import CallSyntax, Literals, json_grammar, tool_grammar

__all__ = ["CallSyntax", "ConstraintCompiler", "GrammarConstraint"]


class GrammarConstraint:
    """A `LogitsProcessor` that keeps one answer inside of a grammar. Not to be shared by two answers.

    Where the grammar forces a text, the tokenizer's own tokens for it are forced, so that the answer has the ids it
    would have when rendered again, and its cache is found.

    Args:
        tokenizer: vocabulary and end tokens, in llguidance's form.
        grammar: as llguidance reads it.
        what: the thing that is constrained, for messages.

    Raises:
        ConstraintError: the grammar cannot be compiled.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, *, what: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._what = what
        self._consumed: list[int] = []
        self._check(f"{what} cannot be turned into a grammar; simplify the schema")

    def __call__(self, ids: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """Mask the tokens that the grammar does not allow next.

        Args:
            ids: tokens generated so far; each call must extend the ids of the one before.
            logits: Shape: (vocab_size,). Not changed.

        Returns:
            Their copy, masked.

        Raises:
            ConstraintError: the ids left the grammar, or it became too complex.
        """
        at = len(self._consumed)
        if list(ids[:at]) != self._consumed:
            raise ConstraintError(
                f"the ids do not extend those of the call before ({at} tokens); use a new constraint for each answer"
            )
        for token in ids[at:]:
            self._matcher.consume_token(token)
            self._consumed.append(token)
        self._check(f"the answer left the grammar of {self._what} after {len(self._consumed)} tokens")
        return logits.masked_fill(~self._allowed(len(logits)).to(logits.device), float("-inf"))

    def _allowed(self, vocab_size: int) -> torch.Tensor:
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        forced = self._matcher.compute_ff_tokens()
        if forced:
            allowed[forced[0]] = True
            return allowed
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        allowed[: len(bias)] = bias[:vocab_size] > 0
        return allowed

    def _check(self, expected: str) -> None:
        if self._matcher.is_error():
            raise ConstraintError(f"{expected}: {self._matcher.get_error()[:500]}")


class ConstraintCompiler:
    """Makes constraints for one model. Building it reads the whole vocabulary (about 15 ms for 4096 entries): keep it.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: length of the model's logits, which may exceed the tokenizer's.
        stop_token_ids: ids that end an answer; allowed wherever the grammar is satisfied.
        syntax: how the model writes tool calls.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_token_ids: Sequence[int], syntax: CallSyntax) -> None:
        self._tokenizer = from_tokenizer(
            tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=list(stop_token_ids)
        )
        self._literals = Literals({token.content: i for i, token in tokenizer.added_tokens_decoder.items()})
        self._syntax = syntax

    def json(self, schema: Mapping[str, Any] | None = None) -> LogitsProcessor:
        """Constrain the answer to JSON of a schema; None: any JSON object.

        Keywords of the schema that llguidance does not know are ignored. Objects that list properties and do not say
        otherwise get no others, unless the schema combines several for one object (`close_objects`).

        Raises:
            ConstraintError: the schema cannot be compiled.
        """
        return self._constraint(json_grammar(schema), "the JSON schema")

    def tools(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        choice: str = "auto",
        parallel: bool = True,
        answer: Mapping[str, Any] | None = None,
    ) -> LogitsProcessor:
        """Constrain the answer to calls of tools, or keep them out of it.

        Args:
            tools: OpenAI function tools.
            choice: `required`: one call or more; a tool's name: exactly one call of it; `none`: text without a call;
                `auto`: text, and calls that are valid where there are any.
            parallel: whether `required` and `auto` may write more than one call.
            answer: with `auto` and `none`, a JSON schema for what is not a call.

        Raises:
            ConstraintError: there is no such tool, or a schema cannot be compiled.
        """
        grammar = tool_grammar(tools, self._syntax, self._literals, choice=choice, parallel=parallel, answer=answer)
        return self._constraint(grammar, f"tool choice {choice!r}")

    def _constraint(self, grammar: str, what: str) -> GrammarConstraint:
        return GrammarConstraint(self._tokenizer, grammar, what=what)
