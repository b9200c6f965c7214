"""Environments that misbehave, on the command line: one sentence or a counted failure, and finished work is kept."""

import json
import signal
import subprocess
import sys
from datetime import datetime
from unittest import mock

import numpy as np
import pytest
import torch
import zarr

from policy import DiffusionPolicy, PolicyConfig
from policy.commands import stage
from policy.common.output import output_folder
from policy.rollout.ledger import Ledger
from tests.conftest import ENVIRONMENT, ROOT

HOSTILE = """
import time

import gymnasium, numpy as np

class Slow(gymnasium.Env):
    resets = 0
    observation_space = gymnasium.spaces.Box(-2, 2, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Slow.resets += 1
        return np.zeros(4, np.float32), {}

    def step(self, action):
        if Slow.resets > 3:  # after the probe of its seeds
            print("stepping", flush=True)
            time.sleep(600)
        return np.zeros(4, np.float32), 0.0, True, False, {"is_success": False}

class Hostile(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-2, 2, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, bad=(), what="blurred", render_mode=None):
        self.bad, self.what, self.render_mode = bad, what, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.broken, self.steps = seed in self.bad, 0
        if self.broken and self.what == "cold":
            raise RuntimeError("cold")
        return np.zeros(4, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.broken and self.steps == 2:
            if self.what == "raise":
                raise RuntimeError("out of coal")
            if self.what == "exit":
                raise SystemExit(3)
            return np.full(4, np.nan, np.float32), 0.0, False, False, {"is_success": False}
        return np.zeros(4, np.float32), 0.0, False, False, {"is_success": self.steps == 4}

gymnasium.register("Hostile-v0", entry_point=Hostile, max_episode_steps=5)
gymnasium.register("Endless-v0", entry_point=Hostile)
gymnasium.register("Slow-v0", entry_point=Slow, max_episode_steps=5)
"""
ENV = ("env=gym", "env.id=hostile_env:Hostile-v0")
SLOW = ("env=gym", "env.id=hostile_env:Slow-v0")
FAST = ("sampler.ddim_steps=1", "tracker=none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The environment's file, a checkpoint and two demonstrations that fit it."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "hostile_env.py").write_text(HOSTILE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = {"name": "modulated_mlp", "hidden_size": 16, "num_layers": 1}
        shapes = {"observation_shapes": {"state": (4,)}, "action_dim": 2}
        policy = DiffusionPolicy(PolicyConfig(**shapes, obs_size=16, denoiser=denoiser))
    policy.save_pretrained(folder / "ck")
    group, generator = zarr.open_group(str(folder / "d.zarr"), mode="w"), np.random.default_rng(0)
    group["data/state"], group["data/action"] = generator.normal(size=(60, 4)), generator.normal(size=(60, 2))
    group["meta/episode_ends"] = np.array([30, 60])
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


def bad(*numbers, what="blurred"):
    return [f"env.kwargs.bad=[{','.join(str(100_000 + n) for n in numbers)}]", f"env.kwargs.what={what}"]


def test_a_rollout_in_real_time_whose_episodes_all_break_off_at_once_keeps_its_files(run_command, tmp_path):
    settings = ("checkpoint=ck", *ENV, *bad(0, 1, what="cold"), "episodes=2", f"output_dir={tmp_path}", *FAST)
    out = run_command("rollout", *settings, "control_rate=10", "video=0").stdout
    assert "2 of 2 episodes broke off: RuntimeError in reset(): cold" in out
    assert json.loads((tmp_path / "real_time.json").read_text())["plans"] == 0


@pytest.mark.parametrize(
    ("what", "reason"),
    [("blurred", "observation not finite"), ("raise", "RuntimeError in step(): out of coal (hostile_env.py, line"),
     ("exit", "sys.exit(3) in step() (hostile_env.py, line")],
)  # fmt: skip
def test_an_episode_that_breaks_off_is_a_failure_with_a_reason(what, reason, run_command, tmp_path):
    settings = ("checkpoint=ck", *ENV, *bad(1, 3, what=what), "episodes=5", f"output_dir={tmp_path}", *FAST)
    out = run_command("rollout", *settings, "num_envs=2", "video=0").stdout
    assert f"warning: 2 of 5 episodes broke off: {reason}" in out
    assert "(seeds 100001, 100003)" in out
    rows = json.loads((tmp_path / "episodes.json").read_text())
    assert [row["success"] for row in rows] == [True, False, True, False, True]
    assert [row.get("broke_off", "")[:10] for row in rows] == ["", reason[:10], "", reason[:10], ""]


def test_on_env_error_stop_ends_at_the_first_one(run_command, tmp_path):
    settings = ("checkpoint=ck", *ENV, *bad(1), "episodes=3", "num_envs=1", f"output_dir={tmp_path}", *FAST)
    err = run_command("rollout", *settings, "on_env_error=stop", check=1).stderr
    assert "error: the episode with seed 100001 broke off: observation not finite (on_env_error=stop)" in err
    err = run_command("rollout", *settings, "on_env_error=stp", check=2).stderr
    assert "on_env_error" in err


def test_more_than_a_twentieth_of_twenty_episodes_is_exit_code_1_after_all_work(run_command, tmp_path):
    for broken, code in (([4], 0), ([4, 7], 1)):
        folder = tmp_path / str(code)
        settings = ("checkpoint=ck", *ENV, *bad(*broken), "episodes=20", f"output_dir={folder}", *FAST)
        done = run_command("rollout", *settings, "num_envs=4", check=code)
        assert len(json.loads((folder / "episodes.json").read_text())) == 20
        assert ("the simulator cannot be relied on: 2 of 20 episodes broke off" in done.stderr) == (code == 1)


def test_a_sweep_says_so_in_terminal_json_tables_and_report_and_goes_on(run_command, plain_reports, tmp_path):
    settings = ("checkpoint=ck", *ENV, *bad(1), "ddim_steps=[1,2]", "episodes=3", "num_envs=2", "workers=1")
    for _ in range(2):  # the second time from the ledger
        out = run_command("sweep", *settings, "videos=0", "tracker=none", f"output_dir={tmp_path}").stdout
        said = "2 of 6 episodes broke off: observation not finite (seeds 100001)"
        assert f"warning: {said}" in out
        document = json.loads((tmp_path / "sweep.json").read_text())
        assert document["warnings"] == [said]
        assert [row["broke_off"] for row in document["cells"]] == [1, 1]
        assert said in (tmp_path / "report.html").read_text()
        assert "broke_off" in (tmp_path / "sweep.csv").read_text().splitlines()[0]
        assert (tmp_path / "episodes.csv").read_text().count("observation not finite") == 2


@pytest.mark.slow
def test_what_breaks_the_contract_ends_a_run_of_several_processes_at_once(run_command, tmp_path):
    settings = ("checkpoint=ck", *ENV, "env.success=info:task", "episodes=4", "num_envs=4", "ddim_steps=[1,2]")
    err = run_command("sweep", *settings, "workers=2", "tracker=none", f"output_dir={tmp_path}", check=2).stderr
    assert "error: Hostile-v0: 'task' was in no info of a whole episode; it has is_success." in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["rollout", "train"])
