"""Receding-horizon control: what is seen, when it plans, what it executes, and independence of its company."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.common.observations import as_dict
from policy.common.seeding import derive_generator, derive_seed
from policy.control.planning import closest
from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings, LastPlan, Timeline, kept
from policy.diffusion.sampler import Sampler
from policy.inference.backends import compile_sampler
from policy.model.config import PolicyConfig
from policy.model.diffusion_policy import DiffusionPolicy


class FakePolicy:
    """What a controller asks of a policy; its sampling is `FakeProgram`'s."""

    def __init__(self, obs_horizon=2, action_horizon=8, observation_shapes=None):
        self.config = SimpleNamespace(
            obs_horizon=obs_horizon,
            action_horizon=action_horizon,
            action_dim=1,
            observation_shapes=observation_shapes or {"state": (3,)},
        )
        self.schedule = SimpleNamespace(num_steps=100)
        self.calls = []
        self.rows = 0

    def settled(self, sampler):
        return sampler.settled("diffusion", self.schedule.num_steps)


class FakeProgram:
    """Action i of its n-th row ever planned is 100 n + i; remembers what it was asked."""

    def __init__(self, policy, sampler):
        self.policy, self.sampler, self.action_scale = policy, sampler, np.ones(1, np.float32)

    def sample_actions(self, observations, *, generator, previous=None, keep=None):
        policy = self.policy
        batch = len(next(iter(observations.values())))
        draws = [torch.randn(1, generator=g).item() for g in generator]
        policy.calls.append(SimpleNamespace(observations=observations, draws=draws, previous=previous, keep=keep))
        first = 100 * torch.arange(policy.rows, policy.rows + batch)
        policy.rows += batch
        return (first[:, None] + torch.arange(policy.config.action_horizon))[..., None].float()


def vector(value):
    return np.full(3, value, dtype=np.float32)


def controller_of(policy, **changes):
    if isinstance(policy, FakePolicy):
        changes["program"] = FakeProgram(policy, changes.get("sampler", Sampler()))
    return RecedingHorizonController(policy=policy, **changes)


