"""How much of an error a policy corrects, on policies whose answer to an error is known."""

import dataclasses

import numpy as np
import pytest
import torch

from policy.data.corrections import find_corrections
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.model.diffusion_policy import DiffusionPolicy
from policy.training import recovery
from policy.training.recovery import Recovery, describe_recoveries, measure_recoveries, recoveries
from policy.training.settings import TrainSettings
from tests.data.test_corrections import GAINS, HAND, JOINTS, OBJECT, WIDTH, arm
from tests.training.test_corrective_noise import CONFIG as ARM

CONFIG = dataclasses.replace(ARM, obs_horizon=1)


@pytest.fixture(scope="module")
def demonstrations():
    return arm()


@pytest.fixture(scope="module")
def corrections(demonstrations):
    return find_corrections(demonstrations, np.arange(30), ["state"], action_horizon=8)


class Program:
    """Corrects a share of where each joint is off zero within the chunk, in equal parts, whatever else it sees."""

    def __init__(self, shares):
        self.shares, self.seen = torch.tensor(shares), []

    def sample_actions(self, observations, *, generator):
        state = observations["state"][:, -1]
        self.seen.append(state)
        each = -self.shares * state[:, JOINTS] / torch.tensor(GAINS) / 8
        return torch.cat([each, torch.zeros(len(each), 1)], dim=1)[:, None].expand(-1, 8, -1)


def test_the_share_of_an_error_that_is_corrected_is_measured(demonstrations, corrections, monkeypatch):
    program = Program([0.75, 0.05])
    monkeypatch.setattr(recovery, "compile_sampler", lambda *_, **__: program)
    windows = Windows(demonstrations, np.arange(30), obs_horizon=1, action_horizon=8)
    found = recoveries(DiffusionPolicy(CONFIG), windows, corrections, Sampler())
    assert [one.number for one in found] == ["state[0]", "state[1]"]
    np.testing.assert_allclose([one.corrected for one in found], [0.75, 0.05], atol=0.01)
    there, back = program.seen[0], program.seen[1]  # the first joint was moved to both sides, and what it moves with it
    assert (there[:, 0] > back[:, 0]).all()
    torch.testing.assert_close(there[:, 1], back[:, 1])
    assert (there[:, HAND] != back[:, HAND]).any()
    assert (there[:, OBJECT] != back[:, OBJECT]).any()  # where it is held


def test_without_windows_in_which_the_robot_could_be_elsewhere_there_is_nothing_to_measure(demonstrations, corrections):
    unknown = dataclasses.replace(corrections, held=np.full_like(corrections.held, -1))
    windows = Windows(demonstrations, np.arange(30), obs_horizon=1, action_horizon=8)
    assert recoveries(DiffusionPolicy(CONFIG), windows, unknown, Sampler()) == []


def test_what_is_hardly_corrected_comes_with_what_to_do():
    found = [Recovery("state[0]", 0.62), Recovery("state[5]", 0.034), Recovery("state[6]", -0.001)]
    sentence = (
        "of an error in where the robot is, one chunk corrects state[0] 62%, state[5] 3%, state[6] 0%; it hardly"
        " corrects state[5], state[6]"
    )
    advised = f"{sentence}: train with train.corrective_noise=0.5 train.action_weights=spread"
    assert describe_recoveries(found, {}, []) == advised  # of before there were these settings
    assert describe_recoveries(found, vars(TrainSettings()), []) == advised
    weighted = vars(TrainSettings(action_weights="spread"))
    assert describe_recoveries(found, weighted, []) == f"{sentence}: train with train.corrective_noise=0.5"
    assert describe_recoveries(found, {**weighted, "corrective_noise": 0.3}, []) == sentence
    rollouts = [{"step": 1, "rollout/success_rate": 1.0}, {"step": 2, "rollout/success_rate": 0.8}, {"step": 3}]
    assert describe_recoveries(found, {}, rollouts) == advised
    assert describe_recoveries(found, {}, rollouts[:1]) == sentence.partition(";")[0]
    one = describe_recoveries(found[:1], {}, [])
    assert one == "of an error in where the robot is, one chunk corrects state[0] 62%"


def test_what_a_policy_does_not_act_on_or_see_is_not_measured(demonstrations):
    policy = DiffusionPolicy(CONFIG)
    windows = Windows(demonstrations, np.arange(30), obs_horizon=1, action_horizon=8)
    assert len(measure_recoveries(policy, windows, Sampler())) == 2
    other = DiffusionPolicy(dataclasses.replace(CONFIG, action_dim=2))
    assert measure_recoveries(other, windows, Sampler()) == []
    pictures = {"state": (WIDTH,), "front": (16, 16, 3)}
    encoder = {"name": "image", "channels": (16,)}
    seeing = DiffusionPolicy(dataclasses.replace(CONFIG, observation_shapes=pictures, encoder=encoder))
    assert measure_recoveries(seeing, windows, Sampler()) == []
    places = demonstrations.observations["state"][:, :2]
    absolute = dataclasses.replace(demonstrations, actions=np.column_stack([places, places[:, 0]]))
    there = Windows(absolute, np.arange(30), obs_horizon=1, action_horizon=8)
    assert measure_recoveries(policy, there, Sampler()) == []
