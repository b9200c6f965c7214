"""The examples in the pages of docs/, run as a reader would."""

import doctest
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from policy.data.demonstrations import Demonstrations
from scripts.settings import Task
from tests.conftest import ENVIRONMENT, PROGRAMS, ROOT

DOCS = ROOT / "docs"
PAGES = ["../README.md", *sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))]
# Modules of scripts/ by console command.
SCRIPTS = {
    command: re.fullmatch(r"scripts\.(\w+):main", target)[1]
    for command, target in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].items()
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def write_modules(page, folder):
    """Write a page's Python files, whose first lines name them, into a folder."""
    for code in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            (folder / name[1]).write_text(code)


def test_the_transform_of_its_page_runs_word_by_word(run_command, tmp_path, monkeypatch):
    write_modules("transform.md", tmp_path)
    (commands,) = blocks("transform.md", "bash")
    record, inspect, train = (shlex.split(line) for line in commands.strip().splitlines())
    assert [line[0] for line in (record, inspect, train)] == ["python", "ddim-inspect", "ddim-train"]
    subprocess.run([sys.executable, *record[1:]], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=60)
    monkeypatch.chdir(tmp_path)
    seen: list[Demonstrations] = []
    monkeypatch.setattr("policy.commands.inspect.plot_episodes", lambda data, *rest: seen.append(data))
    small = ["obs_size=16", "denoiser.hidden_size=16", "denoiser.num_layers=1", "tracker=none"]
    try:
        out = run_command("inspect_data", *inspect[1:]).stdout
        run_command("train", *train[1:], *small)
    finally:
        sys.modules.pop("my_transform", None)
    assert "state[3]" in out
    assert np.abs(seen[0].observations["state"]).max() <= 0.5  # metres
    assert (tmp_path / "outputs/hand/checkpoint/config.json").exists()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("my_module.function", "takes a function as module:function"),
        ("nowhere_to_be_found:function", "cannot be imported (ModuleNotFoundError"),
        ("json:nothing", "cannot be imported (AttributeError"),
        ("json:__name__", "is not a function"),
    ],
)
def test_a_transform_that_is_not_there_is_one_sentence(named, words, run_command):
    done = run_command("inspect_data", "dataset=zarr", "dataset.path=x", f"dataset.transform={named}", check=2)
    assert done.stderr.count("\n") == 1
    assert f"dataset.transform{' ' if 'takes' in words else '='}" in done.stderr
    assert words in done.stderr


def test_the_examples_of_the_export_page_hold(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pytest.importorskip("onnxruntime", reason="pip install 'ddim-policy[export]'")
    result = doctest.testfile(str(DOCS / "export.md"), module_relative=False)
    assert result.failed == 0
    assert result.attempted > 4


def test_the_commands_of_the_export_page_exist():
    (commands,) = blocks("export.md", "bash")
    export, drive = (shlex.split(line) for line in commands.strip().splitlines())
    assert (PROGRAMS / export[0]).exists()
    assert (ROOT / drive[1]).is_file()
    assert drive[2] in export[-1]


def commands_of(page):
    """The commands of this project in a page's blocks for the shell, with 0 for a variable of the shell."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.search(r"\$[({]", line):
                program, *words = shlex.split(re.sub(r"\$\w+", "0", line), comments=True) or [""]
                if program in SCRIPTS:
                    yield SCRIPTS[program], words
                elif program == "python" and (script := re.fullmatch(r"scripts/(\w+)\.py", words[0])):
                    yield script[1], words[1:]


def test_commands_are_found_on_the_pages():
    assert len(list(commands_of("../README.md"))) >= 6
    assert sum(len(list(commands_of(page))) for page in PAGES) > 100


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands_of(page))])
def test_every_command_of_a_page_takes_its_settings(page, run_command, tmp_path, monkeypatch):
    """Up to where data would be opened; what comes then is tested elsewhere."""
    write_modules(page, tmp_path)
    for file in tmp_path.glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    monkeypatch.chdir(tmp_path)
    run = []
    monkeypatch.setattr(Task, "run", lambda task, settings: run.append(task.name))
    for name, overrides in commands_of(page):
        run.clear()
        # A launcher for clusters would start processes.
        run_command(name, *(override for override in overrides if not override.startswith("hydra")))
        assert run, (name, overrides)


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_of_a_page_exists(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {*re.findall(r"(?:^|`)make ([\w-]+)", (DOCS / page).read_text(), flags=re.MULTILINE)} <= {*targets}


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_between_the_pages_leads_somewhere():
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            leads_to = page.parent / target if target else page
            assert leads_to.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(leads_to), f"{page.name}: {target}#{anchor}"


@pytest.mark.slow
def test_the_example_of_making_a_policy_fast_runs(run_command, plain_reports, tmp_path, monkeypatch):
    """With few episodes and steps; that it answers is checked, not what."""
    monkeypatch.chdir(tmp_path)
    small = ["tracker=none", "train.batch_size=16"]
    fewer = {"episodes": "6", "train.steps": "4", "train.rectify_steps": "4", "ddim_steps": "1"}
    (commands,) = blocks("distill.md", "bash")
    for line in commands.strip().splitlines():
        command, *settings = shlex.split(line)
        named = (setting.partition("=") for setting in settings)
        shorter = [f"{name}={'0' if value == '0' else fewer.get(name, value)}" for name, _, value in named]
        name = command.removeprefix("ddim-")
        out = run_command(name, *shorter, *(small if name == "train" else [])).stdout
    fast, slow = (
        f"ddim_steps 1, checkpoint outputs/{name}/checkpoint, eta {eta}" for name, eta in (("fast", 0.0), ("slow", 1.0))
    )
    assert f"{fast} differs from {slow} by " in out
    assert "points (95 %: " in out