# --- one robot ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(execution_horizon=st.integers(1, 8), steps=st.integers(1, 40))
def test_a_prefix_of_each_chunk_is_executed_and_then_replanned(execution_horizon, steps):
    policy = FakePolicy()
    controller = controller_of(policy, execution_horizon=execution_horizon)
    controller.reset(seed=0)
    actions = [controller.act(vector(step)) for step in range(steps)]
    assert all(action.shape == (1,) for action in actions)
    expected = [100 * (step // execution_horizon) + step % execution_horizon for step in range(steps)]
    assert np.concatenate(actions).tolist() == expected
    assert len(policy.calls) == -(-steps // execution_horizon)


@settings(deadline=None)
@given(obs_horizon=st.integers(1, 5), execution_horizon=st.integers(1, 8), steps=st.integers(1, 20))
def test_each_plan_sees_the_newest_observations_with_the_first_one_repeated(obs_horizon, execution_horizon, steps):
    policy = FakePolicy(obs_horizon=obs_horizon)
    controller = controller_of(policy, execution_horizon=execution_horizon)
    controller.reset(seed=0)
    for step in range(steps):
        controller.act(vector(step))
    for plan, call in enumerate(policy.calls):
        now = plan * execution_horizon
        seen = call.observations["state"]
        assert seen.shape == (1, obs_horizon, 3)
        assert seen[0, :, 0].tolist() == [max(0, now + i) for i in range(1 - obs_horizon, 1)]


def test_observations_by_key_keep_their_keys_and_dtypes():
    policy = FakePolicy(observation_shapes={"image": (2, 2), "state": (3,)})
    controller = controller_of(policy)
    controller.reset(seed=0)
    controller.act({"image": np.full((2, 2), 7, np.uint8), "state": vector(1)})
    assert set(policy.calls[0].observations) == {"image", "state"}
    assert policy.calls[0].observations["image"].dtype == torch.uint8
    assert policy.calls[0].observations["image"].shape == (1, 2, 2, 2)
    plain, by_key = vector(0), {"state": vector(0)}
    assert as_dict(plain)["state"] is plain
    assert as_dict(by_key) == by_key


def test_an_observation_buffer_that_is_reused_does_not_rewrite_the_past():
    policy = FakePolicy(obs_horizon=3)
    controller = controller_of(policy, execution_horizon=1)
    controller.reset(seed=0)
    buffer = vector(0)
    for step in range(4):
        buffer[:] = step
        controller.act(buffer)
    assert policy.calls[-1].observations["state"][0, :, 0].tolist() == [1, 2, 3]


def test_changing_an_action_in_place_does_not_change_the_next_ones():
    policy = FakePolicy()
    controller = controller_of(policy)
    controller.reset(seed=0)
    actions = []
    for step in range(10):
        action = controller.act(vector(step))
        actions.append(action.item())
        action *= -1
    assert actions == [0, 1, 2, 3, 4, 5, 6, 7, 100, 101]


def test_reset_forgets_the_chunk_and_the_history():
    policy = FakePolicy(obs_horizon=3)
    controller = controller_of(policy, execution_horizon=5)
    controller.reset(seed=0)
    for step in range(7):
        controller.act(vector(step))
    assert len(policy.calls) == 2
    controller.reset(seed=0)
    assert controller.act(vector(50)).item() == 200
    assert len(policy.calls) == 3
    assert policy.calls[2].observations["state"][0, :, 0].tolist() == [50, 50, 50]
    assert policy.calls[2].draws == policy.calls[0].draws


def test_each_plan_draws_from_the_episodes_seed_and_the_plans_number_alone():
    def draws(seed, plans=4):
        policy = FakePolicy()
        controller = controller_of(policy, execution_horizon=2)
        controller.reset(seed=seed)
        for step in range(2 * plans):
            controller.act(vector(step))
        return [call.draws[0] for call in policy.calls]

    torch.manual_seed(0)
    first = draws(5)
    torch.manual_seed(1)
    assert draws(5) == first
    assert first == [torch.randn(1, generator=derive_generator(5, n)).item() for n in range(4)]
    assert len(set(first + draws(6) + draws(0))) == 12


def test_the_sampler_reaches_the_policy():
    policy, sampler = real_policy("modulated_mlp"), Sampler(ddim_steps=3, eta=0.5, spacing="linspace", clip=None)
    controller = controller_of(policy, sampler=sampler, program=compile_sampler(policy, sampler, backend="eager"))
    controller.reset(seed=4)
    history = {"state": torch.zeros(1, 2, 3)}
    settings = {"ddim_steps": 3, "eta": 0.5, "spacing": "linspace", "clip": None}
    chunk = policy.sample_actions(history, generator=[derive_generator(4, 0)], **settings)
    action = controller.act(vector(0))
    assert np.array_equal(action, chunk[0, 0].numpy())
    fused = controller_of(policy, sampler=sampler)  # without a program, the default back end's
    fused.reset(seed=4)
    assert np.allclose(fused.act(vector(0)), action, atol=1e-5)
    with pytest.raises(ValueError, match=r"compiled for Sampler.*the controller has"):
        controller_of(policy, sampler=Sampler(), program=compile_sampler(policy, sampler))


def test_actions_are_clipped_to_the_action_space():
    space = Box(np.array([-0.1], np.float32), np.array([2.5], np.float32))
    controller = controller_of(FakePolicy(), action_space=space)
    controller.reset(seed=0)
    assert [controller.act(vector(0)).item() for _ in range(5)] == [0, 1, 2, 2.5, 2.5]


# --- plans that take time ----------------------------------------------------------------------------------------


def played(mode, delay_steps, execution_horizon, steps, late="hold", sampler=None, candidates=1):
    """Actions as (plan, place in its chunk) or None where they belong to no plan, and the calls."""
    policy = FakePolicy()
    settings_ = ControllerSettings(mode=mode, delay_steps=delay_steps, late=late, candidates=candidates)
    controller = controller_of(
        policy, settings=settings_, execution_horizon=execution_horizon, sampler=sampler or Sampler()
    )
    controller.reset(seed=0)
    actions, late_before = [], 0
    for step in range(steps):
        value = controller.act(vector(step)).item()
        is_late = controller.late_steps() > late_before
        late_before = controller.late_steps()
        actions.append((value,) if is_late else divmod(round(value), 100))
    return actions, policy.calls


@settings(deadline=None)
@given(
    mode=st.sampled_from(["synchronous", "asynchronous", "continuous"]),
    delay_steps=st.integers(0, 7),
    execution_horizon=st.integers(1, 8),
    steps=st.integers(1, 50),
)
def test_an_action_is_executed_at_the_control_step_it_was_planned_for(mode, delay_steps, execution_horizon, steps):
    actions, calls = played(mode, delay_steps, execution_horizon, steps)
    begun = [round(call.observations["state"][0, -1, 0].item()) for call in calls]  # the step it last saw
    waited = 0
    for step, action in enumerate(actions):
        if len(action) == 1:
            waited += 1
            continue
        plan, place = action
        if mode == "synchronous":
            assert place == step - begun[plan] - (delay_steps if plan else 0)
            assert place < execution_horizon
        else:
            assert place == step - begun[plan]
            assert place >= (delay_steps if plan else 0)
        assert all(
            begun[later] + delay_steps > step for later in range(plan + 1, len(begun))
        )  # the newest that is there
    if mode == "synchronous":
        assert waited == sum(min(delay_steps, steps - first) for first in begun[1:])
    elif 2 * delay_steps <= 8:
        assert waited == 0  # never out of actions
    if delay_steps == 0:
        assert actions == [divmod(step, execution_horizon) for step in range(steps)]


def test_a_late_plan_is_answered_by_holding_or_by_zeros_and_counted():
    held, _ = played("synchronous", 2, 3, 9)
    assert held == [(0, 0), (0, 1), (0, 2), (2.0,), (2.0,), (1, 0), (1, 1), (1, 2), (102.0,)]
    zeros, _ = played("synchronous", 2, 3, 9, late="zero")
    assert zeros == [(0, 0), (0, 1), (0, 2), (0.0,), (0.0,), (1, 0), (1, 1), (1, 2), (0.0,)]
    running_dry, _ = played("asynchronous", 6, 8, 11)
    assert running_dry[8:] == [
        (1, 6),
        (1, 7),
        (107.0,),
    ]  # begun at 2, there at 8, used up at 9; the next is there at 14


def test_continuity_keeps_what_is_executed_meanwhile_and_less_and_less_of_the_rest():
    _, calls = played("continuous", 2, 4, 12)
    assert calls[0].previous is None
    assert calls[1].previous[0, :, 0].tolist() == [4, 5, 6, 7, 7, 7, 7, 7]  # shifted by 4 control steps
    assert calls[1].keep[0].tolist() == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0])
    assert calls[2].previous[0, :, 0].tolist() == [104, 105, 106, 107, 107, 107, 107, 107]
    _, calls = played("asynchronous", 2, 4, 12)
    assert all(call.previous is None for call in calls)


def test_a_warm_start_hands_on_the_last_chunk_in_every_mode():
    for mode in ("synchronous", "asynchronous"):
        _, calls = played(mode, 0, 4, 12, sampler=Sampler(warm_start=0.5))
        assert calls[0].previous is None
        assert calls[1].previous[0, :, 0].tolist() == [4, 5, 6, 7, 7, 7, 7, 7]
        assert not calls[1].keep.any()


@pytest.mark.usefixtures("one_thread")
def test_at_the_seam_a_continuous_plan_agrees_with_what_was_executed():
    policy = real_policy("modulated_mlp")
    policy.action_normalizer.fit([-2, -2], [2, 2])
    jumps = {}
    for mode in ("asynchronous", "continuous"):
        controller = controller_of(
            policy,
            execution_horizon=4,
            settings=ControllerSettings(mode=mode, delay_steps=2),
            sampler=Sampler(ddim_steps=8),
            program=compile_sampler(policy, Sampler(ddim_steps=8)),
        )
        chunks = []
        program = controller.program
        sample = program.sample_actions

        def recording(*given, sample=sample, chunks=chunks, **named):
            chunks.append(sample(*given, **named))
            return chunks[-1]

        object.__setattr__(program, "sample_actions", recording)
        run(controller, [5], steps=30)
        # Plan n + 1 is begun 4 steps after plan n: its first two actions are for the steps of the last one's 4 and 5.
        pairs = list(itertools.pairwise(chunks))
        jumps[mode] = max((after[0, :2] - before[0, 4:6]).abs().max().item() for before, after in pairs)
    assert jumps["continuous"] < 1e-5 < 0.01 < jumps["asynchronous"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("mode", ["asynchronous", "continuous"])
@pytest.mark.parametrize("warm_start", [None, 0.5])
def test_with_delay_an_episode_is_the_same_to_the_bit_alone_and_among_others(mode, warm_start):
    policy = real_policy("modulated_mlp")

    def controller():
        sampler = Sampler(ddim_steps=4, eta=0.5, warm_start=warm_start)
        delayed = ControllerSettings(mode=mode, delay_steps=2)
        return controller_of(policy, sampler=sampler, execution_horizon=3, plan_batch=8, settings=delayed)

    seeds = list(range(6))
    alone = {seed: run(controller(), [seed])[seed] for seed in seeds}
    for together in (run(controller(), seeds[::-1]), run(controller(), seeds, late=2)):
        for seed, actions in together.items():
            assert np.array_equal(actions, alone[seed]), seed


def test_of_several_candidates_the_one_closest_to_the_last_plan_is_executed():
    actions, calls = played("synchronous", 0, 6, 18, candidates=3)
    assert [len(call.draws) for call in calls] == [1, 3, 3]  # an episode's first plan has nothing to continue
    assert len(set(calls[1].draws)) == 3
    # Row n begins at 100 n: of the rows 1, 2, 3 the first is closest to row 0, and of 4, 5, 6 the first to row 1.
    assert actions[6:8] == [(1, 0), (1, 1)]
    assert actions[12:14] == [(4, 0), (4, 1)]
    _, plain_calls = played("synchronous", 0, 6, 18)
    assert [call.draws[0] for call in calls] == [call.draws[0] for call in plain_calls]
    _, calls = played("synchronous", 0, 8, 18, candidates=3)
    assert [len(call.draws) for call in calls] == [1, 1, 1]  # nothing is left of the last plan


@given(
    candidates=st.integers(1, 6),
    overlap=st.integers(0, 5),
    scale=st.lists(st.floats(0.01, 100), min_size=2, max_size=2),
    seed=st.integers(0, 1000),
)
def test_no_candidate_is_closer_than_the_closest(candidates, overlap, scale, seed):
    rng = np.random.default_rng(seed)
    drawn, last = (rng.normal(size=(n, 5, 2)).astype(np.float32) * scale for n in (candidates, 1))
    plan = LastPlan(chunk=last[0], keep=np.zeros(5, np.float32), overlap=overlap)
    chosen = closest(drawn, plan, np.asarray(scale, np.float32))

    def distance(chunk):
        return sum(((chunk[i, d] - last[0, i, d]) / scale[d]) ** 2 for i in range(overlap) for d in range(2))

    assert distance(chosen) <= min(map(distance, drawn)) * (1 + 1e-5)
    if overlap == 0:
        assert np.array_equal(chosen, drawn[0])


@pytest.mark.usefixtures("one_thread")
def test_with_candidates_an_episode_is_the_same_to_the_bit_alone_and_among_others():
    policy = real_policy("modulated_mlp")
    policy.action_normalizer.fit([-2, -2], [2, 2])

    def controller(candidates):
        settings = ControllerSettings(candidates=candidates)
        sampler = Sampler(ddim_steps=4)
        return controller_of(policy, sampler=sampler, execution_horizon=2, plan_batch=4, settings=settings)

    seeds = list(range(4))
    alone = {seed: run(controller(5), [seed])[seed] for seed in seeds}
    for seed, actions in run(controller(5), seeds[::-1]).items():
        assert np.array_equal(actions, alone[seed]), seed
    assert not np.array_equal(run(controller(1), [0])[0], alone[0])  # another candidate than the first is chosen


def test_kept_weights_fall_from_one_to_zero():
    for overlap in range(9):
        for committed in range(9):
            weights = kept(overlap, committed, 8)
            assert weights[: min(overlap, committed)].tolist() == [1] * min(overlap, committed)
            assert not weights[overlap:].any()
            assert (np.diff(weights) <= 0).all()
            assert ((weights[committed:overlap] > 0) & (weights[committed:overlap] < 1)).all()


# --- several robots ----------------------------------------------------------------------------------------------


def test_robots_that_need_a_chunk_are_planned_together_and_the_others_left_alone():
    policy = FakePolicy()
    controller = controller_of(policy, execution_horizon=4, plan_batch=8)
    for slot in "abc":
        controller.reset(seed=ord(slot), slot=slot)
    controller.act_many({"a": vector(0)})
    assert len(policy.calls) == 1
    for step in range(1, 4):
        controller.act_many({slot: vector(step) for slot in "abc"})
    assert len(policy.calls) == 2  # b and c, at step 1
    actions = controller.act_many({slot: vector(4) for slot in "abc"})
    assert len(policy.calls) == 3  # a, at step 4
    assert set(actions) == set("abc")
    assert [round(actions[slot].item()) % 100 for slot in "abc"] == [0, 3, 3]


@pytest.mark.parametrize(("robots", "plan_batch", "calls"), [(5, 1, 5), (5, 2, 3), (5, 8, 1), (8, 8, 1), (9, 8, 2)])
def test_every_network_call_has_plan_batch_rows(robots, plan_batch, calls):
    policy = FakePolicy()
    controller = controller_of(policy, plan_batch=plan_batch)
    for slot in range(robots):
        controller.reset(seed=slot, slot=slot)
    actions = controller.act_many({slot: vector(slot) for slot in range(robots)})
    assert [len(call.draws) for call in policy.calls] == [plan_batch] * calls
    rows = np.concatenate([call.observations["state"][:, 0, 0] for call in policy.calls])
    draws = [draw for call in policy.calls for draw in call.draws]
    for slot in range(robots):
        row = round(actions[slot].item()) // 100
        assert rows[row] == slot  # each robot acts on the chunk that was planned from what it saw
        assert draws[row] == torch.randn(1, generator=derive_generator(slot, 0)).item()


def real_policy(denoiser):
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        PolicyConfig(
            observation_shapes={"state": (3,)},
            action_dim=2,
            denoiser={"name": denoiser, "hidden_size": 64, "num_layers": 2},
        )
    )
    # A fresh denoiser puts out zeros, which would be the same in any company.
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return policy.eval()


def run(controller, seeds, steps=13, late=0):
    """Toy episodes that react to their actions, each starting `late` control steps after the one before it."""
    state = {}
    actions = {seed: [] for seed in seeds}
    for step in range(steps + late * (len(seeds) - 1)):
        for i, seed in enumerate(seeds):
            if step == i * late:
                controller.reset(seed=seed, slot=seed)
                state[seed] = np.random.default_rng(seed).normal(size=3).astype(np.float32)
        running = {seed: state[seed] for seed in seeds if seed in state and len(actions[seed]) < steps}
        for seed, action in controller.act_many(running).items():
            actions[seed].append(action)
            state[seed] = np.float32(0.9) * state[seed] + np.float32(0.1) * np.array([*action, action[0]])
    return {seed: np.stack(taken) for seed, taken in actions.items()}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("plan_batch", [1, 8])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("denoiser", ["residual_mlp", "modulated_mlp"])
def test_an_episode_is_the_same_to_the_bit_alone_and_among_others(denoiser, eta, plan_batch):
    policy = real_policy(denoiser)

    def controller():
        sampler = Sampler(ddim_steps=4, eta=eta)
        return controller_of(policy, sampler=sampler, execution_horizon=3, plan_batch=plan_batch)

    seeds = list(range(9))  # more robots than plans in a call
    alone = {seed: run(controller(), [seed])[seed] for seed in seeds}
    assert all(np.ptp(actions, axis=0).min() > 1e-3 for actions in alone.values())
    assert not np.array_equal(alone[0], alone[1])
    companies = [seeds, seeds[::-1], [3, 7], [7, 0, 3]]
    for together in [run(controller(), company) for company in companies] + [run(controller(), seeds, late=2)]:
        for seed, actions in together.items():
            assert np.array_equal(actions, alone[seed]), seed


@pytest.mark.usefixtures("one_thread")
def test_one_robots_interface_is_the_same_episode():
    policy = real_policy("modulated_mlp")
    observations = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    single = controller_of(policy, execution_horizon=4)
    single.reset(seed=3)
    many = controller_of(policy, execution_horizon=4)
    many.reset(seed=3, slot="arm")
    for observation in observations:
        assert np.array_equal(single.act(observation), many.act_many({"arm": observation})["arm"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_acting_in_parts_is_the_same_episode_to_the_bit(eta):
    """`observe`, `plan` and `next_action`, each slot running ahead to the end of its chunk, as rollouts do."""
    policy = real_policy("modulated_mlp")

    def controller():
        return controller_of(policy, sampler=Sampler(ddim_steps=4, eta=eta), execution_horizon=3, plan_batch=8)

    seeds, steps = [4, 9, 2], 13
    whole, parts = run(controller(), seeds, steps), controller()
    state = {seed: np.random.default_rng(seed).normal(size=3).astype(np.float32) for seed in seeds}
    actions = {seed: [] for seed in seeds}
    for seed in seeds:
        parts.reset(seed, slot=seed)
        assert parts.observe(state[seed], slot=seed)  # nothing is planned yet
    while any(len(taken) < steps for taken in actions.values()):
        parts.plan(seeds)
        for seed in seeds:
            due = False
            while not due:
                action = parts.next_action(seed)
                actions[seed].append(action)
                state[seed] = np.float32(0.9) * state[seed] + np.float32(0.1) * np.array([*action, action[0]])
                due = parts.observe(state[seed], slot=seed)
                assert due == (len(actions[seed]) % 3 == 0)
    for seed in seeds:
        assert np.array_equal(np.stack(actions[seed])[:steps], whole[seed])


def test_planning_leaves_chunks_alone_that_are_not_used_up():
    policy = FakePolicy()
    controller = controller_of(policy, execution_horizon=2, plan_batch=8)
    for slot in "ab":
        controller.reset(seed=0, slot=slot)
        controller.observe(vector(0), slot)
    controller.plan("a")
    assert controller.next_action("a").item() == 0
    controller.observe(vector(1), "a")
    controller.plan("ab")
    assert len(policy.calls) == 2
    assert [round(controller.next_action(slot).item()) % 100 for slot in "ab"] == [1, 0]
    controller.plan([])
    assert len(policy.calls) == 2
    with pytest.raises(ValueError, match="slot 'c' has no episode: call reset"):
        controller.observe(vector(0), "c")


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution_horizon", [0, -1, 9])
def test_an_execution_horizon_outside_the_chunk_is_refused(execution_horizon):
    with pytest.raises(ValueError, match=rf"execution_horizon must be within 1\.\.8; got {execution_horizon}"):
        controller_of(FakePolicy(), execution_horizon=execution_horizon)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"within 1\.\.100 .*got 101"):
        controller_of(FakePolicy(), sampler=Sampler(ddim_steps=101))
    with pytest.raises(ValueError, match=r"controller\.candidates must be 1 or more; got 0"):
        ControllerSettings(candidates=0)
    with pytest.raises(ValueError, match="plan_batch must be 1 or more; got 0"):
        controller_of(FakePolicy(), plan_batch=0)


def test_acting_without_reset_is_refused_and_changes_nothing():
    policy = FakePolicy(obs_horizon=3)
    controller = controller_of(policy, execution_horizon=1)
    with pytest.raises(ValueError, match="slot 0 has no episode: call reset"):
        controller.act(vector(0))
    controller.reset(seed=0, slot="a")
    controller.act_many({"a": vector(0)})
    with pytest.raises(ValueError, match="slot 'b' has no episode: call reset"):
        controller.act_many({"a": vector(9), "b": vector(9)})
    controller.act_many({"a": vector(1)})
    assert policy.calls[-1].observations["state"][0, :, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({"stat": vector(0)}, r"\['state'\].*\['stat'\]"),
        ({"state": vector(0), "image": vector(0)}, r"\['state'\].*\['image', 'state'\]"),
        (np.zeros(4, np.float32), r"'state'.*shape"),
        (np.zeros((1, 3), np.float32), r"'state'.*shape"),
        (np.array([0, np.nan, 0], np.float32), r"'state' must hold finite numbers; got nan at \[1\]"),
        (np.array([0, 0, -np.inf], np.float32), r"'state' must hold finite numbers; got -inf at \[2\]"),
        (np.array([0, None, 0]), r"'state' must hold numbers; got an array of object"),
        (np.array([0, 0, 1j]), r"'state' must hold numbers; got an array of complex128"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused_by_name_at_any_step(observation, message, later):
    controller = controller_of(real_policy("modulated_mlp"), execution_horizon=1)
    controller.reset(seed=0)
    if later:
        controller.act(vector(0))
    with pytest.raises(ValueError, match=message):
        controller.act(observation)


def test_actions_that_are_not_finite_are_those_of_a_training_that_diverged():
    policy = real_policy("modulated_mlp")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1e30)
    controller = controller_of(policy, execution_horizon=1)
    controller.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions are not finite, because its training diverged: train again with a"):
        controller.act(vector(1))


def test_a_plan_that_failed_is_made_again_at_the_next_control_step():
    numbers = []

    def plans(requests):
        if not requests:
            return []
        numbers.append(requests[0].number)
        if len(numbers) in (1, 3):
            raise ValueError("not finite")
        return [np.full((8, 2), numbers[-1] + 1.0, np.float32)]

    controller = controller_of(real_policy("modulated_mlp"), execution_horizon=2, plans=plans)
    controller.reset(seed=0)
    taken = []
    for failing in (True, False, False, True, False):
        if failing:
            with pytest.raises(ValueError, match="not finite"):
                controller.act(vector(0))
        else:
            taken.append(controller.act(vector(0))[0])
    assert numbers == [0, 0, 1, 1]
    assert taken == [1, 1, 2]
    assert controller.late_steps() == 0


def test_a_refused_observation_leaves_no_trace():
    policy = real_policy("modulated_mlp")

    def actions(broken_at):
        controller = controller_of(policy, execution_horizon=2)
        controller.reset(seed=0)
        taken = []
        for step in range(7):
            if step in broken_at:
                with pytest.raises(ValueError, match="finite"):
                    controller.act(vector(np.nan))
            taken.append(controller.act(vector(step)))
        return np.stack(taken)

    assert np.array_equal(actions(broken_at=()), actions(broken_at=(0, 1, 4)))


def test_a_delay_that_no_chunk_outlasts_and_unknown_names_are_refused():
    for mode in ("asynchronous", "continuous"):
        with pytest.raises(ValueError, match=r"controller.delay_steps must be below the 8 actions of a chunk.*got 8"):
            controller_of(FakePolicy(), settings=ControllerSettings(mode=mode, delay_steps=8))
    controller_of(FakePolicy(), settings=ControllerSettings(delay_steps=8))  # it just waits
    with pytest.raises(ValueError, match=r"controller.delay_steps must be 0 or more; got -1"):
        ControllerSettings(delay_steps=-1)
    with pytest.raises(ValueError, match=r"unknown controller.mode 'continous' \(did you mean 'continuous'\?\)"):
        ControllerSettings(mode="continous")
    with pytest.raises(ValueError, match=r"unknown controller.late 'stop'"):
        ControllerSettings(late="stop")


# --- seeds -------------------------------------------------------------------------------------------------------


def test_derived_seeds_are_fixed_and_all_different():
    seeds = {(a, b): derive_seed(a, b) for a in range(60) for b in range(60)}
    assert len(set(seeds.values())) == 3600
    assert all(0 <= seed < 2**64 for seed in seeds.values())
    # Changing these would change every recorded figure.
    assert derive_seed(0, 0) == np.random.SeedSequence((0, 0)).generate_state(1, np.uint64)[0]
    assert seeds[0, 1] != seeds[1, 0]
    assert derive_seed(1) != derive_seed(1, 1)


def test_first_draws_of_neighbouring_seeds_are_uncorrelated():
    draws = np.array([[torch.randn(1, generator=derive_generator(s, n)).item() for n in range(2)] for s in range(1500)])
    assert abs(draws.mean()) < 5 / np.sqrt(draws.size)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 5 / np.sqrt(1500)
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 5 / np.sqrt(1499)


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seed must be 0 or more; got -1"):
        derive_generator(-1, 0)


@settings(deadline=None)
@given(
    mode=st.sampled_from(["synchronous", "asynchronous", "continuous"]),
    action_horizon=st.integers(1, 10),
    data=st.data(),
)
def test_the_settings_know_when_an_episode_plans_and_what_is_left_of_the_last_plan(mode, action_horizon, data):
    """The cost of a cell follows from them; against the plans of an episode itself."""
    horizon = data.draw(st.integers(1, action_horizon), "execution_horizon")
    delay = data.draw(st.integers(0, action_horizon - 1), "delay_steps")
    chosen = ControllerSettings(mode=mode, delay_steps=delay, candidates=3)
    timeline, begun, left = Timeline(chosen, horizon, action_horizon, 1), [], []
    for step in range(100):
        if timeline.due(delay):
            last = timeline.begin(delay)
            begun.append(step)
            left += [last.overlap] if last else []
            timeline.deliver(np.zeros((action_horizon, 1), np.float32), delay)
        timeline.next_action()
    # The first plan takes no time.
    assert set(np.diff(begun[1:])) == {chosen.steps_per_plan(horizon, action_horizon)}
    assert set(left[1:]) == {action_horizon - chosen.begins_after(horizon, action_horizon)}
    assert chosen.candidates_of(horizon, action_horizon) == (3 if left[-1] else 1)
