"""Change one thing about a policy at a time, and compare the variants on the same episodes.

    python -m scripts.bench.variants dataset.path=pusht_cchi_v7_replay.zarr.zip
    python -m scripts.bench.variants dataset.path=pusht_cchi_v7_replay.zarr.zip variants=[base,obs_horizon=1] seeds=[0]

Each variant of `experiment=pusht_state` is trained with three training seeds on a small, equal budget of windows,
without rectification. It is rolled out on the same episodes, whose seeds start at 200000: episodes on which choices may
be made. The training seeds of a variant are one recipe: the intervals of its success, and of the difference to the
first variant, are over training seeds and episodes. Other settings are passed to the training of all variants. The same
command resumes an interrupted comparison.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from policy.statistics.recipes import difference_estimate, difference_interval, recipe_interval
from scripts.bench.arguments import given_settings, listed
from scripts.bench.report import machine, write_report
from scripts.bench.tasks import SIMPLE_PUSHT
from scripts.bench.trainings import Trained, Unit, file_name, run_units, train_and_sweep

FOLDER = Path("outputs/variants")
PUSHT = {"experiment": "pusht_state", **dict(setting.split("=") for setting in SIMPLE_PUSHT)}
BUDGET = {"train.rectify_steps": "0", "train.steps": "4000", "train.batch_size": "128"}
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
    given = given_settings(sys.argv[1:], "variants dataset.path=...")
    variants = listed(given.get("variants", ",".join(VARIANTS)))
    seeds = listed(given.get("seeds", ",".join(SEEDS)))
    training = {name: value for name, value in given.items() if name not in OWN}
    # All variants of one seed come before the next seed: an interrupted comparison is a fair one of fewer seeds.
    units = [_unit(variant, seed, training, given.get("episodes", "100")) for seed in seeds for variant in variants]
    print(machine("gymnasium"))
    began = time.perf_counter()
    found = run_units(units, "variants", _say)
    recipes = [found[number :: len(variants)] for number in range(len(variants))]
    write_report("variants", [row(variant, own, recipes[0]) for variant, own in zip(variants, recipes, strict=True)])
    print(f"{len(units)} trainings in {time.perf_counter() - began:.0f} s")


def _unit(variant: str, seed: str, given: dict[str, str], episodes: str) -> Unit:
    changes = dict(change.split("=", 1) for change in variant.split() if variant != "base")
    shared = file_name({name: value for name, value in given.items() if name != "dataset.path"})
    preset = {} if "experiment" in given else PUSHT
    folder = FOLDER.joinpath(*shared, *(file_name(changes) or ["base"]), f"seed_{seed}")
    return Unit(
        name=f"{variant}, seed {seed}",
        folder=folder,
        commands=train_and_sweep(
            folder,
            [f"{name}={value}" for name, value in (preset | BUDGET | given | changes | {"seed": seed}).items()],
            ["seed=200000", f"episodes={episodes}", "backend=onnx"],
            DDIM_STEPS,
        ),
    )


def _say(trained: Trained) -> None:
    rates = (f"{cell['success_rate']:.0%} at {cell['ddim_steps']}" for cell in trained.swept["cells"])
    print(f"{trained.unit.name}: {', '.join(rates)} in {trained.train_s:.0f} s", flush=True)


def row(variant: str, trained: Sequence[Trained], first: Sequence[Trained]) -> dict[str, Any]:
    """The row of a variant: the mean over its training seeds with its interval, and the value of each seed."""
    found: dict[str, Any] = {"variant": variant, "train_s": fmean(one.train_s for one in trained)}
    for steps in DDIM_STEPS:
        own, other = (
            [[result.success for result in one.results(steps)] for one in recipe] for recipe in (trained, first)
        )
        found[f"success at {steps}"] = float(np.mean(own))
        found[f"seeds at {steps}"] = ", ".join(f"{rate:.0%}" for rate in np.mean(own, axis=1))
        if len(own) > 1:
            found[f"95 % at {steps}"] = "{:.0%} to {:.0%}".format(*recipe_interval(own))
        if trained is not first:
            difference = difference_estimate(own, other)
            ends = difference_interval(difference, len(own[0]))
            points = (100 * value for value in (difference.value, *ends))
            found[f"points from the first at {steps}"] = "{:+.0f} ({:+.0f} to {:+.0f})".format(*points)
        found[f"score at {steps}"] = fmean(result.score for one in trained for result in one.results(steps))
    return found


if __name__ == "__main__":
    main()
