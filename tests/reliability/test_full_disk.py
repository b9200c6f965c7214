"""Commands on a disk that is full, or becomes so: one sentence, and what was finished is whole."""

import json

import pytest

from tests.reliability.test_checkpoint_faults import fill, small_disk

__all__ = ["small_disk"]

FAST = ("sampler.ddim_steps=1", "tracker=none", "num_envs=1", "video=0")


def sentence(done):
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.parametrize("command", ["rollout", "sweep", "collect"])
def test_a_full_disk_is_refused_before_any_work(command, small_disk, planar_run, run_command):
    ballast = fill(small_disk, 0)
    given = ["env=planar"] if command == "collect" else [f"checkpoint={planar_run}/checkpoint", "tracker=none"]
    refused = sentence(run_command(command, *given, f"output_dir={small_disk}/out", check=2))
    assert f"cannot write to output_dir={small_disk}/out (No space left on device): choose another" in refused
    assert list(small_disk.iterdir()) == [ballast]


@pytest.mark.parametrize("leave", [90_000, 330_000])  # full at an episode, and at the dataset
def test_a_collection_onto_a_full_disk_goes_on_once_there_is_space(leave, small_disk, run_command):
    settings = ("env=planar", "episodes=60", f"output_dir={small_disk}")
    ballast = fill(small_disk, leave)
    said = sentence(run_command("collect", *settings, check=1))
    assert "the disk is full: make room and give the same command again; finished work is on disk" in said
    ballast.unlink()
    done = run_command("collect", *settings)
    assert "of 60 demonstrations are on disk already" in done.stdout
    assert sorted(path.name for path in small_disk.iterdir()) == ["planar-v0"]


@pytest.mark.reliability
@pytest.mark.parametrize("leave", [70_000, 90_000])  # full at the ledger, and at episodes.json
def test_a_rollout_onto_a_full_disk_goes_on_once_there_is_space(leave, small_disk, planar_run, run_command):
    settings = (f"checkpoint={planar_run}/checkpoint", "episodes=600", "env.max_episode_steps=2", *FAST)
    ballast = fill(small_disk, leave)
    said = sentence(run_command("rollout", *settings, f"output_dir={small_disk}/out", check=1))
    assert "the disk is full: make room and give the same command again; finished work is on disk" in said
    ballast.unlink()
    out = run_command("rollout", *settings, f"output_dir={small_disk}/out").stdout
    assert "of 600 episodes are on disk already" in out
    assert len(json.loads((small_disk / "out/episodes.json").read_text())) == 600


@pytest.mark.reliability
def test_a_report_that_cannot_be_written_leaves_the_tables(small_disk, planar_run, run_command):
    settings = (f"checkpoint={planar_run}/checkpoint", "episodes=3", "ddim_steps=[1,2]", "num_envs=1", "tracker=none")
    ballast = fill(small_disk, 100_000)
    done = run_command("sweep", *settings, "videos=0", f"output_dir={small_disk}/out", check=1)
    assert "no pictures and no report (" in sentence(done)
    assert len(json.loads((small_disk / "out/sweep.json").read_text())["cells"]) == 2
    assert (small_disk / "out/sweep.csv").read_text().count("\n") == 3
    assert "| ddim_steps |" in done.stdout
    ballast.unlink()
    run_command("sweep", *settings, "videos=0", f"output_dir={small_disk}/out")
    assert (small_disk / "out/report.html").exists()
