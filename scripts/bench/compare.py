"""Change one thing about a policy at a time, and compare the variants on the same episodes.

    python -m scripts.bench.compare dataset.path=pusht_cchi_v7_replay.zarr.zip
    python -m scripts.bench.compare dataset.path=pusht_cchi_v7_replay.zarr.zip variants=[base,obs_horizon=1] seeds=[0]

Each variant of `experiment=pusht_state` is trained with three training seeds on a small, equal budget of windows,
without rectification. It is rolled out on the same episodes, whose seeds start at 200000: episodes on which choices may
be made. Other settings are passed to the training of all variants. The same command resumes an interrupted comparison.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scripts.bench.report import machine, write_report
from scripts.bench.trainings import Trained, Unit, file_name, listed, run_units, train_and_sweep

FOLDER = Path("outputs/compare")
BUDGET = {"experiment": "pusht_state", "train.rectify_steps": "0", "train.steps": "4000", "train.batch_size": "128"}
VARIANTS = (
    "base",
    "denoiser=residual_mlp",
    "denoiser=unet",
    "denoiser=transformer",
    "prediction_type=epsilon",
    "prediction_type=v_prediction",
    "schedule.beta_schedule=linear",
    "schedule.zero_terminal_snr=true",
    "loss_weighting=min_snr",
    "prediction_type=epsilon loss_weighting=min_snr",
    "obs_horizon=1",
    "obs_horizon=4",
)
SEEDS = ("0", "1", "2")
DDIM_STEPS = (8, 1)
OWN = ("variants", "seeds", "episodes")


def main() -> None:
    """Run the comparison."""
    arguments = sys.argv[1:]
    if not all("=" in argument for argument in arguments):
        sys.exit(f"usage: python -m scripts.bench.compare dataset.path=... [NAME=VALUE ...]; got {arguments}")
    given = dict(argument.split("=", 1) for argument in arguments)
    variants = listed(given.get("variants", ",".join(VARIANTS)))
    seeds = listed(given.get("seeds", ",".join(SEEDS)))
    training = {name: value for name, value in given.items() if name not in OWN}
    # All variants of one seed come before the next seed: an interrupted comparison is a fair one of fewer seeds.
    units = [_unit(variant, seed, training, given.get("episodes", "100")) for seed in seeds for variant in variants]
    print(machine("gymnasium"))
    began = time.perf_counter()
    found = run_units(units, "compare", _say)
    write_report("compare", [_row(variant, found[number :: len(variants)]) for number, variant in enumerate(variants)])
    print(f"{len(units)} trainings in {time.perf_counter() - began:.0f} s")


def _unit(variant: str, seed: str, given: dict[str, str], episodes: str) -> Unit:
    changes = dict(change.split("=", 1) for change in variant.split() if variant != "base")
    shared = file_name({name: value for name, value in given.items() if name != "dataset.path"})
    folder = FOLDER.joinpath(*shared, *(file_name(changes) or ["base"]), f"seed_{seed}")
    return Unit(
        name=f"{variant}, seed {seed}",
        folder=folder,
        commands=train_and_sweep(
            folder,
            [f"{name}={value}" for name, value in (BUDGET | given | changes | {"seed": seed}).items()],
            ["seed=200000", f"episodes={episodes}", "backend=onnx"],
            DDIM_STEPS,
        ),
    )


def _say(trained: Trained) -> None:
    rates = (f"{cell['success_rate']:.0%} at {cell['ddim_steps']}" for cell in trained.swept["cells"])
    print(f"{trained.unit.name}: {', '.join(rates)} in {trained.train_s:.0f} s", flush=True)


def _row(variant: str, trained: Sequence[Trained]) -> dict[str, Any]:
    """The row of a variant: the mean over its training seeds, and the value of each seed."""
    row: dict[str, Any] = {"variant": variant, "train_s": fmean(one.train_s for one in trained)}
    for number, steps in enumerate(DDIM_STEPS):
        cells = [one.swept["cells"][number] for one in trained]
        row[f"success at {steps}"] = fmean(cell["success_rate"] for cell in cells)
        row[f"seeds at {steps}"] = ", ".join(f"{cell['success_rate']:.0%}" for cell in cells)
        row[f"score at {steps}"] = fmean(cell["score_mean"] for cell in cells)
    return row


if __name__ == "__main__":
    main()
