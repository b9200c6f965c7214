"""Sweep ddim_steps against success rate."""

from scripts.command import command

EXAMPLE = "python scripts/sweep.py checkpoint=outputs/demo/checkpoint ddim_steps=[1,2,4,8] episodes=200"
main = command(
    "sweep",
    "policy.commands.sweep:sweep",
    EXAMPLE,
    goes_with={"merge": ["margin", "mix", "output_dir", "tracker"]},
    excludes={"shard": ["adaptive", "looks", "margin", "max_ms", "videos", "watch"]},  # what decides or shows
)

if __name__ == "__main__":
    main()
