"""The rooms of the house: who may import whom, and how long wiring and configuration may be."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST_PARTY = ("policy", "envs", "conf", "scripts", "tests")

# Each room of `policy` imports only from rooms to its left. The face, `policy/__init__`, may import everything.
ROOMS = (
    "common",
    "diffusion",
    "statistics",
    "tracking",
    "model",
    "data",
    "inspection",
    "inference",
    "ddim",
    "control",
    "training",
    "rollout",
    "checkpoint",
    "adapters",
    "recipe",
    "sweep",
    "commands",
)
FACE = {"policy/__init__.py", "policy/__init__.pyi"}

# The core needs nothing but these beside the standard library.
OUTSIDE = {
    "diffusion": {"torch"},
    "statistics": {"numpy", "scipy"},
    "model": {"torch", "numpy", "huggingface_hub"},
    "inference": {"torch", "numpy"},
    "control": {"torch", "numpy", "gymnasium"},
    "training": {"torch", "numpy", "safetensors"},
}


def files(place):
    path = ROOT / place
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert found, f"nothing at {place}: the room has moved, and this test with it"
    return found


def imports(path, outside_functions=False):
    """Modules that a file imports, by full name.

    Imports inside functions and for type checkers are among them, and so are strings that name a module to import:
    import_module("..."), and "module:name" of a registry.
    """
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
            names |= {module} | {
                f"{module}.{alias.name}" for alias in node.names if module.split(".")[0] in FIRST_PARTY
            }
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            names |= {a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not outside_functions:
            module, colon, name = node.value.partition(":")
            if colon and name.isidentifier() and module.split(".")[0] in FIRST_PARTY and " " not in module:
                names.add(module)
    return names


def reaches(name, allowed):
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def offenders(place, forbidden):
    return {str(p.relative_to(ROOT)): n for p in files(place) for n in imports(p) if reaches(n, forbidden)}


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room_of(module):
    """The room of a module of `policy`; None for the face and for what is not of `policy`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "policy" and len(parts) > 1 and parts[1] in ROOMS else None


def wrong_ways():
    """Every import from a room to its right, in words."""
    found = []
    for path in files("policy"):
        here = room_of(module_of(path))
        for name in imports(path) if here else ():
            there = room_of(name)
            if there is None and name.split(".")[0] == "policy":
                found.append(
                    f"{path.relative_to(ROOT)} ({here}) imports {name} from the face, which leads to every room"
                )
            if there is not None and ROOMS.index(there) > ROOMS.index(here):
                found.append(f"{path.relative_to(ROOT)} ({here}) imports {name} ({there}), a room after its own")
    return sorted(found)


def graph():
    """Each file of `policy`, by module, with the files that it imports."""
    modules = {module_of(path): path for path in files("policy") if str(path.relative_to(ROOT)) not in FACE}
    edges = {}
    for module, path in modules.items():
        names = imports(path)
        # A package's __init__ counts where a name is taken from it, not where it only lies on the way to a module.
        edges[module] = {name for name in names if name in modules} - {module}
        for name in list(edges[module]):
            if any(other.startswith(f"{name}.") and other in names for other in modules):
                edges[module].discard(name)
    return edges


def test_the_reader_of_imports_finds_every_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "policy" / "data").mkdir(parents=True)
    path = tmp_path / "policy" / "data" / "x.py"
    path.write_text(
        "import a.b as c, d\nfrom e.f import g\nfrom ..schedule import h\nfrom . import i\nfrom policy import ddim\n"
        "def k():\n    import envs.pusht\n    importlib.import_module('l.m')\n"
        "class N:\n    import o\n    async def p(self):\n        from q import r\n"
        "PARTS = {'s': 'policy.model.t:U', 'not': 'policy: a sentence'}\n"
    )
    everywhere = imports(path)
    assert {
        "a.b",
        "d",
        "e.f",
        "policy.schedule",
        "policy.data",
        "policy.ddim",
        "envs.pusht",
        "l.m",
        "o",
        "q",
        "policy.model.t",
    } <= everywhere
    assert not {"envs.pusht", "l.m", "q"} & imports(path, outside_functions=True)
    assert {"a.b", "d", "e.f", "o"} <= imports(path, outside_functions=True)


def test_every_file_of_policy_is_in_a_room():
    homeless = [
        str(path.relative_to(ROOT))
        for path in files("policy")
        if room_of(module_of(path)) is None and str(path.relative_to(ROOT)) not in FACE
    ]
    assert homeless == []
    there = {p.stem for p in (ROOT / "policy").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} == set(ROOMS)


def test_each_room_imports_only_from_rooms_before_it():
    assert len(files("policy")) > 80
    assert wrong_ways() == []


