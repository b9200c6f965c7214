"""`recipe=auto` of a training: the search for the recipe that it then follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from policy.commands.record import Record
from policy.commands.training_rollouts import ROLLOUT_SEED
from policy.common.interrupt import stop_on_signal
from policy.common.locks import only_process
from policy.diffusion.sampler import Sampler
from policy.recipe.candidates import Allowed, Candidate, candidates_for
from policy.recipe.search import Play, Trial, search
from policy.recipe.settings import RecipeSettings
from policy.training.loop import Measure
from policy.training.preparation import Run
from policy.training.settings import TrainSettings


def best_recipe(
    settings: RecipeSettings,
    policy: Mapping[str, Any],
    train: TrainSettings,
    allowed: Allowed,
    *,
    folder: Path,
    sampler: Sampler,
    seed: int,
    prepare: Callable[[Candidate], Run],
    record_of: Callable[[Path, TrainSettings], Record],
    measure_of: Callable[[Run], Measure | None],
    play: Play | None,
    paired: bool,
) -> Candidate:
    """Search for the best recipe; its checkpoint is then the run's own, which goes on from it.

    Args:
        settings: of the search.
        policy: the user's settings of the policy.
        train: the user's settings of the training.
        allowed: what the demonstrations allow a recipe to do.
        folder: of the run.
        sampler: how chunks are sampled.
        seed: of the training runs.
        prepare: prepares the training run of a recipe, at step 0.
        record_of: makes the record of a training run in a folder.
        measure_of: makes what measures the errors of a training run's chunks.
        play: see `search`.
        paired: see `search`.

    Raises:
        ValueError: see `search`.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM; the same command goes on.
    """

    def open_trial(candidate: Candidate, place: Path) -> Trial:
        run, record = prepare(candidate), record_of(place, candidate.train)
        record.restore(run.state)
        return Trial(run=run, save=record.save, measure=measure_of(run))

    candidates, fallen = candidates_for(settings.candidates, settings.keep, policy, train, allowed)
    with only_process(folder), stop_on_signal() as stop:
        try:
            return search(
                candidates,
                fallen,
                folder=folder,
                settings=settings,
                sampler=sampler,
                seed=seed,
                first_seed=ROLLOUT_SEED,
                open_trial=open_trial,
                play=play,
                paired=paired,
                stop=stop,
            )
        except KeyboardInterrupt:
            print(f"the search stopped and is saved: the same command with output_dir={folder} goes on")
            raise
