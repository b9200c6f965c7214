"""Compare the latency of a chunk with the limits of the machine, and with the reference implementation's U-Net.

The Push-T and Meta-World presets are timed at K = 1, 2, 4, 8, 16 with batch 1 on one thread. Values whose ratio is
reported are timed in turns, so that both meet the same load.

The floors are lower bounds of the time, for each K:
  floor        the weights that a chunk needs: those of a step K times, all others once
  plain floor  all weights of the network K times, and those of the encoder once
One bound is the time to read these bytes at the highest rate that this machine reaches for as many (with bare
matrix-vector products, or with sums). The other is the time for the operations at the highest rate of multiply-adds at
batch 1 (the same products with weights that stay in the nearest caches). The floor is the larger of the two. The floor
of 8-bit weights is the time to read a quarter of the bytes.
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package

from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.common.device import torch_threads
from policy.common.progress import say
from policy.inference.backends import compile_sampler
from policy.inference.onnx_backend import Onnx
from policy.inference.program import Program, SamplingInputs
from policy.model.denoisers.timestep import TimestepEmbedding
from policy.model.diffusion_policy import zero_observations
from scripts.bench.kept_rows import KeptRows, Row
from scripts.bench.report import machine, write_report

PRESETS: dict[str, dict[str, Any]] = {
    "pusht": {"observation_shapes": {"state": (40,)}, "action_dim": 2},
    "metaworld": {"observation_shapes": {"state": (39,)}, "action_dim": 4},
}
DDIM_STEPS = (1, 2, 4, 8, 16)
# Minimum duration of the timed calls of all contenders together, in seconds, and minimum number of calls of each, which
# the 99th percentile needs.
SECONDS, CALLS = 3.0, 100
REFERENCE_CALLS = 5

Call = Callable[[], object]


def main() -> None:
    """Run the benchmark; with the argument `alternatives`, time other ways to run the same program instead."""
    if sys.argv[1:] == ["alternatives"]:
        return alternatives()
    devices = ("gpu", "cpu") if torch.cuda.is_available() else ("cpu",)
    cases = list(itertools.product(PRESETS, devices, DDIM_STEPS))
    with (
        torch_threads(1),
        torch.no_grad(),
        KeptRows("latency", "onnxruntime", measurements=len(cases)) as rows,
    ):
        for preset, device, ddim_steps in cases:
            settings = {"preset": preset, "device": device, "ddim_steps": ddim_steps}
            rows.measure(settings, partial(_measured, preset, device, ddim_steps))
    rows.report()


def _measured(preset: str, device: str, ddim_steps: int) -> list[Row]:
    policy = randomised(DiffusionPolicy(PolicyConfig(**PRESETS[preset])))
    if device == "gpu":
        return measure_on_gpu(preset, policy, ddim_steps)
    reference = UNet(**reference_sizes(policy.config)).eval()
    say(f"{preset}: {count(policy):,} parameters; the reference's U-Net {count(reference):,}")
    return measure(preset, policy, reference, ddim_steps)


def alternatives() -> None:
    """Time other ways to run the Push-T preset at K = 8. This needs a C++ compiler, and minutes to compile."""
    print(machine("onnxruntime"))
    with torch_threads(1), torch.no_grad():
        policy, sampler = randomised(DiffusionPolicy(PolicyConfig(**PRESETS["pusht"]))), Sampler(ddim_steps=8)
        calls, _ = _programs(policy, sampler)
        course = sampler.cold_course(policy.schedule, policy.config.objective)
        program = Program(policy, sampler, course).eval().requires_grad_(False)
        chunk = torch.zeros(1, 8, 2)
        given = SamplingInputs(zero_observations(policy.config, rows=1), chunk, None, chunk, torch.zeros(1, 8))
        compiled = torch.compile(program)
        exported = torch.export.export(program, (given,))
        with tempfile.TemporaryDirectory() as folder:
            package = aoti_compile_and_package(exported, package_path=f"{folder}/program.pt2")
            ahead = aoti_load_package(package)
        step, _, _ = weight_matrices(policy)
        calls |= {
            "program, eager": lambda: program(given),
            "program, torch.compile": lambda: compiled(given),
            "program, AOTInductor": lambda: ahead(given),
            "bare products of the steps, float32": _products(step * 8),
            "bare products of the steps, bfloat16": _products([weight.bfloat16() for weight in step] * 8),
        }
        times = in_turns(calls, SECONDS, CALLS)
    fastest = float(np.median(times["onnx"]))
    rows = [
        {
            "backend": name,
            "median_ms": float(np.median(values)),
            "p99_ms": float(np.percentile(values, 99)),
            "ratio_to_onnx": float(np.median(values)) / fastest,
        }
        for name, values in times.items()
    ]
    write_report("latency_alternatives", rows)


def measure(preset: str, policy: DiffusionPolicy, reference: UNet, ddim_steps: int) -> list[Row]:
    """Measure the rows of one preset at one K."""
    sampler = Sampler(ddim_steps=ddim_steps)
    programs, first_call = _programs(policy, sampler)
    step, once, plain = weight_matrices(policy)
    needed = step * ddim_steps + once
    everything = plain * ddim_steps + encoder_matrices(policy)
    reads = {"floor": needed, "plain floor": everything, "int8 floor": [w[: -(-len(w) // 4)] for w in needed]}
    probes = {f"{name}, {how}": probe(ws) for name, ws in reads.items() for how, probe in PROBES.items()}
    times = in_turns({**programs, **probes}, SECONDS, CALLS)
    read = {name: min(float(np.median(times[f"{name}, {how}"])) for how in PROBES) for name in reads}
    compute = 1e3 * sum(weight.numel() for weight in needed) / multiply_add_rate()
    floor = max(read["floor"], compute)
    floors = {name: read["int8 floor"] if name.endswith("int8") else floor for name in programs}
    observation = torch.zeros(1, 2 * policy.config.observation_shapes["state"][0])
    start = torch.zeros(1, REFERENCE_HORIZON, policy.config.action_dim)
    beside = in_turns(
        {"reference": lambda: reference.sample(start, observation, ddim_steps), **programs}, 0.0, REFERENCE_CALLS
    )
    return [
        {
            "preset": preset,
            "ddim_steps": ddim_steps,
            "backend": name,
            "median_ms": float(np.median(times[name])),
            "p99_ms": float(np.percentile(times[name], 99)),
            "floor_ms": floors[name],
            "ratio_to_floor": float(np.median(times[name])) / floors[name],
            "plain_floor_ms": read["plain floor"],
            "compute_ms": compute,
            "ratio_to_reference": float(np.median(beside["reference"]) / np.median(beside[name])),
            "reference_ms": float(np.median(beside["reference"])),
            "first_call_ms": first_call.get(name),
        }
        for name in programs
    ]


def _programs(policy: DiffusionPolicy, sampler: Sampler) -> tuple[dict[str, Call], dict[str, float]]:
    config = policy.config
    generator = torch.Generator().manual_seed(0)
    observations = {
        key: torch.randn(1, config.obs_horizon, *shape, generator=generator)
        for key, shape in config.observation_shapes.items()
    }
    noise = torch.randn(1, config.denoised_horizon, config.action_dim, generator=generator)
    calls: dict[str, Call] = {
        "sample_actions": lambda: policy.sample_actions(observations, noise=noise, ddim_steps=sampler.ddim_steps)
    }
    previous = torch.zeros(1, config.action_horizon, config.action_dim)
    inputs = SamplingInputs(observations, noise, None, previous, torch.zeros(previous.shape[:2]))
    first_call = {}
    for name, settings in {"onnx": {}, "onnx int8": {"weights": "int8"}}.items():
        program = compile_sampler(policy, sampler, backend="onnx", **settings)
        # The time that a robot waits at its start: the runtime loads an existing model and samples the first chunk.
        assert isinstance(program.run, Onnx)
        begin = time.perf_counter()
        program.run(inputs)
        first_call[name] = 1e3 * (time.perf_counter() - begin)
        calls[name] = lambda program=program: program(observations, noise)  # type: ignore[misc]
    return calls, first_call


def measure_on_gpu(preset: str, policy: DiffusionPolicy, ddim_steps: int) -> list[Row]:
    """Time batch 1 (the wait of one robot) and batch 256 (chunks per second), with the copies to and from the GPU."""
    config = policy.config
    program = compile_sampler(copy.deepcopy(policy).to("cuda"), Sampler(ddim_steps=ddim_steps), backend="cuda_graph")
    rows = []
    for batch in (1, 256):
        observations = {"state": torch.zeros(batch, config.obs_horizon, *config.observation_shapes["state"])}
        noise = torch.zeros(batch, config.denoised_horizon, config.action_dim)
        times = in_turns({"gpu": lambda o=observations, n=noise: program(o, n).cpu()}, 1.0, CALLS)["gpu"]  # type: ignore[misc]
        rows.append(
            {
                "preset": preset,
                "ddim_steps": ddim_steps,
                "backend": f"cuda_graph, batch {batch}",
                "median_ms": float(np.median(times)),
                "p99_ms": float(np.percentile(times, 99)),
                "chunks_per_second": 1e3 * batch / float(np.median(times)),
            }
        )
    return rows


def in_turns(calls: Mapping[str, Call], seconds: float, least: int) -> dict[str, list[float]]:
    """Time contenders one after the other, again and again, so that all of them meet the same load.

    Args:
        calls: the contenders, by name.
        seconds: minimum duration of the timed calls.
        least: minimum number of timed calls of each.

    Returns:
        Milliseconds of each call, by name. A tenth of `least` rounds are run before, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(1, least // 10)):
        for call in calls.values():
            call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def weight_matrices(policy: DiffusionPolicy) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The matrices that every step needs, those needed once for a chunk, and all that a plain network call needs."""
    denoiser = policy.denoiser
    embedding = {id(p) for p in denoiser.embed_timestep.parameters()}
    once, step, plain = encoder_matrices(policy), list[Tensor](), list[Tensor]()
    for name, weight in denoiser.named_parameters():
        if weight.ndim != 2:
            continue
        plain.append(weight)
        if "modulate" in name or "project_observation" in name:
            once.append(weight)
        elif id(weight) not in embedding:  # the program computes the embeddings of its timesteps once, as constants
            step.append(weight)
    return step, once, plain


def encoder_matrices(policy: DiffusionPolicy) -> list[Tensor]:
    """The encoder's matrices."""
    return [weight for weight in policy.encoder.parameters() if weight.ndim == 2]


def _products(weights: list[Tensor]) -> Call:
    """Bare matrix-vector products, with nothing between them."""
    work = [(w, w.new_ones(w.shape[1]), w.new_empty(w.shape[0])) for w in weights]

    def call() -> None:
        for weight, x, out in work:
            torch.mv(weight, x, out=out)

    return call


def _sums(weights: list[Tensor]) -> Call:
    def call() -> None:
        for weight in weights:
            weight.sum()

    return call


PROBES = {"products": _products, "sums": _sums}


def multiply_add_rate() -> float:
    """Multiply-adds per second of a matrix-vector product whose matrix (256 kB) stays in the nearest caches."""
    weight, x, out = torch.ones(256, 256), torch.ones(256), torch.empty(256)

    def call() -> None:
        for _ in range(100):
            torch.mv(weight, x, out=out)

    milliseconds = min(in_turns({"product": call}, 0.1, 20)["product"])
    return 100 * weight.numel() / (milliseconds / 1e3)


def randomised(policy: DiffusionPolicy) -> DiffusionPolicy:
    """Give a policy random weights at the scale of a trained network, because an untrained one predicts zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return policy.eval().requires_grad_(False)


def count(network: nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


# The reference: the conditional U-Net 1-D of Diffusion Policy (Chi et al. 2023), low-dimensional Push-T, at its
# published sizes: 16 actions a chunk, of which it executes 8. Written from its description.
REFERENCE_HORIZON = 16
REFERENCE_WIDTHS = (256, 512, 1024)
REFERENCE_KERNEL, REFERENCE_GROUPS, REFERENCE_TIMESTEP = 5, 8, 256


def reference_sizes(config: PolicyConfig) -> dict[str, int]:
    """Sizes of the reference for the same observations (a history of two) and actions."""
    return {"action_dim": config.action_dim, "condition": 2 * config.observation_shapes["state"][0]}


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, REFERENCE_KERNEL, padding=REFERENCE_KERNEL // 2),
        nn.GroupNorm(REFERENCE_GROUPS, outputs),
        nn.Mish(),
    )


class _Residual(nn.Module):
    """Two convolutions; between them, the condition scales and shifts the features (FiLM)."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inputs, outputs), _convolution(outputs, outputs)
        self.modulate = nn.Sequential(nn.Mish(), nn.Linear(condition, 2 * outputs))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition)[..., None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class _Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, condition: int, resize: nn.Module) -> None:
        super().__init__()
        self.first, self.second = _Residual(inputs, outputs, condition), _Residual(outputs, outputs, condition)
        self.resize = resize

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.first(x, condition), condition)