def test_without_a_time_limit_nothing_starts(command, run_command, tmp_path):
    given = {"rollout": ["checkpoint=ck"], "train": ["dataset=zarr", "dataset.path=d.zarr"]}[command]
    settings = (*given, "env=gym", "env.id=hostile_env:Endless-v0", "tracker=none", f"output_dir={tmp_path / 'o'}")
    err = run_command(command, *settings, check=2).stderr
    assert "Endless-v0 has no time limit" in err
    assert "add env.max_episode_steps=N" in err
    assert not (tmp_path / "o").exists()
    if command == "rollout":
        run_command(command, *settings, "env.max_episode_steps=3", "episodes=1", "num_envs=1", "sampler.ddim_steps=1")


def test_training_saves_before_a_rollout_and_survives_it(run_command, tmp_path):
    settings = ("dataset=zarr", "dataset.path=d.zarr", *ENV, "env.kwargs.bad=[50001]", "obs_size=16", *FAST)
    small = ("train.batch_size=8", "train.steps=6", "train.save_every=50", "train.rollout_episodes=2")
    done = run_command("train", *settings, *small, "train.rollout_every=3", f"output_dir={tmp_path}")
    assert "1 of 2 episodes broke off: observation not finite (seeds 50001)" in done.stderr
    history = json.loads((tmp_path / "checkpoint/training.json").read_text())["history"]
    assert [entry["rollout/success_rate"] for entry in history if "rollout/success_rate" in entry] == [0.5, 0.5]
    more = ("train.steps=8", "train.rollout_every=0", "train.log_every=2")
    out = run_command("train", *settings, *small[:1], *small[2:], *more, f"output_dir={tmp_path}").stdout
    assert "going on at step 6 of 8" in out
    assert "it was begun for 6 steps: from here the learning rate follows the schedule of 8" in out
    err = run_command("train", *settings, *small, "train.steps=7", f"output_dir={tmp_path}", check=2).stderr
    assert "trained with other settings (training: steps was 8)" in err


