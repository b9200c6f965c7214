"""The commands as a user types them: what they leave behind, and how they refuse bad input."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policy import load_checkpoint
from policy.statistics.intervals import wilson_interval
from tests.conftest import ENVIRONMENT, ROOT


def test_training_leaves_a_self_contained_checkpoint_and_an_offline_run(planar_run):
    names = {file.name for file in (planar_run / "checkpoint").iterdir()}
    assert names == {"config.json", "policy.safetensors", "training.safetensors", "training.json", "checksums.json"}
    loaded = load_checkpoint(planar_run / "checkpoint")
    assert loaded.env == {"name": "planar"}
    history = json.loads((planar_run / "checkpoint" / "training.json").read_text())["history"]
    assert history[-1]["step"] == 300
    assert history[-1]["train/loss"] < history[0]["train/loss"]
    assert {"val/loss", "rollout/success_rate"} <= history[-1].keys()
    assert list((planar_run / "wandb").glob("offline-run-*/*.wandb"))


def test_rollout_writes_one_entry_per_seed_and_videos(planar_run, run_script, tmp_path):
    out = run_script(
        "rollout",
        f"checkpoint={planar_run}/checkpoint",
        "episodes=6",
        "sampler.ddim_steps=4",
        "execution_horizon=8",
        "num_envs=4",
        "video=1",
        f"output_dir={tmp_path}",
    ).stdout
    episodes = json.loads((tmp_path / "episodes.json").read_text())
    assert [episode["seed"] for episode in episodes] == list(range(100_000, 100_006))
    keys = {"seed", "success", "score", "return", "steps", "late_steps", "attempts"}
    assert all(episode.keys() == keys for episode in episodes)
    successes = sum(episode["success"] for episode in episodes)
    low, high = wilson_interval(successes, 6)
    assert f"success {successes / 6:.0%} ({successes} of 6, 95 % {low:.0%} to {high:.0%})" in out
    assert len(list(tmp_path.glob("episode_100000_*.mp4"))) == 1


def test_results_do_not_depend_on_the_number_of_environments(planar_run, run_script, tmp_path):
    files = []
    for num_envs in (1, 3, 8):
        folder = tmp_path / str(num_envs)
        run_script(
            "rollout",
            f"checkpoint={planar_run}/checkpoint",
            "episodes=8",
            "sampler.ddim_steps=2",
            "sampler.eta=1.0",
            f"num_envs={num_envs}",
            f"output_dir={folder}",
        )
        files.append((folder / "episodes.json").read_text())
    assert files[0] == files[1] == files[2]


def test_sweep_writes_a_row_per_cell_in_json_csv_and_a_picture(planar_run, run_script, tmp_path):
    out = run_script(
        "sweep",
        f"checkpoint={planar_run}/checkpoint",
        "ddim_steps=[1,2,4]",
        "episodes=4",
        "tracker=wandb",
        f"output_dir={tmp_path}",
    ).stdout
    rows = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [row["ddim_steps"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row["episodes"] == 4
        assert row["success_low"] <= row["success_rate"] <= row["success_high"]
        assert row["latency_ms_median"] > 0
    assert rows[0]["latency_ms_median"] < rows[2]["latency_ms_median"]
    table = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [int(row["ddim_steps"]) for row in table] == [1, 2, 4]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| ddim_steps |" in out
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_interrupted_training_saves_says_how_to_go_on_and_equals_an_uninterrupted_run(planar_run, run_script, tmp_path):
    settings = [
        "experiment=planar",
        f"dataset.path={planar_run}/planar-v0",
        "tracker=none",
        "train.steps=1500",
        "train.warmup_steps=20",
        "denoiser.hidden_size=16",
        "encoder.noise=0.01",
        "denoiser.dropout=0.1",
    ]
    run_script("train", *settings, f"output_dir={tmp_path}/whole")
    command = [sys.executable, ROOT / "scripts/train.py", *settings, f"output_dir={tmp_path}/cut"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert "training windows" in process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saved: the same command with output_dir=" in out
    step = load_checkpoint(tmp_path / "cut/checkpoint").training["step"]
    assert 0 < step < 1500

    resumed = run_script("train", *settings, f"output_dir={tmp_path}/cut").stdout
    assert f"going on at step {step} of 1500" in resumed
    for file in ("policy.safetensors", "training.safetensors", "training.json"):
        whole, cut = (tmp_path / name / "checkpoint" / file for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize("name", ["collect", "inspect", "train", "rollout", "sweep"])
def test_help_shows_settings_groups_and_an_example(run_script, name):
    out = run_script(name, "--help").stdout
    assert f"python scripts/{name}.py" in out
    assert "Groups" in out
    assert "output_dir" in out


def bad_inputs(planar_run: Path, tmp_path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Command lines, and what their one-sentence refusals must say."""
    checkpoint = f"checkpoint={planar_run}/checkpoint"
    dataset = f"dataset.path={planar_run}/planar-v0"
    truncated = tmp_path / "truncated"
    shutil.copytree(planar_run / "checkpoint", truncated)
    weights = truncated / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = tmp_path / "damaged"
    shutil.copytree(planar_run / "planar-v0", damaged)
    hdf5 = damaged / "data" / "main_data.hdf5"
    hdf5.write_bytes(hdf5.read_bytes()[: hdf5.stat().st_size // 2])
    (tmp_path / "broken.zarr.zip").write_bytes(b"PK\x03\x04 not a zip")
    return {
        "unknown top-level key": (["rollout", checkpoint, "episods=5"], ["episods", "'episodes'"]),
        "unknown nested key": (["rollout", checkpoint, "sampler.ddim_step=5"], ["ddim_step", "'ddim_steps'"]),
        "unknown train key": (["train", dataset, "train.lerning_rate=1"], ["lerning_rate", "'learning_rate'"]),
        "unknown auxiliary key": (["train", dataset, "auxiliary=[stat]"], ["stat", "'state'"]),
        "only auxiliary keys": (["train", dataset, "auxiliary=[state]"], ["at least one observation key"]),
        "unknown denoiser key": (["train", dataset, "denoiser.hiden_size=8"], ["hiden_size", "'hidden_size'"]),
        "unknown dataset key": (["train", "dataset.pth=x"], ["pth", "'path'"]),
        "unknown env key": (["rollout", checkpoint, "env.tsk=x"], ["tsk"]),
        "unknown group": (["rollout", checkpoint, "smpler.eta=1"], ["smpler", "'sampler'"]),
        "unknown option": (["train", dataset, "denoiser=resnet"], ["denoiser/resnet", "residual_mlp"]),
        "wrong type": (["rollout", checkpoint, "episodes=many"], ["episodes should be int", "'many'"]),
        "broken grammar": (["rollout", checkpoint, "episodes=[1"], ["episodes=[1"]),
        "no steps": (["rollout", checkpoint, "sampler.ddim_steps=0"], ["ddim_steps", "0"]),
        "too many steps": (["rollout", checkpoint, "sampler.ddim_steps=101"], ["1..100", "101"]),
        "too many in a sweep": (["sweep", checkpoint, "ddim_steps=[1,101]"], ["1..100", "101"]),
        "steps that no cell has": (["sweep", checkpoint, "sampler.ddim_steps=3"], ["ddim_steps=[...]", "3"]),
        "repeated cell": (["sweep", checkpoint, "ddim_steps=[2,2]"], ["repeat", "[2, 2]"]),
        "empty sweep": (["sweep", checkpoint, "ddim_steps=[]"], ["ddim_steps is empty"]),
        "fractional step": (["sweep", checkpoint, "ddim_steps=[1.5]"], ["ddim_steps", "1.5"]),
        "eta": (["rollout", checkpoint, "sampler.eta=2"], ["eta must lie within 0", "2"]),
        "spacing": (["rollout", checkpoint, "sampler.spacing=even"], ["trailing, leading, linspace", "even"]),
        "execution horizon": (["rollout", checkpoint, "execution_horizon=9"], ["1..8", "9"]),
        "no episodes": (["rollout", checkpoint, "episodes=0"], ["episodes must be 1 or more"]),
        "no environments": (["rollout", checkpoint, "num_envs=0"], ["num_envs must be 1 or more"]),
        "device": (["rollout", checkpoint, "device=warp"], ["device=warp", "device=cpu"]),
        "no checkpoint given": (["rollout"], ["checkpoint is missing", "checkpoint=..."]),
        "missing checkpoint": (["rollout", f"checkpoint={tmp_path}/none"], ["no checkpoint at"]),
        "truncated checkpoint": (["rollout", f"checkpoint={truncated}"], ["policy.safetensors", "damaged"]),
        "another environment": (["rollout", checkpoint, "env=pusht"], ["do not fit the policy's", "choose the env="]),
        "no dataset given": (["train"], ["dataset.path is missing"]),
        "missing dataset": (["train", f"dataset.path={tmp_path}/none"], ["no dataset at", "dataset.path"]),
        "truncated dataset": (["train", f"dataset.path={damaged}"], ["damaged"]),
        "missing zarr": (["train", "dataset=zarr", "dataset.path=none.zarr.zip"], ["no dataset at none.zarr.zip"]),
        "broken zarr": (
            ["train", "dataset=zarr", f"dataset.path={tmp_path}/broken.zarr.zip"],
            ["broken.zarr.zip", "not a whole zip"],
        ),
        "no expert": (["collect", "env=pusht"], ["no scripted expert"]),
        "unknown task": (["collect", "env=metaworld", "env.task=pick-plase-v3"], ["pick-plase-v3", "pick-place-v3"]),
        "no environment": (["collect"], ["env is missing", "metaworld"]),
        "dataset there": (["collect", "env=planar", f"output_dir={planar_run}"], ["is there already"]),
        "prediction type": (["train", dataset, "prediction_type=noise"], ["epsilon, sample, v_prediction"]),
        "tracker mode": (["sweep", checkpoint, "tracker=wandb", "tracker.mode=onlin"], ["tracker.mode", "'onlin'"]),
        "tracker key": (["train", dataset, "tracker.projct=x"], ["projct", "'project'"]),
        "tracker": (["train", dataset, "tracker=mlflow"], ["tracker/mlflow", "wandb"]),
        "resume with other settings": (
            ["train", dataset, "experiment=planar", "train.steps=400", f"output_dir={planar_run}"],
            ["other settings", "steps"],
        ),
    }


def test_bad_input_is_refused_in_one_sentence_before_any_work(planar_run, tmp_path, monkeypatch, capsys):
    """All in one process, through the commands' own entry points: a process each would take minutes."""
    from scripts import collect, rollout, sweep, train

    mains = {"collect": collect.main, "rollout": rollout.main, "sweep": sweep.main, "train": train.main}
    monkeypatch.chdir(tmp_path)
    problems = []
    for label, ((name, *overrides), expected) in bad_inputs(planar_run, tmp_path).items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *overrides])
        with pytest.raises(SystemExit) as stop:
            mains[name]()
        err = capsys.readouterr().err
        one_sentence = err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
        if stop.value.code != 2 or not one_sentence or not all(part in err for part in expected):
            problems.append((label, stop.value.code, err))
    assert problems == []
    assert not (tmp_path / "outputs").exists()


def test_bad_input_exits_with_code_2_in_a_real_process(planar_run, run_script):
    err = run_script("rollout", f"checkpoint={planar_run}/checkpoint", "episods=5", check=2).stderr
    assert err == "error: " + err.removeprefix("error: ").strip() + "\n"
    assert "did you mean 'episodes'?" in err


def test_missing_extra_names_the_install_command(planar_run, monkeypatch, capsys, tmp_path):
    from scripts import collect

    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setattr(sys, "argv", ["collect.py", "env=metaworld", f"output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        collect.main()
    assert stop.value.code == 2
    assert "pip install 'ddim-policy[metaworld]'" in capsys.readouterr().err
