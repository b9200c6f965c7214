"""The search, on demonstrations and an environment that take no time."""

import dataclasses
import json
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from policy import PolicyConfig, Sampler, TrainSettings
from policy.checkpoint import is_checkpoint, load_checkpoint, resume_training, save_checkpoint
from policy.common.interrupt import StopRequest
from policy.data.demonstrations import Demonstrations
from policy.recipe import search as module
from policy.recipe.candidates import Candidate
from policy.recipe.halving import Plan, Rung
from policy.recipe.journal import JOURNAL, Journal, Measured, promising, ranked, read_journal
from policy.recipe.report import verdict
from policy.recipe.search import Trial, check_folder, search
from policy.recipe.settings import RecipeSettings
from policy.statistics.results import EpisodeResult
from policy.training.preparation import prepare_run

SMALL = {"obs_size": 8, "encoder": {"name": "state", "hidden_size": 8}}
TRAIN = TrainSettings(steps=32, batch_size=8, warmup_steps=2, val_fraction=0.25, save_every=1000)


def made(episodes=12, length=6):
    states = np.random.default_rng(0).uniform(-1, 1, (episodes * length, 3)).astype(np.float32)
    ends = np.arange(1, episodes + 1) * length
    return Demonstrations(observations={"state": states}, actions=-states[:, :2], episode_ends=ends)


