"""How much of an error a policy corrects, on policies whose answer to an error is known."""

import dataclasses

import numpy as np
import pytest
import torch

from policy.data.corrections import find_corrections
from policy.data.windows import Windows
from policy.diffusion.sampler import Sampler
from policy.model.diffusion_policy import DiffusionPolicy
from policy.statistics.fit import HELD_OUT, TRAINING
from policy.training import recovery
from policy.training.recovery import (
    Recoveries,
    Recovery,
    RecoveryMeter,
    describe_recoveries,
    recoveries,
    recoveries_in,
)
from policy.training.settings import TrainSettings
from tests.data.test_corrections import GAINS, HAND, JOINTS, OBJECT, VELOCITIES, WIDTH, arm, armed
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
    assert [one.number for one in found.numbers] == ["state[0]", "state[1]"]
    np.testing.assert_allclose([one.corrected for one in found.numbers], [0.75, 0.05], atol=0.01)
    assert found.stalls is None  # this arm's velocities are noise
    there, back = program.seen[0], program.seen[1]  # the first joint was moved to both sides, and what it moves with it
    assert (there[:, 0] > back[:, 0]).all()
    torch.testing.assert_close(there[:, 1], back[:, 1])
    assert (there[:, HAND] != back[:, HAND]).any()
    assert (there[:, OBJECT] != back[:, OBJECT]).any()  # where it is held


@pytest.mark.parametrize(("share", "slow", "stalls"), [(1.2, 1, 1.0), (0.8, 1, 0.0), (0.0, 1, 0.0), (1.2, 0.01, None)])
def test_a_policy_that_goes_on_at_the_speed_it_sees_stalls(monkeypatch, share, slow, stalls):
    """The chunk follows the observed speed by a share, for the rest it goes as ever; what hardly moves cannot stall."""
    seen = armed()
    corrections = find_corrections(seen, np.arange(30), ["state"], action_horizon=8)
    usual = []

    class Follows:
        def sample_actions(self, observations, *, generator):
            speed = observations["state"][:, -1, VELOCITIES] / 10 / torch.tensor(GAINS)
            if not usual:
                usual.append(speed)  # of the first call: the robot is moved, and its speed is not
            each = slow * (share * speed + (1 - share) * usual[0])
            return torch.cat([each, torch.zeros(len(each), 1)], dim=1)[:, None].expand(-1, 8, -1)

    monkeypatch.setattr(recovery, "compile_sampler", lambda *_, **__: Follows())
    windows = Windows(seen, np.arange(30), obs_horizon=1, action_horizon=8)
    policy = DiffusionPolicy(dataclasses.replace(CONFIG, observation_shapes={"state": (WIDTH + 1,)}))
    assert recoveries(policy, windows, corrections, Sampler()).stalls == stalls


@pytest.mark.parametrize(
    ("training", "held_out", "advised"),
    [
        (0.5, 0.5, "; a new training with train.steps=24000 may correct more"),
        (0.2, 0.5, ""),  # over-fitted
        (0.5, 0.05, ""),  # precise
    ],
)
def test_what_is_hardly_corrected_for_all_settings_asks_for_a_longer_training(training, held_out, advised):
    corrected = {"recovery/state[0]": 0.62, "recovery/state[5]": 0.13}
    errors = {"fit/error": held_out, "fit/ratio": held_out / training}
    ends = {f"{name}_{end}": value for name, value in errors.items() for end in ("low", "high")}
    measured = {TRAINING: training, HELD_OUT: held_out, "fit/episodes": 40, **errors, **ends, **corrected}
    history = [{**measured, "step": 6000}, {**measured, "step": 12000}]
    settings = {"steps": 12000, "corrective_noise": 0.3, "action_weights": "spread"}
    assert describe_recoveries(settings, history).endswith(f"it hardly corrects state[5]{advised}")
    assert describe_recoveries({**settings, "corrective_noise": 0.0}, history).endswith("corrective_noise=0.3")
    assert describe_recoveries({**settings, "action_weights": "equal"}, history).endswith("action_weights=spread")
    alike = describe_recoveries({**settings, "action_weights": "equal"}, history, weights_differ=False)
    assert alike.endswith(f"it hardly corrects state[5]{advised}")
    good = [*history[:1], {**history[1], "recovery/state[5]": 0.9}]
    assert describe_recoveries(settings, good).endswith("90%")
    twice = [{**entry, "step": 2 * entry["step"]} for entry in history]
    assert describe_recoveries({**settings, "steps": 24000}, twice).endswith("it hardly corrects state[5]")
    for other in ({"steps": 0}, {"steps": 12001}, {"rectify_steps": 2000}, {"corrective_noise": 0.1}):
        assert describe_recoveries({**settings, **other}, history).endswith("it hardly corrects state[5]")
    assert describe_recoveries(settings, [*history[:1], {**history[1], "train/stalls": 0.2}]).endswith("turn back")


