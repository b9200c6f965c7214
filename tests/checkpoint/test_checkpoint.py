"""Checkpoints: nothing is lost, nothing damaged is taken for whole, nothing in them is executed."""

import dataclasses
import errno
import json
import pickle
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from policy import DiffusionPolicy, PolicyConfig, Sampler, TrainSettings, load_checkpoint, save_checkpoint
from policy.checkpoint import (
    SaveError,
    choose_env,
    describe_best,
    describe_checkpoint,
    digest_of,
    files,
    is_checkpoint,
    keep_checkpoint,
    read_history,
    resume_training,
)
from policy.checkpoint.files import seal
from policy.tracking.tracker import NoTracker
from policy.training.loop import train
from policy.training.preparation import prepare_run

CONFIG = PolicyConfig(
    observation_shapes={"state": (3,)},
    action_dim=2,
    obs_size=12,
    encoder={"name": "state", "hidden_size": 8, "noise": 0.01, "dropout": 0.1},
    denoiser={"name": "modulated_mlp", "hidden_size": 16, "num_layers": 1, "dropout": 0.1},
    schedule={"num_steps": 20, "beta_schedule": "squaredcos_cap_v2"},
)
SETTINGS = TrainSettings(
    steps=20, batch_size=16, warmup_steps=2, log_every=5, val_every=5, save_every=100, val_fraction=0.2
)
ENV = {"name": "planar", "image_size": 64}
RECORD = {"seed": 3, "dataset": "memory"}
SAMPLER = Sampler(clip=None)


def new_run(demonstrations, config=CONFIG, settings=SETTINGS):
    return prepare_run(config, demonstrations, settings, seed=3, device="cpu")


def advance(run, steps, settings=SETTINGS):
    """Train until `steps` in all, then stop as Ctrl-C would."""
    train(
        run,
        settings,
        seed=3,
        tracker=NoTracker(),
        save=lambda state: None,
        should_stop=lambda: run.state.step >= steps,
    )
    return run


def save(folder: Path, run):
    save_checkpoint(folder, run.state, env=ENV, execution_horizon=5, sampler=SAMPLER, training=RECORD)
    return folder


