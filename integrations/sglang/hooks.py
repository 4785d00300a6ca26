"""Where the plugin takes hold of SGLang's scheduler: arrival, admission, dispatch, and what is refused at start.

Every hook does nothing on a server that runs another radix cache.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import BaseReq, hook_custom_types
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.utils import TypeBasedDispatcher

from . import api
from .cache import Namespace, RetractableRadixCache
from .config import PluginConfig
from .editor import PathEditor
from .peers import Peers, key_of
from .pool import KVPool
from .records import SpanLedger
from .service import SpanService

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CREATE = f"{_SCHEDULER}._create_generation_req"
_DISPATCH = f"{_SCHEDULER}.init_request_dispatcher"
_LOOP = f"{_SCHEDULER}.process_input_requests"
_ADMIT = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"


class SpanRequest(BaseReq, kw_only=True):
    """An operation on its way to the scheduler."""

    ticket: str
    """Which answer is whose: one that waits for its thread holds no other up."""
    operation: str
    body: str
    """JSON of the operation's model in `api`."""
    wait_s: float = 0.0


class SpanReply(BaseReq, kw_only=True):
    """Its answer."""

    ticket: str
    ok: bool
    body: str


def register() -> None:
    """Register the hooks; `load_plugins` of SGLang applies them."""
    hook_custom_types(SpanRequest, SpanReply)
    HookRegistry.register(_DISPATCH, _add_dispatch, HookType.AFTER)
    HookRegistry.register(_CREATE, _on_arrival, HookType.AROUND)
    HookRegistry.register(_LOOP, _run_parked, HookType.AFTER)
    HookRegistry.register(_ADMIT, _on_admission, HookType.AROUND)


def create_cache(context: TreeCacheBuildContext) -> BasePrefixCache:
    """Build the radix cache of `--radix-cache-backend kv_retract`.

    Raises:
        ValueError: the server runs with something that span retraction does not support, or a hook is not in place.
    """
    missing = {_DISPATCH, _CREATE, _LOOP, _ADMIT} - HookRegistry._patched
    if missing:
        raise ValueError(f"kv_retract: SGLang did not apply the hooks on {', '.join(sorted(missing))}; is it 0.5.23?")
    if wrong := [what for what, is_on in _unsupported(context).items() if is_on]:
        raise ValueError(f"kv_retract: span retraction does not support {', '.join(wrong)}; start without")
    return create_unified_radix_cache(context, cache_class=RetractableRadixCache)


def _unsupported(context: TreeCacheBuildContext) -> dict[str, bool]:
    args, pool = context.server_args, context.params.token_to_kv_pool_allocator.get_kvcache()
    is_plain = type(pool).__name__ == "MHATokenToKVPool"
    return {
        "page sizes other than 1": context.params.page_size != 1,
        "a disabled radix cache": context.disable_radix_cache,
        "tensor parallelism": context.tp_size != 1,
        "sliding-window attention": context.is_hybrid_swa,
        "Mamba layers": context.is_hybrid_ssm,
        "latent attention (MLA)": not is_plain,
        "keys and values of different or unusual shapes": is_plain and _has_odd_shapes(pool),
        "a hierarchical cache": context.enable_hierarchical_cache,
        "an external cache linker": bool(getattr(args, "enable_unified_cache_external_linker", False)),
        "speculative decoding": getattr(args, "speculative_algorithm", None) is not None,
        "a quantised KV cache": any(kind in str(getattr(args, "kv_cache_dtype", "")) for kind in ("fp8", "fp4")),
        "pipeline parallelism": getattr(args, "pp_size", 1) > 1,
        "data parallelism": getattr(args, "dp_size", 1) > 1,
        "disaggregated prefill": getattr(args, "disaggregation_mode", "null") not in (None, "null"),
        "the KV canary (SGLang's checks its own cache class only)": getattr(args, "kv_canary", "none") != "none",
        "streaming sessions": bool(getattr(args, "enable_streaming_session", False)),
    }  # fmt: skip


def _has_odd_shapes(pool: Any) -> bool:
    """Whether a pool's layers are no tensors of (slot, head, dimension), keys as values, that follow each other."""
    layers = [*pool.k_buffer, *pool.v_buffer]
    return any(x.dim() != 3 or x.shape != layers[0].shape or not x.is_contiguous() for x in layers)


class _Parked(NamedTuple):
    """An operation that waits until no request of its thread runs."""

    request: SpanRequest
    deadline: float


def _add_dispatch(result: Any, scheduler: Any) -> None:
    if not isinstance(scheduler.tree_cache, RetractableRadixCache):
        return
    scheduler.kv_retract = scheduler.tree_cache.service = _service_of(scheduler)
    scheduler.kv_retract_parked = []
    handler = partial(_run_or_park, scheduler)
    scheduler._request_dispatcher += TypeBasedDispatcher([(SpanRequest, handler)])


