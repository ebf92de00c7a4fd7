"""The time and memory of building a subspace, correcting and inspecting, for a large model's pair and adapter.

    python benchmarks/scale.py WORK [--model 8B] [--blocks 32] [--rank 64] [--adapter-rank 16] [--steps pair read build correct inspect]

Synthesises a sharded pair of full shape in WORK (bfloat16, one shard per block; 8B: 2 × 14 GB) and an all-linear adapter. Every
step runs in its own process; its peak resident memory is reported beyond that after the imports. `read` only reads the pair's files:
the floor for `build`. With fewer blocks, the cost of all is extrapolated in proportion to their number. Existing files are reused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
}
STEPS = ["pair", "read", "build", "correct", "inspect"]
CORRECTIONS: dict[str, list[str]] = {
    "safe_lora": ["--layers", "10"],
    "csulora": [],
    "alignment_vector": ["--rank", "16"],
}
IMPORTS = [
    "typer.testing",
    "trl_safety.cli",
    "trl_safety.subspace.build",
    "trl_safety.inspection.layers",
    "trl_safety.corrections.folder",
    "trl_safety.corrections.alignment_vector",
    "trl_safety.corrections.csulora",
    "trl_safety.corrections.safe_lora",
]


def layers(shape: dict[str, int], block: int) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: module name → (out, in)."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    few = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (few, hidden),
        "self_attn.v_proj": (few, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{block}.{name}": size for name, size in sizes.items()}


def make_pair(work: Path, shape: dict[str, int]) -> None:
    """Random weights, and others at a small distance. For speed, numbers repeat after a prime number of entries."""
    generator = torch.Generator().manual_seed(0)
    weights, change = (torch.randn(15_485_863, generator=generator) * scale for scale in (0.02, 0.002))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "tie_word_embeddings": True, **shape}
    for kind, noise in (("base", 0.0), ("aligned", 1.0)):
        folder = work / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        where = {}
        for block in range(shape["num_hidden_layers"]):
            file = f"model-{block:05}.safetensors"
            tensors = {}
            for index, (name, (rows, columns)) in enumerate(layers(shape, block).items()):
                source = (weights + noise * change.roll(1000 * block + index)).to(torch.bfloat16)
                count = rows * columns
                tensors[f"{name}.weight"] = source.repeat(-(-count // len(source)))[:count].reshape(rows, columns)
                where[f"{name}.weight"] = file
            if not (folder / file).exists():
                save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def make_adapter(work: Path, shape: dict[str, int], rank: int) -> None:
    """An all-linear adapter as PEFT writes it, of random float32 factors."""
    folder = work / f"adapter-{rank}"
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors, modules = {}, []
    for block in range(shape["num_hidden_layers"]):
        for name, (rows, columns) in layers(shape, block).items():
            modules.append(name.rsplit(".", 1)[1])
            for side, size in (("A", (rank, columns)), ("B", (rows, rank))):
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = 0.01 * torch.randn(*size, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=sorted(set(modules)), base_model_name_or_path=str(work / "aligned")
    ).save_pretrained(folder)


def read_files(work: Path) -> tuple[float, int]:
    """Seconds and bytes of reading the pair's files, a block of 16 MB at a time."""
    started, count = time.perf_counter(), 0
    buffer = bytearray(1 << 24)
    for file in sorted(work.glob("*/model-*.safetensors")):
        with file.open("rb", buffering=0) as source:
            while size := source.readinto(buffer):
                count += size
    return time.perf_counter() - started, count


def _peak() -> float:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024


def _command(connection: Any, arguments: list[str]) -> None:
    from typer.testing import CliRunner

    from trl_safety.cli.app import app

    before, started = _peak(), time.perf_counter()
    result = CliRunner().invoke(app, arguments)
    failed = None if result.exit_code == 0 else f"{result.output} {result.exception}"
    connection.send((time.perf_counter() - started, _peak() - before, failed))


def child(*arguments: object) -> tuple[float, float]:
    """Seconds, and MiB of resident memory beyond the imports, of one `trl-safety` command in its own process."""
    # Forked from a process that has only imported everything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    ours, theirs = context.Pipe()
    process = context.Process(target=_command, args=(theirs, [*map(str, arguments)]))
    process.start()
    theirs.close()
    seconds, memory, failed = ours.recv()
    process.join()
    assert failed is None, failed
    return seconds, memory


def main() -> None:
    """Create what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=SHAPES, default="8B")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--adapter-rank", type=int, default=16)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work, shape = options.work, dict(SHAPES[options.model])
    all_blocks = shape["num_hidden_layers"]
    shape["num_hidden_layers"] = options.blocks or all_blocks
    scale = all_blocks / shape["num_hidden_layers"]
    found: dict[str, Any] = {"machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "model": options.model}
    print(f"torch {torch.__version__} on {found['machine']}; {options.model}, {shape['num_hidden_layers']} of {all_blocks} blocks")
    if "pair" in options.steps:
        make_pair(work, shape)
        make_adapter(work, shape, options.adapter_rank)
    if "read" in options.steps:
        seconds, count = read_files(work)
        found["read"] = {"seconds": seconds, "bytes": count}
        print(f"reading both checkpoints ({count / 1e9:.1f} GB): {seconds:.1f} s")
    space = work / f"S-{options.rank}.safetensors"
    if "build" in options.steps:
        space.unlink(missing_ok=True)
        seconds, memory = child(
            "subspace", work / "base", work / "aligned", "-o", space, "--target-modules", "all-linear", "--rank", options.rank
        )
        found["build"] = {"seconds": seconds, "mib": memory}
        floor = f", {seconds / found['read']['seconds']:.1f} × reading" if "read" in found else ""
        whole = f"; all blocks: {seconds * scale:.0f} s" if scale > 1 else ""
        print(
            f"subspace of rank {options.rank}: {seconds:.1f} s{floor}, {memory:.0f} MiB{whole}; the file {space.stat().st_size / 1e6:.0f} MB"
        )
    adapter = work / f"adapter-{options.adapter_rank}"
    for method, arguments in CORRECTIONS.items() if "correct" in options.steps else ():
        output = work / f"corrected-{method}-{time.time_ns()}"
        seconds, memory = child("correct", adapter, "-o", output, "-s", space, "--method", method, *arguments)
        found[method] = {"seconds": seconds, "mib": memory}
        print(f"correct, {method} {' '.join(arguments)}: {seconds:.1f} s, {memory:.0f} MiB")
    if "inspect" in options.steps:
        seconds, memory = child("inspect", adapter, "-s", space)
        found["inspect"] = {"seconds": seconds, "mib": memory}
        print(f"inspect: {seconds:.1f} s, {memory:.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
