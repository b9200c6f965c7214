"""Shards of a sweep: each runs its share, and a merge gives what one command would have given."""

import itertools
import json
import random
import time

import pytest

from policy.commands.looks import wanted_plan
from policy.rollout.latency import Latency
from policy.rollout.ledger import Ledger, Recorded
from policy.statistics.results import EpisodeResult
from policy.sweep import timing
from policy.sweep.conclusion import Swept
from policy.sweep.grid import ids_of, make_cells
from policy.sweep.looks import LEDGER, plans_of
from policy.sweep.merging import read_swept
from policy.sweep.recipes import grouped_cells, recipe_row
from policy.sweep.rows import uniform
from policy.sweep.shards import SHARD, Shard, begin_shard, write_shard
from tests.commands.test_sweep_command import MEASURED, QUIET, interrupt
from tests.sweep.test_sweep import make_checkpoint

SWEEP = ("ddim_steps=[1,4]", "episodes=7", "num_envs=4")


@pytest.mark.parametrize(("episodes", "of"), [(1, 1), (7, 3), (16, 16), (500, 16), (3, 2)])
def test_shards_hold_each_episode_once_and_about_as_many(episodes, of):
    seeds = range(90, 90 + episodes)
    shares = [Shard(number=number, of=of).seeds(seeds) for number in range(1, of + 1)]
    assert [*itertools.chain(*shares)] == [*seeds]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("0/16", "a K within 1..N, the first is 1/16; got 0/16"),
        ("17/16", "a K within 1..N, the first is 1/16; got 17/16"),
        ("1/0", "a K within 1..N"),
        ("third", "must be K/N, as shard=3/16 for the third of 16; got 'third'"),
        ("3", "must be K/N, as shard=3/16 for the third of 16; got '3'"),
        ("-1/3", "must be K/N"),
        ("1/3/5", "must be K/N"),
        ("2/8", "needs 8 episodes or more, one for each shard; got episodes=7"),
    ],
)
def test_what_is_not_a_shard_is_refused_before_any_work(run_sweep, tmp_path, given, said):
    err = run_sweep(*SWEEP, f"shard={given}", f"output_dir={tmp_path}/out", check=2)
    assert err.startswith("error: shard")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_shard_cannot_decide_is_refused(run_sweep, tmp_path):
    given = ("adaptive=true", "looks=2", "margin=0.1", "max_ms=5", "videos=2", "watch=true")
    err = run_sweep(*SWEEP, "shard=1/2", *given, f"output_dir={tmp_path}/out", check=2)
    assert err == "error: shard= goes without adaptive=, looks=, margin=, max_ms=, videos=, watch=: leave them out\n"
    assert "leave shard= out" in run_sweep(f"merge=[{tmp_path}]", "shard=1/2", check=2)
    assert run_sweep("merge=x", check=2) == "error: merge takes a list of paths, as merge=[A,B]; got 'x'\n"


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_sweep(planar_run, run_command, plain_reports, monkeypatch):
    """The command on the planar policy, in which the n-th measured latency is n ms and the first one is busy."""
    counted = itertools.count(1)

    def measured(controllers, threads):
        took = next(counted)
        quiet = {**QUIET, "quiet": 0.5 if took == 1 else 1.0}
        return [Latency(median_ms=took, **quiet, threads=threads) for _ in controllers]

    monkeypatch.setattr(timing, "measure_latency", measured)

    def run(*overrides, check=0):
        checkpoint = [] if overrides[0].startswith("merge=") else [f"checkpoint={planar_run}/checkpoint"]
        done = run_command("sweep", *checkpoint, *overrides, check=check)
        return done.stderr if check else done.stdout

    return run


def document_of(folder):
    """sweep.json without what a machine measured, and the answer, which names a latency."""
    document = json.loads((folder / "sweep.json").read_text())
    document["answer"] = document["answer"].partition(" ms a chunk")[0].rpartition(",")[0]
    for row in document["cells"]:
        for name in (*MEASURED, "busy"):
            row[name] = None
    return document


def cut(folder, lines):
    """Undo the last lines of a ledger, as a kill before its end leaves it."""
    file = folder / LEDGER
    whole = file.read_text().splitlines(keepends=True)
    file.write_text("".join(whole[:-lines]) + whole[-lines][:20])
    (folder / SHARD).unlink()


