"""Rollouts against an environment whose every outcome is known beforehand."""

import dataclasses
import heapq
import itertools
from typing import ClassVar

import gymnasium
import numpy as np
import pytest
import torch

from policy import ControllerSettings, DiffusionPolicy, PolicyConfig, RecedingHorizonController, Sampler
from policy.common.device import torch_threads
from policy.inference.backends import SamplerProgram
from policy.rollout.cells import PLAN_BATCH, Cell
from policy.rollout.episodes import check_spaces, describe_clipping, record_episode, run_episodes, run_in_process
from policy.statistics.results import EpisodeResult

CONFIG = PolicyConfig(
    observation_shapes={"state": (3,)},
    action_dim=2,
    obs_size=12,
    encoder={"name": "state", "hidden_size": 32},
    denoiser={"name": "residual_mlp", "hidden_size": 32, "num_layers": 1},
    schedule={"num_steps": 40, "beta_schedule": "squaredcos_cap_v2"},
)


class Counter(gymnasium.Env):
    """Succeeds at step `2 + seed % 5`, but never for seeds divisible by 7: those are cut after 9 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(np.float32([-0.1, -1e3]), np.float32([0.2, 1e3]), (2,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, terminates: bool = False):
        self.terminates = terminates
        self.log: list[tuple[int, np.ndarray]] = []
        self.seeds: list[int] = []
        self.seed_, self.steps = -1, 0

    def reset(self, *, seed=None, options=None):
        assert seed is not None
        self.seed_, self.steps = seed, 0
        self.seeds.append(seed)
        return self._observation(), {"is_success": False, "score": 0.05}

    def step(self, action):
        assert self.steps < 9
        self.steps += 1
        self.log.append((self.seed_, np.array(action)))
        success = self.seed_ % 7 != 0 and self.steps == success_at(self.seed_)
        info = {"is_success": success, "score": SCORES[self.steps % 3]}
        ends = self.steps == 9
        return self._observation(), float(self.steps), ends and self.terminates, ends and not self.terminates, info

    def render(self):
        return np.full((8, 8, 3), self.steps, np.uint8)

    def _observation(self):
        return np.array([self.seed_ / 10, self.steps, np.sin(self.seed_ + self.steps)], np.float32)


SCORES = (0.1, 0.3, 0.2)  # of steps 3 6 9, 1 4 7 and 2 5 8: the best is not the last


def success_at(seed):
    return 2 + seed % 5


def expected(seed):
    success = seed % 7 != 0
    steps = success_at(seed) if success else 9
    return EpisodeResult(seed=seed, success=success, score=0.3, return_=steps * (steps + 1) / 2, steps=steps)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = DiffusionPolicy(CONFIG).eval()
    policy.action_normalizer.fit([-5.0, -5.0], [5.0, 5.0])
    for parameter in policy.parameters():  # the last layer starts at zero, which would make all rows alike
        parameter.data += 0.03 * torch.randn_like(parameter)
    return policy


def controller(policy, **settings):
    settings = {"sampler": Sampler(ddim_steps=2, eta=0.5), "execution_horizon": 3, "plan_batch": 8, **settings}
    return RecedingHorizonController(policy=policy, **settings)


def one_by_one(tasks):
    remaining = iter(tasks)
    return lambda: next(remaining, None)


def roll(policy, envs, seeds, *, execution_horizon=8, **sampler):
    """Results in the order in which the episodes end."""
    cell = Cell(sampler=Sampler(**sampler), execution_horizon=execution_horizon)
    return [result for _, result in run_in_process([policy], envs, [cell], [(0, seed) for seed in seeds])]


@pytest.mark.parametrize("num_envs", [1, 3, 20])
@pytest.mark.parametrize("terminates", [False, True])
def test_every_task_runs_exactly_once_and_slots_refill(policy, num_envs, terminates):
    tasks = [(cell, seed) for cell in range(2) for seed in range(100, 113)]
    envs = [Counter(terminates) for _ in range(num_envs)]
    controllers = [controller(policy), controller(policy, execution_horizon=8)]
    results = list(run_episodes(controllers, envs, one_by_one(tasks)))
    assert sorted(results, key=lambda r: r[0]) == [((cell, seed), expected(seed)) for cell, seed in tasks]
    assert sorted(seed for env in envs for seed in env.seeds) == sorted(seed for _, seed in tasks)
    assert sum(expected(seed).steps for _, seed in tasks) == sum(
        len(env.log) for env in envs
    )  # success ends an episode
    if num_envs == 3:
        assert all(len(env.seeds) >= 6 for env in envs)


def test_an_episode_acts_the_same_alone_or_among_others(policy):
    def actions(num_envs):
        envs = [Counter() for _ in range(num_envs)]
        list(run_episodes([controller(policy)], envs, one_by_one((0, seed) for seed in range(13))))
        seen = {seed: [a for s, a in env.log if s == seed] for env in envs for seed in env.seeds}
        return {seed: np.stack(seen[seed]) for seed in range(13)}

    alone, among = actions(1), actions(10)
    for seed in range(13):
        np.testing.assert_array_equal(alone[seed], among[seed])
    assert not np.array_equal(alone[0], alone[7])


def test_each_cell_acts_with_its_own_settings(policy):
    """Two cells of the same sweep, in the same environments, and each alone."""
    cells = [
        Cell(sampler=Sampler(ddim_steps=1), execution_horizon=8),
        Cell(sampler=Sampler(ddim_steps=4, eta=1.0), execution_horizon=2),
    ]

    def actions(chosen):
        env = Counter()
        tasks = [(number, seed) for seed in (7, 14) for number in range(len(chosen))]
        done = dict(run_in_process([policy], [env], chosen, tasks))
        assert list(done) == tasks
        taken = iter(env.log)
        return {task: np.stack([action for _, action in itertools.islice(taken, done[task].steps)]) for task in tasks}

    together = actions(cells)
    for number, cell in enumerate(cells):
        for (_, seed), alone in actions([cell]).items():
            np.testing.assert_array_equal(together[number, seed], alone)
    assert not np.array_equal(together[0, 7], together[1, 7])


class Lasting(Counter):
    """Ends after `seed % 1000` control steps."""

    def step(self, action):
        self.steps += 1
        info = {"is_success": False, "score": 0.0}
        return self._observation(), 0.0, False, self.steps == self.seed_ % 1000, info


def planning_calls(policy, num_envs, seeds, execution_horizon=4):
    calls, sample = [], SamplerProgram.sample_actions
    envs = [Lasting() for _ in range(num_envs)]

    def counted(program, observations, **named):
        calls.append(len(observations["state"]))
        return sample(program, observations, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerProgram, "sample_actions", counted)
        results = roll(policy, envs, seeds, execution_horizon=execution_horizon, ddim_steps=1)
    assert sorted(result.seed for result in results) == sorted(seeds)
    assert all(result.steps == result.seed % 1000 for result in results)
    assert set(calls) == {PLAN_BATCH}
    return len(calls)


def chunks_of(seed, execution_horizon=4):
    return -(-(seed % 1000) // execution_horizon)


@pytest.mark.parametrize(("num_envs", "calls"), [(1, 24), (2, 12), (8, 3), (16, 3), (32, 6)])
def test_all_environments_plan_in_one_network_call(policy, num_envs, calls):
    """Eight episodes of three chunks each; as many as environments where there are more, in calls of sixteen."""
    seeds = [12 + 1000 * i for i in range(max(8, num_envs))]
    assert planning_calls(policy, num_envs, seeds) == calls


def test_environments_at_different_places_of_their_episodes_still_plan_together(policy):
    """Ends in the middle of a chunk, at different times: as many calls as the busiest of eight slots has chunks."""
    seeds = [1000 * i + 1 + 7 * i % 23 for i in range(40)]
    free = [0] * 8
    for seed in seeds:  # a free slot takes the next task
        heapq.heapreplace(free, free[0] + chunks_of(seed))
    assert planning_calls(policy, 8, seeds) == max(free)


def test_one_long_episode_does_not_hold_up_the_others(policy):
    long, short = [200], [1000 * i + 4 for i in range(1, 101)]
    assert planning_calls(policy, 3, long + short) == 50  # all the short ones run beside it
    envs = [Lasting() for _ in range(3)]
    ended = [result.seed for result in roll(policy, envs, long + short, ddim_steps=1, execution_horizon=4)]
    assert 200 in ended[-3:]  # with the last two of them
    assert [len(env.seeds) for env in envs] == [1, 50, 50]


@pytest.mark.parametrize(("width", "action_dim"), [(4, 2), (39, 4), (3, 1), (22, 2), (17, 7)])
@pytest.mark.parametrize("denoiser", ["modulated_mlp", "residual_mlp"])
def test_a_plan_does_not_depend_on_its_place_in_the_batch(width, action_dim, denoiser):
    """At the default widths. (A layer 8 wide or less behind one not divisible by 4 rounds differently row by row.)"""
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        PolicyConfig(observation_shapes={"state": (width,)}, action_dim=action_dim, denoiser={"name": denoiser})
    ).eval()
    for parameter in policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    observations = torch.randn(8, width).numpy()
    chunks = []
    for place in range(8):
        one = controller(policy, sampler=Sampler(ddim_steps=2, eta=1.0))
        order = np.roll(np.arange(8), place)
        for slot in order:
            one.reset(int(slot), int(slot))
        chunks.append(one.act_many({int(slot): observations[slot] for slot in order}))
    for other in chunks[1:]:
        for slot in range(8):
            np.testing.assert_array_equal(other[slot], chunks[0][slot])


def test_results_come_as_episodes_end(policy):
    seeds = [5, 3, 14, 1, 8]  # 2, 5, 9, 3 and 5 control steps
    results = roll(policy, [Counter(), Counter()], seeds, ddim_steps=1, execution_horizon=1)
    assert results == [expected(seed) for seed in (5, 3, 1, 14, 8)]


def test_more_environments_than_seeds_and_no_seeds_at_all(policy):
    assert roll(policy, [Counter()], []) == []
    envs = [Counter() for _ in range(4)]
    assert roll(policy, envs, [1]) == [expected(1)]
    assert [env.seeds for env in envs] == [[1], [], [], []]


def test_actions_are_clipped_to_the_action_space_and_not_further(policy):
    env = Counter()
    assert len(roll(policy, [env], [0, 7, 14], ddim_steps=2)) == 3
    actions = np.stack([action for _, action in env.log])
    low, high = env.action_space.low, env.action_space.high
    assert (actions >= low).all()
    assert (actions <= high).all()
    assert (actions[:, 0] == low[0]).any() or (actions[:, 0] == high[0]).any()
    assert np.abs(actions[:, 1]).max() > 1  # the second one is free


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_delayed_cell_counts_its_late_steps_and_does_not_depend_on_its_company(policy, num_envs):
    waiting = ControllerSettings(delay_steps=2)
    cells = [
        Cell(sampler=Sampler(ddim_steps=1), execution_horizon=3, controller=waiting),
        Cell(
            sampler=Sampler(ddim_steps=1),
            execution_horizon=3,
            controller=ControllerSettings(mode="continuous", delay_steps=2),
        ),
    ]
    envs = [Counter() for _ in range(num_envs)]
    done = dict(
        run_in_process([policy], envs, cells, [(number, seed) for seed in (7, 5, 14, 1) for number in range(2)])
    )
    # Three steps of a plan, two of waiting: 0 1 2 . . 5 6 7 . for the nine of seeds 7 and 14.
    assert {seed: done[0, seed].late_steps for seed in (7, 5, 14, 1)} == {7: 3, 5: 0, 14: 3, 1: 0}
    assert not any(done[1, seed].late_steps for seed in (7, 5, 14, 1))
    assert sum(len(env.log) for env in envs) == sum(result.steps for result in done.values())


def test_a_recorded_episode_is_the_same_episode(policy):
    env, recorded = Counter(), Counter()
    for seed in (3, 7, 8):
        (result,) = roll(policy, [env], [seed], ddim_steps=2, eta=0.5, execution_horizon=3)
        again, frames = record_episode(controller(policy, action_space=recorded.action_space), recorded, seed)
        assert again == result == expected(seed)
        assert [int(frame[0, 0, 0]) for frame in frames] == list(range(result.steps + 1))
    assert len(env.log) == len(recorded.log)
    for (_, one), (_, other) in zip(env.log, recorded.log, strict=True):
        np.testing.assert_array_equal(one, other)


class Dictionary(Counter):
    observation_space = gymnasium.spaces.Dict({"a": Counter.observation_space, "b": Counter.observation_space})


class Camera(Counter):
    observation_space = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0, 255, (64, 80, 3), np.uint8)})


class Several(Counter):
    observation_spaces: ClassVar = {"state": Counter.observation_space, "two": Dictionary.observation_space}


def test_fitting_spaces_are_accepted():
    check_spaces(CONFIG, Counter())
    shapes = {"b": (3,), "a": (3,)}
    check_spaces(dataclasses.replace(CONFIG, observation_shapes=shapes), Dictionary())


@pytest.mark.parametrize(
    ("change", "env", "message"),
    [
        ({"observation_shapes": {"state": (4,)}}, Counter(), r"observations state \(3,\) do not fit .* state \(4,\)"),
        ({"observation_shapes": {"image": (3,)}}, Counter(), r"observations state \(3,\) do not fit .* image \(3,\)"),
        (
            {"observation_shapes": {"observation.state": (3,)}},
            Counter(),
            r"came from; it fits under other names: 'keys=\{state: observation.state\}' of ddim-import",
        ),
        ({}, Dictionary(), r"observations a \(3,\), b \(3,\) do not fit the policy's state \(3,\)"),
        ({"observation_shapes": {"a": (3,), "b": (3,)}}, Several(), r"came from; env\.observation=two fits$"),
        (
            {"observation_shapes": {"a": (3,), "box": (3,)}},
            Several(),
            r"env\.observation=two fits under other names: 'keys=\{a: a, b: box\}' of ddim-import",
        ),
        ({"observation_shapes": {"a": (7,)}}, Several(), r"demonstrations came from$"),
        ({"observation_shapes": {"a": (3,)}}, Dictionary(), r"; it fits with 'env\.observation_keys=\[a\]'$"),
        (
            {"observation_shapes": {"state": (3,), "goal": (2,)}},
            Counter(),
            r"; a policy that was trained with 'dataset\.observation_keys=\[state\]' fits$",
        ),
        ({"observation_shapes": {"image": (96, 96, 3)}}, Camera(), r"; it fits with env\.image_size=96$"),
        ({"observation_shapes": {"image": (96, 96, 1)}}, Camera(), r"demonstrations came from$"),
        ({"observation_shapes": {"image": (96, 48, 3)}}, Camera(), r"demonstrations came from$"),
        ({"action_dim": 3}, Counter(), r"actions have shape \(2,\), the policy's \(3,\): choose the env="),
    ],
)
def test_spaces_that_do_not_fit_are_refused_naming_both_sides(change, env, message):
    with pytest.raises(ValueError, match=message):
        check_spaces(dataclasses.replace(CONFIG, **change), env, family="gym")


def test_a_training_is_told_the_setting_of_its_own_data():
    """With the renaming that it has already."""
    config = dataclasses.replace(CONFIG, observation_shapes={"pos": (3,)})
    told = r"other names: 'dataset\.observation_keys=\{state: agent_xy\}'$"
    with pytest.raises(ValueError, match=told):
        check_spaces(config, Counter(), {"pos": "agent_xy"}, setting_of_names="dataset.observation_keys")
    config = dataclasses.replace(CONFIG, observation_shapes={"state": (3,), "goal": (2,)})
    with pytest.raises(ValueError, match=r"'dataset\.observation_keys=\{state: agent_xy\}' fits$"):
        check_spaces(config, Counter(), {"state": "agent_xy", "goal": "g"})


def test_settings_that_only_gym_has_are_not_advised_elsewhere():
    for shapes, env in (({"a": (3,)}, Dictionary()), ({"image": (96, 96, 3)}, Camera())):
        with pytest.raises(ValueError, match=r"came from$"):
            check_spaces(dataclasses.replace(CONFIG, observation_shapes=shapes), env, family="pusht")


def test_demonstrated_actions_that_an_environment_cuts_off_are_named():
    policy = DiffusionPolicy(CONFIG)
    policy.action_normalizer.fit([-0.1, -1e3], [0.2, 1e3])  # the bounds of Counter
    assert describe_clipping(policy, Counter()) is None
    policy.action_normalizer.fit([-0.1, -1e3], [0.202, 1e3])  # by rounding
    assert describe_clipping(policy, Counter()) is None
    policy.action_normalizer.fit([-0.1, -1e3], [2, 1001])
    assert r"cut them off (action[0] from -0.1 to 2, allowed -0.1 to 0.2): choose the env=" in (
        describe_clipping(policy, Counter())
    )
    policy.action_normalizer.fit([-9e9, 5], [9e9, 5])
    free = Counter()
    free.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    assert describe_clipping(policy, free) is None
    free.action_space = gymnasium.spaces.Box(np.float32([-np.inf, 0]), np.float32([1, 4]), (2,), np.float32)
    assert "action[0] from -9e+09 to 9e+09, allowed -inf to 1; action[1] from 5 to 5" in describe_clipping(policy, free)
    free.action_space = gymnasium.spaces.Box(-3e38, 3e38, (2,), np.float32)  # 6e38 is beyond float32
    assert describe_clipping(policy, free) is None


def test_the_mapping_that_fits_names_the_observations_of_the_source():
    renamed = dataclasses.replace(CONFIG, observation_shapes={"agent": (3,)})
    with pytest.raises(ValueError, match=r"'keys=\{state: observation.state\}' of ddim-import"):
        check_spaces(renamed, Counter(), {"agent": "observation.state"})


def test_threads_are_put_back_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), torch_threads(before + 1):  # noqa: PT012
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before
