import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import references
from tests.adapters.test_checkpoint import rewrite, shard
from tests.tiny import DATA
from trl_safety import AlignmentSubspace
from trl_safety.errors import CheckpointError, SafetyError, SubspaceError

Q = "model.layers.1.self_attn.q_proj"
BASE, ALIGNED = DATA / "gqa-base", DATA / "gqa-aligned"


def difference(layer: str = Q) -> torch.Tensor:
    one, other = (load_file(folder / "model.safetensors")[f"{layer}.weight"] for folder in (ALIGNED, BASE))
    return one.double() - other.double()


def build(**kwargs: Any) -> AlignmentSubspace:
    options = {"target_modules": ["q_proj"], "progress": False, **kwargs}
    return AlignmentSubspace.from_pair(options.pop("base", BASE), options.pop("aligned", ALIGNED), **options)


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(BASE, tmp_path / "base")), Path(shutil.copytree(ALIGNED, tmp_path / "aligned"))


@pytest.mark.parametrize("rank", [1, 8, 48])
def test_rank(rank: int) -> None:
    layer, V = build(rank=rank).layers[Q], difference()
    B = torch.randn(48, 3, dtype=torch.float64)
    assert layer.rank == rank
    dense = references.operator(V, "scaled", rank) @ B
    torch.testing.assert_close(layer.operator("scaled").to("cpu", torch.float64).apply(B), dense, rtol=1e-5, atol=1e-6)
    error = torch.linalg.matrix_norm(references.operator(V, "scaled") - references.operator(V, "scaled", rank), 2).item()
    assert error == pytest.approx(layer.error_bound, abs=1e-6)


def test_tolerance_bounds_the_error_of_c() -> None:
    subspace = build(tolerance=0.01, target_modules="all-linear")
    for name, layer in subspace.layers.items():
        V = difference(name)
        error = torch.linalg.matrix_norm(references.operator(V, "scaled") - references.operator(V, "scaled", layer.rank), 2)
        assert error <= layer.error_bound * (1 + 1e-5) + 1e-9
        assert error <= 0.01 * torch.linalg.matrix_norm(references.operator(V, "scaled"), 2)


def test_whole_is_exact_and_bfloat16_owns_up_to_its_rounding() -> None:
    C = references.operator(difference(), "scaled")
    exact, rounded = build(whole=True).layers[Q], build(whole=True, dtype=torch.bfloat16).layers[Q]
    assert exact.error_bound == 0
    for layer in (exact, rounded):
        kept = layer.whole.double() @ layer.whole.double().T / layer.frobenius_norm
        assert torch.linalg.matrix_norm(kept - C, 2) <= layer.error_bound + 1e-6
    assert rounded.error_bound > 0


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 6),
        ("all-linear", 21),
        (r".*layers\.[01]\..*\.(q|k)_proj", 4),
        (["model.layers.2.mlp.up_proj"], 1),
    ],
)
def test_targets_as_in_peft(targets: Any, count: int) -> None:
    assert len(build(rank=2, target_modules=targets).layers) == count


def test_targets_of_an_adapter() -> None:
    subspace = build(rank=2, target_modules=None, adapter=DATA / "gqa-adapter")
    assert {name.rpartition(".")[2] for name in subspace.layers} == {"q_proj", "v_proj", "down_proj"}


def test_shards_and_order_make_no_difference(copies: tuple[Path, Path]) -> None:
    whole = build(rank=4)
    for folder in copies:
        shard(folder)
    assert build(base=copies[0], aligned=copies[1], rank=4).identity == whole.identity


def test_biases_do_not_shift_the_pairing(copies: tuple[Path, Path]) -> None:
    # The authors pair by position, which a bias in one of the two files shifts by one.
    rewrite(copies[0], lambda t: t.update({"model.layers.0.self_attn.a_first.bias": torch.ones(48)}))
    assert build(base=copies[0], aligned=copies[1], rank=4).identity == build(rank=4).identity


def test_saved_and_loaded(tmp_path: Path) -> None:
    for cut in ({"rank": 4}, {"whole": True}):
        subspace = build(**cut)
        path = subspace.save(tmp_path / "sub" / "S.safetensors")
        loaded = AlignmentSubspace.load(path)
        assert loaded.identity == subspace.identity
        assert loaded.provenance == subspace.provenance
        for name, layer in subspace.layers.items():
            again = loaded.layers[name]
            for field in (field for field in dataclasses.fields(layer) if field.compare):
                one, other = getattr(layer, field.name), getattr(again, field.name)
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert not list(path.parent.glob(".*"))
        path.unlink()


def test_loads_from_a_folder_as_from_the_hub(tmp_path: Path) -> None:
    build(rank=4).save(tmp_path / "alignment_subspace.safetensors")
    assert AlignmentSubspace.from_pretrained(tmp_path).identity == build(rank=4).identity


