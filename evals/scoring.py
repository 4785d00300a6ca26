"""How far an edited cache is from recomputation, on the tokens that really followed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def divergence(reference: torch.Tensor, edited: torch.Tensor) -> tuple[float, float]:
    """Compare next-token distributions at the same places of one text.

    Args:
        reference: logits after full recomputation. Shape: (num_tokens, vocab_size), float32
        edited: logits on the edited cache. Shape: the same.

    Returns:
        KL(reference || edited) in nats and top-1 agreement, 0 to 1; both are means over the tokens.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != edited.shape or reference.ndim != 2 or not len(reference):
        raise ValueError(
            "expected logits of one shape (num_tokens, vocab_size) with at least one token, got "
            f"{tuple(reference.shape)} and {tuple(edited.shape)}"
        )
    p, q = reference.double().log_softmax(-1), edited.double().log_softmax(-1)
    # Where p is 0 the product is 0, also if q is 0 there too and the difference is no number.
    terms = (p.exp() * (p - q)).where(p.exp() > 0, p.new_zeros(()))
    kl = terms.sum(-1).clamp_min(0)
    agreement = (reference.argmax(-1) == edited.argmax(-1)).double()
    return float(kl.mean()), float(agreement.mean())
