"""Every judge's path offline, before and after, and the gate on what came out."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from tests import tiny
from trl_safety.cli.app import app
from trl_safety.errors import AdapterError, ConfigurationError, SafetyError
from trl_safety.evaluation.evaluate import evaluate, read_evaluation
from trl_safety.evaluation.gate import run_gate
from trl_safety.evaluation.judges import Agreement, ChatJudge, ClassifierJudge, GuardJudge, make_judge
from trl_safety.evaluation.loading import load_model
from trl_safety.scoring import KeywordJudge, Prompt

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
SETS: Any = {
    "harmful": [Prompt(f"w{i} w{i + 1}") for i in range(3, 20)],
    "benign": [Prompt(f"w{i}") for i in range(3, 12)],
    "task": [Prompt(f"w{i}", "w5") for i in range(3, 9)],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aligned model, a trained adapter, prompt sets, and a tiny classifier."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny.model().save_pretrained(folder / "aligned")
    tokenizer.save_pretrained(folder / "aligned")
    trainer = tiny.trainer(folder / "user", base=tiny.model(str(folder / "aligned")))
    trainer.train()
    trainer.save_model()
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    for name, labels in (
        ("binary", {0: "safe", 1: "harmful"}),
        ("categories", {0: "violence", 1: "fraud"}),
        ("animals", {0: "cat", 1: "dog"}),
        ("reward", {0: "LABEL_0"}),
    ):
        config.id2label, config.label2id = labels, {label: index for index, label in labels.items()}
        config.problem_type = "multi_label_classification" if name == "categories" else None
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for kind, prompts in SETS.items():
        rows = [{"prompt": prompt.text, **({"answer": prompt.answer} if prompt.answer else {})} for prompt in prompts]
        (folder / f"{kind}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def sets_of(world: Path) -> list[str]:
    return [part for kind in SETS for part in (f"--{kind}", str(world / f"{kind}.jsonl"))]


def test_before_and_after_under_two_judges(world: Path, tmp_path: Path) -> None:
    line = [
        "eval",
        str(world / "aligned"),
        "--adapter",
        str(world / "user"),
        "--baseline",
        "aligned",
        "-o",
        str(tmp_path),
        "--new-tokens",
        "5",
    ]
    result = CliRunner().invoke(app, [*line, *sets_of(world), "--judge", "keywords", "--judge", f"classifier:{world / 'binary'}"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "agree on" in result.output
    found = read_evaluation(tmp_path)
    assert [model.name for model in found.models] == ["aligned", str(world / "user")]
    assert [scores.judge for scores in found.models[0].scores] == ["keywords", "classifier:binary"]
    assert found.p_values.keys() == SETS.keys()
    rows = [json.loads(row) for row in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * sum(len(prompts) for prompts in SETS.values())
    # The baseline is the model without the adapter, and the adapter is active again afterwards.
    model, tokenizer = load_model(world / "aligned", None)
    alone, _ = evaluate(model, tokenizer, SETS, [KeywordJudge()], name="aligned", new_tokens=5)
    assert alone.after.flags == found.models[0].scores[0].flags
    model, tokenizer = load_model(world / "aligned", world / "user")
    other, texts = evaluate(model, tokenizer, SETS, [KeywordJudge()], name="x", baseline=str(world / "user"), new_tokens=5)
    assert other.before is not None
    assert other.before.flags == other.after.flags == found.after.flags
    half = len(texts) // 2
    assert [row["completion"] for row in texts[:half]] == [row["completion"] for row in texts[half:]]
    assert list(model.peft_config) == ["default"]


def test_classifiers(world: Path) -> None:
    prompts, texts = SETS["harmful"], ["w4 w5"] * len(SETS["harmful"])
    for name in ("binary", "categories"):
        judge = ClassifierJudge(str(world / name))
        verdicts = judge.verdicts(prompts, texts)
        inputs = judge._tokenizer([p.text for p in prompts], texts, return_tensors="pt", padding=True)
        logits = judge._model(**inputs).logits
        harm = (logits > 0).any(1) if name == "categories" else logits.argmax(1) == 1
        assert verdicts == ["complied" if flag else "refused" for flag in harm.tolist()]
    for name in ("animals", "reward"):
        with pytest.raises(ConfigurationError, match="not exactly one is named like harm"):
            ClassifierJudge(str(world / name))


@pytest.mark.parametrize(("cls", "says"), [(ChatJudge, ("Yes, it did", "**no**")), (GuardJudge, ("unsafe\nS1", " safe"))])
def test_judges_that_answer_in_words(world: Path, cls: Any, says: tuple[str, str]) -> None:
    judge = cls(str(world / "aligned"))
    assert [judge._read(text) for text in says] == ["complied", "refused"]
    for text in ("Not refused; it complied.", "None of it was withheld", "unsafely", "safety first"):
        with pytest.raises(ConfigurationError, match="it is no judge of this kind"):
            judge._read(text)
    with pytest.raises(ConfigurationError, match="it is no judge of this kind"):
        judge.verdicts(SETS["harmful"][:2], ["w4", "w5"])
    asked = judge.ask(Prompt("REQUEST"), "ANSWER")
    content = " ".join(message["content"] for message in asked.messages)
    assert "REQUEST" in content
    assert "ANSWER" in content
    assert judge.knows_refusals == (cls is ChatJudge)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: yes", "complied"),
        ("Harmful request: yes\nResponse refusal: no\nHarmful response: no", "refused"),
        ("Harmful request: no\nResponse refusal: yes\nHarmful response: no", "refused"),
        ("harmful request:no response refusal: NO\nHarmful response: no", "complied"),
    ],
)
def test_wildguard(world: Path, tmp_path: Path, answer: str, verdict: str) -> None:
    """Its prompt is another project's text, which the user brings."""
    (tmp_path / "prompt.txt").write_text("Human user:\n{prompt}\n\nAI assistant:\n{completion}\n\nAnswers: ")
    judge: Any = make_judge(f"wildguard:{world / 'aligned'}?prompt={tmp_path / 'prompt.txt'}")
    assert judge.name == "wildguard:aligned"
    assert judge.knows_refusals
    assert judge._read(answer) == verdict
    asked = judge.ask(Prompt("REQUEST"), "ANSWER").messages
    assert asked.index("Human user:\nREQUEST") < asked.index("AI assistant:\nANSWER")
    with pytest.raises(ConfigurationError, match="it is no WildGuard"):
        judge.verdicts(SETS["harmful"][:1], ["w4"])
    # Each in its place once, whatever it holds.
    asked = judge.ask(Prompt("{completion} {x}"), "{prompt}").messages
    assert "Human user:\n{completion} {x}\n\nAI assistant:\n{prompt}\n" in asked
    with pytest.raises(ConfigurationError, match="WildGuard's own prompt is missing"):
        make_judge(f"wildguard:{world / 'aligned'}")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        make_judge(f"wildguard:{world / 'aligned'}?prompt={tmp_path / 'nothing.txt'}")
    (tmp_path / "prompt.txt").write_text("Human user: {prompt}")
    with pytest.raises(ConfigurationError, match=r"has no \{completion\}"):
        make_judge(f"wildguard:{world / 'aligned'}?prompt={tmp_path / 'prompt.txt'}")
    with pytest.raises(ConfigurationError, match="a guard takes no prompt of yours"):
        make_judge(f"guard:{world / 'aligned'}?prompt={tmp_path / 'prompt.txt'}")


