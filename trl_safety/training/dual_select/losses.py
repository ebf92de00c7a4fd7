"""Mean losses of single samples out of one forward pass of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trl_safety.errors import ConfigurationError

TOKENS_AT_ONCE = 2048


@dataclass
class Batch:
    """What the forward pass of one batch says about its samples: (n,) each, `losses` differentiable where the forward was."""

    losses: Tensor
    tokens: Tensor


@dataclass
class Forward:
    """What one forward pass left behind: the model's output, and the last hidden state for heads that keep their logits."""

    causal: Any
    output: Any = None
    hidden: Tensor | None = None


def sample_losses(forward: Forward, labels: Tensor, *, dft: bool, grad: bool) -> Batch:
    """Mean loss per sample from the fused head's log-probabilities, from logits, or from the last hidden state where a chunked or
    fused loss (TRL's chunked_nll, Liger, cut cross-entropy) keeps the logits to itself."""
    shifted = labels[:, 1:]
    mask = shifted != -100
    output = forward.output
    if output is None:
        raise ConfigurationError(
            "the trainer's loss did not call the model's forward, so that dual_select cannot score samples; use the trainer's own loss"
        )
    with torch.set_grad_enabled(grad):
        if getattr(output, "log_probs", None) is not None:
            values = output.log_probs.float()[:, -shifted.shape[1] :]
        elif getattr(output, "logits", None) is not None:
            values = _log_probs(output.logits, None, shifted, mask)
        elif forward.hidden is not None:
            values = _log_probs(forward.hidden, forward.causal, shifted, mask)
        else:
            raise ConfigurationError(
                f"{type(forward.causal).__name__} returned neither logits nor a hidden state, so that dual_select cannot score samples; turn off the option that "
                "fuses its loss (use_liger_kernel, cut_cross_entropy)"
            )
        losses = -values * values.detach().exp() if dft else -values
        tokens = mask.sum(1)
        return Batch((losses * mask).sum(1) / tokens.clamp(min=1), tokens)


def _log_probs(states: Tensor, head_of: Any, labels: Tensor, mask: Tensor) -> Tensor:
    """(n, T−1) log-probability of the labels; only supervised positions are computed, some at a time.

    `states` are logits, or hidden states for the head of `head_of`.
    """
    positions = mask.nonzero()
    parts = []
    for chunk in torch.split(positions, TOKENS_AT_ONCE):
        rows, columns = chunk.unbind(1)
        logits = states[rows, columns]
        if head_of is not None:
            logits = _head(head_of, logits)
        parts.append(-functional.cross_entropy(logits.float(), labels[rows, columns], reduction="none"))
    values = torch.zeros(labels.shape, device=states.device)
    return values.index_put((positions[:, 0], positions[:, 1]), torch.cat(parts)) if parts else values


def _head(causal: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the scaling and capping that some models' configurations ask for."""
    head = causal.get_output_embeddings()
    logits: Tensor = head(hidden.to(head.weight.dtype)).float()
    config = causal.config.get_text_config()
    logits = logits * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def mean_kl(aligned: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """(n,) mean over each sample's tokens of KL(aligned ‖ current) of the next token."""
    divergence = functional.kl_div(logits.float().log_softmax(-1), aligned.float().log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    return (divergence * mask).sum(1) / mask.sum(1).clamp(min=1)
