"""Writes dill.ckpt beside itself, dill.safetensors with its tensors, and dill.json with its resolved configuration.

    python tests/data/make_dill_checkpoint.py

It needs torch, dill, omegaconf and safetensors; dill is not a package of this project.
"""

import collections
import json
import pathlib
from pathlib import Path

import dill
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent

CONFIG = {
    "name": "push",
    "horizon": 16,
    "betas": [0.95, 0.999],
    "task": {
        "horizon": "${horizon}",
        "beside": "${.horizon}",
        "above": "${..horizon}",
        "name": "${name}_lowdim_${horizon}",
        "shape": [2, "${horizon}", {"first": "${task.shape.0}"}],
    },
    "copy": "${task.shape}",
    "chain": "${task.beside}",
    "deep": "${task.shape.2.first}",
    "nothing": None,
    "rate": 1e-4,
    "use_ema": True,
}


def main():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    content = {
        "cfg": OmegaConf.create(CONFIG),
        "state_dicts": {
            "model": network.state_dict(),
            "ema_model": {key: value / 2 for key, value in network.state_dict().items()},
            "optimizer": optimizer.state_dict(),
        },
        "pickles": {"epoch": dill.dumps(3), "folder": dill.dumps(pathlib.PurePosixPath("outputs"))},
        "others": [collections.defaultdict(list, {"a": [1]}), pathlib.PurePosixPath("outputs"), {(1, 2): 3}],
    }
    torch.save(content, HERE / "dill.ckpt", pickle_module=dill)
    flat = {
        f"{part}/{key}": value for part in ("model", "ema_model") for key, value in content["state_dicts"][part].items()
    }
    save_file(flat, HERE / "dill.safetensors")
    (HERE / "dill.json").write_text(json.dumps(OmegaConf.to_container(content["cfg"], resolve=True), indent=1) + "\n")


if __name__ == "__main__":
    main()
