"""Writes checkpoint_schema<N>/ beside itself: a checkpoint of the current schema, and actions sampled from it.

    python tests/data/make_golden_checkpoint.py

Run it with the code that introduces a schema, and keep the folders of the older ones: tests load them all.
checkpoint_schema<N>.golden.safetensors holds observations, noise and the actions that they led to.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from policy import load_checkpoint

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "scripts"
SMALL = ["encoder.hidden_size=16", "denoiser.hidden_size=16", "denoiser.num_layers=1", "obs_size=32"]
BRIEF = ["train.steps=60", "train.warmup_steps=5", "train.rollout_every=0", "train.log_every=20", "sampler.eta=0.5"]
DATA, RUN = "demonstrations", "run"


def run(script, *overrides):
    # Relative paths: a checkpoint states the path of its demonstrations, which must not name a machine's folders.
    subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *overrides], check=True)


def main():
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run("collect", "env=planar", "episodes=10", f"output_dir={DATA}")
        run("train", "experiment=planar", f"dataset.path={DATA}/planar-v0", *SMALL, *BRIEF, f"output_dir={RUN}")
        schema = json.loads(Path(RUN, "checkpoint", "config.json").read_text())["schema_version"]
        golden = HERE / f"checkpoint_schema{schema}"
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(Path(RUN, "checkpoint"), golden)
        os.chdir(HERE)
    policy = load_checkpoint(golden).policy
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand((3, 2, 4), generator=generator) * 2 - 1  # within the range of the training data
    given = {
        "observations": policy.observation_normalizers["state"].unnormalize(inside),
        "noise": torch.randn((3, 8, 2), generator=generator),
    }
    actions = policy.sample_actions({"state": given["observations"]}, ddim_steps=8, noise=given["noise"])
    save_file({**given, "actions": actions}, HERE / f"{golden.name}.golden.safetensors")


if __name__ == "__main__":
    main()