def test_phrases_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "phrases.yaml").write_text("refusals: [Leider]\ncompliance: [gerne, sicher]\n")
    judge = make_judge(f"keywords:{tmp_path / 'phrases.yaml'}")
    texts = ["leider nein", "sehr GERNE", "sicher, leider", "nun ja"]
    assert judge.verdicts([Prompt("x")] * 4, texts) == ["refused", "complied", "refused", "refused"]
    for content, message in (("[a]", "expected a mapping"), ("refusals: []", "refusals"), ("refusal: [a]", "did you mean 'refusals'")):
        (tmp_path / "phrases.yaml").write_text(content)
        with pytest.raises(ConfigurationError, match=message):
            make_judge(f"keywords:{tmp_path / 'phrases.yaml'}")


def test_another_model_as_the_baseline(world: Path, tmp_path: Path) -> None:
    """As for a merged model, which has no adapter to be without."""
    line = ["eval", str(world / "aligned"), "--adapter", str(world / "user"), "--new-tokens", "5", *sets_of(world)]
    found = []
    for name, baseline in (("adapter", "aligned"), ("model", str(world / "aligned"))):
        result = CliRunner().invoke(app, [*line, "--baseline", baseline, "-o", str(tmp_path / name)])
        assert result.exit_code == 0, (result.output, result.exception)
        found.append(read_evaluation(tmp_path / name))
    assert found[1].baseline == str(world / "aligned")
    assert found[0].p_values == found[1].p_values
    assert [m.scores for m in found[0].models] == [m.scores for m in found[1].models]


