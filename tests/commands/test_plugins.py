"""Parts from outside the package: one of each kind, chosen by name on any command; and what a new setting takes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from hydra.core.config_store import ConfigStore

import envs
from envs import families
from policy import DENOISERS, ENCODERS, FORMATS, SOLVERS, load_checkpoint
from policy.common import plugins
from policy.data.formats.format import Format
from tests.conftest import ENVIRONMENT, ROOT

# A user's module, in the folder that the commands are run in.
MY_PARTS = """
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

import envs
import policy
from envs.planar import PlanarEnv, make_planar_expert
from policy.data.episode import Episode
from policy.data.formats.format import Format
from policy.diffusion.coefficients import TO_CLEAN, ddim_coefficients
from policy.model.denoisers.denoiser import Denoiser

HERE = Path(__file__).parent


def timid(schedule, timesteps, eta, prediction_type):
    table = ddim_coefficients(schedule, timesteps, eta, prediction_type)
    table[:, TO_CLEAN] *= 0.5
    return table


class MyDenoiser(Denoiser):
    def __init__(self, *, obs_size: int, action_dim: int, action_horizon: int, num_steps: int, hidden_size: int = 64):
        super().__init__()
        self.embed_timestep = nn.Embedding(num_steps, hidden_size)
        self.observe = nn.Linear(obs_size, hidden_size)
        self.enter = nn.Linear(action_horizon * action_dim, hidden_size)
        self.leave = nn.Linear(hidden_size, action_horizon * action_dim)

    def conditions(self, embedded_timestep, obs_embedding):
        return (embedded_timestep + self.observe(obs_embedding),)

    def denoise(self, noisy_actions, conditions):
        hidden = nn.functional.silu(self.enter(noisy_actions.flatten(1)) + conditions[0])
        return self.leave(hidden).unflatten(1, noisy_actions.shape[1:])


