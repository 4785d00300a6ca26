"""Commands that time edits, steps and the cache: `kv-retract bench ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Dtype, DtypeOption, Json, Model, Print, Run, Seed, show_document

Document = Annotated[Path | None, typer.Option(help="Also write the JSON document to this new file.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repetitions that count; the median is reported.")]


def edit(
    context: Annotated[int, typer.Option(min=2, help="Tokens of the thread.")] = 8192,
    span: Annotated[int, typer.Option(min=1, help="Tokens of the erased span.")] = 64,
    depth: Annotated[float, typer.Option(min=0, max=1, help="Where the span begins, 0 to 1.")] = 0.1,
    arm: Annotated[list[str] | None, typer.Option("--arm", "-a", help="Eraser; repeatable. Default: all.")] = None,
    model: Model = "random-256",
    repeats: Repeats = 7,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Time one edit of a long thread under every eraser, and the next step after it."""
    from ..evals.bench import EditBench
    from ..evals.bench import bench_edit as run
    from ..evals.bench_console import print_bench
    from ..evals.specs import parse_specs

    arms = {"arms": tuple(parse_specs(arm))} if arm else {}
    settings = EditBench(
        context=context, span=span, depth=depth, model=model, repeats=repeats, seed=seed, device=device,
        dtype=dtype.value, **arms,
    )  # fmt: skip
    _bench(lambda tick: run(settings, progress=tick), print_bench, out, as_json)


def latency(
    context: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens of the thread; repeatable. Default: 1024, 4096, 16384.")
    ] = None,
    depth: Annotated[
        list[float] | None, typer.Option(min=0, max=1, help="Where the span begins; repeatable. Default: 0.1, 0.5.")
    ] = None,
    span: Annotated[int, typer.Option(min=1, help="Tokens of the erased span.")] = 128,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", "-a", help="Eraser; repeatable. Default: recompute, shift, repair and kveraser."),
    ] = None,
    model: Model = "reference",
    repeats: Repeats = 20,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Document = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the growth into this SVG file.")] = None,
    as_json: Json = False,
) -> None:
    """Time edits of threads of several lengths: how the cost grows, and how much faster than recomputation it is."""
    from ..evals.bench_console import print_latency
    from ..evals.latency import LatencyBench
    from ..evals.latency import bench_latency as run
    from ..evals.specs import parse_specs

    given: dict[str, tuple[Any, ...]] = {
        "contexts": tuple(context or ()), "depths": tuple(depth or ()), "arms": tuple(parse_specs(arm or ())),
    }  # fmt: skip
    settings = LatencyBench(
        span=span, model=model, repeats=repeats, seed=seed, device=device, dtype=dtype.value,
        **{name: value for name, value in given.items() if value},
    )  # fmt: skip

    def run_and_draw(tick: Any) -> Any:
        document = run(settings, progress=tick)
        if plot is not None:
            from ..evals.plots import latency_plot

            plot.write_bytes(latency_plot(document))
        return document

    _bench(run_and_draw, print_latency, out, as_json)


def shared(
    threads: Annotated[int, typer.Option(min=2, help="Threads that share the document.")] = 64,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens before the document.")] = 512,
    span: Annotated[int, typer.Option(min=1, help="Tokens of the document.")] = 128,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens of each thread behind it.")] = 128,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", "-a", help="Eraser; repeatable. Default: kveraser and recompute.")
    ] = None,
    model: Model = "reference",
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Time the edit of one document that many threads share: of the first thread, and of each that follows."""
    from ..evals.bench_console import print_shared
    from ..evals.shared import SharedBench
    from ..evals.shared import bench_shared as run
    from ..evals.specs import parse_specs

    arms = {"arms": tuple(parse_specs(arm))} if arm else {}
    settings = SharedBench(
        threads=threads, prefix=prefix, span=span, suffix=suffix, model=model, seed=seed, device=device,
        dtype=dtype.value, **arms,
    )  # fmt: skip
    _bench(lambda tick: run(settings, progress=tick), print_shared, out, as_json)


def heal(
    context: Annotated[
        list[int] | None, typer.Option(min=128, help="Tokens of the thread; repeatable. Default: 1024, 4096.")
    ] = None,
    eraser: Annotated[str, typer.Option(help="Eraser of the steered edits.")] = "kveraser",
    model: Model = "reference",
    repeats: Repeats = 15,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Time the next token with healing and without, its divergence, and what a session costs an ordinary step."""
    from ..evals.bench_console import print_heal
    from ..evals.heal import HealBench
    from ..evals.heal import bench_heal as run

    contexts = {"contexts": tuple(context)} if context else {}
    settings = HealBench(
        model=model, eraser=eraser, repeats=repeats, seed=seed, device=device, dtype=dtype.value, **contexts
    )
    _bench(lambda tick: run(settings, progress=tick), print_heal, out, as_json)


