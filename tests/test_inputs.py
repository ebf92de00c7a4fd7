"""Files as people have them: each kind of input with its right value or its right error; and which tokens are trained."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests import chain, tiny
from trl_safety.cli.app import app
from trl_safety.errors import ConfigurationError, ReportError
from trl_safety.jsonl import read_lines, to_lines
from trl_safety.messages import ShapeError, as_messages, conversation, text_of
from trl_safety.reports.selection import SELECTION, TEXTS, read_choices, read_selection
from trl_safety.scoring import KeywordJudge, judged, read_prompts
from trl_safety.training.data import IGNORED, load_rows, supervised

USER, ASSISTANT = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
HUMAN, GPT = {"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}


def file(tmp_path: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return tmp_path / name


# JSON lines.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5),
    st.lists(st.sampled_from(["", " ", "\t", "\r"]), min_size=5, max_size=5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read(rows: list[Any], blanks: list[str], ascii_only: bool, mark: bool, packed: bool, end: str) -> None:
    import tempfile

    lines, expected = [], []
    for row, blank in zip(rows, blanks, strict=False):
        lines += [blank, json.dumps(row, ensure_ascii=ascii_only)]
        expected.append((len(lines), row))
    with tempfile.TemporaryDirectory() as folder:
        content = (("\ufeff" if mark else "") + end.join(lines)).encode("utf-8")
        path = file(Path(folder), gzip.compress(content) if packed else content)
        assert read_lines(path, "rows") == expected
        assert [row for _, row in read_lines(file(Path(folder), to_lines(rows)), "rows")] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n\n{"a"', "rows, line 3: is not an object .not JSON"),
        (b'[{"a": 1}]', "rows, line 1: is not an object but an array"),
        (b'"a"', "rows, line 1: is not an object but a string"),
        (b"\n7\n", "rows, line 2: is not an object but a number"),
        (b"null", "rows, line 1: is not an object but null"),
        (b'{"a": 1} {"a": 2}', "line 1: is not an object .not JSON"),
        ('{"a": "é"}'.encode("latin-1"), "line 1: cannot be read .*save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "it is UTF-16.; save it as UTF-8"),
        (b'{"a": 1}\n{"a": "\\ud83d"}', r"line 2: contains half of a character \(\\ud83d\)"),
        (b'{"a": ' + b"[" * 100_000, "line 1: is not an object .not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "line 1: is not an object .not JSON"),
        (b"\x00", "line 1: is not an object"),
        (gzip.compress(b'{"a": 1}')[:-9], "is packed by gzip, and damaged"),
        (b"\x1f\x8bxx", "is packed by gzip, and damaged"),
        (gzip.compress(b'{"a": 1}\n7'), "line 2: is not an object but a number"),
        (b"{'a': 1}", "line 1: is not an object .not JSON"),
        (b"# rows\n", "line 1: is not an object .not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "line 1: is not an object .not JSON: `c` is there twice"),
    ],
    ids=range(18),
)
def test_lines_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_lines(file(tmp_path, content), "rows")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_lines(tmp_path, "rows")


def test_files_that_were_joined_hold_marks_within(tmp_path: Path) -> None:
    assert [row for _, row in read_lines(file(tmp_path, '\ufeff{"a": 1}\n\ufeff{"a": 2}\n'), "rows")] == [{"a": 1}, {"a": 2}]


# Prompts.


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"prompt": "a\u2028b\u0085c\u2029d", "answer": "x"}, "a\u2028b\u0085c\u2029d", "x"),
        ({"prompt": "a", "answer": 4}, "a", "4"),
        ({"prompt": "a", "answer": 4.5}, "a", "4.5"),
        ({"prompt": "a", "answer": 4.0}, "a", ("4.0", "4")),
        ({"prompt": "a", "answer": True}, "a", "true"),
        ({"prompt": "a", "answer": 0}, "a", "0"),
        ({"prompt": "a", "answer": ["x", 3]}, "a", ("x", "3")),
        ({"prompt": "a", "answers": ["x", "y"]}, "a", ("x", "y")),
        ({"prompt": "a", "answer": None, "completion": "x"}, "a", "x"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "w1", "w2"),
        ({"prompt": [USER], "completion": "x"}, "w1", "x"),
        ({"prompt": [HUMAN], "answer": "x"}, "w1", "x"),
        ({"messages": [USER, ASSISTANT]}, "w1", "w2"),
        ({"messages": [USER, ASSISTANT, USER, {**ASSISTANT, "content": "w9"}]}, "w1", "w9"),
        ({"messages": [USER], "answer": "x"}, "w1", "x"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "answer": "x"},
            "a\nb",
            "x",
        ),
        ({"messages": [{"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}], "answer": "x"}, "a\nb", "x"),
        ({"conversations": [HUMAN, GPT]}, "w1", "w2"),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, "w1", "w2"),
        ({"system": "s", "conversations": [HUMAN, GPT]}, "w1", "w2"),
        ({"conversations": [USER, ASSISTANT]}, "w1", "w2"),
        ({"prompt": None, "messages": [{**USER, "from": None, "value": None, "tool_calls": None}], "answer": "x"}, "w1", "x"),
    ],
    ids=str,
)
def test_prompts_as_people_keep_them(tmp_path: Path, row: dict[str, Any], text: str, answer: Any) -> None:
    path = file(tmp_path, "\ufeff\n" + json.dumps(row, ensure_ascii=False) + "\r\n\n")
    (prompt,) = read_prompts(path, "task")
    assert (prompt.text, prompt.answer) == (text, answer)
    assert all(message["role"] in ("system", "user", "assistant") for message in prompt.messages)  # type: ignore[index]
    assert prompt.messages[-1]["role"] == "user"  # type: ignore[index]
    if "system" in row:
        assert prompt.messages[0] == {"role": "system", "content": "s"}
    (plain,) = read_prompts(path, "harmful")
    assert (plain.messages, plain.answer) == (prompt.messages, None)
    said = answer if isinstance(answer, str) else answer[-1]
    assert judged({"task": [prompt]}, {"task": [f" {said.upper()}\n"]}, KeywordJudge()).flags["task"] == [True]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a"},
            "line 3: is not an object with a `prompt` .has question.; give prompt .text or messages., messages or conversations",
        ),
        ({"prompt": 5}, "`prompt` is a number"),
        ({"prompt": " \n", "answer": "x"}, "line 3: its prompt is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}], "answer": "x"}, "its prompt is empty"),
        ({"prompt": "a", "answer": " "}, "its `answer` is ' ', which nothing"),
        ({"prompt": "a", "answer": float("nan")}, "its `answer` is nan, which nothing"),
        ({"prompt": "a", "answer": ["x", float("inf")]}, "its `answer` is inf, which nothing"),
        ({"prompt": {"role": "user", "content": "a"}}, "`prompt` is an object"),
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": ["a"]}, r"`prompt`\[0\] is a string"),
        ({"messages": "a"}, "`messages` is a string"),
        ({"messages": [{"role": "user"}]}, r"`messages`\[0\] has role, where role and content"),
        ({"messages": [{"role": "user", "content": 5}]}, "has a number as content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "a part of type 'image_url'"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "is from 'narrator', which is none of human"),
        ({"conversations": [GPT]}, "has only the assistant's turn"),
        ({"prompt": None}, "is not an object with a `prompt`"),
        ({"prompt": "a"}, "line 3: has no `answer`"),
        ({"prompt": "a", "answer": []}, "has no `answer`"),
        ({"prompt": "a", "answer": {"value": 4}}, "has no `answer`.*but an object"),
        ({"prompt": "a", "answer": [None]}, "has no `answer`.*but null"),
        ({"prompt": "a", "completion": [{"role": "assistant"}]}, r"`completion`\[0\] has role"),
    ],
    ids=str,
)
def test_prompts_that_are_none(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = file(tmp_path, '{"prompt": "a", "answer": "b"}\n\n' + json.dumps(row))
    with pytest.raises(ConfigurationError, match=message):
        read_prompts(path, "task")


TEXT = st.text(min_size=1)
CONTENT = TEXT | st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["human", "gpt", "system"]), CONTENT), min_size=1, max_size=5))
def test_both_shapes_of_messages_are_one(turns: list[tuple[str, Any]]) -> None:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    openai = as_messages([{"role": roles[who], "content": content} for who, content in turns], "m")
    assert as_messages([{"from": who, "value": content} for who, content in turns], "m") == openai
    try:
        prompt, answer = conversation({"messages": list(openai)})
    except ShapeError:
        assert [who for who, _ in turns] == ["gpt"]
        return
    assert (*prompt, *(answer or ())) == openai
    assert (answer is not None) == (turns[-1][0] == "gpt")


@given(JSON)
@settings(max_examples=300)
def test_whatever_a_conversation_is_there_is_no_other_error(value: Any) -> None:
    for key in ("prompt", "messages", "conversations", "completion"):
        for given_value in (value, [value], [{"role": "user", "content": value}], [{"from": value, "value": value}]):
            try:
                conversation({"prompt": "a", key: given_value} if key == "completion" else {key: given_value})
            except ShapeError:
                continue
    try:
        assert isinstance(text_of(value), str)
    except ShapeError:
        assert not isinstance(value, str)


# Data sets.


def test_rows_of_a_file(tmp_path: Path) -> None:
    """As in users' files: a byte order mark, line separators within strings, a column that is not in the first row."""
    rows = [{"prompt": "a\u2028b", "completion": "x"}, {"prompt": "c\u0085d", "completion": "y", "id": 7}]
    content = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("rows.jsonl", "rows.json", "rows.ndjson"):
        loaded = load_rows(str(file(tmp_path, content, name)), "data")
        assert list(loaded) == [{**rows[0], "id": None}, rows[1]]
    packed = file(tmp_path, gzip.compress(content.encode("utf-8")), "rows.jsonl.gz")
    assert list(load_rows(str(packed), "data")) == list(loaded)
    array = load_rows(str(file(tmp_path, json.dumps(rows[:1]), "array.json")), "data")
    assert list(array) == rows[:1]
    DatasetDict({"train": loaded}).save_to_disk(tmp_path / "saved")
    assert len(load_rows(str(tmp_path / "saved"), "data")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "a", "completion": "x"}\n\n{"prompt": ["a"], "completion": ["x"]}',
            "line 3: `prompt` is an array, but a string in line 1",
        ),
        ('{"messages": []}', "line 1: `messages` is an empty list"),
        ('{"messages": ["a"]}', r"line 1: `messages`\[0\] is a string"),
        ('{"messages": [{"content": "a"}]}', r"line 1: `messages`\[0\] is content, where a message with role"),
        ('{"prompt": "a", "completion": 4}', "line 1: `completion` is a number"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "x"}', "prompt and completion are not of one kind"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [{"role": "user", "content": ["a"]}]}',
            "its rows make no table",
        ),
        ("{}", "is not one split with rows"),
        ("", "is not one split with rows"),
    ],
)
def test_rows_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_rows(str(file(tmp_path, content)), "data")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("aligned")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def sft(tmp_path: Path, aligned: str, **options: Any) -> Any:
    pair = {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned"), "rank": 4}
    (tmp_path / "S.yaml").write_text(yaml.safe_dump({"asft": {"weight": 0.1}, "subspace": pair}))
    config = {
        "model_name_or_path": aligned, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"], "output_dir": str(tmp_path / "out"), "max_steps": 1,
        "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "safety": str(tmp_path / "S.yaml"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, **options}))
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "run.yaml")])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