@pytest.mark.parametrize(
    "line",
    [
        "from policy import load_checkpoint",
        "def f():\n    import policy\n    return policy.load_checkpoint",
        "from importlib import import_module\nimport_module(name='policy.commands.train')",
    ],
)
def test_an_import_through_the_face_or_by_keyword_is_found_too(line, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "policy" / "common").mkdir(parents=True)
    (tmp_path / "policy" / "common" / "late.py").write_text(f"{line}\n")
    assert any("policy/common/late.py (common) imports" in words for words in wrong_ways())


def test_an_import_from_a_later_room_is_named_with_both_rooms(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "policy" / "common").mkdir(parents=True)
    (tmp_path / "policy" / "common" / "late.py").write_text("def f():\n    from policy.sweep.grid import make_cells\n")
    (said,) = {words for words in wrong_ways() if "make_cells" not in words}
    assert said == "policy/common/late.py (common) imports policy.sweep.grid (sweep), a room after its own"


def test_no_file_imports_itself_by_way_of_others():
    try:
        order = list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert len(order) > 80


def test_nothing_inside_imports_the_face_of_ddim():
    assert [p for p in files("policy") if "policy.ddim" in imports(p)] == []


def test_policy_knows_neither_environments_nor_scripts():
    assert offenders("policy", {"envs", "scripts", "conf", "tests"}) == {}


def test_environments_know_neither_policies_nor_scripts():
    assert len(files("envs")) > 5
    assert offenders("envs", {"policy", "scripts", "conf", "tests", "torch"}) == {}


def test_environments_load_without_any_simulator():
    allowed = {"gymnasium", "numpy", "envs", "lazy_loader", *sys.stdlib_module_names}
    names = {str(p.relative_to(ROOT)): imports(p, outside_functions=True) for p in files("envs")}
    assert {f: n for f, found in names.items() for n in found if not reaches(n, allowed)} == {}


def test_only_the_recorder_imports_wandb_and_only_when_a_run_is_tracked():
    found = {
        str(p.relative_to(ROOT))
        for room in ("policy", "envs", "scripts")
        for p in files(room)
        if any(reaches(n, {"wandb"}) for n in imports(p))
    }
    assert found == {"policy/tracking/recorder.py"}
    assert not any(reaches(n, {"wandb"}) for n in imports(ROOT / "policy/tracking/recorder.py", outside_functions=True))


@pytest.mark.parametrize("room", sorted(OUTSIDE))
def test_the_core_needs_little_from_outside(room):
    allowed = {*OUTSIDE[room], "policy", *sys.stdlib_module_names}
    # Packages of extras are imported by name when they are asked for.
    found = {n for path in files(f"policy/{room}") for n in imports(path)}
    assert {n for n in found if not reaches(n, allowed)} == set()


def test_tests_mirror_the_rooms():
    with_tests = {p.parent.name for p in (ROOT / "tests").glob("*/test_*.py")}
    assert set(ROOMS) - {"ddim"} <= with_tests


def test_scripts_are_60_lines_of_wiring_or_fewer():
    machinery = ("__init__.py", "command.py", "command_line.py", "help_text.py", "settings.py")
    scripts = [p for p in files("scripts") if p.name not in machinery and p.parent.name != "bench"]
    assert {"collect.py", "train.py", "rollout.py", "sweep.py"} <= {p.name for p in scripts}
    lengths = {p.name: len(p.read_text().splitlines()) for p in scripts}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_configuration_files_are_20_lines_or_fewer():
    found = sorted((ROOT / "conf").rglob("*.yaml"))
    groups = {p.parent.name for p in found if p.parent.name != "conf"}
    expected = {
        "env",
        "dataset",
        "encoder",
        "denoiser",
        "schedule",
        "sampler",
        "train",
        "recipe",
        "tracker",
        "experiment",
    }
    assert expected <= groups
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in found}
    assert {name: lines for name, lines in lengths.items() if lines > 20} == {}


# Longer than 60 lines, docstring included, and why.
LONG = {
    # Signatures and shapes of the source document, each argument explained.
    "policy/diffusion/ddim.py": {"ddim_sample", "ddim_step"},
    # A command's parameters are its settings: a line each in the signature, and one in the docstring.
    "policy/commands/train.py": {"train_policy"},
    "policy/commands/rollout.py": {"roll_out"},
    "policy/commands/sweep.py": {"sweep"},
    # The same holds for the settings of dataset=.
    "policy/data/reading.py": {"read_demonstrations"},
}


def test_functions_are_60_lines_or_fewer():
    found = {}
    for room in ("policy", "envs", "scripts"):
        for path in files(room):
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name not in LONG.get(name, ()):
                    lines = node.end_lineno - node.lineno + 1
                    if lines > 60:
                        found[f"{name}: {node.name}"] = lines
    assert found == {}


def test_every_console_command_is_a_script():
    text = (ROOT / "pyproject.toml").read_text()
    commands = [line.split('"')[1] for line in text.splitlines() if line.startswith("ddim-")]
    assert len(commands) >= 6
    for command in commands:
        module, function = command.split(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.is_file(), command
        tree = ast.parse(path.read_text())
        names = {
            t.id for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)
        }
        assert function in names, command