def step(
    context: Annotated[
        list[int] | None, typer.Option(min=1024, help="Tokens of the thread; repeatable. Default: 1024, 8192, 32000.")
    ] = None,
    model: Model = "reference",
    repeats: Repeats = 15,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Time a whole agent step, stage by stage: how much of it is not the model, and what a session adds."""
    from ..evals.bench_console import print_step
    from ..evals.step import StepBench
    from ..evals.step import bench_step as run

    contexts = {"contexts": tuple(context)} if context else {}
    settings = StepBench(model=model, repeats=repeats, seed=seed, device=device, dtype=dtype.value, **contexts)
    _bench(lambda tick: run(settings, progress=tick), print_step, out, as_json)


def sglang(
    venv: Annotated[Path, typer.Option(help="Environment with SGLang and kv-retract.")] = Path(".venv-sglang"),
    length: Annotated[
        list[int] | None, typer.Option(min=128, help="Tokens of the thread; repeatable. Default: 1024, 4096, 8192.")
    ] = None,
    repeats: Repeats = 7,
    traffic_runs: Annotated[int, typer.Option(min=1, help="Runs of ordinary traffic on both servers.")] = 10,
    seed: Seed = 0,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Start real SGLang servers and time the next step after a withdrawal, and ordinary traffic beside the plugin."""
    import tempfile

    from ..evals.bench_console import print_sglang
    from ..evals.sglang import SGLangBench
    from ..evals.sglang import bench_sglang as run

    lengths = {"lengths": tuple(length)} if length else {}
    settings = SGLangBench(venv=venv, repeats=repeats, traffic_runs=traffic_runs, seed=seed, **lengths)
    with tempfile.TemporaryDirectory() as logs:
        _bench(lambda tick: run(settings, Path(logs), progress=tick), print_sglang, out, as_json)


def radix(
    venv: Annotated[
        Path | None, typer.Option(help="Environment with SGLang and kv-retract: its radix caches are timed as well.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads with shared prefixes.")] = 10_000,
    repeats: Repeats = 5,
    page: Annotated[int, typer.Option(min=1, help="Tokens per page of the index.")] = 1,
    seed: Seed = 0,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Time the prefix index on the steps of many threads, beside SGLang's radix caches in the same process."""
    from ..evals.bench_console import print_radix
    from ..evals.radix import RadixBench
    from ..evals.radix import bench_radix as run

    settings = RadixBench(threads=threads, repeats=repeats, seed=seed, page=page, venv=venv)
    _bench(lambda tick: run(settings, progress=tick), print_radix, out, as_json)


def kernels(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens that are moved; repeatable. Default: 1024, 8192, 32768.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the cache.")] = 36,
    kv_heads: Annotated[int, typer.Option(min=1, help="Of the cache.")] = 8,
    head_dim: Annotated[int, typer.Option(min=2, help="Of the cache.")] = 128,
    page: Annotated[int, typer.Option(min=1, help="Tokens per page.")] = 1,
    repeats: Repeats = 20,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Check each kernel of an edit against its twin, and time it against what a copy of the device reaches."""
    from ..evals.bench_console import print_kernels
    from ..evals.kernels import KernelBench
    from ..evals.kernels import bench_kernels as run

    sizes = {"tokens": tuple(tokens)} if tokens else {}
    settings = KernelBench(
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, page_size=page, repeats=repeats, seed=seed, device=device,
        dtype=dtype.value, **sizes,
    )  # fmt: skip
    _bench(lambda tick: run(settings, progress=tick), print_kernels, out, as_json)


def memory(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the thread.")] = 8192,
    forks: Annotated[int, typer.Option(min=1, help="Forks of it.")] = 1000,
    own_tokens: Annotated[int, typer.Option(min=1, help="With which every fork goes on.")] = 16,
    page: Annotated[int, typer.Option(min=1, help="Tokens per page.")] = 1,
    seed: Seed = 0,
    out: Document = None,
    as_json: Json = False,
) -> None:
    """Weigh a long thread and its forks: keys and values, and what is kept to find them."""
    from ..evals.bench_console import print_memory
    from ..evals.memory import MemoryBench
    from ..evals.memory import bench_memory as run

    settings = MemoryBench(context=context, forks=forks, own_tokens=own_tokens, page_size=page, seed=seed)
    _bench(lambda tick: run(settings, progress=tick), print_memory, out, as_json)


def _bench(run: Run, show: Print, out: Path | None, as_json: bool) -> None:
    """Run a benchmark and write its document where it was asked for."""
    from ..evals.results import check_new, write_new_json

    if out is not None:
        check_new(out)  # before minutes of work

    def run_and_write(tick: Any) -> Any:
        document = run(tick)
        if out is not None:
            write_new_json(out, document)
        return document

    show_document(run_and_write, "edits", show, as_json)
