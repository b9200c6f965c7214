"""Numbers that a policy knows its demonstrations by, on policies of which that is known."""

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.data.demonstrations import Demonstrations
from policy.data.windows import Windows
from policy.training import by_heart
from policy.training.by_heart import describe_by_heart, known_by_heart

EPISODES, LENGTH, TRAINING = 100, 10, 60
# Places in the state: where the hand is to go, where it is, where an unused thing lies, and which side of a coin is up.
GOAL, HAND, THING, COIN = range(4)
CONFIG = PolicyConfig(observation_shapes={"state": (4,)}, action_dim=1, obs_horizon=1)


@pytest.fixture(scope="module")
def demonstrations():
    """Actions that lead to the goal, with what each demonstrator happened to add, and noise."""
    random = np.random.default_rng(0)
    put = random.uniform(-1, 1, size=(EPISODES, 2))
    coin = random.choice([-1, 1], size=(EPISODES, 1))
    added = random.normal(scale=0.3, size=EPISODES)
    hand = random.uniform(-1, 1, size=(EPISODES, LENGTH, 1))
    goal, thing, coin = (values[:, None].repeat(LENGTH, axis=1) for values in (put[:, :1], put[:, 1:], coin))
    state = np.concatenate([goal, hand, thing, coin], axis=2)
    actions = state[..., GOAL] + added[:, None] + random.normal(scale=0.3, size=(EPISODES, LENGTH))
    return Demonstrations(
        observations={"state": state.reshape(-1, 4).astype(np.float32)},
        actions=actions.reshape(-1, 1).astype(np.float32),
        episode_ends=np.arange(1, EPISODES + 1) * LENGTH,
    )


class Knows:
    """Goes to the goal, and adds what was added in the training episode in which the unused thing lay nearest."""

    config = CONFIG

    def __init__(self, demonstrations):
        rows = slice(0, TRAINING * LENGTH, LENGTH)
        state = demonstrations.observations["state"]
        self.things = torch.from_numpy(state[rows, THING])
        means = demonstrations.actions[: TRAINING * LENGTH, 0].reshape(TRAINING, LENGTH).mean(axis=1)
        self.added = torch.from_numpy(means - state[rows, GOAL])

    def sample_actions(self, observations, *, generator):
        state = observations["state"][:, -1]
        nearest = (state[:, THING, None] - self.things).abs().argmin(dim=1)
        action = state[:, GOAL] + self.added[nearest] + 0.2 * state[:, COIN]
        return action[:, None, None].expand(-1, CONFIG.action_horizon, 1)


def _found(demonstrations, monkeypatch, config=CONFIG, held_out=range(TRAINING, EPISODES)):
    monkeypatch.setattr(by_heart, "compile_sampler", lambda *_, **__: Knows(demonstrations))
    training, validation = (
        Windows(demonstrations, np.array(episodes), obs_horizon=1, action_horizon=CONFIG.action_horizon)
        for episodes in (range(TRAINING), held_out)
    )
    return known_by_heart(DiffusionPolicy(config), training, validation, Sampler())


def test_what_only_tells_training_episodes_apart_is_found(demonstrations, monkeypatch):
    """The goal helps on held-out episodes, too; the hand moves; a coin has two sides only."""
    monkeypatch.setattr(by_heart, "EPISODES", EPISODES)
    assert _found(demonstrations, monkeypatch) == [THING]


def test_what_is_ignored_is_not_found(demonstrations, monkeypatch):
    config = PolicyConfig(observation_shapes={"state": (4,)}, action_dim=1, obs_horizon=1, ignored=(THING,))
    assert _found(demonstrations, monkeypatch, config) == []


def test_nothing_is_told_of_few_held_out_episodes(demonstrations, monkeypatch):
    assert _found(demonstrations, monkeypatch, held_out=range(TRAINING, TRAINING + by_heart.FEW - 1)) == []


def test_what_a_difference_shows_is_left_alone(demonstrations, monkeypatch):
    config = PolicyConfig(observation_shapes={"state": (4,)}, action_dim=1, obs_horizon=1, differences=((HAND, THING),))
    assert _found(demonstrations, monkeypatch, config) == []


def test_the_neighbours_of_what_a_difference_shows_are_left_alone(demonstrations, monkeypatch):
    """Where a drawer is to the left and to the right belongs to where it is in front, which a difference shows."""
    state = demonstrations.observations["state"][:, [HAND, THING, GOAL, COIN]].copy()
    beside = Demonstrations(
        observations={"state": state}, actions=demonstrations.actions, episode_ends=demonstrations.episode_ends
    )
    training = Windows(beside, np.arange(TRAINING), obs_horizon=1, action_horizon=CONFIG.action_horizon)
    apart = PolicyConfig(observation_shapes={"state": (4,)}, action_dim=1, obs_horizon=1, differences=((0, 1),))
    assert by_heart._things(CONFIG, training)[1] == [[1, 2]]
    assert by_heart._things(apart, training)[1] == []


def test_data_with_other_actions_tell_nothing(demonstrations, monkeypatch):
    config = PolicyConfig(observation_shapes={"state": (4,)}, action_dim=2, obs_horizon=1)
    assert _found(demonstrations, monkeypatch, config) == []


@pytest.mark.parametrize(("ignored", "advised"), [((), "ignored=[2]"), ((0,), "ignored=[0,2]")])
def test_the_sentence_says_what_to_try(ignored, advised):
    config = PolicyConfig(observation_shapes={"state": (4,)}, action_dim=1, ignored=ignored)
    said = describe_by_heart([THING], config)
    assert said.startswith("it tells training episodes apart by state[2], which stay put")
    assert said.endswith(f"try a new training with {advised}, or record more demonstrations")
