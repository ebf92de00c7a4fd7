"""Curves of the signed alignment vector on the lab's world: attack, task, benign answers and over-refusal over γ and over k.

    python benchmarks/alignment_vector.py [--seeds 5] [--output FOLDER] [--gammas 0.25 …] [--ranks 8 …]

For each seed: plain SFT on poisoned data; V added to it at every γ, and at γ = 1 truncated to every rank k; the controls (−V, a
random matrix with V's singular values, the update shrunk); and training on W_aligned − γ·V at every γ. Prints mean ± half the
range and writes `curves.json` and `curves.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from trl_safety import apply_alignment_vector
from trl_safety.lab.controls import random_like, scale
from trl_safety.lab.experiment import quiet
from trl_safety.lab.lab import Lab
from trl_safety.lab.results import METRICS, Outcome

GAMMAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
RANKS = (8, 16, 32, 64)


def rows(lab: Lab, seed: int, gammas: list[float], ranks: list[int]) -> list[Outcome]:
    """All points of one seed."""
    plain, seconds = lab.plain(seed)
    found = [lab.outcome("plain SFT", seed, lab.adapted(plain), seconds)]
    points: list[tuple[str, Any, dict[str, Any]]] = [(f"vector, γ = {gamma:g}", lab.full, {"gamma": gamma}) for gamma in gammas]
    points += [(f"vector, γ = 1, k = {rank}", lab.full, {"rank": rank}) for rank in ranks]
    points += [("control: −V", lab.full, {"gamma": -1.0}), ("control: random, V's spectrum", random_like(lab.full, seed), {})]
    for name, subspace, options in points:
        model = lab.adapted(plain)
        apply_alignment_vector(model, subspace, **options)
        found.append(lab.outcome(name, seed, model, seconds, control_of="plain SFT" if name.startswith("control") else ""))
    for factor in (0.8, 0.5):
        model = lab.adapted(plain)
        scale(model, factor)
        found.append(lab.outcome(f"control: ΔW shrunk to {factor:g}", seed, model, seconds, control_of="plain SFT"))
    for gamma in gammas:
        block = {"alignment_buffer": {"base": str(lab.base), "aligned": str(lab.aligned), "gamma": gamma}}
        model, seconds = lab.fine_tune(seed, safety=block)
        found.append(lab.outcome(f"buffer, γ = {gamma:g}", seed, model, seconds))
    return found


def main() -> None:
    """Run, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("lab_results"))
    parser.add_argument("--gammas", type=float, nargs="+", default=GAMMAS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    outcomes: list[Outcome] = []
    with quiet():
        lab = Lab(options.output, 0)
        for seed in range(options.seeds):
            outcomes += rows(lab, seed, options.gammas, options.ranks)
            (options.output / "curves.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1, ensure_ascii=False))
    methods = list(dict.fromkeys(outcome.method for outcome in outcomes))
    print(f"{'':32}" + "".join(f"{metric:>16}" for metric in METRICS) + f"{'‖ΔW‖':>9}   ({options.seeds} seeds, mean ± half the range)")
    for method in methods:
        mine = [outcome for outcome in outcomes if outcome.method == method]
        cells = [[getattr(outcome, metric) for outcome in mine] for metric in METRICS]
        text = "".join(f"{statistics.fmean(values):>9.2f} ± {(max(values) - min(values)) / 2:.2f}" for values in cells)
        print(f"{method:32}{text}{statistics.fmean(o.update_norm for o in mine):>9.2f}")
    chart = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, metric in zip(chart.subplots(1, 4, sharey=True), METRICS, strict=True):
        for kind, colour in (("vector", "#2a7f62"), ("buffer", "#44617b")):
            means = [
                statistics.fmean(getattr(o, metric) for o in outcomes if o.method == (f"{kind}, γ = {gamma:g}" if gamma else "plain SFT"))
                for gamma in (0.0, *options.gammas)
            ]
            axis.plot(
                [0.0, *options.gammas],
                means,
                "o-",
                color=colour,
                label="added after training" if kind == "vector" else "subtracted during training",
            )
        axis.set(title=metric, xlabel="γ", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    chart.axes[0].legend(fontsize=7)
    chart.savefig(options.output / "curves.png", dpi=130)


if __name__ == "__main__":
    main()
