"""Commands that measure quality: of answers, erasers, policies and cascades, on the corpus or on labelled threads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, DtypeOption, Json, Model, SplitOption, now, show_document

Workers = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Tokens of the traces; repeatable. Default: 256, 1024, 2048.")]
FirstSeed = Annotated[int, typer.Option(min=0, help="Of the first trace.")]


def eval_reference(
    model: Model = "reference",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/eval-TIME.")
    ] = None,
    family: Annotated[list[str] | None, typer.Option(help="Task family; repeatable. Default: all.")] = None,
    length: Lengths = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Traces per family and length.")] = 24,
    workers: Workers = 1,
    split: SplitOption = "test",
    seed: FirstSeed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Json = False,
) -> None:
    """Ask a chat model about traces of the corpus: does it read them, and does a stale cache leak?"""
    from ..evals.console import print_reference
    from ..evals.reference import LENGTHS, ReferenceEval
    from ..evals.reference import eval_reference as run

    out = out or Path("runs") / f"eval-{now()}"
    settings = ReferenceEval(
        out=out, model=model, families=tuple(family or ()), lengths=tuple(length or LENGTHS), n=n, split=split,
        seed=seed, device=device, dtype=dtype.value, workers=workers,
    )  # fmt: skip
    show_document(lambda tick: run(settings, progress=tick), "traces", print_reference, as_json)


def eval_erasers(
    model: Model = "reference",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/erasers-TIME.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Task family; repeatable. Default: all.")] = None,
    length: Lengths = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", "-a", help="Eraser, also with parameters; repeatable. Default: all of the project's."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Traces per task and length.")] = 12,
    workers: Workers = 1,
    split: SplitOption = "test",
    seed: FirstSeed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Json = False,
) -> None:
    """Compare erasers on the corpus: what is still given, what is lost, what an edit costs, what can be got back."""
    from ..evals.console import print_erasers
    from ..evals.erasers import ARMS, LENGTHS, EraserEval
    from ..evals.erasers import eval_erasers as run
    from ..evals.specs import parse_specs

    settings = EraserEval(
        out=out or Path("runs") / f"erasers-{now()}", model=model, tasks=tuple(tasks or ()),
        lengths=tuple(length or LENGTHS), arms=tuple(parse_specs(arm)) if arm else ARMS, n=n, workers=workers,
        split=split, seed=seed, device=device, dtype=dtype.value,
    )  # fmt: skip
    show_document(lambda tick: run(settings, progress=tick), "traces", print_erasers, as_json)


def eval_policies(
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/policies-TIME.")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", "-p", help="Policy, also with parameters; repeatable. Default: all with labels."),
    ] = None,
    labelled: Annotated[
        list[Path] | None, typer.Option(help="File of labelled threads, beside the corpus; repeatable.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of the corpus' threads; repeatable. Default: 256, 1024.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Threads of the corpus per policy and length.")] = 50,
    split: SplitOption = "test",
    seed: FirstSeed = 0,
    as_json: Json = False,
) -> None:
    """Compare what policies propose with what there is to find: recall, precision, exact spans."""
    from ..evals.console import print_policies
    from ..evals.policies import LENGTHS, PolicyEval
    from ..evals.policies import eval_policies as run
    from ..evals.specs import parse_specs

    settings = PolicyEval(
        out=out or Path("runs") / f"policies-{now()}", policies=tuple(parse_specs(policy or ())),
        labelled=tuple(labelled or ()), lengths=tuple(length or LENGTHS), n=n, split=split, seed=seed,
    )  # fmt: skip
    show_document(lambda tick: run(settings, progress=tick), "threads", print_policies, as_json)


def eval_repeated(
    model: Model = "reference",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/repeated-TIME.")
    ] = None,
    edits: Annotated[
        list[int] | None, typer.Option(min=1, help="Retractions in a thread; repeatable. Default: 1, 4, 16, 64.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", "-a", help="Eraser; repeatable. Default: mask, recompute, kveraser.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Threads per number of retractions.")] = 4,
    workers: Workers = 1,
    split: SplitOption = "test",
    seed: Annotated[int, typer.Option(min=0, help="Of the first thread.")] = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Json = False,
) -> None:
    """Retract many facts of one thread, one after the other and at once, and see what is left of the others."""
    from ..evals.console import print_repeated
    from ..evals.repeated import ARMS, EDITS, RepeatedEval
    from ..evals.repeated import eval_repeated as run
    from ..evals.specs import parse_specs

    settings = RepeatedEval(
        out=out or Path("runs") / f"repeated-{now()}", model=model, edits=tuple(edits or EDITS), n=n,
        arms=tuple(parse_specs(arm)) if arm else ARMS, split=split, seed=seed, device=device, dtype=dtype.value,
        workers=workers,
    )  # fmt: skip
    show_document(lambda tick: run(settings, progress=tick), "threads", print_repeated, as_json)


def eval_cascade(
    model: Model = "reference",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/cascade-TIME.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Task family; repeatable. Default: facts, updates and needles.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of the traces; repeatable. Default: 512.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", "-a", help="Eraser; repeatable. Default: mask, recompute, kveraser.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Traces per task and length.")] = 12,
    workers: Workers = 1,
    split: SplitOption = "test",
    seed: FirstSeed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Json = False,
) -> None:
    """Retract spans that the agent has repeated already, with and without what was derived from them."""
    from ..evals.cascade import ARMS, LENGTHS, TASKS, CascadeEval
    from ..evals.cascade import eval_cascade as run
    from ..evals.console import print_cascade
    from ..evals.specs import parse_specs

    settings = CascadeEval(
        out=out or Path("runs") / f"cascade-{now()}", model=model, tasks=tuple(tasks or TASKS),
        lengths=tuple(length or LENGTHS), arms=tuple(parse_specs(arm)) if arm else ARMS, n=n, workers=workers,
        split=split, seed=seed, device=device, dtype=dtype.value,
    )  # fmt: skip
    show_document(lambda tick: run(settings, progress=tick), "traces", print_cascade, as_json)


def eval_acre(
    model: Model = "reference",
    out: Annotated[
        Path | None, typer.Option(help="Folder for results, which must be new. Default: runs/acre-TIME.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Task family, or overview; repeatable. Default: six of them.")
    ] = None,
    times: Annotated[
        list[int] | None, typer.Option(min=1, help="Length of the threads, in windows; repeatable. Default: 2, 4, 8.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", "-a", help="As acre:ratio=16,refill=512; repeatable. Default: all, and some sizes."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Threads per task and length.")] = 8,
    window: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 1024,
    landmarks: Annotated[
        str, typer.Option(help="Folder of trained landmarks. Default: those that are bundled for the model.")
    ] = "",
    retract: Annotated[bool, typer.Option("--retract", help="Take spans of old windows back, too.")] = False,
    bench: Annotated[bool, typer.Option("--bench", help="Time refilling against reading again, too.")] = False,
    workers: Workers = 1,
    split: SplitOption = "test",
    seed: FirstSeed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    as_json: Json = False,
) -> None:
    """Ask about threads of several times the window: what is right, from how much memory, how soon."""
    from ..evals.acre import ARMS, TIMES, AcreEval
    from ..evals.acre import eval_acre as run
    from ..evals.console import print_acre
    from ..evals.specs import parse_specs

    settings = AcreEval(
        out=out or Path("runs") / f"acre-{now()}", model=model, tasks=tuple(tasks or ()), times=tuple(times or TIMES),
        arms=tuple(parse_specs(arm)) if arm else ARMS, n=n, window=window, landmarks=landmarks, retract=retract,
        bench=bench, workers=workers, split=split, seed=seed, device=device, dtype=dtype.value,
    )  # fmt: skip
    show_document(lambda tick: run(settings, progress=tick), "threads", print_acre, as_json)
