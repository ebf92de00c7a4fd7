"""A real, tiny Llama with scripted output: every word is followed by the word chosen for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<end>", "<bot>")
WORDS = (
    *SPECIAL,
    *(f"w{i}" for i in range(60)),
    "<think>",
    "</think>",
    "sorry",
    "sure",
    "Yes.",
    "**No.**",
    "Answer:",
    "no",
    "safe",
    "unsafe",
)
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


def tokenizer(*, pad: bool = True, template: str | None = TEMPLATE, special: tuple[str, ...] = (), words: tuple[str, ...] = ()) -> Any:
    """A tokenizer of whole words; `special`: further special tokens, `words`: further words."""
    known = dict.fromkeys((*WORDS, *special, *words))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True) for word in (*SPECIAL, *special)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **({"pad_token": "<pad>"} if pad else {}))
    made.chat_template = template
    return made


def model(said: str | dict[str, str], tokenizer: Any, **generation: Any) -> Any:
    """After `<bot>` come the words of `said` in order, each once; a mapping gives the word that follows each word."""
    following = said if isinstance(said, dict) else dict(zip(["<bot>", *said.split()], said.split(), strict=False))
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
    )
    made = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.model.norm.weight.fill_(1.0)
        made.model.embed_tokens.weight.copy_(torch.eye(size))
        for word, after in following.items():
            one, other = tokenizer.convert_tokens_to_ids([word, after])
            made.lm_head.weight[other, one] = 1.0
    made.generation_config = GenerationConfig(**generation)
    return made.eval()


def save(folder: Path, said: str | dict[str, str], given: Any = None, **generation: Any) -> str:
    """Model and tokenizer in a folder."""
    words = given or tokenizer()
    generation.setdefault("eos_token_id", words.convert_tokens_to_ids("<end>"))
    model(said, words, **generation).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
