"""The provenance of episodes: what they were run with, as far as it can change a result.

A provenance is JSON data in three groups of names with their values: `versions` of packages, the `machine`, and the
`environment` (hashes of its source files). The settings of a cell, its back end among them, are not repeated here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, version
from pathlib import Path
from types import FunctionType
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec

from policy.common.machine import processor

Provenance = Mapping[str, Mapping[str, str]]

# That of episodes from a version that did not write it down.
UNKNOWN: Provenance = {}
# Physics engines that simulators rest on.
ENGINES = ("mujoco", "pymunk", "pybullet", "Box2D")
# Wrappers of ours and of Gymnasium, which their versions describe.
WRAPPERS = ("policy", "gymnasium.core", "gymnasium.utils", "gymnasium.wrappers")
# What `gymnasium.make_vec` adds to the arguments that an environment is registered with or made with.
ADDED = ("max_episode_steps", "num_envs", "vectorization_mode", "vector_kwargs")
# The number of differences that a sentence names.
NAMED = 4


def provenance(env: gymnasium.Env[Any, Any], device: str) -> Provenance:
    """Collect the provenance of episodes that run in this process from now on.

    Args:
        env: the environment.
        device: `cpu` or `cuda`, on which the policy runs.

    Returns:
        The provenance.
    """
    parts = list(_parts(env))
    modules = dict.fromkeys(name for part in parts for name in _modules(part))
    simulators = [name.partition(".")[0] for name in modules]
    engines = [name for name in ENGINES if name in sys.modules]
    versions = {
        "ddim-policy": version("ddim-policy"),
        "torch": str(torch.__version__),  # with its build (such as +cpu), which the package's own version may lack
        "numpy": np.__version__,
        "gymnasium": gymnasium.__version__,
    }
    hashes = {name: _hash(content) for part in parts for name, content in _descriptions(part)}
    return {
        "versions": {**versions, **_versions([*simulators, *engines])},
        "machine": {"processor": processor(), **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})},
        "environment": {**hashes, **{name: _hash(content) for name, content in _sources(modules)}},
    }


def with_packages(made_with: Provenance, modules: Iterable[str]) -> Provenance:
    """Add the versions of the packages that these top-level modules come from."""
    return {**made_with, "versions": {**made_with["versions"], **_versions(modules)}}


def is_provenance(value: Any) -> bool:
    """Whether a value read from a file is a provenance."""
    return isinstance(value, dict) and all(
        isinstance(group, dict) and all(isinstance(text, str) for text in group.values()) for group in value.values()
    )


def differences(found: Sequence[Provenance]) -> list[str]:
    """What differs between provenances, in words such as `torch 2.7.0 and 2.13.0`.

    A name that only one of them has is not a difference.
    """
    values: dict[tuple[str, str], dict[str, None]] = {}
    for one in found:
        for group, named in one.items():
            for name, value in named.items():
                values.setdefault((group, name), {})[value] = None
    return [f"{name} {' and '.join(seen)}" for (_, name), seen in values.items() if len(seen) > 1]


def describe_provenance(found: Sequence[Provenance]) -> str:
    """Versions and machine of each provenance in words; empty for unknown ones."""
    return "; ".join(
        ", ".join(f"{name} {value}" for group in ("versions", "machine") for name, value in one.get(group, {}).items())
        for one in found
        if one
    )


def accept_mixture(found: Sequence[Provenance], mix: bool, *, where: str, instead: str) -> list[str]:
    """Refuse to mix episodes of different provenance, unless that is wanted.

    Args:
        found: the provenances.
        mix: whether a mixture is wanted.
        where: what holds the episodes, for the message.
        instead: what to do without a mixture, for the message.

    Returns:
        Warnings in sentences; none if nothing differs.

    Raises:
        ValueError: something differs, and `mix` is False.
    """
    said = []
    if differing := differences(found):
        more = f", and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        named = ", ".join(differing[:NAMED]) + more
        if not mix:
            raise ValueError(
                f"{where} would mix episodes that were not run alike: {named}. {instead}, or accept the mixture with"
                " mix=true: the report shows it"
            )
        said.append(f"the episodes were not all run alike (mix=true): {named}")
    if UNKNOWN in found and any(found):
        said.append(
            "some of the episodes come from a version that did not record what they were run with: that the simulator"
            " was the same cannot be checked"
        )
    return said


def _parts(env: Any) -> Iterator[Any]:
    """An environment and those inside it, whether wrapped in Gymnasium's way or held by an attribute."""
    todo, seen = [env], set[int]()
    while todo:
        part = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        held = getattr(part, "__dict__", {})
        todo += [held["env"]] if "env" in held else []  # which need not be of Gymnasium's class
        todo += [one for value in held.values() for one in _listed(value) if isinstance(one, gymnasium.Env)]


