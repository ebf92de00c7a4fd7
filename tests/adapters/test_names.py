import pytest

from trl_safety.adapters.names import is_named, match, strip_wrappers
from trl_safety.errors import SubspaceError

Q = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name",
    [
        f"model.{Q}",
        f"base_model.model.model.{Q}",
        f"base_model.model.model.{Q}.base_layer",
        f"module.base_model.model.model.{Q}",
        f"_orig_mod.base_model.model.model.{Q}",
        f"base_model.model._orig_mod.model.{Q}",
        f"module._orig_mod.base_model.model.model._fsdp_wrapped_module.{Q}",
    ],
)
def test_every_wrapper_is_looked_through(name: str) -> None:
    assert strip_wrappers(name) == f"model.{Q}"
    assert match([name], [f"model.{Q}"]) == {name: f"model.{Q}"}


@pytest.mark.parametrize(
    ("live", "stored"),
    [
        (f"model.language_model.{Q}", f"language_model.model.{Q}"),
        (f"model.language_model.{Q}", f"model.{Q}"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
    ],
)
def test_containers_do_not_tell_layers_apart(live: str, stored: str) -> None:
    assert match([live], [stored, "vision_tower.encoder.layers.0.self_attn.q_proj"]) == {live: stored}


def test_a_vision_tower_is_not_the_language_model() -> None:
    assert match([f"model.vision_tower.{Q}"], [f"model.language_model.{Q}"]) == {f"model.vision_tower.{Q}": None}


def test_order_never_counts() -> None:
    names = [f"model.layers.{i}.q_proj" for i in range(12)]
    assert match(names, reversed(names)) == {name: name for name in names}


def test_ambiguous_names_are_refused() -> None:
    with pytest.raises(SubspaceError, match="matches several names"):
        match([Q], [f"model.{Q}", f"language_model.{Q}"])
    with pytest.raises(SubspaceError, match="both match"):
        match([f"model.{Q}", f"transformer.{Q}"], [f"language_model.{Q}"])


def test_entries_match_whole_parts() -> None:
    assert is_named(f"base_model.model.model.{Q}", ["q_proj"]) == "q_proj"
    assert is_named(f"model.{Q}", ["proj"]) is None
    assert is_named("model.lm_head", ["lm_head"]) == "lm_head"
