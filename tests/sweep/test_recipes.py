"""Recipes in a sweep: the training seeds of one recipe make one cell, from the episodes of single checkpoints."""

import dataclasses
import json
from pathlib import Path, PurePath

import pytest
import torch

from policy import DiffusionPolicy, Sampler
from policy.checkpoint import save_checkpoint
from policy.commands.looks import fast_cells, in_earlier_order
from policy.rollout.ledger import Ledger
from policy.statistics.intervals import wilson_interval
from policy.statistics.recipes import recipe_interval
from policy.statistics.results import EpisodeResult
from policy.sweep.conclusion import Swept, conclude
from policy.sweep.facts import facts_of
from policy.sweep.grid import ids_of, make_cells
from policy.sweep.live import rows_so_far
from policy.sweep.looks import LookPlan, keep
from policy.sweep.merging import read_swept
from policy.sweep.recipes import check_same_recipe, name_of, recipes_of, rows_by_recipe, scope_of
from policy.sweep.table import format_table, write_files
from policy.training.state import TrainState
from tests.sweep.test_conclusion import row
from tests.sweep.test_sweep import make_checkpoint

A, B, C = Path("runs/a"), Path("runs/b"), Path("runs/c")


def test_an_inner_list_is_a_recipe_and_a_plain_folder_a_recipe_of_one_seed():
    assert recipes_of(A) == [[A]]
    assert recipes_of([A, B]) == [[A], [B]]
    assert recipes_of([[A, B], C]) == [[A, B], [C]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"checkpoint=\[\] has an empty list"),
        ([[A], []], r"checkpoint=\[\[runs/a\],\[\]\] has an empty list.*inner list, as checkpoint=\[\["),
        ([[A, B, A]], "got runs/a twice"),
        ([[A, B], [B, C]], "got runs/b twice"),
        ([[A, B], A], "got runs/a twice"),
    ],
)
def test_lists_that_name_no_recipes(given, message):
    with pytest.raises(ValueError, match=message):
        recipes_of(given)


def test_a_row_is_made_of_the_cells_of_its_recipe_at_one_point_of_the_axes():
    # Three checkpoints at two points: cells 0 and 1 belong to the first one.
    assert rows_by_recipe([0, 0, 1, 1, 2, 2], [["a", "b"], ["c"]]) == [[0, 2], [1, 3], [4], [5]]
    assert rows_by_recipe([0, 1], [["a"], ["b"]]) == [[0], [1]]


def trained(name, seed, **settings):
    return dataclasses.replace(make_checkpoint(name), training={"seed": seed, "steps": 10, "step": 10, **settings})


def test_checkpoints_of_one_recipe_differ_in_their_training_seed_only():
    one = trained("a", 0)
    check_same_recipe([one])
    check_same_recipe([one, trained("b", 1, step=9, teacher="other weights", measured={"train/loss": 0.1})])
    with pytest.raises(ValueError, match=r"seed only: steps is 10 in runs/a and 20 in runs/b; list them as"):
        check_same_recipe([one, trained("b", 1, steps=20)])
    with pytest.raises(ValueError, match="batch_size is None in runs/a and 8 in runs/b"):
        check_same_recipe([one, trained("b", 1, batch_size=8)])
    with pytest.raises(ValueError, match=r"schedule.num_steps is 20 in runs/a and 10 in runs/b"):
        check_same_recipe([one, dataclasses.replace(make_checkpoint("b", num_steps=10), training=one.training)])
    other = dataclasses.replace(trained("b", 1), sampler=Sampler(eta=0.5))
    with pytest.raises(ValueError, match=r"sampler.eta is 0.0 in runs/a and 0.5 in runs/b"):
        check_same_recipe([one, other], {"sampler.clip"})
    check_same_recipe([one, other], {"sampler.eta"})
    config = one.policy.config
    stated = dataclasses.replace(config, denoiser={**config.denoiser, "dropout": 0.0})  # the default, written out
    check_same_recipe([one, dataclasses.replace(trained("b", 1), policy=DiffusionPolicy(stated))])
    data = {"dataset": "/one/demos", "dataset.checksum": "0badcafe", "dataset.decode": "cache"}
    moved = {**data, "dataset": "/two/demos"}
    check_same_recipe([trained("a", 0, **data), trained("b", 1, **moved)])
    check_same_recipe([trained("a", 0, dataset="/one/demos"), trained("b", 1, **data)])  # a is an earlier version's
    for changed in ({**moved, "dataset.checksum": "0badcaff"}, {**data, "dataset.decode": "stream"}):
        with pytest.raises(ValueError, match=r"seed only: dataset[.\w]* is"):
            check_same_recipe([trained("a", 0, **data), trained("b", 1, **changed)])
    with pytest.raises(ValueError, match="dataset is /one/demos in runs/a and /two/demos in runs/b"):
        check_same_recipe([trained("a", 0, dataset="/one/demos"), trained("b", 1, **moved)])
    with pytest.raises(ValueError, match=r"have the same training seed 0: .* --multirun"):
        check_same_recipe([one, trained("b", 0)])
    with pytest.raises(ValueError, match="have the same weights"):
        check_same_recipe([one, dataclasses.replace(trained("b", 1), digest=one.digest)])
    imported = [dataclasses.replace(make_checkpoint(name), training={}) for name in "ab"]
    check_same_recipe(imported)


