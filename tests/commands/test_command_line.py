"""Command lines as users write them: odd paths, Hydra's flags, misspelt words, help, and the next line to paste."""

import inspect
import json
import os
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from policy.commands.rollout import MOST_STEPS_OF_A_SWEEP
from policy.commands.sweep import sweep
from policy.common import plugins
from policy.common.next_line import hydra_text, next_line
from policy.common.progress import progress
from scripts.command import refusals
from scripts.command_line import hydra_override
from scripts.environments import make_env
from scripts.help_text import every_setting
from scripts.sweep import main as sweep_command
from tests.conftest import PROGRAMS, ROOT

ODD_NAMES = [
    *(
        "josé.zarr",
        "演示.zarr",
        "lr=0.1.zarr",
        "run#3.zarr",
        "demos (2).zarr",
        "a,b.zarr",
        "[a].zarr",
        "[a]",
        "{a}.zarr",
    ),
    *(
        "it's.zarr",
        'say "x".zarr',
        "a:b",
        "a@b!",
        "100%",
        "$HOME",
        "${x}",
        "a\\b#",
        "2024",
        "1e3",
        "true",
        "range(1,3)",
    ),
]


def task_of(command: str):
    return import_module(f"scripts.{command}").TASK


def read(override: str) -> object:
    """The value that Hydra and OmegaConf make of an override."""
    value = OverridesParser.create().parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"x": value}), resolve=True)["x"]


@given(
    st.recursive(st.text(st.characters(codec="utf-8", exclude_categories=["C"])) | st.booleans() | st.none(), st.lists)
)
def test_values_are_written_as_hydra_reads_them(value):
    assert read(f"x={hydra_text(value)}") == value


@pytest.mark.parametrize("key", ["state", "agent pos", "a/b.c-d"])
def test_a_mapping_is_written_as_hydra_reads_it(key):
    value = {key: ["a, b", None], "x": {"y": "1"}}
    assert read(f"x={hydra_text(value)}") == value


@pytest.mark.parametrize("name", [name for name in ODD_NAMES if name != "${x}"])
def test_a_path_is_taken_as_it_stands(name):
    assert read(hydra_override(f"output_dir={name}", task_of("rollout"))) == name
    if name != "[a]":  # a list of one
        assert read(hydra_override(f"dataset.path={name}", task_of("train"))) == name


def test_a_path_that_hydra_reads_keeps_its_meaning():
    task = task_of("sweep")
    assert read(hydra_override("checkpoint=[a,'b c']", task)) == ["a", "b c"]
    assert read(hydra_override("checkpoint='a b'", task)) == "a b"
    assert read(hydra_override("dataset.path=[a,'b c']", task_of("train"))) == ["a", "b c"]
    assert read(hydra_override("dataset.path='[a]'", task_of("train"))) == "[a]"
    assert read(hydra_override("output_dir=null", task)) is None
    assert hydra_override("output_dir=${x}", task) == "++output_dir=${x}"
    assert hydra_override("output_dir=a,b", task, multirun=True) == "++output_dir=a,b"
    with pytest.raises(ValueError, match=r"""in quotes: 'checkpoint=\["a b","c=d"\]'"""):
        hydra_override("checkpoint=[~/a,b]", task)
    with pytest.raises(ValueError, match="in quotes: 'device=\"a=b\"'"):
        hydra_override("device=a=b", task)


