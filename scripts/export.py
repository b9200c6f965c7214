"""Export a trained policy for programs that have no torch."""

from scripts.command import command

EXAMPLE = "python scripts/export.py checkpoint=outputs/demo/checkpoint format=onnx sampler.ddim_steps=4"
main = command("export", "policy.commands.export:export_policy", EXAMPLE)

if __name__ == "__main__":
    main()