class MyEncoder(nn.Module):
    def __init__(self, *, shapes: dict, obs_horizon: int, obs_size: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.layer = nn.Linear(obs_horizon * shapes["state"][0], obs_size)

    def forward(self, observations):
        return self.scale * self.layer(observations["state"].flatten(1))


class MyReader:
    def __init__(self, path, request):
        self.names = [file.name for file in sorted(path.glob("*.npz"))]
        self.held_out, self.metadata, self.path = [], {"format": "mine"}, path

    def read(self, name):
        with np.load(self.path / name) as arrays:
            return Episode(observations={"state": arrays["state"]}, actions=arrays["action"])

    def close(self):
        pass


def open_mine(path, files, request):
    return MyReader(path, request)


def make_mine(*, render_mode: str | None = None, size: int = 32):
    with (HERE / "processes.txt").open("a") as file:
        print(os.getpid(), file=file)
    return PlanarEnv(render_mode=render_mode, image_size=size)


policy.SOLVERS.register("mine", timid)
policy.DENOISERS.register("mine", MyDenoiser)
policy.ENCODERS.register("mine", MyEncoder)
policy.FORMATS.register("mine", Format(open=open_mine))
envs.register_family("mine", make_mine, make_planar_expert)
"""
PLUGIN = "plugins=[my_parts]"
SMALL = ["train.steps=4", "train.warmup_steps=1", "train.batch_size=8", "train.rollout_every=4", "obs_size=8"]


@contextlib.contextmanager
def a_user(folder):
    """In a folder of the user's; what plugins registered is gone afterwards, as with the process."""
    registered = [registry._parts for registry in (SOLVERS, DENOISERS, ENCODERS, FORMATS)]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as restored:
        for parts in (*registered, families.FAMILIES, families.EXPERTS):
            restored.enter_context(mock.patch.dict(parts))
        patch.chdir(folder)
        patch.setattr(plugins, "_LOADED", [])
        before = set(sys.modules)
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
                    del sys.modules[name]
            for group in ("dataset", "denoiser", "encoder", "env"):
                ConfigStore.instance().repo.get(group, {}).pop("mine.yaml", None)


@pytest.fixture
def here(tmp_path):
    """A user's folder, with `my_parts.py`."""
    (tmp_path / "my_parts.py").write_text(MY_PARTS)
    with a_user(tmp_path):
        yield tmp_path


@pytest.fixture(scope="module")
def trained(run_command, tmp_path_factory):
    """A folder of a user who demonstrated and trained with parts of their own."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "my_parts.py").write_text(MY_PARTS)
    (folder / "demos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        state = generator.uniform(-1, 1, (9, 4)).astype(np.float32)
        np.savez(folder / "demos" / f"{number}.npz", state=state, action=state[:, 2:] - state[:, :2])
    with a_user(folder):
        run_command("collect", PLUGIN, "env=mine", "env.size=16", "episodes=2", "output_dir=collected")
        run_command(
            "train",
            *(PLUGIN, "dataset=mine", "dataset.path=demos", "env=mine", "env.size=24", "tracker=none"),
            *("denoiser=mine", "denoiser.hidden_size=16", "encoder=mine", "encoder.scale=0.5", "sampler.solver=mine"),
            *(*SMALL, "train.rollout_episodes=1", "output_dir=run"),
        )
    return folder


def one_sentence(error):
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_a_checkpoint_stores_the_registered_names_and_no_import_path(trained):
    config = json.loads((trained / "run/checkpoint/config.json").read_text())
    assert config["policy"]["denoiser"] == {"name": "mine", "hidden_size": 16}
    assert config["policy"]["encoder"] == {"name": "mine", "scale": 0.5}
    assert config["env"] == {"name": "mine", "size": 24}
    assert config.pop("plugins") == ["my_parts"]  # for the sentence that asks for it
    files = [file for file in (trained / "run/checkpoint").iterdir() if file.suffix == ".json"]
    assert "my_parts" not in json.dumps(config)
    assert all("my_parts" not in file.read_text() for file in files if file.name != "config.json")
    history = json.loads((trained / "run/checkpoint/training.json").read_text())["history"]
    assert "rollout/score_mean" in history[-1]
    assert (trained / "collected/mine-v0").is_dir()


@pytest.mark.slow
def test_it_rolls_out_and_is_swept_over_solvers_in_processes_that_load_the_plugin_too(
    trained, run_command, plain_reports
):
    checkpoint = "checkpoint=run/checkpoint"
    with a_user(trained):
        run_command("rollout", PLUGIN, checkpoint, "episodes=2", "num_envs=2", "output_dir=rollout")
        (trained / "processes.txt").unlink()
        run_command(
            "sweep",
            *(PLUGIN, checkpoint, "sampler.solver=[ddim,mine]", "ddim_steps=[1,2]", "episodes=2"),
            *("num_envs=2", "workers=2", "videos=0", "output_dir=sweep"),
        )
    assert len(json.loads((trained / "rollout/episodes.json").read_text())) == 2
    processes = set((trained / "processes.txt").read_text().split())
    assert len(processes - {str(os.getpid())}) == 2
    document = json.loads((trained / "sweep/sweep.json").read_text())
    cells = {(cell["solver"], cell["ddim_steps"]): cell["cell"] for cell in document["cells"]}
    assert list(cells) == [("ddim", 1), ("ddim", 2), ("mine", 1), ("mine", 2)]
    scores = {key: [row["score"] for row in document["episodes"] if row["cell"] == cell] for key, cell in cells.items()}
    assert scores["mine", 1] != scores["ddim", 1]  # it does what it was written for


def test_without_the_plugin_a_checkpoint_is_refused_in_one_sentence_that_names_the_part_and_the_plugin(
    trained, run_command
):
    with a_user(trained):
        for command in ("rollout", "sweep", "export"):
            error = one_sentence(run_command(command, "checkpoint=run/checkpoint", check=2).stderr)
            assert "'mine'" in error
            assert "plugins=[my_parts]" in error
    code = "import policy, sys\ntry: policy.load_checkpoint('run/checkpoint')\nexcept ValueError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=trained, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\n") == 1
    assert "encoder 'mine'" in done.stdout
    assert "plugins=[my_parts]" in done.stdout


@pytest.mark.parametrize(
    ("part", "settings", "hint"),
    [
        ("denoiser", ["denoiser=mine", "env=planar"], "plugins=[my_parts]"),
        ("encoder", ["encoder=mine", "env=planar"], "plugins=[my_parts]"),
        ("environment", ["env=mine"], "plugins=[my_parts]"),
    ],
)
def test_each_missing_part_is_named_where_all_others_are_built_in(part, settings, hint, trained, run_command, tmp_path):
    data = ["dataset=mine", "dataset.path=demos", "tracker=none"]
    with a_user(trained):
        run_command("train", PLUGIN, *data, *settings, *SMALL, f"output_dir={tmp_path}")
    with a_user(trained):
        error = one_sentence(run_command("rollout", f"checkpoint={tmp_path}/checkpoint", check=2).stderr)
    assert f"{part} 'mine'" in error
    assert hint in error


@pytest.mark.parametrize(
    "setting", ["sampler.solver=mine", "dataset=mine", "denoiser=mine", "encoder=mine", "env=mine"]
)
def test_a_part_that_nobody_registered_is_refused_with_those_there_are(setting, here, run_command):
    error = one_sentence(run_command("train", "dataset.path=x", setting, check=2).stderr)
    assert "mine" in error
    assert any(name in error for name in ("ddim", "zarr", "unet", "state", "planar"))


def test_a_misspelt_setting_of_an_own_part_is_refused_with_the_nearest_one(here, run_command):
    for settings, nearest in (
        (["denoiser=mine", "denoiser.hiden_size=3"], "'hidden_size'"),
        (["encoder=mine", "encoder.scal=3"], "'scale'"),
        (["env=mine", "env.siz=3"], "'size'"),
        (["dataset=mine", "dataset.pth=x"], "'path'"),
        (["sampler.solver=min"], "'mine'"),
    ):
        error = one_sentence(run_command("train", PLUGIN, "dataset.path=x", *settings, check=2).stderr)
        assert f"did you mean {nearest}" in error, settings


@pytest.mark.parametrize(
    ("plugin", "source", "said"),
    [
        ("my_prts", "", "No module named 'my_prts'"),
        ("my_own", "import nowhere_to_be_found\n", "No module named 'nowhere_to_be_found'"),
        ("my_own", "1 / 0\n", "ZeroDivisionError"),
        ("my_own", "def broken(:\n", "SyntaxError"),
        ("my_own", "raise RuntimeError('first line\\nsecond line')\n", "RuntimeError: first line second line"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_refused_in_one_sentence(plugin, source, said, here, run_command):
    (here / "my_own.py").write_text(source)
    for command in ("collect", "inspect_data", "train", "rollout", "sweep", "export"):
        error = one_sentence(run_command(command, f"plugins=[{plugin}]", check=2).stderr)
        assert f"plugins={plugin} cannot be imported" in error
        assert said in error


@pytest.mark.parametrize(
    ("registry", "name"), [(SOLVERS, "ddim"), (DENOISERS, "unet"), (ENCODERS, "state"), (FORMATS, "zarr")]
)
def test_a_name_that_is_taken_is_refused(registry, name, here):
    built_in = registry[name]
    with pytest.raises(ValueError, match=f"there is a {registry.kind} '{name}' already: register yours under another"):
        registry.register(name, Format(open=open) if registry is FORMATS else lambda: None)
    registry.register(name, built_in)  # the same part again, as when a module is imported twice
    assert registry[name] is built_in


def test_a_family_that_is_taken_is_refused_and_a_plugin_that_takes_one_says_so(here, run_command):
    with pytest.raises(ValueError, match="There is an environment 'planar' already"):
        envs.register_family("planar", object)
    (here / "my_own.py").write_text("import policy\npolicy.DENOISERS.register('unet', object)\n")
    error = one_sentence(run_command("train", "plugins=[my_own]", "dataset.path=x", check=2).stderr)
    assert "there is a denoiser 'unet' already: register yours under another name" in error


def test_a_converted_dataset_is_not_served_again_once_the_code_of_its_format_has_changed(here, run_command):
    (here / "data").mkdir()
    np.savez(here / "data/one.npz", state=np.ones((9, 4), np.float32), action=np.ones((9, 2), np.float32))
    means = []
    for factor in (1, 100):
        (here / "my_own.py").write_text(MY_PARTS.replace('["action"]', f'["action"] * {factor}'))
        with a_user(here):
            run_command(
                "inspect_data", "plugins=[my_own]", "dataset=mine", "dataset.path=data", f"output_dir=i{factor}"
            )
        keys = {row["key"]: row for row in json.loads((here / f"i{factor}/inspect.json").read_text())["keys"]}
        means.append(keys["actions"]["whole"]["mean"])
    assert means == [1.0, 100.0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return ddim_coefficients(*given)[:-1]", r"must return a table of shape (2, 5), or (2, 6) for a multistep"),
        ("return ddim_coefficients(*given)[:, :4]", r"must return a table of shape (2, 5), or (2, 6) for a multistep"),
        ("return ddim_coefficients(*given) * float('nan')", "holds numbers that are not finite"),
        ("return None", "got None"),
        ("return given[7]", "failed with IndexError"),
    ],
)
def test_a_solver_without_a_whole_table_is_refused_before_any_episode(body, said, planar_run, here, run_command):
    (here / "my_own.py").write_text(
        "import policy\nfrom policy.diffusion.coefficients import ddim_coefficients\n"
        f"def bad(*given):\n    {body}\npolicy.SOLVERS.register('bad', bad)\n"
    )
    command = ("rollout", "plugins=[my_own]", f"checkpoint={planar_run}/checkpoint", "sampler.ddim_steps=2")
    error = one_sentence(run_command(*command, "sampler.solver=bad", check=2).stderr)
    assert "solver 'bad'" in error
    assert said in error


def test_a_denoiser_that_could_not_act_is_refused_before_training(planar_run, here, run_command):
    (here / "my_own.py").write_text(
        "import policy\nfrom torch import nn\n\nclass Plain(nn.Module):\n"
        "    def __init__(self, *, obs_size, action_dim, action_horizon, num_steps):\n        super().__init__()\n"
        "policy.DENOISERS.register('plain', Plain)\n"
    )
    data = f"dataset.path={planar_run}/planar-v0"
    error = run_command("train", "plugins=[my_own]", data, "denoiser=plain", check=2).stderr
    assert "the denoiser 'plain' is a Plain, without embed_timestep, conditions, denoise: derive it from" in error


def test_a_misspelt_option_or_plugins_is_answered_with_the_nearest_and_with_plugins(here, run_command):
    for setting, said in (
        ("denoiser=unett", "unknown denoiser 'unett' (did you mean 'unet'?)"),
        ("env=plannar", "unknown env 'plannar' (did you mean 'planar'?)"),
        ("plugin=[my_parts]", "did you mean 'plugins'?"),
        ("plugins=my_parts.py", "cannot be imported"),
        ("plugins=a,b", "plugins takes modules as Python imports them"),
        ("plugins=[3]", "plugins takes modules as Python imports them"),
    ):
        error = one_sentence(run_command("train", "dataset.path=x", setting, check=2).stderr)
        assert said in error, setting
        assert "plugins" in error, setting


def test_the_next_command_that_is_printed_names_the_plugins(trained, run_command):
    with a_user(trained):
        done = run_command("rollout", PLUGIN, "checkpoint=run/checkpoint", "episodes=1", "num_envs=1", "output_dir=n")
    assert "ddim-sweep checkpoint=run/checkpoint 'plugins=[my_parts]'" in done.stdout


def test_a_policy_that_is_saved_again_still_names_its_plugins(trained, tmp_path):
    with a_user(trained), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(trained))
        plugins.load_plugins(["my_parts"])
        policy = load_checkpoint(trained / "run/checkpoint").policy
        patch.setattr(plugins, "_LOADED", [])  # as after a plain import of the module
        policy.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["plugins"] == ["my_parts"]


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_setting_of_the_policy_or_of_training_is_one_line(planar_run, tmp_path):
    """In a copy of the code with two lines more: in the help, checked, and in what a checkpoint records."""
    for room in ("policy", "envs", "conf", "scripts"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file, line, more in (
        ("policy/model/config.py", "    obs_horizon: int = 2\n", '    colour: str = "red"\n'),
        ("policy/training/settings.py", "    batch_size: int = 256\n", "    patience: int = 7\n"),
    ):
        source = (tmp_path / file).read_text()
        assert source.count(line) == 1
        (tmp_path / file).write_text(source.replace(line, line + more))

    def train(*settings, code=0):
        done = subprocess.run(
            [sys.executable, tmp_path / "scripts/train.py", *settings],
            cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return done

    shown = train("--help").stdout.splitlines()
    assert [line.split() for line in shown if "colour" in line or "train.patience" in line] == [
        ["colour", "str", "default", "red"],
        ["train.patience", "int", "default", "7"],
    ]
    assert "did you mean 'colour'?" in train("colur=blue", code=2).stderr
    assert "train.patience should be int; got 'long'" in train("train.patience=long", code=2).stderr
    data = f"dataset.path={planar_run}/planar-v0"
    train(data, "colour=blue", "train.patience=3", "tracker=none", *SMALL, f"output_dir={tmp_path}/run")
    config = json.loads((tmp_path / "run/checkpoint/config.json").read_text())
    assert config["policy"]["colour"] == "blue"
    assert config["training"]["patience"] == 3