def actions(policy: DiffusionPolicy) -> torch.Tensor:
    observations = {"state": torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))}
    return policy.sample_actions(observations, ddim_steps=6, eta=0.5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(demonstrations):
    return advance(new_run(demonstrations), 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Gives the checkpoint of `run`, which is trained and saved once."""
    folder = tmp_path_factory.mktemp("made") / "checkpoint"

    def make(demonstrations):
        return folder if folder.exists() else save(folder, advance(new_run(demonstrations), 6))

    return make


@pytest.fixture
def saved(made, demonstrations, tmp_path) -> Path:
    """A copy of it, to do with as one likes."""
    return shutil.copytree(made(demonstrations), tmp_path / "checkpoint")


def test_a_loaded_policy_acts_bit_for_bit_like_the_saved_average(run, saved):
    loaded = load_checkpoint(saved)
    assert torch.equal(actions(loaded.policy), actions(run.state.ema))
    assert not torch.equal(actions(loaded.policy), actions(run.state.policy.eval()))  # the average, not the newest
    assert not loaded.policy.training
    assert not any(p.requires_grad for p in loaded.policy.parameters())
    assert loaded.policy.config == CONFIG
    assert (loaded.env, loaded.execution_horizon, loaded.sampler) == (ENV, 5, SAMPLER)
    assert loaded.policy.origin.sampler == SAMPLER
    assert loaded.training == {**RECORD, "step": 6}
    assert load_checkpoint(str(saved)).path == saved


def test_files_are_safetensors_and_json_alone(saved):
    assert {f.name for f in saved.iterdir()} == {
        "config.json",
        "policy.safetensors",
        "training.safetensors",
        "training.json",
        "checksums.json",
    }
    assert [f.name for f in saved.parent.iterdir()] == ["checkpoint"]  # nothing half written is left beside it
    assert json.loads((saved / "config.json").read_text())["versions"]["torch"] == torch.__version__


def test_the_normalisers_statistics_travel_with_the_weights(run, saved, demonstrations):
    policy = load_checkpoint(saved).policy
    rows = torch.cat([torch.from_numpy(demonstrations.actions[s:e]) for s, e in episodes_of(run, demonstrations)])
    middle = (rows.amin(0).double() + rows.amax(0).double()) / 2
    torch.testing.assert_close(policy.action_normalizer.center, middle.float())


def episodes_of(run, demonstrations):
    return [(demonstrations.episode_starts[e], demonstrations.episode_ends[e]) for e in run.training.episodes]


def state_dicts(run):
    memory = run.state.optimizer.state_dict()
    return {
        **{f"policy.{k}": v for k, v in run.state.policy.state_dict().items()},
        **{f"ema.{k}": v for k, v in run.state.ema.state_dict().items()},
        **{f"optimizer.{i}.{k}": v for i, m in memory["state"].items() for k, v in m.items()},
    }


def test_two_halves_are_the_same_run_as_the_whole_bit_for_bit(demonstrations, tmp_path):
    whole = advance(new_run(demonstrations), 20)
    first = save(tmp_path / "checkpoint", advance(new_run(demonstrations), 10))
    second = new_run(demonstrations)
    resume_training(first, second.state, RECORD)
    assert second.state.step == 10
    advance(second, 20)
    expected, got = state_dicts(whole), state_dicts(second)
    assert expected.keys() == got.keys()
    assert any(key.startswith("optimizer.") and key.endswith("exp_avg_sq") for key in expected)
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []
    assert second.state.history == whole.state.history
    assert [entry["step"] for entry in whole.state.history] == [5, 10, 15, 20]


def test_a_resumed_run_starts_from_more_than_the_weights(demonstrations, saved):
    """The counter-check: without the optimiser's memory the halves would differ."""
    resumed, bare = new_run(demonstrations), new_run(demonstrations)
    resume_training(saved, resumed.state, RECORD)
    bare.state.policy.load_state_dict(resumed.state.policy.state_dict())
    bare.state.step = resumed.state.step
    one, other = advance(resumed, 8), advance(bare, 8)
    weights = [r.state.policy.denoiser.leave.weight for r in (one, other)]
    assert not torch.equal(*weights)


def test_the_history_is_read_without_the_policy_and_a_checkpoint_that_cannot_resume_has_none(run, saved):
    assert read_history(saved) == run.state.history
    edit(saved, lambda record: record["history"].append({"step": 99, "val/loss": None}), "training.json")
    seal(saved)
    assert read_history(saved)[-1] == {"step": 99}
    edit(saved, lambda record: record.update(history=[{"step": "last"}]), "training.json")
    with pytest.raises(ValueError, match="damaged"):
        read_history(saved)
    seal(saved)
    with pytest.raises(ValueError, match=r"training\.json"):
        read_history(saved)
    (saved / "training.json").unlink()
    assert read_history(saved) == []


def test_resuming_with_other_settings_is_refused(demonstrations, saved):
    with pytest.raises(ValueError, match=r"other settings \(training: seed was 3\).*, with init=.* these weights$"):
        resume_training(saved, new_run(demonstrations).state, {**RECORD, "seed": 4})
    other = dataclasses.replace(CONFIG, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r'other settings \(policy: prediction_type was "sample"\).*output_dir=$'):
        resume_training(saved, new_run(demonstrations, other).state, RECORD)
    both = r'\(policy: prediction_type was "sample"; training: seed was 3\)'
    with pytest.raises(ValueError, match=both):
        resume_training(saved, new_run(demonstrations, other).state, {**RECORD, "seed": 4})


def test_a_default_may_be_written_out(demonstrations, saved):
    stated = {"encoder": {**CONFIG.encoder, "skip": True}, "schedule": {**CONFIG.schedule, "zero_terminal_snr": False}}
    same = new_run(demonstrations, dataclasses.replace(CONFIG, **stated))
    assert resume_training(saved, same.state, RECORD) == {}
    other = new_run(demonstrations, dataclasses.replace(CONFIG, encoder={**CONFIG.encoder, "skip": False}))
    with pytest.raises(ValueError, match=r"\(policy: encoder\.skip was true\)"):
        resume_training(saved, other.state, RECORD)


def test_a_setting_that_is_not_finite_is_the_same_after_it_was_stored(run, demonstrations, tmp_path):
    """JSON has no infinity: it is stored as null."""
    noted = {**RECORD, "learning_rate": float("inf")}
    save_checkpoint(tmp_path / "c", run.state, training=noted, env=None, execution_horizon=4, sampler=SAMPLER)
    assert resume_training(tmp_path / "c", new_run(demonstrations).state, noted) == {}


def test_demonstrations_may_have_moved_if_their_values_are_noted(demonstrations, saved):
    noted = {"dataset": "/one/demos", "dataset.checksum": "0badcafe"}
    edit(saved, lambda config: config["training"].update(noted))
    seal(saved)
    moved = {**RECORD, **noted, "dataset": "/two/demos"}
    assert resume_training(saved, new_run(demonstrations).state, moved)["dataset"] == "/one/demos"
    with pytest.raises(
        ValueError, match=r'\(training: dataset was "/one/demos", the demonstrations held other values\)'
    ):
        resume_training(saved, new_run(demonstrations).state, {**moved, "dataset.checksum": "0badcaff"})
    with pytest.raises(ValueError, match=r"\(training: the demonstrations held other values\): to go on"):
        resume_training(saved, new_run(demonstrations).state, {**RECORD, **noted, "dataset.checksum": "0badcaff"})
    edit(saved, lambda config: config["training"].pop("dataset.checksum"))  # an earlier version's
    seal(saved)
    with pytest.raises(ValueError, match=r'\(training: dataset was "/one/demos"\)'):
        resume_training(saved, new_run(demonstrations).state, moved)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(folder: Path, change, file="config.json") -> None:
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def flip(file: Path) -> None:
    """Damage the header, which says where the tensors are."""
    data = bytearray(file.read_bytes())
    data[:8] = (2**60).to_bytes(8, "little")
    file.write_bytes(bytes(data))


DAMAGES = {
    "no folder": shutil.rmtree,
    "no config": lambda f: (f / "config.json").unlink(),
    "truncated config": lambda f: cut(f / "config.json"),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "config without policy": lambda f: edit(f, lambda c: c.pop("policy")),
    "config without env": lambda f: edit(f, lambda c: c.pop("env")),
    "policy is text": lambda f: edit(f, lambda c: c.update(policy="small")),
    "policy is empty": lambda f: edit(f, lambda c: c.update(policy={})),
    "env is text": lambda f: edit(f, lambda c: c.update(env="planar")),
    "horizon is null": lambda f: edit(f, lambda c: c.update(execution_horizon=None)),
    "sampler is text": lambda f: edit(f, lambda c: c.update(sampler="ddim")),
    "a sampler's unknown setting": lambda f: edit(f, lambda c: c["sampler"].update(hook="os.system")),
    "a sampler's setting beyond its range": lambda f: edit(f, lambda c: c["sampler"].update(eta=2)),
    "more denoising steps than timesteps": lambda f: edit(f, lambda c: c["sampler"].update(ddim_steps=21)),
    "a solver that is a list": lambda f: edit(f, lambda c: c["sampler"].update(solver=["ddim"])),
    "training is null": lambda f: edit(f, lambda c: c.update(training=None)),
    "unknown denoiser": lambda f: edit(f, lambda c: c["policy"]["denoiser"].update(name="os.system")),
    "unknown setting": lambda f: edit(f, lambda c: c["policy"]["denoiser"].update(hook="os.system")),
    "schedule is null": lambda f: edit(f, lambda c: c["policy"].update(schedule=None)),
    "another width": lambda f: edit(f, lambda c: c["policy"]["denoiser"].update(hidden_size=8)),
    "no weights": lambda f: (f / "policy.safetensors").unlink(),
    "truncated weights": lambda f: cut(f / "policy.safetensors"),
    "empty weights": lambda f: (f / "policy.safetensors").write_bytes(b""),
    "header": lambda f: flip(f / "policy.safetensors"),
    "a weight less": lambda f: edit_tensors(f / "policy.safetensors", lambda t: t.pop("denoiser.leave.weight")),
    "a weight more": lambda f: edit_tensors(f / "policy.safetensors", lambda t: t.update(extra=torch.zeros(1))),
    "another shape": lambda f: edit_tensors(
        f / "policy.safetensors", lambda t: t.update({"denoiser.leave.bias": torch.zeros(3)})
    ),
    "no action statistics": lambda f: edit_tensors(
        f / "policy.safetensors", lambda t: t.pop("action_normalizer.half_range")
    ),
    "no observation statistics": lambda f: edit_tensors(
        f / "policy.safetensors", lambda t: t.pop("observation_normalizers.state.center")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error(saved, damage):
    DAMAGES[damage](saved)
    if (saved / "config.json").exists():
        seal(saved)  # with its checksums put right, what a file says must still be refused
    with pytest.raises(ValueError) as error:
        load_checkpoint(saved)
    assert any(part in str(error.value) for part in ("checkpoint", "denoiser", "policy.schedule"))


RESUME_DAMAGES = {
    "no weights": lambda f: (f / "training.safetensors").unlink(),
    "truncated weights": lambda f: cut(f / "training.safetensors"),
    "no record": lambda f: (f / "training.json").unlink(),
    "truncated record": lambda f: cut(f / "training.json"),
    "record without step": lambda f: edit(f, lambda c: c.pop("step"), "training.json"),
    "record without history": lambda f: edit(f, lambda c: c.pop("history"), "training.json"),
    "step is text": lambda f: edit(f, lambda c: c.update(step="many"), "training.json"),
    "averaged weights": lambda f: cut(f / "policy.safetensors"),
    "policy is text": lambda f: edit(f, lambda c: c.update(policy="small")),
    "no optimiser": lambda f: edit_tensors(
        f / "training.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer.")]
    ),
    "half an optimiser": lambda f: edit_tensors(
        f / "training.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer.0.")]
    ),
    "optimiser of another shape": lambda f: edit_tensors(
        f / "training.safetensors", lambda t: t.update({"optimizer.0.exp_avg": torch.zeros(3)})
    ),
    "unreadable optimiser key": lambda f: edit_tensors(
        f / "training.safetensors", lambda t: t.update({"optimizer.x.exp_avg": torch.zeros(3)})
    ),
}


