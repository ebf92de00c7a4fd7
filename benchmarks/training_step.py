"""The cost of each method in a training step, compared with the plain step and with the authors' loop of single-sample passes.

    python benchmarks/training_step.py [--hidden 512] [--layers 8] [--length 128] [--vocabulary 2048] [--batches 4 8 16] [--pool 64] [--kinds …]

Steps of the public trainers on one model and one batch: plain SFT; AsFT; SBR with 8 prompts of 40 tokens; DualSelect; training beside a
frozen buffer; and single-sample passes, written from DualSelect's description (a forward and backward per sample, all gradients kept).
Times are medians over rounds that take the kinds in turn. A refresh of DualSelect's pool is reported separately, and spread over the
steps between two refreshes. Peak memory is the resident memory above that before the first step (on a GPU, the allocator's peak);
each kind runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from trl_safety import AlignmentSubspace, BufferTrainer, SafeSFTConfig, SafeSFTTrainer
from trl_safety.adapters.fingerprint import sample
from trl_safety.subspace.layer import LayerSubspace, Provenance

RANK = 16
KINDS = ("plain", "asft", "sbr", "dual_select", "buffer", "loop")
SBR_PROMPTS, SBR_TOKENS = 8, 40
REFRESH_EVERY = 100


class Clock(TrainerCallback):
    """The time of every optimizer step, from its first batch to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self._started)


class Loop(SafeSFTTrainer):
    """The authors' method: a pass per sample, all gradients kept, then the choice."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        inputs = self._prepare_inputs(inputs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses, gradients = [], []
        for row in range(len(inputs["input_ids"])):
            one = {key: value[row : row + 1] for key, value in inputs.items()}
            loss = model(**one, use_cache=False).loss
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
            losses.append(loss.detach())
        reference = gradients[0]
        scores = torch.stack(losses) - torch.stack([torch.nn.functional.cosine_similarity(g, reference, dim=0) for g in gradients])
        chosen = scores.argsort()[: len(losses) // 2].tolist()
        update = torch.stack([gradients[i] for i in chosen]).mean(0) + 0.2 * reference
        start = 0
        for parameter in parameters:
            parameter.grad = update[start : start + parameter.numel()].view_as(parameter).clone()
            start += parameter.numel()
        return torch.stack(losses).mean()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory() -> float:
    """Peak so far, in MB."""
    return (
        torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    )


def make_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """Always the same random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=max(4, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 256),
        max_position_embeddings=options.length,
    )
    model = LlamaForCausalLM(config)
    return model.to(torch.bfloat16) if torch.cuda.is_available() else model


def random_subspace(model: LlamaForCausalLM, rank: int) -> AlignmentSubspace:
    """A random subspace whose aligned model is this one."""
    layers = {}
    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            left, right = (torch.linalg.qr(torch.randn(size, min(rank, *weight.shape)))[0] for size in weight.shape)
            values = torch.linspace(3, 1, left.shape[1])
            samples = torch.stack([sample(weight) + 1, sample(weight)]).float()
            shape = (weight.shape[0], weight.shape[1])
            layers[name] = LayerSubspace(name, shape, False, values.norm().item(), 0.0, "", "", samples, left, values, right)
    return AlignmentSubspace(layers, Provenance("random", "random", None, None, f"rank {rank}"))


