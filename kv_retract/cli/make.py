"""Commands that make things: traces of the corpus, and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Json, SplitOption, console, progress_bar


def corpus(
    out: Annotated[Path, typer.Option(help="New file for the traces, one JSON object a line.")],
    family: Annotated[str, typer.Option(help="Task family; a wrong name lists them.")] = "facts",
    length: Annotated[int, typer.Option(min=64, max=65_536, help="Tokens of a trace, about.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, help="Of the first trace; the next ones count up.")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="Traces.")] = 10,
    split: SplitOption = "test",
    as_json: Json = False,
) -> None:
    """Write traces of retractable agent threads with probes and their right answers, for any model."""
    from ..evals.results import check_new, write_new_lines
    from ..training.corpus import samples

    check_new(out)
    made = (sample.to_json() for sample in samples(family, n, seed=seed, length=length, split=split))
    write_new_lines(out, made)
    if as_json:
        print(json.dumps({"out": str(out), "family": family, "n": n}))
    else:
        console().print(f"{n} traces of {family!r} written to {out}", markup=False, highlight=False, soft_wrap=True)


def train_reference(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same folder resumes it.")],
    config: Annotated[Path | None, typer.Option(help="JSON file with fields of ReferenceConfig.")] = None,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile; needs a C++ compiler.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop with a checkpoint after so long.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small chat model on the corpus, or go on with a run that was stopped.

    Writes config.json, log.jsonl, loss.svg, state.pt and, once finished, the folder model.
    """
    from ..evals.plots import loss_plot
    from ..training.checkpoint import RunFolder
    from ..training.config import read_config
    from ..training.reference import train_reference as run

    settings = read_config(config)
    with progress_bar("steps") as tick:
        done = run(settings, out, device=device, compiled=compiled, seconds=minutes and minutes * 60, progress=tick)
    (out / "loss.svg").write_bytes(loss_plot(RunFolder(out, settings.to_json()).entries()))
    if as_json:
        print(json.dumps({"out": str(out), "steps": done, "finished": done == settings.steps}))
    else:
        end = f"finished: {out / 'model'}" if done == settings.steps else "stopped; the same command goes on"
        console().print(f"{done} of {settings.steps} steps, {end}", markup=False, highlight=False, soft_wrap=True)
