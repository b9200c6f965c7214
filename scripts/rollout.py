"""Roll a trained policy out in its environment."""

from scripts.command import command

EXAMPLE = "python scripts/rollout.py checkpoint=outputs/demo/checkpoint sampler.ddim_steps=4 video=3"
main = command(
    "rollout", "policy.commands.rollout:roll_out", EXAMPLE, excludes={"record": ["control_rate", "env_vector"]}
)

if __name__ == "__main__":
    main()
