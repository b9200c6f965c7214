"""The recorder: each episode of an environment is on disk in the step in which it ends."""

import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from policy.data.minari_writer import write_minari
from policy.data.reading import read_demonstrations
from policy.data.recording import episode_file, read_episode
from policy.rollout.probe import unrepeatable
from policy.rollout.recording import EpisodeRecorder, Recording, RolledOut, unrecorded
from tests.rollout.short import ShortPlanar


class Counting(gymnasium.Env):
    """Observes the number of steps so far, in one buffer that is used again, and ends as its seed says."""

    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (4, 4, 3), np.uint8), state=spaces.Box(0, 99, (2,), np.float32)
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    ends = ("success", "terminated", "truncated", "terminated success", "broke_off", "broke_off at reset")

    def __init__(self):
        self.seen = {"camera": np.zeros((4, 4, 3), np.uint8), "state": np.zeros(2, np.float32)}

    def reset(self, *, seed=None, options=None):
        self.end, self.steps = self.ends[seed], 0
        self.seen["camera"][:], self.seen["state"][:] = 0, 0
        return self.seen, {"score": 0.0, **({"broke_off": "cold"} if "reset" in self.end else {})}

    def step(self, action):
        self.steps += 1
        self.seen["camera"][:] = self.seen["state"][:] = self.steps
        over = self.steps == 3
        info = {"is_success": over and "success" in self.end, "score": 0.5}
        if over and self.end == "broke_off":
            info["broke_off"] = "out of coal"
        return self.seen, 0.1, over and "terminated" in self.end, over and self.end in ("truncated", "broke_off"), info


@pytest.fixture
def recorder(tmp_path):
    return EpisodeRecorder(Counting(), tmp_path)


def play(env, seed, steps=3):
    env.reset(seed=seed)
    for step in range(steps):
        env.step(np.full(1, step / 10, np.float32))


def test_every_episode_that_ends_is_recorded_and_one_that_breaks_off_is_not(recorder, tmp_path):
    for seed in range(6):
        play(recorder, seed, steps=0 if seed == 5 else 3)
    play(recorder, 0, steps=2)  # not over: the one that ended stays as it is
    assert sorted(tmp_path.iterdir()) == [episode_file(tmp_path, seed) for seed in range(4)]
    episodes = [read_episode(episode_file(tmp_path, seed), RolledOut) for seed in range(4)]
    for seed, episode in enumerate(episodes):
        assert episode.seed == seed
        assert episode.observations["state"][:, 0].tolist() == [0, 1, 2, 3]  # although the buffer was used again
        assert episode.observations["camera"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(episode.actions, np.float32([[0.0], [0.1], [0.2]]))
        assert (episode.rewards.tolist(), episode.rewards.dtype) == ([0.1] * 3, np.float64)
    ends = [(bool(episode.terminations[-1]), bool(episode.truncations[-1])) for episode in episodes]
    assert ends == [(False, True), (True, False), (False, True), (True, False)]  # a success that goes on was cut
    assert not any(episode.terminations[:-1].any() or episode.truncations[:-1].any() for episode in episodes)


def test_pictures_that_were_recorded_are_read_without_loss(recorder, tmp_path):
    for seed in range(2):
        play(recorder, seed)
    episodes = [read_episode(episode_file(tmp_path, seed), RolledOut) for seed in range(2)]
    env_settings = {"name": "gym", "id": "Counting-v0"}
    write_minari(episodes, path=tmp_path / "pictures", env=recorder, env_settings=env_settings, algorithm="a policy")
    found = read_demonstrations(format="minari", path=tmp_path / "pictures", cache_dir=tmp_path / "cache")
    assert found.metadata["env"] == env_settings
    assert found.observations["camera"].dtype == np.uint8
    assert found.observations["camera"][:, 3, 3, 2].tolist() == [0, 1, 2] * 2
    assert found.observations["state"][:, 1].tolist() == [0, 1, 2] * 2


def test_the_probe_before_a_run_is_not_recorded(recorder, tmp_path):
    """Its episodes have the run's first seeds, and may come to their end."""
    env = gymnasium.Wrapper(recorder)
    assert unrepeatable(env, 2)[1] == ""
    assert list(tmp_path.iterdir()) == []
    play(env, 2)
    assert list(tmp_path.iterdir()) == [episode_file(tmp_path, 2)]
    before = episode_file(tmp_path, 2).read_bytes()
    assert unrepeatable(env, 2)[1] == ""  # as before a rollout that goes on
    assert episode_file(tmp_path, 2).read_bytes() == before
    with unrecorded(Counting()):  # an environment that never records
        pass


def test_what_makes_recorders_goes_to_other_processes(tmp_path):
    made = pickle.loads(pickle.dumps(Recording(ShortPlanar, tmp_path)))(image_size=8)
    assert isinstance(made, EpisodeRecorder)
    assert made.unwrapped.image_size == 8
