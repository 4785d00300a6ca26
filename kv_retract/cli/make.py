"""Commands that make things: traces of the corpus, and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, DtypeOption, Json, Model, SplitOption, console, progress_bar

Texts = Annotated[
    list[Path] | None, typer.Option(help="Trace file, folder of such, or text file to learn text from. Repeatable.")
]


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
    text: Texts = None,
    device: Device = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile; needs a C++ compiler.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop with a checkpoint after so long.")] = None,
    as_json: Json = False,
) -> None:
    """Train a small chat model on the corpus, or go on with a run that was stopped.

    Writes config.json, log.jsonl, loss.svg, state.pt and, once finished, the folder model.
    """
    from ..training.config import read_config
    from ..training.reference import train_reference as run
    from ..training.texts import read_texts

    settings = read_config(config)
    texts = read_texts(text or ())
    with progress_bar("steps") as tick:
        done = run(
            settings, out, texts=texts, device=device, compiled=compiled, seconds=minutes and minutes * 60,
            progress=tick,
        )  # fmt: skip
    _draw(
        out, losses={"answer": "loss of answers", "text": "loss of the text"}, shares=("clean", "notes", "test"),
        share="probes answered exactly",
    )  # fmt: skip
    _tell(out, "model", done, settings.steps, as_json)


def train_eraser(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same folder resumes it.")],
    model: Model = "reference",
    variant: Annotated[str | None, typer.Option(help="blind, suffix_aware or kv_map.")] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain, finetune or both.")] = None,
    config: Annotated[Path | None, typer.Option(help="JSON file with fields of EraserTraining.")] = None,
    text: Texts = None,
    start: Annotated[Path | None, typer.Option("--from", help="Folder of an eraser to train further.")] = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.BFLOAT16,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 200,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw threads ahead; on a GPU, a few.")] = 0,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop with a checkpoint after so long.")] = None,
    as_json: Json = False,
) -> None:
    """Train a learned eraser for a model, or go on with a run that was stopped.

    Writes config.json, log.jsonl, loss.svg, state.pt and, once finished, the folder eraser.
    """
    from ..engine.models import load_model
    from ..training.eraser import train_eraser as run
    from ..training.eraser_config import read_eraser_training
    from ..training.texts import read_texts

    given = {name: value for name, value in (("variant", variant), ("stage", stage)) if value is not None}
    settings = read_eraser_training(config, **given)
    texts = read_texts(text or ())
    loaded = load_model(model, device=device, dtype=dtype.value)
    with progress_bar("steps") as tick:
        done = run(
            loaded, settings, out, texts=texts, start=start, seconds=minutes and minutes * 60,
            validate_every=validate_every, workers=workers, progress=tick,
        )  # fmt: skip
    _draw(
        out, losses={"kl": "KL to full recomputation"}, shares=("affected", "leak", "unaffected"),
        share="probes of the validation",
    )  # fmt: skip
    _tell(out, "eraser", done, settings.steps, as_json)


def train_acre(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same folder resumes it.")],
    model: Model = "reference",
    config: Annotated[Path | None, typer.Option(help="JSON file with fields of AcreTraining.")] = None,
    text: Texts = None,
    start: Annotated[Path | None, typer.Option("--from", help="Folder of landmarks to train further.")] = None,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop with a checkpoint after so long.")] = None,
    as_json: Json = False,
) -> None:
    """Train landmarks for threads beyond the window, or go on with a run that was stopped.

    Writes config.json, log.jsonl, loss.svg, state.pt and, once finished, the folder landmarks.
    """
    from ..engine.models import load_model
    from ..training.acre import train_acre as run
    from ..training.acre_config import read_acre_training
    from ..training.texts import read_texts

    settings = read_acre_training(config)
    texts = read_texts(text or ())
    loaded = load_model(model, device=device, dtype=dtype.value)
    with progress_bar("steps") as tick:
        done = run(
            loaded, settings, out, texts=texts, start=start, seconds=minutes and minutes * 60, progress=tick
        )  # fmt: skip
    losses = {"search": "KL of the search (per question)", "answer": "loss of answers", "text": "KL of the text"}
    _draw(out, losses=losses, shares=("found", "right"), share="questions of the validation")
    _tell(out, "landmarks", done, settings.steps, as_json)


def _draw(out: Path, *, losses: dict[str, str], shares: tuple[str, ...], share: str) -> None:
    from ..evals.plots import loss_plot
    from ..training.checkpoint import read_log

    (out / "loss.svg").write_bytes(loss_plot(read_log(out), losses=losses, shares=shares, share=share))


def _tell(out: Path, name: str, done: int, steps: int, as_json: bool) -> None:
    finished = (out / name).is_dir()
    if as_json:
        print(json.dumps({"out": str(out), "steps": done, "finished": finished}))
    else:
        end = f"finished: {out / name}" if finished else "stopped; the same command goes on"
        console().print(f"{done} of {steps} steps, {end}", markup=False, highlight=False, soft_wrap=True)
