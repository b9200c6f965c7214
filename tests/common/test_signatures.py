"""What a part takes, read from its source: the same as of the imported part, without importing it."""

import ast
import collections.abc
import dataclasses
import inspect
import itertools
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import envs
from policy.common.signatures import EMPTY, Declaration, Unread, declaration_of, load
from policy.diffusion.coefficients import SOLVERS
from policy.model.config import PolicyConfig
from policy.model.denoisers import DENOISERS
from policy.model.encoders import ENCODERS
from tests.conftest import ENVIRONMENT, ROOT

TARGETS = [
    *(
        part
        for registry in (DENOISERS, ENCODERS, SOLVERS)
        for part in registry._parts.values()
        if isinstance(part, str)
    ),
    *(family for family in envs.FAMILIES.values() if isinstance(family, str)),
    "policy.diffusion.schedule:make_schedule",
    "policy.diffusion.sampler:Sampler",
    "policy.control.timeline:ControllerSettings",
    "policy.training.settings:TrainSettings",
    "policy.recipe.settings:RecipeSettings",
    "policy.model.config:PolicySettings",
    "policy.model.config:DataShapes",
    "policy.model.config:PolicyConfig",
    "policy.tracking.tracker:NoTracker",
    "policy.tracking.wandb_tracker:WandbTracker",
    "policy.data.reading:read_demonstrations",
    "policy.commands.train:train_policy",
    "policy.commands.rollout:roll_out",
    "policy.commands.sweep:sweep",
    "policy.commands.export:export_policy",
    "policy.commands.import_checkpoint:import_checkpoint",
    "policy.commands.inspect:inspect",
    "scripts.collection:collect",
    "policy:TrainSettings",
    "policy:Sampler",
    "policy:make_schedule",
    "envs:pusht_mirror",
    "envs:pusht_features",
]
PLAIN = (bool, int, float, str, Path, type(None), Any)
CONTAINERS = (list, tuple, dict, collections.abc.Mapping, collections.abc.Sequence, typing.Union, types.UnionType)


def is_plain_type(hint):
    if typing.get_origin(hint) is Literal or hint in PLAIN:
        return True
    parts = [part for part in typing.get_args(hint) if part is not ...]
    return (typing.get_origin(hint) or hint) in CONTAINERS and all(map(is_plain_type, parts))


def is_literal(source):
    try:
        ast.literal_eval(source)
    except ValueError:
        return False
    return True


def imported(target):
    """Signature, hints and docstring of an imported part, the defaults of dataclasses as an object has them."""
    part = load(target)
    hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
    made = {}
    if dataclasses.is_dataclass(part):
        factories = {f.name: f.default_factory for f in dataclasses.fields(part)}
        made = {name: make() for name, make in factories.items() if make is not dataclasses.MISSING}
    signature = inspect.signature(part)
    parameters = [p.replace(default=made.get(name, p.default)) for name, p in signature.parameters.items()]
    docs = [inspect.getdoc(part) or ""]
    if inspect.isclass(part) and "__init__" in vars(part):
        docs.append(inspect.cleandoc(part.__init__.__doc__ or ""))
    return {p.name: p for p in parameters}, hints, "\n\n".join(docs).strip()


def check_read(target):
    """Compare what is read of a part with what Python makes of it; returns the declaration."""
    read, (parameters, hints, doc) = declaration_of(target), imported(target)
    found = read.signature.parameters
    assert list(found) == list(parameters)
    assert [p.kind for p in found.values()] == [p.kind for p in parameters.values()]
    assert read.doc == doc
    for name, parameter in found.items():
        default, hint = parameters[name].default, hints.get(name, Any)
        if isinstance(parameter.default, Unread):
            assert not is_literal(repr(parameter.default)), name
            assert default is not EMPTY, name
        else:
            assert parameter.default == default, name
            assert type(parameter.default) is type(default), name
        assert parameter.annotation == (hint if is_plain_type(hint) else parameter.annotation), name
        assert parameter.annotation in (hint, Any), name
    return read


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_read_from_the_source_is_what_python_makes_of_it(target):
    assert check_read(target).signature.parameters


