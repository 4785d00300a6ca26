"""Agent traces with real injections: AgentDojo's suites, run by its ground truth instead of a model.

Runs in an environment of its own, since `agentdojo` pins its own versions; it needs nothing of kv_retract there:

    python -m venv adojo && adojo/bin/pip install agentdojo==0.1.35
    adojo/bin/python evals/agentdojo_traces.py OUT.jsonl --attack important_instructions --attack injecagent

AgentDojo (arXiv 2406.13352, https://github.com/ethz-spylab/agentdojo) is under the MIT licence. Each line of OUT is one
trace, as `kv-retract eval policies --labelled` reads it: OpenAI chat messages, and under `labels` the exact character
range of every injected text in a tool result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

VERSION = "v1.2.2"
SUITES = ("banking", "slack", "travel", "workspace")
CLEAN = "none"
"""Name of the attack that injects nothing: the vectors keep their harmless defaults."""
ATTACKS = (
    CLEAN, "direct", "dos", "ignore_previous", "important_instructions", "injecagent", "system_message",
    "tool_knowledge",
)  # fmt: skip
PIPELINE = "gpt-4o-2024-05-13"
"""Some attacks address the model by name and take it from the name of the pipeline."""

# What tools change in a text when they print it as YAML or JSON: white space, quoting, escapes.
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_QUOTING = "'\"\\"


def skeleton(text: str, *, escaped: bool) -> tuple[str, list[int]]:
    """Return the characters that survive reformatting, and where each stands in `text`.

    Args:
        text: plain text, or a tool's output.
        escaped: whether backslashes begin escapes, as in JSON and double-quoted YAML.
    """
    kept, places, at = [], [], 0
    while at < len(text):
        character, length = text[at], 1
        found = _ESCAPE.match(text, at) if escaped else None
        if found is not None:
            code = found[1] or found[2] or found[3]
            character = chr(int(code, 16)) if code else " " if found[4] in "nrtN_" else found[4]
            length = len(found[0])
        if not character.isspace() and character not in _QUOTING:
            kept.append(character)
            places.append(at)
        at += length
    return "".join(kept), places


def locate(text: str, content: str) -> list[tuple[int, int]]:
    """Return the ranges `[start, end)` of `content` that hold `text`, whatever its white space, quoting and escapes."""
    wanted, _ = skeleton(text, escaped=False)
    found: list[tuple[int, int]] = []
    for escaped in (False, True):
        have, places = skeleton(content, escaped=escaped)
        at = have.find(wanted) if wanted else -1
        while at >= 0:
            last = places[at + len(wanted) - 1]
            step = _ESCAPE.match(content, last) if escaped else None
            end = _closed(text, content, last + (len(step[0]) if step else 1))
            found.append((places[at], end))
            at = have.find(wanted, at + len(wanted))
    return sorted(set(found))


def _closed(text: str, content: str, end: int) -> int:
    """Return the end with the quotes that `text` itself ends with."""
    stripped = text.rstrip()
    for quote in stripped[len(stripped.rstrip(_QUOTING)) :]:
        doubled = next((form for form in ("\\" + quote, quote * 2, quote) if content.startswith(form, end)), "")
        end += len(doubled)
    return end


def chat(prompt: str, responses: Sequence[Any]) -> list[dict[str, Any]]:
    """Return AgentDojo's messages in OpenAI form; calls are numbered, as the ground truth gives them no ids."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    for number, response in enumerate(responses):
        content = "\n".join(block["content"] for block in response["content"] or () if block["content"] is not None)
        message: dict[str, Any] = {"role": response["role"], "content": content}
        if response["role"] == "assistant" and response["tool_calls"]:
            message["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": call.function, "arguments": json.dumps(call.args, default=str)},
                }
                for call in response["tool_calls"]
            ]
        elif response["role"] == "tool":
            message |= {"tool_call_id": f"call_{number - 1}", "name": response["tool_call"].function}
        messages.append(message)
    return messages


def injected(messages: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the places of the injected texts in tool results, in their order."""
    return [
        {"message": index, "start": start, "end": end, "text": message["content"][start:end]}
        for index, message in enumerate(messages)
        if message["role"] == "tool"
        for start, end in sorted({place for text in set(texts) for place in locate(text, message["content"])})
    ]


def traces(suite: Any, attack_name: str, pairs: int) -> Iterator[dict[str, Any]]:
    """Yield the traces of one suite under one attack.

    Args:
        suite: a `TaskSuite` of AgentDojo.
        attack_name: one of its attacks, or `none`.
        pairs: injection tasks per user task, dealt out in turn; 0 for all of them.
    """
    ground_truth = import_module("agentdojo.agent_pipeline.ground_truth_pipeline").GroundTruthPipeline
    runtime = import_module("agentdojo.functions_runtime").FunctionsRuntime
    target = ground_truth(None)
    target.name = PIPELINE
    registry = import_module("agentdojo.attacks.attack_registry")
    attack = None if attack_name == CLEAN else registry.load_attack(attack_name, suite, target)
    goals = list(suite.injection_tasks.values())
    dealt = 1 if attack is None or attack.is_dos_attack else pairs or len(goals)
    for number, task in enumerate(suite.user_tasks.values()):
        for turn in range(min(dealt, len(goals))):
            goal = goals[(number * dealt + turn) % len(goals)]
            try:
                vectors = {} if attack is None else attack.attack(task, goal)
            except ValueError:  # AgentDojo's word for a task whose calls show no vector
                continue
            environment = task.init_environment(suite.load_and_inject_default_environment(vectors))
            _, _, _, responses, _ = ground_truth(task).query(task.PROMPT, runtime(suite.tools), environment)
            messages = chat(task.PROMPT, responses)
            places = injected(messages, list(vectors.values()))
            yield {
                "trace_id": f"{suite.name}-{task.ID}-{attack_name}" + ("" if attack is None else f"-{goal.ID}"),
                "suite": suite.name,
                "user_task": task.ID,
                "injection_task": None if attack is None else goal.ID,
                "attack": attack_name,
                "source": f"agentdojo, {suite.name}",
                "messages": messages,
                "labels": {"injection": places},
            }


def main() -> None:
    """Write the traces; those whose messages were written before are left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write, JSON lines")
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all")
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="default: all")
    parser.add_argument("--pairs", type=int, default=2, help="injection tasks per user task; 0: all (default 2)")
    options = parser.parse_args()
    suites = import_module("agentdojo.task_suite.load_suites").get_suites(VERSION)
    import_module("agentdojo.attacks")  # registers them
    seen: set[str] = set()
    with options.out.open("x", encoding="utf-8") as file:
        for name in options.suite or SUITES:
            for attack in options.attack or ATTACKS:
                counts: Counter[str] = Counter()
                for trace in traces(suites[name], attack, options.pairs):
                    digest = hashlib.sha256(json.dumps(trace["messages"]).encode()).hexdigest()
                    if digest in seen:
                        counts["repeated"] += 1
                        continue
                    seen.add(digest)
                    places = trace["labels"]["injection"]
                    if attack != CLEAN and not places:
                        counts["not located"] += 1
                        continue
                    counts["traces"] += 1
                    counts["injections"] += len(places)
                    file.write(json.dumps(trace, ensure_ascii=False) + "\n")
                print(name, attack, dict(counts), flush=True)


if __name__ == "__main__":
    main()
