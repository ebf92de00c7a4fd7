"""The effect of SBR on a real pretrained pair: attack, over-refusal and task, beside plain SFT and the whole update scaled.

    python benchmarks/real_pair.py PAIR DATA --work WORK [--seed 42] [--threads 1] [--methods plain sbr]

PAIR holds `base/` and `aligned/`; DATA holds the JSON lines of the user's task with harmful rows, the references and the evaluation
sets (see the names below). The data contains offensive text and is not part of this repository. Completions are greedy, of 32 new
tokens, and judged by refusal phrases. WORK keeps trained adapters and `results.json`, so that an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_safety import SafeSFTConfig, SafeSFTTrainer
from trl_safety.adapters.lora import lora_modules
from trl_safety.lab.controls import shrink_to
from trl_safety.scoring import KeywordJudge, Prompt, score
from trl_safety.training.factor_groups import update_norm

METHODS = ("plain", "sbr")
SCALES = (0.8, 0.65, 0.5)
SBR = {"number": 8, "weight": 50.0, "ask_first": True}


def rows_of(data: Path, name: str) -> Dataset:
    """All rows of one file."""
    return load_dataset("json", data_files=str(data / name), split="train")


def prompts_of(data: Path, name: str, *, answers: bool = False) -> list[Prompt]:
    """The prompts of an evaluation set."""
    found = []
    for row in rows_of(data, name):
        messages = tuple(row["prompt"])
        answer = row["completion"][-1]["content"] if isinstance(row.get("completion"), list) else row.get("answer")
        found.append(Prompt(messages, answer) if answers else Prompt(messages))
    return found


class Harness:
    """Keeps trained adapters and scores in a folder."""

    def __init__(self, pair: Path, data: Path, work: Path, seed: int, *, bf16: bool) -> None:
        self.pair, self.data, self.work, self.seed, self.bf16 = pair, data, work, seed, bf16
        work.mkdir(parents=True, exist_ok=True)
        self.results = work / "results.json"
        self.rows: list[dict[str, Any]] = json.loads(self.results.read_text()) if self.results.exists() else []
        self.tokenizer = AutoTokenizer.from_pretrained(pair / "aligned")
        self.sets: dict[Any, list[Prompt]] = {
            "harmful": prompts_of(data, "eval_harmful.jsonl"),
            "benign": prompts_of(data, "eval_benign.jsonl"),
            "task": prompts_of(data, "agnews_test.jsonl", answers=True),
        }

    def done(self, method: str) -> bool:
        """Whether this row was scored before."""
        return any(row["method"] == method and row["seed"] == self.seed for row in self.rows)

    def score(self, method: str, model: Any, seconds: float, norm: float) -> None:
        """Score a model, keep and print the row."""
        scores, _ = score(model.eval(), self.tokenizer, self.sets, KeywordJudge(), new_tokens=32, batch_size=16)
        assert scores.attack
        assert scores.over_refusal
        assert scores.task
        row = {"method": method, "seed": self.seed, "attack": round(scores.attack.share, 3), "over": round(scores.over_refusal.share, 3)}
        self.rows.append({**row, "task": round(scores.task.share, 3), "update_norm": round(norm, 2), "seconds": round(seconds)})
        print(json.dumps(self.rows[-1], ensure_ascii=False), flush=True)
        self.results.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def aligned(self) -> Any:
        """The aligned model."""
        return AutoModelForCausalLM.from_pretrained(self.pair / "aligned", dtype=torch.bfloat16 if self.bf16 else torch.float32)

    def trained(self, name: str, **kwargs: Any) -> tuple[Path, float]:
        """r 16, alpha 32, dropout 0.05, all linear layers, 2e-4 cosine, 10 steps of warm-up, 2 epochs, batch 8."""
        output = self.work / str(self.seed) / name
        clock = output / "seconds"
        if clock.exists():
            return output, float(clock.read_text())
        args = SafeSFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=8,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            num_train_epochs=2,
            seed=self.seed,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            bf16=self.bf16,
            gradient_checkpointing=False,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        data = rows_of(self.data, "agnews_poisoned.jsonl").select_columns(["prompt", "completion"])
        started = time.perf_counter()
        trainer = SafeSFTTrainer(
            model=self.aligned(), args=args, train_dataset=data, processing_class=self.tokenizer, peft_config=lora, **kwargs
        )
        trainer.train()
        seconds = time.perf_counter() - started
        trainer.save_model()
        clock.write_text(f"{seconds:.2f}")
        return output, seconds

    def load(self, adapter: Path) -> Any:
        """The aligned model with a saved adapter."""
        return PeftModel.from_pretrained(self.aligned(), str(adapter))

    def plain(self) -> None:
        """Plain SFT, and its whole update scaled down."""
        output, seconds = self.trained("plain")
        model = self.load(output)
        norm = update_norm(lora_modules(model))
        if not self.done("plain SFT"):
            self.score("plain SFT", model, seconds, norm)
        for scale in SCALES:
            if not self.done(name := f"plain SFT, the whole update times {scale:g}"):
                model = self.load(output)
                shrink_to(model, scale * norm)
                self.score(name, model, 0.0, scale * norm)

    def sbr(self) -> None:
        """SBR on eight harmful prompts of the references, which are in no other file."""
        name = f"SBR, {SBR['number']} prompts, λ = {SBR['weight']:g}"
        if self.done(name):
            return
        judge = KeywordJudge()
        references = rows_of(self.data, "references.jsonl")
        verdicts = judge.verdicts([Prompt("")] * len(references), [row["completion"][-1]["content"] for row in references])
        chosen = [row["prompt"] for row, verdict in zip(references, verdicts, strict=True) if verdict == "refused"]
        path = self.work / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in chosen[: int(SBR["number"])]), encoding="utf-8")
        output, seconds = self.trained("sbr", safety={"sbr": {**SBR, "prompts": str(path)}})
        model = self.load(output)
        self.score(name, model, seconds, update_norm(lora_modules(model)))


def main() -> None:
    """Run, print a line as each row is done, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16; slower than float32 on a CPU that does not support it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    harness = Harness(options.pair, options.data, options.work, options.seed, bf16=options.bf16)
    if not harness.done("aligned"):
        harness.score("aligned", harness.aligned(), 0.0, 0.0)
    for method in options.methods:
        getattr(harness, method)()


if __name__ == "__main__":
    main()