def test_observation_shapes_that_differ_are_named():
    one, other = trained("a", 0), trained("b", 1)
    config = dataclasses.replace(other.policy.config, observation_shapes={"state": (5,)})
    policy = type(other.policy)(config)
    with pytest.raises(ValueError, match=r"observation_shapes.state is \[4\] in runs/a and \[5\] in runs/b"):
        check_same_recipe([one, dataclasses.replace(other, policy=policy)])


def test_folders_of_a_recipe_have_one_name():
    assert name_of([PurePath("out/0/checkpoint"), PurePath("out/1/checkpoint")]) == "out/{0,1}/checkpoint"
    assert name_of([PurePath("a"), PurePath("b")]) == "{a,b}"
    assert name_of([PurePath("x/a"), PurePath("x/a/b")]) == "x/a/{,b}"


def test_the_report_says_what_the_intervals_leave_out():
    single, recipe = row(1, 0.5), {**row(1, 0.5), "training_seeds": 3}
    assert "what another training seed would change is left out" in scope_of([single])
    assert scope_of([recipe]).startswith("The intervals and verdicts of recipes are over 3 training seeds")
    assert "those of single checkpoints leave out" in scope_of([recipe, single])


def results(*solved):
    return [EpisodeResult(seed=n, success=s, score=float(s), return_=0.0, steps=1) for n, s in enumerate(solved)]


def swept_recipes(episodes=200):
    """A recipe of three seeds at 1 and 8 steps, and a single checkpoint at 8 steps."""
    cells = [("{0,1,2}", 1, (100, 110, 120)), ("{0,1,2}", 8, (180, 182, 184)), ("single", 8, (40,))]
    rows, outcomes, members = [], [], []
    for number, (name, steps, solved) in enumerate(cells):
        rate = sum(solved) / len(solved) / episodes
        rows.append(
            {
                **row(steps, rate),
                "cell": f"id {number}",
                "checkpoint": name,
                "training_seeds": len(solved),
                "episodes": episodes * len(solved),
                "score_mean": rate,
                "score_low": rate,
                "score_high": rate,
                "return_mean": 0.0,
                "steps_mean": 1.0,
            }
        )
        outcomes.append([one for count in solved for one in results(*(n < count for n in range(episodes)))])
        members.append([f"{seed}" for seed in range(3)] if len(solved) > 1 else [name])
    return Swept(rows=rows, results=outcomes, env={"name": "planar"}, members=members)


def test_cells_are_compared_as_recipes_and_merged_again(tmp_path):
    swept = swept_recipes()
    concluded = conclude(swept, 0.05)
    assert concluded.advice.best == 1
    assert [cell["not_worse"] for cell in concluded.rows] == ["worse", "not worse", "worse"]
    assert "over training seeds and episodes" in concluded.answer
    (between,) = concluded.between
    assert "single, training_seeds 1" not in between["sentence"]
    assert "over 200 episodes" in between["sentence"]
    assert "training seeds" in format_table(concluded.rows).splitlines()[0]
    episodes = concluded.swept.episodes
    assert [episodes[n]["checkpoint"] for n in (0, 200, 400, 1200)] == ["0", "1", "2", ""]
    write_files(tmp_path, concluded.rows, episodes, {"env": swept.env})
    facts = facts_of(concluded.rows, concluded.advice)
    assert "about the chance, over training seeds and episodes, that" in facts["how sure"]
    assert "the same for each training seed, 1,400 in all." in facts["episodes"]
    read = read_swept([tmp_path])
    assert read.members == swept.members
    assert read.results == swept.results
    assert conclude(read, 0.05).answer == concluded.answer