def candidates(learning_rates, steps=TRAIN.steps):
    """Recipes of the same small network; one with a tiny learning rate learns nothing."""
    denoiser = {"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1}
    return [
        Candidate(
            name=name,
            changes={"train.learning_rate": rate},
            policy={**SMALL, "denoiser": denoiser},
            train=dataclasses.replace(TRAIN, learning_rate=rate, steps=steps),
        )
        for name, rate in learning_rates.items()
    ]


RATES = {"idle": 1e-9, "good": 1e-2, "slow": 1e-4}


@pytest.fixture(autouse=True)
def free_steps(monkeypatch):
    """Let the plan not depend on the machine: steps cost nothing, so that the rungs are as long as they may be."""
    plan, last = module.plan_fastest, module.plan_last_rung

    def free(costs):
        return [dataclasses.replace(cost, step=0, rung=0) for cost in costs]

    monkeypatch.setattr(
        module,
        "plan_fastest",
        lambda costs, budget, spent, steps, episode: plan(
            dict(zip(costs, free(costs.values()), strict=True)), 1e9, 0, steps, episode and 1.0
        ),
    )
    monkeypatch.setattr(
        module,
        "plan_last_rung",
        lambda before, done, costs, left, steps, episode: last(before, done, free(costs), 1e9, steps, 0.0),
    )
    monkeypatch.setattr(module, "UNTIMED_STEPS", 1)
    monkeypatch.setattr(module, "TIMED_STEPS", 2)


@pytest.fixture
def start(tmp_path):
    """Start a search, or go on with it; gives the chosen recipe."""
    dataset = made()
    opened = []

    def open_trial(stop_at, candidate, folder):
        opened.append(candidate.name)
        config = PolicyConfig(observation_shapes={"state": (3,)}, action_dim=2, **candidate.policy)
        run = prepare_run(config, dataset, candidate.train, seed=0, device="cpu")
        training = vars(candidate.train)
        if is_checkpoint(folder / "checkpoint"):
            resume_training(folder / "checkpoint", run.state, training)
        if len(opened) == stop_at:
            raise KeyboardInterrupt
        save = partial(save_checkpoint, folder / "checkpoint", env=None, execution_horizon=8, training=training)
        return Trial(run=run, save=save)

    def call(play=None, stop_at=None, rates=RATES, budget="1h", steps=TRAIN.steps):
        opened.clear()
        return search(
            candidates(rates, steps),
            {},
            folder=tmp_path,
            settings=RecipeSettings(budget=budget),
            sampler=Sampler(ddim_steps=2),
            seed=0,
            first_seed=50_000,
            open_trial=partial(open_trial, stop_at),
            play=play,
            paired=True,
            stop=StopRequest(),
        )

    call.opened = opened
    return call


def rungs(folder):
    return json.loads((folder / JOURNAL).read_text())["rungs"]


def test_the_worse_half_stops_and_the_best_is_the_runs_own_checkpoint(start, tmp_path, capsys):
    assert start().name == "good"
    first, last = rungs(tmp_path)
    assert set(first) == set(RATES)
    assert set(last) == {"good", "slow"}
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint.training["learning_rate"] == 1e-2
    assert checkpoint.training["step"] == 32
    out = capsys.readouterr().out
    assert "the plan: 3 to step 16, then 2 to step 32 of 32" in out
    assert "chosen: good (train.learning_rate=0.01)" in out
    report = (tmp_path / "recipe.md").read_text()
    assert "## To step 16" in report
    assert "idle" in report


def test_an_interrupted_search_goes_on_and_ends_as_an_uninterrupted_one(start, tmp_path):
    start()
    whole = rungs(tmp_path)
    for path in (tmp_path / JOURNAL, tmp_path / "checkpoint", tmp_path / "recipes"):
        path.rename(path.with_name(f"whole_{path.name}"))
    with pytest.raises(KeyboardInterrupt):
        start(stop_at=5)  # three were timed, and one was measured
    assert [len(rung) for rung in rungs(tmp_path)] == [1]
    with pytest.raises(ValueError, match=r"begun for train\.steps=32; got 40: give the same until"):
        start(steps=40)  # half of it would have another learning rate
    assert start().name == "good"
    assert start.opened == ["good", "slow", "good", "slow"]
    assert rungs(tmp_path) == whole
    assert start().name == "good"
    assert start(steps=40).name == "good"  # the chosen one may go on for longer
    assert start.opened == []


def played(won, seeds):
    return [EpisodeResult(seed=seed, success=won, score=float(won), return_=0.0, steps=1, attempts=1) for seed in seeds]


def test_rollouts_on_the_same_seeds_decide_every_rung(start, tmp_path):
    asked = []
    winners = iter([False, True, False, True, False, True])  # timed; idle and slow on the first rung; slow on the last

    def play(policy, seeds):
        asked.append(seeds)
        return played(next(winners), seeds)

    assert start(play).name == "slow"
    assert asked == [range(50_000, 50_004)] + [range(50_000, 50_100)] * 5
    assert set(rungs(tmp_path)[1]) == {"idle", "slow"}  # the better ones of rollouts that have the largest errors
    assert "The rollouts have the seeds 50000 to 50099" in (tmp_path / "recipe.md").read_text()


def test_where_rollouts_tell_nothing_no_recipe_is_dropped(start, tmp_path, capsys):
    assert start(lambda policy, seeds: played(False, seeds)).name == "good"
    assert [set(rung) for rung in rungs(tmp_path)] == [set(RATES), set(RATES)]
    out = capsys.readouterr().out
    assert "none of the 3 is dropped, and they share the rest of the budget, up to step 32" in out
    assert "the error on held-out episodes decided, which ranks recipes poorly" in out


@pytest.mark.slow
def test_a_simulator_that_fails_leaves_the_choice_to_the_error(start):
    def play(policy, seeds):
        raise RuntimeError("broken")

    with pytest.warns(UserWarning, match="the held-out error decides: RuntimeError: broken"):
        assert start(play).name == "good"


@pytest.mark.slow
def test_a_recipe_that_diverges_is_out(start, tmp_path):
    with pytest.warns(UserWarning, match="recipe wild failed"):
        assert start(rates={"wild": 1e30, "good": 1e-2, "slow": 1e-4}).name == "good"
    assert rungs(tmp_path)[0]["wild"]["failed"]


@pytest.mark.slow
def test_another_search_in_the_same_folder_is_refused(start):
    start()
    with pytest.raises(ValueError, match=r"a search among other recipes \(idle, good, slow\)"):
        start(rates={"idle": 1e-9, "good": 1e-2})
    with pytest.raises(
        ValueError, match=r"1 recipe to try and nothing to compare it with: name two or more in recipe\.candidates="
    ):
        start(rates={"good": 1e-2})


@pytest.mark.slow
def test_a_spent_budget_ends_in_a_choice_among_what_was_measured(start, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(stop_at=6)
    assert start(budget="0.001s").name == "good"
    report = (tmp_path / "recipe.md").read_text()
    assert "The budget ended on the first rung: 2 of 3 recipes were measured." in report


@pytest.mark.slow
def test_a_budget_that_ends_before_anything_is_measured_is_a_sentence(start):
    with pytest.raises(KeyboardInterrupt):
        start(stop_at=4)
    with pytest.raises(ValueError, match="before a single recipe was measured: the same command"):
        start(budget="0.001s")
    assert start().name == "good"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:recipe .* failed")
def test_where_every_recipe_diverges_the_learning_rate_is_named_and_not_the_budget(start):
    with pytest.raises(ValueError, match="every recipe that was tried is not finite: lower train"):
        start(rates={"wild": 1e30, "wilder": 1e31})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:recipe wild failed")
def test_where_the_budget_ended_and_a_recipe_diverged_the_budget_is_named(start):
    rates = {"wild": 1e30, "good": 1e-2, "slow": 1e-4}
    with pytest.raises(KeyboardInterrupt):
        start(rates=rates, stop_at=4)
    with pytest.raises(ValueError, match="before a single recipe was measured"):
        start(rates=rates, budget="0.001s")


def test_what_a_step_costs_is_timed_on_the_steps_that_a_short_training_has(start, tmp_path, monkeypatch):
    clock, trained = [time.monotonic()], module.train

    def a_second_per_step(run, *args, **settings):
        before = run.state.step
        trained(run, *args, **settings)
        clock[0] += run.state.step - before

    monkeypatch.setattr(module, "train", a_second_per_step)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    start(steps=2)  # of which the first is not timed
    assert [cost.step for cost in read_journal(tmp_path).costs.values()] == pytest.approx([1.0, 1.0, 1.0])


def test_timing_ends_with_the_budget(start):
    with pytest.raises(
        ValueError, match=r"too small: 1 of 3 recipes have been timed, which took \d+s: raise it, or name"
    ):
        start(budget="0.001s")
    assert start.opened == ["idle"]


def test_a_plan_of_a_few_steps_says_how_little_it_tells(start, capsys):
    start(steps=2)
    assert "so short a first rung tells little of a recipe: raise train.steps" in capsys.readouterr().out


def test_a_damaged_journal_is_refused(start, tmp_path):
    (tmp_path / JOURNAL).write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json is damaged"):
        start()


def test_a_folder_of_a_plain_run_is_refused(tmp_path):
    check_folder(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ValueError, match="began without recipe=auto"):
        check_folder(tmp_path)


# --- the choice --------------------------------------------------------------------------------------------------


def journal_of(*found, **of_journal):
    plan = Plan(rungs=(Rung(candidates=len(found), steps=100),), episodes=0)
    rung = {name: measured for name, measured in zip("abc", found, strict=False)}
    return Journal(
        recipes={name: {} for name in rung}, costs={}, plan=plan, paired=True, spent=1.0, rungs=[rung], **of_journal
    )


def test_recipes_are_ranked_by_rollouts_only_if_all_have_them():
    less, more = Measured(errors=(1.0, 1.0)), Measured(errors=(2.0, 2.0))
    assert ranked({"a": more, "b": less}) == ["b", "a"]
    played = {
        "a": dataclasses.replace(more, success=(True, False), scores=(1.0, 0.5)),
        "b": dataclasses.replace(less, success=(True, False), scores=(1.0, 0.4)),
    }
    assert ranked(played) == ["a", "b"]
    assert ranked({**played, "b": less}) == ["b", "a"]
    assert ranked({"failed": Measured(failed="x"), "a": more, "b": more}) == ["a", "b", "failed"]


def test_with_rollouts_only_an_error_that_is_far_off_drops_a_recipe():
    rung = {
        name: Measured(errors=errors, success=(won, won), scores=(float(won),) * 2)
        for name, errors, won in [("a", (1.0,) * 5, False), ("b", (2.0,) * 5, True), ("c", (4.0,) * 5, True)]
    }
    assert promising(rung) == ["b", "a"]
    assert ranked(rung) == ["b", "a", "c"]
    without = {name: dataclasses.replace(found, success=(), scores=()) for name, found in rung.items()}
    assert promising(without) == ["a", "b", "c"]


def test_a_recipe_that_was_not_measured_does_not_go_on():
    rung = {"a": Measured(errors=(1.0,) * 5), "b": Measured(errors=(2.0,) * 5), "c": Measured(failed="too slow")}
    assert promising(rung) == ["a", "b"]


def test_recipes_that_were_left_out_do_not_count_as_measured():
    measured, slow = Measured(errors=(1.0, 2.0)), Measured(failed="too slow")
    journal = dataclasses.replace(
        journal_of(measured, slow),
        recipes={name: {} for name in "abcd"},
        plan=Plan(rungs=(Rung(candidates=3, steps=100),), episodes=0),
    )
    assert "The budget ended on the first rung: 1 of 3 recipes were measured." in verdict(journal)
    whole = dataclasses.replace(journal, rungs=[{"a": measured, "b": slow, "c": measured, "d": measured}])
    assert "were measured" not in verdict(whole)


def test_the_verdict_says_how_little_a_choice_without_rollouts_is_worth():
    found = Measured(errors=(1.0, 2.0, 3.0)), Measured(errors=(1.1, 1.9, 3.2))
    assert "worth little; rollouts decide better: give env=..." in verdict(journal_of(*found))
    assert "worth little; a larger recipe.budget has rollouts" in verdict(journal_of(*found, episode_seconds=9.0))


def test_the_verdict_says_whether_two_recipes_are_separated():
    near = journal_of(Measured(errors=(1.0, 2.0, 3.0)), Measured(errors=(1.1, 1.9, 3.2)))
    assert "the two are not separated, and either may be the better one" in verdict(near)
    far = journal_of(Measured(errors=(1.0, 2.0, 3.0)), Measured(errors=(2.0, 3.0, 4.1)))
    assert "below that of b by 1.033" in verdict(far)
    assert "the two are separated" in verdict(far)
    won, lost = (True,) * 40, (True,) * 20 + (False,) * 20
    played = journal_of(
        Measured(errors=(1.0,), success=won, scores=(1.0,) * 40),
        Measured(errors=(1.0,), success=lost, scores=(0.5,) * 40),
    )
    assert "it solved 100% of 40 episodes (mean score 1.000) and b 50% (0.500), a difference of 50.0 points" in verdict(
        played
    )
    assert "the two are separated" in verdict(played)


def test_a_journal_survives_its_file(tmp_path):
    journal = journal_of(Measured(errors=(1.0,), success=(True,), scores=(0.5,)), Measured(failed="x"))
    journal.save(tmp_path)
    assert read_journal(tmp_path) == journal