@pytest.mark.parametrize("damage", RESUME_DAMAGES)
def test_a_damaged_checkpoint_does_not_resume(demonstrations, saved, damage):
    RESUME_DAMAGES[damage](saved)
    seal(saved)
    with pytest.raises(ValueError) as error:
        resume_training(saved, new_run(demonstrations).state, RECORD)
    assert "checkpoint" in str(error.value)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (5, "upgrade ddim-policy"),
        (0, "another"),
        ("1", "another"),
        (1.0, "another"),
        (True, "another"),
        (None, "another"),
    ],
)
def test_another_schema_is_refused_with_both_versions_and_advice(saved, version, advice):
    edit(saved, lambda config: config.update(schema_version=version))
    with pytest.raises(ValueError, match=f"schema {version!r}; this version reads 1 to 4: (use )?{advice}"):
        load_checkpoint(saved)


def test_a_checkpoint_of_before_samplers_were_recorded_has_the_defaults(saved):
    edit(saved, lambda config: (config.update(schema_version=3), config.pop("sampler")))
    seal(saved)
    assert load_checkpoint(saved).sampler == Sampler()
    edit(saved, lambda config: config.update(schema_version=4))
    seal(saved)
    with pytest.raises(ValueError, match=r"damaged .*'sampler'"):
        load_checkpoint(saved)


