"""What the methods do to a small pair trained on real language: attack, task and over-refusal of plain SFT and of each method.

    python benchmarks/nano_pair.py FOLDER [--seeds 42 7] [--output results.json]

FOLDER holds `base/`, `aligned/`, `data/train_poisoned.jsonl` and `score.py` (`score(model, tokenizer, data)` → attack, over,
task). The data contains offensive text and is not part of this repository. Every correction stands beside its control: the
same layers scaled by the factor by which the correction changed their norm.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_safety import (
    AlignmentSubspace,
    BufferTrainer,
    ReinforceTrainer,
    SafeSFTConfig,
    SafeSFTTrainer,
    apply_alignment_vector,
    apply_csulora,
    apply_safe_lora,
    merge_reinforce,
)
from trl_safety.adapters.lora import lora_modules
from trl_safety.lab.experiment import random_like, shrink_like, shrink_to
from trl_safety.training.factor_groups import update_norm
from trl_safety.training.selection import SELECTION, most_dropped, read_choices

BATCH, EPOCHS = 16, 6
DUAL_SELECT = {"keep": BATCH // 2, "references": 32}
ASFT_WEIGHTS = (0.01, 1.0)
METHODS = ["corrections", "asft", "dual_select", "buffer_reinforce", "alignment_vector", "alignment_buffer"]
VECTOR_GAMMAS, VECTOR_RANKS, BUFFER_GAMMAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5), (8, 32, 96), (0.5, 1.0, 1.3)
CORRECTIONS = {
    "Safe LoRA, cosine ≤ 0.35": lambda model, whole, _: apply_safe_lora(model, whole, threshold=0.35),
    "Safe LoRA, 10 layers": lambda model, whole, _: apply_safe_lora(model, whole, layers=10),
    "CSULoRA (reconstruction), rank 32": lambda model, _, ranked: apply_csulora(model, ranked),
}


def rows_of(folder: Path, name: str) -> Dataset:
    """Prompts and completions, without what is for evaluation only."""
    return load_dataset("json", data_files=str(folder / "data" / name), split="train").select_columns(["prompt", "completion"])


def train(
    folder: Path,
    output: str,
    seed: int,
    mixed: Dataset | None = None,
    max_steps: int = -1,
    data: Dataset | None = None,
    trainer_class: Any = SafeSFTTrainer,
    **kwargs: Any,
) -> tuple[Any, float]:
    """The recipe of the pair's own baseline: r 16, alpha 32, all linear layers, 3e-3, cosine, 6 epochs, batch 16."""
    args = SafeSFTConfig(
        output_dir=output,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=EPOCHS,
        max_steps=max_steps,
        seed=seed,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    data = data or rows_of(folder, "train_poisoned.jsonl")
    started = time.perf_counter()
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder / "aligned"),
        args=args,
        train_dataset=concatenate_datasets([data, mixed]) if mixed else data,
        processing_class=AutoTokenizer.from_pretrained(folder / "aligned"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        **kwargs,
    )
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    return trainer.model, seconds


