"""The command line. Thin: parse, call `kv_retract.evals` or a registry, print. Errors of kv-retract exit with 2."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .errors import KVRetractError, PluginError

if TYPE_CHECKING:
    from .registry import Registry

_INTERRUPTED = 130
# Part of click in some releases of typer and of typer itself in others: this finds it in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Take spans of an agent's context back, out of its KV cache. Start with [b]kv-retract replay[/b] on a "
    "recorded thread.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure what edits cost on this machine.")
app.add_typer(bench, name="bench")


class Dtype(StrEnum):
    """Of weights and cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]
Device = Annotated[str, typer.Option(help="As torch names it: cpu, cuda, cuda:1.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and cache.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of random weights and random token ids.")]
Model = Annotated[str, typer.Option(help="A name from `kv-retract models`, or a directory that transformers can load.")]

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


@app.command()
def replay(
    paths: Traces,
    policy: Policies = None,
    arm: Arms = None,
    model: Model = "random",
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
    from .evals.console import print_replay
    from .evals.replay import ReplaySettings
    from .evals.replay import replay as run
    from .evals.results import dump
    from .evals.specs import parse_specs

    out = out or Path("runs") / f"replay-{_now()}"
    settings = ReplaySettings(
        paths=tuple(paths), policies=tuple(parse_specs(policy or ["tool_error", "superseded"])),
        arms=tuple(parse_specs(arm or ["none", "mask", "shift"])), out=out, model=model,
        limit=limit, max_context=max_context, pool_tokens=pool_tokens, seed=seed, device=device, dtype=dtype.value,
        score_tokens=score_tokens,
    )  # fmt: skip
    with _progress("traces") as tick:
        result = run(settings, progress=tick)
    if as_json:
        print(dump(result.metrics()))
        return
    console = _console()
    print_replay(result, console)
    console.print(f"Report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


@bench.command("edit")
def bench_edit(
    context: Annotated[int, typer.Option(min=2, help="Tokens of the thread.")] = 8192,
    span: Annotated[int, typer.Option(min=1, help="Tokens of the erased span.")] = 64,
    depth: Annotated[float, typer.Option(min=0, max=1, help="Where the span begins, 0 to 1.")] = 0.1,
    arm: Annotated[list[str] | None, typer.Option("--arm", "-a", help="Eraser; repeatable. Default: all.")] = None,
    model: Model = "random-256",
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions that count; the median is reported.")] = 7,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: DtypeOption = Dtype.FLOAT32,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON document to this new file.")] = None,
    as_json: Json = False,
) -> None:
    """Time one edit of a long thread under every eraser, and the next step after it."""
    from .evals.bench import EditBench
    from .evals.bench import bench_edit as run
    from .evals.console import print_bench
    from .evals.results import check_new, dump, write_new_json
    from .evals.specs import parse_specs

    if out is not None:
        check_new(out)  # before minutes of work
    arms = {"arms": tuple(parse_specs(arm))} if arm else {}
    settings = EditBench(
        context=context, span=span, depth=depth, model=model, repeats=repeats, seed=seed, device=device,
        dtype=dtype.value, **arms,
    )  # fmt: skip
    with _progress("edits") as tick:
        document = run(settings, progress=tick)
    if out is not None:
        write_new_json(out, document)
    if as_json:
        print(dump(document))
    else:
        print_bench(document, _console())


@app.command()
def policies(as_json: Json = False) -> None:
    """List the policies: detectors that find what to take back."""
    from .policies import POLICIES

    _list(POLICIES, as_json)


@app.command()
def erasers(as_json: Json = False) -> None:
    """List the erasers: ways to edit the cache."""
    from .erasers import ERASERS

    _list(ERASERS, as_json)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models of the embedded engine; a directory works as well."""
    from .engine.models import MODELS

    _list(MODELS, as_json, hidden={"device", "dtype", "seed"})


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the program itself."""
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; the entry point. Whatever the caller can get wrong is told in one line."""
    try:
        code = app(standalone_mode=False)
    except KVRetractError as error:
        _fail(str(error), 2)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # has printed the help
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "kv-retract"
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)  # type: ignore[attr-defined]
    except typer.Abort:  # what some releases of typer make of Ctrl-C
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        _fail("interrupted; no results were written", _INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    from .evals.excerpts import visible

    line = visible(" ".join(message.split()))
    Console(stderr=True).print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def describe(registry: Registry[Any], *, hidden: set[str] = frozenset()) -> list[dict[str, Any]]:  # type: ignore[assignment]
    """Return name, summary and parameters with their defaults of everything that a registry holds.

    A part of another distribution that cannot be imported, or is no factory, is listed with the reason.
    """
    found = []
    for name in registry.names():
        try:
            factory = registry.factory(name)
            parameters = _parameters(factory)
        except (PluginError, TypeError, ValueError) as error:  # the latter two: it names something else than a factory
            found.append({"name": name, "summary": f"(unusable) {error}", "parameters": {}})
            continue
        summary = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
        defaults = {key: value for key, value in parameters.items() if key not in hidden}
        found.append({"name": name, "summary": summary, "parameters": defaults})
    return found


def _parameters(factory: Callable[..., Any]) -> dict[str, str]:
    if dataclasses.is_dataclass(factory):
        fields = dataclasses.fields(factory)
        made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
        return {f.name: _default(made.get(f.name, f.default)) for f in fields}
    return {p.name: _default(p.default) for p in inspect.signature(factory).parameters.values()}


def _default(value: Any) -> str:
    if value in (dataclasses.MISSING, inspect.Parameter.empty):
        return "(required)"
    text = str(value.value) if isinstance(value, StrEnum) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _list(registry: Registry[Any], as_json: bool, *, hidden: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    from .evals.console import print_parts
    from .evals.results import dump

    parts = describe(registry, hidden=hidden)
    if as_json:
        print(dump(parts))
    else:
        print_parts(registry.kind, parts, _console())


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a bar on standard error while the block runs; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    # Tables keep their columns where the output is a file or a pipe.
    return Console() if sys.stdout.isatty() else Console(width=160)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
