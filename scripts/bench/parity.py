"""Compare imported policies with what the code of the projects that wrote them computes.

python -m scripts.bench.parity [FOLDER ...]

Each folder holds a policy and `reference.npz`, see docs/import.md; by default they are those of the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policy.adapters.imported import build_policy
from policy.adapters.parity import Comparison, compare, read_reference
from policy.adapters.reading import read_source
from scripts.bench.report import machine, write_report

INTEROP = Path(__file__).resolve().parents[2] / "tests" / "data" / "interop"
REFERENCE, CHECKPOINT = "reference.npz", "latest.ckpt"
# Columns, and the words with which the comparisons in them begin.
COLUMNS = {
    "condition": ("condition",),
    "network": ("network",),
    "DDIM, derived again": ("DDIM",),
    "DDIM as they sample": ("their DDIM",),
    "DDPM": ("DDPM",),
    "control steps": ("20 control",),
    "fused, onnx": ("fused", "onnx"),
}


def main(folders: Sequence[Path]) -> None:
    """Print the largest difference of each kind for each folder, and end with 1 if one is beyond its bound."""
    print(machine())
    rows, failed = [], 0
    for folder in folders:
        source = str(folder / CHECKPOINT if (folder / CHECKPOINT).exists() else folder)
        read = read_source(source)
        found = compare(
            build_policy(read, source),
            read_reference(folder / REFERENCE),
            keys={},
            execution_horizon=read.execution_horizon,
        )
        rows.append({"policy": f"{folder.parent.name}/{folder.name}", **_largest(found)})
        failed += sum(not comparison.holds for comparison in found)
    write_report("parity", rows)
    print(f"{failed} comparisons are beyond their bounds")
    sys.exit(failed > 0)


def _largest(found: Sequence[Comparison]) -> dict[str, Any]:
    kinds = {name: [c.difference for c in found if c.name.startswith(words)] for name, words in COLUMNS.items()}
    return {name: f"{max(differences):.1e}" if differences else "-" for name, differences in kinds.items()}


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]] or sorted(file.parent for file in INTEROP.rglob(REFERENCE)))
