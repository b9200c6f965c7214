"""Import a diffusion policy of LeRobot or diffusion_policy."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/import_checkpoint.py source=lerobot/diffusion_pusht output_dir=outputs/imported env=pusht"
TASK = Task(name="import", target="policy.commands.import_checkpoint:import_checkpoint")
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
