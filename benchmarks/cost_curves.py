"""The growth of each method's cost: seconds over hidden size, LoRA rank, subspace rank and number of layers, with the exponent.

    python benchmarks/cost_curves.py [--hidden 1024 2048 4096 8192] [--ranks 8 16 32 64] [--subspace-ranks 32 64 128] [--layers 8 16 32 64]

One quantity varies; the others stay at the second value of their list. The exponent is the slope of log seconds over log size
between the two ends. 1 is linear in the data processed: a factor has hidden · rank entries. A subspace's build reads hidden²
entries, so 2 is linear there. Timings are medians of repeated runs.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from asft_penalty import _random_subspace, median_seconds

from trl_safety.adapters.folder import Factors
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.buffer_reinforce import ReinforceMergeConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.corrections.base import Correction, LayerInput
from trl_safety.corrections.buffer_reinforce import merge_layers
from trl_safety.corrections.csulora import CsuloraCorrection
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.linalg.operators import LowRankOperator
from trl_safety.linalg.thin_svd import thin_svd
from trl_safety.methods import asft

AXES = ("hidden", "ranks", "subspace_ranks", "layers")
CPU = torch.device("cpu")


def penalty(hidden: int, rank: int, k: int, layers: int) -> Callable[[], Any]:
    """AsFT's penalty of all layers together, forward and backward."""
    operator = LowRankOperator(torch.randn(layers, hidden, k), torch.rand(layers, k))
    B, A = torch.randn(layers, hidden, rank, requires_grad=True), torch.randn(layers, rank, hidden, requires_grad=True)

    def run() -> None:
        B.grad = A.grad = None
        asft.penalty(B, A, operator).sum().backward()

    return run


def correction(made: Correction) -> Callable[[int, int, int, int], Callable[[], Any]]:
    """A correction of all layers."""

    def prepared(hidden: int, rank: int, k: int, layers: int) -> Callable[[], Any]:
        subspace = _random_subspace("x", (hidden, hidden), k)
        inputs = [LayerInput(str(i), (torch.randn(hidden, rank), torch.randn(rank, hidden)), 2.0, subspace, CPU) for i in range(layers)]
        return lambda: made.run(inputs)

    return prepared


def merge(hidden: int, rank: int, k: int, layers: int) -> Callable[[], Any]:
    """Buffer-and-Reinforce's merge of all layers."""
    one, other = ({str(i): Factors(torch.randn(hidden, rank), torch.randn(rank, hidden), 2.0) for i in range(layers)} for _ in range(2))
    return lambda: merge_layers(one, other, ReinforceMergeConfig(), dict.fromkeys(one, 2.0), CPU)


def decomposition(hidden: int, rank: int, k: int, layers: int) -> Callable[[], Any]:
    """The subspace of one layer."""
    V = torch.randn(hidden, hidden)
    return lambda: thin_svd(V, rank=k)


STEPS: dict[str, tuple[Callable[[int, int, int, int], Callable[[], Any]], tuple[str, ...]]] = {
    "asft, forward and backward": (penalty, AXES),
    "safe_lora": (correction(SafeLoraCorrection(SafeLoraConfig(layers=4))), AXES),
    "csulora": (correction(CsuloraCorrection(CsuloraConfig())), AXES),
    "alignment_vector": (correction(AlignmentVectorCorrection(AlignmentVectorConfig())), AXES),
    "buffer_reinforce, merge": (merge, ("hidden", "ranks", "layers")),
    "subspace of one layer": (decomposition, ("hidden", "subspace_ranks")),
}


def main() -> None:
    """Measure, print a line per method and axis."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for axis, values in zip(AXES, ((1024, 2048, 4096, 8192), (8, 16, 32, 64), (32, 64, 128), (8, 16, 32, 64)), strict=True):
        parser.add_argument(f"--{axis.replace('_', '-')}", type=int, nargs="+", default=values)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {axis: getattr(options, axis) for axis in AXES}
    rows = []
    for name, (make, axes) in STEPS.items():
        for axis in axes:
            seconds = []
            for value in sizes[axis]:
                at = {other: values[min(1, len(values) - 1)] for other, values in sizes.items()} | {axis: value}
                seconds.append(median_seconds(make(*(at[other] for other in AXES)), options.repeats))
            exponent = math.log(seconds[-1] / seconds[0]) / math.log(sizes[axis][-1] / sizes[axis][0])
            rows.append({"step": name, "axis": axis, "sizes": list(sizes[axis]), "seconds": seconds, "exponent": exponent})
            shown = "  ".join(f"{value}: {one * 1e3:.1f}" for value, one in zip(sizes[axis], seconds, strict=True))
            print(f"{name:28} {axis:15} exponent {exponent:+.2f}   ms {shown}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
