"""Observations by key: how plain ones are named, and that those of another shape are refused by name."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.common.observations import as_dict, check_observations, describe_keys, fitting_keys, is_image, plain_key

SHAPES = {"state": (5,), "image": (4, 6, 3)}


def observations(leading=(), make=np.zeros):
    return {key: make((*leading, *shape)) for key, shape in SHAPES.items()}


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
@pytest.mark.parametrize(
    ("given", "leading"),
    [((), ()), ((2,), (2,)), ((7, 2), (None, 2)), ((7, 2), (7, 2)), ((0, 2), (None, 2)), ((3, 2), (None, None))],
)
def test_observations_of_the_right_shape_are_accepted(given, leading, make):
    check_observations(observations(given, make), SHAPES, leading)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
@pytest.mark.parametrize(
    ("given", "leading", "expected"),
    [
        ((2,), (), r"\(5\)"),
        ((), (2,), r"\(2, 5\)"),
        ((3,), (2,), r"\(2, 5\)"),
        ((7, 3), (None, 2), r"\(B, 2, 5\)"),
        ((2,), (None, 2), r"\(B, 2, 5\)"),
        ((6, 2), (7, 2), r"\(7, 2, 5\)"),
        ((1, 7, 2), (None, 2), r"\(B, 2, 5\)"),
    ],
)
def test_other_leading_sizes_are_refused_with_both_shapes(given, leading, expected, make):
    got = ", ".join(map(str, (*given, 5))) + ("" if given else ",")
    with pytest.raises(ValueError, match=rf"observation 'state' must have shape {expected}; got \({got}\)"):
        check_observations(observations(given, make), SHAPES, leading)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 4), (6, 4, 3), (3, 4, 6), (4, 6, 3, 1)])
def test_another_shape_is_refused_under_the_key_that_has_it(shape):
    with pytest.raises(ValueError, match=r"observation 'image' must have shape \(4, 6, 3\); got"):
        check_observations({**observations(), "image": np.zeros(shape)}, SHAPES)


@pytest.mark.parametrize(
    ("keys", "got"),
    [
        (["state"], r"\['state'\]"),
        ([], r"\[\]"),
        (["state", "image", "goal"], r"\['goal', 'image', 'state'\]"),
        (["State", "image"], r"\['State', 'image'\]"),
    ],
)
def test_other_keys_are_refused_with_both_lists(keys, got):
    given = {key: np.zeros(SHAPES.get(key, (5,))) for key in keys}
    with pytest.raises(ValueError, match=rf"observations must have the keys \['image', 'state'\]; got {got}"):
        check_observations(given, SHAPES)


sizes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(deadline=None)
@given(shape=sizes, given=sizes, leading=st.lists(st.none() | st.integers(0, 4), max_size=3).map(tuple))
def test_exactly_the_shapes_that_fit_are_accepted(shape, given, leading):
    wanted = (*leading, *shape)
    fits = len(given) == len(wanted) and all(w in (None, g) for w, g in zip(wanted, given, strict=True))
    try:
        check_observations({"x": np.zeros(given)}, {"x": shape}, leading)
    except ValueError:
        assert not fits
    else:
        assert fits


def test_a_free_leading_size_is_not_read():
    """A traced program that reads its batch size holds for that size alone."""

    class Sizes(tuple):
        def __getitem__(self, axis):
            assert axis != 0
            return super().__getitem__(axis)

    class Traced:
        shape = Sizes((7, 2, 5))

    check_observations({"state": Traced()}, {"state": (5,)}, (None, 2))


def test_an_observation_without_a_key_is_named_by_what_it_is():
    vector, image = np.zeros(5), np.zeros((4, 6, 3), np.uint8)
    assert as_dict(vector) == {"state": vector}
    assert as_dict(image)["image"] is image
    assert as_dict({"goal": vector}) == {"goal": vector}
    assert [plain_key(np.shape(x)) for x in (vector, image)] == ["state", "image"]
    assert [is_image(shape) for shape in ((5,), (4, 6, 3), (4, 6), ())] == [False, True, False, False]


STATE, CORNERS, LEFT, RIGHT = (2,), (16,), (8, 8, 3), [8, 8, 3]


@pytest.mark.parametrize(
    ("wanted", "offered", "keys"),
    [
        ({"x": STATE, "box": CORNERS}, {"corners": CORNERS, "y": [2]}, {"corners": "box", "y": "x"}),
        ({"x": STATE}, {"x": STATE}, {"x": "x"}),
        ({"a": CORNERS, "b": STATE}, {"b": CORNERS, "a": STATE}, {"b": "a", "a": "b"}),
        ({"l": LEFT, "r": RIGHT}, {"l": LEFT, "wrist": RIGHT}, {"l": "l", "wrist": "r"}),
        ({"l": LEFT, "r": RIGHT}, {"front": LEFT, "wrist": RIGHT}, None),
        ({"x": STATE}, {"y": CORNERS}, None),
        ({"x": STATE}, {"x": STATE, "y": CORNERS}, None),
        ({"x": STATE, "y": CORNERS}, {"x": STATE}, None),
        ({"x": STATE, "y": STATE}, {"z": STATE}, None),
        ({"x": STATE}, {"y": STATE, "z": STATE}, None),
    ],
)
def test_keys_are_paired_by_shape_where_that_is_unique(wanted, offered, keys):
    assert fitting_keys(wanted, offered) == keys


def test_a_mapping_of_keys_is_written_as_it_is_typed():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    keys = {"agent_pos": "observation.state", "a/b": "observation.images.front-left"}
    assert OverridesParser.create().parse_override(f"keys={describe_keys(keys)}").value() == keys