def _listed(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else [value]


def _modules(part: Any) -> Iterator[str]:
    """The modules of an environment's classes, and of the functions that it holds and that are not installed."""
    for kind in type(part).__mro__:
        if not _is_wrapper(kind.__module__):
            yield kind.__module__
    for value in getattr(part, "__dict__", {}).values():
        function = getattr(value, "func", value)  # of a partial
        if isinstance(function, FunctionType | type) and not _is_wrapper(function.__module__):
            file = _file(function.__module__)
            if file is not None and not _is_installed(file):
                yield function.__module__


def _is_wrapper(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or any(module == name or module.startswith(f"{name}.") for name in WRAPPERS)


def _file(module: str) -> Path | None:
    """The source file of an imported module; None if it has none."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and file.endswith(".py") and Path(file).is_file() else None


def _is_installed(file: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & {*file.parts})


def _sources(modules: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """The source files of modules, and those of their own that they import.

    What an installed package imports is left out: its version describes it.

    Yields:
        The path below the folder from which Python imports, and the content.
    """
    todo = {file: _root(name, file) for name in modules if (file := _file(name)) is not None}
    seen = set[Path]()
    while todo:
        file, root = todo.popitem()
        if file in seen:
            continue
        seen.add(file)
        content = file.read_bytes()
        yield file.relative_to(root).as_posix(), content
        if not _is_installed(file):
            todo.update({other: root for name in _imports(content, file, root) if (other := _below(root, name))})


def _root(module: str, file: Path) -> Path:
    """The folder from which a module was imported."""
    depth = module.count(".") + (file.name == "__init__.py")
    return file.parents[depth]


def _below(root: Path, module: str) -> Path | None:
    if _is_wrapper(module):
        return None
    place = root.joinpath(*module.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _imports(content: bytes, file: Path, root: Path) -> Iterator[str]:
    """The names of the modules that a file may import."""
    package = file.relative_to(root).parent.parts
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # it was changed after its import
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _descriptions(part: Any) -> Iterator[tuple[str, bytes]]:
    """How Gymnasium has registered a simulator, and the file of its MuJoCo model."""
    spec = None if isinstance(part, gymnasium.Wrapper) else getattr(part, "spec", None)
    if isinstance(spec, EnvSpec):
        known = gymnasium.registry.get(spec.id, spec)  # an environment's own spec has lost its time limit
        kwargs = {name: value for name, value in spec.kwargs.items() if name in known.kwargs or name not in ADDED}
        registered = [str(known.entry_point), known.max_episode_steps, kwargs]
        text = json.dumps(registered, skipkeys=True, default=lambda value: type(value).__qualname__)
        yield f"the registration of {spec.id}", text.encode()
    model = getattr(part, "__dict__", {}).get("fullpath")
    if isinstance(model, str) and Path(model).is_file():
        yield Path(model).name, Path(model).read_bytes()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _versions(modules: Iterable[str]) -> dict[str, str]:
    """The versions of the installed packages that top-level modules come from, by the package's name."""
    packages = filter(None, map(_distribution, dict.fromkeys(modules)))
    return {package.name: package.version for package in packages}


def _distribution(module: str) -> Distribution | None:
    """The installed package that a top-level module comes from; None if it was not installed."""
    try:
        return distribution(module)  # most are called like their module
    except PackageNotFoundError:
        # Asking for all modules of all packages, as packages_distributions does, takes a hundred times as long.
        return next((one for one in distributions() if module in (one.read_text("top_level.txt") or "").split()), None)
