"""Train a diffusion policy from demonstrations."""

from functools import partial

import envs
from policy.commands.train import clone_behaviour
from scripts.command import command

EXAMPLE = "python scripts/train.py experiment=pusht_state dataset.path=pusht_cchi_v7_replay.zarr.zip"
main = command("train", EXAMPLE)(partial(clone_behaviour, envs.make))

if __name__ == "__main__":
    main()
