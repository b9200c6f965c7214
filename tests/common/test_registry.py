"""Named parts: imported when they are first asked for, added by plugins, built from what a user writes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from policy.common.registry import Registry, check_spec, construct
from tests.conftest import ENVIRONMENT, ROOT


class Network:
    def __init__(self, *, width: int, depth: int = 2) -> None:
        self.width, self.depth = width, depth


class Part:
    def __init__(self, *, width: int, label: str = "a") -> None:
        if label == "bad":
            raise ValueError("label must not be bad")
        self.width, self.label = width, label


def open_ended(*, width: int, **others: Any) -> dict[str, Any]:
    return {"width": width, **others}


HERE = __name__


@pytest.fixture(params=["imported", "by path"])
def things(request):
    """Parts, registered as a plugin does or named by where they are."""
    if request.param == "by path":
        return Registry("thing", {"net": f"{HERE}:Network", "part": f"{HERE}:Part"})
    registry = Registry("thing", {})
    registry.register("net", Network)
    registry.register("part", Part)
    return registry


# --- the registry ------------------------------------------------------------------------------------------------


def test_it_is_a_mapping_from_names_to_parts(things):
    assert list(things) == ["net", "part"]
    assert len(things) == 2
    assert "net" in things
    assert "nett" not in things
    assert things["net"] is Network
    assert dict(things) == {"net": Network, "part": Part}
    with pytest.raises(KeyError, match="nett"):
        things["nett"]


LAZY = """
import sys
from policy.common.registry import Registry, check_spec

things = Registry("thing", {"reader": "mailbox:Mailbox", "wave": "wave:Wave_read"})
assert "wave" in things and list(things) == ["reader", "wave"] and things.declared("wave") == "wave:Wave_read"
assert check_spec(Registry("d", {"mlp": "policy.model.denoisers.modulated_mlp:ModulatedMLP"}), {"name": "mlp"})
assert not {"mailbox", "wave", "torch", "policy.model.denoisers.modulated_mlp"} & sys.modules.keys()
made = things["reader"]
assert "mailbox" in sys.modules and "wave" not in sys.modules
assert made is things["reader"] is things.declared("reader") is sys.modules["mailbox"].Mailbox
"""


def test_a_part_is_imported_when_it_is_first_asked_for_and_no_other_with_it():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_registering_a_part_again_is_fine_and_a_taken_name_is_refused(things):
    things.register("net", Network)  # a plugin that is loaded twice
    with pytest.raises(ValueError, match="there is a thing 'net' already: register yours under another name"):
        things.register("net", Part)
    assert things["net"] is Network
    things.register("own", Part)
    assert things["own"] is Part
    assert list(things) == ["net", "part", "own"]


def test_the_parts_given_are_not_changed():
    parts = {"net": f"{HERE}:Network"}
    Registry("thing", parts).register("part", Part)
    assert parts == {"net": f"{HERE}:Network"}


def test_an_unknown_name_is_answered_with_the_nearest_one_and_the_way_to_add_ones_own(things):
    with pytest.raises(ValueError) as error:
        things.declared("nett")
    said = str(error.value)
    assert said.startswith("unknown thing 'nett' (did you mean 'net'?); allowed: net, part; ")
    assert "plugins=[" in said
    assert str(things.unknown("nett")) == said


def test_a_part_that_is_not_where_it_should_be_is_the_error_of_an_import():
    broken = Registry("thing", {"gone": "no_such_module:Thing", "renamed": f"{HERE}:Thing"})
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        broken["gone"]
    with pytest.raises(AttributeError, match="Thing"):
        broken["renamed"]


# --- specs -------------------------------------------------------------------------------------------------------


def test_construct_builds_the_named_thing_from_settings_and_what_follows(things):
    network = construct(things, {"name": "net", "depth": "5"}, width=7)
    assert (type(network), network.width, network.depth) == (Network, 7, 5)


def test_a_spec_is_checked_without_being_built_and_converted(things):
    assert check_spec(things, {"name": "net", "depth": "5"}) == ("net", {"depth": 5})
    assert check_spec(things, {"name": "part"}) == ("part", {})


def test_a_part_that_takes_anything_gets_it_but_what_follows():
    things = Registry("thing", {"open": f"{HERE}:open_ended"})
    assert construct(things, {"name": "open", "x": "1"}, width=2) == {"width": 2, "x": "1"}
    with pytest.raises(ValueError, match=r"thing\.width follows from the rest"):
        construct(things, {"name": "open", "width": 3}, width=2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "nett"}, r"unknown thing 'nett' \(did you mean 'net'\?\); allowed: net, part; .*plugins="),
        ({}, r"thing\.name is missing: set it to one of net, part"),
        ({"name": "net", "width": 3}, r"thing\.width follows from the rest of the configuration"),
        ({"name": "net", "dept": 3}, r"unknown setting of thing 'dept' \(did you mean 'depth'\?\)"),
        ({"name": "net", "depth": "deep"}, r"thing\.depth should be int; got 'deep'"),
        ({"name": "os.system"}, r"unknown thing 'os\.system'"),
        ({"name": "os:system"}, r"unknown thing 'os:system'"),
        ({"name": 3}, r"unknown thing '3'"),
        ({"name": None}, r"unknown thing 'None'"),
    ],
)
def test_construct_refuses_what_it_cannot_build(things, spec, message):
    with pytest.raises(ValueError, match=message):
        construct(things, spec, width=7)
    with pytest.raises(ValueError, match=message):
        check_spec(things, spec)


def test_an_unknown_setting_is_not_answered_with_one_that_cannot_be_set(things):
    with pytest.raises(ValueError, match=r"unknown setting of thing 'widht'.*; allowed: depth$"):
        check_spec(things, {"name": "net", "widht": 3})


def test_what_a_part_refuses_itself_is_named_as_its_user_names_it(things):
    with pytest.raises(ValueError, match=r"^thing\.label must not be bad$"):
        construct(things, {"name": "part", "label": "bad"}, width=1)


def test_the_spec_given_is_not_changed(things):
    spec = {"name": "net", "depth": "5"}
    construct(things, spec, width=1)
    assert spec == {"name": "net", "depth": "5"}


@pytest.mark.parametrize("name", [3, "", "a.b", None, "we ird/x"])
def test_a_name_that_cannot_be_chosen_is_refused(things, name):
    with pytest.raises(ValueError, match="the name of a thing must be an identifier"):
        things.register(name, Part)


def test_a_part_of_the_wrong_kind_is_refused(things):
    with pytest.raises(ValueError, match="the thing 'own' must be a class or function; got 42"):
        things.register("own", 42)
    with pytest.raises(ValueError, match="the reader 'own' must be a Path; got <function"):
        Registry("reader", {}, Path).register("own", lambda: None)
