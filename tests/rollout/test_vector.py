"""Simulators that step many worlds in one call: each episode is that of a world of its own, and counts once."""

import dataclasses
import json
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

import envs
from envs.errors import EnvContractError
from envs.gym_env import make_gym, parse_success
from envs.vector import VectorWorlds
from policy import DiffusionPolicy, Sampler
from policy.rollout.cells import Cell
from policy.rollout.episodes import run_in_process
from policy.rollout.provenance import differences, provenance
from policy.rollout.vector import VectorPool
from scripts.environments import make_env
from tests.conftest import PLANAR_CONFIG

CONFIG = dataclasses.replace(PLANAR_CONFIG, observation_shapes={"state": (3,)}, action_dim=1)
CELLS = [
    Cell(sampler=Sampler(ddim_steps=2), execution_horizon=4),
    Cell(sampler=Sampler(ddim_steps=1), execution_horizon=3),
]
TASKS = [(cell, seed) for seed in (5, 3, 8, 11, 2) for cell in range(2)]


class Reach(gymnasium.Env):
    """A point on a line is to get to the right of 0.5; the seed says how far away it starts, and how it is pushed."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, broken=()):
        self.broken = broken

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_, self.steps = seed, 0
        self.place, self.goal = self.np_random.uniform(-1, 0), 0.5
        return self._seen(), {}

    def step(self, action):
        self.steps += 1
        self.place += 0.03 * float(action[0]) + self.np_random.normal(0.07, 0.1)
        done = self.place > self.goal
        if self.seed_ in self.broken and self.steps == 3:
            self.place = np.nan
        info = {"success": done, **({"luck": 0.5} if done else {})}
        return self._seen(), -abs(self.goal - self.place), done, False, info

    def _seen(self):
        return np.array([self.place, self.goal, self.steps], np.float64)


@pytest.fixture(autouse=True)
def _registered():
    for name, broken in (("Reach-v0", ()), ("Broken-v0", (3, 8))):
        gymnasium.register(name, entry_point=Reach, max_episode_steps=20, kwargs={"broken": broken})
    yield
    for name in ("Reach-v0", "Broken-v0"):
        del gymnasium.registry[name]


@pytest.fixture(scope="module")
def policy():
    made = DiffusionPolicy(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def alone(policy, name="Reach-v0", tasks=TASKS):
    env = envs.make("gym", id=name, success="info:success")
    return dict(run_in_process([policy], [env], CELLS, tasks))


def worlds_of(mode, name="Reach-v0"):
    def make(worlds):
        env = gymnasium.make_vec(
            name, num_envs=worlds, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}
        )
        return VectorWorlds(env, parse_success("info:success"))

    return make


def roll(policy, make_worlds, num_envs, tasks=TASKS):
    with VectorPool([policy], make_worlds, num_envs) as pool:
        results = list(pool.run(CELLS, tasks))
    assert sorted(task for task, _ in results) == sorted(tasks)  # each exactly once
    return dict(results)


def test_the_reference_episodes_differ_and_end_in_both_ways(policy):
    results = alone(policy)
    assert len({(result.steps, result.return_) for result in results.values()}) == len(TASKS)
    assert {result.success for result in results.values()} == {True, False}


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("num_envs", [1, 3, 16])
def test_every_way_to_treat_a_world_that_is_over_gives_the_episodes_of_single_environments(policy, mode, num_envs):
    assert roll(policy, worlds_of(mode), num_envs) == alone(policy)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_world_that_breaks_ends_its_own_episode_alone(policy, mode):
    expected = alone(policy, "Broken-v0")
    assert {seed for (_, seed), result in expected.items() if result.broke_off} == {3, 8}
    results = roll(policy, worlds_of(mode, "Broken-v0"), 4)
    assert results == expected


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("where", ["step", "reset"])
def test_an_error_of_the_simulator_ends_the_episodes_that_it_steps_and_no_others(policy, mode, where):
    def coal(self, seed):
        if seed == 3 and (where == "reset" or self.steps == 3):
            raise RuntimeError("out of coal")

    class Raising(Reach):
        def reset(self, *, seed=None, options=None):
            found = super().reset(seed=seed)
            if where == "reset":
                coal(self, seed)
            return found

        def step(self, action):
            found = super().step(action)
            coal(self, self.seed_)
            return found

    gymnasium.register("Raising-v0", entry_point=Raising, max_episode_steps=20)
    try:
        results = roll(policy, worlds_of(mode, "Raising-v0"), 2)
    finally:
        del gymnasium.registry["Raising-v0"]
    expected = alone(policy)
    broken = {task: result.broke_off for task, result in results.items() if result.broke_off}
    assert {seed for _, seed in broken} >= {3}
    assert all(
        said.startswith(f"RuntimeError in {where}(): out of coal (test_vector.py, line") for said in broken.values()
    )
    assert len(broken) <= 4  # at most the world beside each
    assert all(results[task] == expected[task] for task in results.keys() - broken.keys())


def test_env_vector_is_no_part_of_a_cell(policy, run_command, tmp_path):
    """A rollout with many worlds in one call goes on from the episodes of one with single environments."""
    policy.save_pretrained(tmp_path / "policy")
    settings = [
        *(f"checkpoint={tmp_path}/policy", "num_envs=4", "tracker=none"),
        *("env=gym", "env.id=Reach-v0", "env.success=info:success", "sampler.ddim_steps=1"),
    ]
    run_command("rollout", *settings, "episodes=5", f"output_dir={tmp_path}/first")
    done = run_command("rollout", *settings, "episodes=12", "env_vector=true", f"output_dir={tmp_path}/first")
    assert "5 of 12 episodes are on disk already" in done.stdout
    rows = json.loads((tmp_path / "first" / "episodes.json").read_text())
    assert [row["seed"] for row in rows] == [*range(100_000, 100_012)]
    run_command("rollout", *settings, "episodes=12", f"output_dir={tmp_path}/again")
    assert json.loads((tmp_path / "again" / "episodes.json").read_text()) == rows


@pytest.mark.parametrize(
    ("command", "setting", "said"),
    [("rollout", "control_rate=10", "runs one environment in real time"), ("sweep", "workers=2", "runs in one")],
)
def test_what_needs_environments_of_their_own_is_refused(policy, command, setting, said, run_command, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    env = ["env=gym", "env.id=Reach-v0", "env.success=info:success", *(["ddim_steps=1"] if command == "sweep" else [])]
    done = run_command(command, f"checkpoint={tmp_path}/policy", *env, "env_vector=true", setting, check=2)
    assert said in done.stderr


class Tray(VectorEnv):
    """A simulator that has no single worlds: an array of points, each started from its own seed."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, num_envs, max_episode_steps=20, broken=()):
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = Reach.observation_space, Reach.action_space
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        self.place = np.array([np.random.default_rng(one).uniform(-1, 0) for one in seed])
        self.steps, self.over = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        return self._seen(), {}

    def step(self, actions):
        self.place = np.where(self.over, 0.0, self.place + 0.03 * actions[:, 0] + 0.06)
        self.steps = np.where(self.over, 0, self.steps + 1)
        self.over = self.place > 0.5
        over, nothing = self.over.copy(), np.zeros(self.num_envs, bool)
        return self._seen(), -np.ones(self.num_envs), over, nothing, {"success": over}

    def _seen(self):
        return np.stack([self.place, np.ones(self.num_envs), self.steps], axis=1)