class UNet(nn.Module):
    """The reference's network.

    Args:
        action_dim: width of one action.
        condition: width of the observations.
    """

    def __init__(self, *, action_dim: int, condition: int) -> None:
        super().__init__()
        width = REFERENCE_TIMESTEP
        self.embed_timestep = nn.Sequential(
            TimestepEmbedding(100, width), nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width)
        )
        c = width + condition
        widths = [action_dim, *REFERENCE_WIDTHS]
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(
            _Level(a, b, c, nn.Conv1d(b, b, 3, 2, 1) if b != widths[-1] else nn.Identity()) for a, b in pairs
        )
        self.middle = nn.ModuleList(_Residual(widths[-1], widths[-1], c) for _ in range(2))
        self.up = nn.ModuleList(_Level(2 * b, a, c, nn.ConvTranspose1d(a, a, 4, 2, 1)) for a, b in reversed(pairs[1:]))
        first = REFERENCE_WIDTHS[0]
        self.leave = nn.Sequential(_convolution(first, first), nn.Conv1d(first, action_dim, 1))

    def forward(self, noisy_actions: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        """Map (B, 16, action_dim), (B,) and (B, condition) to (B, 16, action_dim)."""
        condition = torch.cat([self.embed_timestep(timestep), observation], dim=1)
        x = noisy_actions.transpose(1, 2)
        skipped = []
        for level in self.down:
            x = level(x, condition)
            skipped.append(x)
            x = level.resize(x)  # type: ignore[operator]
        for block in self.middle:
            x = block(x, condition)
        for level in self.up:
            x = level.resize(level(torch.cat([x, skipped.pop()], dim=1), condition))  # type: ignore[operator]
        return self.leave(x).transpose(1, 2)

    def sample(self, noise: Tensor, observation: Tensor, ddim_steps: int) -> Tensor:
        """Make K network calls with a cheap update after each, which is the least that any DDIM sampler needs."""
        x = noise
        for k in range(ddim_steps):
            x = 0.5 * x + 0.5 * self(x, torch.full((len(x),), k), observation)
        return x


if __name__ == "__main__":
    main()
