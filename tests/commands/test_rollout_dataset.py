"""`ddim-rollout record=`: the episodes of a rollout as a dataset, which trains again."""

import json

import minari
import numpy as np
import pytest

from envs.planar import PlanarEnv
from policy.checkpoint import load_checkpoint
from policy.data.reading import read_demonstrations
from policy.rollout.ledger import Ledger

EPISODES = 6
# With one step some episodes fail, and some succeed.
ROLLOUT = (f"episodes={EPISODES}", "sampler.ddim_steps=1", "seed=100005")


@pytest.fixture
def roll_out(planar_run, run_command):
    """The command on the planar policy; gives what it printed, or its refusal."""

    def run(*overrides, check=0, cores=1):
        settings = (f"checkpoint={planar_run}/checkpoint", *ROLLOUT, *overrides)
        done = run_command("rollout", *settings, check=check, cores=cores)
        return done.stderr if check else done.stdout

    return run


def episodes_of(path, monkeypatch):
    """The episodes, read by Minari itself."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(path.parent))
    return list(minari.load_dataset(path.name).iterate_episodes())


def check_equal(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_a_rollout_is_recorded_as_its_results_say_and_trains_again(
    roll_out, planar_run, run_command, tmp_path, monkeypatch
):
    path = tmp_path / "recorded-v0"
    said = roll_out("num_envs=1", f"record={path}", f"output_dir={tmp_path}/out")
    results = json.loads((tmp_path / "out/episodes.json").read_text())
    found = episodes_of(path, monkeypatch)
    steps = sum(result["steps"] for result in results)
    assert f"recorded: {EPISODES} episodes of {steps} control steps in all: {path}\n" in said
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    assert {result["success"] for result in results} == {True, False}
    for result, episode in zip(results, found, strict=True):
        assert len(episode.actions) == result["steps"]
        assert episode.rewards.sum() == pytest.approx(result["return"], abs=0)
        assert (episode.rewards[-1] == 1) == result["success"]
        simulator = PlanarEnv()  # the raw one goes the same way
        seen = [simulator.reset(seed=result["seed"])[0], *(simulator.step(action)[0] for action in episode.actions)]
        np.testing.assert_array_equal(episode.observations, seen)

    roll_out("num_envs=4", f"record={tmp_path}/four-v0", f"output_dir={tmp_path}/four")
    check_equal(episodes_of(tmp_path / "four-v0", monkeypatch), found)

    data = read_demonstrations(format="minari", path=path, cache_dir=tmp_path / "cache")
    assert data.metadata["env"] == {"name": "planar"}
    run_command(
        "train",
        f"init={planar_run}/checkpoint",
        "init_normalizers=refit",
        "dataset=minari",
        f"dataset.path={path}",
        "train.steps=2",
        "train.rollout_every=0",
        "train.val_fraction=0",
        f"output_dir={tmp_path}/again",
    )
    again = load_checkpoint(tmp_path / "again/checkpoint")
    assert again.env == {"name": "planar"}
    low, high = data.actions.min(axis=0), data.actions.max(axis=0)
    np.testing.assert_allclose(again.policy.action_normalizer.half_range.numpy(), (high - low) / 2, rtol=1e-6)


def test_successes_alone_are_recorded_if_asked(roll_out, tmp_path, monkeypatch):
    successes = "record_successes=true"
    said = roll_out(f"record={tmp_path}/good-v0", successes, f"output_dir={tmp_path}/out")
    results = json.loads((tmp_path / "out/episodes.json").read_text())
    wanted = [result["steps"] for result in results if result["success"]]
    assert [len(episode.actions) for episode in episodes_of(tmp_path / "good-v0", monkeypatch)] == wanted
    assert f"{EPISODES - len(wanted)} episodes failed or broke off and are left out" in said
    (failed,) = [result["seed"] for result in results if not result["success"]][:1]
    settings = (f"seed={failed}", "episodes=1", successes, f"record={tmp_path}/none", f"output_dir={tmp_path}/one")
    for _ in range(2):  # what failed has not to be kept, and the same command may be given again
        assert f"recorded: none of the 1 episodes, so that there is no {tmp_path}/none" in roll_out(*settings)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / ".none").exists()


def test_an_interrupted_rollout_loses_no_episode(roll_out, tmp_path, monkeypatch):
    roll_out("num_envs=2", f"record={tmp_path}/whole-v0", f"output_dir={tmp_path}/whole")
    add, left = Ledger.add, [3]

    def interrupted(ledger, *result):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(ledger, *result)

    cut = ("num_envs=2", f"record={tmp_path}/cut-v0", f"output_dir={tmp_path}/cut")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", interrupted)
        roll_out(*cut, check=130)
    assert not (tmp_path / "cut-v0").exists()
    assert "holds the episodes of a command with other settings that was interrupted (ddim_steps=" in roll_out(
        f"record={tmp_path}/cut-v0", "sampler.ddim_steps=2", f"output_dir={tmp_path}/other", check=2
    )
    assert f"3 of {EPISODES} episodes are on disk already" in roll_out(*cut)
    check_equal(episodes_of(tmp_path / "cut-v0", monkeypatch), episodes_of(tmp_path / "whole-v0", monkeypatch))


def test_what_cannot_be_recorded_is_refused_before_the_rollout(roll_out, tmp_path, monkeypatch):
    roll_out("episodes=1", f"output_dir={tmp_path}/before")
    ran = []
    monkeypatch.setattr(Ledger, "add", lambda ledger, *result: ran.append(result))
    monkeypatch.chdir(tmp_path)  # where there is no folder of outputs yet
    (tmp_path / "there").mkdir()
    for overrides, said in (
        ([f"record={tmp_path}/there"], f"{tmp_path}/there is there already: choose another record=, or remove it"),
        (["record="], "takes the name of a new folder for the dataset, as record=outputs/dataset; got '.'"),
        ([f"record={tmp_path}/a", f"output_dir={tmp_path}/a/b"], "would hold the rollout's own output_dir="),
        (["record=outputs"], "would hold the rollout's own output_dir=outputs/rollout"),
        (["record_successes=true"], "record_successes=true chooses among the episodes of record=DIR"),
        ([f"record={tmp_path}/a", "control_rate=10"], "record= goes without control_rate=: leave them out"),
        (
            [f"record={tmp_path}/a", f"output_dir={tmp_path}/before"],
            "holds 1 episodes that were not recorded, the first with seed 100005: choose another output_dir=",
        ),
    ):
        err = roll_out(*overrides, check=2)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert said in err
    assert ran == []
    assert not (tmp_path / ".a").exists()


@pytest.mark.slow
def test_rollout_processes_record_what_one_process_records(roll_out, tmp_path, monkeypatch):
    for name, cores in (("one", 1), ("two", 2)):
        settings = ("backend=eager", f"record={tmp_path}/{name}-v0", f"output_dir={tmp_path}/{name}")
        roll_out(*settings, cores=cores)
    check_equal(*(episodes_of(tmp_path / f"{name}-v0", monkeypatch) for name in ("one", "two")))
