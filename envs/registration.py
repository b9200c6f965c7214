"""Gymnasium ids of the families, registered without importing Gymnasium."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

IDS = {
    "ddim_policy/MetaWorld-v0": "envs.metaworld:MetaWorldEnv",
    "ddim_policy/MetaWorldTasks-v0": "envs.metaworld_tasks:MetaWorldTasksEnv",
    "ddim_policy/OCBench-v0": "envs.ocbench:OCBenchEnv",
    "ddim_policy/Planar-v0": "envs.planar:PlanarEnv",
    "ddim_policy/PushT-v0": "envs.pusht:PushTEnv",
}


def register_with_gymnasium() -> None:
    """Register the ids now if Gymnasium is imported already, and otherwise as soon as it is."""
    if "gymnasium" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _GymnasiumFinder())


def _register() -> None:
    import gymnasium

    for id, entry_point in IDS.items():
        gymnasium.register(id=id, entry_point=entry_point)


class _GymnasiumFinder(MetaPathFinder):
    """Finds Gymnasium as the other finders do, and registers the ids when its import ends.

    Gymnasium itself offers no such hook: since version 1.0 it does not load plugins by entry points.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find Gymnasium, with the registration added to its loader; find no other module."""
        if fullname != "gymnasium":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
