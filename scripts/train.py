"""Train a diffusion policy from demonstrations."""

from scripts.command import command

EXAMPLE = "python scripts/train.py experiment=pusht_state dataset.path=pusht_cchi_v7_replay.zarr.zip"
main = command(
    "train",
    "policy.commands.train:train_policy",
    EXAMPLE,
    inline={"policy": "policy.model.config:PolicySettings"},
    replaced={"init": ["encoder", "denoiser", "schedule"]},
    check_first="policy.commands.training_start:check_start",
    notes_given="recipe.keep",
)

if __name__ == "__main__":
    main()
