"""The dataset of a rollout: its episodes as demonstrations, for `ddim-train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy.commands.stage import Stage
from policy.common.output import check_writable
from policy.data.minari_writer import check_absent, write_minari
from policy.data.recording import episode_file, read_episode, unfinished_recording
from policy.rollout.ledger import Ledger, cell_id
from policy.rollout.recording import Recording, RolledOut
from policy.rollout.watch import helpers_ended, watched
from policy.statistics.results import EpisodeResult

SETTING = "record"


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """Which episodes of a rollout become a dataset.

    Attributes:
        folder: of the dataset, which must not exist.
        successes: whether those that failed are left out.
    """

    folder: Path
    successes: bool

    def check(self, output_dir: Path | None) -> None:
        """Refuse a folder without a name, one that exists or cannot be made, or one that the rollout itself writes to.

        Args:
            output_dir: the rollout's folder, or None if the user chooses none.

        Raises:
            ValueError: see above.
        """
        if not self.folder.name:
            raise ValueError(
                f"{SETTING}= takes the name of a new folder for the dataset, as {SETTING}=outputs/dataset; got"
                f" {str(self.folder)!r}"
            )
        check_absent(self.folder, SETTING)
        check_writable(self.folder, SETTING)
        own = output_dir or Path("outputs/rollout")  # by default a new folder inside
        if self.folder.resolve() in (own.resolve(), *own.resolve().parents):
            raise ValueError(
                f"{SETTING}={self.folder} would hold the rollout's own output_dir={own}: choose a folder of its own, or"
                f" one inside, as {SETTING}={own / 'dataset'}"
            )

    def wants(self, result: EpisodeResult) -> bool:
        """Whether an episode is in the dataset; one that the simulator broke off never is."""
        return not result.broke_off and (result.success or not self.successes)


def record_settings(record: Path | None, successes: bool, output_dir: Path | None) -> RecordSettings | None:
    """The settings of a rollout's dataset, checked; None for a rollout that is not recorded.

    Raises:
        ValueError: see `RecordSettings.check`, or there is nothing of which to keep the successes.
    """
    if record is None:
        if successes:
            raise ValueError(
                "record_successes=true chooses among the episodes of record=DIR: add that, or leave it out"
            )
        return None
    settings = RecordSettings(folder=record, successes=successes)
    settings.check(output_dir)
    return settings


@contextmanager
def recorded_as(
    settings: RecordSettings | None, stage: Stage, of_cell: Mapping[str, Any], ledger: Ledger
) -> Iterator[Stage]:
    """Record the episodes that run inside, and write the dataset when all have run.

    Until then they are in a hidden folder beside the dataset's; an interrupted rollout goes on with them.

    Args:
        settings: None to record nothing.
        stage: of the rollout.
        of_cell: its cell's settings.
        ledger: of the rollout.

    Yields:
        The stage whose environments record.

    Raises:
        ValueError: episodes that the ledger holds were not recorded.
    """
    if settings is None:
        yield stage
        return
    unfinished, cell = settings.folder.with_name(f".{settings.folder.name}"), cell_id(of_cell)
    with unfinished_recording(unfinished, of_cell, SETTING):
        _check_recorded(settings, unfinished, stage, cell, ledger)
        yield dataclasses.replace(stage, make_env=Recording(stage.make_env, unfinished))
        wanted = [result for result in ledger.results(cell, stage.seeds) if settings.wants(result)]
        if wanted:
            _write(settings.folder, unfinished, stage, wanted)
    left_out = len(stage.seeds) - len(wanted)
    steps = sum(result.steps for result in wanted)
    print(
        f"recorded: {len(wanted)} episodes of {steps} control steps in all: {settings.folder}"
        if wanted
        else f"recorded: none of the {left_out} episodes, so that there is no {settings.folder}"
    )
    if wanted and left_out:
        print(f"{left_out} episodes {'failed or broke off' if settings.successes else 'broke off'} and are left out")


def _check_recorded(settings: RecordSettings, unfinished: Path, stage: Stage, cell: str, ledger: Ledger) -> None:
    """Refuse a rollout that ran, in part, without being recorded: what was not kept cannot be had again."""
    wanted = [one.seed for one in ledger.present(cell, stage.seeds) if settings.wants(one)]
    lost = [seed for seed in wanted if not episode_file(unfinished, seed).is_file()]
    if lost:
        raise ValueError(
            f"{ledger.path} holds {len(lost)} episodes that were not recorded, the first with seed {lost[0]}: choose"
            f" another output_dir=, where all of them run, or leave {SETTING}= out"
        )


def _write(folder: Path, unfinished: Path, stage: Stage, wanted: list[EpisodeResult]) -> None:
    episodes = [read_episode(episode_file(unfinished, result.seed), RolledOut) for result in wanted]
    with (
        helpers_ended(),
        watched(stage.make_env, stage.env_patience) as make_env,
        closing(make_env()) as simulator,
    ):
        write_minari(
            episodes, path=folder, env=simulator, env_settings=stage.env, algorithm="diffusion policy", setting=SETTING
        )
