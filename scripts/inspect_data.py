"""Show what is inside a dataset before anybody trains on it, or inside a checkpoint before anybody uses it."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/inspect_data.py dataset=zarr dataset.path=pusht_cchi_v7_replay.zarr.zip"
TASK = Task(
    name="inspect",
    target="policy.commands.inspect:inspect",
    alternatives={"checkpoint": "dataset"},
    check_first="policy.commands.inspect:check_checkpoint",
)
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