def test_sigterm_in_the_middle_of_a_simulators_step_ends_training_with_every_step_on_disk(run_command, tmp_path):
    settings = ("dataset=zarr", "dataset.path=d.zarr", "obs_size=16", "tracker=none", "train.batch_size=8")
    steps = ("train.steps=4", "train.save_every=50", "train.rollout_every=3", "train.rollout_episodes=1")
    process = subprocess.Popen(
        [sys.executable, ROOT / "scripts/train.py", *settings, *steps, *SLOW, f"output_dir={tmp_path}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "stepping" not in (line := process.stdout.readline()):
        assert line, "training ended before its rollout"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stopped at step 3 and saved" in out
    assert json.loads((tmp_path / "checkpoint/training.json").read_text())["step"] == 3


# --- rollouts that were interrupted ------------------------------------------------------------------------------


def test_a_rollout_that_stopped_goes_on_and_ends_like_an_undisturbed_one(run_command, tmp_path, monkeypatch):
    settings = ("checkpoint=ck", *ENV, *bad(2), "episodes=5", "num_envs=1", *FAST)
    run_command("rollout", *settings, "on_env_error=stop", f"output_dir={tmp_path}/cut", check=1)
    assert not (tmp_path / "cut/episodes.json").exists()
    out = run_command("rollout", *settings, f"output_dir={tmp_path}/cut").stdout
    assert "3 of 5 episodes are on disk already" in out
    run_command("rollout", *settings, f"output_dir={tmp_path}/whole")
    for file in ("episodes.json", "rollout.jsonl"):
        assert (tmp_path / "cut" / file).read_text() == (tmp_path / "whole" / file).read_text()
    again = run_command("rollout", *settings, "episodes=6", f"output_dir={tmp_path}/cut").stdout
    assert "5 of 6 episodes are on disk already" in again
    (made_with,) = json.loads((tmp_path / "cut/rollout.json").read_text())["made_with"]
    newer = {**made_with, "versions": {**made_with["versions"], "torch": "99"}}
    monkeypatch.setattr(stage, "provenance", lambda env, device: newer)
    refused = run_command("rollout", *settings, "episodes=7", f"output_dir={tmp_path}/cut", check=2).stderr
    assert f"would mix episodes that were not run alike: torch {made_with['versions']['torch']} and 99. " in refused
    mixed = run_command("rollout", *settings, "episodes=7", "mix=true", f"output_dir={tmp_path}/cut")
    said = "the episodes were not all run alike (mix=true): torch "
    assert said in mixed.stderr
    assert json.loads((tmp_path / "cut/rollout.json").read_text())["warnings"][0].startswith(said)


@pytest.mark.parametrize("other", ["sampler.ddim_steps=2", "env.max_episode_steps=4"])
def test_a_finished_rollout_is_not_overwritten_by_another(other, run_command, tmp_path):
    settings = ("checkpoint=ck", *ENV, "episodes=1", "num_envs=1", *FAST, f"output_dir={tmp_path}")
    run_command("rollout", *settings)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    err = run_command("rollout", *settings, other, check=2).stderr
    assert "holds another rollout, which would be overwritten: choose another output_dir=" in err
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_episodes_are_written_while_the_folder_is_locked(run_command, tmp_path, monkeypatch):
    """Otherwise another rollout could begin there before `episodes.json` tells it that the folder is taken."""
    closed = []

    def close(ledger, close=Ledger.close):
        closed.append((tmp_path / "episodes.json").exists())
        close(ledger)

    monkeypatch.setattr(Ledger, "close", close)
    run_command("rollout", "checkpoint=ck", *ENV, "episodes=1", "num_envs=1", *FAST, f"output_dir={tmp_path}")
    assert closed == [True]


def test_two_rollouts_in_one_folder_are_refused_and_without_a_folder_each_gets_its_own(run_command, tmp_path):
    settings = ("checkpoint=ck", *ENV, "episodes=1", "num_envs=1", *FAST)
    with Ledger(tmp_path / "rollout.jsonl"):
        err = run_command("rollout", *settings, f"output_dir={tmp_path}", check=2).stderr
    assert "rollout.jsonl is in use by another process" in err
    with mock.patch("policy.common.output.datetime") as clock:
        clock.now.return_value = datetime(2026, 1, 1)
        folders = {output_folder(None, "rollout") for _ in range(4)}
    assert sorted(folder.name for folder in folders) == ["2026-01-01_00-00-00"] + [
        f"2026-01-01_00-00-00_{number}" for number in (2, 3, 4)
    ]
