"""Arguments that arrive by name: wrong ones are refused with what came, what is allowed and the nearest name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from policy.common.arguments import at_home, check_arguments, unknown_name
from policy.diffusion.sampler import Sampler
from policy.diffusion.schedule import make_schedule
from policy.training.pretrained import read_weights


@dataclass(kw_only=True)
class Part:
    width: int = 4
    rate: float = 0.1
    label: str = "a"
    on: bool = True
    limit: float | None = None
    sizes: tuple[int, ...] = (1,)
    kind: Literal["a", "b"] = "a"


class Network:
    def __init__(self, *, width: int, depth: int = 2) -> None:
        self.width, self.depth = width, depth


def accepts_anything(known: int = 0, **others: Any) -> dict[str, Any]:
    return {"known": known, **others}


def test_an_unknown_name_is_answered_with_the_nearest_one_and_all_of_them():
    error = unknown_name("denoiser", "residual_mpl", {"residual_mlp": 1, "modulated_mlp": 2})
    assert isinstance(error, ValueError)
    assert str(error) == (
        "unknown denoiser 'residual_mpl' (did you mean 'residual_mlp'?); allowed: modulated_mlp, residual_mlp"
    )


def test_a_name_near_none_is_answered_without_a_guess():
    assert str(unknown_name("thing", "zzz", ["alpha", "beta"])) == "unknown thing 'zzz'; allowed: alpha, beta"
    assert str(unknown_name("thing", "zzz", [])) == "unknown thing 'zzz'; allowed: none"


@pytest.mark.parametrize(
    ("name", "value", "converted"),
    [
        ("width", "8", 8),
        ("width", 8.0, 8),
        ("rate", 1, 1.0),
        ("rate", "1e-3", 1e-3),
        ("on", "false", False),
        ("limit", None, None),
        ("limit", "2.5", 2.5),
        ("sizes", [1, 2], (1, 2)),
        ("kind", "b", "b"),
        ("label", "x", "x"),
    ],
)
def test_values_become_the_hinted_type_where_nothing_is_lost(name, value, converted):
    checked = check_arguments("part", Part, {name: value})
    assert checked == {name: converted}
    assert type(checked[name]) is type(converted)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 8.5),
        ("width", "eight"),
        ("width", None),
        ("width", [8]),
        ("rate", "fast"),
        ("label", 3),
        ("on", "maybe"),
        ("limit", "none at all"),
        ("sizes", 3),
        ("sizes", ["x"]),
        ("kind", "c"),
    ],
)
def test_values_of_another_type_are_refused_by_their_full_name(name, value):
    with pytest.raises(ValueError) as error:
        check_arguments("part", Part, {name: value})
    assert re.match(rf"(part\.{name} should be |unknown value of part\.{name} )", str(error.value))
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", ["x", 3, {"x": 1}])
def test_a_single_value_in_place_of_a_list_is_answered_with_what_the_list_holds(value):
    def takes(*, folders: list[Path] | None = None, names: Sequence[str] = (), counts: list[int] = []) -> None: ...  # noqa: B006

    for name, items in (("folders", "paths"), ("names", "names"), ("counts", "values")):
        said = f"{name} takes a list of {items}, as {name}=[A,B]; got {value!r}"
        with pytest.raises(ValueError, match=rf"^{re.escape(said)}$"):
            check_arguments("takes", takes, {name: value}, prefix="")
    with pytest.raises(ValueError, match=r"^names should be Sequence.*; got \[3\]"):
        check_arguments("takes", takes, {"names": [3]}, prefix="")


def test_an_unknown_setting_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown setting of part 'widht' \(did you mean 'width'\?\)"):
        check_arguments("part", Part, {"widht": 3})


def test_functions_classes_and_dataclasses_are_all_checked():
    assert check_arguments("schedule", make_schedule, {"num_steps": "50"}) == {"num_steps": 50}
    assert check_arguments("network", Network, {"width": "3"}) == {"width": 3}
    assert check_arguments("sampler", Sampler, {"clip": None, "eta": 1}) == {"clip": None, "eta": 1.0}
    with pytest.raises(ValueError, match=r"unknown setting of schedule 'beta_schedul' \(did you mean"):
        check_arguments("schedule", make_schedule, {"beta_schedul": "linear"})
    with pytest.raises(ValueError, match="unknown setting of network 'self_'"):
        check_arguments("network", Network, {"self_": 1})


def test_a_callable_that_takes_any_keyword_gets_it_unchecked_but_its_own_ones_checked():
    assert check_arguments("f", accepts_anything, {"other": object}) == {"other": object}
    with pytest.raises(ValueError, match=r"f\.known should be int"):
        check_arguments("f", accepts_anything, {"known": "x", "other": 1})


def test_the_arguments_given_are_not_changed():
    given = {"width": "8"}
    check_arguments("part", Part, given)
    assert given == {"width": "8"}


@pytest.mark.parametrize("given", ["small", ["width"], 3, None])
def test_arguments_that_are_not_given_by_name_are_not_taken_for_names(given):
    """A damaged configuration may hold anything here; the letters of a text are not names."""
    with pytest.raises(AttributeError):
        check_arguments("part", Part, given)


@pytest.mark.parametrize("value", ["c", True, None])
def test_what_is_no_choice_gets_all_choices(value):
    with pytest.raises(ValueError, match=rf"unknown value of part\.kind '{value}'.*; allowed: a, b$"):
        check_arguments("part", Part, {"kind": value})


def test_the_home_folder_of_nobody_is_refused_and_ones_own_is_filled_in(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert at_home("folder", "~/runs") == tmp_path / "runs"
    assert at_home("folder", Path("~")) == tmp_path
    assert at_home("folder", "runs/~old") == Path("runs/~old")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~run").mkdir()
    assert at_home("folder", "./~run") == at_home("folder", Path("./~run")) == tmp_path / "~run"
    for name in ("~nobody_here", "~nobody_here/runs"):
        with pytest.raises(ValueError, match=rf"folder={name} begins with the home folder of a user .*full path"):
            at_home("folder", name)


def test_weights_in_the_home_folder_of_nobody_are_refused():
    with pytest.raises(ValueError, match=r"encoder\.pretrained=~nobody_here/a.pth begins"):
        read_weights("~nobody_here/a.pth")
