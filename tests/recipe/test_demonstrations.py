"""What `recipe=auto` needs of demonstrations, and what they allow a recipe to do."""

import dataclasses

import numpy as np
import pytest

from policy import TrainSettings
from policy.recipe.demonstrations import allowed_by, check_data
from tests.data.test_corrections import arm

TRAIN = TrainSettings(steps=32, val_fraction=0.25)


def test_too_few_demonstrations_and_too_few_held_out_are_refused():
    twelve = arm(episodes=12, steps=6)
    check_data(twelve, TRAIN, 0)
    with pytest.raises(ValueError, match="has only 9: give 10 or more"):
        check_data(arm(episodes=9, steps=6), TRAIN, 0)
    still = dataclasses.replace(twelve, actions=0 * twelve.actions)
    with pytest.raises(ValueError, match="never change: leave recipe= out"):
        check_data(still, TRAIN, 0)
    few = dataclasses.replace(TRAIN, val_fraction=0.0)
    with pytest.raises(ValueError, match=r"of 12 episodes none is held out: give train.val_fraction=0.34"):
        check_data(twelve, few, 0)
    by_file = dataclasses.replace(twelve, held_out=[3])
    with pytest.raises(
        ValueError, match=r"1 is held out by the file: give dataset.subset=..., which sets none aside, and"
    ):
        check_data(by_file, few, 0)


def test_corrective_noise_is_tried_where_training_can_have_it():
    demonstrations = arm()
    pictures = np.zeros((len(demonstrations.actions), 2, 2, 3), np.uint8)
    seen = dataclasses.replace(demonstrations, observations={**demonstrations.observations, "image": pictures})
    pose = demonstrations.observations["state"][:, :2]
    told = dataclasses.replace(demonstrations, observations={**demonstrations.observations, "pose": pose})
    still = dataclasses.replace(demonstrations, actions=0 * demonstrations.actions)
    tried = [
        allowed_by(data, {}, aside, 8, np.arange(data.num_episodes)).corrections
        for data, aside in (
            (demonstrations, ()),
            (seen, ()),
            (told, ["pose"]),
            (still, ()),
            (demonstrations, ["state"]),
        )
    ]
    assert tried == [True, False, False, False, False]


def test_a_policy_with_relations_of_its_own_gets_no_others():
    demonstrations = arm()
    training = np.arange(demonstrations.num_episodes)
    found = allowed_by(demonstrations, {}, (), 8, training).relations
    assert found["differences"]
    assert allowed_by(demonstrations, {"differences": ((0, 1),)}, (), 8, training).relations == {}
    assert allowed_by(demonstrations, {}, ["state"], 8, training).relations == {}