ROWS = to_lines([{"prompt": f"w{i} ", "completion": "w5 w6"} for i in range(3, 9)])


def test_sft_takes_a_local_file(tmp_path: Path, aligned: str) -> None:
    result = sft(tmp_path, aligned, dataset_name=str(file(tmp_path, ROWS)))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"eval_strategy": "steps"}, ROWS, "dataset_test_split = 'test': .* has the splits train, and eval_strategy needs one"),
        ({"dataset_train_split": "sft"}, ROWS, "dataset_train_split = 'sft': .* has the splits train; name one of them"),
        ({"dataset_config": "en"}, ROWS, "dataset_config = 'en': .* has no configurations"),
        ({"dataset_name": "missing.jsonl"}, ROWS, "dataset_name = 'missing.jsonl': cannot be read"),
        ({"dataset_name": "no-such/data-set"}, ROWS, "dataset_name = 'no-such/data-set': cannot be read"),
        ({}, '{"question": "a", "reply": "b"}\n', "has the columns question, reply: give prompt and completion, messages"),
        ({}, '{"prompt": "a"}\n', "has the columns prompt: give prompt and completion"),
        ({}, '{"prompt": "a", "completion": "b"}\n{"prompt"', "line 2: is not an object"),
        ({"lora_target_modules": ["nothing", "neither"]}, ROWS, "the run cannot start: Target modules"),
        ({"datasets": [{"path": "no-such/data-set"}]}, ROWS, "datasets = no-such/data-set: cannot be loaded"),
        ({}, ROWS + '{"prompt": "a"}\n', "row 7 of 7 has no completion; give it one"),
        ({}, '{"prompt": "a", "completion": null}\n{"prompt": null, "completion": "b"}\n', "row 2 of 2 has no prompt"),
        ({}, '{"messages": null}\n', "row 1 of 1 has no messages"),
        ({"max_length": 1}, ROWS, "no row is left to train on: .* within max_length = 1: raise it"),
        ({}, '{"input_ids": [3, 4], "labels": [-100, -100]}\n', "no row is left to train on"),
        ({}, '{"input_ids": [3, 4]}\n{"input_ids": [3, 64]}\n', "row 2 holds the token 64, and the model has 64"),
        ({"resume_from_checkpoint": "no-such-folder"}, ROWS, "resume_from_checkpoint = 'no-such-folder': no such folder"),
        ({"learning_rate": 1e30, "max_steps": 3}, ROWS, "was saved, but its tensor .* holds NaN or infinity"),
    ],
)
def test_sft_says_what_is_wrong_with_the_data(tmp_path: Path, aligned: str, options: dict[str, Any], content: str, message: str) -> None:
    import re

    result = sft(tmp_path, aligned, **{"dataset_name": str(file(tmp_path, content)), **options})
    assert result.exit_code == 1
    assert re.search(message, " ".join(result.output.split())), result.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "prompt,completion\na,b\n".encode("utf-16"), "cannot be read .*utf-8"),
        ("rows.parquet", b"PAR1 nothing", "cannot be read .*[Pp]arquet"),
        ("rows.txt", b"a\n", "is a file of the kind '.txt', which is not read; give a .jsonl"),
        ("rows.jsonl.zst", b"(", "is a file of the kind '.zst', which is not read"),
        ("rows.jsonl", '{"prompt": "a"}'.encode("utf-16"), "it is UTF-16"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_rows(str(file(tmp_path, content, name)), "data")
    with pytest.raises(ConfigurationError, match=r"no JSON lines; give a .jsonl file|cannot be read|is not an object"):
        read_prompts(tmp_path / name, "harmful")


# Our own logs.


def test_a_damaged_selection_log(tmp_path: Path) -> None:
    choice = '{"step": 1, "kind": "task", "indices": [0], "weights": [1.0], "scores": [0.5], "losses": [0.5], "cosines": [0.1]}'
    path = file(tmp_path, f"{choice}\n{choice[:40]}", SELECTION)
    assert len(read_choices(path)) == 1
    file(tmp_path, choice.encode() + b"\n" + '{"step": "é'.encode()[:-1], SELECTION)
    assert len(read_choices(path)) == 1
    for content, message in ((f"{choice}\n\n7\n", "not a readable selection log, line 3"), ('{"step": 1}\n', "line 1")):
        with pytest.raises(ReportError, match=message):
            read_choices(file(tmp_path, content, SELECTION))
    file(tmp_path, choice + "\n", SELECTION)
    (tmp_path / TEXTS).parent.mkdir()
    (tmp_path / TEXTS).write_text('{"row": 0, "text": "a\u2028b"}\n', encoding="utf-8")
    assert read_selection(tmp_path)[0].text == "a\u2028b"
    for content in ('{"row": "x"}\n', "7\n", '{"row": 0, "te'):
        (tmp_path / TEXTS).write_text(content)
        with pytest.raises(ReportError, match="line 1"):
            read_selection(tmp_path)


# Which tokens are trained.

CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
EMPTY_THINKING = CHAT.replace("{% if add_generation_prompt %}<assistant> ", "{% if add_generation_prompt %}<assistant> <think> </think> ")
OTHER_HEADER = CHAT.replace("{% if add_generation_prompt %}<assistant> ", "{% if add_generation_prompt %}<assistant> w2 w9 ")
NO_PROMPT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
DROPS_THINKING = CHAT.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")


def words(template: str) -> Any:
    return chain.tokenizer(template=template, words=("<user>", "<assistant>", "<system>"))


def trained(row: dict[str, Any], tokenizer: Any) -> str:
    ids, labels = supervised(row, tokenizer, None)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORED]))


