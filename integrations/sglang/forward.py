"""One forward pass outside of SGLang's scheduling: tokens at free positions, on a context of free slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from .refusal import Refused


def write_kv(
    runner: Any,
    ids: Sequence[int],
    positions: Sequence[int],
    context: torch.Tensor,
    slots: torch.Tensor,
    *,
    lora_id: str | None = None,
) -> None:
    """Run tokens through the served model and write their KV into `slots`.

    Each token attends to the whole context and to the tokens before it. With the weights as they are, what is written
    equals a normal prefill exactly.

    Args:
        runner: `ModelRunner` of SGLang.
        ids: of the tokens.
        positions: of the tokens.
        context: slots that they attend to. Shape: (num_context,)
        slots: where their KV goes. Shape: (num_tokens,)
        lora_id: of a LoRA adapter that is switched on for them; None: none.

    Raises:
        Refused: the context is longer than the server's, or no row is free.
    """
    pool, device = runner.req_to_token_pool, runner.device
    before, count = len(context), len(ids)
    if before + count > pool.max_context_len:
        raise Refused("unsupported", f"{before + count} tokens exceed the server's context of {pool.max_context_len}")
    rows = pool.alloc_rows(1)
    if not rows:
        raise Refused("busy", "all request rows are in use; try again")
    try:
        pool.write((rows[0], slice(0, before)), context.to(torch.int32))
        pool.write((rows[0], slice(before, before + count)), slots.to(torch.int32))
        batch = _batch(ids, positions, before, rows[0], slots, device, lora_id)
        if runner.lora_manager is not None:
            runner.lora_manager.fetch_new_loras({lora_id})
            runner.lora_manager.prepare_lora_batch(batch)
        runner.kv_index_translator.own_plan(batch).bind(batch, runner.kv_index_translator)
        with torch.inference_mode():
            runner.forward(batch)
    finally:
        pool.free_rows(rows)


def _batch(
    ids: Sequence[int],
    positions: Sequence[int],
    before: int,
    row: int,
    slots: torch.Tensor,
    device: Any,
    lora_id: str | None,
) -> ForwardBatch:
    count = len(ids)

    def tensor(values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=tensor(ids),
        req_pool_indices=tensor([row]),
        seq_lens=tensor([before + count]),
        out_cache_loc=slots.to(device),
        seq_lens_sum=before + count,
        seq_lens_cpu=torch.tensor([before + count]),
        req_pool_indices_cpu=torch.tensor([row]),
        orig_seq_lens=tensor([before + count], torch.int32),
        positions=tensor(positions),
        extend_num_tokens=count,
        extend_seq_lens=tensor([count], torch.int32),
        extend_prefix_lens=tensor([before], torch.int32),
        extend_start_loc=tensor([0], torch.int32),
        extend_prefix_lens_cpu=[before],
        extend_seq_lens_cpu=[count],
        extend_logprob_start_lens_cpu=[count],
        lora_ids=[lora_id],
        rids=["kv_retract"],
        spec_algorithm=SpeculativeAlgorithm.NONE,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        global_num_token_non_padded_cpu=count,
        is_extend_in_batch=True,
    )
