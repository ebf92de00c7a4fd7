"""Which points of the family are no protection."""

import pytest

from trl_safety.methods.signed_vector import unprotected


@pytest.mark.parametrize(
    ("train", "serve", "why"),
    [
        (0, 0, "train and serve are 0"),
        (-1, -0.5, "serve = -0.5 removes alignment"),
        (1, -1, "serve = -1 removes alignment"),
        (0.5, 0, "train = 0.5 with serve = 0 serves less"),
        (0, 1, None),
        (-1, 0, None),
        (-1, 0.5, None),
        (1.25, 1.25, None),
    ],
)
def test_what_is_served_decides(train: float, serve: float, why: str | None) -> None:
    found = unprotected(train, serve)
    assert (found is None) == (why is None)
    assert found is None or str(why) in found
