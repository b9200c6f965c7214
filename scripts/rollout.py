"""Roll a trained policy out in its environment."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/rollout.py checkpoint=outputs/demo/checkpoint sampler.ddim_steps=4 video=3"
TASK = Task(
    name="rollout", target="policy.commands.rollout:roll_out", excludes={"record": ["control_rate", "env_vector"]}
)
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