def test_a_solver_of_a_plugin_is_asked_for_by_the_plugins_name(saved):
    edit(saved, lambda config: config.update(sampler={"solver": "mine"}, plugins=["my_parts"]))
    seal(saved)
    with pytest.raises(ValueError, match=r"solver 'mine', registered by a plugin: .* plugins=\[my_parts\]"):
        load_checkpoint(saved)


def test_the_policy_of_another_project_has_to_be_imported(tmp_path):
    (tmp_path / "config.json").write_text('{"type": "diffusion"}')
    (tmp_path / "latest.ckpt").touch()
    for path in (tmp_path, tmp_path / "latest.ckpt"):
        with pytest.raises(ValueError, match=f"into one with ddim-import source={path}$"):
            load_checkpoint(path)


def test_resuming_from_another_schema_is_refused(demonstrations, saved):
    edit(saved, lambda config: config.update(schema_version=5))
    with pytest.raises(ValueError, match="schema 5"):
        resume_training(saved, new_run(demonstrations).state, RECORD)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["policy.safetensors", "training.safetensors"])
@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(demonstrations, saved, tmp_path, name, write):
    control, marker = tmp_path / "control", tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(control)))
    assert control.exists()  # the payload does work
    if write == "pickle":
        (saved / name).write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"weights": Payload(marker)}, saved / name)
    seal(saved)
    with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
        resume_training(saved, new_run(demonstrations).state, RECORD)
    if name == "policy.safetensors":
        with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
            load_checkpoint(saved)
    assert not marker.exists()


