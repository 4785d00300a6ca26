"""Entry point of SGLang's plugins: registers the radix cache, the hooks and the routes in every process of a server.

SGLang only logs what fails here. So the user selects the cache by name (`--radix-cache-backend kv_retract`): where this
function has failed, the name is unknown and the server does not start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAME = "kv_retract"


def load() -> None:
    """Register everything; called by SGLang."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    from . import hooks, routes

    if NAME in registered_radix_cache_backends():
        return
    _allow_cpu()
    hooks.register()
    routes.register()
    register_radix_cache_backend(NAME, hooks.create_cache)


def _allow_cpu() -> None:
    """Let SGLang 0.5.23 start on a CPU without vllm: its rotary embeddings take the native path there."""
    import importlib.util

    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if torch.cuda.is_available() or importlib.util.find_spec("vllm"):
        return

    def native(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        import sglang.srt.layers.rotary_embedding.base as base

        before, base._is_cpu = base._is_cpu, True
        try:
            return original(*args, **kwargs)
        finally:
            base._is_cpu = before

    HookRegistry.register("sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__", native, HookType.AROUND)
