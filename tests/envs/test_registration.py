"""Families by name: nothing is imported before it is used, families of one's own, and Gymnasium's ids."""

import inspect
import subprocess
import sys
import typing
from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest

import envs
from envs import families
from envs.planar import PlanarEnv, PlanarExpert
from policy.common.signatures import declaration_of

SIMULATORS = ("mujoco", "metaworld", "ocbench", "gymnasium_robotics", "gym_pusht", "pymunk", "cv2", "scipy")


def test_nothing_is_imported_before_it_is_used():
    """In a process of its own, where nothing has been imported yet."""
    statements = [
        "import sys, importlib.util, envs",
        f"heavy = lambda: print(*(m for m in ('gymnasium', 'numpy', *{SIMULATORS}) if m in sys.modules), sep=',')",
        "heavy()",
        "envs.FAMILIES, envs.families.declared_family('metaworld'), envs.MissingExtraError",
        "heavy()",
        "envs.pusht_hindsight",
        "heavy()",
        "importlib.util.find_spec('gymnasium')",  # finds Gymnasium without importing it
        "envs.make('planar').reset(seed=0)",
        "heavy()",
        "import gymnasium",
        # The ids are registered although envs was imported first.
        "print(type(gymnasium.make('ddim_policy/Planar-v0').unwrapped).__name__)",
    ]
    done = subprocess.run([sys.executable, "-c", ";".join(statements)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "", "numpy", "gymnasium,numpy", "PlanarEnv"]
    assert done.stderr == ""


def test_every_public_name_is_there():
    assert len(envs.__all__) >= 17
    assert {name for name in envs.__all__ if not hasattr(envs, name)} == set()
    assert dir(envs) == envs.__all__
    with pytest.raises(AttributeError, match="mak"):
        envs.mak  # noqa: B018


@pytest.mark.parametrize("id", ["MetaWorld-v0", "MetaWorldTasks-v0", "OCBench-v0", "Planar-v0", "PushT-v0"])
def test_gymnasium_knows_the_ids(id):
    module, _, name = gymnasium.spec(f"ddim_policy/{id}").entry_point.partition(":")
    assert find_spec(module) is not None
    assert name.endswith("Env")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_familys_options_can_be_read_from_its_source(name):
    """Commands check settings against type hints before they import the family."""
    declared = declaration_of(families.declared_family(name)).signature.parameters
    assert isinstance(families.declared_family(name), str)
    family = families.load_family(name)
    taken = inspect.signature(family).parameters
    assert {key: p.default for key, p in declared.items()} == {key: p.default for key, p in taken.items()}
    hints = typing.get_type_hints(family.__init__ if inspect.isclass(family) else family)
    assert {key: p.annotation for key, p in declared.items()} == {key: hints[key] for key in declared}


@pytest.fixture
def own(monkeypatch):
    """The families, to be changed."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "EXPERTS", dict(families.EXPERTS))


def make_small(*, size: int = 8, render_mode: str | None = None) -> PlanarEnv:
    return PlanarEnv(render_mode=render_mode, image_size=size)


def make_small_expert(env, seed):
    return PlanarExpert(seed)


@pytest.mark.usefixtures("own")
def test_a_family_of_ones_own_is_made_by_its_name():
    envs.register_family("small", make_small, make_small_expert)
    env = envs.make("small", size=12, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    assert env.render().shape == (12, 12, 3)
    assert np.isfinite(envs.make_expert("small", env, 0)(observation)).all()
    assert families.declared_family("small") is make_small
    with pytest.raises(ValueError, match=r"Unknown option of 'small' 'sice'\. Did you mean 'size'"):
        envs.make("small", sice=3)
    envs.register_family("small", make_small)  # a module may be imported twice


@pytest.mark.usefixtures("own")
def test_a_family_of_ones_own_needs_no_expert():
    envs.register_family("small", make_small)
    with pytest.raises(ValueError, match="'small' has no scripted expert; its demonstrations must come from a dataset"):
        envs.make_expert("small", envs.make("small"), 0)


@pytest.mark.usefixtures("own")
def test_a_family_may_take_any_option():
    envs.register_family("any", lambda *, size, render_mode=None, **options: make_small(**options, size=size))
    assert envs.make("any", size=12, max_episode_steps=3).observation_space.shape == (4,)
    with pytest.raises(ValueError, match="'any' needs the option 'size'"):
        envs.make("any", colour="red")
    with pytest.raises(ValueError, match=r"any cannot be made: TypeError .* 'colour'"):  # the family's own words
        envs.make("any", size=12, colour="red")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["planar", "mine"])
def test_a_name_that_is_taken_is_refused(name):
    envs.register_family("mine", lambda *, render_mode=None: PlanarEnv(render_mode=render_mode))
    with pytest.raises(ValueError, match=f"There is an environment '{name}' already; register yours under another"):
        envs.register_family(name, make_small)
    assert envs.make(name).unwrapped.image_size == 256


def test_an_unknown_family_is_answered_with_the_nearest_and_with_plugins():
    with pytest.raises(ValueError) as error:
        envs.make("plannar")
    assert str(error.value) == (
        "Unknown environment 'plannar'. Did you mean 'planar'? Allowed: gym, metaworld, metaworld_tasks, ocbench,"
        " planar, pusht. A family of your own comes with plugins=[the module that registers it]."
    )
