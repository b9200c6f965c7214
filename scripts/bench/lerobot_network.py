"""LeRobot's own network, for `scripts.bench.imports`: it runs in LeRobot's environment and imports nothing from here.

It reads one JSON object a line and answers with one number: `{"work": "count"}` with its parameters, `chunk` and
`train` with the milliseconds that they took.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from typing import Any

import torch


def main() -> None:
    """Serve until the input ends."""
    sizes = json.loads(sys.argv[1])
    torch.set_num_threads(sizes["threads"])
    clock = time.process_time if sizes["threads"] == 1 else time.perf_counter
    network, scheduler = _built(sizes)
    training: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["work"] == "count":
            print(sum(parameter.numel() for parameter in network.parameters()), flush=True)
            continue
        if asked["work"] == "train" and not training:
            training.update(_training(network))
        begin = clock()
        if asked["work"] == "chunk":
            _chunk(network, scheduler, sizes, asked["steps"])
        else:
            _train(training, scheduler, sizes)
        print(1e3 * (clock() - begin), flush=True)


def _built(sizes: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalUnet1d

    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (sizes["observation"],)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (1,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (sizes["action"],))},
        down_dims=tuple(sizes["widths"]),
        horizon=sizes["horizon"],
    )
    network = DiffusionConditionalUnet1d(config, global_cond_dim=2 * sizes["observation"]).eval()
    return network, DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)


@torch.no_grad()
def _chunk(network: torch.nn.Module, scheduler: Any, sizes: dict[str, Any], steps: int) -> None:
    """What its sampler does: one network call and one scheduler's step for each timestep."""
    network.eval()
    scheduler.set_timesteps(steps)
    condition = torch.zeros(1, 2 * sizes["observation"])
    x = torch.zeros(1, sizes["horizon"], sizes["action"])
    for timestep in scheduler.timesteps:
        predicted = network(x, torch.full((1,), int(timestep), dtype=torch.long), global_cond=condition)
        x = scheduler.step(predicted, timestep, x).prev_sample


def _training(network: torch.nn.Module) -> dict[str, Any]:
    return {
        "network": network,
        "average": copy.deepcopy(network).requires_grad_(False),
        "optimizer": torch.optim.AdamW(network.parameters(), 1e-6, fused=True),
    }


def _train(training: dict[str, Any], scheduler: Any, sizes: dict[str, Any]) -> None:
    """The same training step as ours: forward, backward, clipping, AdamW and the average of the weights."""
    network, average, optimizer = training["network"], training["average"], training["optimizer"]
    network.train()
    batch = sizes["batch"]
    actions, noise = (torch.randn(batch, sizes["horizon"], sizes["action"]) for _ in range(2))
    timesteps = torch.randint(0, 100, (batch,))
    noisy = scheduler.add_noise(actions, noise, timesteps)
    predicted = network(noisy, timesteps, global_cond=torch.randn(batch, 2 * sizes["observation"]))
    (predicted - noise).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 0.001)


if __name__ == "__main__":
    main()
