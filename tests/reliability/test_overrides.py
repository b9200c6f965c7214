"""Every setting of every command, given values of every kind: refused in one sentence that names it, or accepted.

The real commands run in this process, on real demonstrations and a real checkpoint, up to where their work begins.
"""

import contextlib
import inspect
import io
import re
import time
import typing
from collections import Counter
from importlib import import_module
from pathlib import Path

import hydra
import pytest
import torch
from hypothesis import HealthCheck, example, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import envs
from envs.families import load_family
from policy import DiffusionPolicy, PolicyConfig
from policy.checkpoint import save_checkpoint
from policy.common.signatures import load
from policy.diffusion.schedule import make_schedule
from policy.model.denoisers import DENOISERS
from policy.model.encoders import ENCODERS
from policy.training.preparation import start_training
from policy.training.settings import TrainSettings
from scripts.settings import CONF, GROUPS
from tests.conftest import as_a_process

# Where the work of each command begins; everything before is checking.
WORK = {
    "collect": "policy.data.recording.progress",
    "inspect": "policy.commands.inspect.output_folder",
    "train": "policy.commands.train.output_folder",
    "rollout": "policy.commands.rollout.output_folder",
    "sweep": "policy.commands.sweep.output_folder",
    "export": "policy.commands.export.output_folder",
}
DIMENSIONS = {"shapes", "obs_size", "action_dim", "action_horizon", "num_steps", "obs_horizon"}


class WorkBegins(BaseException):
    """Everything was accepted."""


def begin(*_, **__):
    raise WorkBegins


def begin_collecting(attempts, **_):
    with contextlib.suppress(RuntimeError):  # an expert that never succeeds, as with noise=1e30, was at work
        next(attempts)  # what a generator checks, it checks when it begins
    raise WorkBegins


def target_of(config, group: str):
    """What a group's settings are arguments of."""
    chosen = config[group]
    if "_target_" in chosen:
        return hydra.utils.get_object(chosen["_target_"])
    if group == "schedule":
        return make_schedule
    if group == "env":
        return load_family(chosen["name"])
    return {"denoiser": DENOISERS, "encoder": ENCODERS}[group][chosen["name"]]


