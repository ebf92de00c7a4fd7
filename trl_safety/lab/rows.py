"""The rows of the lab's table: every method at its strengths, each beside its control."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from trl_safety.corrections.alignment_vector import apply_alignment_vector
from trl_safety.corrections.buffer_reinforce import merge_reinforce
from trl_safety.corrections.csulora import apply_csulora
from trl_safety.corrections.safe_lora import apply_safe_lora
from trl_safety.lab import controls
from trl_safety.lab.pair import load
from trl_safety.reports.selection import SELECTION, read_choices

if TYPE_CHECKING:
    from trl_safety.lab.lab import Lab
    from trl_safety.lab.results import Outcome
    from trl_safety.reports.report import SafetyReport

PLAIN = "plain SFT"


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are made together.

    Attributes:
        make: gives the rows of a pair and a fine-tuning seed.
        settings: prefixes of the settings that they depend on, beside those of every fine-tuning.
        rooms: stems of the package's modules that decide the results.
    """

    make: Callable[[Lab, int], Iterator[Outcome]]
    settings: tuple[str, ...] = ()
    rooms: tuple[str, ...] = ()


def models(lab: Lab, seed: int) -> Iterator[Outcome]:
    """The pair itself, and fine-tuning on clean data."""
    yield lab.outcome("base model", seed, load(lab.base)[0], 0.0)
    yield lab.outcome("aligned model, not fine-tuned", seed, load(lab.aligned)[0], 0.0)
    model, seconds = lab.fine_tune(seed, poison=0.0)
    yield lab.outcome("plain SFT, no forbidden samples", seed, model, seconds)


def plain(lab: Lab, seed: int) -> Iterator[Outcome]:
    """Plain fine-tuning, and its whole update scaled: the cheapest protection that there is."""
    folder, seconds = lab.plain(seed)
    yield lab.outcome(PLAIN, seed, lab.adapted(folder), seconds)
    for factor in lab.settings.scales:
        model = lab.adapted(folder)
        controls.scale(model, factor)
        yield lab.outcome(f"{PLAIN}, the whole update × {factor:g}", seed, model, seconds, control_of=PLAIN)


def safe_lora(lab: Lab, seed: int) -> Iterator[Outcome]:
    """By cosine and by number of layers."""
    threshold, layers = lab.settings.safe_lora_threshold, lab.settings.safe_lora_layers
    yield from _corrected(
        lab, seed, f"Safe LoRA, cosine ≤ {threshold:g}", lambda model: apply_safe_lora(model, lab.whole, threshold=threshold)
    )
    yield from _corrected(lab, seed, f"Safe LoRA, {layers} layers", lambda model: apply_safe_lora(model, lab.whole, layers=layers))


def csulora(lab: Lab, seed: int) -> Iterator[Outcome]:
    """The reconstruction of the paper's update."""
    yield from _corrected(lab, seed, "CSULoRA (reconstruction)", lambda model: apply_csulora(model, lab.ranked))


def _corrected(lab: Lab, seed: int, name: str, correct: Callable[[Any], SafetyReport]) -> Iterator[Outcome]:
    """A correction of the plainly trained adapter, and the same layers shrunk by as much."""
    folder, seconds = lab.plain(seed)
    model = lab.adapted(folder)
    started = time.perf_counter()
    report = correct(model)
    extra = time.perf_counter() - started
    yield lab.outcome(name, seed, model, seconds, extra)
    model = lab.adapted(folder)
    controls.shrink_like(model, report)
    yield lab.outcome(f"{name}: same layers shrunk alike", seed, model, seconds, control_of=name)


def asft(lab: Lab, seed: int) -> Iterator[Outcome]:
    """AsFT at each λ, and an equally small update by plain L2."""
    for weight in lab.settings.asft_weights:
        model, seconds = lab.fine_tune(seed, safety={"asft": {"weight": weight}}, subspace=lab.whole)
        outcome = lab.outcome(f"AsFT, λ = {weight:g}", seed, model, seconds)
        yield outcome
        yield from _same_norm(lab, seed, outcome, weight)


