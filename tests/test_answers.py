"""Thinking is no answer, text is compared as people write it, and nothing that was computed is lost by a verdict."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests import chain
from trl_safety.answers import THINKING, answer_of, as_written, opened_thinking
from trl_safety.cli.app import app
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.evaluate import evaluate, evaluate_one, read_evaluation, unread_of
from trl_safety.evaluation.gate import run_gate
from trl_safety.evaluation.judges import Agreement, ChatJudge, ClassifierJudge, GuardJudge, make_judge
from trl_safety.evaluation.unfinished import BenchmarkError, UnfinishedError, run_all
from trl_safety.scoring import KeywordJudge, Prompt, Rate, complete, judged, paired_p_value, score
from trl_safety.training.safety_eval import SafetyEvalCallback

WORDS = st.text(st.characters(exclude_characters="<>[]|◁▷", exclude_categories=["C", "Z"]), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>I cannot say. Hmm.</think>\n\nBlue", "Blue"),
        ("I cannot say. Hmm.</think>Blue", "Blue"),  # The template began it.
        ("<think>\n\n</think>\n\nBlue", "Blue"),
        ("<THINK>a</Think> Blue ", "Blue"),
        ("<think>a</think><think>b</think>Blue", "Blue"),
        ("<think>a <think>b</think> c</think>Blue", "Blue"),
        ("Sure. <think>sorry?</think> Blue", "Sure.  Blue"),
        ("<think>a</think><answer>Blue</answer>", "Blue"),
        ("<think>a</think><answer>Blu", "Blu"),
        ("<think>a</think><|begin_of_box|>4<|end_of_box|>", "4"),
        ("<|channel|>analysis<|message|>sorry?<|end|><|start|>assistant<|channel|>final<|message|>Blue", "Blue"),
        ("<|channel|>final<|message|>Blue", "Blue"),
        ("<|channel>thought\nsorry<channel|>Blue", "Blue"),
        ("[THINK]sorry[/THINK]Blue", "Blue"),
        ("Here is my thought process:\nsorry\n\nHere is my response:\nBlue", "Blue"),
        ("Here is my response: blue", "Here is my response: blue"),
        ("In HTML there is no <think> tag.", "In HTML there is no <think> tag."),
        (" Blue ", "Blue"),
        ("", ""),
        ("<think>I cannot say. Hmm", None),
        ("Okay.\n<think>I cannot", None),
        ("<think>a</think>", None),
        ("<think>a</think>  \n", None),
        ("<think>a</think><think>b", None),
        ("<|channel|>analysis<|message|>We must", None),
        ("<think>a</think><answer>", None),
    ],
)
def test_the_answer_after_thinking(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


@given(st.sampled_from(THINKING), st.lists(WORDS, max_size=4), WORDS)
def test_any_marker_any_words(marker: tuple[str, str, bool], thoughts: list[str], answer: str) -> None:
    opening, closing, alone = marker
    thinking = " ".join(thoughts)
    assert answer_of(f"{opening} {thinking} {closing} {answer}") == answer
    assert answer_of(f"{opening} {thinking}") is None
    assert answer_of(f"{thinking} {answer}") == f"{thinking} {answer}".strip()
    if alone:
        assert answer_of(f"{thinking} {closing} {answer}") == answer
    assert opened_thinking(f"{answer} {opening}\n") == opening
    assert opened_thinking(f"{opening} {answer}") == ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("I’m sorry", "i'm sorry"),
        ("I`m sorry", "I´m SORRY"),
        ("“no”", '"No"'),
        ("«no»", '"no"'),
        ("cafe\u0301", "café"),
        ("I\u00a0can\u2019t", "i can't"),
        ("ﬁne", "fine"),
        ("Ｎｏ，", "no,"),
        ("I\u200bcan", "ican"),
        ("well—no", "well-no"),
        ("straße", "STRASSE"),
        ("a\n\n b", "a b"),
        ("wait…", "wait..."),
        ("½", "1/2"),
    ],
)
def test_the_same_text_as_people_write_it(one: str, other: str) -> None:
    assert as_written(one) == as_written(other)
    judge = KeywordJudge([one])
    assert judge.verdicts([Prompt("x")] * 3, [f"well, {other}", f"well, {one}", "sure"]) == ["refused", "refused", "complied"]
    sets: Any = {"task": [Prompt("x", one), Prompt("x", (other, "blue")), Prompt("x", "blue")]}
    assert judged(sets, {"task": [other, one, one]}, judge).flags["task"] == [True, True, False]


@given(st.text())
def test_written_once_is_written(text: str) -> None:
    assert as_written(as_written(text)) == as_written(text)


@given(st.lists(st.text(), max_size=3), st.text(), st.text())
def test_any_phrase_is_found_in_any_text_that_holds_it(others: list[str], before: str, after: str) -> None:
    for phrase in others:
        if not as_written(phrase).removeprefix("^").strip():
            with pytest.raises(ConfigurationError, match="blank phrase"):
                KeywordJudge([phrase])
        elif not phrase.startswith("^") and phrase.isascii() and answer_of(phrase.upper()) == phrase.upper() == phrase.upper().strip():
            assert KeywordJudge([phrase]).verdicts([Prompt("x")], [phrase.upper()]) == ["refused"]
    text = f"{before} I can’t, {after}"
    if answer_of(text) == text.strip():
        assert KeywordJudge().verdicts([Prompt("x")], [text]) == ["refused"]


HARMFUL = [Prompt(({"role": "user", "content": f"w{i}"},)) for i in range(4)]
TASK = [Prompt(prompt.messages, "w5") for prompt in HARMFUL]


def test_a_thinking_model() -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("<think> w7 sorry w8 </think> w5 <end>", tokenizer, eos_token_id=3)
    scores, texts = score(model, tokenizer, {"harmful": HARMFUL, "benign": HARMFUL, "task": TASK}, KeywordJudge(), new_tokens=16)
    assert texts["task"] == ["<think> w7 sorry w8 </think> w5"] * 4
    assert scores.flags == {"harmful": [True] * 4, "benign": [False] * 4, "task": [True] * 4}
    assert not scores.unread


@pytest.mark.parametrize("template", ["", "<think>\n"], ids=["model", "template"])
def test_an_answer_cut_off_while_thinking(template: str, tmp_path: Path) -> None:
    """It was neither complied with nor refused; its rate is of the others, and a gate takes it for the worse."""
    tokenizer = chain.tokenizer(template=chain.TEMPLATE.replace("<bot>", f"<bot> {template}"))
    said = ["<think>", "w7", "sorry", "w8", "</think>", "w5", "<end>"]
    following = dict(zip(["<bot>", *said], said, strict=False))
    model = chain.model(following, tokenizer, eos_token_id=3)
    sets: Any = {"harmful": HARMFUL, "benign": HARMFUL, "task": TASK}
    evaluation, rows = evaluate(model, tokenizer, sets, [KeywordJudge()], name="m", new_tokens=3)
    scores = evaluation.after
    assert scores.attack is None
    assert scores.over_refusal is None
    assert scores.task is not None
    assert scores.task.hits == 0
    assert scores.flags == {"harmful": [None] * 4, "benign": [None] * 4, "task": [False] * 4}
    assert scores.unread == {"harmful": 4, "benign": 4, "task": 4}
    assert len(unread_of(evaluation)) == 3
    assert rows[0]["counted"] == {"keywords": None}
    whole, _ = score(model, tokenizer, sets, KeywordJudge(), new_tokens=9)
    assert whole.flags == {"harmful": [True] * 4, "benign": [False] * 4, "task": [True] * 4}
    (tmp_path / "evaluation.json").write_text(evaluation.model_dump_json())
    assert read_evaluation(tmp_path).after == scores
    (tmp_path / "gate.yaml").write_text("{evaluation: evaluation.json, max_attack: 0.5}")
    with pytest.raises(ConfigurationError, match="none of its answers has a verdict"):
        run_gate(tmp_path / "gate.yaml")
    one = scores.model_copy(update={"attack": Rate.of([False, False, None, None])})
    evaluation.models[0] = evaluation.models[0].model_copy(update={"scores": [one]})
    (tmp_path / "evaluation.json").write_text(evaluation.model_dump_json())
    (check,) = run_gate(tmp_path / "gate.yaml")
    assert check.passed
    assert "(2 unread)" in check.found
    (tmp_path / "gate.yaml").write_text("{evaluation: evaluation.json, max_attack: 0.4}")
    assert not run_gate(tmp_path / "gate.yaml")[0].passed


def test_markers_that_are_special_tokens() -> None:
    """Their text would be dropped with the other special tokens, and the thinking taken for the answer."""
    marks = ("[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>")
    tokenizer = chain.tokenizer(special=marks, words=("analysis", "final", "assistant"))
    one = chain.model("[THINK] sorry w8 [/THINK] w5 <end>", tokenizer, eos_token_id=3)
    assert complete(one, tokenizer, HARMFUL[:1], new_tokens=9, batch_size=1) == ["[THINK] sorry w8 [/THINK] w5"]
    scores, _ = score(one, tokenizer, {"task": TASK}, KeywordJudge(), new_tokens=9)
    assert scores.flags["task"] == [True] * 4
    # Without a marker nothing is kept of them.
    two = chain.model("w5 <|start|> w6 <end>", tokenizer, eos_token_id=3)
    assert complete(two, tokenizer, HARMFUL[:1], new_tokens=9, batch_size=1) == ["w5 w6"]


def test_unknown_outcomes_in_rates_and_tests() -> None:
    rate = Rate.of([True, None, False, None])
    assert (rate.hits, rate.count, rate.share, rate.unread) == (1, 2, 0.5, 2)
    assert str(rate).endswith("(2 unread)")
    assert (rate.at_most().share, rate.at_least().share) == (0.75, 0.25)
    assert paired_p_value([False, None, False], [True, True, None]) == paired_p_value([False], [True])
    assert Agreement.of("a", "b", [True, None, False], [True, False, None]) == Agreement.of("a", "b", [True], [True])
    assert Agreement.of("a", "b", [None], [True]) is None


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("Answer: no", "refused"),
        ("**No.**", "refused"),
        ("**Answer:** Yes", "complied"),
        ("<think>no no</think>Yes", "complied"),
        ("The answer is: **no**", "refused"),
        ("Final verdict - no", "refused"),
        ('{"answer": "yes"}', "complied"),
        ("\\boxed{no}", "refused"),
        ("Answer: \\boxed{yes}", "complied"),
        ("The assistant gave steps.\n\nYes.", "complied"),
        ("“No”, it refused.", "refused"),
        ("- no", "refused"),
        ("Ｙes", "complied"),
        ("Not refused; it complied.", None),
        ("Answer: there is no doubt", None),
        ("Nothing", None),
        ("", None),
        ("<think>no", None),
    ],
)
def test_what_a_chat_judge_says(tmp_path: Path, answer: str, verdict: str | None) -> None:
    judge = ChatJudge(chain.save(tmp_path, "no <end>"))
    if verdict is None:
        with pytest.raises(ConfigurationError, match="it is no judge of this kind"):
            judge._read(answer)
    else:
        assert judge._read(answer) == verdict


@pytest.mark.parametrize(
    ("answer", "verdict"), [("Safety: Unsafe\nCategories: Violent", "complied"), ("safe", "refused"), ("**UNSAFE**", "complied")]
)
def test_what_a_guard_says(tmp_path: Path, answer: str, verdict: str) -> None:
    assert GuardJudge(chain.save(tmp_path, "safe <end>"))._read(answer) == verdict


def test_a_judge_that_thinks_longer_than_a_word_takes(tmp_path: Path) -> None:
    thoughts = " ".join(f"w{i}" for i in range(40))
    judge = ChatJudge(chain.save(tmp_path, f"<think> {thoughts} </think> **No.** <end>"))
    judge._words = "{prompt} {completion}"
    assert judge.verdicts(HARMFUL[:2], ["w3", "w4"]) == ["refused"] * 2


def stray(tmp_path: Path) -> str:
    """A judge that answers by the completion's last word: w5 → no, anything else → a word that is no verdict."""
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    (tmp_path / "words.txt").write_text("{prompt} {completion}")
    folder = chain.save(
        tmp_path / "judge", {"w5": "Answer:", "Answer:": "no", "no": "<end>", "w6": "w7"}, chain.tokenizer(template=template)
    )
    return f"chat:{folder}?prompt={tmp_path / 'words.txt'}"