SPENT = LookPlan(
    asked=(),
    max_ms=None,
    left_out="",
    cells=(),
    recipes=(),
    cost=(),
    seed=0,
    looks=(200,),
    margin=0.05,
    alpha=1e-12,
)


def test_a_later_plan_has_less_left_to_be_wrong():
    concluded = conclude(dataclasses.replace(swept_recipes(), plan=SPENT, alpha=SPENT.alpha), 0.05)
    assert "not worse" not in [cell["not_worse"] for cell in concluded.rows]
    assert concluded.advice.confidence == 0.95


def test_a_merge_has_no_more_left_to_be_wrong_than_the_sweeps_that_it_merges(tmp_path):
    swept = dataclasses.replace(swept_recipes(), plan=SPENT, alpha=SPENT.alpha)
    concluded = conclude(swept, 0.05)
    write_files(tmp_path, concluded.rows, concluded.swept.episodes, concluded.summary)
    merged = conclude(read_swept([tmp_path]), 0.05)
    assert merged.advice.cell is concluded.advice.cell is None
    write_files(tmp_path, merged.rows, merged.swept.episodes, merged.summary)
    assert read_swept([tmp_path]).alpha == SPENT.alpha  # also of a merge of merges


def test_a_recipe_is_left_out_as_a_whole(monkeypatch, capsys, tmp_path):
    """By the latency of its first checkpoint; what is left out stays out when the sweep goes on."""
    cells = make_cells(
        [make_checkpoint(name) for name in "abc"],
        {"name": "planar"},
        ddim_steps=[1, 8],
        sampler={},
        controller={},
        execution_horizon=None,
        backend="fused",
    )
    groups = [
        [cells[n] for n in group] for group in rows_by_recipe([one.cell.policy for one in cells], [["a", "b"], ["c"]])
    ]
    measured = [{"latency_ms_median": ms, "busy": False} for ms in (1.0, 9.0, 1.0, 9.0)]
    monkeypatch.setattr("policy.commands.looks.latencies_of", lambda firsts, threads: measured[: len(firsts)])
    asked = ids_of([cell for group in groups for cell in group])
    with Ledger(tmp_path / "episodes.jsonl") as ledger:
        kept, latencies, left_out = fast_cells(groups, asked, 5, 1, ledger)
        assert kept == [groups[0], groups[2]]
        assert latencies == [measured[0], measured[2]]
        assert "checkpoint runs/{a,b}" in left_out
        stay = tuple(ledger.introduce(cell.settings) for group in kept for cell in group)
        plan = LookPlan(
            asked=asked,
            max_ms=5,
            left_out=left_out,
            cells=stay,
            recipes=(2, 1),
            cost=(),
            seed=0,
            looks=(2,),
            margin=0.05,
            alpha=0.05,
        )
        keep(ledger, plan)
        assert fast_cells(groups, asked, 5, 1, ledger)[1] is not None  # nobody has seen an episode
        ledger.add(stay[0], results(True)[0])
        assert fast_cells(groups, asked, 5, 1, ledger) == (kept, None, left_out)
        listed_otherwise = [groups[3], groups[2], groups[1][::-1], groups[0]]
        assert in_earlier_order(listed_otherwise, ledger) == groups
        assert in_earlier_order(groups[::-1][:3], ledger) == groups[::-1][:3]
    assert "the cells within max_ms=5 stay as chosen before the first episode" in capsys.readouterr().out


