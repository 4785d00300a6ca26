"""`kv-retract serve`: a real SGLang server with span retraction."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="reference, or a directory that SGLang can load.")] = "reference",
    eraser: Annotated[
        str, typer.Option(help="Folder of a learned eraser of the model; a variant for the reference model.")
    ] = "",
    ledger: Annotated[Path | None, typer.Option(help="SQLite file of span retractions; survives restarts.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 30_000,
    max_tokens: Annotated[int | None, typer.Option(min=256, help="Size of the KV pool, in tokens.")] = None,
    adapters: Annotated[
        str, typer.Option(help="How adapters of an eraser run: hooks, or lora (SGLang's own LoRA layers).")
    ] = "hooks",
    peer: Annotated[list[str] | None, typer.Option(help="URL of another replica of this server. Repeatable.")] = None,
    thread_header: Annotated[
        str, typer.Option(help="HTTP header that names the thread of an OpenAI request without extra_key.")
    ] = "",
    plain: Annotated[bool, typer.Option(help="Without span retraction: SGLang as it is, for comparisons.")] = False,
) -> None:
    """Start SGLang with the plugin of kv-retract. Whatever follows `--` is passed on to SGLang.

    Runs where SGLang is installed, in an environment of its own: pip install sglang==0.5.23 kv-retract.
    """
    from ..integrations.sglang.serve import Server, check_sglang

    check_sglang()
    import torch

    server = Server(
        model=model, eraser=eraser, adapters=adapters, ledger=str(ledger or ""), host=host, port=port,
        max_tokens=max_tokens, peers=peer or (), thread_header=thread_header, plain=plain, extra=tuple(context.args),
    )  # fmt: skip
    command = server.command(has_gpu=torch.cuda.is_available())
    os.execvpe(command[0], command, server.environment())