def test_every_part_with_a_name_is_looked_at_here():
    parts = [part for registry in (DENOISERS, ENCODERS, SOLVERS) for part in map(registry.declared, registry)]
    parts += envs.FAMILIES.values()
    named = {part if isinstance(part, str) else f"{part.__module__}:{part.__name__}" for part in parts}
    assert named - set(TARGETS) == set()


def test_most_of_what_is_read_is_known_to_the_last():
    """The checks above let `Any` and unread defaults pass: here is how few there are among settings."""
    for target in (
        "policy.model.config:PolicySettings",
        "policy.training.settings:TrainSettings",
        "policy.diffusion.sampler:Sampler",
        "policy.control.timeline:ControllerSettings",
    ):
        parameters = declaration_of(target).signature.parameters.values()
        assert not any(p.annotation is Any or isinstance(p.default, Unread) for p in parameters)
    modulated = declaration_of("policy.model.denoisers.modulated_mlp:ModulatedMLP").signature.parameters
    assert {p.annotation for p in modulated.values()} == {int, float}
    assert [name for name, p in modulated.items() if p.default is EMPTY] == [
        "obs_size",
        "action_dim",
        "action_horizon",
        "num_steps",
    ]


def test_reading_imports_nothing():
    """In a process of its own: not even the module that is read, nor torch."""
    code = f"""
import sys
from policy.common.signatures import declaration_of
for target in {TARGETS!r}:
    declaration_of(target)
heavy = {{"torch", "gymnasium", "scipy", "policy.model.denoisers.modulated_mlp", "policy.commands.train"}}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# --- modules as a plugin might have them -------------------------------------------------------------------------

NAMES = (f"plugin_{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a module that can be imported; gives its name."""
    folder = tmp_path_factory.mktemp("modules")

    def write(source, name=None):
        name = name or next(NAMES)
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        before = set(sys.modules)
        yield write
        for name in set(sys.modules) - before:
            if name.startswith("plugin_"):
                del sys.modules[name]


def test_a_re_export_is_followed_under_its_new_name_also_through_packages_and_relative_imports(written):
    first = written("def origin(*, width: int = 3) -> int:\n    'What it does.'\n")
    second = written(f"from {first} import origin as renamed\n")
    third = written(f"if True:\n    from {second} import renamed\n")
    for target in (f"{first}:origin", f"{second}:renamed", f"{third}:renamed"):
        assert check_read(target).signature.parameters["width"].default == 3
    assert {first, second, third}.isdisjoint(sys.modules) is False  # `check_read` imports them to compare
    assert declaration_of("policy:PolicySettings") == declaration_of("policy.model.config:PolicySettings")


def test_defaults_may_be_names_of_this_or_another_module_and_fields_of_other_settings(written):
    other = written(
        """
        from dataclasses import dataclass

        WIDTH = 8

        @dataclass(kw_only=True)
        class Base:
            depth: int = 4
        """
    )
    target = written(
        f"""
        from __future__ import annotations

        from dataclasses import dataclass, field
        from typing import ClassVar, Literal

        from {other} import WIDTH, Base

        KINDS = ("a", "b")
        Kind = Literal["a", "b"]

        @dataclass(kw_only=True)
        class Own(Base):
            "Settings."
            width: int = WIDTH
            depth: int = 5
            again: int = Base.depth
            kinds: tuple[str, ...] = KINDS
            kind: Kind = "a"
            sizes: list[int] = field(default_factory=lambda: [1, 2])
            options: dict[str, int] = field(default_factory=dict)
            made: int = field(default=0, init=False)
            shared: ClassVar[int] = 3
            label: str = field(default="x")
            needed: float
        """
    )
    found = check_read(f"{target}:Own").signature.parameters
    assert {name: p.default for name, p in found.items()} == {
        "depth": 5,
        "width": 8,
        "again": 4,
        "kinds": ("a", "b"),
        "kind": "a",
        "sizes": [1, 2],
        "options": {},
        "label": "x",
        "needed": EMPTY,
    }
    assert found["kind"].annotation == Literal["a", "b"]


def test_what_is_not_plain_is_any_and_unread(written):
    target = written(
        """
        import os
        from decimal import Decimal

        def make(*, limit: Decimal = Decimal(3), sep: str = os.sep, anything=None, **others: int) -> None:
            pass
        """
    )
    found = check_read(f"{target}:make").signature.parameters
    assert [p.annotation for p in found.values()] == [Any, str, Any, int]
    assert [repr(p.default) for p in list(found.values())[:2]] == ["Decimal(3)", "os.sep"]