def main() -> None:
    """Run, print a line as each row is done, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 7])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    folder = options.folder
    spec = importlib.util.spec_from_file_location("score", folder / "score.py")
    assert spec
    assert spec.loader
    scorer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scorer)
    tokenizer = AutoTokenizer.from_pretrained(folder / "aligned")
    pair = (folder / "base", folder / "aligned")
    started = time.perf_counter()
    whole = AlignmentSubspace.from_pair(*pair, target_modules="all-linear", whole=True, progress=False)
    ranked = AlignmentSubspace.from_pair(*pair, target_modules="all-linear", rank=32, progress=False)
    full = AlignmentSubspace.from_pair(*pair, target_modules="all-linear", tolerance=1e-9, progress=False)
    print(f"the three subspaces: {time.perf_counter() - started:.2f} s")
    rows: list[dict[str, Any]] = []
    keep = tempfile.TemporaryDirectory()

    def add(method: str, seed: int, model: Any, seconds: float) -> None:
        scores = scorer.score(model, tokenizer, folder / "data")
        rows.append(
            {
                "method": method,
                "seed": seed,
                **scores,
                "update_norm": round(update_norm(lora_modules(model)), 2),
                "seconds": round(seconds, 2),
            }
        )
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def provider(scratch: Path) -> tuple[Path, Path]:
        """The buffer and the reinforcing LoRA, once, with the recipe of the user's training."""
        buffer, reinforce = scratch / "buffer", scratch / "reinforce"
        _, seconds = train(folder, str(buffer), 0, data=rows_of(folder, "harmful_pairs.jsonl"), trainer_class=BufferTrainer)
        safe = concatenate_datasets([rows_of(folder, "refusal_pairs.jsonl"), rows_of(folder, "benign_pairs.jsonl")])
        _, more = train(folder, str(reinforce), 0, data=safe, trainer_class=lambda **kwargs: ReinforceTrainer(**kwargs, buffer=buffer))
        print(f"provider: {seconds:.0f} s for the BufferLoRA, {more:.0f} s for the ReinforceLoRA", flush=True)
        return buffer, reinforce

    def load(adapter: Path | str) -> Any:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "aligned"), str(adapter))

    provided = None
    references = rows_of(folder, "references.jsonl")
    kinds = list(load_dataset("json", data_files=str(folder / "data" / "train_poisoned.jsonl"), split="train")["kind"])
    harmful = kinds.count("harmful")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            if "corrections" in options.methods:
                model, seconds = train(folder, scratch, seed)
                add("plain SFT", seed, model, seconds)
                for name, correct in CORRECTIONS.items():
                    copies = [
                        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "aligned"), scratch) for _ in range(2)
                    ]
                    begun = time.perf_counter()
                    report = correct(copies[0], whole, ranked)
                    add(name, seed, copies[0], time.perf_counter() - begun)
                    shrink_like(copies[1], report)
                    add(f"{name}: same layers shrunk alike", seed, copies[1], 0.0)
            for weight in ASFT_WEIGHTS if "asft" in options.methods else ():
                model, seconds = train(folder, scratch, seed, safety={"asft": {"weight": weight}}, subspace=whole)
                add(f"AsFT, λ = {weight:g}", seed, model, seconds)
            if "buffer_reinforce" in options.methods:
                work = Path(keep.name)
                provided = provided or provider(work)
                buffer, reinforce = provided
                plain, buffered = work / f"plain-{seed}", work / f"buffered-{seed}"
                train(folder, str(plain), seed)
                model, seconds = train(folder, str(buffered), seed, safety={"buffer_reinforce": {"buffer": str(buffer)}})
                add("Buffer-and-Reinforce, buffer alone", seed, model, seconds)
                for name, user, alpha in (
                    ("Buffer-and-Reinforce", buffered, 0.1),
                    ("Buffer-and-Reinforce, plain merge (α = 0)", buffered, 0.0),
                    ("Buffer-and-Reinforce, no buffer", plain, 0.1),
                ):
                    begun = time.perf_counter()
                    merge_reinforce(user, reinforce, work / f"{seed}-{user.name}-{alpha}", alpha=alpha)
                    extra = time.perf_counter() - begun
                    add(name, seed, load(work / f"{seed}-{user.name}-{alpha}"), extra)
                shrunk = load(plain)
                norm = next(row["update_norm"] for row in rows if row["method"] == "Buffer-and-Reinforce" and row["seed"] == seed)
                shrink_to(shrunk, norm)
                add("Buffer-and-Reinforce: plain SFT shrunk to the same ‖ΔW‖", seed, shrunk, 0.0)
            if "alignment_vector" in options.methods:
                model, seconds = train(folder, scratch, seed)
                add("plain SFT", seed, model, seconds)
                points = [(f"alignment vector, γ = {gamma:g}", full, {"gamma": gamma}) for gamma in VECTOR_GAMMAS]
                points += [(f"alignment vector, γ = 1, k = {rank}", full, {"rank": rank}) for rank in VECTOR_RANKS]
                points += [("alignment vector: −V", full, {"gamma": -1.0})]
                points += [("alignment vector: a random matrix of V's spectrum", random_like(full, seed), {})]
                for name, subspace, arguments in points:
                    copied = load(scratch)
                    begun = time.perf_counter()
                    apply_alignment_vector(copied, subspace, **arguments)
                    add(name, seed, copied, time.perf_counter() - begun)
            for gamma in BUFFER_GAMMAS if "alignment_buffer" in options.methods else ():
                block = {"alignment_buffer": {"base": str(folder / "base"), "gamma": gamma}}
                model, seconds = train(folder, scratch, seed, safety=block)
                add(f"alignment buffer, γ = {gamma:g}", seed, model, seconds)
            if "dual_select" in options.methods:
                model, seconds = train(folder, scratch, seed, safety={"dual_select": DUAL_SELECT}, reference_dataset=references)
                add("DualSelect, ρ = 0.2", seed, model, seconds)
                choices = read_choices(Path(scratch) / SELECTION)
                found = sum(kinds[row.row] == "harmful" for row in most_dropped(choices)[:harmful])
                print(
                    f"seed {seed}: {found} of the {harmful} harmful rows are among the {harmful} most-dropped of {len(kinds)}", flush=True
                )
                # The control may look at as many gradients as DualSelect.
                refreshes = sum(choice.kind == "reference" for choice in choices)
                evaluations = EPOCHS * len(kinds) + refreshes * (len(references) + DUAL_SELECT["references"])
                model, seconds = train(folder, scratch, seed, mixed=references, max_steps=round(evaluations / BATCH))
                add("DualSelect, ρ = 0.2: the references mixed into the data (SafeInstruct)", seed, model, seconds)


if __name__ == "__main__":
    main()
