"""Collect demonstrations from a scripted expert."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/collect.py env=metaworld env.task=pick-place-v3 episodes=50"
TASK = Task(name="collect", target="scripts.collection:collect")
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