def test_a_checkpoint_killed_between_the_renames_still_loads_and_is_replaced(demonstrations, run, saved):
    expected = actions(run.state.ema)
    saved.rename(saved.with_name(".checkpoint.old"))
    assert is_checkpoint(saved)
    assert torch.equal(actions(load_checkpoint(saved).policy), expected)
    again = new_run(demonstrations)
    resume_training(saved, again.state, RECORD)
    assert again.state.step == 6
    save(saved, advance(again, 9))
    assert load_checkpoint(saved).training["step"] == 9
    assert [f.name for f in saved.parent.iterdir()] == ["checkpoint"]


def test_a_kill_before_the_renames_leaves_the_checkpoint_of_before(run, saved):
    shutil.copytree(saved, saved.with_name(".checkpoint.new"))
    cut(saved.with_name(".checkpoint.new") / "policy.safetensors")
    assert load_checkpoint(saved).training["step"] == 6
    save(saved, run)
    assert [f.name for f in saved.parent.iterdir()] == ["checkpoint"]


def contents(folder: Path) -> dict:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_failed_save_leaves_the_checkpoint_of_before(run, saved, monkeypatch):
    before = contents(saved)
    advance(run, 9)
    written = []

    def full_disk(tensors, path):
        written.append(path)
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full_disk)
        with pytest.raises(SaveError, match=r"no space left on device.*what was saved before it is whole: make room"):
            save(saved, run)
    assert [f.name for f in saved.parent.iterdir()] == ["checkpoint"]  # half a checkpoint does not keep taking space
    assert written
    assert contents(saved) == before
    assert load_checkpoint(saved).training["step"] == 6
    save(saved, run)  # and the next attempt goes through
    assert load_checkpoint(saved).training["step"] == 9


