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

# Runs commands with their settings in turn, and writes down what each said, loaded and opened.
PROBE = """
import contextlib, importlib, io, json, sys

opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
heavy, calls = json.loads(sys.stdin.read())
answers = []
for command, *settings in calls:
    opened.clear()
    sys.argv = [command, *settings]
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


def answers_of(calls, folder, heavy=HEAVY):
    return fresh(PROBE, json.dumps([sorted(heavy), calls]), folder)


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


def test_help_and_misspelt_settings_are_answered_before_anything_heavy_is_loaded_or_opened(tmp_path):
    misspelt = [(command, *pair) for command, settings in MISSPELT.items() for pair in settings.items()]
    helps = [[command, "--help"] for command in MISSPELT]
    wrong = [[command, *MISSING.get(command, []), *settings.split()] for command, settings, _ in misspelt]
    answers = answers_of([*helps, *wrong], tmp_path)
    helped, refused = answers[: len(helps)], answers[len(helps) :]
    for command, answer in zip(MISSPELT, helped, strict=True):
        assert answer["code"] == 0, command
        assert f"ddim-{command}" in answer["out"] or f"scripts/{command}" in answer["out"]
    for answer, (command, settings, nearest) in zip(refused, misspelt, strict=True):
        assert answer["code"] == 2, (command, settings)
        assert answer["err"].startswith("error: unknown "), (command, settings)
        assert answer["err"].count("\n") == 1, (command, settings)
        name = settings.split()[-1].split("=")[0].split(".")[-1]
        assert f"{name!r} (did you mean {nearest!r}?)" in answer["err"]
    # An editable install looks through a place that is no file.
    places = ("__editable__", sys.prefix, sys.base_prefix, str(ROOT), "/dev/", "/proc/", "/etc/", "/usr/")
    for answer, call in zip(answers, [*helps, *wrong], strict=True):
        assert answer["loaded"] == [], call
        assert [file for file in answer["opened"] if not file.startswith(places)] == [], call
        assert [file for file in answer["opened"] if "nowhere" in file] == [], call
    assert list(tmp_path.iterdir()) == []


def test_the_probe_notices_what_is_loaded_and_opened(tmp_path):
    (tmp_path / "my_part.py").write_text("import h5py\nopen('my_notes.txt', 'w').close()\n")
    (answer,) = answers_of([["train", "plugins=[my_part]", "prediction_typ=x"]], tmp_path)
    assert answer["code"] == 2
    assert "h5py" in answer["loaded"]
    assert "my_notes.txt" in answer["opened"]


@pytest.mark.parametrize("package", ["policy", "envs", "scripts.command"])
def test_importing_a_package_loads_nothing_heavy(package):
    code = f"import json, sys, {package}\nprint(json.dumps([n for n in {sorted(HEAVY)} if n in sys.modules]))"
    assert fresh(code) == []


@pytest.mark.parametrize(
    ("chosen", "rounds"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"GOMP_SPINCOUNT": ""}, "1000"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_torch_is_told_how_threads_wait_before_it_is_imported_unless_the_user_says_how(monkeypatch, chosen, rounds):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delitem(ENVIRONMENT, name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    found = "[os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules]"
    assert fresh(f"import json, os, sys, scripts.train\nprint(json.dumps({found}))") == [rounds, False]


def test_a_name_of_the_package_loads_what_it_needs_and_no_more():
    code = "import json, sys, policy\npolicy.TrainSettings\nprint(json.dumps(sorted(sys.modules)))"
    loaded = fresh(code)
    assert "policy.training.settings" in loaded
    assert HEAVY & {*loaded} == set()


def test_a_rollout_loads_only_what_it_needs(planar_run, tmp_path):
    settings = [f"checkpoint={planar_run}/checkpoint", "episodes=1", "num_envs=1", f"output_dir={tmp_path}/out"]
    (answer,) = answers_of([["rollout", *settings]], tmp_path, NOT_FOR_A_ROLLOUT | {"torch"})
    assert answer["code"] == 0, answer["err"]
    assert "success" in answer["out"]
    assert answer["loaded"] == ["torch"]  # which also shows that the probe sees what a rollout loads