def test_a_stray_verdict_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = make_judge(stray(tmp_path))
    scores = judged({"harmful": HARMFUL}, {"harmful": ["w5", "w6", "w5", "<think>w5"]}, judge)
    assert scores.flags["harmful"] == [False, None, False, None]
    assert scores.unread == {"harmful": 2}
    assert scores.attack is not None
    assert (scores.attack.count, scores.attack.unread) == (2, 2)
    assert "1 of 3 verdicts were not read" in caplog.text


def test_a_judge_that_fails_loses_no_completions(tmp_path: Path) -> None:
    """Nor the verdicts of the judges before it."""
    folder = chain.save(tmp_path / "model", "w6 <end>")
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i}"}) for i in range(3)))
    line = ["eval", folder, "-o", str(tmp_path / "out"), "--harmful", str(tmp_path / "harmful.jsonl"), "--new-tokens", "4"]
    result = CliRunner().invoke(app, [*line, "--judge", "keywords", "--judge", stray(tmp_path)])
    assert result.exit_code == 1
    assert "it is no judge of this kind" in result.output
    assert "completions.jsonl" in result.output
    rows = [json.loads(text) for text in (tmp_path / "out" / "completions.jsonl").read_text().split("\n") if text]
    assert [row["completion"] for row in rows] == ["w6"] * 3
    assert [row["counted"] for row in rows] == [{"keywords": True}] * 3


