"""The rooms of the design: who may import whom, and how long wiring and configuration may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_PARTY = ("policy", "envs", "conf", "scripts", "tests")

# What the core may import beside the standard library: the table of the design page.
CORE = {
    "policy/schedule.py": {"torch"},
    "policy/ddim.py": {"torch", "policy.diffusion.schedule", "policy.model.denoisers"},
    "policy/denoisers": {"torch", "policy.model.denoisers"},
    "policy/encoders": {"torch", "policy.model.encoders"},
    "policy/normalizer.py": {"torch", "numpy"},
    "policy/diffusion_policy.py": {
        "torch",
        "policy.common.arguments",
        "policy.diffusion.ddim",
        "policy.model.denoisers",
        "policy.model.encoders",
        "policy.hub",
        "policy.model.normalizer",
        "policy.diffusion.schedule",
    },
}


def files(place):
    path = ROOT / place
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert found, f"nothing at {place}: the room has moved, and this test with it"
    return found


def imports(path, outside_functions=False):
    """Modules that a file imports, by full name: also inside functions, and through import_module("...")."""
    tree = ast.parse(path.read_text())
    if outside_functions:
        nodes, todo = [], list(tree.body)
        while todo:
            node = todo.pop()
            nodes.append(node)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                todo.extend(ast.iter_child_nodes(node))
    else:
        nodes = list(ast.walk(tree))
    package = path.relative_to(ROOT).with_suffix("").parts
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from policy import ddim` imports policy.ddim too.
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names if module in FIRST_PARTY}
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return names


def reaches(name, allowed):
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def offenders(place, forbidden):
    return {str(p.relative_to(ROOT)): n for p in files(place) for n in imports(p) if reaches(n, forbidden)}


def test_the_reader_of_imports_finds_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "policy" / "data").mkdir(parents=True)
    path = tmp_path / "policy" / "data" / "x.py"
    path.write_text(
        "import a.b as c, d\nfrom e.f import g\nfrom ..schedule import h\nfrom . import i\nfrom policy import ddim\n"
        "def k():\n    import envs.pusht\n    importlib.import_module('l.m')\n"
        "class N:\n    import o\n    async def p(self):\n        from q import r\n"
    )
    everywhere = imports(path)
    assert {
        "a.b",
        "d",
        "e.f",
        "policy.diffusion.schedule",
        "policy.data",
        "policy.diffusion.ddim",
        "envs.pusht",
        "l.m",
        "o",
        "q",
    } <= everywhere
    assert not {"envs.pusht", "l.m", "q"} & imports(path, outside_functions=True)
    assert {"a.b", "d", "e.f", "o"} <= imports(path, outside_functions=True)


def test_policy_knows_neither_environments_nor_scripts():
    assert len(files("policy")) > 10
    assert offenders("policy", {"envs", "scripts", "conf", "tests"}) == {}


def test_environments_know_neither_policies_nor_scripts():
    assert len(files("envs")) > 5
    assert offenders("envs", {"policy", "scripts", "conf", "tests", "torch"}) == {}


def test_environments_load_without_any_simulator():
    allowed = {"gymnasium", "numpy", "envs", *sys.stdlib_module_names}
    names = {str(p.relative_to(ROOT)): imports(p, outside_functions=True) for p in files("envs")}
    assert {f: n for f, found in names.items() for n in found if not reaches(n, allowed)} == {}


def test_only_tracking_imports_wandb():
    found = {
        str(p.relative_to(ROOT))
        for room in ("policy", "envs", "scripts")
        for p in files(room)
        if any(reaches(n, {"wandb"}) for n in imports(p))
    }
    assert found == {"policy/tracking.py"}


def test_wandb_is_imported_only_when_a_run_is_tracked():
    assert not any(reaches(n, {"wandb"}) for n in imports(ROOT / "policy/tracking.py", outside_functions=True))


@pytest.mark.parametrize("place", sorted(CORE))
def test_the_core_imports_what_the_design_allows(place):
    allowed = CORE[place] | set(sys.stdlib_module_names)
    found = {n for path in files(place) for n in imports(path) if n != "policy"}
    assert {n for n in found if not reaches(n, allowed)} == set()


@pytest.mark.parametrize(
    "place", ["policy/schedule.py", "policy/ddim.py", "policy/denoisers", "policy/diffusion_policy.py"]
)
def test_the_core_stays_clear_of_configuration_and_simulators(place):
    forbidden = {
        "hydra",
        "omegaconf",
        "gymnasium",
        "wandb",
        "policy.control.receding_horizon",
        "policy.training.loop",
        "policy.data",
    }
    assert offenders(place, forbidden) == {}


def test_scripts_are_40_lines_of_wiring_or_fewer():
    scripts = [p for p in files("scripts") if p.name not in ("__init__.py", "command.py") and p.parent.name != "bench"]
    assert {"collect.py", "train.py", "rollout.py", "sweep.py"} <= {p.name for p in scripts}
    lengths = {p.name: len(p.read_text().splitlines()) for p in scripts}
    assert {name: lines for name, lines in lengths.items() if lines > 40} == {}


def test_configuration_files_are_20_lines_or_fewer():
    found = sorted((ROOT / "conf").rglob("*.yaml"))
    groups = {p.parent.name for p in found if p.parent.name != "conf"}
    expected = {"env", "dataset", "encoder", "denoiser", "schedule", "sampler", "train", "tracker", "experiment"}
    assert expected <= groups
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in found}
    assert {name: lines for name, lines in lengths.items() if lines > 20} == {}


def test_every_console_command_is_a_script():
    text = (ROOT / "pyproject.toml").read_text()
    commands = [line.split('"')[1] for line in text.splitlines() if line.startswith("ddim-")]
    assert len(commands) >= 4
    for command in commands:
        module, function = command.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), command
        names = {getattr(n, "name", None) for n in ast.walk(ast.parse(path.read_text()))} | {
            t.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Assign)
            for t in n.targets
            if isinstance(t, ast.Name)
        }
        assert function in names, command
