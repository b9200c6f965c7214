"""The commands as a user types them: what they leave behind, and how they refuse bad input.

Most console commands run once for real, in a process of its own: `ddim-collect` and `ddim-train` make `planar_run`,
`ddim-rollout` runs here, and `test_export.py` exports. Everything else runs in this process, which takes seconds less.
"""

import csv
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import entry_points
from pathlib import Path

import h5py
import pytest
import torch

from policy import load_checkpoint
from policy.common.next_line import next_line
from policy.data.reading import read_demonstrations
from policy.statistics.fit import conclude
from policy.statistics.intervals import wilson_interval
from tests.conftest import ENVIRONMENT, PROGRAMS, ROOT


@pytest.fixture
def console(tmp_path):
    """Run an installed command in an empty folder; gives what it printed."""

    def run(name, *overrides):
        (tmp_path / "here").mkdir()
        done = subprocess.run(
            [PROGRAMS / f"ddim-{name}", *map(str, overrides)],
            cwd=tmp_path / "here",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_collecting_says_what_it_wrote_and_what_comes_next(planar_run):
    out = (planar_run / "collect.txt").read_text()
    assert "40 demonstrations of" in out
    assert f"ddim-train dataset.path={planar_run}/planar-v0" in out


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
    out = (planar_run / "train.txt").read_text()
    windows = re.search(r"^(\d+) training windows from 38 episodes \(2 held out\)", out, re.MULTILINE)
    assert windows
    passes = 300 * 64 / int(windows[1])
    assert f"300 steps are {passes:,.{0 if passes >= 10 else 1}f} passes over these windows" in out
    success = f"rollout success {history[-1]['rollout/success_rate']:.0%} (of 2 episodes)"
    assert re.search(rf"^step 300: loss 0\.\d+, validation loss 0\.\d+, {re.escape(success)}$", out, re.MULTILINE)
    assert f"best saved: step 300, the last, {success}" in out
    assert f"ddim-rollout checkpoint={planar_run}/checkpoint" in out
    lines = (planar_run / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert {"val/sampled_chunk_error/1", "train/averaged_first_action_error", "fit/ratio_high"} <= history[-1].keys()
    assert {"recovery/state[0]", "recovery/state[1]"} <= history[-1].keys()
    sentence = conclude(history).sentence
    assert sentence.startswith("too few held-out episodes (2) to tell")
    assert f"\n{sentence}\nof an error in where the robot is, one chunk corrects state[0] " in out
    assert html.escape(sentence) in (planar_run / "training.html").read_text(encoding="utf-8")


def test_training_says_what_its_episodes_were_made_of_and_what_makes_it_faster(
    planar_run, run_command, tmp_path, monkeypatch
):
    settings = [
        f"dataset.path={planar_run}/planar-v0",
        "dataset.relabel={_target_: tests.data.test_reading.halves, _partial_: true}",
        *("train.steps=1", "train.warmup_steps=0", "train.rollout_every=0", "tracker=none"),
    ]
    for fast in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast}, raising=False)
        out = run_command("train", "experiment=planar", *settings, f"output_dir={tmp_path / str(fast)}").stdout
        assert "training windows from 76 episodes, made of 38 by relabelling (2 held out)" in out
        assert ("train.precision=bfloat16 is probably faster" in out) == fast
    assert "the preset, as it is, reaches: ddim_steps=8, success_rate=1" in out
    controlled = run_command(
        "train", "experiment=planar", "objective=mip", *settings, f"output_dir={tmp_path / 'mip'}"
    ).stdout
    assert "the preset, as it is, reaches" not in controlled  # its figures are of diffusion