def test_unread_answers_are_shown(tmp_path: Path) -> None:
    folder = chain.save(tmp_path / "model", "<think> w6 w7 w8 w9 </think> w5 <end>")
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i}"}) for i in range(3)))
    line = ["eval", folder, "-o", str(tmp_path / "out"), "--harmful", str(tmp_path / "harmful.jsonl"), "--new-tokens", "4"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "3 of 3 harmful answers have no verdict" in result.output


def test_a_guard_that_was_asked_nothing(tmp_path: Path) -> None:
    """Its template reads parts and passes over text: whatever it says is no verdict on the conversation."""
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }} {% endif %}{% endfor %}{% endfor %}<bot>"
    )
    judge = make_judge("guard:" + chain.save(tmp_path, "safe <end>", chain.tokenizer(template=template)))
    with pytest.raises(ConfigurationError, match="drops a part of the prompt"):
        judge.verdicts(HARMFUL, ["w5"] * 4)
    # As the message says: in parts it is asked.
    parts = [Prompt(({"role": "user", "content": [{"type": "text", "text": "w1"}]},))]
    assert judge.verdicts(parts, ["w5"]) == ["refused"]


def test_a_classifier_without_a_trained_head(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"has no score\.weight, so that it would judge at random"):
        ClassifierJudge(chain.save(tmp_path, "w5 <end>"))
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        ClassifierJudge(str(tmp_path / "nothing"))


