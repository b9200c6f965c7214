"""Recipes beside the settings that a user keeps."""

import pytest

from policy import DiffusionPolicy, PolicyConfig, TrainSettings
from policy.recipe import candidates
from policy.recipe.candidates import AS_GIVEN, CANDIDATES, Allowed, candidates_for
from policy.recipe.settings import RecipeSettings

POLICY = {"encoder": {"name": "state"}, "denoiser": {"name": "modulated_mlp"}}


RELATIONS = {"differences": ((0, 1),), "direction_differences": ()}


def chosen(keep=(), policy=POLICY, names=(), relations=RELATIONS, corrections=True, train=None):
    allowed = Allowed(relations=relations, corrections=corrections)
    found, fallen = candidates_for(names, keep, policy, train or TrainSettings(), allowed)
    return {candidate.name: candidate for candidate in found}, fallen


def test_every_recipe_builds_a_policy_and_none_is_a_repetition():
    found, fallen = chosen()
    assert list(found) == list(CANDIDATES)
    assert fallen == {}
    assert next(iter(found)) == AS_GIVEN
    assert found[AS_GIVEN].policy == POLICY
    for candidate in found.values():
        DiffusionPolicy(PolicyConfig(observation_shapes={"state": (3,)}, action_dim=2, **candidate.policy))
        assert candidate.changes == CANDIDATES[candidate.name]


def test_a_setting_that_is_kept_is_the_same_in_every_recipe(monkeypatch):
    monkeypatch.setattr(
        candidates,
        "CANDIDATES",
        {AS_GIVEN: {}, "a": {"denoiser.dropout": 0.1}, "b": {"denoiser.dropout": 0.2, "train.weight_decay": 0.2}},
    )
    found, fallen = chosen(["denoiser.dropout"], {**POLICY, "denoiser": {"name": "modulated_mlp", "dropout": 0.5}})
    assert list(found) == [AS_GIVEN, "b"]
    assert found["b"].policy["denoiser"]["dropout"] == 0.5
    assert found["b"].train.weight_decay == 0.2
    assert fallen == {"a": "you keep denoiser.dropout, so that it is the same as as_given"}


@pytest.mark.parametrize("keep", [["denoiser"], ["denoiser.num_layers"]])
def test_a_part_that_is_kept_or_has_a_kept_setting_is_not_replaced(keep):
    found, fallen = chosen(keep)
    assert all(candidate.policy["denoiser"]["name"] == "modulated_mlp" for candidate in found.values())
    assert {"unet"} <= {*fallen, *(n for n, c in found.items() if "denoiser" not in c.changes)}


def test_a_setting_that_the_chosen_part_does_not_have_is_left_out():
    found, _ = chosen(["encoder"], {**POLICY, "encoder": {"name": "concatenate"}})
    assert all(candidate.policy["encoder"] == {"name": "concatenate"} for candidate in found.values())


@pytest.mark.parametrize(
    ("given", "train"),
    [
        ({"objective": "flow"}, {}),
        ({"prediction_type": "epsilon"}, {}),
        ({"schedule": {"zero_terminal_snr": True}}, {}),
        ({}, {"rectify_steps": 10}),
    ],
)
def test_the_noise_is_hidden_only_from_networks_that_can_do_without_it(given, train):
    found, fallen = chosen(policy={**POLICY, **given}, train=TrainSettings(**train))
    assert fallen == {"estimate": "with your settings it is the same as corrective"}
    for candidate in found.values():
        DiffusionPolicy(PolicyConfig(observation_shapes={"state": (3,)}, action_dim=2, **candidate.policy))
    assert chosen()[0]["estimate"].policy["sigma_data"] == 0.5
    assert "sigma_data" not in chosen()[0]["corrective"].policy


def test_the_settings_of_a_part_that_is_replaced_do_not_stay():
    found, _ = chosen(policy={**POLICY, "denoiser": {"name": "modulated_mlp", "num_layers": 2}})
    assert found["unet"].policy["denoiser"] == {"name": "unet"}
    assert found["regularised"].policy["denoiser"]["num_layers"] == 2


def test_differences_are_those_that_were_found():
    found, _ = chosen()
    assert found["relations"].policy["differences"] == ((0, 1),)
    assert found["relations"].policy["obs_horizon"] == 1
    without, _ = chosen(relations={})
    assert without["relations"].changes == {"obs_horizon": 1}
    _, fallen = chosen(["obs_horizon"], relations={})
    assert fallen["relations"] == "you keep obs_horizon, so that it is the same as as_given"


@pytest.mark.parametrize("name", ["differences", "direction_differences"])
def test_an_empty_list_of_relations_is_kept_too(name):
    found, _ = chosen([name], policy={**POLICY, name: ()})
    assert found["relations"].changes == {"obs_horizon": 1}
    assert all(not candidate.policy.get(field) for candidate in found.values() for field in RELATIONS)
    _, fallen = chosen(["obs_horizon", name], policy={**POLICY, name: ()})
    assert fallen["relations"] == f"you keep obs_horizon, {name}, so that it is the same as as_given"


def test_corrective_noise_is_tried_only_where_it_is_possible():
    found, _ = chosen()
    assert found["corrective"].train.corrective_noise == found["few_demonstrations"].train.corrective_noise > 0
    without, fallen = chosen(corrections=False)
    assert all(candidate.train.corrective_noise == 0 for candidate in without.values())
    assert not fallen
    assert without["corrective"].train.action_weights == "spread"
    assert without["few_demonstrations"].policy == found["few_demonstrations"].policy


def test_settings_of_a_search_are_checked():
    assert RecipeSettings(budget="1.5h").seconds == 5400
    with pytest.raises(ValueError, match=r"recipe.budget takes a time.*got '30'"):
        RecipeSettings(budget="30")
    with pytest.raises(ValueError, match=r"recipe.budget takes a time.*got 30$"):
        RecipeSettings(budget=30)
    with pytest.raises(ValueError, match=r"unknown recipe .regularized.*regularised"):
        RecipeSettings(candidates=["regularized"])
