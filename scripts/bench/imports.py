"""Compare large U-Nets with LeRobot's own network, in turns in one run: chunks, and training steps.

Two sizes with random weights: that of LeRobot's default and that of diffusion_policy. LeRobot's network runs in a
process with an environment of its own, which is given or made:

    python -m scripts.bench.imports [lerobot=PYTHON] [networks=66M,251M] [threads=1,2]

Figures are medians of CPU time on one thread, which other work on the machine disturbs least, and of wall time on
several. The floor of a chunk is the time to read the weights of all its steps once each in bare matrix-vector products;
the ratio to it stands beside each figure, with the spread from the first to the third quartile.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.common.device import torch_threads
from policy.common.progress import say
from policy.inference.backends import compile_shared
from policy.training.loop import update_ema
from scripts.bench.arguments import given_settings
from scripts.bench.latency import Call, count, randomised
from scripts.bench.memory import NETWORKS
from scripts.bench.report import FOLDER, machine, write_report

ROUNDS, STEPS = 9, (1, 2, 4, 8, 10)
TRAINING_ROUNDS, BATCH = 5, 64
OBSERVATION, HORIZON, ACTION = 20, 16, 2
CONTENDERS: dict[str, dict[str, str]] = {
    "eager": {"backend": "eager"},
    "fused": {"backend": "fused"},
    "onnx": {"backend": "onnx"},
    "onnx int8": {"backend": "onnx", "weights": "int8"},
}
LEROBOT = Path(__file__).with_name("lerobot_network.py")
# LeRobot 0.4.4 asks for an older torch than the one that this project uses; its network runs with both.
PACKAGES = ("torch", "torchvision", "einops", "diffusers", "draccus", "huggingface_hub", "safetensors", "datasets")


def main() -> None:
    """Run the benchmark."""
    given = given_settings(sys.argv[1:], "imports")
    python = given.get("lerobot") or _environment()
    print(machine("onnxruntime"))
    rows: list[dict[str, Any]] = []
    for name in given.get("networks", ",".join(NETWORKS)).split(","):
        for threads in map(int, given.get("threads", "1,2").split(",")):
            with torch_threads(threads), _lerobot(python, NETWORKS[name], threads) as theirs:
                rows += _chunks(name, threads, theirs)
                rows += _training(name, threads, theirs)
    write_report("imports", rows)


def _environment() -> str:
    """Make an environment for LeRobot, unless it is there, and return its Python."""
    folder = (FOLDER / "lerobot").resolve()
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        say(f"making an environment for LeRobot in {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "lerobot==0.4.4"], check=True)
        (folder / "complete").touch()
    return str(python)


@contextmanager
def _lerobot(python: str, widths: tuple[int, ...], threads: int) -> Iterator[Callable[..., float]]:
    """Start LeRobot's network; the yielded function returns the milliseconds of one piece of its work."""
    sizes = {"widths": widths, "observation": OBSERVATION, "horizon": HORIZON, "action": ACTION, "batch": BATCH}
    command = [python, str(LEROBOT), json.dumps({**sizes, "threads": threads})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        read, write = process.stdout, process.stdin

        def ask(**work: Any) -> float:
            write.write(json.dumps(work) + "\n")
            write.flush()
            return float(read.readline())

        say(f"LeRobot's network: {ask(work='count'):,.0f} parameters")
        try:
            yield ask
        finally:
            write.close()


def _policy(widths: tuple[int, ...]) -> DiffusionPolicy:
    return randomised(
        DiffusionPolicy(
            PolicyConfig(
                observation_shapes={"state": (OBSERVATION,)},
                action_dim=ACTION,
                action_horizon=HORIZON,
                denoiser={"name": "unet", "widths": list(widths)},
            )
        )
    )


def _chunks(name: str, threads: int, theirs: Callable[..., float]) -> list[dict[str, Any]]:
    """Time chunks at each number of steps."""
    policy = _policy(NETWORKS[name])
    say(f"{name}: {count(policy):,} parameters")
    observations = {"state": torch.zeros(1, policy.config.obs_horizon, OBSERVATION)}
    noise = torch.zeros(1, HORIZON, ACTION)
    matrices = [w.flatten(1) for w in policy.denoiser.parameters() if w.ndim == 3]
    vectors = [torch.ones(w.shape[1]) for w in matrices]
    rows = []
    for ddim_steps, eta in (*((k, 0.0) for k in STEPS), (100, 1.0)):

        def floor(steps: int = ddim_steps) -> None:
            for _ in range(steps):
                for matrix, vector in zip(matrices, vectors, strict=True):
                    torch.mv(matrix, vector)

        sampler = Sampler(ddim_steps=ddim_steps, eta=eta)
        added = torch.zeros(ddim_steps, 1, HORIZON, ACTION) if eta else None
        programs = {n: compile_shared(policy, sampler, **settings) for n, settings in CONTENDERS.items()}
        for program in programs.values():
            program.use_threads(threads)
        calls: dict[str, Call] = {n: partial(program, observations, noise, added) for n, program in programs.items()}
        rounds = ROUNDS if ddim_steps < 100 else 3
        with torch.no_grad():
            times = _in_turns(
                {**calls, "floor": floor}, partial(theirs, work="chunk", steps=ddim_steps), threads, rounds
            )
        label = {"network": name, "threads": threads, "work": f"DDPM {ddim_steps}" if eta else f"K = {ddim_steps}"}
        rows += _rows(label, times)
    return rows


def _training(name: str, threads: int, theirs: Callable[..., float]) -> list[dict[str, Any]]:
    """Time whole training steps: forward, backward, clipping, AdamW and the average of the weights."""
    policy = _policy(NETWORKS[name]).train().requires_grad_(True)
    average = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, fused=True)
    batch: Any = {
        "observations": {"state": torch.randn(BATCH, policy.config.obs_horizon, OBSERVATION)},
        "actions": torch.rand(BATCH, HORIZON, ACTION),
        "mask": torch.ones(BATCH, HORIZON, dtype=torch.bool),
    }

    def step() -> None:
        policy.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, policy, 1000, 0.999)

    times = _in_turns({"ours": step}, partial(theirs, work="train"), threads, TRAINING_ROUNDS)
    return _rows({"network": name, "threads": threads, "work": f"training step of {BATCH}"}, times)


def _in_turns(
    calls: Mapping[str, Call], theirs: Callable[[], float], threads: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each call and of LeRobot's, one after the other in each round, after an untimed one."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {"LeRobot": [], **{name: [] for name in calls}}
    for _ in range(rounds + 1):
        times["LeRobot"].append(theirs())
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append(1e3 * (clock() - begin))
    return {name: values[1:] for name, values in times.items()}


def _rows(label: Mapping[str, Any], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    medians = {name: float(np.median(values)) for name, values in times.items()}
    floor = medians.get("floor")
    rows = []
    for name, values in times.items():
        first, third = np.percentile(values, [25, 75])
        rows.append(
            {
                **label,
                "by": name,
                "ms": medians[name],
                "spread_ms": f"{first:.1f} to {third:.1f}",
                "faster_than_lerobot": medians["LeRobot"] / medians[name],
                "ratio_to_floor": None if floor is None else medians[name] / floor,
            }
        )
        say(f"{label} {name}: {medians[name]:.1f} ms")
    return rows


if __name__ == "__main__":
    main()