def test_rollout_writes_one_entry_per_seed_and_videos(planar_run, console, tmp_path):
    out = console(
        "rollout",
        f"checkpoint={planar_run}/checkpoint",
        "episodes=6",
        "sampler.ddim_steps=4",
        "execution_horizon=8",
        "num_envs=2",
        "video=1",
        f"output_dir={tmp_path}",
    )
    episodes = json.loads((tmp_path / "episodes.json").read_text())
    assert [episode["seed"] for episode in episodes] == list(range(100_000, 100_006))
    keys = {"seed", "success", "score", "return", "steps", "late_steps", "attempts"}
    assert all(episode.keys() == keys for episode in episodes)
    successes = sum(episode["success"] for episode in episodes)
    low, high = wilson_interval(successes, 6)
    assert f"success {successes / 6:.0%} ({successes} of 6, 95 % {low:.0%} to {high:.0%})" in out
    assert len(list(tmp_path.glob("episode_100000_*.mp4"))) == 1


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_environments_and_processes(planar_run, run_command, tmp_path):
    files = []
    for num_envs, cores in ((1, 1), (3, 1), (8, 2)):
        folder = tmp_path / str(num_envs)
        run_command(
            "rollout",
            f"checkpoint={planar_run}/checkpoint",
            "episodes=8",
            "sampler.ddim_steps=2",
            "sampler.eta=1.0",
            f"num_envs={num_envs}",
            f"output_dir={folder}",
            cores=cores,
        )
        files.append((folder / "episodes.json").read_text())
    assert files[0] == files[1] == files[2]


def test_sweep_writes_a_row_per_cell_in_json_csv_and_a_picture(planar_run, run_command, tmp_path):
    out = run_command(
        "sweep",
        f"checkpoint={planar_run}/checkpoint",
        "ddim_steps=[1,2,4]",
        "episodes=4",
        "videos=0",
        "workers=1",
        "tracker=wandb",
        f"output_dir={tmp_path}",
    ).stdout
    rows = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [row["ddim_steps"] for row in rows] == [1, 2, 4]
    for row in rows:
        assert row["episodes"] == 4
        assert row["success_low"] <= row["success_rate"] <= row["success_high"]
        assert row["latency_ms_median"] > 0
    assert 0 < rows[0]["multiply_adds"] < rows[1]["multiply_adds"] < rows[2]["multiply_adds"]
    table = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [int(row["ddim_steps"]) for row in table] == [1, 2, 4]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| ddim_steps |" in out
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_inspect_describes_demonstrations_and_draws_them(planar_run, run_command, tmp_path):
    out = run_command("inspect_data", f"dataset.path={planar_run}/planar-v0", f"output_dir={tmp_path}/out").stdout
    assert "episodes     40 with " in out
    assert (tmp_path / "out" / "inspect.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())


def test_inspect_says_what_a_checkpoint_is_and_was_trained_on(planar_run, run_command):
    folder = planar_run / "checkpoint"
    out = run_command("inspect_data", f"checkpoint={folder}").stdout
    said = {line[:12].rstrip(): line[13:] for line in out.splitlines()}
    assert said["environment"] == "name=planar"
    assert said["control rate"] == "10 Hz, that of the demonstrations"
    transitions = load_checkpoint(folder).training["transitions"]
    assert said["trained on"] == f"{planar_run}/planar-v0: 40 episodes, {transitions} transitions"
    assert said["training"] == "step 300, batch_size 64, learning_rate 0.001, seed 0"
    history = json.loads((folder / "training.json").read_text())["history"][-1]
    success = f"rollout success {history['rollout/success_rate']:.0%} of 2 episodes (step 300)"
    assert said["measured"] == f"validation loss {history['val/loss']:.4g} (step 300), {success}"
    assert said["actions"] == "(2,), in chunks of 8"
    assert "ddim_steps=8 eta=0.0" in said["sampler"]
    assert out.splitlines()[-1] == next_line("ddim-rollout", checkpoint=folder)
    best = run_command("inspect_data", f"checkpoint={planar_run}/checkpoints/best").stdout
    assert said["measured"] in best  # a kept checkpoint says it too, without the history
    assert said["errors"].startswith("too few held-out episodes (2)")
    assert said[""].startswith("of an error in where the robot is, one chunk corrects state[0] ")


def test_inspect_of_a_checkpoint_and_its_data_measures_and_draws_the_errors(planar_run, run_command, tmp_path):
    given = [f"checkpoint={planar_run}/checkpoint", f"dataset.path={planar_run}/planar-v0"]
    out = run_command("inspect_data", *given, f"output_dir={tmp_path}").stdout
    history = json.loads((planar_run / "checkpoint" / "training.json").read_text())["history"][-1]
    found = json.loads((tmp_path / "errors.json").read_text())
    assert "recovery/state[0]" in found
    assert found == pytest.approx({name: history[name] for name in found}, rel=1e-4)
    assert conclude([history]).sentence in out
    assert "by distance to the nearest training observation: " in out
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "inspect.json").exists()