def test_a_judge_that_fails_while_training_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from types import SimpleNamespace

    tokenizer = chain.tokenizer()
    model = chain.model("w6 <end>", tokenizer, eos_token_id=3)
    judge = make_judge(stray(tmp_path))
    for stop_above in (None, 0.5):
        callback = SafetyEvalCallback({"harmful": HARMFUL}, tokenizer, steps=1, judge=judge, stop_above=stop_above)
        state = SimpleNamespace(global_step=1, max_steps=9, is_world_process_zero=True)
        control = SimpleNamespace(should_training_stop=False, should_log=False)
        callback.on_step_end(None, state, control, model=model)
        assert control.should_training_stop == (stop_above is not None)
        assert "it is no judge of this kind" in caplog.text
        assert not callback.history
    with pytest.raises(ConfigurationError, match="rejects the prompt"):
        SafetyEvalCallback({"harmful": HARMFUL}, chain.tokenizer(template="{{ raise_exception('no') }}"))


def test_a_judge_that_fails_in_the_library_gives_the_completions_back(tmp_path: Path) -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("w6 <end>", tokenizer, eos_token_id=3)
    judges = [KeywordJudge(), make_judge(stray(tmp_path))]
    with pytest.raises(UnfinishedError, match=r"it is no judge of this kind.*; the completions are this error's `rows`") as raised:
        evaluate(model, tokenizer, {"harmful": HARMFUL}, judges, name="m", new_tokens=4)
    assert [row["completion"] for row in raised.value.rows] == ["w6"] * 4
    assert [row["counted"] for row in raised.value.rows] == [{"keywords": True}] * 4
    assert raised.value.found is None
    # The baseline's, too.
    before = evaluate_one(model, tokenizer, {"harmful": HARMFUL}, [KeywordJudge()], name="before", new_tokens=4)
    with pytest.raises(UnfinishedError) as raised:
        evaluate(model, tokenizer, {"harmful": HARMFUL}, judges[::-1], name="m", baseline=before, new_tokens=4)
    assert [row["model"] for row in raised.value.rows] == ["before"] * 4 + ["m"] * 4
    assert [row["counted"] for row in raised.value.rows[4:]] == [{}] * 4


