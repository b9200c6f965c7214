"""Shards of a sweep: each is a share of every cell's episodes in a folder of its own; together they are the sweep.

A shard holds its ledger, which begins by naming the shard and then holds the plan of the whole sweep, and `shard.json`,
which is written at its end. It compares nothing: what a cell's other episodes are like, the other shards know.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from policy.common.files import as_json, json_text, write_text
from policy.common.listing import first_of
from policy.diffusion.sampler import LATER_SETTINGS
from policy.rollout.ledger import SHARD_LINE, Ledger, Recorded, Settings
from policy.rollout.provenance import Provenance, accept_mixture
from policy.statistics.results import EpisodeResult
from policy.statistics.sequential import stage_alpha
from policy.sweep.conclusion import Swept
from policy.sweep.looks import LEDGER, LookPlan, keep, plans_of
from policy.sweep.recipes import figures_of, grouped, row_id
from policy.sweep.rows import Row, checked_rows

SHARD = "shard.json"
# A sentence names at most this many shards.
NAMED = 8

# What makes two shards parts of one sweep, by the name that a user knows: the values, in the order of the cells.
Facts = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, order=True, kw_only=True)
class Shard:
    """One of several equal shares of a sweep's episodes.

    Attributes:
        number: counts from 1.
        of: the number of shards.
    """

    number: int
    of: int

    @staticmethod
    def parse(text: str, episodes: int) -> Shard:
        """Read what a user writes, such as `3/16`.

        Args:
            text: the shard.
            episodes: of each cell, which the shards share.

        Raises:
            ValueError: it is not a shard, or there are fewer episodes than shards.
        """
        if not (found := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)):
            raise ValueError(f"shard must be K/N, as shard=3/16 for the third of 16; got {text!r}")
        number, of = map(int, found.groups())
        if not 1 <= number <= of:
            raise ValueError(f"shard=K/N takes a K within 1..N, the first is 1/{of or 1}; got {text}")
        if episodes < of:
            raise ValueError(f"shard={text} needs {of} episodes or more, one for each shard; got episodes={episodes}")
        return Shard(number=number, of=of)

    def __str__(self) -> str:
        """The shard as a user writes it."""
        return f"{self.number}/{self.of}"

    def seeds(self, seeds: range) -> range:
        """Its share of the seeds of all episodes, which follow each other; no share has two more than another."""
        return seeds[len(seeds) * (self.number - 1) // self.of : len(seeds) * self.number // self.of]


def begin_shard(ledger: Ledger, shard: Shard, cells: Sequence[Settings], wanted: LookPlan) -> None:
    """Write down whose share a ledger holds, the sweep's cells and its plan, unless the ledger says so.

    Args:
        ledger: of the shard.
        shard: which one.
        cells: the settings of the sweep's cells.
        wanted: the sweep's one look, after all episodes; its `alpha` is not used.

    Raises:
        ValueError: the ledger holds something else.
    """
    own = f"give shard={shard} an output_dir= of its own"
    if ledger.shard != str(shard) and (ledger.shard or ledger.plans or ledger.finished()):
        held = f"shard {ledger.shard}" if ledger.shard else "a sweep that is not a shard"
        raise ValueError(f"{ledger.path} holds {held}: {own}")
    plan = dataclasses.replace(wanted, alpha=stage_alpha(1))
    for before in plans_of(ledger):
        found = facts_of_shard(shard, before, [ledger.settings_of(cell) for cell in before.cells])
        if differing := describe_differences(found, facts_of_shard(shard, plan, cells)):
            raise ValueError(f"{ledger.path} holds shard {shard} of a sweep with other settings, {differing}: {own}")
        plan = before
    if not ledger.shard:
        ledger.note_shard(str(shard))
    for settings in cells:
        ledger.introduce(settings)
    keep(ledger, plan)


def check_whole(ledger: Ledger) -> None:
    """Refuse to run a sweep in the folder of a shard.

    Raises:
        ValueError: the ledger holds a shard.
    """
    if ledger.shard:
        raise ValueError(
            f"{ledger.path} holds shard {ledger.shard} of a sweep: add shard={ledger.shard} to go on with it, or choose"
            " another output_dir="
        )


def facts_of_shard(shard: Shard, plan: LookPlan, cells: Sequence[Settings]) -> Facts:
    """What makes shards parts of one sweep: their number, the episodes, and each setting's values over the cells.

    Args:
        shard: one of them.
        plan: of the whole sweep.
        cells: the settings of its cells.
    """
    found: dict[str, list[Any]] = {"shards": [shard.of], "episodes": [len(plan.seeds)], "seed": [plan.seed]}
    for settings in cells:
        for name, value in as_json({**LATER_SETTINGS, **settings}).items():
            values = found.setdefault(name, [])
            values += [value] if value not in values else []
    return {**found, "training seeds of each cell": [*plan.recipes], "cells": [*plan.cells]}


def describe_differences(one: Facts, other: Facts) -> str:
    """What differs between the facts of two shards, such as `ddim_steps 1, 2 and 1, 4`; empty if nothing does."""
    differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    named = [name for name in differing if name != "cells"] or differing
    return "; ".join(f"{name} {_listed(one.get(name, ()))} and {_listed(other.get(name, ()))}" for name in named)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def write_shard(
    folder: Path, *, rows: list[Row], env: Mapping[str, Any], warnings: list[str], members: list[list[str]]
) -> Path:
    """Write what a merge needs of a shard beside its ledger.

    Args:
        folder: of the shard.
        rows: one per cell or recipe, with the figures of this share and the latency that was measured here.
        env: see `Swept`.
        warnings: see `Swept`.
        members: see `Swept`.

    Returns:
        The file.
    """
    document = {"env": env, "warnings": warnings, "members": members, "cells": rows}
    write_text(folder / SHARD, json_text(document, indent=1))
    return folder / SHARD


# --- merging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """A shard that has run all its episodes.

    Attributes:
        folder: of the shard.
        shard: which one.
        facts: see `facts_of_shard`.
        swept: its share; `plan` is that of the whole sweep.
    """

    folder: Path
    shard: Shard
    facts: Facts
    swept: Swept

    @property
    def busy(self) -> int:
        """The number of its rows whose latency a busy machine measured."""
        return sum(bool(row.get("busy")) for row in self.swept.rows)


def holds_shard(folder: Path) -> bool:
    """Whether a folder holds a shard, finished or not."""
    try:
        with (folder / LEDGER).open("rb") as file:
            return file.readline().startswith(SHARD_LINE)
    except OSError:
        return False


def read_shard(folder: Path) -> FinishedShard:
    """Read a shard.

    Raises:
        ValueError: it is damaged, or has not run all its episodes.
    """
    recorded = Recorded.read(folder / LEDGER)
    again, plans = "give its command again, and it runs the rest", plans_of(recorded)
    if not plans:
        raise ValueError(f"{folder}, shard {recorded.shard}, has no episodes yet: {again}")
    plan = plans[0]
    shard = Shard.parse(recorded.shard, len(plan.seeds))
    seeds = shard.seeds(plan.seeds)
    missing = sum(len(recorded.missing(cell, seeds)) for cell in plan.cells)
    if missing or not (folder / SHARD).is_file():
        lacks = f"{missing} of its {len(plan.cells) * len(seeds)} episodes" if missing else f"its {SHARD}"
        raise ValueError(f"{folder}, shard {shard}, lacks {lacks}: {again}")
    results = grouped([recorded.results(cell, seeds) for cell in plan.cells], _recipes_of(plan))
    try:
        document = json.loads((folder / SHARD).read_text())
        swept = Swept(
            rows=checked_rows(document["cells"]),
            results=[[*chain(*found)] for found in results],
            env=dict(document["env"]),
            warnings=[*map(str, document["warnings"])],
            paired=not recorded.unpaired,
            plan=plan,
            alpha=plan.alpha,
            made_with=recorded.made_with(plan.cells, seeds),
            members=[[*map(str, found)] for found in document["members"]],
        )
        ids = [*map(row_id, grouped(plan.cells, _recipes_of(plan)))]
        if [row["cell"] for row in swept.rows] != ids or [*map(len, swept.members)] != [*plan.recipes]:
            raise ValueError("its cells are not those of the ledger")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / SHARD} is damaged ({error!r}): remove it, and {again}") from error
    facts = facts_of_shard(shard, plan, [recorded.settings_of(cell) for cell in plan.cells])
    return FinishedShard(folder=folder, shard=shard, facts=facts, swept=swept)


def _recipes_of(plan: LookPlan) -> list[range]:
    """One entry for each row, as long as the row has checkpoints."""
    return [*map(range, plan.recipes)]


def merge_shards(shards: Sequence[FinishedShard], *, mix: bool) -> Swept:
    """Put the shards of one sweep together.

    Args:
        shards: all of one sweep, see `sweeps_of`.
        mix: whether their episodes may have been run with different things, see `accept_mixture`.

    Returns:
        The sweep as if one command had run it; its latencies are those of the first shard of those that measured the
        fewest rows on a busy machine.

    Raises:
        ValueError: a mixture that is not wanted.
    """
    ordered = sorted(shards, key=lambda one: one.shard)
    timed, plan = min(ordered, key=lambda one: one.busy).swept, ordered[0].swept.plan
    assert plan is not None, "a shard has the plan of its sweep"
    made_with: list[Provenance] = []
    for one in ordered:
        made_with += [made for made in one.swept.made_with if made not in made_with]
        where = f"merging {one.folder} with {ordered[0].folder}"
        accept_mixture(made_with, mix, where=where, instead="Run one of them anew")
    rows, results = [], []
    for number, (row, count) in enumerate(zip(timed.rows, plan.recipes, strict=True)):
        shares = [_by_checkpoint(one.swept.results[number], count) for one in ordered]
        of_each = [[*chain(*found)] for found in zip(*shares, strict=True)]
        rows.append({**row, **figures_of(of_each)})
        results.append([*chain(*of_each)])
    return dataclasses.replace(
        timed,
        rows=rows,
        results=results,
        warnings=[*dict.fromkeys(said for one in ordered for said in one.swept.warnings)],
        paired=all(one.swept.paired for one in ordered),
        made_with=made_with,
    )


def _by_checkpoint(results: Sequence[EpisodeResult], count: int) -> list[Sequence[EpisodeResult]]:
    """Split the results of a row, which stand checkpoint after checkpoint."""
    share = len(results) // count
    return [results[start : start + share] for start in range(0, len(results), share)]


def sweeps_of(shards: Sequence[FinishedShard]) -> list[list[FinishedShard]]:
    """Sort shards by the sweeps that they are of.

    Args:
        shards: of one sweep or several, such as one for each cell.

    Returns:
        The shards of each sweep, in the order in which they are given.

    Raises:
        ValueError: a sweep lacks a shard or has one twice.
    """
    sweeps: list[list[FinishedShard]] = []
    for one in shards:
        own = next((sweep for sweep in sweeps if sweep[0].facts == one.facts), None)
        if own is None:
            sweeps.append([one])
            continue
        if twin := next((other for other in own if other.shard == one.shard), None):
            raise ValueError(f"{twin.folder} and {one.folder} both hold shard {one.shard}: leave one of them out")
        own.append(one)
    if partial := [sweep for sweep in sweeps if len(sweep) < sweep[0].shard.of]:
        fewest = min(partial, key=len)
        raise ValueError(_lacking(fewest, max((sweep for sweep in sweeps if sweep is not fewest), key=len, default=[])))
    return sweeps


def _lacking(sweep: Sequence[FinishedShard], other: Sequence[FinishedShard]) -> str:
    """Say which shards a sweep lacks, and how it differs from another one, as it does where a setting was mistaken."""
    first, there = sweep[0], {one.shard.number for one in sweep}
    lacking = [f"{number}/{first.shard.of}" for number in range(1, first.shard.of + 1) if number not in there]
    named = first_of(lacking, NAMED)
    said = (
        f"merge= lacks shard{'s' * (len(lacking) > 1)} {named} of the sweep that {first.folder} is shard"
        f" {first.shard} of: name {'their folders' if len(lacking) > 1 else 'its folder'} too"
    )
    if not other:
        return said
    return f"{said}; {first.folder} and {other[0].folder} are of different sweeps: " + describe_differences(
        first.facts, other[0].facts
    )
