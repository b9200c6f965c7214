"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import envs
import policy
import scripts
from tests.conftest import ROOT

MODULES = [
    name
    for package in (policy, envs, scripts)
    for name in (package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")))
]
# They run in the environment of another project, whose packages are not here.
ELSEWHERE = {
    "scripts.bench.diffusion_policy_reference",
    "scripts.bench.lerobot_pusht",
    "scripts.bench.lerobot_reference",
}
# The ones a reader meets first; others are free to have examples too.
WITH_EXAMPLES = {
    "policy.common.registry",
    "policy.common.signatures",
    "policy.control.receding_horizon",
    "policy.diffusion.ddim",
    "policy.model.diffusion_policy",
    "policy.diffusion.schedule",
    "policy.statistics.intervals",
    "policy.statistics.paired",
    "policy.statistics.recommendation",
}


def examples_in(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return sum(len(test.examples) for test in finder.find(module))


@pytest.mark.parametrize("name", sorted({*MODULES} - ELSEWHERE))
def test_examples_in_docstrings_hold(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted == examples_in(module)


def test_every_module_is_looked_at():
    files = [file for room in ("policy", "envs", "scripts") for file in (ROOT / room).rglob("*.py")]
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    assert len(names) > 100
    assert set(MODULES) == names


def test_there_are_examples_to_run():
    counts = {name: examples_in(importlib.import_module(name)) for name in {*MODULES} - ELSEWHERE}
    assert {name for name in WITH_EXAMPLES if not counts[name]} == set()
    assert sum(counts.values()) > 15


def test_the_examples_of_the_docs_hold():
    result = doctest.testfile(str(ROOT / "docs" / "control.md"), module_relative=False)
    assert result.failed == 0
    assert result.attempted > 5
