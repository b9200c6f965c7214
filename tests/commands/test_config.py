"""conf/: everything composes, everything builds, and no value is written where the code already says it."""

import importlib
import inspect
from pathlib import Path

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

import envs
from envs.families import load_family
from policy import DiffusionPolicy, PolicyConfig
from policy.common.signatures import load
from policy.model.denoisers import DENOISERS
from policy.model.encoders import ENCODERS
from scripts.settings import CONF, GROUPS, READ, TARGETS, _build
from tests.common import test_signatures

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("collect", "inspect", "train", "rollout", "sweep", "export", "import")
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options]
FILES = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml"))


def composed(command, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(command, list(overrides)), resolve=True)


def settings_of(file: Path) -> dict:
    return {
        k: v for k, v in (yaml.safe_load((CONF / file).read_text()) or {}).items() if k not in ("defaults", "hydra")
    }


def test_the_groups_of_the_design_are_there_with_an_option_each():
    expected = {"env", "dataset", "encoder", "denoiser", "schedule", "sampler", "train", "tracker", "experiment"}
    assert expected <= GROUPS.keys()
    assert all(GROUPS.values())
    assert ROOT / "conf" == CONF


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_composes_and_its_parts_build(command):
    config = composed(command)
    for group in GROUPS.keys() & config.keys():
        if group not in ("dataset",):  # needs data
            _build(group, config[group])


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] != "experiment"])
def test_every_option_composes_and_is_what_it_is_called(group, option):
    command = "rollout" if group == "controller" else "train"
    config = composed(command, f"{group}={option}")[group]
    assert {k: v for k, v in config.items() if k != "_target_"} == {
        k: v for k, v in settings_of(Path(group, f"{option}.yaml")).items() if k != "_target_"
    }
    if group == "env":
        assert config["name"] in envs.FAMILIES  # several options may belong to one family
    elif "name" in config:
        assert config["name"] == option


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_does_not_compose(command):
    group = {"inspect": "dataset", "export": "sampler"}.get(command, "env")
    with pytest.raises(MissingConfigException):
        composed(command, f"{group}=nowhere")


def policy_of(config):
    return DiffusionPolicy(
        PolicyConfig(
            observation_shapes={"state": (5,)}
            | ({"image": (16, 16, 3)} if config["encoder"]["name"] in ("image", "resnet") else {}),
            action_dim=2,
            **{part: _build(part, config[part]) for part in ("encoder", "denoiser", "schedule")},
        )
    )


@pytest.mark.parametrize("encoder", GROUPS["encoder"])
@pytest.mark.parametrize("denoiser", GROUPS["denoiser"])
@pytest.mark.parametrize("schedule", GROUPS["schedule"])
def test_every_encoder_denoiser_and_schedule_make_a_policy(encoder, denoiser, schedule):
    config = composed("train", f"encoder={encoder}", f"denoiser={denoiser}", f"schedule={schedule}")
    policy = policy_of(config)
    assert isinstance(policy.encoder, ENCODERS[encoder])
    assert isinstance(policy.denoiser, DENOISERS[denoiser])
    assert policy.schedule.num_steps == config["schedule"]["num_steps"]


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_experiment_composes_with_training_and_builds(experiment):
    config = composed("train", f"experiment={experiment}")
    assert config != composed("train")
    policy = policy_of(config)
    assert sum(p.numel() for p in policy.parameters()) > 0
    policy.settled(_build("sampler", config["sampler"])())
    settings = {k: v for k, v in config["train"].items() if k != "_target_"}
    assert {name: getattr(_build("train", config["train"]), name) for name in settings} == settings
    for key in ("relabel", "transform"):
        if key in config["dataset"]:
            assert callable(_build(key, config["dataset"][key]))
    with pytest.raises(ValueError, match=r"dataset\.path is missing"):
        _build("dataset", config["dataset"])


def test_a_function_that_would_be_called_at_once_must_be_partial():
    given = composed("train", "experiment=pusht_state", "~dataset.transform._partial_")["dataset"]
    with pytest.raises(ValueError, match=r"observations is missing: add dataset\.transform\._partial_=true, so that"):
        _build("dataset", given)


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_an_experiment_gives_way_to_the_command_line(experiment):
    config = composed("train", f"experiment={experiment}", "++train.steps=7", "denoiser=residual_mlp", "tracker=none")
    assert config["train"]["steps"] == 7
    assert config["denoiser"]["name"] == "residual_mlp"
    assert config["tracker"]["_target_"] == "policy.tracking.tracker.NoTracker"


@pytest.mark.parametrize("option", GROUPS["tracker"])
def test_every_tracker_opens_a_run_and_none_uploads_unasked(option, tmp_path):
    start = _build("tracker", composed("train", f"tracker={option}")["tracker"])
    run = start(folder=tmp_path, config={})
    run.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == (option == "wandb")


