"""The command line. Thin: parse, call `kv_retract.evals` or a registry, print. Errors of kv-retract exit with 2."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from ..errors import KVRetractError
from . import audit, lists, make, measure
from . import bench as timing
from . import evaluate as quality
from .interrupts import sure_interrupts
from .serve import serve

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
evaluate = typer.Typer(no_args_is_help=True, help="Measure the quality of answers on the corpus.")
train = typer.Typer(no_args_is_help=True, help="Train models on the corpus.")

app.command()(measure.replay)
app.command()(measure.demo)
app.command()(lists.policies)
app.command()(lists.erasers)
app.command()(lists.models)
app.command()(make.corpus)
app.command(context_settings={"allow_extra_args": True})(serve)
for group, name in ((bench, "bench"), (evaluate, "eval"), (train, "train")):
    app.add_typer(group, name=name)
app.add_typer(audit.app, name="audit")
bench.command("edit")(timing.edit)
bench.command("latency")(timing.latency)
bench.command("kernels")(timing.kernels)
bench.command("memory")(timing.memory)
bench.command("shared")(timing.shared)
bench.command("heal")(timing.heal)
bench.command("step")(timing.step)
bench.command("sglang")(timing.sglang)
bench.command("radix")(timing.radix)
evaluate.command("reference")(quality.eval_reference)
evaluate.command("erasers")(quality.eval_erasers)
evaluate.command("repeated")(quality.eval_repeated)
evaluate.command("policies")(quality.eval_policies)
evaluate.command("cascade")(quality.eval_cascade)
evaluate.command("acre")(quality.eval_acre)
train.command("reference")(make.train_reference)
train.command("eraser")(make.train_eraser)
train.command("acre")(make.train_acre)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Options of the program itself."""
    if version:
        from .. import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; the entry point. Whatever the caller can get wrong is told in one line."""
    try:
        with sure_interrupts():
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
        _fail("interrupted: no results were written; a training run goes on from its newest checkpoint", _INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    from ..evals.excerpts import visible

    line = visible(" ".join(message.split()))
    Console(stderr=True).print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)
