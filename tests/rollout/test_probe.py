"""Whether a seed fixes the episode, and what a sweep makes of it if it does not."""

import json
import os
from functools import partial

import gymnasium
import numpy as np
import pytest

import envs
from policy import DiffusionPolicy
from policy.rollout.ledger import Ledger
from policy.rollout.probe import difference, trajectory, unrepeatable
from policy.rollout.workers import RolloutPool
from tests.conftest import PLANAR_CONFIG
from tests.rollout.test_workers import cores, quick_start  # noqa: F401  (fixtures)


class Unfixed(gymnasium.Env):
    """An environment whose start, or a later step, depends on something else than the seed."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, kind):
        self.kind, self.resets, self.steps = kind, 0, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets, self.steps = self.resets + 1, 0
        start = {"turns": self.resets % 10, "process": os.getpid()}.get(self.kind, 0)
        return np.full(4, start, np.float32), {}

    def step(self, action):
        self.steps += 1
        noise = np.random.rand() if self.kind == "unseeded" and self.steps == 3 else self.np_random.random()  # noqa: NPY002
        rounding = 1e-9 * self.resets if self.kind == "rounding" else 0
        observation = np.full(4, noise + rounding + np.abs(action).sum() / 1e6, np.float32)
        return observation, 0.0, False, False, {"is_success": bool(self.resets % 10 > 6)}


gymnasium.register("probe_test/Unfixed-v0", entry_point=Unfixed, max_episode_steps=5)


def made(kind):
    return envs.make("gym", id="probe_test/Unfixed-v0", kwargs={"kind": kind})


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("sound", ""),
        ("rounding", ""),
        ("turns", "was reset again with it, at its start"),
        ("unseeded", "was reset again with it, after 3 control steps"),
    ],
)
def test_the_first_seed_is_played_twice_with_another_between(kind, where):
    path, said = unrepeatable(made(kind), 100_000)
    assert len(path) == 6  # the episode ends after five steps
    assert where in said
    assert bool(said) == bool(where)
    if said:
        assert said.startswith("seed 100000 does not fix the episode: it differed when the simulator was reset again")
        assert "compared as unpaired" in said
        assert "self.np_random, after super().reset(seed=seed)" in said


def test_episodes_of_different_lengths_differ_where_the_shorter_one_ends():
    path = trajectory(made("sound"), 3)
    assert difference(path, path) is None
    assert difference(path, path[:2]) == "after 2 control steps"
    assert difference(path[:0], path) == "at its start"


@pytest.mark.parametrize("name", ["planar", "pusht", "metaworld"])
def test_the_families_fix_their_episodes(name):
    options = {"metaworld": {"task": "reach-v3"}}.get(name, {})
    assert unrepeatable(envs.make(name, **options), 100_000)[1] == ""


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("kind", ["sound", "turns", "process"])
def test_two_processes_are_compared(kind):
    with RolloutPool([DiffusionPolicy(PLANAR_CONFIG)], partial(made, kind), 2) as pool:
        said = pool.probe(5)
    assert ("ran in another process, at its start" in said) == (kind == "process")
    assert ("was reset again with it" in said) == (kind == "turns")


def test_a_sweep_says_it_once_everywhere_and_compares_as_unpaired(run_command, plain_reports, tmp_path):
    DiffusionPolicy(PLANAR_CONFIG).save_pretrained(tmp_path / "ck")
    given = (f"checkpoint={tmp_path}/ck", "env=gym", "env.id=probe_test/Unfixed-v0", "env.kwargs.kind=turns")
    small = ("ddim_steps=[1,2]", "episodes=5", "num_envs=1", "videos=0", "tracker=none")
    for new in (True, False):  # the second time every episode is on disk
        done = run_command("sweep", *given, *small, f"output_dir={tmp_path}/out")
        said = "seed 100000 does not fix the episode: it differed when the simulator was reset again with it, at its"
        assert (done.stdout + done.stderr).count(said) == 1
        document = json.loads((tmp_path / "out/sweep.json").read_text())
        assert document["paired"] is False
        assert [warning.startswith(said) for warning in document["warnings"]] == [True]
        report = (tmp_path / "out/report.html").read_text()
        assert said in report
        assert "Every cell ran the same episodes" not in report
        assert new or "10 of 10 episodes are on disk already" in done.stdout
    done = run_command("sweep", f"merge=[{tmp_path}/out]", f"output_dir={tmp_path}/merged", "tracker=none")
    assert json.loads((tmp_path / "merged/sweep.json").read_text())["paired"] is False
    with Ledger(tmp_path / "out/episodes.jsonl") as ledger:
        assert ledger.unpaired.startswith(said)
    rolled = ("sampler.ddim_steps=1", "episodes=2", "num_envs=1", "tracker=none", f"output_dir={tmp_path}/rollout")
    done = run_command("rollout", *given, *rolled)
    assert done.stderr.count(said) == 1
    assert json.loads((tmp_path / "rollout/rollout.json").read_text())["warnings"][0].startswith(said)