@pytest.mark.parametrize("option", GROUPS["env"])
def test_every_environment_is_a_family(option):
    settings = composed("train", f"env={option}")["env"]
    family = load_family(settings.pop("name"))
    assert settings.keys() <= inspect.signature(family).parameters.keys()


def target_of(file: Path):
    """What a file's settings are arguments of, where its defaults stand; None where there is no such thing."""
    group, settings = file.parts[0], settings_of(file)
    if "_target_" in settings:
        return hydra.utils.get_object(settings["_target_"])
    return part_of(group, settings["name"]) if "name" in settings else None


def part_of(group: str, name: str):
    """The part that a name stands for."""
    return load_family(name) if group == "env" else {"encoder": ENCODERS, "denoiser": DENOISERS}[group][name]


def repeated(settings: dict, target) -> set[str]:
    parameters = inspect.signature(target).parameters
    return {k for k, v in settings.items() if k in parameters and parameters[k].default == v and k != "name"}


def test_the_finder_of_repeated_defaults_finds_them():
    assert repeated({"name": "state", "hidden_size": 256, "noise": 0.1}, ENCODERS["state"]) == {"hidden_size"}


@pytest.mark.parametrize(
    "file", [f for f in FILES if len(f.parts) == 2 and f.parts[0] not in ("schedule", "experiment")]
)
def test_no_option_repeats_a_default_of_the_code(file):
    assert target_of(file) is not None, f"{file}: this test does not know what it configures"
    assert repeated(settings_of(file), target_of(file)) == set()


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "experiment"])
def test_no_experiment_repeats_a_default_of_the_code(file):
    settings = settings_of(file)
    config = composed("train", f"experiment={file.stem}")
    groups = {group: settings.pop(group) for group in list(settings) if group in GROUPS}
    for group, changes in groups.items():
        if group == "schedule":
            continue
        chosen = config[group]
        target = hydra.utils.get_object(chosen["_target_"]) if "_target_" in chosen else part_of(group, chosen["name"])
        assert changes.keys() <= inspect.signature(target).parameters.keys()
        assert repeated(changes, target) == set(), group
    parameters = task_of("train").parameters
    assert settings.keys() <= parameters.keys()
    settings.pop("expected", None)  # null takes back the figures of the experiment that it is made from
    assert {name for name, value in settings.items() if parameters[name].default == value} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_primary_file_only_chooses_groups(command):
    # An inspection lists bad episodes, where training refuses them.
    allowed = {"dataset": {"on_bad_episode": "skip"}} if command == "inspect" else {}
    assert settings_of(Path(f"{command}.yaml")) == allowed


def test_the_schedule_of_the_code_is_the_one_that_training_chooses():
    assert PolicyConfig(observation_shapes={"state": (1,)}, action_dim=1).schedule == composed("train")["schedule"]
    assert PolicyConfig(observation_shapes={"state": (1,)}, action_dim=1).denoiser == composed("train")["denoiser"]
    assert PolicyConfig(observation_shapes={"state": (1,)}, action_dim=1).encoder == composed("train")["encoder"]


def test_the_defaults_of_training_are_those_of_the_policy():
    """Two kinds of user see them: one types a command, the other writes Python."""
    command, config = task_of("train").parameters, inspect.signature(PolicyConfig).parameters
    for name in ("prediction_type", "loss_weighting", "min_snr_gamma", "obs_horizon", "action_horizon", "obs_size"):
        assert command[name].default == config[name].default, name


def task_of(command: str):
    """What a command was made of."""
    script = {"inspect": "inspect_data", "import": "import_checkpoint"}.get(command, command)
    return importlib.import_module(f"scripts.{script}").TASK


def declared() -> set[str]:
    """Everything whose settings a command reads from its source, as `module:name`."""
    tasks = [task_of(command) for command in COMMANDS]
    options = [settings_of(file)["_target_"] for file in FILES if "_target_" in settings_of(file)]
    built_in = [registry.declared(name) for registry in (DENOISERS, ENCODERS) for name in registry]
    return {
        *(task.target for task in tasks),
        *(target for task in tasks for target in task.inline.values()),
        *(":".join(target.rsplit(".", 1)) for target in (*options, READ)),
        *TARGETS.values(),
        *(part for part in (*built_in, *envs.FAMILIES.values()) if isinstance(part, str)),
    }


def test_every_part_that_a_command_reads_from_its_source_is_compared_with_what_python_makes_of_it():
    targets = declared()
    assert {"policy.commands.sweep:sweep", "policy.model.config:PolicySettings", "envs.planar:PlanarEnv"} <= targets
    assert len(targets) > 20
    compared = {load(target) for target in test_signatures.TARGETS}
    assert {target for target in targets if load(target) not in compared} == set()
