"""Train the bundled tokenizer anew: `python -m kv_retract.reference.build_tokenizer CORPUS... --out DIR`.

Byte-level BPE: any text can be encoded and decodes to itself. Digits are tokens of their own, so that a model can copy
numbers and identifiers it has never seen. Training is deterministic for the same texts and library version.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kv_retract.reference import TOKENIZER_DIR

VOCAB_SIZE = 4096
MAX_LENGTH = 32_768
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
"""One token each, but not special: they stay in decoded text, where a parser of tool calls looks for them."""


def texts_of(path: Path) -> Iterator[str]:
    """Yield the training texts of a file.

    A `.jsonl` file holds one chat per line (`traj` or `messages`) and a `.traj` file one chat (`history`): contents and
    tool calls are read from them. Any other file is plain text, one text per line.
    """
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".traj":
        yield from _chat_texts(json.loads(content)["history"])
    elif path.suffix == ".jsonl":
        for record in map(json.loads, content.splitlines()):
            yield from _chat_texts(record.get("traj") or record.get("messages") or ())
    else:
        yield from content.splitlines(keepends=True)


def _chat_texts(messages: Iterable[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        if isinstance(message.get("content"), str):
            yield message["content"]
        for call in message.get("tool_calls") or ():
            yield json.dumps(call["function"], ensure_ascii=False)
            yield str(call["function"]["arguments"])


def train(
    texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE, digits: int = 1, split_names: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of exactly `vocab_size` entries (fewer where the texts are too short).

    Args:
        texts: what to count merges in.
        vocab_size: entries, special ones included.
        digits: most digits in one token.
        split_names: keep capitalised words apart from the space before them, so that a name has the same tokens in
            running text and in JSON.
    """
    tokenizer = Tokenizer(models.BPE())
    numbers = (
        pre_tokenizers.Digits(individual_digits=True)
        if digits == 1
        else pre_tokenizers.Split(Regex(f"\\d{{1,{digits}}}"), behavior="isolated")
    )
    names = [pre_tokenizers.Split(Regex(r"\p{Lu}\p{Ll}+"), behavior="isolated")] if split_names else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [numbers, *names, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKUP),
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (TOKENIZER_DIR / "chat_template.jinja").read_text(encoding="utf-8")
    return fast


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the named files and write the folder."""
    run_program(argv, train, description="Train the bundled tokenizer.", files="+")


def run_program(
    argv: Sequence[str] | None, train: Callable[[list[str]], PreTrainedTokenizerFast], *, description: str, files: str
) -> None:
    """Read the named files, train on their texts, write the folder.

    Args:
        argv: arguments of the program; None: those of the process.
        train: texts to a tokenizer.
        description: for `--help`.
        files: how many files are named, as `nargs` of argparse: `+` or `*`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("corpus", nargs=files, type=Path, help=".jsonl or .traj files of chats, or plain text files")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    arguments = parser.parse_args(argv)
    tokenizer = train([text for path in arguments.corpus for text in texts_of(path)])
    tokenizer.save_pretrained(arguments.out)
    print(f"{len(tokenizer)} entries written to {arguments.out}")


if __name__ == "__main__":
    main()
