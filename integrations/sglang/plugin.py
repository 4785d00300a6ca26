"""Entry point of SGLang's plugins: registers the radix cache, the hooks and the routes in every process of a server.

SGLang only logs what fails here. So the user selects the cache by name (`--radix-cache-backend kv_retract`): where this
function has failed, the name is unknown and the server does not start.
"""

from __future__ import annotations

NAME = "kv_retract"


def load() -> None:
    """Register everything; called by SGLang."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    from . import cpu, hooks, routes
    from .config import PluginConfig

    if NAME in registered_radix_cache_backends():
        return
    cpu.register(lora=PluginConfig.from_environment().adapters == "lora")
    hooks.register()
    routes.register()
    register_radix_cache_backend(NAME, hooks.create_cache)
