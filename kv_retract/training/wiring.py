"""A head start for small models: an induction circuit wired into the first layers of a fresh Qwen3.

Trained from scratch on look-up, a small model stays at chance for long until attention heads find each other: one that
tells every token what stood before it, and one in the next layer that looks for tokens preceded by the current one
(induction heads, arXiv 2209.11895). Here both are set up before training, and a third that reads what such heads left
at later mentions; training changes them freely.
"""

from __future__ import annotations

from typing import Any

import torch

BACK = (1, 2, 3)
"""How many positions back the wired heads of layer 0 look. A value stands behind `X is`, with a space before a name."""


@torch.no_grad()
def wire_induction(model: Any, *, generator: torch.Generator, sharpness: float = 3.0, copy: float = 12.0) -> None:
    """Wire heads that look back, that match, and that read notes (layers 0, 1, 2); changes the model in place.

    Layer 0, KV head 0: dimension 0 of every embedding is one constant, from which the key of every token is the same,
    and the query of query head h too, turned by `BACK[h]` positions in the fast rotary pairs. So each token attends to
    the one so many positions before it, and carries a projection of it in a subspace of its own.

    Layer 1, in the slow rotary pairs: KV head 0 finds the tokens whose predecessor is the current token; KV head 1
    finds those that carry as third last token what the current one carries as second last: what follows
    `order Kel-42 is ` for a token behind another `order Kelbrin is`. Both copy what they find towards the output.

    Layer 2, where there is one: KV head 0 finds the tokens that carry as second last token what the current one does,
    as behind a later mention of `order Kel-42`. Such a token has already matched in layer 1 and so holds the value: a
    note (arXiv 2606.17107), which answers although the text that told the value is hidden.

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
    spread = model.model.embed_tokens.weight.std()
    tokens, carried = _subspaces(model.model.embed_tokens.weight, rank, generator)
    now = tokens[:rank]
    values = torch.zeros(dim, width)
    values[:rank] = now
    layers = model.model.layers
    for layer in layers[:2]:  # what is drawn at random does not drown what is wired
        layer.self_attn.o_proj.weight *= 0.1
        layer.mlp.down_proj.weight *= 0.1
    pairs = dim // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(pairs) / pairs)
    _look_back(layers[0].self_attn, dim, frequency, values, spread * carried, sharpness)
    slow = (frequency * 2048 < 1.0).repeat(2)
    matches = [(1, 0, now, carried[0]), (1, 1, carried[1], carried[2])]
    matches += [(2, 0, carried[1], carried[1])] if len(layers) > 2 else []
    for layer, kv, query, key in matches:
        attention = layers[layer].self_attn
        _match(attention, kv, kv * groups, slow, query, key)
        attention.v_proj.weight[kv * dim : (kv + 1) * dim] = values
        attention.o_proj.weight[:, kv * groups * dim : (kv * groups + 1) * dim] = copy * spread * values.T
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight[:] = torch.where(slow, sharpness / 2, 1.0)


def _subspaces(embeddings: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare embeddings; return a projection of tokens, and subspaces in which heads carry it, one per `BACK`.

    What is carried has subspaces of its own: no embedding lies in them, and no projection of one reads them.
    Dimension 0 of every embedding becomes the same constant.

    Returns:
        `(rank, width)` and `(len(BACK), rank, width)`.
    """
    width = embeddings.shape[1]
    spread = embeddings.std()
    free = torch.randn(width, rank * len(BACK), generator=generator)
    free[0] = 0
    free = torch.linalg.qr(free).Q
    embeddings -= embeddings @ free @ free.T
    embeddings[:, 0] = 4 * spread
    tokens = torch.randn(rank, width, generator=generator) / width**0.5
    tokens[:, 0] = 0  # what all tokens have in common tells none apart
    tokens -= tokens @ free @ free.T
    return tokens, free.T.reshape(len(BACK), rank, width)


def _look_back(
    attention: Any, dim: int, frequency: torch.Tensor, values: torch.Tensor, places: torch.Tensor, sharpness: float
) -> None:
    """Wire query head h of KV head 0 to the token `BACK[h]` positions before, in the fast rotary pairs."""
    pairs, rank = dim // 2, places.shape[1]
    fast = (torch.arange(pairs) < max(4, pairs // 5)).float()
    attention.k_proj.weight[:dim] *= 0.02
    attention.k_proj.weight[:pairs, 0] += fast
    for head, back in enumerate(BACK):
        rows = slice(head * dim, (head + 1) * dim)
        # R(p) query meets R(p - back) key in the same direction, if the query is turned back by as much.
        turned = torch.cat([fast * (frequency * back).cos(), -fast * (frequency * back).sin()])
        attention.q_proj.weight[rows] *= 0.02
        attention.q_proj.weight[rows, 0] += turned
        attention.o_proj.weight[:, rows] = 0
        attention.o_proj.weight[:, head * dim : head * dim + rank] = places[head].T  # as large as embeddings
    attention.v_proj.weight[:dim] = values
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight[:] = (1 + fast * (sharpness - 1)).repeat(2)


def _match(attention: Any, kv: int, head: int, slow: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    """Wire a query head to the tokens whose `key` projection equals its own `query` projection, in the slow pairs."""
    dim = len(slow)
    index = torch.zeros(dim, dtype=torch.long)
    index[slow] = torch.arange(int(slow.sum())) % len(query)  # the pairs used hold as much of a projection as fits
    for projection, place, what in ((attention.k_proj, kv, key), (attention.q_proj, head, query)):
        projection.weight[place * dim : (place + 1) * dim] = slow[:, None] * what[index]
