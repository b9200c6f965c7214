"""The memory of a sweep of ten cells with large policies, in all of its processes together.

A policy with random weights is saved as a checkpoint, and swept over ten numbers of denoising steps in the planar
environment, on two cores with two environments. While the sweep runs, the proportional set sizes of its processes are
added up: memory that processes share counts once. That needs Linux.

The floor of a back end is one copy of the weights that it reads, beside what the same sweep takes with a tiny network:
the interpreters and their libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from policy import DiffusionPolicy, PolicyConfig
from policy.checkpoint.files import seal
from policy.checkpoint.writing import write_policy
from policy.common.progress import say
from scripts.bench.latency import count, randomised
from scripts.bench.report import machine, write_report

NETWORKS = {"66M": (256, 512, 1024), "251M": (512, 1024, 2048)}
TINY = (16, 32)
# Bytes of a weight; the scales of int8 weights are left out.
BACKENDS = {"onnx": 4, "onnx int8": 1, "fused": 4}
SECONDS_BETWEEN = 0.1


def main() -> None:
    """Run the benchmark; arguments choose networks, by default all."""
    print(machine("onnxruntime"))
    _, tiny = _peaks(TINY)
    rows = []
    for name in sys.argv[1:] or NETWORKS:
        parameters, peaks = _peaks(NETWORKS[name])
        for backend, size in BACKENDS.items():
            floor = tiny[backend] + size * parameters
            rows.append(
                {
                    "network": name,
                    "parameters": parameters,
                    "backend": backend,
                    "peak_gb": peaks[backend] / 1e9,
                    "floor_gb": floor / 1e9,
                    "ratio_to_floor": peaks[backend] / floor,
                }
            )
    write_report("memory", rows)


def _peaks(widths: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """The number of parameters, and the peak in bytes of a sweep with each back end."""
    with tempfile.TemporaryDirectory() as folder:
        parameters, peaks = _save(Path(folder) / "checkpoint", widths), {}
        for backend in BACKENDS:
            peaks[backend] = _sweep(Path(folder), backend)
            say(f"{parameters:,} parameters, {backend}: {peaks[backend] / 1e9:.2f} GB")
    return parameters, peaks


def _save(folder: Path, widths: tuple[int, ...]) -> int:
    config = PolicyConfig(
        observation_shapes={"state": (4,)},
        action_dim=2,
        action_horizon=16,
        denoiser={"name": "unet", "widths": list(widths)},
    )
    policy = randomised(DiffusionPolicy(config))
    folder.mkdir()
    write_policy(folder, policy, env={"name": "planar"}, execution_horizon=16, training={"step": 0})
    seal(folder)
    return count(policy)


def _sweep(folder: Path, backend: str) -> int:
    """Sweep, and return the largest sum in bytes."""
    name, *weights = backend.split()
    command = [
        *(sys.executable, "-m", "scripts.sweep", f"checkpoint={folder / 'checkpoint'}"),
        *("ddim_steps=[1,2,3,4,5,6,7,8,9,10]", "episodes=2", "num_envs=2", "workers=2", "videos=0"),
        *(f"backend={name}", *(f"weights={kind}" for kind in weights), f"output_dir={folder / backend}"),
    ]
    peak = 0
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(map(_proportional, _family(process.pid))))
            time.sleep(SECONDS_BETWEEN)
    if process.returncode:
        raise SystemExit((folder / "log").read_text())
    return peak


def _family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # it has ended
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def _proportional(pid: int) -> int:
    """The proportional set size of a process, in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