def test_a_failed_rename_loses_nothing(run, saved, monkeypatch):
    advance(run, 9)
    rename, calls = Path.rename, []

    def killed_at_the_second(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            save(saved, run)
    assert load_checkpoint(saved).training["step"] == 6


def with_env(saved, env):
    return dataclasses.replace(load_checkpoint(saved), env=env)


@pytest.mark.parametrize(
    ("own", "override", "chosen"),
    [
        ({"name": "planar", "image_size": 64}, None, {"name": "planar", "image_size": 64}),
        ({"name": "planar", "image_size": 64}, {}, {"name": "planar", "image_size": 64}),
        ({"name": "planar", "image_size": 64}, {"image_size": 32}, {"name": "planar", "image_size": 32}),
        ({"name": "planar", "image_size": 64}, {"x": 1}, {"name": "planar", "image_size": 64, "x": 1}),
        ({"name": "planar", "image_size": 64}, {"name": "pusht"}, {"name": "pusht"}),
        (None, {"name": "pusht"}, {"name": "pusht"}),
        (
            {"name": "gym", "id": "evil:Env-v0"},
            {"name": "gym", "id": "own:Env-v0"},
            {"name": "gym", "id": "own:Env-v0"},
        ),
        ({"name": "gym", "id": "Pendulum-v1"}, None, {"name": "gym", "id": "Pendulum-v1"}),
        (
            {"name": "gym", "id": "own:Env-v0", "success": "termination", "kwargs": {"g": 9.8}},
            {"name": "gym", "id": "own:Env-v0", "kwargs": {"g": 1.6}},
            {"name": "gym", "id": "own:Env-v0", "success": "termination", "kwargs": {"g": 1.6}},
        ),
        (
            {"name": "gym", "id": "Pendulum-v1", "success": "termination"},
            {"name": "gym", "id": "Pendulum-v0"},
            {"name": "gym", "id": "Pendulum-v0"},
        ),
        (
            {"name": "gym", "id": "Pendulum-v1", "success": "termination"},
            {"name": "gym"},
            {"name": "gym", "id": "Pendulum-v1", "success": "termination"},
        ),
        ({"name": "planar", "image_size": 64}, {"name": "planar"}, {"name": "planar", "image_size": 64}),
    ],
)
def test_an_override_changes_settings_or_replaces_the_environment(saved, own, override, chosen):
    checkpoint = with_env(saved, own)
    assert choose_env(checkpoint, override) == chosen
    assert checkpoint.env == own  # not changed in place


def test_a_checkpoint_without_environment_asks_for_one(saved):
    with pytest.raises(ValueError, match="names no environment: add env="):
        choose_env(with_env(saved, None), {"image_size": 3})


def test_a_checkpoint_cannot_have_a_module_imported(saved, tmp_path, monkeypatch, capsys):
    """All the way through the command: the module of the id must not be imported."""
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit(saved, lambda config: config.update(env={"name": "gym", "id": "evil:Env-v0"}))
    seal(saved)
    with pytest.raises(ValueError, match=r"would import a module.*add env\.id=evil:Env-v0"):
        choose_env(load_checkpoint(saved), {"kwargs": {}})

    from scripts import rollout

    monkeypatch.setattr(sys, "argv", ["rollout.py", f"checkpoint={saved}", f"output_dir={tmp_path}/out"])
    with pytest.raises(SystemExit) as stop:
        rollout.main()
    assert stop.value.code == 2
    assert "would import a module" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


def test_a_dataset_cannot_have_a_module_imported(demonstrations, tmp_path, monkeypatch):
    """A Minari dataset names its environment just as a checkpoint does; training must be as careful."""
    import envs
    from policy.commands.train import train_policy

    (tmp_path / "evil2.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    metadata = {"env": {"name": "gym", "id": "evil2:Env-v0"}}
    settings = {name: getattr(CONFIG, name) for name in ("encoder", "denoiser", "schedule")}
    with pytest.raises(ValueError, match=r"would import a module.*add env\.id=evil2:Env-v0"):
        train_policy(
            envs.make,
            dataset=dataclasses.replace(demonstrations, metadata=metadata),
            policy=settings,
            sampler=partial(Sampler),
            train=SETTINGS,
            tracker=NoTracker,
            output_dir=tmp_path / "out",
        )
    assert not (tmp_path / "ran").exists()
    assert "evil2" not in sys.modules


def test_the_end_of_a_training_names_the_checkpoint_that_is_kept_as_the_best_and_why(run, tmp_path):
    state, folder, kept = run.state, tmp_path / "checkpoint", tmp_path / "checkpoints/best"

    def said(step, **metrics):
        """Save at a step, whose entry in the history has these metrics."""
        state.step = step
        state.history.append({"step": step, **{name.replace("_", "/", 1): value for name, value in metrics.items()}})
        save_checkpoint(folder, state, env=ENV, execution_horizon=5, training=RECORD)
        keep_checkpoint(folder, state, keep_last=0)
        return describe_best(folder, state, 50)

    state.history.clear()
    assert said(5).startswith(
        "best saved: not known, because no checkpoint was saved right after a rollout or a validation"
    )
    assert said(10, val_loss=0.25) == "best saved: step 10, the last, validation loss 0.25"
    assert said(20, val_loss=0.5).endswith(
        f"best saved: step 10, validation loss 0.25, kept in {kept}; the last: step 20, validation loss 0.5;"
        " the validation loss does not tell which succeeds more often: compare both in rollouts"
    )
    solved = "rollout success 84% (of 50 episodes)"
    assert (
        said(8000, rollout_success_rate=0.84, rollout_score_mean=0.9) == f"best saved: step 8,000, the last, {solved}"
    )
    assert said(9000, rollout_success_rate=0.5, rollout_score_mean=0.9).endswith(
        f"best saved: step 8,000, {solved}, kept in {kept}; the last: step 9,000, rollout success 50% (of 50 episodes)"
    )
    assert said(9500).endswith("the last: step 9,500, without a measurement")


@pytest.mark.parametrize(
    ("objective", "schedule", "sampler"),
    [
        (
            "diffusion",
            "20 timesteps, squaredcos_cap_v2",
            "ddim_steps=8 eta=0.0 spacing=trailing clip=None warm_start=None",
        ),
        ("flow", "20 timesteps", "ddim_steps=8 spacing=trailing clip=None warm_start=None solver=euler"),
        ("regression", "20 timesteps", "ddim_steps=1 clip=None solver=one_call"),
        ("mip", "20 timesteps", "ddim_steps=2 clip=None solver=two_calls"),
    ],
)
def test_a_description_names_the_settings_that_the_objective_has(
    demonstrations, tmp_path, objective, schedule, sampler
):
    run = new_run(demonstrations, dataclasses.replace(CONFIG, objective=objective))
    described = describe_checkpoint(load_checkpoint(save(tmp_path / "checkpoint", run)))
    assert described["schedule"] == schedule
    assert described["sampler"] == f"{sampler} execution_horizon=5, unless you choose others"


def test_a_description_says_what_the_network_sees_of_the_noisy_chunk(demonstrations, tmp_path):
    run = new_run(demonstrations, dataclasses.replace(CONFIG, sigma_data=0.5))
    loaded = load_checkpoint(save(tmp_path / "checkpoint", run))
    assert describe_checkpoint(loaded)["policy"].endswith("predicts sample, from an estimate for sigma_data 0.5")
    assert torch.equal(loaded.policy.schedule.input_scales, run.state.policy.schedule.input_scales)


@pytest.mark.parametrize("read", [load_checkpoint, digest_of, read_history])
def test_a_folder_that_may_not_be_entered_is_a_sentence(tmp_path, monkeypatch, read):
    def exists(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", exists)
    with pytest.raises(ValueError, match=r"run cannot be read \(Permission denied\): choose another checkpoint"):
        read(tmp_path / "run")
