"""Commands that show an agent run: replay recorded threads, the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, DtypeOption, Json, Model, Seed, console, now, progress_bar

Traces = Annotated[
    list[Path],
    typer.Argument(
        help="Files or folders: OpenAI chat JSON lines, LangGraph histories, SWE-agent trajectories, ReAct logs."
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy", "-p", help="Detector, also with parameters: tool_error:include_call=true. Repeatable. Default: "
        "tool_error and superseded.",
    ),
]  # fmt: skip
Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arm", "-a", help="Eraser, also with parameters: repair:tokens=16. Repeatable; recompute always runs. "
        "Default: none, mask and shift.",
    ),
]  # fmt: skip
ResultsFolder = Annotated[
    Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/replay-TIME.")
]


def replay(
    paths: Traces,
    policy: Policies = None,
    arm: Arms = None,
    model: Model = "reference",
    out: ResultsFolder = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most traces to replay.")] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Longest context of a step, in tokens.")] = None,
    pool_tokens: Annotated[int | None, typer.Option(min=1, help="Size of the KV pool that all arms share.")] = None,
    score_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the next message to compare.")] = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Json = False,
) -> None:
    """Replay recorded agent threads, retract what the policies find, and compare erasers at the next step.

    Writes config.json, samples.jsonl, metrics.json and report.html.
    """
    from ..evals.console import print_replay
    from ..evals.replay import ReplaySettings
    from ..evals.replay import replay as run
    from ..evals.results import dump
    from ..evals.specs import parse_specs

    out = out or Path("runs") / f"replay-{now()}"
    settings = ReplaySettings(
        paths=tuple(paths), policies=tuple(parse_specs(policy or ["tool_error", "superseded"])),
        arms=tuple(parse_specs(arm or ["none", "mask", "shift"])), out=out, model=model,
        limit=limit, max_context=max_context, pool_tokens=pool_tokens, seed=seed, device=device, dtype=dtype.value,
        score_tokens=score_tokens,
    )  # fmt: skip
    with progress_bar("traces") as tick:
        result = run(settings, progress=tick)
    if as_json:
        print(dump(result.metrics()))
        return
    print_replay(result, console())
    console().print(f"Report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def demo(model: Model = "reference", device: Device = "cpu", dtype: DtypeOption = Dtype.FLOAT32) -> None:
    """Tell one agent run: a tool result arrives, is contradicted, is retracted, and the next answer changes."""
    from ..engine.hf import HFEngine
    from ..engine.models import load_model
    from ..evals.narrate import run_story, tell

    loaded = load_model(model, device=device, dtype=dtype.value)
    engine = HFEngine(loaded.model, max_tokens=8192, name=loaded.name)
    tell(run_story(loaded, engine), loaded.quality_note, console())
