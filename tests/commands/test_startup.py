"""Commands answer at once: help and misspelt settings load nothing heavy and open nothing of the user's.

How many CPU seconds that takes is printed by `make bench-start`; a test that counted them would depend on the machine.
"""

import json
import subprocess
import sys

import pytest

from tests.conftest import ENVIRONMENT, ROOT

HEAVY = {
    *("torch", "scipy", "matplotlib", "wandb", "pyarrow", "h5py", "zarr", "minari", "av", "gymnasium"),
    *("jinja2", "huggingface_hub", "onnx", "mujoco", "metaworld", "gym_pusht", "numpy"),
}
# A rollout needs torch and gymnasium; these it does not.
NOT_FOR_A_ROLLOUT = {
    *("scipy.stats", "matplotlib", "wandb", "pyarrow", "h5py", "zarr", "minari", "jinja2", "huggingface_hub"),
    *("onnx", "mujoco", "metaworld", "gym_pusht", "sympy", "torch._dynamo"),
}

# Runs a command with each list of settings in turn, and writes down what it said, loaded and opened.
PROBE = """
import contextlib, importlib, io, json, sys

opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
command, heavy, calls = json.loads(sys.stdin.read())
answers = []
for call in calls:
    opened.clear()
    sys.argv = [command, *call]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(f"scripts.{command}").main()
        except SystemExit as stop:
            code = stop.code
    loaded = [name for name in heavy if name in sys.modules]
    answers.append({"out": out.getvalue(), "err": err.getvalue(), "code": code, "loaded": loaded, "opened": [*opened]})
print(json.dumps(answers))
"""


def fresh(code, given="", folder=ROOT):
    """What a new Python process prints, as JSON."""
    path = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=given, cwd=folder, env=path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def answers_of(command, calls, folder, heavy=HEAVY):
    return fresh(PROBE, json.dumps([command, sorted(heavy), calls]), folder)


# Settings with a typing mistake, and the name that the refusal proposes.
SAMPLER = {"sampler.ddim_step=3": "ddim_steps"}
ENV = {"env=planar env.image_siz=3": "image_size"}
MISSPELT = {
    "collect": {**ENV, "episods=3": "episodes"},
    "inspect_data": {"dataset.pth=x": "path", "dimension=3": "dimensions"},
    "train": {
        **SAMPLER,
        **ENV,
        "denoiser.hiden_size=3": "hidden_size",
        "denoiser=unet denoiser.kernal_size=3": "kernel_size",
        "encoder.nois=1": "noise",
        "dataset.pth=x": "path",
        "dataset=zarr dataset.pth=x": "path",
        "train.lerning_rate=1": "learning_rate",
        "schedule.num_step=3": "num_steps",
        "prediction_typ=x": "prediction_type",
        "tracker.projct=x": "project",
    },
    "rollout": {**SAMPLER, **ENV, "controller.delay_step=1": "delay_steps", "episods=3": "episodes"},
    "sweep": {**SAMPLER, **ENV, "controller.delay_step=1": "delay_steps", "ddim_step=[1,2]": "ddim_steps"},
    "export": {**SAMPLER, "wieghts=int8": "weights"},
}
# What a command would open first. These files do not exist, and the misspelt setting is what gets reported.
MISSING = {
    "inspect_data": ["dataset.path=nowhere/data"],
    "train": ["dataset.path=nowhere/data"],
    "rollout": ["checkpoint=nowhere/checkpoint"],
    "sweep": ["checkpoint=nowhere/checkpoint"],
    "export": ["checkpoint=nowhere/checkpoint"],
}


@pytest.mark.parametrize("command", MISSPELT)
def test_help_and_misspelt_settings_are_answered_before_anything_heavy_is_loaded_or_opened(command, tmp_path):
    helped, *refused = answers_of(
        command,
        [
            ["--help"],
            *([*MISSING.get(command, []), *settings.split()] for settings in MISSPELT[command]),
        ],
        tmp_path,
    )
    assert helped["code"] == 0
    assert f"ddim-{command}" in helped["out"] or f"scripts/{command}" in helped["out"]
    for answer, (settings, nearest) in zip(refused, MISSPELT[command].items(), strict=True):
        assert answer["code"] == 2, settings
        assert answer["err"].startswith("error: unknown "), settings
        assert answer["err"].count("\n") == 1, settings
        name = settings.split()[-1].split("=")[0].split(".")[-1]
        assert f"{name!r} (did you mean {nearest!r}?)" in answer["err"]
    # An editable install looks through a place that is no file.
    places = ("__editable__", sys.prefix, sys.base_prefix, str(ROOT), "/dev/", "/proc/", "/etc/", "/usr/")
    for answer in (helped, *refused):
        assert answer["loaded"] == []
        assert [file for file in answer["opened"] if not file.startswith(places)] == []
        assert [file for file in answer["opened"] if "nowhere" in file] == []
    assert list(tmp_path.iterdir()) == []


def test_the_probe_notices_what_is_loaded_and_opened(tmp_path):
    (tmp_path / "my_part.py").write_text("import h5py\nopen('my_notes.txt', 'w').close()\n")
    (answer,) = answers_of("train", [["plugins=[my_part]", "prediction_typ=x"]], tmp_path)
    assert answer["code"] == 2
    assert "h5py" in answer["loaded"]
    assert "my_notes.txt" in answer["opened"]


@pytest.mark.parametrize("package", ["policy", "envs", "scripts.command"])
def test_importing_a_package_loads_nothing_heavy(package):
    code = f"import json, sys, {package}\nprint(json.dumps([n for n in {sorted(HEAVY)} if n in sys.modules]))"
    assert fresh(code) == []


def test_a_name_of_the_package_loads_what_it_needs_and_no_more():
    code = "import json, sys, policy\npolicy.TrainSettings\nprint(json.dumps(sorted(sys.modules)))"
    loaded = fresh(code)
    assert "policy.training.settings" in loaded
    assert HEAVY & {*loaded} == set()


def test_a_rollout_loads_only_what_it_needs(planar_run, tmp_path):
    settings = [f"checkpoint={planar_run}/checkpoint", "episodes=1", "num_envs=1", f"output_dir={tmp_path}/out"]
    (answer,) = answers_of("rollout", [settings], tmp_path, NOT_FOR_A_ROLLOUT | {"torch"})
    assert answer["code"] == 0, answer["err"]
    assert "success" in answer["out"]
    assert answer["loaded"] == ["torch"]  # which also shows that the probe sees what a rollout loads
