"""Export a trained policy for programs that have no torch."""

from policy.commands.export import export_policy
from scripts.command import command

EXAMPLE = "python scripts/export.py checkpoint=outputs/demo/checkpoint format=onnx sampler.ddim_steps=4"
main = command("export", EXAMPLE)(export_policy)

if __name__ == "__main__":
    main()