@pytest.mark.parametrize("template", [CHAT, EMPTY_THINKING, OTHER_HEADER], ids=["prefix", "thinking", "header"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [{**ASSISTANT, "content": "w2 w3"}]},
        {"messages": [USER, {**ASSISTANT, "content": "w2 w3"}]},
        {"conversations": [HUMAN, {**GPT, "value": "w2 w3"}]},
        {"messages": [{"role": "system", "content": "w7"}, USER, ASSISTANT, USER, {**ASSISTANT, "content": "w2 w3"}]},
        {"prompt": [{**USER, "content": [{"type": "text", "text": "w2 w3"}]}], "completion": [{**ASSISTANT, "content": "w2 w3"}]},
    ],
    ids=["prompt", "messages", "sharegpt", "turns", "parts"],
)
def test_the_whole_answer_and_nothing_else_is_trained(template: str, row: dict[str, Any]) -> None:
    """Even if the answer begins like the prompt's continuation: `w2`."""
    assert trained(row, words(template)) == "w2 w3 </s>"


def test_answers_of_other_forms() -> None:
    assert trained({"messages": [USER, ASSISTANT]}, words(NO_PROMPT)) == "<assistant> w2 </s>"
    thinking = {"messages": [USER, {**ASSISTANT, "content": "<think> w8 </think> w2"}]}
    assert trained(thinking, words(EMPTY_THINKING)) == "<think> w8 </think> w2 </s>"
    assert trained(thinking, words(DROPS_THINKING)) == "w2 </s>"
    plain = chain.tokenizer(template=None)
    assert trained({"prompt": "w1 ", "completion": "w2"}, plain) == "w2 </s>"
    assert trained({"prompt": "w1 ", "completion": "w2 </s>"}, plain) == "w2 </s>"
    assert trained({"text": "w1 w2"}, plain) == "w1 w2"
    with pytest.raises(ConfigurationError, match="a row without an answer"):
        supervised({"messages": [USER]}, words(CHAT), None)
    with pytest.raises(ConfigurationError, match="drops a part"):
        supervised({"messages": [USER, ASSISTANT]}, words("{{ messages[0]['content'] }}"), None)


