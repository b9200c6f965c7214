"""Export a trained policy for programs that have no torch."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/export.py checkpoint=outputs/demo/checkpoint format=onnx sampler.ddim_steps=4"
TASK = Task(name="export", target="policy.commands.export:export_policy")
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