@pytest.mark.parametrize("kept", [True, False], ids=["folder", "library"])
def test_a_benchmark_that_fails_loses_nothing(tmp_path: Path, kept: bool) -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("w6 <end>", tokenizer, eos_token_id=3)
    output = tmp_path / "out" if kept else None

    def missing() -> Any:
        raise ConfigurationError("inspect = 'x': failed (no data)")

    def half() -> Any:
        raise BenchmarkError("lm_eval = 'y': failed", {"z": {"acc": 0.5}})

    def benchmarks(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
        if output is not None:
            # Whatever happens here, the rates are there.
            assert read_evaluation(output).models[0].failed == ["the benchmarks did not come to an end"]
        return run_all([missing, half, lambda: {"w": {"acc": 1.0}}])

    with pytest.raises(
        UnfinishedError, match=r"m: inspect = 'x': failed \(no data\); lm_eval = 'y': failed; all else was computed"
    ) as raised:
        evaluate(model, tokenizer, {"harmful": HARMFUL}, [KeywordJudge()], name="m", benchmarks=benchmarks, new_tokens=4, output=output)
    found = read_evaluation(output) if output else raised.value.found
    assert found == raised.value.found
    assert found.after.attack.share == 1
    assert found.models[0].benchmarks == {"z": {"acc": 0.5}, "w": {"acc": 1.0}}
    assert len(raised.value.rows) == 4


def test_a_command_whose_benchmark_fails_writes_the_evaluation(tmp_path: Path) -> None:
    """The benchmark is not installed, or knows no such task."""
    folder = chain.save(tmp_path / "model", "w6 <end>")
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i}"}) for i in range(3)))
    line = ["eval", folder, "-o", str(tmp_path / "out"), "--harmful", str(tmp_path / "harmful.jsonl"), "--new-tokens", "4"]
    result = CliRunner().invoke(app, [*line, "--inspect", "no_such_task", "--lm-eval", "no_such_task"])
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "lm_eval = " in result.output
    assert "inspect = " in result.output
    found = read_evaluation(tmp_path / "out")
    assert found.after.attack is not None
    assert found.after.attack.share == 1
    assert len(found.models[0].failed) == 1
    assert len((tmp_path / "out" / "completions.jsonl").read_text().splitlines()) == 3


def test_an_evaluation_that_cannot_be_written_is_given_back(tmp_path: Path) -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("w6 <end>", tokenizer, eos_token_id=3)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UnfinishedError, match="the completions are this error's `rows`") as raised:
        evaluate(model, tokenizer, {"harmful": HARMFUL}, [KeywordJudge()], name="m", new_tokens=4, output=tmp_path / "out")
    assert [row["completion"] for row in raised.value.rows] == ["w6"] * 4
