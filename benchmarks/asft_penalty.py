"""The AsFT penalty against the authors' dense form and against a plain training step, in one run.

    python benchmarks/asft_penalty.py [--size 4096] [--rank 16] [--subspace-rank 64] [--layers 8] [--tokens 1024] [--json FILE]

The dense form follows the paper's formula: C = VVᵀ/‖V‖_F once, then (I − C)·B·A at every step. The plain step is forward,
backward and AdamW on the LoRA factors of a Llama with an 8B model's proportions (hidden : intermediate = 1 : 3.5, four query
heads per key/value head) and adapters on all linear layers. Timings are medians of repeated runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from trl_safety.adapters.lora import lora_modules
from trl_safety.linalg.operators import LowRankOperator
from trl_safety.methods import asft
from trl_safety.subspace.layer import LayerSubspace
from trl_safety.training.factor_groups import FactorGroups


def median_seconds(step: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` timings after one warm-up."""
    step()
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def one_layer(size: int, rank: int, subspace_rank: int, device: str) -> dict[str, float]:
    """Forward and backward of the penalty of one size × size layer: dense, and ours."""
    U = torch.linalg.qr(torch.randn(size, subspace_rank, device=device))[0]
    singular_values = torch.linspace(3, 1, subspace_rank, device=device)
    norm = singular_values.norm()
    operator = LowRankOperator(U, singular_values**2 / norm)
    C = (U * operator.weights) @ U.mT
    B = torch.randn(size, rank, device=device, requires_grad=True)
    A = torch.randn(rank, size, device=device, requires_grad=True)

    def run(penalty: Callable[[], Tensor]) -> Tensor:
        B.grad = A.grad = None
        value = penalty()
        value.backward()
        return value

    identity = torch.eye(size, device=device)
    dense = lambda: run(lambda: ((identity - C) @ (B @ A)).square().sum())  # noqa: E731
    ours = lambda: run(lambda: asft.penalty(B, A, operator))  # noqa: E731
    torch.testing.assert_close(ours(), dense(), rtol=1e-3, atol=0)
    # The least data to move, at the speed of a copy: factors and basis read forward and backward, the factors' gradients written.
    moved = 4 * (2 * (B.numel() + A.numel() + U.numel()) + B.numel() + A.numel())
    source = torch.empty(1 << 24, device=device)
    copied = median_seconds(lambda: source.clone(), 10)
    floor = moved / (2 * source.numel() * source.element_size() / copied)
    return {"dense_seconds": median_seconds(dense, 3), "ours_seconds": median_seconds(ours, 20), "floor_seconds": floor}


def training_step(hidden: int, layers: int, rank: int, subspace_rank: int, tokens: int, device: str) -> dict[str, float]:
    """A plain LoRA training step, and the penalty of all its layers alone."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(4, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
    )
    model = get_peft_model(
        LlamaForCausalLM(config).to(device), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    )
    modules = lora_modules(model)
    subspaces = {module.name: _random_subspace(module.name, module.shape, subspace_rank) for module in modules}
    groups = FactorGroups(modules, subspaces, "scaled")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(config.vocab_size, (tokens // 256 or 1, min(tokens, 256)), device=device)

    def plain() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def penalty() -> None:
        optimizer.zero_grad()
        groups.penalty(scaled=False).backward()

    return {"plain_seconds": median_seconds(plain, 5), "penalty_seconds": median_seconds(penalty, 10), "adapted_layers": len(modules)}


def _random_subspace(name: str, shape: tuple[int, int], rank: int) -> LayerSubspace:
    rank = min(rank, *shape)
    left, right = (torch.linalg.qr(torch.randn(size, rank))[0] for size in shape)
    values = torch.linspace(3, 1, rank)
    return LayerSubspace(name, shape, False, values.norm().item(), 0.0, "", "", torch.zeros(2, 256), left, values, right)


def main() -> None:
    """Measure both, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in {"size": 4096, "rank": 16, "subspace-rank": 64, "hidden": 1024, "layers": 8, "tokens": 1024}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    layer = one_layer(options.size, options.rank, options.subspace_rank, device)
    step = training_step(options.hidden, options.layers, options.rank, options.subspace_rank, options.tokens, device)
    speedup, share = layer["dense_seconds"] / layer["ours_seconds"], step["penalty_seconds"] / step["plain_seconds"]
    print(f"torch {torch.__version__} on {machine}")
    print(
        f"one {options.size} × {options.size} layer, r {options.rank}, k {options.subspace_rank}, forward and backward: "
        f"dense {layer['dense_seconds'] * 1e3:.1f} ms, ours {layer['ours_seconds'] * 1e3:.3f} ms: {speedup:.0f} × faster, "
        f"{layer['ours_seconds'] / layer['floor_seconds']:.1f} × the time to move its bytes"
    )
    print(
        f"{step['adapted_layers']} adapted layers of a {options.layers}-layer Llama (hidden {options.hidden}), {options.tokens} tokens: "
        f"plain step {step['plain_seconds'] * 1e3:.0f} ms, penalty {step['penalty_seconds'] * 1e3:.2f} ms: {share:.2%} of the step"
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, **layer, **step, "speedup": speedup, "share": share}, indent=2) + "\n")


if __name__ == "__main__":
    main()