def test_a_simulator_without_single_worlds_is_rolled_out(policy):
    gymnasium.register("Tray-v0", vector_entry_point=Tray, max_episode_steps=20)
    try:
        results = {
            count: roll(policy, partial(make_env, "gym", id="Tray-v0", success="info:success"), count)
            for count in (1, 7)
        }
    finally:
        del gymnasium.registry["Tray-v0"]
    assert results[1] == results[7]
    assert {result.success for result in results[1].values()} == {True, False}
    assert all(result.steps == 20 for result in results[1].values() if not result.success)  # the time limit is ours


def test_a_simulator_is_the_same_whether_its_worlds_step_in_one_call_or_alone():
    entry_points = {"entry_point": Reach, "vector_entry_point": Tray}
    gymnasium.register("Both-v0", **entry_points, max_episode_steps=20, kwargs={"broken": ()})
    settings = {"name": "gym", "id": "Both-v0", "success": "info:success"}
    try:
        found = [provenance(make_env(**settings, **worlds), "cpu") for worlds in ({}, {"worlds": 1})]
        gymnasium.registry["Both-v0"].max_episode_steps = 30
        longer = provenance(make_env(**settings, worlds=1), "cpu")
    finally:
        del gymnasium.registry["Both-v0"]
    assert differences(found) == []
    assert "the registration of Both-v0" in differences([found[0], longer])[0]