def sbr(lab: Lab, seed: int) -> Iterator[Outcome]:
    """SBR on forbidden requests; as controls, SBR on benign requests, and an equally small update."""
    world, rng = lab.world, random.Random(lab.pair)  # noqa: S311  # no secret here
    number, weight = lab.settings.sbr_prompts, lab.settings.sbr_weight
    name = f"SBR, λ = {weight:g}"
    outcomes = []
    for row, topics in ((name, world.seen_forbidden), (f"{name}: the same term on benign prompts", world.benign)):
        asked = [found.messages()["prompt"] for found in world.requests(rng, topics, 4 * number)]
        prompts = list({json.dumps(prompt): prompt for prompt in asked}.values())[:number]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompts.jsonl"
            path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
            block = {"prompts": str(path), "number": len(prompts), "weight": weight, "ask_first": False}
            model, seconds = lab.fine_tune(seed, safety={"sbr": block})
        outcomes.append(lab.outcome(row, seed, model, seconds, control_of="" if row == name else name))
    yield from outcomes
    yield from _same_norm(lab, seed, outcomes[0], 0.1)


def dual_select(lab: Lab, seed: int) -> Iterator[Outcome]:
    """DualSelect, and equally long training with its references mixed into the data."""
    settings, references = lab.settings, lab.references(seed)
    pool = Dataset.from_list([row.messages() for row in references])
    block = {"keep": settings.dual_select_keep, "references": settings.dual_select_references}
    with tempfile.TemporaryDirectory() as output:
        model, seconds = lab.fine_tune(seed, safety={"dual_select": block}, reference_dataset=pool, output=output)
        choices = read_choices(Path(output) / SELECTION)
    forbidden = [not row.prompt.startswith("translate") for row in lab.user_rows(seed)]
    kept = [
        forbidden[index]
        for choice in choices
        if choice.kind == "task"
        for index, weight in zip(choice.indices, choice.weights, strict=True)
        if weight
    ]
    name = "DualSelect, ρ = 0.2"
    yield dataclasses.replace(lab.outcome(name, seed, model, seconds), kept_forbidden=sum(kept) / len(kept))
    # The control may compute as many gradients as DualSelect: those of its steps, and of its refreshes, one per epoch.
    refreshes = sum(choice.kind == "reference" for choice in choices)
    evaluations = settings.epochs * settings.samples + refreshes * (len(references) + settings.dual_select_references)
    model, seconds = lab.fine_tune(seed, mixed=references, max_steps=round(evaluations / settings.batch))
    yield lab.outcome(f"{name}: the references mixed into the data (SafeInstruct)", seed, model, seconds, control_of=name)


def buffer_reinforce(lab: Lab, seed: int) -> Iterator[Outcome]:
    """The method, each of its parts alone, and the plain adapter shrunk to the merged one's norm."""
    buffer, reinforce = lab.provider()
    plain, plain_seconds = lab.plain(seed)
    model, seconds = lab.fine_tune(seed, safety={"buffer_reinforce": {"buffer": str(buffer)}})
    name = "Buffer-and-Reinforce"
    with tempfile.TemporaryDirectory() as scratch:
        buffered = Path(scratch) / "buffered"
        model.save_pretrained(str(buffered))

        def merged(user: Path, alpha: float) -> tuple[Any, float]:
            started = time.perf_counter()
            folder = Path(scratch) / f"{user.name}-{alpha}"
            merge_reinforce(user, reinforce, folder, alpha=alpha)
            extra = time.perf_counter() - started
            return lab.adapted(folder), extra

        both, extra = merged(buffered, 0.1)
        outcome = lab.outcome(name, seed, both, seconds, extra)
        yield outcome
        yield lab.outcome(f"{name}, buffer alone", seed, model, seconds)
        both, extra = merged(buffered, 0.0)
        yield lab.outcome(f"{name}, plain merge (α = 0)", seed, both, seconds, extra)
        both, extra = merged(plain, 0.1)
        yield lab.outcome(f"{name}, no buffer", seed, both, plain_seconds, extra)
    yield _shrunk(lab, seed, outcome)