def test_conv1d_is_transposed_and_tied_heads_are_found(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    models = {}
    for name in ("base", "aligned"):
        models[name] = GPT2LMHeadModel(config)
        models[name].save_pretrained(tmp_path / name)
    subspace = build(base=tmp_path / "base", aligned=tmp_path / "aligned", target_modules="all-linear", whole=True)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        layer = subspace.layers[f"transformer.h.0.{part}"]
        one, other = (models[name].get_submodule(f"transformer.h.0.{part}").weight for name in ("aligned", "base"))
        assert layer.transposed
        torch.testing.assert_close(layer.whole, (one - other).detach().T)
    head = build(base=tmp_path / "base", aligned=tmp_path / "aligned", target_modules=["lm_head"], whole=True).layers["lm_head"]
    torch.testing.assert_close(head.whole, (models["aligned"].lm_head.weight - models["base"].lm_head.weight).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, a: shutil.copy(b / "model.safetensors", a / "model.safetensors"), "identical in the base and the aligned model"),
        (lambda b, a: rewrite(b, lambda t: t.update({f"{Q}.weight": torch.ones(48, 40)})), rf"{Q}.*shape \(48, 40\)"),
        (lambda b, a: rewrite(b, lambda t: t.pop(f"{Q}.weight")), rf"{Q}.*not in the base"),
        (lambda b, a: rewrite(a, lambda t: t.pop(f"{Q}.weight")), rf"{Q}.*no weight"),
        (lambda b, a: rewrite(b, lambda t: t[f"{Q}.weight"].fill_(float("nan"))), rf"{Q}.*NaN"),
        (lambda b, a: (a / "config.json").write_text('{"model_type": "no-such"}'), "trust_remote_code"),
    ],
)
def test_bad_pairs_name_the_layer(copies: tuple[Path, Path], change: Any, message: str) -> None:
    change(*copies)
    with pytest.raises(SafetyError, match=message):
        build(base=copies[0], aligned=copies[1], rank=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 25, "target_modules": ["v_proj"]}, r"rank = 25: layer .*v_proj.*at most 24"),
        ({"rank": 0}, "at least 1"),
        ({"tolerance": 1.5}, "between 0 and 1"),
        ({}, "exactly one of rank"),
        ({"rank": 4, "whole": True}, "exactly one of rank"),
        ({"rank": 4, "target_modules": ["q_proj", "q_porj"]}, r"'q_porj' matches no linear layer.*q_proj"),
        ({"rank": 4, "target_modules": ["embed_tokens"]}, "matches no linear layer"),
        ({"rank": 4, "target_modules": None}, "either target_modules"),
        ({"rank": 4, "adapter": DATA / "mha-adapter"}, "either target_modules"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SubspaceError, match=message):
        build(**options)


def test_bad_files(tmp_path: Path) -> None:
    path = build(rank=4).save(tmp_path / "S.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SubspaceError, match="truncated"):
        AlignmentSubspace.load(path)
    path.write_text("not safetensors")
    with pytest.raises(SubspaceError, match="not a safetensors file"):
        AlignmentSubspace.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(SubspaceError, match="not an alignment subspace"):
        AlignmentSubspace.load(path)
    with pytest.raises(SubspaceError, match="no such file"):
        AlignmentSubspace.load(tmp_path / "missing.safetensors")
    with pytest.raises(SubspaceError, match="fetched"):
        AlignmentSubspace.from_pretrained("someone/nothing")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    path = build(rank=4).save(tmp_path / "S.safetensors")
    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata()
    key = next(key for key in metadata if key.startswith("trl_safety"))
    header = json.loads(metadata[key])
    header["provenance"]["schema_version"] = 99
    save_file(load_file(path), path, metadata={key: json.dumps(header)})
    with pytest.raises(SubspaceError, match="schema version 99"):
        AlignmentSubspace.load(path)


def test_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SubspaceError, match=r"output = .*cannot be written"):
        build(rank=4).save(tmp_path / "file" / "S.safetensors")
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk."""
    path = build(rank=1).save(tmp_path / "S.safetensors")
    before = path.read_bytes()
    code = (
        "import resource, signal, sys; from trl_safety import AlignmentSubspace\n"
        f"s = AlignmentSubspace.from_pair({str(BASE)!r}, {str(ALIGNED)!r}, target_modules='all-linear', whole=True, progress=False)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"s.save({str(path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1
    assert "SubspaceError" in done.stderr
    assert "cannot be written" in done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["S.safetensors"]


def test_a_truncated_checkpoint_is_no_pair(copies: tuple[Path, Path]) -> None:
    content = (copies[1] / "model.safetensors").read_bytes()
    (copies[1] / "model.safetensors").write_bytes(content[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        build(base=copies[0], aligned=copies[1], rank=4)


def test_the_projector_of_full_rank_is_refused() -> None:
    with pytest.raises(SubspaceError, match="identity and would do nothing"):
        build(rank=48).layers[Q].operator("orthogonal")
    with pytest.raises(SubspaceError, match="keeps V whole"):
        build(whole=True).layers[Q].operator("orthogonal")


def test_every_adapted_layer_must_be_there(gqa_subspace: AlignmentSubspace) -> None:
    subspace = build(rank=4)
    with pytest.raises(SubspaceError, match=r"1 of 2 adapted layers.*v_proj.*skip_modules"):
        subspace.for_modules([Q, "model.layers.1.self_attn.v_proj"])
    assert list(subspace.for_modules([Q, "model.layers.1.self_attn.v_proj"], ["v_proj"])) == [Q]
    with pytest.raises(SubspaceError, match=r"skip_modules = \['nothing'\]"):
        subspace.for_modules([Q], ["nothing"])
    with pytest.raises(SubspaceError, match="no adapted layer to protect"):
        subspace.for_modules([Q], ["q_proj"])