def test_a_seed_that_fixes_the_episode_in_one_world_only_is_noticed(policy):
    class Beside(Tray):
        def reset(self, *, seed=None, options=None):
            _, info = super().reset(seed=seed)
            self.place += np.arange(self.num_envs)
            return self._seen(), info

    def made(kind):
        return lambda worlds: VectorWorlds(kind(worlds), parse_success("info:success"), max_episode_steps=9)

    for kind, warned in ((Tray, False), (Beside, True)):
        with VectorPool([policy], made(kind), 3) as pool:
            assert ("in another world" in pool.probe(7)) is warned


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "planar"}, "'planar' has no simulator that steps many worlds in one call; those are gym"),
        ({"name": "gym", "id": "Reach-v0", "success": "luck"}, "success='luck' is not understood"),
        ({"name": "gym", "id": "CartPole-v1"}, "needs a Box"),
        ({"name": "gym", "id": "Reach-v0", "kwargs": {"colour": 1}}, "cannot be made with 2 worlds: .*colour"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(settings, said):
    with pytest.raises(ValueError, match=said):
        make_env(**settings, worlds=2)


@pytest.mark.parametrize(
    ("method", "returned"),
    [("reset", np.zeros((1, 3))), ("step", (np.zeros((1, 3)), np.zeros(1), np.zeros(1, bool), {})), ("reset", None)],
)
def test_values_that_gymnasium_does_not_ask_for_are_refused_in_the_words_of_single_environments(method, returned):
    def wrong(kind):
        return type(kind.__name__, (kind,), {method: lambda self, *action, **seed: returned})

    def played(env, start, action):
        start()
        env.step(action)

    gymnasium.register("Wrong-v0", entry_point=wrong(Reach), vector_entry_point=wrong(Tray), max_episode_steps=20)
    settings, still = {"name": "gym", "id": "Wrong-v0", "success": "info:success"}, np.zeros(1, np.float32)
    try:
        single, many = make_env(**settings), make_env(**settings, worlds=1)
    finally:
        del gymnasium.registry["Wrong-v0"]
    with pytest.raises(EnvContractError) as of_single:
        played(single, single.reset, still)
    with pytest.raises(EnvContractError) as of_many:
        played(many, partial(many.start, [0]), {0: still})
    said = [str(of_single.value), str(of_many.value)]
    assert said[0] == said[1]
    assert said[0].startswith(f"Wrong-v0: {method}() returned ")
    assert "; Gymnasium (0.26 and later) asks for" in said[0]


def test_a_simulator_without_a_time_limit_is_refused():
    env = SyncVectorEnv([Reach])
    with pytest.raises(ValueError, match=r"no time limit.*env\.max_episode_steps=N"):
        VectorWorlds(env, parse_success("info:success"))


def test_the_worlds_are_those_of_the_single_environment():
    single, many = make_gym("Reach-v0", success="info:success"), make_env("gym", worlds=3, id="Reach-v0")
    assert many.observation_space == single.observation_space
    assert many.action_space == single.action_space
    with pytest.raises(ValueError, match="has no episode"):
        many.step({0: np.zeros(1, np.float32)})


@pytest.mark.parametrize("action", [np.array([np.nan], np.float32), np.zeros(2, np.float32)])
def test_an_odd_action_is_refused_before_any_world_steps(action):
    worlds = envs.make_vector("gym", id="Reach-v0", worlds=2, success="info:success")
    worlds.start([3, 4])
    with pytest.raises(ValueError, match="An action is 1 finite numbers"):
        worlds.step({0: np.zeros(1, np.float32), 1: action})
    assert [env.unwrapped.steps for env in worlds.unwrapped.envs] == [0, 0]
