"""The mean loss of every document of a batch, from one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trl_safety.adapters.documents import Documents, Rows
from trl_safety.errors import ConfigurationError

TOKENS_AT_ONCE = 2048


@dataclass
class Batch:
    """The documents' mean losses and supervised tokens, (n,) each. The losses are differentiable if the forward pass was."""

    losses: Tensor
    tokens: Tensor


@dataclass
class Forward:
    """What one forward pass left behind.

    Attributes:
        causal: the model with its head.
        output: the model's output.
        hidden: the last hidden state, for heads that keep their logits to themselves.
        call: the arguments that the decoder was called with.
        fused: whether the trainer asked the head to keep its logits to itself.
    """

    causal: Any
    output: Any = None
    hidden: Tensor | None = None
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    fused: bool = False

    @property
    def decoder(self) -> Any:
        """The model below its head; the whole model where it has no part of that kind."""
        return self.causal.base_model


@contextmanager
def watched(model: Any) -> Iterator[Forward]:
    """Inside this context, note what the model computes in the trainer's forward pass, whatever the trainer makes of it."""
    seen = Forward(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def output(module: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        seen.fused = bool(kwargs.get("fused_lm_head"))
        seen.output = result

    def called(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.call = args, dict(kwargs)

    def hidden(module: Any, args: Any, result: Any) -> None:
        seen.hidden = getattr(result, "last_hidden_state", None)

    handles = [
        model.register_forward_hook(output, with_kwargs=True),
        seen.decoder.register_forward_pre_hook(called, with_kwargs=True),
    ]
    if seen.decoder is not seen.causal:
        handles.append(seen.decoder.register_forward_hook(hidden))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sample_losses(forward: Forward, labels: Tensor, documents: Documents | None = None, *, dft: bool, grad: bool) -> Batch:
    """Each document's mean loss over its supervised tokens.

    It is read from the fused head's log-probabilities or from the logits. Where a chunked or fused loss (TRL's chunked_nll, Liger, cut
    cross-entropy) keeps the logits to itself, it is computed from the last hidden state.

    Args:
        forward: what the forward pass left behind.
        labels: (R, T), −100 where nothing is supervised; the token at a position predicts the label of the next one.
        documents: where the documents lie; by default each row is one.
        dft: weight every token's loss by its probability, as TRL's `loss_type: dft` does.
        grad: whether the losses are to be differentiable.
    """
    documents = documents or Rows(len(labels))
    shifted = labels[:, 1:]
    mask = shifted != -100
    output = forward.output
    if output is None:
        raise ConfigurationError(
            "the trainer's loss did not call the model, so dual_select cannot score the samples: use the trainer's own loss"
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
                f"{type(forward.causal).__name__} returned neither logits nor a hidden state, so dual_select cannot score the samples: turn off the option that "
                "fuses its loss (use_liger_kernel, cut_cross_entropy)"
            )
        losses = -values * values.detach().exp() if dft else -values
        # The documents lie where the labels do: a token's loss stands one position before the token.
        tokens = documents.sums(functional.pad(mask, (1, 0)).long())
        return Batch(documents.sums(functional.pad(losses * mask, (1, 0))) / tokens.clamp(min=1), tokens)


def _log_probs(states: Tensor, head_of: Any, labels: Tensor, mask: Tensor) -> Tensor:
    """(R, T−1) log-probabilities of the labels, zero where nothing is supervised. Supervised positions are computed a chunk at a time.

    `states` are logits, or hidden states that the head of `head_of` turns into logits.
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
    """The logits of hidden states, scaled and capped as the model's configuration asks."""
    head = causal.get_output_embeddings()
    logits: Tensor = head(hidden.to(head.weight.dtype)).float()
    config = causal.config.get_text_config()
    logits = logits * getattr(config, "logit_scale", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def mean_kl(aligned: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """(n,) mean of KL(aligned ‖ current) for the next token, over each row's tokens."""
    divergence = functional.kl_div(logits.float().log_softmax(-1), aligned.float().log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    return (divergence * mask).sum(1) / mask.sum(1).clamp(min=1)
