"""Training windows: inside their episodes, complete, and in an order without state."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy.data.demonstrations import Demonstrations
from policy.data.windows import Windows, split_episodes


def demonstrations(lengths):
    """The observation and the action of transition t in episode e both contain (e, t)."""
    rows = [(e, t) for e, length in enumerate(lengths) for t in range(length)]
    names = np.array(rows, dtype=np.float32)
    return Demonstrations(
        observations={"state": names, "image": np.array(rows, dtype=np.uint8)[:, None, :] + 100},
        actions=names + 1000,
        episode_ends=np.cumsum(lengths),
    )


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    episodes = draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    return lengths, sorted(episodes), draw(st.integers(1, 5)), draw(st.integers(1, 10))


def windows_of(case):
    lengths, episodes, obs_horizon, action_horizon = case
    return Windows(demonstrations(lengths), np.array(episodes), obs_horizon=obs_horizon, action_horizon=action_horizon)


def naive(case):
    """Every window, transition by transition."""
    lengths, episodes, obs_horizon, action_horizon = case
    for e in episodes:
        for t in range(lengths[e]):
            past = [(e, max(0, t + i)) for i in range(1 - obs_horizon, 1)]
            future = [(e, min(lengths[e] - 1, t + i)) for i in range(action_horizon)]
            yield past, future, [t + i < lengths[e] for i in range(action_horizon)]


@settings(deadline=None)
@given(case=cases())
def test_windows_equal_a_plain_loop(case):
    windows, reference = windows_of(case), list(naive(case))
    assert len(windows) == len(reference) == sum(case[0][e] for e in case[1])
    batch = windows.gather(np.arange(len(windows)))
    assert batch["observations"]["state"].tolist() == [[list(o) for o in past] for past, _, _ in reference]
    assert (batch["actions"] - 1000).tolist() == [[list(a) for a in future] for _, future, _ in reference]
    assert batch["mask"].tolist() == [mask for _, _, mask in reference]
    images = batch["observations"]["image"]
    assert images.shape == (len(windows), case[2], 1, 2)
    assert torch.equal(images[:, :, 0].float() - 100, batch["observations"]["state"])


def test_past_actions_stand_before_the_chunk_and_are_masked_before_the_start():
    windows = Windows(demonstrations([3, 2]), np.array([0, 1]), obs_horizon=1, action_horizon=2, past_actions=2)
    batch = windows.gather(np.array([0, 1, 2, 3]))
    assert batch["actions"][..., 1].int().sub(1000).tolist() == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 2], [0, 0, 0, 1]]
    assert batch["actions"][..., 0].int().sub(1000).tolist() == [[0] * 4] * 3 + [[1] * 4]
    assert batch["mask"].int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1]]


@settings(deadline=None)
@given(case=cases())
def test_windows_stay_inside_their_episode_and_none_is_left_out(case):
    lengths, episodes, _, action_horizon = case
    windows = windows_of(case)
    batch = windows.gather(np.arange(len(windows)))
    seen, done = batch["observations"]["state"], batch["actions"] - 1000
    episode = seen[:, -1, 0]
    assert (seen[:, :, 0] == episode[:, None]).all()
    assert (done[:, :, 0] == episode[:, None]).all()
    # The first action belongs to the newest observation.
    assert torch.equal(done[:, 0], seen[:, -1])
    assert batch["mask"][:, 0].all()
    assert {(int(e), int(t)) for e, t in seen[:, -1]} == {(e, t) for e in episodes for t in range(lengths[e])}
    for e in episodes:
        last = (episode == e) & (seen[:, -1, 1] == lengths[e] - 1)
        assert batch["mask"][last].tolist() == [[True] + [False] * (action_horizon - 1)]
    # The last action is repeated after the end, and the first observation before the start.
    ends = torch.tensor(lengths)[episode.long()] - 1
    assert (done[:, :, 1] == torch.minimum(seen[:, -1:, 1] + torch.arange(action_horizon), ends[:, None])).all()


@settings(deadline=None)
@given(case=cases(), seed=st.integers(0, 100))
def test_a_window_is_the_same_in_any_batch(case, seed):
    windows = windows_of(case)
    everything = windows.gather(np.arange(len(windows)))
    chosen = np.random.default_rng(seed).integers(len(windows), size=7)
    batch = windows.gather(chosen)
    assert torch.equal(batch["observations"]["state"], everything["observations"]["state"][chosen])
    assert torch.equal(batch["actions"], everything["actions"][chosen])
    assert torch.equal(batch["mask"], everything["mask"][chosen])


def test_batches_keep_the_datas_dtypes_and_are_copies():
    data = demonstrations([4, 3])
    windows = Windows(data, np.array([0, 1]), obs_horizon=2, action_horizon=3)
    batch = windows.gather(np.array([0, 5]))
    assert batch["observations"]["image"].dtype == torch.uint8
    assert batch["observations"]["state"].dtype == batch["actions"].dtype == torch.float32
    assert batch["mask"].dtype == torch.bool
    before = data.actions.copy()
    batch["actions"].zero_()
    assert np.array_equal(data.actions, before)


# --- the order ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(case=cases(), batch_size=st.integers(1, 12), seed=st.integers(0, 2**32), first_epoch=st.integers(0, 3))
def test_an_epoch_visits_each_window_once_up_to_the_incomplete_batch(case, batch_size, seed, first_epoch):
    windows = windows_of(case)
    size = min(batch_size, len(windows))
    steps = len(windows) // size
    for epoch in (first_epoch, first_epoch + 1):
        batches = [windows.batch_at(epoch * steps + i, batch_size, seed) for i in range(steps)]
        assert all(len(batch) == size and batch.dtype == np.int64 for batch in batches)
        visited = np.concatenate(batches)
        assert len(set(visited.tolist())) == len(visited) == steps * size > len(windows) - size
        assert set(visited.tolist()) <= set(range(len(windows)))


@settings(deadline=None)
@given(
    case=cases(), batch_size=st.integers(1, 12), seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)), data=st.data()
)
def test_the_order_has_no_state(case, batch_size, seeds, data):
    calls = [(step, seed) for step in range(12) for seed in seeds]
    fresh = {call: windows_of(case).batch_at(call[0], batch_size, call[1]).tolist() for call in calls}
    windows = windows_of(case)
    for step, seed in data.draw(st.permutations(calls)):
        assert windows.batch_at(step, batch_size, seed).tolist() == fresh[step, seed]


def test_epochs_and_seeds_have_different_orders():
    windows = windows_of(([50, 50], [0, 1], 2, 8))
    orders = [
        np.concatenate([windows.batch_at(4 * epoch + i, 25, seed) for i in range(4)]).tolist()
        for epoch, seed in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    ]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert list(range(100)) not in orders


def test_over_many_epochs_incomplete_batches_leave_no_window_out():
    windows = windows_of(([7], [0], 1, 2))
    visits = np.bincount(np.concatenate([windows.batch_at(step, 4, 0) for step in range(400)]), minlength=7)
    assert visits.sum() == 1600
    assert visits.min() > 0.8 * 1600 / 7


def test_changing_a_batch_in_place_does_not_change_later_ones():
    windows = windows_of(([9], [0], 1, 2))
    expected = windows.batch_at(0, 4, 0).tolist()
    windows.batch_at(0, 4, 0)[:] = 0
    assert windows.batch_at(0, 4, 0).tolist() == expected


# --- the split ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(num_episodes=st.integers(1, 300), val_fraction=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 2**32))
def test_the_split_is_disjoint_complete_and_repeatable(num_episodes, val_fraction, seed):
    train, val = split_episodes(np.arange(num_episodes), val_fraction, seed)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(num_episodes))
    assert train.tolist() == sorted(train.tolist())
    assert val.tolist() == sorted(val.tolist())
    assert len(train) >= 1
    assert len(val) == min(round(num_episodes * val_fraction), num_episodes - 1)
    again = split_episodes(np.arange(num_episodes), val_fraction, seed)
    assert np.array_equal(train, again[0])
    assert np.array_equal(val, again[1])


@settings(deadline=None)
@given(
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    val_fraction=st.floats(0, 1, exclude_max=True),
    aside=st.booleans(),
)
def test_what_was_made_from_an_episode_is_trained_on_only_if_the_episode_is(parts, val_fraction, aside):
    """The split of the recorded episodes is the one without further demonstrations."""
    firsts = np.cumsum([0, *parts[:-1]])
    originals = np.repeat(firsts, parts)
    held_out = firsts[1::3].tolist() if aside else []
    train, val = split_episodes(originals, val_fraction, 0, held_out)
    among = [firsts.tolist().index(number) for number in held_out]
    plain_train, plain_val = split_episodes(np.arange(len(parts)), val_fraction, 0, among)
    assert val.tolist() == firsts[plain_val].tolist()
    assert train.tolist() == [n for n in range(len(originals)) if originals[n] in firsts[plain_train]]


def test_the_seed_decides_the_split():
    splits = {tuple(split_episodes(np.arange(50), 0.2, seed)[1].tolist()) for seed in range(10)}
    assert len(splits) == 10


@pytest.mark.parametrize("val_fraction", [-0.1, 1.0, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(val_fraction):
    with pytest.raises(ValueError, match="val_fraction must be at least 0 and below 1; got"):
        split_episodes(np.arange(10), val_fraction, 0)


def test_training_and_validation_windows_share_no_transition():
    data = demonstrations([5, 3, 8, 1, 6])
    seen = []
    for episodes in split_episodes(np.arange(5), 0.4, seed=3):
        windows = Windows(data, episodes, obs_horizon=3, action_horizon=8)
        batch = windows.gather(np.arange(len(windows)))
        rows = torch.cat([batch["observations"]["state"].flatten(0, 1), batch["actions"].flatten(0, 1) - 1000])
        seen.append({tuple(row) for row in rows.tolist()})
    assert seen[0].isdisjoint(seen[1])
    assert len(seen[0] | seen[1]) == 23


# --- demonstrations ----------------------------------------------------------------------------------------------


def test_starts_follow_from_ends():
    data = demonstrations([4, 1, 3])
    assert data.num_episodes == 3
    assert data.episode_starts.tolist() == [0, 4, 5]
    assert data.observation_shapes == {"state": (2,), "image": (1, 2)}


@pytest.mark.parametrize("ends", [[], [0, 5], [3, 3, 5], [4, 3, 5], [3], [3, 6]])
def test_ends_that_do_not_cut_the_transitions_into_episodes_are_refused(ends):
    with pytest.raises(ValueError, match="memory: the ends of"):
        Demonstrations(
            observations={"state": np.zeros((5, 2))},
            actions=np.zeros((5, 1), np.float32),
            episode_ends=np.array(ends, dtype=np.int64),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.zeros(5, np.float32)}, r"actions must be \(transitions, width\); got shape \(5,\)"),
        ({"observations": {"state": np.zeros((4, 2))}}, "observation 'state' has 4 rows, actions have 5"),
    ],
)
def test_arrays_of_other_shapes_are_refused(changes, message):
    arguments = {
        "observations": {"state": np.zeros((5, 2))},
        "actions": np.zeros((5, 1), np.float32),
        "episode_ends": np.array([2, 5]),
    }
    with pytest.raises(ValueError, match=message):
        Demonstrations(**{**arguments, **changes})


def test_episodes_are_named_by_number_unless_the_file_names_them():
    assert list(demonstrations([4, 1, 3]).episode_names) == ["0", "1", "2"]
    assert demonstrations([4, 1, 3]).episode_lengths.tolist() == [4, 1, 3]


# --- a symmetry of the task, padding, blocks ---------------------------------------------------------------------


def negated(observations, actions):
    return {key: (255 - v if v.dtype == np.uint8 else -v) for key, v in observations.items()}, -actions


def negated_in_place(observations, actions):
    flipped, actions[:] = negated(observations, actions)
    for key, values in flipped.items():
        observations[key][:] = values
    return observations, actions


def with_symmetry(case, augment=negated, **settings):
    lengths, episodes, obs_horizon, action_horizon = case
    return Windows(
        demonstrations(lengths),
        np.array(episodes),
        obs_horizon=obs_horizon,
        action_horizon=action_horizon,
        augment=augment,
        **settings,
    )


@settings(deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
def test_each_window_has_one_counterpart_under_a_symmetry(case, seed):
    plain, doubled = windows_of(case), with_symmetry(case)
    assert len(doubled) == 2 * len(plain)
    order = np.random.default_rng(seed).permutation(len(doubled))
    batch, originals = doubled.gather(order), plain.gather(order % len(plain))
    flipped = torch.from_numpy(order >= len(plain))
    sign = torch.where(flipped, -1.0, 1.0)[:, None, None]
    assert torch.equal(batch["actions"], sign * originals["actions"])
    assert torch.equal(batch["observations"]["state"], sign * originals["observations"]["state"])
    images = originals["observations"]["image"]
    assert torch.equal(batch["observations"]["image"], torch.where(flipped[:, None, None, None], 255 - images, images))
    assert torch.equal(batch["mask"], originals["mask"])


def test_a_batch_without_counterparts_asks_nothing_of_the_symmetry():
    def shaped(observations, actions):
        return negated(observations, actions.reshape(len(actions), -1))  # fails without rows

    windows = Windows(demonstrations([5, 4]), np.arange(2), obs_horizon=2, action_horizon=3, augment=shaped)
    plain = Windows(demonstrations([5, 4]), np.arange(2), obs_horizon=2, action_horizon=3)
    assert torch.equal(windows.gather(np.arange(9))["actions"], plain.gather(np.arange(9))["actions"])


@settings(deadline=None)
@given(case=cases())
def test_windows_can_show_some_of_their_observations_alone(case):
    whole, shown = with_symmetry(case), with_symmetry(case).showing(["state"])
    assert 2 * len(shown) == len(whole)
    numbers = np.arange(len(shown))
    batch, expected = shown.gather(numbers), whole.gather(numbers)
    assert batch["observations"].keys() == {"state"}
    assert torch.equal(batch["observations"]["state"], expected["observations"]["state"])
    assert torch.equal(batch["actions"], expected["actions"])


@settings(deadline=None)
@given(case=cases())
def test_the_mask_can_be_left_off(case):
    lengths, episodes, obs_horizon, action_horizon = case
    windows = Windows(
        demonstrations(lengths),
        np.array(episodes),
        obs_horizon=obs_horizon,
        action_horizon=action_horizon,
        mask_padding=False,
    )
    everything = np.arange(len(windows))
    assert bool(windows.gather(everything)["mask"].all())
    assert torch.equal(windows.gather(everything)["actions"], windows_of(case).gather(everything)["actions"])


@pytest.mark.parametrize("block_rows", [1, 3, 1000])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_blocks_hold_each_transition_of_the_episodes_once(block_rows, case, monkeypatch):
    monkeypatch.setattr("policy.data.windows.BLOCK_ROWS", block_rows)
    blocks = list(windows_of(case).blocks())
    assert max(len(actions) for _, actions in blocks) <= block_rows
    rows = [tuple(row) for observations, _ in blocks for row in observations["state"].tolist()]
    assert rows == [(e, t) for e in case[1] for t in range(case[0][e])]
    assert [tuple(row) for _, actions in blocks for row in (actions - 1000).tolist()] == rows
    for augment in (negated, negated_in_place):
        windows = with_symmetry(case, augment)
        doubled = [tuple(row) for observations, _ in windows.blocks() for row in observations["state"].tolist()]
        assert sorted(doubled) == sorted([*rows, *((-e, -t) for e, t in rows)])
        unchanged = demonstrations(case[0]).observations["state"]
        assert np.array_equal(windows.demonstrations.observations["state"], unchanged)


def test_episodes_that_the_file_sets_aside_are_the_validation_episodes():
    training, validation = split_episodes(np.arange(6), 0.5, seed=0, held_out=[4, 1])
    assert (training.tolist(), validation.tolist()) == ([0, 2, 3, 5], [1, 4])
    with pytest.raises(ValueError, match="all 3 episodes are set aside"):
        split_episodes(np.arange(3), 0.5, seed=0, held_out=[0, 1, 2])


def test_a_large_data_set_costs_memory_by_episode_not_by_window():
    data = Demonstrations(
        observations={"state": np.zeros((10_000_000, 2), np.float32)},
        actions=np.zeros((10_000_000, 1), np.float32),
        episode_ends=np.arange(1, 501) * 20_000,
    )
    tracemalloc.start()
    windows = Windows(data, np.arange(500), obs_horizon=2, action_horizon=8)
    windows.gather(np.array([0, 9_999_999]))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert len(windows) == 10_000_000