def test_merged_shards_are_the_sweep_that_one_command_runs(run_sweep, tmp_path):
    out = {name: tmp_path / name for name in ("whole", "1", "2", "3", "all")}
    for number in "312":  # in any order
        said = run_sweep(*SWEEP, f"shard={number}/3", f"output_dir={out[number]}")
    assert "shard 2/3: the episodes with seeds 100002 to 100003 of each cell; all of them run" in said
    merge = (f"merge=[{out['3']},{out['1']},{out['2']}]", f"output_dir={out['all']}")
    assert "| ddim_steps |" in run_sweep(*merge)
    latencies = [
        (row["latency_ms_median"], row["busy"]) for row in json.loads((out["all"] / "sweep.json").read_text())["cells"]
    ]
    assert latencies == [(2, False)] * 2  # of shard 1, the first that no busy machine measured
    run_sweep(*SWEEP, "adaptive=false", "videos=0", f"output_dir={out['whole']}")
    assert document_of(out["all"]) == document_of(out["whole"])
    assert (out["all"] / "episodes.csv").read_bytes() == (out["whole"] / "episodes.csv").read_bytes()
    heads = [(out[name] / "sweep.csv").read_text().splitlines()[0] for name in ("all", "whole")]
    assert heads[0] == heads[1]

    # A margin is chosen where cells are compared.
    run_sweep(*merge, "margin=0.2")
    run_sweep(*SWEEP, "adaptive=false", "videos=0", "margin=0.2", f"output_dir={tmp_path}/wide")
    assert document_of(out["all"]) == document_of(tmp_path / "wide")

    # A shard that was stopped goes on, and runs what it lacks.
    before = Recorded.read(out["2"] / LEDGER)
    cut(out["2"], 2)
    err = run_sweep(*merge, check=2)
    assert (
        err
        == f"error: {out['2']}, shard 2/3, lacks 2 of its 4 episodes: give its command again, and it runs the rest\n"
    )
    again = (*SWEEP, "shard=2/3", f"output_dir={out['2']}")
    assert "2 of 4 episodes are on disk already" in run_sweep(*again)
    after = Recorded.read(out["2"] / LEDGER)
    cells = after.plans[0]["cells"]
    assert [after.results(cell, range(100_002, 100_004)) for cell in cells] == [
        before.results(cell, range(100_002, 100_004)) for cell in cells
    ]
    (out["2"] / SHARD).unlink()
    assert f"shard 2/3, lacks its {SHARD}" in run_sweep(*merge, check=2)
    assert "4 of 4 episodes are on disk already" in run_sweep(*again)
    run_sweep(*merge)
    assert document_of(out["all"]) == document_of(out["whole"])

    # What is missing, given twice, or of another sweep.
    def refused(*names):
        return run_sweep(f"merge=[{','.join(str(out.get(name, name)) for name in names)}]", check=2)

    one, two = out["1"], out["2"]
    assert refused("1", "2") == (
        f"error: merge= lacks shard 3/3 of the sweep that {one} is shard 1/3 of: name its folder too\n"
    )
    assert refused("1", "2", "1", "3") == f"error: {one} and {one} both hold shard 1/3: leave one of them out\n"
    assert f"error: {tmp_path}/4 holds no finished sweep" in refused("1", "2", tmp_path / "4")  # a mistaken name
    run_sweep("ddim_steps=[1,2]", "episodes=8", "shard=3/4", f"output_dir={tmp_path}/other")
    assert refused("1", "2", tmp_path / "other") == (
        f"error: merge= lacks shards 1/4, 2/4, 4/4 of the sweep that {tmp_path}/other is shard 3/4 of: name their"
        f" folders too; {tmp_path}/other and {one} are of different sweeps: shards 4 and 3; episodes 8 and 7;"
        " ddim_steps 1, 2 and 1, 4\n"
    )
    assert "holds shard 2/3: give shard=1/3 an output_dir= of its own" in run_sweep(
        *SWEEP, "shard=1/3", f"output_dir={two}", check=2
    )
    assert "holds shard 2/3 of a sweep: add shard=2/3 to go on with it" in run_sweep(
        *SWEEP, f"output_dir={two}", check=2
    )
    assert "holds a sweep that is not a shard" in run_sweep(*SWEEP, "shard=2/3", f"output_dir={out['whole']}", check=2)
    assert "holds shard 2/3 of a sweep with other settings, episodes 7 and 9; eta 0.0 and 1.0: give shard=2/3" in (
        run_sweep(*SWEEP[:1], "episodes=9", "sampler.eta=1.0", "shard=2/3", f"output_dir={two}", check=2)
    )


def test_shards_of_a_cell_are_merged_with_a_cell_that_ran_whole(run_sweep, tmp_path):
    for number in (1, 2):
        run_sweep("ddim_steps=1", "episodes=5", f"shard={number}/2", f"output_dir={tmp_path}/{number}")
    run_sweep("ddim_steps=4", "episodes=5", "videos=0", f"output_dir={tmp_path}/4")
    run_sweep(f"merge=[{tmp_path}/2,{tmp_path}/4,{tmp_path}/1]", f"output_dir={tmp_path}/all")
    run_sweep("ddim_steps=[1,4]", "episodes=5", "adaptive=false", "videos=0", f"output_dir={tmp_path}/whole")
    merged, whole = document_of(tmp_path / "all"), document_of(tmp_path / "whole")
    del whole["plan"]
    assert merged == whole


# --- recipes -----------------------------------------------------------------------------------------------------


