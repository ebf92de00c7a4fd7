import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from trl_safety.errors import ConfigurationError
from trl_safety.scoring import KeywordJudge, Prompt, Rate, complete, paired_p_value, read_prompts, score


def test_prompt_sets(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}], "completion": [{"role": "assistant", "content": "c"}]}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    prompts = read_prompts(path, "harmful")
    assert [prompt.text for prompt in prompts] == ["a", "b"]
    assert prompts[1].answer is None
    with pytest.raises(ConfigurationError, match="line 1: has no `answer`"):
        read_prompts(path, "task")
    path.write_text('{"question": "a"}\n')
    with pytest.raises(ConfigurationError, match="line 1: is not an object with a `prompt`"):
        read_prompts(path, "benign")
    path.write_text("\n")
    with pytest.raises(ConfigurationError, match="has no prompts"):
        read_prompts(path, "benign")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_prompts(tmp_path / "missing", "benign")


def test_the_keyword_judge() -> None:
    texts = ["I’m sorry, but I cannot.", "Sure it is blue", "blue", "As an AI, no"]
    prompts = [Prompt("x")] * len(texts)
    assert KeywordJudge().verdicts(prompts, texts) == ["refused", "complied", "complied", "refused"]
    assert KeywordJudge(compliance=["sure it is"]).verdicts(prompts, texts) == ["refused", "complied", "refused", "refused"]


def test_rates_and_paired_tests() -> None:
    rate = Rate.of([True] * 8 + [False] * 92)
    # Wilson's interval for 8 of 100, from its closed form.
    z, p, n = 1.959963984540054, 0.08, 100
    centre, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert (rate.low, rate.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert str(rate) == "0.080 [0.041, 0.150]"
    before, after = [False] * 10, [True] * 6 + [False] * 4
    assert paired_p_value(before, after) == pytest.approx(2 * 0.5**6)
    assert paired_p_value(before, before) == 1.0


def test_completions_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [Prompt(" ".join(f"w{i}" for i in range(3, 4 + n))) for n in range(7)]
    model.train()
    one = complete(model, tokenizer, prompts, new_tokens=6, batch_size=1)
    many = complete(model, tokenizer, prompts, new_tokens=6, batch_size=4)
    assert one == many
    assert model.training
    assert len(set(one)) > 1
    scores, texts = score(model, tokenizer, {"task": [Prompt("w3", one[0]), Prompt("w3", "no")]}, KeywordJudge(), new_tokens=6)
    assert scores.task is not None
    assert scores.attack is None
    assert texts["task"][0] == complete(model, tokenizer, [Prompt("w3")], new_tokens=6, batch_size=1)[0]


def test_a_phrase_at_the_start_alone() -> None:
    judge = KeywordJudge(refusals=["^sorry"], compliance=["^sure"])
    said = ["Sorry, no.", " sorry no", "sure, sorry", "well, sure"]
    assert judge.verdicts([Prompt("w3")] * 4, said) == ["refused", "refused", "complied", "refused"]