def test_without_windows_in_which_the_robot_could_be_elsewhere_there_is_nothing_to_measure(demonstrations, corrections):
    unknown = dataclasses.replace(corrections, held=np.full_like(corrections.held, -1))
    windows = Windows(demonstrations, np.arange(30), obs_horizon=1, action_horizon=8)
    assert recoveries(DiffusionPolicy(CONFIG), windows, unknown, Sampler()) == Recoveries()


def test_what_is_hardly_corrected_comes_with_what_to_do():
    numbers = [Recovery("state[0]", 0.62), Recovery("state[5]", 0.034), Recovery("state[6]", -0.001)]
    found = [{"step": 0, **Recoveries(numbers, stalls=0.09).metrics()}]
    sentence = (
        "of an error in where the robot is, one chunk corrects state[0] 62%, state[5] 3%, state[6] 0%; it hardly"
        " corrects state[5], state[6]"
    )
    advised = f"{sentence}: train with train.corrective_noise=0.3 train.action_weights=spread"
    assert describe_recoveries({}, found) == advised  # of before there were these settings
    assert describe_recoveries(vars(TrainSettings()), found) == advised
    weighted = vars(TrainSettings(action_weights="spread"))
    assert describe_recoveries(weighted, found) == f"{sentence}: train with train.corrective_noise=0.3"
    assert describe_recoveries({**weighted, "corrective_noise": 0.3}, found) == sentence
    rollouts = [{"step": 1, "rollout/success_rate": 1.0}, {"step": 2, "rollout/success_rate": 0.8}, {"step": 3}]
    assert describe_recoveries({}, found + rollouts) == advised
    assert describe_recoveries({}, found + rollouts[:1]) == sentence.partition(";")[0]
    one = "of an error in where the robot is, one chunk corrects state[0] 62%"
    assert describe_recoveries({}, [Recoveries(numbers[:1]).metrics()]) == one
    stalls = [Recoveries(numbers[:1], stalls=0.19).metrics()]
    sentence = (
        f"{one}; in 19% of the windows in which it moves, seen at half of its speed, the robot would go less than half"
        " as far: where it is slowed down, it may stop or turn back"
    )
    assert describe_recoveries({}, stalls) == f"{sentence}: train with train.corrective_noise=0.3"
    assert describe_recoveries({"corrective_noise": 0.2}, stalls) == sentence
    assert describe_recoveries({}, stalls, privileged=["pose"]) == sentence  # the noise may not be beside them
    assert describe_recoveries({}, rollouts) == ""


def test_what_could_not_be_measured_is_not_told():
    assert describe_recoveries({}, [{"step": 1, "recovery/state[0]": float("nan")}]) == ""


@pytest.mark.parametrize("stalls", [None, 0.25])
def test_a_run_keeps_what_was_measured(stalls):
    found = Recoveries([Recovery("arm/state[0]", 0.62), Recovery("arm/state[5]", -0.1)], stalls)
    assert recoveries_in([{"step": 1000, "recovery/arm/state[0]": 0.1}, {"step": 2000, **found.metrics()}]) == found


def test_what_a_policy_does_not_act_on_or_see_is_not_measured(demonstrations):
    policy = DiffusionPolicy(CONFIG)
    windows = Windows(demonstrations, np.arange(30), obs_horizon=1, action_horizon=8)
    assert len(RecoveryMeter(policy.config, windows, Sampler()).measure(policy).numbers) == 2
    other = DiffusionPolicy(dataclasses.replace(CONFIG, action_dim=2))
    assert RecoveryMeter(other.config, windows, Sampler()).measure(other) == Recoveries()
    pictures = {"state": (WIDTH,), "front": (16, 16, 3)}
    encoder = {"name": "image", "channels": (16,)}
    seeing = DiffusionPolicy(dataclasses.replace(CONFIG, observation_shapes=pictures, encoder=encoder))
    assert RecoveryMeter(seeing.config, windows, Sampler()).measure(seeing) == Recoveries()
    places = demonstrations.observations["state"][:, :2]
    absolute = dataclasses.replace(demonstrations, actions=np.column_stack([places, places[:, 0]]))
    there = Windows(absolute, np.arange(30), obs_horizon=1, action_horizon=8)
    assert RecoveryMeter(policy.config, there, Sampler()).measure(policy) == Recoveries()
