"""Things that are shown elsewhere in batches: which numbers change, and from where they come."""

import dataclasses

import numpy as np
import pytest
import torch

from policy.common.seeding import derive_generator
from policy.data.exchange import STAYS
from policy.data.windows import Windows
from policy.model.config import PolicyConfig
from policy.training.exchanged_things import ExchangedThings, describe_exchanged
from policy.training.preparation import prepare_run
from policy.training.settings import TrainSettings
from tests.data.test_exchange import COLOUR, EPISODES, GRIPPER, THINGS, colour, found_in, gantry

WIDTHS = {"state": 7}
CONFIG = PolicyConfig(
    observation_shapes={"state": (7,)},
    action_dim=2,
    obs_horizon=2,
    action_horizon=4,
    obs_size=8,
    encoder={"name": "state", "hidden_size": 8},
    denoiser={"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1},
)


@pytest.fixture(scope="module")
def made():
    demonstrations, _ = gantry()
    exchange = found_in(demonstrations)
    windows = Windows(demonstrations, np.arange(EPISODES), obs_horizon=2, action_horizon=4)
    return exchange, windows.marking(groups=exchange.groups).gather(np.arange(0, len(windows), 3))


def state(batch):
    return batch["observations"]["state"]


def test_every_thing_that_may_be_elsewhere_is_and_nothing_else_changes(made):
    exchange, batch = made
    shown = ExchangedThings(exchange, WIDTHS, 1.0)(batch, derive_generator(0))
    torch.testing.assert_close(state(shown)[..., GRIPPER], state(batch)[..., GRIPPER], rtol=0, atol=0)
    assert shown["actions"] is batch["actions"]
    for thing, places in enumerate(exchange.places):
        free = batch["groups"][:, thing] != STAYS
        assert 0.3 < free.float().mean() < 0.7
        torch.testing.assert_close(state(shown)[~free][..., places], state(batch)[~free][..., places], rtol=0, atol=0)
        moved = state(shown)[free][..., places] != state(batch)[free][..., places]
        assert moved.any(dim=(1, 2)).float().mean() > 0.9  # now and then it is drawn where it was


def test_all_numbers_of_a_thing_are_of_one_pose_through_the_history(made):
    exchange, batch = made
    shown = ExchangedThings(exchange, WIDTHS, 1.0)(batch, derive_generator(0))
    places = exchange.places[0]
    free = batch["groups"][:, 0] != STAYS
    seen = state(shown)[free]
    torch.testing.assert_close(seen[:, 0, places], seen[:, 1, places], rtol=0, atol=0)
    np.testing.assert_allclose(colour(seen[..., THINGS[0]].numpy()), seen[..., COLOUR].numpy(), atol=1e-5)
    for group, pose in zip(batch["groups"][free, 0].tolist(), seen[:, -1, places].numpy(), strict=True):
        assert (exchange.poses[group] == pose).all(axis=1).any()


def test_poses_are_drawn_evenly_and_by_the_generator_alone(made):
    exchange, batch = made
    things = ExchangedThings(exchange, WIDTHS, 0.5)
    shown, again, other = (things(batch, derive_generator(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(state(shown), state(again), rtol=0, atol=0)
    assert (state(shown) != state(other)).any()
    free = batch["groups"][:, 1] != STAYS
    changed = (state(shown) != state(batch))[free][..., THINGS[1]].any(dim=(1, 2))
    assert changed.float().mean() == pytest.approx(0.5, abs=0.1)
    group = int(batch["groups"][free, 1][0])
    same = batch["groups"][:, 1] == group
    always = ExchangedThings(exchange, WIDTHS, 1.0)
    drawn = torch.cat([state(always(batch, derive_generator(seed)))[same][:, 0, THINGS[1]] for seed in range(20)])
    hits = torch.tensor([(drawn == torch.from_numpy(pose)).all(dim=1).sum() for pose in exchange.poses[group]])
    assert hits.sum() == len(drawn)
    assert hits.min() > 0.6 * hits.float().mean()
    assert hits.max() < 1.5 * hits.float().mean()


def test_several_vectors_are_counted_one_after_the_other(made):
    exchange, batch = made
    parts = {"a": state(batch)[..., :3], "b": state(batch)[..., 3:]}
    split = {**batch, "observations": {**parts, "picture": torch.zeros(1)}}
    shown = ExchangedThings(exchange, {"a": 3, "b": 4}, 1.0)(split, derive_generator(0))
    whole = ExchangedThings(exchange, WIDTHS, 1.0)(batch, derive_generator(0))
    joined = torch.cat([shown["observations"]["a"], shown["observations"]["b"]], dim=-1)
    torch.testing.assert_close(joined, state(whole), rtol=0, atol=0)
    assert shown["observations"]["picture"] is split["observations"]["picture"]


def test_the_numbers_are_named(made):
    numbers = ExchangedThings(made[0], WIDTHS, 0.8).numbers
    assert numbers == [f"state[{place}]" for place in (2, 3, 6, 4, 5)]
    assert describe_exchanged(numbers).endswith("had them: state[2], state[3], state[6], state[4], state[5]")


def test_without_a_second_thing_nothing_is_drawn(made):
    demonstrations, _ = gantry()
    seen = demonstrations.observations["state"][:, :4]
    exchange = found_in(dataclasses.replace(demonstrations, observations={"state": seen}))
    things = ExchangedThings(exchange, {"state": 4}, 1.0)
    generator = derive_generator(0)
    assert things(made[1], generator) is made[1]
    assert torch.equal(generator.get_state(), derive_generator(0).get_state())
    assert describe_exchanged(things.numbers).startswith("train.exchange changes nothing: ")


def test_a_run_exchanges_only_where_it_was_asked_to():
    demonstrations, _ = gantry()
    plain = prepare_run(CONFIG, demonstrations, TrainSettings(steps=3), seed=0, device="cpu")
    batch = plain.training.gather(np.arange(64))
    assert plain.varied(batch, derive_generator(0)) is batch
    run = prepare_run(CONFIG, demonstrations, TrainSettings(steps=3, exchange=0.8), seed=0, device="cpu")
    batch = run.training.gather(np.arange(64))
    assert (state(run.varied(batch, derive_generator(0))) != state(batch)).any()
    assert "groups" not in run.validation.gather(np.arange(3))


def test_noise_moves_the_robot_between_exchanged_things():
    demonstrations, _ = gantry()
    both = TrainSettings(steps=3, exchange=1.0, corrective_noise=0.3)
    run = prepare_run(CONFIG, demonstrations, both, seed=0, device="cpu")
    batch = run.training.gather(np.arange(200))
    varied = run.varied(batch, derive_generator(0))
    assert (state(varied)[..., GRIPPER] != state(batch)[..., GRIPPER]).any()
    assert (state(varied)[..., THINGS[1]] != state(batch)[..., THINGS[1]]).any()
    assert (varied["actions"] != batch["actions"]).any()


@pytest.mark.parametrize(("name", "what"), [("exchange", "things"), ("corrective_noise", "the robot")])
def test_privileged_observations_would_be_of_what_is_shown_elsewhere(name, what):
    demonstrations, _ = gantry()
    told = dataclasses.replace(CONFIG, auxiliary_shapes={"where": (2,)})
    seen = {**demonstrations.observations, "where": demonstrations.observations["state"][:, THINGS[1]]}
    both = dataclasses.replace(demonstrations, observations=seen)
    with pytest.raises(
        ValueError, match=rf"{name} shows {what} elsewhere, and the .* \['where'\] would be of where it"
    ):
        prepare_run(told, both, TrainSettings(steps=3, **{name: 1.0}), seed=0, device="cpu")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"train\.exchange is a share of the windows, 0 to 1; got"):
        TrainSettings(exchange=share)