def _service_of(scheduler: Any) -> SpanService:
    from .steering import Steering

    config, args, cache = PluginConfig.from_environment(), scheduler.server_args, scheduler.tree_cache
    runner, model = scheduler.tp_worker.model_runner, scheduler.model_config
    pool = cache.token_to_kv_pool_allocator.get_kvcache()
    kv = KVPool(pool, runner)
    steering = Steering(config.eraser, runner, kv, args.model_path, config.adapters) if config.eraser else None
    told = {
        "model": str(args.served_model_name or args.model_path), "vocab_size": model.vocab_size,
        "max_positions": model.context_len, "num_layers": len(pool.k_buffer),
        "num_kv_heads": pool.k_buffer[0].shape[1], "head_dim": pool.k_buffer[0].shape[2],
        "dtype": str(pool.k_buffer[0].dtype).removeprefix("torch."), "device": str(runner.device),
    }  # fmt: skip
    service = SpanService(
        PathEditor(cache, kv, steering), SpanLedger(config.ledger), told, lambda name: _is_busy(scheduler, name),
        Peers(config.peers, api_key=key_of(args)) if config.peers else None,
    )  # fmt: skip
    if service.peers is not None:
        service.peers.pull()
        service.peers.watch(config.peer_seconds)
    return service


def _is_busy(scheduler: Any, extra_key: str) -> bool:
    """Whether a request of a namespace runs or waits."""
    batches = [scheduler.running_batch, scheduler.last_batch, getattr(scheduler, "cur_batch", None)]
    requests = [request for batch in batches if batch is not None for request in batch.reqs]
    requests += scheduler.waiting_queue
    requests += [entry[0] if isinstance(entry, tuple) else entry for entry in scheduler.grammar_manager.grammar_queue]
    requests += [scheduler.chunked_req] if scheduler.chunked_req is not None else []
    return any(getattr(request, "kv_retract_thread", request.extra_key) == extra_key for request in requests)


def _run_or_park(scheduler: Any, request: SpanRequest) -> SpanReply | None:
    """Run an operation at once; None: its thread is busy, and it is answered later."""
    answer = scheduler.kv_retract.run(request.operation, request.body)
    if _is_refused_as_busy(answer) and request.wait_s > 0:
        scheduler.kv_retract_parked.append(_Parked(request, time.monotonic() + request.wait_s))
        return None
    return _reply(request, answer)


def _run_parked(result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    """After the scheduler has read its requests: try what waits."""
    parked: list[_Parked] = getattr(scheduler, "kv_retract_parked", [])
    if not parked:
        return
    now, still = time.monotonic(), []
    for entry in parked:
        answer = scheduler.kv_retract.run(entry.request.operation, entry.request.body)
        if _is_refused_as_busy(answer) and now < entry.deadline:
            still.append(entry)
        else:
            scheduler.send_control_output(_reply(entry.request, answer), entry.request)
    scheduler.kv_retract_parked = still


def _is_refused_as_busy(answer: Any) -> bool:
    return isinstance(answer, api.Refusal) and answer.error == "busy"


def _reply(request: SpanRequest, answer: Any) -> SpanReply:
    return SpanReply(ticket=request.ticket, ok=not isinstance(answer, api.Refusal), body=answer.model_dump_json())


def _on_arrival(
    original: Callable[..., Any],
    scheduler: Any,
    received: Any,
    rid: str,
    text: Any,
    ids: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Show a request to SGLang with its thread's span retractions applied; refuse tombstones that are not cached."""
    service: SpanService | None = getattr(scheduler, "kv_retract", None)
    if service is None or ids is None:
        return original(scheduler, received, rid, text, ids, *args, **kwargs)
    thread, namespace = received.extra_key, _namespace_of(received)
    original_ids, rewritten = ids, service.rewrite(ids, thread, namespace)
    if rewritten is not None:
        ids = received.input_ids = array("q", rewritten.tolist())
    request = original(scheduler, received, rid, text, ids, *args, **kwargs)
    request.kv_retract_thread = thread
    request.kv_retract_original = original_ids if rewritten is not None else None
    request.kv_retract_tombstones = len(ids) > 0 and min(ids) < 0
    if not request.kv_retract_tombstones:
        return request
    if rewritten is None and (cold := service.cold(ids, namespace)):
        request.set_finish_with_abort(f"{api.COLD}: {cold} of them are not cached; leave their spans out of the prompt")
    return request


def _namespace_of(received: Any) -> Namespace:
    """Return where a request reads the cache; SGLang adds the adapter of a LoRA request to its key."""
    key = received.extra_key if received.lora_id is None else (received.extra_key or "") + received.lora_id
    return Namespace(key, received.cache_salt or None)


def _on_admission(original: Callable[..., Any], adder: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep tombstones that were evicted while a request waited from an embedding: rewrite it anew, or refuse it."""
    cache = adder.tree_cache
    # Requests of other kinds than `_on_arrival` sees have no such attributes.
    may_be_cold = isinstance(cache, RetractableRadixCache) and getattr(request, "kv_retract_tombstones", True)
    if may_be_cold and request.to_finish is None:
        cached, ids = request.prefix_len + request.host_hit_length, request.origin_input_ids
        if len(ids) > cached and min(ids[cached:]) < 0:
            if getattr(request, "kv_retract_original", None) is None:
                request.set_finish_with_abort(f"{api.COLD}: they were evicted while the request waited; send it again")
            else:
                _rewrite_waiting(cache.service, request)
            request.init_next_round_input(cache)
    return original(adder, request, *args, **kwargs)


def _rewrite_waiting(service: SpanService, request: Any) -> None:
    """Leave what is no longer cached out of a request that has not begun, or was preempted."""
    namespace = Namespace(request.extra_key, request.cache_salt)
    rewritten = service.rewrite(request.kv_retract_original, request.kv_retract_thread, namespace)
    ids = array("q", request.kv_retract_original if rewritten is None else rewritten.tolist())
    if request.logprob_start_len > 0:
        request.logprob_start_len = min(request.logprob_start_len, len(ids))
    request.origin_input_ids = request.origin_input_ids_unpadded = ids
