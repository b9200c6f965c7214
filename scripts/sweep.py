"""Sweep ddim_steps against success rate."""

from functools import partial

import envs
from policy.commands.sweep import sweep
from scripts.command import command

EXAMPLE = "python scripts/sweep.py checkpoint=outputs/demo/checkpoint ddim_steps=[1,2,4,8] episodes=200"
main = command("sweep", EXAMPLE)(partial(sweep, envs.make))

if __name__ == "__main__":
    main()