def fields_of(command: str) -> dict[str, object]:
    """Every setting of a command in full, with its type hint."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose(command, ["env=planar"] if command == "collect" else []))
    task = script_of(command).TASK
    hints = typing.get_type_hints(load(task.target))
    for name, settings_class in task.inline.items():
        del hints[name]
        hints |= typing.get_type_hints(load(settings_class))
    fields = {name: hint for name, hint in hints.items() if name not in {*GROUPS, "make_env", "return"}}
    for group in GROUPS.keys() & config.keys():
        if config[group] is not None:
            target = target_of(config, group)
            hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
            parameters = inspect.signature(target).parameters.keys() - {"folder", "config", "transform", "render_mode"}
            if group in ("denoiser", "encoder"):
                parameters -= DIMENSIONS
            fields |= {f"{group}.{name}": hints[name] for name in parameters}
    return dict(sorted(fields.items()))


def script_of(command: str):
    """The module of a console command."""
    return import_module(f"scripts.{'inspect_data' if command == 'inspect' else command}")


FIELDS = {command: fields_of(command) for command in WORK}
EVERY = [(command, field) for command, fields in FIELDS.items() for field in fields]


@pytest.fixture(scope="module")
def given_files(tmp_path_factory) -> dict[str, list[str]]:
    """What each command cannot do without: demonstrations and a checkpoint of the planar environment."""
    folder = tmp_path_factory.mktemp("overrides")
    outcome("collect", ["env=planar", "episodes=3", f"output_dir={folder}"], stop=False)
    env = envs.make("planar")
    shape = env.observation_space.shape
    config = PolicyConfig(
        observation_shapes={"state": shape},
        action_dim=env.action_space.shape[0],
        denoiser={"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1},
    )
    torch.manual_seed(0)
    state = start_training(DiffusionPolicy(config), TrainSettings())
    save_checkpoint(folder / "checkpoint", state, env={"name": "planar"}, execution_horizon=8, training={})
    data, checkpoint = f"dataset.path={folder}/planar-v0", f"checkpoint={folder}/checkpoint"
    small = ["denoiser.hidden_size=8", "denoiser.num_layers=1"]
    return {
        "collect": ["env=planar", f"output_dir={folder}/collected"],
        "inspect": [data],
        "train": [data, *small],
        "rollout": [checkpoint],
        "sweep": [checkpoint, "ddim_steps=[1]"],
        "export": [checkpoint],
    }


def outcome(command: str, overrides: list[str], *, stop: bool = True, one: bool = True) -> str:
    """Run a command up to its work: the sentence with which it refuses, or nothing where it accepts.

    Anything but an acceptance or one sentence with exit code 2 fails the test. With `one=False` the command may also
    print something instead, such as its help.
    """
    said, code = io.StringIO(), None
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
        as_a_process(command, *overrides),
    ):
        if stop:
            patch.setattr(WORK[command], begin_collecting if command == "collect" else begin)
        try:
            script_of(command).main()
        except WorkBegins:
            return ""
        except SystemExit as refusal:
            code = refusal.code
    assert code in (None, 0, 2), (overrides, said.getvalue())
    assert "Traceback" not in said.getvalue(), (overrides, said.getvalue())
    errors = [line for line in said.getvalue().split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 if one and stop else len(errors) == (code == 2), (overrides, said.getvalue())
    return errors[0] if errors else ""


def mentions(sentence: str, field: str) -> bool:
    return re.search(rf"\b{re.escape(field)}\b", sentence) is not None


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What an accepted folder name makes is made in a folder of the test."""
    monkeypatch.chdir(tmp_path)


NUMBERS = ["0", "-1", "1.5", "1e30", "10000000000000000000000", "true", "null", "[]", "[1,2]", "[-1]", "{a:1}", "''"]
NEVER = ["nan", "inf", "-inf", "some_word", "[[1]]", "{a:{b:1}}"]
TEXTS = ["some_word", "0", "-1.5", "[1,2]", "{a:1}", "true", "../x", "nan"]


def is_numeric(hint: object) -> bool:
    """Whether a setting is a number, or numbers; a word can stand for none of its values."""
    parts = {part for part in (hint, *typing.get_args(hint)) if isinstance(part, type)}
    return bool(parts & {int, float}) and not parts & {str, Path, dict}


# The settings for which the words of NEVER can never be right.
NUMERIC = [
    (command, field) for command, field in EVERY if is_numeric(FIELDS[command][field]) and not field.startswith("env.")
]


@st.composite
def overrides(draw):
    """A command, a setting of it, what it is set to, and whether that can be right."""
    kind = draw(st.sampled_from(["never", "odd", "misspelt"]))
    command, field = draw(st.sampled_from(NUMERIC if kind == "never" else EVERY))
    hint = FIELDS[command][field]
    if kind == "never":
        return command, field, f"{field}={draw(st.sampled_from(NEVER))}", "never"
    if kind == "misspelt":
        name = field.split(".")[-1]
        at = draw(st.integers(0, len(name) - 1))
        letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
        wrong = draw(
            st.sampled_from(
                [name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :]]
            )
        )
        known = {f.split(".")[-1] for f in FIELDS[command]} | GROUPS.keys()
        if wrong and wrong not in known and len(name) > 3:
            return command, field, f"{field[: -len(name)]}{wrong}=1", "misspelt"
    number = st.one_of(st.integers(-(2**70), 2), st.floats(-1e6, 1e3)).map(str)
    values = st.one_of(st.sampled_from(NUMBERS), number) if is_numeric(hint) else st.sampled_from(TEXTS)
    return command, field, f"{field}={draw(values)}", "odd"


