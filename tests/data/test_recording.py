"""Collections that were interrupted."""

import io
import itertools

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TransformObservation

import envs
from envs import families
from envs.checked import CheckedEnv
from envs.planar import PlanarEnv, make_planar_expert
from policy.common.errors import WorkerError
from policy.data.reading import read_demonstrations
from scripts.collection import collect

COLLECT = envs.collect_episodes
PLANAR = {"name": "planar"}


def test_a_collection_that_was_killed_before_its_first_episode_does_not_count(tmp_path):
    (tmp_path / ".planar-v0").mkdir()
    (tmp_path / ".planar-v0" / "settings.json").write_text('{"seed": 7}')
    collect(env=PLANAR, episodes=1, output_dir=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["planar-v0"]


def test_what_a_killed_collection_was_writing_is_removed_by_the_next_one(tmp_path):
    (tmp_path / ".building-killed" / "planar-v0").mkdir(parents=True)
    collect(env=PLANAR, episodes=1, output_dir=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["planar-v0"]


def content(folder):
    demonstrations = read_demonstrations(format="minari", path=folder / "planar-v0")
    return {"action": demonstrations.actions, **demonstrations.observations}


def test_an_interrupted_collection_goes_on_and_ends_like_an_undisturbed_one(tmp_path, capsys, monkeypatch):
    collect(env=PLANAR, episodes=5, noise=0.3, output_dir=tmp_path / "whole")

    def interrupted(*arguments, **settings):
        yield from itertools.islice(COLLECT(*arguments, **settings), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(envs, "collect_episodes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(env=PLANAR, episodes=5, noise=0.3, output_dir=tmp_path / "cut")
    monkeypatch.undo()
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == [".planar-v0"]
    with pytest.raises(ValueError, match=r"other settings that was interrupted \(noise=0\.3, now 0\.2\)"):
        collect(env=PLANAR, episodes=5, noise=0.2, output_dir=tmp_path / "cut")
    settings = tmp_path / "cut" / ".planar-v0" / "settings.json"
    before = settings.read_text()
    for damaged in ("", "[]"):
        settings.write_text(damaged)
        with pytest.raises(ValueError, match=r"settings\.json is damaged: remove .*planar-v0, and give the same"):
            collect(env=PLANAR, episodes=5, noise=0.3, output_dir=tmp_path / "cut")
    settings.write_text(before)
    with pytest.raises(ValueError, match=r"was interrupted \(env\.max_episode_steps=none, now 50\)"):
        collect(env={**PLANAR, "max_episode_steps": 50}, episodes=5, noise=0.3, output_dir=tmp_path / "cut")
    collect(env=PLANAR, episodes=5, noise=0.3, output_dir=tmp_path / "cut")
    assert "2 of 5 demonstrations are on disk already" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "cut").iterdir()) == ["planar-v0"]
    whole, cut = content(tmp_path / "whole"), content(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(np.array_equal(values, cut[key]) for key, values in whole.items())


def test_an_expert_that_always_fails_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(WorkerError, match="Only 0 of 1 demonstrations succeeded"):
        collect(env=PLANAR, episodes=1, noise=40, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_episode_is_refused_by_name(tmp_path):
    other_fields = io.BytesIO()
    np.savez(other_fields, seed=3)
    (tmp_path / ".planar-v0").mkdir()
    file = tmp_path / ".planar-v0/000000000003.npz"
    for content in (b"PK\x03\x04", b"", other_fields.getvalue()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"000000000003.npz is damaged .*: remove it"):
            collect(env=PLANAR, episodes=5, output_dir=tmp_path)


def test_attempts_that_the_simulator_broke_off_are_no_demonstrations():
    class Breaking(PlanarEnv):
        def step(self, action):
            if self.seed % 2:
                raise RuntimeError("out of coal")
            return super().step(action)

        def reset(self, *, seed=None, options=None):
            self.seed = seed
            if seed == 2:
                raise RuntimeError("cold")
            return super().reset(seed=seed, options=options)

    env = CheckedEnv(Breaking, "breaking")
    recorded = envs.collect_episodes(env, make_planar_expert, episodes=3, seed=0)
    assert [episode.seed for episode in recorded] == [0, 4, 6]


def test_pictures_and_vectors_by_key_are_recorded_and_read_again(tmp_path, monkeypatch):
    class Seen(TransformObservation):
        """The planar task with a picture; a key may hold a slash."""

        max_episode_steps = PlanarEnv.max_episode_steps

        def __init__(self, render_mode: str | None = None):
            env = PlanarEnv()
            picture = spaces.Box(0, 255, (2, 3, 3), np.uint8)
            space = spaces.Dict({"arm/state": env.observation_space, "camera": picture})
            super().__init__(env, self.seen, space)

        def seen(self, state):
            return {"arm/state": state, "camera": np.full((2, 3, 3), 100 * abs(state[0]), np.uint8)}

    def expert(env, seed):
        plain = make_planar_expert(env, seed)
        return lambda observation: plain(observation["arm/state"])

    monkeypatch.setitem(envs.FAMILIES, "seen", Seen)
    monkeypatch.setitem(families.EXPERTS, "seen", expert)

    def interrupted(*arguments, **settings):
        yield from itertools.islice(COLLECT(*arguments, **settings), 1)
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(envs, "collect_episodes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(env={"name": "seen"}, episodes=2, output_dir=tmp_path)
    collect(env={"name": "seen"}, episodes=2, output_dir=tmp_path)
    collect(env=PLANAR, episodes=2, output_dir=tmp_path)
    seen = read_demonstrations(format="minari", path=tmp_path / "seen-v0").observations
    state = content(tmp_path)["state"]
    np.testing.assert_array_equal(seen["arm/state"], state)
    assert seen["camera"].dtype == np.uint8
    assert (seen["camera"][:, 0, 0, 0] == (100 * abs(state[:, 0])).astype(np.uint8)).all()
