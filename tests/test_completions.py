"""Completions equal those of plain `generate`, for the models, tokenizers and templates that people have."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import chain, tiny
from trl_safety.errors import ConfigurationError
from trl_safety.scoring import KeywordJudge, Prompt, complete, score

PROMPTS = [Prompt(({"role": "user", "content": " ".join(f"w{i}" for i in range(1, length))},)) for length in (3, 2, 5)]

SHORT = Prompt(({"role": "user", "content": "w1"},))
LONG = Prompt(({"role": "user", "content": "w1 w2 w3"},))


def plain(model: Any, tokenizer: Any, prompt: Prompt, new_tokens: int) -> str:
    """The library's own `generate` on one prompt, greedy, with only the length set."""
    text = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    options = {"tokenizer": tokenizer} if model.generation_config.stop_strings else {}
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, do_sample=False, **options
    )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 3}, "w5 w6"),  # <end>, which the tokenizer does not know as its end
        ({"eos_token_id": [2, 3]}, "w5 w6"),
        ({"eos_token_id": [2]}, "w5 w6 sorry w7"),
        ({}, "w5 w6 sorry w7"),  # The tokenizer's, where the model names none.
        ({"eos_token_id": 3, "do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 7, "max_length": 400}, "w5 w6"),
        ({"eos_token_id": 3, "min_new_tokens": 2, "return_dict_in_generate": True, "output_scores": True}, "w5 w6"),
        ({"eos_token_id": 3, "suppress_tokens": [10]}, None),
        ({"eos_token_id": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, None),
        ({"eos_token_id": 3, "num_beams": 3, "length_penalty": 2.0}, None),
    ],
    ids=str,
)
def test_the_models_own_generation_config(generation: dict[str, Any], expected: str | None, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("w5 w6 <end> sorry w7 </s> w8", tokenizer, **generation)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        said = complete(model, tokenizer, [LONG, SHORT], new_tokens=8, batch_size=2)
    assert not caplog.records
    if generation:
        model.generation_config.return_dict_in_generate = None
        assert said == [plain(model, tokenizer, prompt, 8) for prompt in (LONG, SHORT)]
    if expected is not None:
        assert said == [expected] * 2


def test_stop_strings() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ messages[0]['content'] }}>")
    model = chain.model(dict(zip(">abcdef", "abcdefg", strict=True)), tokenizer, stop_strings=["cd"])
    prompts = [Prompt(({"role": "user", "content": text},)) for text in ("xx", "x")]
    assert complete(model, tokenizer, prompts, new_tokens=6, batch_size=2) == ["abcd", "abcd"]
    assert plain(model, tokenizer, prompts[0], 6) == "abcd"


@pytest.mark.parametrize("pads", ["neither", "model", "tokenizer"])
def test_no_padding_token(pads: str) -> None:
    """Llama 3.1's tokenizer has none, yet the prompts of a batch have different lengths."""
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    model = tiny.model()
    if pads != "tokenizer":
        tokenizer.pad_token = None
    model.generation_config.pad_token_id = 0 if pads == "model" else None
    prompts = [Prompt(" ".join(f"w{i}" for i in range(3, 4 + n))) for n in range(5)]
    one = complete(model, tokenizer, prompts, new_tokens=6, batch_size=1)
    assert complete(model, tokenizer, prompts, new_tokens=6, batch_size=5) == one
    assert len(set(one)) > 1


def test_a_stop_that_is_no_special_token() -> None:
    tokenizer = chain.tokenizer()
    stop = tokenizer.convert_tokens_to_ids("w9")
    model = chain.model("w5 w9 w6", tokenizer, eos_token_id=stop)
    assert complete(model, tokenizer, [SHORT], new_tokens=8, batch_size=1) == ["w5"]


def test_a_refusal_after_the_turn_is_none_of_its() -> None:
    """Only generation_config.json names the end of a turn, as with Gemma and Phi."""
    tokenizer = chain.tokenizer()
    model = chain.model("w5 <end> sorry </s>", tokenizer, eos_token_id=[2, 3])
    scores, _ = score(model, tokenizer, {"harmful": [SHORT], "task": [Prompt(LONG.messages, "w5")]}, KeywordJudge(), new_tokens=8)
    assert scores.flags == {"harmful": [True], "task": [True]}


def with_system(content: Any = "w2") -> Prompt:
    return Prompt(({"role": "system", "content": "w1"}, {"role": "user", "content": content}))


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + chain.TEMPLATE
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['content'] }} {% endfor %}<bot>"
)
DROPS_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }} {% endif %}{% endfor %}<bot>"
LAST_ALONE = "{{ messages[-1]['content'] }}<bot>"
PARTS_ALONE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p.type == 'text' %}{{ p.text }} {% endif %}{% endfor %}{% endfor %}<bot>"
)
CONCATENATES = "{% for m in messages %}{{ '' + m['content'] + ' ' }}{% endfor %}<bot>"
PARTS_AND_IMAGES = PARTS_ALONE.replace("{% endif %}", "{% elif p.type == 'image' %}<image>{% endif %}")


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (REFUSES_SYSTEM, with_system(), "rejects the prompt 'w2'.*System role not supported.*put that text into the user's first message"),
        (
            ALTERNATES,
            Prompt((*SHORT.messages, *SHORT.messages)),
            "rejects the prompt.*roles must alternate; write the prompts with the roles",
        ),
        ("{{ messages[0].nothing.at_all }}", SHORT, "rejects the prompt"),
        (DROPS_SYSTEM, with_system(), "drops a part of the prompt 'w2' .system, user."),
        (LAST_ALONE, with_system(), "drops a part"),
        (PARTS_ALONE, SHORT, "drops a part.*the content as the template reads it"),
        (None, with_system(), "has no chat template, and the prompt 'w2' has 2 messages"),
        (chain.TEMPLATE, with_system([{"type": "image", "url": "x.png"}]), "a part of type 'image', but prompts must be text"),
        (chain.TEMPLATE, with_system(None), "null as content"),
        (chain.TEMPLATE, with_system([]), "an empty list as content"),
        (None, Prompt(""), "prompt 1 of 1 is empty"),
    ],
)
def test_what_cannot_be_asked(template: str | None, prompt: Prompt, message: str) -> None:
    tokenizer = chain.tokenizer(template=template)
    model = chain.model("w5 <end>", tokenizer, eos_token_id=3)
    with pytest.raises(ConfigurationError, match=message):
        complete(model, tokenizer, [prompt], new_tokens=4, batch_size=1)