def check(given_files, tried: Counter, case) -> None:
    command, field, override, kind = case
    sentence = outcome(command, [*given_files[command], override])
    tried[kind, "refused" if sentence else "accepted"] += 1
    if kind != "odd":
        assert sentence, (command, override)
    if sentence:
        assert mentions(sentence, field.split(".")[-1]), (command, override, sentence)
    if kind == "misspelt":
        assert "unknown" in sentence.lower(), (command, override, sentence)


def fuzz(given_files, examples: int) -> None:
    tried: Counter = Counter()
    began = time.perf_counter()

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(overrides())
    @example(("train", "seed", "seed=0", "odd"))  # few of the odd values are right, and a few draws may hold none
    def every_override_is_refused_or_accepted(case):
        check(given_files, tried, case)

    every_override_is_refused_or_accepted()
    counts = ", ".join(f"{kind} {what} {count}" for (kind, what), count in sorted(tried.items()))
    print(f"{tried.total()} overrides of {len(EVERY)} settings in {time.perf_counter() - began:.0f} s: {counts}")
    assert tried["never", "refused"] > examples / 10
    assert tried["misspelt", "refused"] > examples / 10
    assert tried["odd", "accepted"] > examples / 100


def test_overrides_are_accepted_or_refused_in_one_sentence(given_files):
    fuzz(given_files, settings().max_examples)


@pytest.mark.reliability
def test_thousands_of_overrides_are_accepted_or_refused_in_one_sentence(given_files):
    fuzz(given_files, 3_000)


@pytest.mark.reliability
@pytest.mark.parametrize("command", WORK)
def test_every_setting_is_refused_by_its_name(command, given_files):
    """Each numeric setting, with each value that no number is."""
    tried: Counter = Counter()
    for field, hint in FIELDS[command].items():
        if is_numeric(hint) and not field.startswith("env."):
            for value in NEVER:
                check(given_files, tried, (command, field, f"{field}={value}", "never"))
    print(f"{command}: {tried['never', 'refused']} overrides refused")
    assert tried.total() > 0 or command == "none"


def test_a_plain_command_reaches_its_work(given_files):
    for command, overrides in given_files.items():
        assert outcome(command, overrides) == ""


# --- whole command lines -----------------------------------------------------------------------------------------

