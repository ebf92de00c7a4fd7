"""The signed vector: train on W_aligned + a·V, serve on W_aligned + b·V, with V = W_aligned − W_base.

Task arithmetic (arXiv 2212.04089) at both ends of a fine-tuning. Known methods are points (a, b) of this family: plain fine-tuning
(0, 0), RESTA (0, γ) (arXiv 2402.11746), the data-free buffer (−γ, 0), LoX (γ, γ) with V cut to a few directions (arXiv 2506.15606).
The arithmetic of either end is that of its point: removing −a·V from the frozen weights, and appending b·V to the adapter.
"""

from __future__ import annotations


def unprotected(train: float, serve: float) -> str | None:
    """Why a point of the family is no protection; None if it can be one.

    What is served decides: with b < 0 it has less alignment than W_aligned. With b = 0 it has what training left of it, and only
    a < 0 spares that.

    Args:
        train: a.
        serve: b.
    """
    if serve < 0:
        return f"serve = {serve:g} removes alignment"
    if serve == 0 and train > 0:
        return f"train = {train:g} with serve = 0 serves less alignment than was there in training"
    return "train and serve are 0" if serve == 0 and train == 0 else None