def steps(kind: str, options: argparse.Namespace, batch: int, count: int, folder: str) -> tuple[list[float], float, float]:
    """Seconds per step after the warm-up, extra seconds of the step with the refresh, and peak MB above the start."""
    model = make_model(options)
    ids = torch.randint(3, options.vocabulary, (max(batch, options.pool), options.length)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row, "completion_mask": [1] * len(row)} for row in ids])
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, options.vocabulary)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    clock = Clock()

    def make(cls: Any, output: str, **kwargs: Any) -> Any:
        return cls(
            args=SafeSFTConfig(
                output_dir=output,
                per_device_train_batch_size=batch,
                max_steps=kwargs.pop("max_steps"),
                max_length=options.length,
                learning_rate=1e-4,
                logging_steps=10_000,
                save_strategy="no",
                report_to="none",
                bf16=torch.cuda.is_available(),
                gradient_checkpointing=False,
                disable_tqdm=True,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            **kwargs,
        )

    extra: dict[str, Any] = {}
    if kind == "dual_select":
        dual = {"warmup_steps": 2, "keep": batch // 2, "references": min(32, options.pool), "refresh_steps": 10_000}
        extra = {"safety": {"dual_select": dual}, "reference_dataset": rows.select(range(options.pool))}
    elif kind == "asft":
        extra = {"safety": {"asft": {"weight": 1.0}}, "subspace": random_subspace(model, options.subspace_rank)}
    elif kind == "sbr":
        words_of = torch.randint(3, options.vocabulary, (SBR_PROMPTS, min(SBR_TOKENS, options.length))).tolist()
        prompts = [" ".join(f"w{word}" for word in row) for row in words_of]
        extra = {"safety": {"sbr": {"prompts": prompts, "number": SBR_PROMPTS, "ask_first": False}}}
    elif kind == "buffer":
        extra = {"safety": {"buffer_reinforce": {"buffer": options.provider}}}
    elif kind == "provider":
        provided = make(BufferTrainer, options.provider, model=model, max_steps=1)
        provided.train()
        provided.save_model()
        return [], 0.0, 0.0
    trainer = make(Loop if kind == "loop" else SafeSFTTrainer, folder, model=model, max_steps=count + 3, callbacks=[clock], **extra)
    before = _memory()
    trainer.train()
    measured = clock.seconds[3:]
    return measured, clock.seconds[2] - statistics.median(measured), _memory() - before


def _in_turn(connection: Any, kind: str, options: argparse.Namespace, batch: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(options.threads)
        connection.send(steps(kind, options, batch, count, folder))


def _run(kind: str, options: argparse.Namespace, batch: int, count: int) -> tuple[list[float], float, float]:
    # Forked from a process that has only imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.sft_trainer", "trl_safety.training.trainer"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_turn, args=(theirs, kind, options, batch, count))
    process.start()
    theirs.close()
    result: tuple[list[float], float, float] = ours.recv()
    process.join()
    return result


def main() -> None:
    """Run and print a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--pool", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--subspace-rank", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{options.threads} CPU threads"
    print(f"{options.layers} layers, hidden {options.hidden}, vocabulary {options.vocabulary}, length {options.length}")
    print(f"LoRA rank {RANK} on all linear layers; {device}")
    scratch = tempfile.TemporaryDirectory()
    options.provider = f"{scratch.name}/buffer"
    if "buffer" in options.kinds:
        _run("provider", options, options.batches[0], 0)
    for batch in options.batches:
        seconds: dict[str, list[float]] = {kind: [] for kind in options.kinds}
        refresh, memory = [0.0], dict.fromkeys(options.kinds, 0.0)
        for _ in range(options.rounds):
            for kind in options.kinds:
                measured, extra, peak = _run(kind, options, batch, options.steps)
                seconds[kind] += measured
                memory[kind] = max(memory[kind], peak)
                if kind == "dual_select":
                    refresh.append(extra)
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        plain = medians["plain"]
        row: dict[str, Any] = {"batch": batch, "plain_step_s": round(plain, 4)}
        row |= {f"{kind}_to_plain": round(value / plain, 3) for kind, value in medians.items() if kind != "plain"}
        if "dual_select" in medians:
            each = statistics.median(refresh[1:])
            row |= {"pool": options.pool, "refresh_in_plain_steps": round(each / plain, 2)}
            row[f"dual_select_to_plain_refreshed_every_{REFRESH_EVERY}"] = round((medians["dual_select"] + each / REFRESH_EVERY) / plain, 3)
        row["peak_MB"] = {kind: round(value) for kind, value in memory.items()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