def test_shards_of_recipes_are_put_together_checkpoint_by_checkpoint(tmp_path):
    checkpoints, recipes = [make_checkpoint(name) for name in "abc"], [["a", "b"], ["c"]]
    plain = {"sampler": {}, "controller": {}, "execution_horizon": None, "backend": "fused"}
    groups = grouped_cells(make_cells(checkpoints, {"name": "planar"}, ddim_steps=[1, 8], **plain), recipes)
    cells, dice, seeds = [*itertools.chain(*groups)], random.Random(0), range(50, 61)
    ran = {
        (cell, seed): EpisodeResult(seed=seed, success=dice.random() < 0.5, score=dice.random(), return_=1.0, steps=9)
        for cell in ids_of(cells)
        for seed in seeds
    }

    def rows_over(share):
        found = [[[ran[cell, seed] for seed in share] for cell in ids_of(group)] for group in groups]
        latency = {"latency_ms_median": 1.0, "busy": False}
        return found, [recipe_row(group, one, latency) for group, one in zip(groups, found, strict=True)]

    members = [[str(cell.checkpoint.path) for cell in group] for group in groups]
    made_with = [{"versions": {"simulator": version}} for version in ("1.0", "2.0")]
    for number in (1, 2, 3):
        (folder := tmp_path / str(number)).mkdir()
        shard = Shard(number=number, of=3)
        with Ledger(folder / LEDGER) as ledger:
            asked = {"asked": ids_of(cells), "max_ms": None, "left_out": "", "seed": 50, "margin": 0.05}
            begin_shard(
                ledger, shard, [cell.settings for cell in cells], wanted_plan(groups, ledger, looks=(11,), **asked)
            )
            (plan,) = plans_of(ledger)
            ledger.note_provenance(made_with[number > 2])
            for cell, seed in itertools.product(ids_of(cells), shard.seeds(seeds)):
                ledger.add(cell, ran[cell, seed])
        _, rows = rows_over(shard.seeds(seeds))
        write_shard(folder, rows=rows, env={"name": "planar"}, warnings=[f"slow {number % 2}"], members=members)
    found, rows = rows_over(seeds)
    whole = Swept(
        rows=rows,
        results=[[*itertools.chain(*one)] for one in found],
        env={"name": "planar"},
        warnings=["slow 1", "slow 0", "the episodes were not all run alike (mix=true): simulator 1.0 and 2.0"],
        plan=plan,
        alpha=plan.alpha,
        made_with=made_with,
        members=members,
    )
    folders = [tmp_path / number for number in "231"]
    with pytest.raises(
        ValueError, match=r"merging .*/3 with .*/1 would mix episodes that were not run alike: simulator"
    ):
        read_swept(folders)
    merged = read_swept(folders, mix=True)
    assert merged == whole
    assert [*merged.rows[0]] == [*whole.rows[0]]
    assert uniform(merged.rows)[0]["training_seeds"] == 2
    assert merged.episodes == whole.episodes
    document = json.loads((tmp_path / "2" / SHARD).read_text())
    for edited in ({**document, "cells": document["cells"][1:]}, {**document, "members": [["a"]]}, [], {"env": {}}):
        (tmp_path / "2" / SHARD).write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"2/shard.json is damaged .*: remove it, and give its command again"):
            read_swept(folders)


# --- other processes ---------------------------------------------------------------------------------------------


@pytest.mark.reliability
def test_a_shard_that_was_killed_twice_goes_on(planar_run, run_sweep, tmp_path):
    dice = random.Random(time.time_ns())
    shard = ["ddim_steps=[1,16]", "episodes=40", "backend=eager", "shard=2/2"]
    for _ in range(2):
        interrupt([f"checkpoint={planar_run}/checkpoint", *shard], tmp_path / "2", 40, dice)
    run_sweep(*shard, f"output_dir={tmp_path}/2")
    run_sweep(*shard[:3], "shard=1/2", f"output_dir={tmp_path}/1")
    run_sweep(f"merge=[{tmp_path}/1,{tmp_path}/2]", f"output_dir={tmp_path}/all")
    run_sweep(*shard[:3], "adaptive=false", "videos=0", f"output_dir={tmp_path}/whole")
    assert document_of(tmp_path / "all") == document_of(tmp_path / "whole")


@pytest.mark.slow
def test_an_array_of_shards_runs_through_submitit(planar_run, run_script, tmp_path):
    """Two cells by three shards, as Slurm would run them: one job each, here in processes of submitit's own."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    checkpoint = f"checkpoint={planar_run}/checkpoint"
    run_script(
        "sweep",
        "--multirun",
        checkpoint,
        "ddim_steps=1,4",
        "shard=1/3,2/3,3/3",
        "episodes=10",
        "workers=1",
        "hydra/launcher=submitit_local",
        f"hydra.sweep.dir={tmp_path}",
    )
    folders = [tmp_path / str(number) for number in range(6)]
    for folder in folders:
        assert (folder / SHARD).is_file()
    run_script("sweep", f"merge=[{','.join(map(str, folders))}]", f"output_dir={tmp_path}/all")
    # In a process of its own, too: in this one, simulators may be loaded that the sweep does without, and would name.
    unsplit = ["ddim_steps=[1,4]", "episodes=10", "adaptive=false", "videos=0"]
    run_script("sweep", checkpoint, *unsplit, f"output_dir={tmp_path}/whole")
    merged, whole = document_of(tmp_path / "all"), document_of(tmp_path / "whole")
    del whole["plan"]
    assert merged == whole