FLAGS = [
    *("-h", "--help", "--help=", "-m", "--multirun", "--run", "-r", "--resolve", "--version", "--hydra-help", "--"),
    *("--cfg", "--cfg=job", "--cfg=nonsense", "-c", "-cd", "-cn", "-cp", "-p", "-i", "-sc", "--info", "--info=plugins"),
    *(
        "--config-dir",
        "--config-dir=.",
        "--config-dir=nowhere",
        "--config-name",
        "--config-name=nope",
        "--config-name=",
    ),
    *("--config-path=nowhere", "--package=train", "--package=x.y", "--shell-completion", "--experimental-rerun=x"),
    *("--train.steps=3", "--output-dir", "-x", "-1", "---", "-", "--hlep", "--c", "--cfg=job=1", "--multirun=1"),
]
WORDS = [
    *(
        "job",
        "install=bash",
        "query=bash",
        "defaults",
        "train",
        "sampler",
        "train.steps",
        "",
        " ",
        "=",
        "=3",
        "a=",
        "~",
    ),
    *(
        "~sampler",
        "~env",
        "~train.steps",
        "~hydra",
        "+",
        "++",
        "+env=planar",
        "++env=planar",
        "+sampler=ddim",
        "@=",
        ".",
    ),
    *("sampler@x=ddim", "sampler@=ddim", "sampler=[ddim,ddim]", "sampler={a:1}", "sampler=null", "train=[1]", "env=3"),
    *("sampler=ddim,ddim", "seed=1,2", "seed=range(1,3)", "seed=glob(*)", "seed=int(a)", "seed=sort(1,2)", "seed.x=1"),
    *("seed=${seed}", "seed=${nothing}", "seed=${oc.env:NOTHING}", "seed=${", "seed=$", "seed=???", "sampler=???"),
    *(
        "hydra=1",
        "hydra.run=1",
        "hydra.foo=1",
        "hydra/launcher=nope",
        "hydra/foo=nope",
        "hydra.job.name=3",
        "hydra.mode=x",
    ),
    *("hydra.mode=MULTIRUN", "hydra.sweeper=null", "hydra.verbose=true", "hydra.searchpath=[pkg://nope]", "hydra=null"),
    *(
        "plugins=nope",
        "plugins=[nope]",
        "plugins=[3]",
        "plugins=[",
        "plugins={a:1}",
        "plugins=",
        "plugins=a b",
        "+plugins=x",
    ),
    *("env._target_=nope", "sampler._target_=policy.Samplr", "sampler._target_=3", "sampler._target_=math.pi"),
    *(
        "dataset._target_=os.nope",
        "train._target_=nope.nope",
        "tracker._partial_=3",
        "_target_=x",
        "sampler._args_=[1]",
    ),
    *(
        "env.name=nope",
        "env.name=[1]",
        "denoiser.name={a:1}",
        "encoder.name=null",
        "dataset.format=[zarr]",
        "env.x.y.z=1",
    ),
    *("checkpoint=[", "checkpoint=[a", "checkpoint=~/a b#c", "checkpoint=[[a]]", "checkpoint={a:b}", "output_dir=~"),
    *(
        "output_dir=[x]",
        "output_dir={x:1}",
        "dataset.path=[1,2]",
        "dataset.path=",
        "dataset.path=a,b",
        "merge=x",
        "merge=[1]",
    ),
    *(
        "\n",
        "a\nb=c\nd",
        "\t=1",
        "é=1",
        "演示=1",
        "seed=演示",
        "seed=\x07",
        "a" * 5000,
        "seed=" + "9" * 5000,
        "[" * 500,
    ),
    *(
        "seed=" + "[" * 200,
        "seed=" + "[" * 90 + "]" * 90,
        "a." * 300 + "b=1",
        "seed='",
        'seed="',
        "seed=\\",
        "seed=a\\,b",
    ),
]


@st.composite
def command_lines(draw):
    """A command with a plain command line that was spoilt: words and flags put in, taken out, cut or mixed up."""
    command = draw(st.sampled_from(sorted(WORK)))
    key = draw(st.sampled_from(sorted(FIELDS[command])))
    odd = st.one_of(
        st.sampled_from(FLAGS),
        st.sampled_from(WORDS),
        st.text("abc=.,+~@:$[]{}()'\"\\#é -", max_size=12),
        st.text(" =.,+~@:$[]{}()'\"\\#éa1-", max_size=8).map(lambda text: f"{key}={text}"),
        st.sampled_from(WORDS).map(lambda text: f"{key}={text}"),
        st.sampled_from(sorted(GROUPS)).flatmap(
            lambda group: st.sampled_from(GROUPS[group]).map(lambda option: f"{group}={option[1:]}")
        ),
    )
    return command, draw(st.lists(odd, min_size=1, max_size=3)), draw(st.integers(0, 3))


def fuzz_command_lines(given_files, examples: int) -> None:
    tried: Counter = Counter()

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(command_lines())
    def every_command_line_is_answered(case):
        command, odd, at = case
        plain = given_files[command]
        tried["refused" if outcome(command, [*plain[:at], *odd, *plain[at:]], one=False) else "taken"] += 1

    every_command_line_is_answered()
    print(f"{tried.total()} command lines: {tried['refused']} refused, {tried['taken']} taken")
    assert tried["refused"] > examples / 4


def test_command_lines_are_answered_without_a_traceback(given_files):
    fuzz_command_lines(given_files, settings().max_examples // 2)


@pytest.mark.reliability
def test_hundreds_of_command_lines_are_answered_without_a_traceback(given_files):
    fuzz_command_lines(given_files, 550)