def test_inspect_of_an_older_checkpoint_says_what_it_does_not_state(run_command):
    out = run_command("inspect_data", f"checkpoint={ROOT}/tests/data/checkpoint_schema1").stdout
    assert "control rate not stated" in out
    assert "tasks        not stated" in out
    assert "measured     neither a validation loss nor a rollout" in out


def test_inspect_refuses_what_does_not_belong_together(planar_run, run_command):
    data, checkpoint = f"dataset.path={planar_run}/planar-v0", f"checkpoint={planar_run}/checkpoint"
    assert "dataset.path is missing" in run_command("inspect_data", check=2).stderr
    assert (
        "give the dataset and the dataset settings of its training"
        in run_command("inspect_data", data, checkpoint, "dataset.max_episodes=7", check=2).stderr
    )
    older = f"checkpoint={ROOT}/tests/data/checkpoint_schema1"
    assert "does not note transitions of its training" in run_command("inspect_data", data, older, check=2).stderr
    assert "no checkpoint at nowhere" in run_command("inspect_data", data, "checkpoint=nowhere", check=2).stderr
    assert "no checkpoint at nowhere" in run_command("inspect_data", "checkpoint=nowhere", check=2).stderr


@pytest.mark.slow
def test_interrupted_training_saves_says_how_to_go_on_and_equals_an_uninterrupted_run(
    planar_run, run_command, tmp_path
):
    settings = [
        "experiment=planar",
        f"dataset.path={planar_run}/planar-v0",
        "tracker=none",
        "train.steps=200",
        "train.batch_size=32",
        "train.warmup_steps=20",
        "train.save_every=20",
        "train.rollout_every=0",
        "obs_size=32",
        "encoder.hidden_size=32",
        "denoiser.hidden_size=16",
        "encoder.noise=0.01",
        "denoiser.dropout=0.1",
    ]
    run_command("train", *settings, f"output_dir={tmp_path}/whole")
    command = [sys.executable, ROOT / "scripts/train.py", *settings, f"output_dir={tmp_path}/cut"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert "training windows" in process.stdout.readline()
    while not (tmp_path / "cut/checkpoint").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saved: the same command with output_dir=" in out
    step = load_checkpoint(tmp_path / "cut/checkpoint").training["step"]
    assert 0 < step < 200

    resumed = run_command("train", *settings, f"output_dir={tmp_path}/cut").stdout
    assert f"going on at step {step} of 200" in resumed
    for file in ("policy.safetensors", "training.safetensors", "training.json"):
        whole, cut = (tmp_path / name / "checkpoint" / file for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()


@pytest.mark.parametrize(
    "name", ["collect", "inspect_data", "train", "rollout", "sweep", "export", "import_checkpoint"]
)
def test_help_shows_settings_groups_and_an_example(run_command, name):
    out = run_command(name, "--help").stdout
    assert f"python scripts/{name}.py" in out
    assert "Groups" in out
    assert "output_dir" in out


# Command lines, and what their one-sentence refusals must say. {run} is a run on the planar environment, {here} the
# folder of `damaged`.
CHECKPOINT, DATASET = "checkpoint={run}/checkpoint", "dataset.path={run}/planar-v0"
BAD_INPUT = {
    "unknown top-level key": (["rollout", CHECKPOINT, "episods=5"], ["episods", "'episodes'"]),
    "unknown nested key": (["rollout", CHECKPOINT, "sampler.ddim_step=5"], ["ddim_step", "'ddim_steps'"]),
    "unknown train key": (["train", DATASET, "train.lerning_rate=1"], ["lerning_rate", "'learning_rate'"]),
    "unknown auxiliary key": (["train", DATASET, "auxiliary=[stat]"], ["stat", "'state'"]),
    "only auxiliary keys": (["train", DATASET, "auxiliary=[state]"], ["at least one observation key"]),
    "unknown denoiser key": (["train", DATASET, "denoiser.hiden_size=8"], ["hiden_size", "'hidden_size'"]),
    "unknown dataset key": (["train", "dataset.pth=x"], ["pth", "'path'"]),
    "unknown env key": (["rollout", CHECKPOINT, "env.tsk=x"], ["tsk"]),
    "unknown group": (["rollout", CHECKPOINT, "smpler.eta=1"], ["smpler", "'sampler'"]),
    "unknown option": (
        ["train", DATASET, "denoiser=resnet"],
        ["unknown denoiser 'resnet'", "residual_mlp", "plugins="],
    ),
    "wrong type": (["rollout", CHECKPOINT, "episodes=many"], ["episodes should be int", "'many'"]),
    "broken grammar": (["rollout", CHECKPOINT, "episodes=[1"], ["episodes=[1"]),
    "no steps": (["rollout", CHECKPOINT, "sampler.ddim_steps=0"], ["ddim_steps", "0"]),
    "too many steps": (["rollout", CHECKPOINT, "sampler.ddim_steps=101"], ["1..100", "101"]),
    "too many in a sweep": (["sweep", CHECKPOINT, "ddim_steps=[1,101]"], ["1..100", "101"]),
    "steps that no cell has": (["sweep", CHECKPOINT, "sampler.ddim_steps=3"], ["ddim_steps=[...]", "3"]),
    "repeated cell": (["sweep", CHECKPOINT, "ddim_steps=[2,2]"], ["repeat", "[2, 2]"]),
    "empty sweep": (["sweep", CHECKPOINT, "ddim_steps=[]"], ["ddim_steps is empty"]),
    "fractional step": (["sweep", CHECKPOINT, "ddim_steps=[1.5]"], ["ddim_steps", "1.5"]),
    "eta": (["rollout", CHECKPOINT, "sampler.eta=2"], ["eta must lie within 0", "2"]),
    "spacing": (["rollout", CHECKPOINT, "sampler.spacing=even"], ["leading, linspace, trailing", "even"]),
    "execution horizon": (["rollout", CHECKPOINT, "execution_horizon=9"], ["1..8", "9"]),
    "no episodes": (["rollout", CHECKPOINT, "episodes=0"], ["episodes must be 1 or more"]),
    "no environments": (["rollout", CHECKPOINT, "num_envs=0"], ["num_envs must be 1 or more"]),
    "device": (["rollout", CHECKPOINT, "device=warp"], ["device=warp", "device=cpu"]),
    "no checkpoint given": (["rollout"], ["checkpoint is missing", "checkpoint=..."]),
    "missing checkpoint": (["rollout", "checkpoint={here}/none"], ["no checkpoint at"]),
    "truncated checkpoint": (["rollout", "checkpoint={here}/truncated"], ["policy.safetensors", "damaged"]),
    "folder of nobody": (["rollout", "checkpoint=~nobody_here/run"], ["checkpoint=~nobody_here/run", "full path"]),
    "output of nobody": (["export", CHECKPOINT, "output_dir=~nobody_here"], ["output_dir=~nobody_here", "full path"]),
    "source of nobody": (["import_checkpoint", "source=~nobody_here/a.ckpt"], ["source=~nobody_here/a.ckpt"]),
    "init that is not there": (["train", DATASET, "init={here}/none"], ["init=", "no checkpoint at"]),
    "another environment": (["rollout", CHECKPOINT, "env=pusht"], ["do not fit the policy's", "choose the env="]),
    "no dataset given": (["train"], ["dataset.path is missing"]),
    "missing dataset": (["train", "dataset.path={here}/none"], ["no dataset at", "dataset.path"]),
    "truncated dataset": (["train", "dataset.path={here}/damaged"], ["damaged"]),
    "missing zarr": (["train", "dataset=zarr", "dataset.path=none.zarr.zip"], ["no dataset at none.zarr.zip"]),
    "broken zarr": (
        ["train", "dataset=zarr", "dataset.path={here}/broken.zarr.zip"],
        ["broken.zarr.zip", "not a whole zip"],
    ),
    "no expert": (["collect", "env=pusht"], ["no scripted expert"]),
    "unknown task": (["collect", "env=metaworld", "env.task=pick-plase-v3"], ["pick-plase-v3", "pick-place-v3"]),
    "no demonstrations": (["collect", "env=planar", "episodes=0"], ["episodes must be 1 or more; got 0"]),
    "no environment": (["collect"], ["env is missing", "metaworld"]),
    "record in a file": (
        ["rollout", CHECKPOINT, "record={run}/planar-v0/data/main_data.hdf5/x"],
        ["cannot write to record=", "choose another"],
    ),
    "dataset there": (["collect", "env=planar", "output_dir={run}"], ["is there already"]),
    "prediction type": (["train", DATASET, "prediction_type=noise"], ["epsilon, sample, v_prediction"]),
    "a setting that the objective has not": (
        ["train", "dataset.path={here}/none", "objective=flow", "sigma_data=0.5"],
        ["objective=flow has no sigma_data"],
    ),
    "noise that the network cannot see": (
        ["train", "dataset.path={here}/none", "prediction_type=epsilon", "sigma_data=0.5"],
        ["prediction_type=sample", "got prediction_type=epsilon"],
    ),
    "a schedule without signal": (
        ["train", "dataset.path={here}/none", "sigma_data=0.5", "schedule.zero_terminal_snr=true"],
        ["sigma_data needs signal at every timestep"],
    ),
    "noise to learn from that is hidden": (
        ["train", "dataset.path={here}/none", "sigma_data=0.5", "train.rectify_steps=10"],
        ["sigma_data=0.5 hides the noise"],
    ),
    "more steps than timesteps": (
        ["train", "dataset.path={here}/none", "schedule.num_steps=4", "sampler.ddim_steps=8"],
        ["1..4", "got 8"],
    ),
    "more actions than a chunk": (
        ["train", "dataset.path={here}/none", "execution_horizon=20"],
        ["execution_horizon must be within 1..8; got 20"],
    ),
    "text for a number": (["train", "dataset.path={here}/none", "obs_horizon='4'"], ["no dataset at"]),
    "recipe budget": (["train", DATASET, "recipe=auto", "recipe.budget=30"], ["recipe.budget takes a time", "30min"]),
    "unknown recipe": (["train", DATASET, "recipe=auto", "recipe.candidates=[unett]"], ["'unett'", "'unet'"]),
    "recipe of a checkpoint": (
        ["train", DATASET, "recipe=auto", "init={run}/checkpoint"],
        ["recipe=auto chooses the settings", "init="],
    ),
    "recipe in another run": (
        ["train", DATASET, "recipe=auto", "output_dir={run}"],
        ["began without recipe=auto", "output_dir="],
    ),
    "recipe without held-out episodes": (
        ["train", DATASET, "recipe=auto", "train.val_fraction=0"],
        ["of 40 episodes none is held out", "train.val_fraction=0.1"],
    ),
    "setting without its group": (["sweep", CHECKPOINT, "eta=[0,1]"], ["'eta' (did you mean sampler.eta=...?)"]),
    "controller setting without its group": (["rollout", CHECKPOINT, "late=repeat"], ["controller.late=...?"]),
    "folder of a run": (["rollout", "checkpoint={run}"], ["no checkpoint at", "ddim-train names, {run}/checkpoint"]),
    "tracker mode": (["sweep", CHECKPOINT, "tracker=wandb", "tracker.mode=onlin"], ["tracker.mode", "'onlin'"]),
    "tracker key": (["train", DATASET, "tracker.projct=x"], ["projct", "'project'"]),
    "what the command passes to a tracker": (
        ["train", DATASET, "tracker=wandb", "tracker.folder=x"],
        ["unknown setting of tracker 'folder'", "allowed: mode, patience, project"],
    ),
    "how it is drawn": (["collect", "env=planar", "env.render_mode=human"], ["unknown setting of env 'render_mode'"]),
    "tracker": (["train", DATASET, "tracker=mlflow"], ["unknown tracker 'mlflow'", "wandb"]),
    "resume with other settings": (
        ["train", DATASET, "experiment=planar", "train.steps=400", "output_dir={run}"],
        ["other settings", "steps"],
    ),
}


@pytest.fixture(scope="module")
def damaged(planar_run, tmp_path_factory) -> Path:
    """A folder of checkpoints and demonstrations that are not whole."""
    here = tmp_path_factory.mktemp("damaged")
    shutil.copytree(planar_run / "checkpoint", here / "truncated")
    weights = here / "truncated" / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copytree(planar_run / "planar-v0", here / "damaged")
    hdf5 = here / "damaged" / "data" / "main_data.hdf5"
    hdf5.write_bytes(hdf5.read_bytes()[: hdf5.stat().st_size // 2])
    (here / "broken.zarr.zip").write_bytes(b"PK\x03\x04 not a zip")
    return here


@pytest.fixture(scope="module")
def converted(planar_run):
    """The demonstrations are in the cache, so that no progress of reading stands before a refusal."""
    read_demonstrations(path=planar_run / "planar-v0", format="minari")


@pytest.mark.usefixtures("converted")
@pytest.mark.parametrize("label", BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence_before_any_work(
    label, planar_run, damaged, run_command, tmp_path, monkeypatch
):
    (name, *overrides), expected = BAD_INPUT[label]
    monkeypatch.chdir(tmp_path)
    given = [override.replace("{run}", str(planar_run)).replace("{here}", str(damaged)) for override in overrides]
    err = run_command(name, *given, check=2).stderr
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert [part for part in expected if part.replace("{run}", str(planar_run)) not in err] == [], err
    assert not (tmp_path / "outputs").exists()


def doubled(observations):
    warnings.warn("\x1b[33mtwice\x1b[0m", stacklevel=2)  # as Gymnasium writes them
    return {key: 2 * values for key, values in observations.items()}


def test_other_numbers_of_the_same_episodes_are_other_data(planar_run, run_command, tmp_path):
    """They have the same shapes and numbers of episodes."""
    changed = tmp_path / "planar-v0"
    shutil.copytree(planar_run / "planar-v0", changed)
    with h5py.File(changed / "data" / "main_data.hdf5", "r+") as file:
        file["episode_3/actions"][5] += 0.01
    transformed = ["dataset.transform=tests.commands.test_commands:doubled", f"dataset.path={planar_run}/planar-v0"]
    same = ["train.batch_size=64", "train.warmup_steps=20", "train.rollout_episodes=2", f"output_dir={planar_run}"]
    values = "the demonstrations held other values"
    for data, were in (
        ([f"dataset.path={changed}"], values),
        (transformed, f"{values}, dataset.transform was null"),
    ):
        err = run_command("train", "experiment=planar", *same, *data, check=2).stderr
        assert f"{were}): to go on" in err
        assert ("warning: twice\n" in err) == (data == transformed)
        err = run_command("inspect_data", f"checkpoint={planar_run}/checkpoint", *data, check=2).stderr
        assert f"{values})" in err or f"{values}, dataset.transform was null" in err
        assert "was trained on other data (" in err


def test_bad_input_exits_with_code_2_in_a_real_process(planar_run, run_script):
    err = run_script("rollout", f"checkpoint={planar_run}/checkpoint", "episods=5", check=2).stderr
    assert err == "error: " + err.removeprefix("error: ").strip() + "\n"
    assert "did you mean 'episodes'?" in err


def test_help_gives_a_setting_the_defaults_that_it_has_in_the_options_of_its_group(run_command):
    lines = [line.split() for line in run_command("train", "--help").stdout.splitlines()]
    said = {line[0]: " ".join(line[2:]) for line in lines if len(line) > 2}
    assert said["denoiser.hidden_size"] == "default 256 or 128"
    assert said["dataset.format"] == "default lerobot or minari or robomimic or zarr"
    assert said["dataset.path"] == "| list[Path] required"
    assert "settings; those that are left open are as in training." in run_command("rollout", "--help").stdout
    assert not [name for name in said if name in ("tracker.folder", "tracker.config", "env.render_mode")]


def test_every_console_command_has_its_function():
    commands = [entry for entry in entry_points(group="console_scripts") if entry.name.startswith("ddim-")]
    assert len(commands) == 7
    for command in commands:
        assert callable(command.load())


def test_missing_extra_names_the_install_command(run_command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    err = run_command("collect", "env=metaworld", f"output_dir={tmp_path}", check=2).stderr
    assert "pip install 'ddim-policy[metaworld]'" in err