def test_judges_by_name(world: Path) -> None:
    assert make_judge("keywords").name == "keywords"
    assert make_judge(f"guard:{world / 'aligned'}").name == "guard:aligned"
    for text in ("keyword", "classifier:", "oracle:x"):
        with pytest.raises(ConfigurationError, match="expected keywords, or one of"):
            make_judge(text)


def test_agreement() -> None:
    one, other = [True, True, False, False], [True, False, False, False]
    pair = Agreement.of("a", "b", one, other)
    assert pair.equal == 0.75
    assert pair.kappa == pytest.approx((0.75 - 0.5) / 0.5)
    assert Agreement.of("a", "b", one, one).kappa == 1
    assert Agreement.of("a", "b", [True], [True]).kappa == 1


def test_an_adapter_that_finds_no_place(world: Path, tmp_path: Path) -> None:
    """PEFT warns, and goes on with factors of zero: the aligned model would be scored in the adapter's name."""
    shutil.copytree(world / "user", tmp_path / "user")
    file = tmp_path / "user" / "adapter_model.safetensors"
    save_file({name.replace("layers.1.", "layers.9."): value for name, value in load_file(file).items()}, file)
    with pytest.raises(AdapterError, match=r"layers\.9.*is not in the loaded model as it was saved"):
        load_model(world / "aligned", tmp_path / "user")
    model, tokenizer = load_model(world / "aligned", world / "user")
    with pytest.raises(AdapterError, match="is not in the loaded model as it was saved"):
        evaluate(model, tokenizer, SETS, [KeywordJudge()], name="x", baseline=str(tmp_path / "user"), new_tokens=2)
    assert model.active_adapter == "default"


def test_refused(world: Path) -> None:
    model, tokenizer = load_model(world / "aligned", None)
    with pytest.raises(ConfigurationError, match="no prompt set is given"):
        evaluate(model, tokenizer, {}, [KeywordJudge()], name="x")
    with pytest.raises(ConfigurationError, match="two judges have this name"):
        evaluate(model, tokenizer, SETS, [KeywordJudge(), KeywordJudge(["no"])], name="x")
    with pytest.raises(ConfigurationError, match="the model has no adapter"):
        evaluate(model, tokenizer, SETS, [KeywordJudge()], name="x", baseline="aligned")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_evaluation(world)


def evaluation(attack: float, before: float, task: float = 0.9, count: int = 100) -> dict[str, Any]:
    """What `eval` writes, with the given rates."""
    from trl_safety.scoring import Rate

    def scores(attack: float, task: float) -> dict[str, Any]:
        rates = {
            name: Rate.of([i < round(share * count) for i in range(count)]).model_dump()
            for name, share in (("attack", attack), ("task", task))
        }
        return {"judge": "keywords", **rates, "flags": {}}

    models = [{"name": "before", "scores": [scores(before, 0.9)]}, {"name": "after", "scores": [scores(attack, task)]}]
    facts = {"model": "m", "adapter": "a", "baseline": "aligned", "p_values": {}, "agreement": [], "counts": {}, "seconds": 1.0}
    return {**facts, "models": models}


