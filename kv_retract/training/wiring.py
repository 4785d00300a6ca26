"""A head start for small models: an induction circuit wired into the first two layers of a fresh Qwen3.

Trained from scratch on look-up, a small model stays at chance for long until attention heads find each other: one that
tells every token what stood before it, and one in the next layer that looks for tokens preceded by the current one
(induction heads, arXiv 2209.11895). Here both are set up before training; training changes them freely.
"""

from __future__ import annotations

from typing import Any

import torch

BACK = (1, 2, 3)
"""How many positions back the wired heads of layer 0 look. A value stands behind `X is`, with a space before a name."""


@torch.no_grad()
def wire_induction(model: Any, *, generator: torch.Generator, sharpness: float = 3.0, copy: float = 12.0) -> None:
    """Wire heads that look back (layer 0) and heads that match (layer 1); changes the model in place.

    Layer 0, KV head 0: dimension 0 of every embedding is one constant, from which the key of every token is the same,
    and the query of query head h too, turned by `BACK[h]` positions in the fast rotary pairs. So each token attends to
    the one so many positions before it, and carries a projection of it in a subspace of its own.

    Layer 1, in the slow rotary pairs: KV head 0 finds the tokens whose predecessor is the current token; KV head 1
    finds those that carry as third last token what the current one carries as second last: what follows
    `order Kel-42 is ` for a token behind another `order Kelbrin is`. Both copy what they find towards the output.

    Args:
        model: a fresh `Qwen3ForCausalLM` with tied embeddings, at least two KV heads and three query heads for each.
        generator: of the random projections.
        sharpness: scale of the normalised queries and keys in the pairs used.
        copy: scale of what is copied.

    Raises:
        ValueError: the model has fewer heads, or is too narrow.
    """
    config = model.config
    width, dim, groups = config.hidden_size, config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rank = min(dim, width // (2 * len(BACK)))
    if groups < len(BACK) or config.num_key_value_heads < 2 or rank < 8:
        raise ValueError(
            f"wiring needs 2 KV heads with {len(BACK)} query heads each and a width of {16 * len(BACK)}, got "
            f"{config.num_key_value_heads} with {groups} and {width}"
        )
    pairs = dim // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
    embeddings = model.model.embed_tokens.weight
    spread = embeddings.std()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # What is carried has subspaces of its own: no embedding lies in them, and no projection of one reads them.
    free = normal(width, rank * len(BACK))
    free[0] = 0
    free = torch.linalg.qr(free).Q
    places = free.T.reshape(len(BACK), rank, width)
    embeddings -= embeddings @ free @ free.T
    embeddings[:, 0] = 4 * spread
    tokens = torch.zeros(dim, width)
    tokens[:rank] = normal(rank, width) / width**0.5
    tokens[:, 0] = 0  # what all tokens have in common tells none apart
    tokens -= tokens @ free @ free.T

    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    for layer in model.model.layers[:2]:  # what is drawn at random does not drown what is wired
        layer.self_attn.o_proj.weight *= 0.1
        layer.mlp.down_proj.weight *= 0.1
    fast = (torch.arange(pairs) < max(4, pairs // 5)).float()
    first.k_proj.weight[:dim] *= 0.02
    first.k_proj.weight[:pairs, 0] += fast
    for head, back in enumerate(BACK):
        rows = slice(head * dim, (head + 1) * dim)
        # R(p) query meets R(p - back) key in the same direction, if the query is turned back by as much.
        first.q_proj.weight[rows] *= 0.02
        first.q_proj.weight[rows, 0] += torch.cat([fast * (frequency * back).cos(), -fast * (frequency * back).sin()])
        first.o_proj.weight[:, rows] = 0
        first.o_proj.weight[:, head * dim : head * dim + rank] = spread * places[head].T  # as large as embeddings
    first.v_proj.weight[:dim] = tokens
    for norm in (first.q_norm, first.k_norm):
        norm.weight[:] = (1 + fast * (sharpness - 1)).repeat(2)

    slow = (frequency * 2048 < 1.0).float().repeat(2)
    index = torch.zeros(dim, dtype=torch.long)
    index[slow > 0] = torch.arange(int(slow.sum())) % rank  # the pairs used hold as much of the projections as fits
    chosen = slow[:, None]
    now, carried = tokens[:rank], places
    for kv, (query, key) in enumerate(((now, carried[0]), (carried[1], carried[2]))):
        rows = slice(kv * groups * dim, (kv * groups + 1) * dim)
        second.k_proj.weight[kv * dim : (kv + 1) * dim] = chosen * key[index]
        second.q_proj.weight[rows] = chosen * query[index]
        second.v_proj.weight[kv * dim : (kv + 1) * dim] = tokens
        second.o_proj.weight[:, rows] = copy * spread * tokens.T
    for norm in (second.q_norm, second.k_norm):
        norm.weight[:] = torch.where(slow > 0, sharpness / 2, 1.0)
