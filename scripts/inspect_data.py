"""Show what is inside a dataset before anybody trains on it, or inside a checkpoint before anybody uses it."""

from scripts.command import command

EXAMPLE = "python scripts/inspect_data.py dataset=zarr dataset.path=pusht_cchi_v7_replay.zarr.zip"
main = command(
    "inspect",
    "policy.commands.inspect:inspect",
    EXAMPLE,
    alternatives={"checkpoint": "dataset"},
    check_first="policy.commands.inspect:check_checkpoint",
)

if __name__ == "__main__":
    main()
