"""An exported policy: what is in the folder, and a program without torch that runs it."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import venv
from functools import partial

import numpy as np
import pytest
import torch

from policy import DiffusionPolicy, PolicyConfig, Sampler, load_checkpoint, save_checkpoint
from policy.commands import export as export_module
from policy.commands.export import TOLERANCE, export_policy
from policy.inference.backends import compile_sampler
from policy.training.state import TrainState
from tests.conftest import ROOT, randomize, small_config

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs pip install 'ddim-policy[export]'",
)

EXAMPLE = ROOT / "docs" / "examples" / "run_exported_policy.py"
ROBOT_LOOP = EXAMPLE.with_name("robot_loop.py")
SAMPLER_SETTINGS = {"ddim_steps": 2, "eta": 0.5}
SAMPLER = Sampler(**SAMPLER_SETTINGS)
# What a machine without torch answers to `import torch`.
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "policy", "envs", "scripts"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="session")
def checkpoint(made_once):
    config = PolicyConfig(
        observation_shapes={"state": (5,), "camera.front": (16, 16, 3)},
        action_dim=2,
        obs_size=24,
        encoder={"name": "image"},
        denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 2},
    )
    return made_once("to-export", lambda folder: make_checkpoint(folder, config)) / "checkpoint"


@pytest.fixture
def small_checkpoint(tmp_path):
    """One whose export takes a second less."""
    make_checkpoint(tmp_path, small_config(obs_size=8, hidden_size=8))
    return tmp_path / "checkpoint"


def make_checkpoint(folder, config):
    policy = DiffusionPolicy(config)
    randomize(policy)
    policy.action_normalizer.fit([-3, 10], [5, 11])
    state = TrainState(policy=policy, ema=policy, optimizer=torch.optim.AdamW(policy.parameters()))
    save_checkpoint(folder / "checkpoint", state, env=None, execution_horizon=6, training={})


@pytest.fixture(scope="session")
def exported(checkpoint, made_once, run_command):
    """What the command wrote; `said.txt` is what it printed."""

    def export(folder):
        sampler = [f"sampler.{name}={value}" for name, value in SAMPLER_SETTINGS.items()]
        done = run_command("export", f"checkpoint={checkpoint}", *sampler, f"output_dir={folder}/policy")
        (folder / "said.txt").write_text(done.stdout)

    return made_once("exported", export) / "policy"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("run_exported_policy", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_says_what_it_holds(exported):
    names = {file.name for file in exported.iterdir()}
    assert names == {"model.onnx", "export.json", "example_input.npz", "example_output.npy"}
    about = json.loads((exported / "export.json").read_text())
    assert about["sha256"] == hashlib.sha256((exported / "model.onnx").read_bytes()).hexdigest()
    assert about["sampler"] == {"ddim_steps": 2, "eta": 0.5, "spacing": "trailing", "clip": 1.0, "warm_start": None}
    assert about["execution_horizon"] == 6
    assert about["inputs"] == {
        "observations.state": {"shape": ["batch", 2, 5], "dtype": "float32"},
        "observations.camera.front": {"shape": ["batch", 2, 16, 16, 3], "dtype": "uint8"},
        "noise": {"shape": ["batch", 8, 2], "dtype": "float32"},
        "previous": {"shape": ["batch", 8, 2], "dtype": "float32"},
        "keep": {"shape": ["batch", 8], "dtype": "float32"},
        "step_noise": {"shape": [2, "batch", 8, 2], "dtype": "float32"},
    }
    assert about["output"] == {"name": "actions", "shape": ["batch", 8, 2], "dtype": "float32"}


def test_the_exported_policy_acts_as_the_checkpoint_does(exported, checkpoint, example):
    policy = load_checkpoint(checkpoint).policy
    eager, runs = compile_sampler(policy, SAMPLER), example.ExportedPolicy(exported)
    generator = np.random.default_rng(1)
    for rows in (1, 5):
        given = {
            "observations.state": generator.standard_normal((rows, 2, 5), dtype=np.float32),
            "observations.camera.front": generator.integers(0, 256, (rows, 2, 16, 16, 3), dtype=np.uint8),
            "noise": generator.standard_normal((rows, 8, 2), dtype=np.float32),
            "step_noise": generator.standard_normal((2, rows, 8, 2), dtype=np.float32),
            "previous": np.array([1, 10.5], np.float32) + generator.uniform(-0.5, 0.5, (rows, 8, 2)).astype(np.float32),
            "keep": np.repeat([[1, 1, 0.5, 0, 0, 0, 0, 0]], rows, axis=0).astype(np.float32),
        }
        observations = {key: given[f"observations.{key}"] for key in policy.config.observation_shapes}
        expected = eager(
            observations, given["noise"], given["step_noise"], previous=given["previous"], keep=given["keep"]
        )
        expected = expected.numpy()
        assert np.abs(runs(given) - expected).max() < TOLERANCE * 4  # the wider dimension's half range is 4
        assert expected[..., 1].min() >= 9.9  # in the data's units


def test_the_example_is_short_and_needs_numpy_and_the_runtime_alone():
    for file, lines, packages in ((EXAMPLE, 60, {"numpy", "onnxruntime"}), (ROBOT_LOOP, 100, {"numpy", EXAMPLE.stem})):
        text = file.read_text()
        assert len(text.splitlines()) < lines
        modules = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
        assert modules - set(sys.stdlib_module_names) == packages


def run_example(python, folder, prelude, cwd):
    """Run the example, and the control loop after it."""
    code = f"{prelude}\nimport sys, runpy\nsys.path.insert(0, {str(EXAMPLE.parent)!r})\n"
    for file, arguments in ((EXAMPLE, []), (ROBOT_LOOP, ["100", "9"])):
        code += (
            f"sys.argv = {['example', str(folder), *arguments]}\nrunpy.run_path({str(file)!r}, run_name='__main__')\n"
        )
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs_where_torch_cannot_be_imported(exported, tmp_path):
    out = run_example(sys.executable, exported, BLOCKED, tmp_path)
    milliseconds, difference = float(out.split()[2]), float(out.split("off by ")[1].split(";")[0])
    assert milliseconds < 1000
    assert difference < TOLERANCE
    assert "\n9 actions at 100 Hz, " in out


@pytest.mark.slow  # installs two packages
def test_the_example_runs_in_an_environment_with_numpy_and_onnxruntime_alone(exported, tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "onnxruntime"], check=True, timeout=600)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode != 0
    assert "first chunk" in run_example(python, exported, "", tmp_path)


def test_the_example_refuses_what_it_cannot_run(exported, example, tmp_path):
    with pytest.raises(ValueError, match=r"no exported policy at .*: write one with scripts/export.py"):
        example.ExportedPolicy(tmp_path)
    newer = shutil.copytree(exported, tmp_path / "newer")
    about = json.loads((newer / "export.json").read_text())
    (newer / "export.json").write_text(json.dumps({**about, "schema_version": 3}))
    with pytest.raises(ValueError, match="has export schema 3; this reads 2: export it anew"):
        example.ExportedPolicy(newer)
    other = shutil.copytree(exported, tmp_path / "other")
    with (other / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"model\.onnx is damaged or of another export"):
        example.ExportedPolicy(other)
    policy = example.ExportedPolicy(exported)
    given = dict(np.load(exported / "example_input.npz", allow_pickle=False))
    with pytest.raises(
        ValueError, match=r"observations.state must have shape \(1, 2, 5\) and be float32; got \(1, 2, 4\)"
    ):
        policy({**given, "observations.state": given["observations.state"][..., :4]})
    with pytest.raises(ValueError, match=r"the policy takes .*'step_noise'"):
        policy({name: value for name, value in given.items() if name != "step_noise"})


def test_an_export_whose_actions_are_not_the_policys_is_not_written(small_checkpoint, tmp_path, monkeypatch):
    other = DiffusionPolicy(small_config(obs_size=8, hidden_size=8)).eval()

    def compile_another(policy, sampler, backend, **weights):
        """As if the compiler had got it wrong."""
        return compile_sampler(other if backend == "onnx" else policy, sampler, backend="eager")

    monkeypatch.setattr(export_module, "compile_sampler", compile_another)
    with pytest.raises(ValueError, match="the exported model's actions differ from the policy's by"):
        export_policy(checkpoint=small_checkpoint, sampler=partial(Sampler), output_dir=tmp_path / "export")
    assert not (tmp_path / "export").exists()


@pytest.mark.slow  # one more trace
def test_a_multistep_solver_its_starting_point_and_another_horizon_are_exported(small_checkpoint, example, tmp_path):
    settings = {"ddim_steps": 3, "solver": "dpmpp_2m", "start": 0.8, "noise_scale": 0.5}
    sampler = Sampler(**settings)
    export_policy(
        checkpoint=small_checkpoint,
        sampler=partial(Sampler, **settings),
        execution_horizon=3,
        output_dir=tmp_path / "export",
    )
    exported = example.ExportedPolicy(tmp_path / "export")
    assert Sampler(**exported.about["sampler"]) == sampler
    assert exported.about["execution_horizon"] == 3
    assert load_checkpoint(small_checkpoint).execution_horizon != 3
    given = dict(np.load(tmp_path / "export/example_input.npz"))
    program = compile_sampler(load_checkpoint(small_checkpoint).policy, sampler, backend="eager")
    assert np.allclose(exported(given), export_module.run_on(program, given), atol=1e-4)


def test_settings_that_do_not_fit_are_refused_in_a_sentence(checkpoint):
    with pytest.raises(ValueError, match=r"unknown format 'onx' \(did you mean 'onnx'\?\); allowed: onnx"):
        export_policy(checkpoint=checkpoint, format="onx", sampler=partial(Sampler))
    with pytest.raises(ValueError, match=r"begins from noise; got sampler.warm_start=0.5: set sampler.warm_start=null"):
        export_policy(checkpoint=checkpoint, sampler=partial(Sampler, warm_start=0.5))
    with pytest.raises(ValueError, match="unknown weights 'int4'"):
        export_policy(checkpoint=checkpoint, weights="int4", sampler=partial(Sampler))
    with pytest.raises(ValueError, match=r"ddim_steps must be a whole number within 1..100"):
        export_policy(checkpoint=checkpoint, sampler=partial(Sampler, ddim_steps=101))
    with pytest.raises(ValueError, match=r"execution_horizon must be within 1\.\.8; got 9"):
        export_policy(checkpoint=checkpoint, sampler=partial(Sampler), execution_horizon=9)


def test_the_command_says_how_to_run_what_it_wrote_and_refuses_in_a_sentence(exported, run_command, tmp_path):
    assert f"python {EXAMPLE} {exported}" in (exported.parent / "said.txt").read_text()
    refused = run_command("export", f"checkpoint={tmp_path}/none", check=2)
    assert refused.stderr.startswith("error: no checkpoint at")
    refused = run_command("export", f"checkpoint={tmp_path}/none", "sampler.eta=2", check=2)  # before anything is read
    assert refused.stderr.startswith("error: sampler.eta must lie within 0")
