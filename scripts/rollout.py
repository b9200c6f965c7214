"""Roll a trained policy out in its environment."""

from functools import partial

import envs
from policy.commands.rollout import roll_out
from scripts.command import command

EXAMPLE = "python scripts/rollout.py checkpoint=outputs/demo/checkpoint sampler.ddim_steps=4 video=3"
main = command("rollout", EXAMPLE)(partial(roll_out, envs.make))

if __name__ == "__main__":
    main()