@pytest.mark.parametrize(
    "source",
    [
        "class Base:\n    def __init__(self, *, width: int = 3) -> None: ...\n\nclass made(Base): ...",
        "def _make(*, width: int = 3) -> None: ...\n\nmade = _make",
        "from functools import partial\n\ndef _make(depth, *, width: int = 3) -> None: ...\n\nmade = partial(_make, 1)",
    ],
)
def test_what_the_source_does_not_say_plainly_is_imported(written, source):
    name = written(source)
    found = declaration_of(f"{name}:made").signature.parameters
    assert name in sys.modules
    assert (found["width"].default, found["width"].annotation) == (3, int)


def test_a_module_without_source_is_imported():
    assert "x" in declaration_of("math:sqrt").signature.parameters


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("no_such_module:thing", ImportError),
        ("policy.no_such_module:thing", ImportError),
        ("policy.diffusion.sampler:Simpler", AttributeError),
        ("policy:NoSuchName", AttributeError),
    ],
)
def test_what_is_not_there_is_the_error_of_an_import(target, error):
    with pytest.raises(error):
        declaration_of(target)


def test_a_thing_and_its_declaration_are_declared_as_they_are():
    declaration = declaration_of("policy.model.config:PolicyConfig")
    assert isinstance(declaration, Declaration)
    assert declaration_of(declaration) is declaration
    of_object = declaration_of(PolicyConfig).signature.parameters
    assert list(of_object) == list(declaration.signature.parameters)


VALUES = {
    "int": st.integers(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": st.text(max_size=5),
    "bool": st.booleans(),
    "float | None": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "tuple[int, ...]": st.lists(st.integers(), max_size=3).map(tuple),
    "list[str]": st.lists(st.text(max_size=3), max_size=2),
    "dict[str, Any]": st.dictionaries(st.text(max_size=3), st.integers() | st.none(), max_size=2),
    'Literal["a", "b"]': st.sampled_from(["a", "b"]),
    "Mapping[str, tuple[int, ...]]": st.just({}),
    "Path | None": st.none(),
}
PARAMETERS = st.lists(
    st.sampled_from(sorted(VALUES)).flatmap(lambda hint: st.tuples(st.just(hint), st.just(EMPTY) | VALUES[hint])),
    max_size=5,
)
HEAD = """
from __future__ import annotations
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
"""


@settings(deadline=None)
@given(drawn=PARAMETERS, form=st.sampled_from(["function", "class", "dataclass"]), extra=st.booleans())
def test_any_parameters_of_plain_types_are_read_as_python_has_them(written, drawn, form, extra):
    def declared(default, with_field):
        if default is EMPTY:
            return ""
        mutable = with_field and isinstance(default, (list, dict))
        return f" = field(default_factory=lambda: {default!r})" if mutable else f" = {default!r}"

    parameters = [f"p{n}: {hint}{declared(value, form == 'dataclass')}" for n, (hint, value) in enumerate(drawn)]
    if form == "dataclass":
        body = "\n".join(f"    {each}" for each in parameters) or "    pass"
        source = f"@dataclass(kw_only=True)\nclass made:\n    'Text.'\n{body}\n"
    else:
        taken = ["*", *parameters] if parameters else []
        taken += ["**others: Any"] if extra else []
        if form == "function":
            source = f"def made({', '.join(taken)}) -> None:\n    'Text.'\n"
        else:
            source = f"class made:\n    'Text.'\n    def __init__({', '.join(['self', *taken])}) -> None: ...\n"
    target = f"{written(HEAD + source)}:made"
    assert {p.name: p.default for p in check_read(target).signature.parameters.values() if p.name[0] == "p"} == {
        f"p{n}": value for n, (_, value) in enumerate(drawn)
    }


def test_hints_that_only_a_type_checker_can_resolve_are_any():
    namespace = {"__name__": "somewhere"}
    exec("def made(*, shapes: 'Mapping[str, Unseen]', width: 'int' = 3): ...", namespace)
    found = declaration_of(namespace["made"]).signature.parameters
    assert [p.annotation for p in found.values()] == [Any, int]
