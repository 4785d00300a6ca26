"""Commands that time and tell: replay recorded threads, benchmarks, the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Dtype, DtypeOption, Json, Model, Print, Run, Seed, console, now, progress_bar, show_document

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
Document = Annotated[Path | None, typer.Option(help="Also write the JSON document to this new file.")]
Repeats = Annotated[int, typer.Option(min=1, help="Repetitions that count; the median is reported.")]
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


def bench_edit(
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
    from ..evals.console import print_bench
    from ..evals.specs import parse_specs

    arms = {"arms": tuple(parse_specs(arm))} if arm else {}
    settings = EditBench(
        context=context, span=span, depth=depth, model=model, repeats=repeats, seed=seed, device=device,
        dtype=dtype.value, **arms,
    )  # fmt: skip
    _bench(lambda tick: run(settings, progress=tick), print_bench, out, as_json)


def bench_latency(
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
    as_json: Json = False,
) -> None:
    """Time edits of threads of several lengths: how the cost grows, and how much faster than recomputation it is."""
    from ..evals.console import print_latency
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
    _bench(lambda tick: run(settings, progress=tick), print_latency, out, as_json)


def bench_shared(
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
    from ..evals.console import print_shared
    from ..evals.shared import SharedBench
    from ..evals.shared import bench_shared as run
    from ..evals.specs import parse_specs

    arms = {"arms": tuple(parse_specs(arm))} if arm else {}
    settings = SharedBench(
        threads=threads, prefix=prefix, span=span, suffix=suffix, model=model, seed=seed, device=device,
        dtype=dtype.value, **arms,
    )  # fmt: skip
    _bench(lambda tick: run(settings, progress=tick), print_shared, out, as_json)


def demo(model: Model = "reference", device: Device = "cpu", dtype: DtypeOption = Dtype.FLOAT32) -> None:
    """Tell one agent run: a tool result arrives, is contradicted, is retracted, and the next answer changes."""
    from ..engine.hf import HFEngine
    from ..engine.models import load_model
    from ..evals.narrate import run_story, tell

    loaded = load_model(model, device=device, dtype=dtype.value)
    engine = HFEngine(loaded.model, max_tokens=8192, name=loaded.name)
    tell(run_story(loaded, engine), loaded.quality_note, console())


def bench_heal(
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
    from ..evals.console import print_heal
    from ..evals.heal import HealBench
    from ..evals.heal import bench_heal as run

    contexts = {"contexts": tuple(context)} if context else {}
    settings = HealBench(
        model=model, eraser=eraser, repeats=repeats, seed=seed, device=device, dtype=dtype.value, **contexts
    )
    _bench(lambda tick: run(settings, progress=tick), print_heal, out, as_json)


def bench_sglang(
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

    from ..evals.console import print_sglang
    from ..evals.sglang import SGLangBench
    from ..evals.sglang import bench_sglang as run

    lengths = {"lengths": tuple(length)} if length else {}
    settings = SGLangBench(venv=venv, repeats=repeats, traffic_runs=traffic_runs, seed=seed, **lengths)
    with tempfile.TemporaryDirectory() as logs:
        _bench(lambda tick: run(settings, Path(logs), progress=tick), print_sglang, out, as_json)


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