def test_the_page_of_a_running_sweep_shows_recipes_on_the_episodes_that_all_their_checkpoints_have_run():
    a, b, c = make_cells(
        [make_checkpoint(name) for name in "abc"],
        {"name": "planar"},
        ddim_steps=[1],
        sampler={},
        controller={},
        execution_horizon=None,
        backend="fused",
    )
    both = [[True, True, False, True], [True, False, False, False]]
    of_recipe = [results(*both[0], False, True), results(*both[1])]
    rows = rows_so_far([[a, b], [c]], [of_recipe, [results(True, True, False)]])
    low, high = recipe_interval(both)
    assert rows[0]["checkpoint"] == "runs/{a,b}"
    assert [(row["training_seeds"], row["episodes"]) for row in rows] == [(2, 8), (1, 3)]
    assert [rows[0][key] for key in ("success_rate", "success_low", "success_high")] == [0.5, low, high]
    assert [rows[1][key] for key in ("success_low", "success_high")] == [*wilson_interval(2, 3)]
    assert rows_so_far([[a, b]], [[results(True), []]]) == []  # until the second one has run an episode too
    assert "training_seeds" not in rows_so_far([[c]], [[results(True)]])[0]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Folders of two checkpoints that differ in their training seed, and of one with another batch size."""
    folders = []
    for seed, batch_size in ((0, 8), (1, 8), (2, 16)):
        folders.append(tmp_path_factory.mktemp("recipes") / str(seed) / "checkpoint")
        policy = make_checkpoint(str(seed), seed=seed).policy
        state = TrainState(policy=policy, ema=policy, optimizer=torch.optim.AdamW(policy.parameters()))
        training = {"seed": seed, "batch_size": batch_size}
        save_checkpoint(folders[-1], state, env={"name": "planar"}, execution_horizon=8, training=training)
    return folders


def test_a_recipe_is_one_row_from_the_episodes_of_single_checkpoints(untrained, run_command, plain_reports, tmp_path):
    first, second, _ = untrained
    settings = ["ddim_steps=[1,2]", "episodes=4", "videos=0", "backend=eager", "workers=1", f"output_dir={tmp_path}"]
    run_command("sweep", f"checkpoint=[{first},{second}]", *settings)
    single = json.loads((tmp_path / "sweep.json").read_text())
    assert "left out" in single["intervals"]
    done = run_command("sweep", f"checkpoint=[[{first},{second}]]", "looks=2", *settings)
    assert "16 of 16 episodes are on disk already" in done.stdout
    assert "plan 2 on this ledger, with 0.24 % of wrong answers left to it" in done.stdout
    assert "recipes run as a fixed grid: their cells are compared once, after all 4 episodes" in done.stdout
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert swept["plan"]["looks"] == [4]
    assert [cell["training_seeds"] for cell in swept["cells"]] == [2, 2]
    assert swept["cells"][0]["checkpoint"] == name_of([first, second])
    scores = [cell["score_mean"] for cell in single["cells"]]
    assert swept["cells"][0]["score_mean"] == pytest.approx((scores[0] + scores[2]) / 2)
    found = [row["score"] for row in swept["episodes"] if row["cell"] == swept["cells"][0]["cell"]]
    ends = (swept["cells"][0]["score_low"], swept["cells"][0]["score_high"])
    assert ends == pytest.approx(recipe_interval([found[:4], found[4:]]))
    assert "over 2 training seeds" in (tmp_path / "report.html").read_text()


def test_bad_recipes_of_a_command_line(untrained, run_command, tmp_path):
    """Refused in one sentence, before any episode."""
    first, _, other = untrained
    for given, words in (
        (f"[[{first},{other}]]", f"batch_size is 8 in {first} and 16 in {other}"),
        (f"[[{first},{first}]]", "twice"),
        ("[[]]", "has an empty list"),
    ):
        done = run_command("sweep", f"checkpoint={given}", "episodes=2", f"output_dir={tmp_path}/out", check=2)
        assert words in done.stderr.replace("\n", " ")
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_folders_of_a_multirun_make_a_recipe(planar_run, run_script, run_command, plain_reports, tmp_path):
    """The documented way: `ddim-train --multirun seed=0,1`, then one sweep."""
    sizes = ["train.steps=5", "train.rollout_every=0", "tracker=none", f"hydra.sweep.dir={tmp_path}/runs"]
    dataset = f"dataset.path={planar_run}/planar-v0"
    run_script("train", "--multirun", "experiment=planar", dataset, *sizes, "seed=0,1")
    folders = ",".join(f"{tmp_path}/runs/{number}/checkpoint" for number in (0, 1))
    settings = ["ddim_steps=1", "episodes=2", "videos=0", "backend=eager", "workers=1", f"output_dir={tmp_path}/sweep"]
    run_command("sweep", f"checkpoint=[[{folders}]]", *settings)
    (cell,) = json.loads((tmp_path / "sweep/sweep.json").read_text())["cells"]
    assert (cell["training_seeds"], cell["checkpoint"]) == (2, f"{tmp_path}/runs/{{0,1}}/checkpoint")