@pytest.mark.parametrize(
    "template", [chain.TEMPLATE, CONCATENATES, PARTS_ALONE, PARTS_AND_IMAGES], ids=["text", "joined", "parts", "images"]
)
def test_content_in_parts(template: str) -> None:
    tokenizer = chain.tokenizer(template=template)
    model = chain.model("w5 <end>", tokenizer, eos_token_id=3)
    seen: list[str] = []
    generate = model.generate

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.extend(tokenizer.batch_decode(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    model.generate = noting
    prompt = with_system([{"type": "text", "text": "w2"}, {"type": "text", "text": "w3"}])
    if template == PARTS_ALONE:
        prompt = Prompt(tuple({**m, "content": [{"type": "text", "text": "w1 w2 w3"}]} for m in prompt.messages[1:]))
    assert complete(model, tokenizer, [prompt], new_tokens=4, batch_size=1) == ["w5"]
    assert [text.split() for text in seen] == [["w1", "w2", "w3", "<bot>"]]


def test_a_processor_in_a_tokenizers_place() -> None:
    from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

    for template in (chain.TEMPLATE, PARTS_AND_IMAGES):
        tokenizer = chain.tokenizer(template=None, pad=False, special=("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
        processor = Qwen2AudioProcessor(WhisperFeatureExtractor(), tokenizer, chat_template=template)
        model = chain.model("w5 <end> sorry", tokenizer, eos_token_id=3)
        assert complete(model, processor, [SHORT, LONG], new_tokens=8, batch_size=2) == ["w5", "w5"]


def test_a_generation_config_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("w5 <end>", tokenizer, eos_token_id=3)
    model.generation_config.num_beams = 4
    model.generation_config.constraints = None
    model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ConfigurationError, match="generation config cannot be used"):
        complete(model, tokenizer, [SHORT], new_tokens=4, batch_size=1)


def test_all_sets_are_checked_before_the_first_is_asked() -> None:
    tokenizer = chain.tokenizer(template=REFUSES_SYSTEM)
    model = chain.model("w5 <end>", tokenizer, eos_token_id=3)
    model.generate = lambda *args, **kwargs: pytest.fail("asked")
    with pytest.raises(ConfigurationError, match="rejects the prompt"):
        score(model, tokenizer, {"harmful": [SHORT], "benign": [with_system()]}, KeywordJudge())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "rejects the prompt .*division by zero"),
        ("{{ messages[5].content }}", "rejects the prompt .*no element 5"),
        ("{{ messages[0].content.foo.bar }}", "rejects the prompt .*no attribute 'foo'"),
        ("{{ messages | no_such_filter }}", "rejects the prompt .*No filter named"),
        ({"rag": chain.TEMPLATE, "tool_use": chain.TEMPLATE}, "rejects the prompt .*no default"),
    ],
    ids=["arithmetic", "index", "attribute", "filter", "no-default"],
)
def test_templates_that_end_in_an_error_of_their_own(template: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        complete(chain.model("w5 <end>", chain.tokenizer()), chain.tokenizer(template=template), PROMPTS[:1], new_tokens=2, batch_size=1)


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"eos_token_id": 3, "num_beams": 2, "num_return_sequences": 2}, "w5 w6 w7"),
        ({"eos_token_id": 3, "return_dict_in_generate": True, "output_scores": True}, "w5 w6 w7"),
        ({"eos_token_id": 3, "max_length": 3}, "w5 w6 w7"),
        ({"eos_token_id": 3, "prompt_lookup_num_tokens": 2}, "w5 w6 w7"),
        ({"eos_token_id": [3, 9999]}, "w5 w6 w7"),
    ],
    ids=["beams", "dictionary", "length", "lookup", "unknown-stop"],
)
def test_generation_configs_as_models_bring_them(generation: dict[str, Any], said: str) -> None:
    tokenizer = chain.tokenizer()
    model = chain.model("w5 w6 w7 <end>", tokenizer, **generation)
    assert complete(model, tokenizer, PROMPTS[:3], new_tokens=8, batch_size=2) == [said] * 3


def test_a_stop_that_is_no_token() -> None:
    model = chain.model("w5 <end>", chain.tokenizer())
    model.generation_config.eos_token_id = "<end>"  # noqa: S105  # a mistake, not a secret
    with pytest.raises(ConfigurationError, match="eos_token_id = '<end>' is no token's number"):
        complete(model, chain.tokenizer(), PROMPTS[:1], new_tokens=2, batch_size=1)


@pytest.mark.parametrize("beams", [1, 2])
def test_logits_that_are_no_numbers(beams: int) -> None:
    """What is made of them is empty, which no phrase of refusal is in: it would count as harm."""
    tokenizer = chain.tokenizer()
    model = chain.model("w5 <end>", tokenizer, eos_token_id=3, num_beams=beams)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="logits hold NaN, so that its completions say nothing"):
        complete(model, tokenizer, PROMPTS[:2], new_tokens=2, batch_size=2)