def alignment_vector(lab: Lab, seed: int) -> Iterator[Outcome]:
    """V added to the plainly trained adapter; as controls, −V, and a random matrix with V's singular values."""
    plain, seconds = lab.plain(seed)
    rank = lab.settings.subspace_rank
    name = "alignment vector"
    rows = [(f"{name}, γ = {gamma:g}", lab.full, gamma, "") for gamma in lab.settings.vector_gammas]
    whole = f"{name}, γ = 1" if 1.0 in lab.settings.vector_gammas else rows[0][0]
    rows.append((f"{name}, γ = 1, rank {rank}", lab.ranked, 1.0, ""))
    rows.append((f"{name}: −V", lab.full, -1.0, whole))
    rows.append((f"{name}: a random matrix of V's spectrum", controls.random_like(lab.full, seed), 1.0, whole))
    for row, subspace, gamma, control_of in rows:
        model = lab.adapted(plain)
        started = time.perf_counter()
        apply_alignment_vector(model, subspace, gamma=gamma)
        yield lab.outcome(row, seed, model, seconds, time.perf_counter() - started, control_of=control_of)


def alignment_buffer(lab: Lab, seed: int) -> Iterator[Outcome]:
    """Training on W_aligned − γ·V."""
    for gamma in lab.settings.buffer_gammas:
        block = {"alignment_buffer": {"base": str(lab.base), "aligned": str(lab.aligned), "gamma": gamma}}
        model, seconds = lab.fine_tune(seed, safety=block)
        yield (outcome := lab.outcome(f"alignment buffer, γ = {gamma:g}", seed, model, seconds))
        yield _shrunk(lab, seed, outcome)


def _shrunk(lab: Lab, seed: int, target: Outcome) -> Outcome:
    """The plainly trained update, scaled to a method's ‖ΔW‖."""
    plain, seconds = lab.plain(seed)
    model = lab.adapted(plain)
    controls.shrink_to(model, target.update_norm)
    return lab.outcome(f"{target.method}: plain SFT scaled to the same ‖ΔW‖", seed, model, seconds, control_of=target.method)


def _same_norm(lab: Lab, seed: int, target: Outcome, weight: float) -> Iterator[Outcome]:
    """The plainly trained update scaled to a method's ‖ΔW‖, and one that plain L2 on ΔW keeps as small during training."""
    yield _shrunk(lab, seed, target)
    if not lab.settings.control_runs:
        return
    nothing, row = controls.without_direction(lab.ranked), f"{target.method}: L2 of the same ‖ΔW‖"

    def train(guess: float) -> Outcome:
        model, seconds = lab.fine_tune(seed, safety={"asft": {"weight": guess}}, subspace=nothing)
        return lab.outcome(row, seed, model, seconds, control_of=target.method)

    runs, tolerance = lab.settings.control_runs, lab.settings.control_tolerance
    yield controls.search(train, target.update_norm, start=weight, runs=runs, tolerance=tolerance)


GROUPS: dict[str, Group] = {
    "models": Group(models),
    "plain": Group(plain, ("scales",)),
    "safe_lora": Group(safe_lora, ("safe_lora",), ("safe_lora",)),
    "csulora": Group(csulora, ("subspace_rank",), ("csulora",)),
    "asft": Group(asft, ("asft", "control"), ("asft",)),
    "dual_select": Group(dual_select, ("dual_select", "references"), ("dual_select",)),
    "buffer_reinforce": Group(buffer_reinforce, ("provider",), ("buffer_reinforce",)),
    "alignment_vector": Group(alignment_vector, ("vector", "subspace_rank"), ("alignment_vector",)),
    "alignment_buffer": Group(alignment_buffer, ("buffer_gammas",), ("alignment_buffer",)),
    "sbr": Group(sbr, ("sbr", "control"), ("sbr",)),
}
"""What `--methods` names."""
