"""Train a diffusion policy from demonstrations."""

from scripts.command import command
from scripts.settings import Task

EXAMPLE = "python scripts/train.py experiment=pusht_state dataset.path=pusht_cchi_v7_replay.zarr.zip"
TASK = Task(
    name="train",
    target="policy.commands.train:train_policy",
    inline={"policy": "policy.model.config:PolicySettings"},
    replaced={"init": ["encoder", "denoiser", "schedule"]},
    check_first="policy.commands.training_start:check_start",
    notes_given="recipe.keep",
)
main = command(TASK, EXAMPLE)

if __name__ == "__main__":
    main()
