"""Sweep ddim_steps against success rate."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/sweep.py checkpoint=outputs/demo/checkpoint ddim_steps=[1,2,4,8] episodes=200"
TASK = Task(
    name="sweep",
    target="policy.commands.sweep:sweep",
    goes_with={"merge": ["margin", "mix", "output_dir", "tracker"]},
    excludes={"shard": ["adaptive", "looks", "margin", "max_ms", "videos", "watch"]},  # what decides or shows
)
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