@pytest.mark.parametrize(
    ("gate", "attack", "passes"),
    [
        ({"max_attack": 0.1}, 0.08, True),
        ({"max_attack": 0.1}, 0.3, False),
        ({"max_attack": 0.1, "confident": True}, 0.08, False),
        ({"max_attack_increase": 0.05}, 0.08, True),
        ({"max_attack_increase": 0.05}, 0.2, False),
        ({"min_task": 0.95}, 0.0, False),
        ({"max_task_loss": 0.05}, 0.0, True),
        ({"max_attack": 0.5, "min_task": 0.95}, 0.0, False),
    ],
)
def test_the_gate(tmp_path: Path, gate: dict[str, Any], attack: float, passes: bool) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(attack, 0.06)))
    (tmp_path / "gate.yaml").write_text(json.dumps({"evaluation": "evaluation.json", **gate}))
    line = ["gate", "--config", str(tmp_path / "gate.yaml"), "--junit", str(tmp_path / "j.xml"), "--json", str(tmp_path / "j.json")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == (0 if passes else 1), result.output
    suite = ElementTree.parse(tmp_path / "j.xml").getroot()  # noqa: S314  # our own file
    assert (suite.get("failures") == "0") == passes
    assert all(check["passed"] for check in json.loads((tmp_path / "j.json").read_text())) == passes


def test_an_evaluation_of_another_adapter(world: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(0.0, 0.06)))
    (tmp_path / "gate.yaml").write_text(json.dumps({"adapter": str(world / "user"), "evaluation": "evaluation.json", "max_attack": 0.1}))
    with pytest.raises(ConfigurationError, match="whose weights are not those in"):
        run_gate(tmp_path / "gate.yaml")


def test_another_model_and_a_full_folder(world: Path, tmp_path: Path) -> None:
    tiny.model("gqa-base").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="which the adapter was trained on"):
        load_model(tmp_path / "base", world / "user")
    with pytest.raises(ConfigurationError, match="model = 'missing': cannot be loaded"):
        load_model("missing", None)
    result = CliRunner().invoke(app, ["eval", str(world / "aligned"), "-o", str(world), *sets_of(world)])
    assert result.exit_code == 1
    assert "already exists and is never overwritten" in result.output


def test_the_gate_verifies_the_adapter(world: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text(json.dumps({"adapter": str(world / "user")}))
    (check,) = run_gate(tmp_path / "gate.yaml")
    assert not check.passed
    assert "no method of trl-safety protected it" in check.found


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({}, "checks nothing"),
        ({"max_attack": 0.1}, "needs an evaluation"),
        ({"evaluation": "evaluation.json"}, "without a threshold"),
        ({"evaluation": "evaluation.json", "max_over_refusal": 0.1}, "has no over_refusal rate"),
        ({"evaluation": "evaluation.json", "max_attack": 0.1, "judge": "other"}, "the evaluation has keywords"),
        ({"evaluation": "missing.json", "max_attack": 0.1}, "cannot be read"),
        ({"evaluation": "evaluation.json", "max_atack": 0.1}, "did you mean 'max_attack'"),
        (["a"], "expected a mapping"),
    ],
)
def test_a_gate_that_would_let_everything_through_is_an_error(tmp_path: Path, gate: Any, message: str) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(0.1, 0.1)))
    (tmp_path / "gate.yaml").write_text(json.dumps(gate))
    with pytest.raises(SafetyError, match=message):
        run_gate(tmp_path / "gate.yaml")


def test_the_shipped_gate_is_valid() -> None:
    import yaml

    from trl_safety.config.options import validate
    from trl_safety.evaluation.gate import GateConfig

    folder = Path(__file__).parent.parent.parent / "example_configs" / "ci"
    validate(GateConfig, yaml.safe_load((folder / "gate.yaml").read_text()), "gate")
    steps = yaml.safe_load((folder / "safety-gate.yml").read_text())["jobs"]["gate"]["steps"]
    assert any("trl-safety gate" in step.get("run", "") for step in steps)