POOL = [{"prompt": f"w{i} w{i + 1} ", "completion": "w50 w51"} for i in range(8)]
FORMATS = {
    "text": Dataset.from_list([{"text": f"w{i} w{i + 2} w{i + 3}"} for i in range(32)]),
    "messages": Dataset.from_list([{"messages": [USER, {**ASSISTANT, "content": f"w{i}"}]} for i in range(32)]),
    "tokens": Dataset.from_list([{"input_ids": [3, 4, 5, i + 3], "labels": [-100, 4, 5, i + 3]} for i in range(32)]),
    "prompt": tiny.rows(32),
}
POOLS = {
    "prompt": POOL,
    "messages": [{"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]} for r in POOL],
    "sharegpt": [{"conversations": [{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": r["completion"]}]} for r in POOL],
    "masked": [{"input_ids": [3, 4, 53, 54, 2], "completion_mask": [0, 0, 1, 1, 1]} for _ in POOL],
    "labelled": [{"input_ids": [3, 4, 53, 54, 2], "labels": [-100, -100, 53, 54, 2]} for _ in POOL],
}
BLOCK = {"dual_select": {"warmup_steps": 1, "refresh_steps": 2, "keep": 4, "references": 5}}


def of(tmp_path: Path, data: str, pool: list[dict[str, Any]], **options: Any) -> Any:
    return tiny.trainer(tmp_path, data=FORMATS[data], safety=BLOCK, reference_dataset=Dataset.from_list(pool), **options)


@pytest.fixture
def _template(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny.tokenizer

    def with_template() -> Any:
        tokenizer = made()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        return tokenizer

    monkeypatch.setattr(tiny, "tokenizer", with_template)


@pytest.mark.usefixtures("_template")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("data", FORMATS)
def test_a_pools_answers_alone_are_trained_whatever_the_datas_format(tmp_path: Path, data: str, pool: str) -> None:
    trainer = of(tmp_path, data, POOLS[pool])
    method = trainer._safety.methods[0]
    for row in method._pool.rows:
        kept = [label for label in row["labels"] if label != IGNORED]
        assert kept == [53, 54, 2]
        assert row["input_ids"][-3:] == kept
        assert len(row["input_ids"]) == 5
    # The supervision of the training data is unchanged.
    labels = trainer.train_dataset[0]["labels"]
    assert (IGNORED in labels) == (data in ("tokens", "prompt"))


@pytest.mark.usefixtures("_template")
@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (
            [{"question": "w1", "reply": "w2"}] * 8,
            "dual_select.reference_dataset: has the columns question, reply, none of which references are read",
        ),
        ([{"instruction": "w1", "output": "w2"}] * 8, "dual_select.reference_dataset: has the columns instruction, output"),
        ([{"input_ids": [3, 4, 5]}] * 8, "dual_select.reference_dataset: has input_ids without labels"),
        ([{"messages": [USER]}] * 8, "dual_select.reference_dataset, row 0: .*a row without an answer"),
        ([{"messages": [{"role": "narrator"}]}] * 8, "dual_select.reference_dataset, row 0: .*has role, where role and content"),
        ([{"prompt": [5], "completion": [6]}] * 8, r"dual_select.reference_dataset, row 0: .*`prompt`\[0\] is a number"),
        ([{"prompt": "w1 " * 30, "completion": "w2"}] * 8, "8 of 8 references have no answer within max_length = 16"),
    ],
)
@pytest.mark.parametrize("data", ["text", "messages"])
def test_an_error_that_points_at_the_pool(tmp_path: Path, data: str, pool: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        of(tmp_path, data, pool)


def test_a_pool_of_plain_text_says_what_it_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of(tmp_path, "text", [{"text": "w1 w2 w3"}] * 8)
    assert "the requests are supervised as well" in caplog.text
