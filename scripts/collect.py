"""Collect demonstrations from a scripted expert."""

from scripts.command import command

EXAMPLE = "python scripts/collect.py env=metaworld env.task=pick-place-v3 episodes=50"
main = command("collect", "scripts.collection:collect", EXAMPLE)

if __name__ == "__main__":
    main()
