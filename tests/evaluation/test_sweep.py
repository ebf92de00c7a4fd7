"""A sweep's points are the corrected adapters; what it chooses and writes is what it showed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace, merge_reinforce
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.cli.app import app
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.evaluation.loading import load_model
from trl_safety.evaluation.sweep import Point, Sweep, choose, parse_grid, sweep, write_chosen
from trl_safety.evaluation.sweep_page import figure, rows, section, write_results
from trl_safety.evaluation.unfinished import UnfinishedError
from trl_safety.reports.report import verify
from trl_safety.scoring import KeywordJudge, Prompt, Rate, Verdict

SETS: Any = {
    "harmful": [Prompt(f"w{i} w{i + 1}") for i in range(3, 20)],
    "benign": [Prompt(f"w{i}") for i in range(3, 12)],
    "task": [Prompt(f"w{i}", "w5") for i in range(3, 9)],
}
JUDGE = KeywordJudge(refusals=["w1", "w2"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sweep")
    for name in ("base", "aligned"):
        tiny.model(f"gqa-{name}").save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    AlignmentSubspace.from_pair(folder / "base", folder / "aligned", target_modules="all-linear", rank=8, progress=False).save(
        folder / "S.safetensors"
    )
    providers.make(folder, base=str(folder / "aligned"), reinforce={"target_modules": ["q_proj", "down_proj"], "use_rslora": False})
    trainer = tiny.trainer(folder / "user", base=tiny.model(str(folder / "aligned")))
    trainer.train()
    trainer.save_model()
    for kind, prompts in SETS.items():
        rows = [{"prompt": prompt.text, **({"answer": prompt.answer} if prompt.answer else {})} for prompt in prompts]
        (folder / f"{kind}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_what_a_method_has_no_use_for(world: Path) -> None:
    model, tokenizer = load_model(None, world / "user")
    subspace = AlignmentSubspace.load(world / "S.safetensors")
    with pytest.raises(ConfigurationError, match="reinforce is given, but safe_lora uses none"):
        sweep(
            model,
            tokenizer,
            world / "user",
            "safe_lora",
            {"layers": [1]},
            SETS,
            JUDGE,
            subspace=subspace,
            reinforce=world / "reinforce",
        )
    grid = {"alpha": [0.1]}
    with pytest.raises(ConfigurationError, match="subspace is given, but buffer_reinforce uses none"):
        sweep(model, tokenizer, world / "user", "buffer_reinforce", grid, SETS, JUDGE, subspace=subspace, reinforce=world / "reinforce")


def scored(world: Path, adapter: Path) -> dict[str, Any]:
    from trl_safety.scoring import score

    model, tokenizer = load_model(None, adapter)
    return score(model, tokenizer, SETS, JUDGE, new_tokens=6)[0].flags


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        ("safe_lora", {"layers": [1, 5, 9]}),
        ("csulora", {"lambda_partial": [0.0, 4.0], "lambda_outside": [8.0]}),
        ("alignment_vector", {"gamma": [0.0, 1.0, 3.0], "rank": [2, 8]}),
        ("buffer_reinforce", {"alpha": [0.0, 1.0], "user_weight": [0.5, 1.0]}),
    ],
)
def test_every_point_is_the_corrected_adapter(world: Path, tmp_path: Path, method: str, grid: dict[str, list[Any]]) -> None:
    model, tokenizer = load_model(None, world / "user")
    before = tiny.factors(model)
    subspace = AlignmentSubspace.load(world / "S.safetensors")
    seen: list[Point] = []
    found = sweep(
        model,
        tokenizer,
        world / "user",
        method,
        grid,
        SETS,
        JUDGE,
        subspace=None if method == "buffer_reinforce" else subspace,
        reinforce=world / "reinforce" if method == "buffer_reinforce" else None,
        new_tokens=6,
        progress=seen.append,
    )
    assert tiny.identical(before, tiny.factors(model))
    assert found.points == seen
    points = [point for point in found.points if point.method == method]
    count = 1
    for values in grid.values():
        count *= len(values)
    assert len(points) == count
    assert len(found.points) == 1 + 2 * count
    assert [point.acted for point in points] == [point.options.get("gamma") != 0 for point in points]
    assert not any(point.acted for point in found.points if point.method != method)
    for i, point in enumerate(points):
        found.chosen = found.points.index(point)
        write_chosen(found, tmp_path / str(i), subspace=subspace, reinforce=world / "reinforce")
        assert scored(world, tmp_path / str(i)) == point.scores.flags, point.options
        factors = AdapterFolder.open(tmp_path / str(i)).factors.values()
        norm = sum((f.scaling * f.B.double() @ f.A.double()).square().sum() for f in factors) ** 0.5
        assert point.update_norm == pytest.approx(float(norm), rel=1e-4)
        control = found.points[found.chosen + 1]
        assert control.method == "scaled"
        assert control.update_norm == pytest.approx(point.update_norm, rel=1e-4)


def point(method: str, attack: float, task: float, acted: bool = False) -> Point:
    def rate(share: float) -> dict[str, Any]:
        return {"hits": 0, "count": 1, "share": share, "low": 0, "high": 1}

    scores = {"judge": "x", "attack": rate(attack), "task": rate(task), "flags": {}}
    return Point.model_validate({"method": method, "options": {}, "update_norm": 1.0, "scores": scores, "acted": acted})


@pytest.mark.parametrize(
    ("attack", "loss", "expected"), [(None, None, None), (0.5, None, 2), (0.2, None, 3), (0.2, 0.1, None), (0.5, 0.1, 2), (0.9, 0.0, 1)]
)
def test_the_choice(attack: float | None, loss: float | None, expected: int | None) -> None:
    points = [point("uncorrected", 1.0, 0.9), *(point("m", *rates, acted=True) for rates in ((0.8, 0.9), (0.4, 0.85), (0.1, 0.5)))]
    # These fit every constraint, but protect nothing.
    points += [point("scaled", 0.0, 0.9), point("m", 0.0, 0.95)]
    assert choose(Sweep(adapter="a", method="m", max_attack_success=attack, max_utility_loss=loss, points=points)) == expected


def test_answers_that_nobody_read_make_no_setting_safe() -> None:
    points = [point("uncorrected", 1.0, 0.9), point("m", 0.4, 0.9, acted=True), point("m", 0.3, 0.5, acted=True)]
    points[1].scores.attack = Rate.of([False] * 5 + [None] * 5)
    found = Sweep(adapter="a", method="m", max_attack_success=0.4, max_utility_loss=None, points=points)
    assert choose(found) == 2
    assert choose(found.model_copy(update={"max_attack_success": 0.5})) == 1
    # Of two with the same task, the one whose answers were not read is the less safe.
    found.points[2] = point("m", 0.3, 0.9, acted=True)
    for attack in (points[1].scores.attack, None):
        found.points[1].scores.attack = attack
        assert choose(found.model_copy(update={"max_attack_success": None, "max_utility_loss": 0.1})) == 2


class Tires:
    """Reads the answers of the first so many calls."""

    name = "tires"
    knows_refusals = True

    def __init__(self, calls: int) -> None:
        self._left = calls

    def verdicts(self, prompts: Any, completions: Any) -> list[Verdict | None]:
        if not self._left:
            raise ConfigurationError("judge = 'tires': it is no judge of this kind")
        self._left -= 1
        return list(JUDGE.verdicts(prompts, completions))


@pytest.mark.parametrize(("calls", "points"), [(0, 0), (2, 1), (5, 2)])
def test_points_are_kept_where_the_judge_fails(world: Path, tmp_path: Path, calls: int, points: int) -> None:
    model, tokenizer = load_model(None, world / "user")
    subspace = AlignmentSubspace.load(world / "S.safetensors")
    options: Any = {"subspace": subspace, "max_attack_success": 1.0, "new_tokens": 6}
    with pytest.raises(UnfinishedError, match=r"the sweep stopped at .*it is no judge of this kind") as raised:
        sweep(model, tokenizer, world / "user", "safe_lora", {"layers": [2, 3]}, SETS, Tires(calls), **options)
    found = raised.value.found
    whole = sweep(model, tokenizer, world / "user", "safe_lora", {"layers": [2, 3]}, SETS, JUDGE, **options)
    assert len(found.points) == points
    for kept, same in zip(found.points, whole.points, strict=False):
        assert kept.scores.flags == same.scores.flags
        assert (kept.method, kept.options) == (same.method, same.options)
    assert found.chosen is None
    assert len(raised.value.rows) == sum(map(len, SETS.values()))
    if points:
        write_results(found, tmp_path / "out")
        assert "Not finished, so none was chosen" in (tmp_path / "out" / "sweep.html").read_text()


def test_a_sweep_whose_judge_fails_writes_what_it_found(world: Path, tmp_path: Path) -> None:
    line = ["sweep", str(world / "user"), "--method", "safe_lora", "--grid", "layers=2", "-s", str(world / "S.safetensors")]
    line += ["--harmful", str(world / "harmful.jsonl"), "--new-tokens", "6", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*line, "--judge", f"chat:{world / 'aligned'}"])
    assert result.exit_code == 1
    assert "the sweep stopped at uncorrected" in result.output
    texts = (tmp_path / "out" / "completions.jsonl").read_text().split("\n")
    assert [json.loads(text)["prompt"] for text in texts if text] == [prompt.text for prompt in SETS["harmful"]]
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_numbers_and_what_a_control_does_as_well() -> None:
    points = [
        point("uncorrected", 1.0, 0.9),
        point("m", 0.5, 0.5),
        point("scaled", 0.7, 0.8),  # as good as setting 3 on both, and better on one
        point("m", 0.2, 0.7),
        point("scaled", 0.2, 0.7),  # as good as setting 2, and no better
        point("m", 0.8, 0.8),
    ]
    found = Sweep(adapter="a", method="m", max_attack_success=None, max_utility_loss=None, points=points)
    assert [cells[0] for cells in rows(found)] == ["", "1", "control 1", "2", "control 2", "3"]
    texts = [text.get_text() for text in figure(found).axes[0].texts]
    assert sorted(texts) == ["1", "1", "2", "2", "3"]
    said = "".join(section(found, b""))
    assert "No constraint was given, so none was chosen." in said
    assert "2 of 3 settings." in said
    assert "attack: harmful prompts complied with (n = 1)" in said
    assert "<div class=t tabindex=0><table>" in said
    for chosen, expected in (
        (5, "Chosen: 3 "),
        (5, "2 of 3 settings, the chosen one among them."),
        (3, "2 of 3 settings, not the chosen one."),
    ):
        assert expected in "".join(section(found.model_copy(update={"chosen": chosen}), b""))
    alone = found.model_copy(update={"points": [each for each in points if each.method != "scaled"]})
    assert "No control was scored" in "".join(section(alone, b""))


def test_the_command(world: Path, tmp_path: Path) -> None:
    line = [
        "sweep",
        str(world / "user"),
        "--method",
        "alignment_vector",
        "--grid",
        "gamma=0,1",
        "--grid",
        "rank=4",
        "-s",
        str(world / "S.safetensors"),
    ]
    line += [x for kind in SETS for x in (f"--{kind}", str(world / f"{kind}.jsonl"))] + ["--new-tokens", "6"]
    result = CliRunner().invoke(app, [*line, "-o", str(tmp_path / "out"), "--max-attack-success", "1.0"])
    assert result.exit_code == 0, (result.output, result.exception)
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]) == 5
    chosen = json.loads((tmp_path / "out" / "sweep.json").read_text())["chosen"]
    assert chosen is not None
    result = CliRunner().invoke(app, [*line, "-o", str(tmp_path / "none"), "--max-utility-loss", "0", "--max-attack-success", "0"])
    assert result.exit_code == 2
    assert "no setting meets the constraints" in result.output
    assert not (tmp_path / "none" / "adapter").exists()


def test_what_it_writes_is_verified(world: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(None, world / "user")
    subspace = AlignmentSubspace.load(world / "S.safetensors")
    found = sweep(
        model, tokenizer, world / "user", "safe_lora", {"layers": [3]}, SETS, JUDGE, subspace=subspace, max_attack_success=1.0, new_tokens=6
    )
    assert found.chosen == 1
    write_chosen(found, tmp_path / "out", subspace=subspace)
    assert verify(tmp_path / "out").methods[0].settings["layers"] == 3


def test_grids() -> None:
    assert parse_grid(["gamma=0.5, 1", "rank=8,null", "operator=scaled"]) == {
        "gamma": [0.5, 1],
        "rank": [8, None],
        "operator": ["scaled"],
    }
    for wrong in ("gamma", "gamma=", "=1"):
        with pytest.raises(ConfigurationError, match="expected OPTION=V1"):
            parse_grid([wrong])


@pytest.mark.parametrize(
    ("method", "grid", "kwargs", "message"),
    [
        ("asft", {"weight": [1]}, {}, "a sweep needs a correction that takes no training"),
        ("safe_lora", {"tau": [1]}, {}, "unknown option"),
        ("safe_lora", {"threshold": [2.0]}, {}, r"threshold = 2.0"),
        ("safe_lora", {}, {}, "grid is empty"),
        ("safe_lora", {"layers": [1], "corrected_checkpoints": [True]}, {}, "has no use in a sweep"),
        ("safe_lora", {"threshold": [0.5]}, {}, "subspace is missing"),
        ("buffer_reinforce", {"alpha": [0.5]}, {}, "reinforce is missing"),
        ("alignment_vector", {"gamma": [i / 100 for i in range(300)]}, {}, "at most 200"),
    ],
)
def test_refused(world: Path, method: str, grid: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    model, tokenizer = load_model(None, world / "user")
    with pytest.raises(ConfigurationError, match=message):
        sweep(model, tokenizer, world / "user", method, grid, SETS, JUDGE, **kwargs)


def test_what_belongs_to_another_model_is_refused(world: Path, tmp_path: Path) -> None:
    aligned = tiny.model(str(world / "aligned"))
    with torch.no_grad():
        for parameter in aligned.parameters():
            parameter.mul_(1.01)
    aligned.save_pretrained(tmp_path / "other")
    subspace = AlignmentSubspace.from_pair(world / "base", tmp_path / "other", target_modules="all-linear", rank=8, progress=False)
    model, tokenizer = load_model(None, world / "user")
    with pytest.raises(AdapterError, match="another model"):
        sweep(model, tokenizer, world / "user", "safe_lora", {"layers": [3]}, SETS, JUDGE, subspace=subspace)
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    with pytest.raises(AdapterError, match="use the adapter that was made for this model"):
        sweep(model, tokenizer, world / "user", "buffer_reinforce", {"alpha": [0.1]}, SETS, JUDGE, reinforce=world / "reinforce")


def test_a_corrected_or_merged_adapter_is_refused(world: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(None, world / "user")
    subspace = AlignmentSubspace.load(world / "S.safetensors")
    correct_folder(world / "user", tmp_path / "a", subspace, SafeLoraCorrection(SafeLoraConfig(layers=3)))
    merge_reinforce(world / "user", world / "reinforce", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(AdapterError, match="already"):
            sweep(model, tokenizer, folder, "safe_lora", {"layers": [3]}, SETS, JUDGE, subspace=subspace)
    with pytest.raises(AdapterError, match="is a BufferLoRA"):
        load_model(None, world / "buffer")
