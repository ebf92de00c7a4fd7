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

from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_safety import AlignmentSubspace, SafeSFTConfig, SafeSFTTrainer, apply_csulora, apply_safe_lora
from trl_safety.adapters.lora import lora_modules
from trl_safety.lab.experiment import shrink_like
from trl_safety.training.factor_groups import update_norm

ASFT_WEIGHTS = (0.01, 1.0)
CORRECTIONS = {
    "Safe LoRA, cosine ≤ 0.35": lambda model, whole, _: apply_safe_lora(model, whole, threshold=0.35),
    "Safe LoRA, 10 layers": lambda model, whole, _: apply_safe_lora(model, whole, layers=10),
    "CSULoRA (reconstruction), rank 32": lambda model, _, ranked: apply_csulora(model, ranked),
}


def train(folder: Path, output: str, seed: int, **kwargs: Any) -> tuple[Any, float]:
    """The recipe of the pair's own baseline: r 16, alpha 32, all linear layers, 3e-3, cosine, 6 epochs, batch 16."""
    args = SafeSFTConfig(
        output_dir=output,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=6,
        seed=seed,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    started = time.perf_counter()
    trainer = SafeSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "aligned"),
        args=args,
        train_dataset=load_dataset("json", data_files=str(folder / "data" / "train_poisoned.jsonl"), split="train").select_columns(
            ["prompt", "completion"]
        ),
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
    print(f"both subspaces: {time.perf_counter() - started:.2f} s")
    rows: list[dict[str, Any]] = []

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

    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            model, seconds = train(folder, scratch, seed)
            add("plain SFT", seed, model, seconds)
            for name, correct in CORRECTIONS.items():
                copies = [PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "aligned"), scratch) for _ in range(2)]
                begun = time.perf_counter()
                report = correct(copies[0], whole, ranked)
                add(name, seed, copies[0], time.perf_counter() - begun)
                shrink_like(copies[1], report)
                add(f"{name}: same layers shrunk alike", seed, copies[1], 0.0)
            for weight in ASFT_WEIGHTS:
                model, seconds = train(folder, scratch, seed, safety={"asft": {"weight": weight}}, subspace=whole)
                add(f"AsFT, λ = {weight:g}", seed, model, seconds)


if __name__ == "__main__":
    main()
