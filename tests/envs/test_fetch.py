"""The scripted experts of Fetch, in the real simulator."""

import numpy as np
import pytest

import envs

pytest.importorskip("gymnasium_robotics")


def played(env, seed):
    """Whether the expert succeeds, and its actions up to then."""
    observation, _ = env.reset(seed=seed)
    expert, actions, over = envs.make_expert("gym", env, seed), [], False
    while not over:
        actions.append(expert(observation))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        over = terminated or truncated or info["is_success"]
    return info["is_success"], np.array(actions)


@pytest.mark.parametrize("name", ["FetchReach-v4", "FetchPickAndPlace-v4"])
def test_the_expert_succeeds_within_the_time_limit_and_within_the_limits_of_actions(name):
    env = envs.make("gym", id=name)
    for seed in range(8):
        success, actions = played(env, seed)
        assert success, seed
        assert np.abs(actions).max() <= 1


def test_the_expert_depends_on_its_seed_alone_and_not_on_what_the_policy_observes():
    env, blind = (
        envs.make("gym", id="FetchPickAndPlace-v4", observation_keys=keys) for keys in (None, ["achieved_goal"])
    )
    (_, actions), (_, again), (_, unseen) = played(env, 3), played(env, 3), played(blind, 3)
    assert np.array_equal(actions, again)
    assert np.array_equal(actions, unseen)
    env.reset(seed=3)
    other = envs.make_expert("gym", env, 4)
    assert not np.array_equal(other(None), actions[0])


def test_other_ids_have_no_expert():
    with pytest.raises(
        ValueError, match=r"FetchPush-v4 has no scripted expert; .* FetchReach and FetchPickAndPlace have one"
    ):
        envs.make_expert("gym", envs.make("gym", id="FetchPush-v4"), 0)


def test_the_next_command_names_an_id_that_imports_a_module_as_training_wants_it_named(run_command, tmp_path):
    out = run_command(
        "collect", "env=gym", "env.id=gymnasium_robotics:FetchReach-v4", "episodes=1", f"output_dir={tmp_path}"
    )
    (line,) = (line for line in out.stdout.splitlines() if line.startswith("next: "))
    assert line.endswith("""'env.id="gymnasium_robotics:FetchReach-v4"'""")
