"""Several finished sweeps put together as one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from policy.rollout.provenance import UNKNOWN, Provenance, accept_mixture, is_provenance
from policy.statistics.results import EpisodeResult, describe_broken
from policy.statistics.sequential import ERROR
from policy.sweep.conclusion import Swept
from policy.sweep.rows import Row, checked_rows
from policy.sweep.shards import holds_shard, merge_shards, read_shard, sweeps_of


def read_swept(folders: Sequence[Path], *, mix: bool = False) -> Swept:
    """Read the cells of several finished sweeps, and of sweeps whose shards have finished.

    Args:
        folders: one or more, each with a `sweep.json` or a shard.
        mix: whether their episodes may have been run with different things, see `accept_mixture`.

    Returns:
        The cells, in the order of the folders; the shards of a single sweep give its plan too.

    Raises:
        ValueError: a folder without a finished sweep or shard, or with an adaptive sweep; a shard that is missing or
            given twice; different environments or episodes, a cell that occurs twice, or a mixture that is not wanted.
    """
    names, sweeps = zip(*_sweeps(folders, mix=mix), strict=True)
    first, made_with, mixed = sweeps[0], list[Provenance](), list[str]()
    cells: set[str] = set()
    for folder, swept in zip(names, sweeps, strict=True):
        for name, theirs, ours in (("env", swept.env, first.env), ("seeds", _seeds(swept), _seeds(first))):
            if theirs != ours:
                raise ValueError(f"{name} of {folder} and of {names[0]} differ: only equal ones can be compared")
        found = {row["cell"] for row in swept.rows}
        if repeated := found & cells:
            raise ValueError(f"{folder} repeats the cell {min(repeated)}: leave one of them out")
        cells |= found
        made_with += [one for one in swept.made_with if one not in made_with]
        where, instead = f"merging {folder} with {names[0]}", "Leave one of them out"
        mixed = accept_mixture(made_with, mix, where=where, instead=instead)
    results = [listed for swept in sweeps for listed in swept.results]
    rows = [row for swept in sweeps for row in swept.rows]
    if [[result.seed for result in listed] for listed in results] != [
        _seeds(first) * _checkpoints(row) for row in rows
    ]:
        raise ValueError(f"the cells of {', '.join(map(str, names))} have not all run the same episodes")
    warnings = [said for swept in sweeps for said in swept.warnings]
    return Swept(
        rows=rows,
        results=results,
        env=first.env,
        warnings=list(dict.fromkeys([*warnings, *mixed])),
        paired=all(swept.paired for swept in sweeps),
        plan=first.plan if len(sweeps) == 1 else None,
        alpha=min(swept.alpha for swept in sweeps),
        left_out=" ".join(dict.fromkeys(swept.left_out for swept in sweeps if swept.left_out)),
        made_with=made_with,
        members=[members for swept in sweeps for members in swept.members],
    )


def _sweeps(folders: Sequence[Path], *, mix: bool) -> Iterator[tuple[Path, Swept]]:
    """Yield each sweep with its folder; one of shards where its first shard stands."""
    whole = {folder: _read(folder) for folder in folders if not holds_shard(folder)}
    sharded = sweeps_of([read_shard(folder) for folder in folders if folder not in whole])
    by_folder = {one.folder: shards for shards in sharded for one in shards}
    for folder in folders:
        if folder in whole:
            yield folder, whole[folder]
        elif (shards := by_folder[folder])[0].folder == folder:
            yield folder, merge_shards(shards, mix=mix)


def _read(folder: Path) -> Swept:
    """Read one sweep.

    Raises:
        ValueError: there is none, or an adaptive one.
    """
    try:
        document = json.loads((folder / "sweep.json").read_text())
        rows = checked_rows(document["cells"])
        results = [
            [EpisodeResult.from_row(row) for row in document["episodes"] if row["cell"] == cell["cell"]]
            for cell in rows
        ]
        said_again = describe_broken([result for listed in results for result in listed])
        recorded = document.get("made_with", [UNKNOWN])
        if not all(results) or not all(map(is_provenance, recorded)):
            raise ValueError("a cell has no episodes, or made_with is not a list of provenances")
        plan, left_out, warnings = document.get("plan", {}), document.get("left_out", ""), document.get("warnings", [])
        alpha = float(document.get("alpha", plan.get("alpha", ERROR)))
        if not (isinstance(document["env"], dict) and isinstance(left_out, str) and isinstance(warnings, list)):
            raise ValueError("env, left_out or warnings is of another type")
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be above 0 and below 1; got {alpha}")
        swept = Swept(
            rows=rows,
            results=results,
            env=document["env"],
            warnings=[str(said) for said in warnings if said not in said_again],
            paired=document.get("paired", True) is True,
            alpha=min(ERROR, alpha),
            left_out=left_out,
            made_with=recorded,
            members=[
                list(dict.fromkeys(row["checkpoint"] for row in document["episodes"] if row["cell"] == cell["cell"]))
                if _checkpoints(cell) > 1
                else [cell["checkpoint"]]
                for cell in rows
            ],
        )
        looks = len(plan.get("looks", ()))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no finished sweep ({error}): run it to its end first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder}/sweep.json is damaged ({error!r}): give the sweep's command again, which writes it anew"
        ) from error
    if looks > 1:
        raise ValueError(
            f"{folder} holds an adaptive sweep, which has been looked at and whose cells may have stopped at different"
            " looks: give checkpoint=[A,B] to one sweep, or merge sweeps that ran with adaptive=false"
        )
    return swept


def _checkpoints(row: Row) -> int:
    return int(row.get("training_seeds", 1))


def _seeds(swept: Swept) -> list[int]:
    return sorted({result.seed for listed in swept.results for result in listed})