def test_a_tilde_is_the_folder_of_the_user(run_command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"no checkpoint at {tmp_path}/a b" in run_command("rollout", "checkpoint=~/a b", check=2).stderr
    assert f"no checkpoint at {tmp_path}/b" in run_command("sweep", "checkpoint=['~/b']", check=2).stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["seed=3", "--cfg", "job"], "seed: 3"),
        (["-c", "job", "seed=3", "-p", "train"], "_target_: policy.TrainSettings"),
        (["--config-dir", "mine", "experiment=own", "--cfg=job"], "seed: 7"),
        (["--config-name", "rollout", "-c", "job"], "controller:"),
        (["output_dir=${oc.env:PATH}", "--cfg", "job", "--resolve"], "/bin"),
        (["--version"], "ddim-policy "),
        (["--hydra-help"], "--multirun"),
        (["--shell-completion", "install=bash"], "complete -o nospace"),
    ],
)
def test_flags_of_hydra_work_as_its_manual_writes_them(flags, said, run_command, monkeypatch, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text("# @package _global_\nseed: 7\n")
    monkeypatch.chdir(tmp_path)
    assert said in run_command("train", *flags).stdout


def test_multirun_may_stand_anywhere(run_command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in (["-m", "seed=1,2", "checkpoint=x"], ["seed=1,2", "--multirun", "checkpoint=x"]):
        assert "no checkpoint at x" in run_command("sweep", *arguments, check=2).stderr
    assert [file.name for file in tmp_path.rglob("*") if not file.is_dir()] != []  # Hydra's record of the command
    assert [folder for folder in tmp_path.rglob("*") if folder.is_dir() and not any(folder.iterdir())] == []


@pytest.mark.parametrize(
    ("command", "arguments", "nearest"),
    [
        ("train", ["dataest=zarr"], "'dataset'"),
        ("train", ["sampler=ddmi"], "'ddim'"),
        ("train", ["train.learning_rat=1"], "'learning_rate'"),
        ("train", ["train.precision=bfloat1"], "'bfloat16'"),
        ("rollout", ["checkpoint=x", "sampler.solver=ddimm"], "'ddim'"),
        ("rollout", ["checkpoint=x", "sampler._target_=policy.Samplr"], "'policy.Sampler'"),
        ("rollout", ["checkpoint=x", "on_env_error=cont"], "'count'"),
        ("rollout", ["checkpoint=x", "device=cudda"], "'cuda'"),
        ("rollout", ["env=metawrld"], "'metaworld'"),
        ("export", ["checkpoint=x", "format=onx"], "'onnx'"),
        ("rollout", ["checkpoint=x", "ddim_steps=2"], "sampler.ddim_steps=...?"),
        ("train", ["--output-dir=x"], "output_dir="),
        ("train", ["--multrun"], "'--multirun'"),
        ("train", ["--config-name", "trian"], "'train'"),
        ("train", ["--help", "train.learning_rat"], "'train.learning_rate'"),
        ("train", ["--help", "sampler=ddmi"], "'ddim'"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(command, arguments, nearest, run_command):
    assert f"did you mean {nearest}" in run_command(command, *arguments, check=2).stderr


def test_an_option_is_named_as_it_was_typed(run_command):
    assert "unknown option of env 'null'; allowed: " in run_command("train", "env=null", check=2).stderr


@pytest.mark.parametrize(
    ("command", "topic", "said"),
    [
        ("train", "train.learning_rate", ["peak, reached", "float", "0.001", "ddim-train train.learning_rate=0.001"]),
        ("train", "train.precision", ["float32 | bfloat16", "default: float32"]),
        ("train", "obs_horizon", ["number of observations", "default: 2"]),
        ("train", "denoiser.hidden_size", ["denoiser=modulated_mlp", "default: 256"]),
        ("rollout", "env.observation", ["(env=metaworld)", "default: features"]),
        ("sweep", "sampler", ["sampler=ddim", "sampler.eta"]),
        ("collect", "env=planar", ["A disc that must pass", "env.max_episode_steps"]),
        ("train", "experiment=planar", ["steps: 1500", "example: ddim-train experiment=planar"]),
    ],
)
def test_help_describes_a_setting_a_group_or_an_option(command, topic, said, run_command):
    out = run_command(command, "--help", topic).stdout
    assert all(words in out for words in said), out


def test_help_may_be_asked_for_before_and_after_a_setting(run_command):
    answers = [run_command("train", *a).stdout for a in (["--help", "seed"], ["--help=seed"], ["seed", "-h"])]
    assert answers[0] == answers[1] == answers[2]


def test_every_setting_of_a_command_has_a_meaning():
    """A setting without a line in a docstring would be described by nothing."""
    for command in ("collect", "train", "rollout", "sweep", "export", "import_checkpoint"):
        settings = dict(every_setting(task_of(command)))
        assert [name for name, meanings in settings.items() if "." not in name and not meanings[0].text] == []


@pytest.mark.parametrize("setting", ["checkpoint", "output_dir"])
def test_a_path_that_is_too_long_is_refused_in_a_short_sentence(setting, planar_run, run_command):
    settings = [f"checkpoint={planar_run}/checkpoint", f"{setting}={'a' * 5000}"]
    said = run_command("export", *settings, check=2).stderr
    assert said.startswith("error: a path is longer than the file system takes: '")
    assert len(said) < 200


def test_an_error_begins_on_a_line_of_its_own(capsys):
    def fails() -> None:
        with refusals():
            for _ in progress(range(3), total=3, desc="train", unit="step"):
                raise ValueError("this went wrong")

    with pytest.raises(SystemExit):
        fails()
    assert "\nerror: this went wrong\n" in capsys.readouterr().err


# --- next lines --------------------------------------------------------------------------------------------------


def pasted(line: str) -> tuple[str, list[str]]:
    """The command and the arguments that a shell makes of a printed line."""
    program, *arguments = shlex.split(line.removeprefix("next: "))
    assert Path(program).parent in (Path(), PROGRAMS)
    return Path(program).name.removeprefix("ddim-"), arguments


def test_a_next_line_is_quoted_and_has_environment_and_plugins(monkeypatch):
    monkeypatch.setattr(plugins, "_LOADED", ["my_parts"])
    env = {"name": "gym", "id": "a:B-v0", "kwargs": {"tasks": ["light switch"], "x": 1.5}, "success": "return>=2"}
    command, arguments = pasted(next_line("ddim-sweep", checkpoint=Path("runs/lr=0.1 try 'é'"), env=env, seed=None))
    values = {key: read(f"x={value}") for key, value in (argument.split("=", 1) for argument in arguments)}
    assert command == "sweep"
    assert values == {
        "checkpoint": "runs/lr=0.1 try 'é'",
        "env": "gym",
        **{f"env.{name}": value for name, value in env.items() if name != "name"},
        "plugins": ["my_parts"],
    }


def test_a_rollout_knows_how_many_steps_a_sweep_visits():
    """With fewer timesteps than that, its next line has to name steps that there are."""
    assert max(inspect.signature(sweep).parameters["ddim_steps"].default) == MOST_STEPS_OF_A_SWEEP


def test_the_name_of_a_command_is_enough_where_the_shell_finds_it(monkeypatch):
    monkeypatch.setenv("PATH", str(PROGRAMS))
    assert next_line("ddim-rollout", checkpoint="a") == "next: ddim-rollout checkpoint=a"
    monkeypatch.setenv("PATH", "/nowhere")
    assert next_line("ddim-rollout", checkpoint="a") == f"next: {PROGRAMS}/ddim-rollout checkpoint=a"


def test_every_next_line_runs_when_it_is_pasted(run_command, plain_reports, monkeypatch, tmp_path):
    """From a collection to the sweep, each command as the one before it printed it, in folders with odd names."""
    monkeypatch.chdir(tmp_path)
    few = {
        "train": [
            "train.steps=1",
            "train.batch_size=8",
            "denoiser.hidden_size=8",
            "tracker=none",
            "train.rollout_every=0",
            "sampler.noise_scale=0.5",
            "sampler.clip=null",
        ],
        "rollout": ["episodes=1", "num_envs=1", "env=planar", "env.max_episode_steps=20", "sampler.start=0.1"],
        "sweep": ["episodes=1", "videos=0"],
    }
    command, arguments = "collect", ["env=planar", "episodes=3"]
    for number in range(4):
        folder = f"output_dir=lr=0.1, [try] 'é' {number}"
        out = run_command(command, *arguments, *few.get(command, []), folder).stdout
        if command != "sweep":
            command, arguments = pasted(out.splitlines()[-1])
    assert command == "sweep"
    assert {"env=planar", "env.max_episode_steps=20"} <= set(arguments)
    assert {"sampler.start=0.1", "ddim_steps=[1,2,4,8]"} <= set(arguments)  # as many as that start allows, or fewer
    (swept,) = tmp_path.glob("*3/sweep.json")
    cells = json.loads(swept.read_text())["cells"]
    assert {(cell["noise_scale"], cell["clip"], cell["start"]) for cell in cells} == {
        (0.5, None, 0.1)
    }  # of the training
    assert "files: " in out


def test_the_demo_prints_commands_that_exist():
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if '@echo "  ddim-' in line]
    assert len(lines) == 4
    for line in lines:
        command, arguments = pasted(line.split('"')[1].strip().replace("$(DEMO)", "d").replace("$(DEMO_DATA)", "d"))
        assert all(hydra_override(argument, task_of(command)) for argument in arguments)


def test_a_reader_who_has_read_enough_of_the_help_is_told_nothing(monkeypatch, capsys):
    """As with `ddim-sweep --help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.argv", ["ddim-sweep", "--help"])
        monkeypatch.setattr("sys.stdout", closed)
        sweep_command()
        print("what Python flushes at its end", flush=True)
    assert capsys.readouterr().err == ""


def test_an_environment_that_changes_the_current_folder_moves_no_relative_path(monkeypatch, tmp_path):
    before = os.getcwd()
    monkeypatch.setattr("envs.make", lambda name, **settings: os.chdir(tmp_path))
    make_env("planar")
    assert os.getcwd() == before
