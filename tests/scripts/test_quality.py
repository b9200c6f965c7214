"""The benchmarks that train: presets against their promised scores, and variants of one policy.

They start the real commands as processes. Here, one test does that; in the others the commands run in this process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.stats import binomtest

from envs.metaworld_tasks import DIFFICULTIES, MT50
from policy.diffusion.objective import OBJECTIVES
from policy.statistics.results import EpisodeResult
from scripts.bench import demonstrations, finished, quality, trainings, variants
from scripts.bench.ocbench import why
from scripts.bench.quality import _units, total
from scripts.bench.tasks import task_named
from scripts.bench.trainings import Trained, Unit
from scripts.settings import CONF, _build
from tests.conftest import ENVIRONMENT, ROOT


class OneAfterTheOther:
    """In place of a pool of threads: the commands change what belongs to the whole process, such as `sys.argv`."""

    def __init__(self, threads):
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def bench(run_command, plain_reports, tmp_path, monkeypatch, capsys):
    """Run a benchmark in an empty folder, its commands in this process; gives what it printed."""

    class Popen:
        """In place of a process: the command has ended when it is there."""

        returncode = 0

        def __init__(self, command, *, env, stdout, stderr):
            assert command[:2] == [sys.executable, "-m"]
            assert (env["OMP_NUM_THREADS"], stderr) == ("1", subprocess.STDOUT)
            overrides = [part.replace("backend=onnx", "backend=eager") for part in command[3:]]  # compiles in no time
            stdout.write(run_command(re.fullmatch(r"scripts\.(\w+)", command[2])[1], *overrides).stdout)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def poll(self):
            return self.returncode

        def terminate(self):
            pass

    def bench(benchmark, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("policy.commands.sweep.plot_rows", lambda *_, **__: None)  # nobody looks at them
        monkeypatch.setattr(trainings, "ThreadPoolExecutor", OneAfterTheOther)
        processes = {name: getattr(subprocess, name) for name in ("STDOUT", "CalledProcessError")}
        monkeypatch.setattr(trainings, "subprocess", SimpleNamespace(Popen=Popen, **processes))
        monkeypatch.setattr(sys, "argv", [benchmark.__name__, *arguments])
        benchmark.main()
        return capsys.readouterr().out

    return bench


@pytest.mark.slow
def test_a_preset_is_trained_with_each_seed_rolled_out_and_not_done_twice(planar_run, bench, tmp_path):
    command = [quality, "planar", f"dataset.path={planar_run}/planar-v0", "seeds=[0,1]", "episodes=4", "train.steps=10"]
    bench(*command)
    rows = json.loads((tmp_path / "outputs/bench/quality_planar_train.steps-10.json").read_text())
    assert [(row["training"], row["ddim_steps"], row["episodes"]) for row in rows] == [
        *((f"seed {seed}", steps, 4) for seed in (0, 1) for steps in (8, 1)),
        ("mean", 8, 8),
        ("mean", 1, 8),
    ]
    assert all(row["train_s"] > 0 for row in rows[:4])
    weights = tmp_path / "outputs/quality/planar/train.steps-10/seed_1/checkpoint/policy.safetensors"
    written = weights.stat().st_mtime_ns
    bench(*command)
    assert weights.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "outputs/bench/quality_planar_train.steps-10.json").read_text()) == rows


@pytest.mark.slow
def test_a_training_that_fails_is_named(tmp_path):
    """In processes, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.quality", "planar", "dataset.path=nowhere", "seeds=[0]"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "scripts.train train.rollout_every=0 videos=0 experiment=planar" in done.stderr
    assert "see log.txt" in done.stderr
    assert "nowhere" in (tmp_path / "outputs/quality/planar/seed_0/log.txt").read_text()


@pytest.mark.parametrize("arguments", [[], ["push"], ["planar", "episodes"]])
def test_another_preset_is_refused_with_those_there_are(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    with pytest.raises(SystemExit, match=r"planar\|pusht_corners\|pusht_image\|pusht_keypoints\|pusht_state"):
        quality.main()


@pytest.mark.slow
def test_a_policy_of_several_tasks_has_a_row_for_each(bench, tmp_path):
    pytest.importorskip("metaworld", reason="pip install 'ddim-policy[metaworld]'")
    sizes = ["train.steps=5", "denoiser.hidden_size=16", "denoiser.num_layers=1"]
    bench(quality, "metaworld_tasks", "tasks=[reach-v3,push-v3]", "demonstrations=2", "episodes=1", *sizes)
    (report,) = (tmp_path / "outputs/bench").glob("quality_metaworld_tasks_*.json")
    rows = json.loads(report.read_text())
    assert [(row["training"], row["ddim_steps"], row["episodes"]) for row in rows] == [
        *((task, steps, 1) for steps in (8, 1) for task in ("reach-v3", "push-v3")),
        *((mean, steps, 1) for steps in (8, 1) for mean in ("easy, 1 of 28 tasks", "hard, 1 of 6 tasks")),
        ("mean", 8, 2),
        ("mean", 1, 2),
    ]
    (swept,) = (json.loads(file.read_text()) for file in tmp_path.glob("outputs/quality/**/2-tasks-*/sweep/sweep.json"))
    assert swept["env"]["tasks"] == ["reach-v3", "push-v3"]


def test_other_demonstrations_never_share_a_folder():
    pytest.importorskip("metaworld", reason="pip install 'ddim-policy[metaworld]'")

    def places(preset, **overrides):
        (unit,) = _units(preset, overrides, [8])
        path = next(part for command in unit.commands for part in command if part.startswith("dataset.path="))
        return unit.folder, path

    several = [{"tasks": "[reach-v3,push-v3]"}, {"tasks": "[reach-v3,door-open-v3]"}]
    for preset, ways in {
        "metaworld_tasks": [*several, {**several[0], "demonstrations": "5"}],
        "metaworld": [{"tasks": "[reach-v3]"}, {"tasks": "[push-v3]"}, {"tasks": "[reach-v3]", "demonstrations": "5"}],
    }.items():
        found = [places(preset, **overrides) for overrides in ways]
        assert len({folder for folder, _ in found}) == len({data for _, data in found}) == 3
    plain, wider = (places("metaworld", tasks="[reach-v3]", **more) for more in ({}, {"denoiser.hidden_size": "64"}))
    assert plain[0] != wider[0]
    assert plain[1] == wider[1]


def test_a_difficulty_stands_for_its_tasks_and_one_policy_plays_all_fifty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no demonstrations are
    hard = _units("metaworld", {"tasks": "[hard,reach-v3]"}, [8])
    assert [unit.name for unit in hard] == [*DIFFICULTIES["hard"], "reach-v3"]
    with pytest.raises(SystemExit, match=r"Unknown Meta-World task or difficulty 'hrad'\. Did you mean 'hard'"):
        _units("metaworld", {"tasks": "[hrad]"}, [8])
    (unit,) = _units("metaworld_mt50", {}, [8])
    collect, train, sweep = unit.commands
    assert unit.tasks == list(MT50)
    assert {"env=metaworld_tasks", f"env.tasks=[{','.join(MT50)}]", "episodes=500"} <= set(collect)
    assert "experiment=metaworld_mt50" in train
    assert {"episodes=1000", "adaptive=false"} <= set(sweep)


def test_pictures_are_collected_as_they_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    units = _units("metaworld_image", {}, [8])
    assert len(units) == 5
    for unit in units:
        collect, train, _ = unit.commands
        assert {"env=metaworld", "env.observation=image", f"env.task={unit.name}", "episodes=50"} <= set(collect)
        assert "experiment=metaworld_image" in train


def test_a_training_is_given_the_sampler_settings_and_its_checkpoint_hands_them_to_the_sweep():
    (unit,) = _units("pusht_state", {"seeds": "[0]", "sampler.noise_scale": "1", "sampler.clip": "null"}, [8, 1])
    train, sweep = unit.commands
    assert {"sampler.noise_scale=1", "sampler.clip=null"} <= set(train)
    assert not any(part.startswith("sampler.") for part in sweep)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_push_t_of_the_benchmarks_suits_every_objective(objective):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        experiment, *settings = task_named("pusht").training
        config = compose("train", [experiment, *(f"++{setting}" for setting in settings)])
    assert config.dataset.relabel._target_ == "envs.pusht_hindsight"
    _build("sampler", OmegaConf.to_container(config.sampler))().settled(objective, 100)


def test_rollouts_during_training_are_the_users_choice():
    training, _ = trainings.train_and_sweep(Path("run"), ["train.rollout_every=500"], [], [8])
    assert training.index("train.rollout_every=0") < training.index("train.rollout_every=500")  # the last one counts


def test_rows_are_kept_of_the_same_training_alone():
    kept = quality.rows_folder("metaworld", {"demonstrations": "10", "tasks": "[hard]", "train.rollout_every": "500"})
    assert kept == finished.FINISHED / "metaworld/demonstrations-10"
    for changes in ({}, {"demonstrations": "5"}, {"demonstrations": "10", "episodes": "20"}):
        assert quality.rows_folder("metaworld", changes) is None
    assert quality.rows_folder("metaworld_mt50", {"train.steps": "5"}) is None


def test_what_a_preset_has_not_is_refused_and_what_is_named_twice_is_trained_once():
    for preset, own in (("pusht_state", "demonstrations"), ("pusht_state", "tasks"), ("metaworld", "seeds")):
        with pytest.raises(SystemExit, match=f"{preset} has no {own}: leave it out"):
            quality._units(preset, {own: "1"}, [8])
    units = quality._units("metaworld", {"tasks": "[shelf-place-v3,very_hard]"}, [8])
    assert len(units) == len({unit.name for unit in units}) > 1


def test_the_mean_of_a_difficulty_is_that_of_its_tasks():
    def task(name, successes, **also):
        return row(successes / 100) | {"training": name, "successes": successes, **also}

    rows = [task("push-v3", 90, best_five=1.0), task("assembly-v3", 60, best_five=0.8), task("reach-v3", 100)]
    easy, hard = quality.by_difficulty(rows)
    assert (easy["training"], easy["success_rate"], "best_five" in easy) == ("easy, 1 of 28 tasks", 1.0, False)
    assert (hard["training"], hard["episodes"], hard["successes"]) == ("hard, 2 of 6 tasks", 200, 150)
    assert (hard["success_rate"], hard["best_five"]) == (pytest.approx(0.75), pytest.approx(0.9))
    expected = binomtest(150, 200).proportion_ci(method="wilson")
    assert (hard["success_low"], hard["success_high"]) == pytest.approx((expected.low, expected.high))
    assert quality.by_difficulty([task("block-cpu-lite-single-task1", 50)]) == []


def test_an_episode_solved_late_counts_within_500_steps_alone():
    late = [
        EpisodeResult(seed=n, success=n < 3, score=1.0, return_=0.0, steps=steps)
        for n, steps in enumerate([80, 200, 201, 500])
    ]
    swept = {"cells": [{"cell": "c", "ddim_steps": 1}], "episodes": [{"cell": "c", **one.row()} for one in late]}
    trained = Trained(unit=Unit(name="push-v3", commands=[], folder=Path()), train_s=1.0, swept=swept)
    (found,) = quality._rows(trained)
    assert (found["success_rate"], found["within_200"]) == (0.75, 0.5)
    assert total([found, found | {"within_200": 1.0}], [], {})["within_200"] == 0.75


def test_the_best_rollouts_are_more_than_the_last_ones():
    history = [{"step": n, "rollout/success_rate": rate} for n, rate in enumerate([0, 0.9, 0.5, 0.7, 0.6, 0.8, 0.1])]
    found = quality.best_rollouts([*history, {"step": 7, "train/loss": 0.1}])
    assert found == {"rollouts": 7, "best_five": pytest.approx(0.7)}
    assert quality.best_rollouts([{"step": 7, "train/loss": 0.1}]) == {}


def row(success, score=0.9):
    return {"ddim_steps": 8, "episodes": 100, "success_rate": success, "score_mean": score}


def test_a_promise_is_kept_within_two_standard_errors_of_the_trainings():
    rows = [row(0.80), row(0.84), row(0.88)]  # standard error 0.0231
    assert total(rows, [], {"success_rate": 0.88})["reached"]
    assert not total(rows, [], {"success_rate": 0.89})["reached"]
    assert not total(rows, [], {"success_rate": 0.84, "score_mean": 0.95})["reached"]
    assert "reached" not in total(rows, [], {})
    assert total(rows, [], {})["success_rate"] == pytest.approx(0.84)


def results(solved, episodes=200):
    return [
        EpisodeResult(seed=n, success=n < solved, score=min(n, solved) / episodes, return_=0.0, steps=1)
        for n in range(episodes)
    ]


def test_training_seeds_keep_a_promise_within_the_interval_of_their_recipe():
    seeds = [results(160), results(168), results(176)]
    rows = [row(0.80), row(0.84), row(0.88)]
    found = total(rows, seeds, {"success_rate": 0.92})
    assert found["reached"]
    assert found["success_low"] < 0.76
    assert 0.92 < found["success_high"] < 0.95
    assert not total(rows, seeds, {"success_rate": 0.95})["reached"]


def swept(solved):
    return {
        "cells": [{"cell": f"c{steps}", "ddim_steps": steps} for steps in (8, 1)],
        "episodes": [{"cell": f"c{steps}", **result.row()} for steps in (8, 1) for result in results(solved)],
    }


def test_a_variant_is_compared_over_its_training_seeds():
    def trained(*solved):
        unit = Unit(name="seed", commands=[], folder=Path())
        return [Trained(unit=unit, train_s=1.0, swept=swept(count)) for count in solved]

    base, other = trained(100, 104, 108), trained(20, 24, 28)
    found = variants.row("other", other, base)
    assert (found["success at 8"], found["seeds at 8"]) == (pytest.approx(0.12), "10%, 12%, 14%")
    assert found["95 % at 8"].endswith("%")
    assert found["points from the first at 8"].startswith("-40 (-")
    assert "points from the first at 8" not in variants.row("base", base, base)
    assert "95 % at 8" not in variants.row("other", other[:1], base)


@pytest.mark.slow
def test_variants_are_trained_alike_but_for_one_thing_and_compared_on_the_same_episodes(planar_run, bench, tmp_path):
    shared = ["experiment=planar", f"dataset.path={planar_run}/planar-v0", "train.steps=5", "episodes=3"]
    changes = "variants=[base,prediction_type=epsilon loss_weighting=min_snr]"
    bench(variants, *shared, changes, "seeds=[1]")
    rows = json.loads((tmp_path / "outputs/bench/variants.json").read_text())
    assert [row["variant"] for row in rows] == ["base", "prediction_type=epsilon loss_weighting=min_snr"]
    folder = tmp_path / "outputs/variants/experiment-planar/train.steps-5"
    runs = {
        run: folder.joinpath(*run, "seed_1")
        for run in [("base",), ("prediction_type-epsilon", "loss_weighting-min_snr")]
    }
    configs = [json.loads((run / "checkpoint/config.json").read_text()) for run in runs.values()]
    plain, changed = (config["policy"] for config in configs)
    assert changed == {**plain, "prediction_type": "epsilon", "loss_weighting": "min_snr"}
    swept = [json.loads((run / "sweep/sweep.json").read_text()) for run in runs.values()]
    seeds = [sorted({row["seed"] for row in one["episodes"]}) for one in swept]
    assert seeds == [[200000, 200001, 200002]] * 2


def test_ocbench_is_trained_on_every_task_with_and_without_mistakes():
    pytest.importorskip("ocbench", reason="pip install 'ddim-policy[ocbench]'")
    units = _units("ocbench", {}, [8, 1])
    assert len({unit.name for unit in units}) == len({unit.data for unit in units}) == len(units) == 54
    assert not any("mistakes" in unit.name for unit in units[:27])
    collect, train, sweep = units[-1].commands
    assert "env.p_mistake=0.2" in collect
    assert "episodes=200" in collect
    assert {"experiment=ocbench", f"dataset.path={units[-1].data}"} <= set(train)
    assert {"episodes=100", "ddim_steps=[8,1]"} <= set(sweep)
    with pytest.raises(SystemExit, match="Unknown OCBench task 'blok'"):
        _units("ocbench", {"tasks": "[blok]"}, [8])


def test_the_curve_has_each_number_of_each_task_beside_regression_on_the_same_file():
    units = demonstrations.units_of(list(demonstrations.TASKS), list(demonstrations.COUNTS), {})
    assert len({unit.name for unit in units}) == len(units) == 50
    assert len({unit.data for unit in units}) == 5
    assert [unit.name.rsplit("-", 2)[1:] for unit in units[:2]] == [["diffusion", "100"], ["regression", "100"]]
    train, sweep = units[-1].commands
    assert {"dataset.max_episodes=2000", "objective=regression"} <= set(train)
    assert "ddim_steps=[1]" in sweep
    fewer = demonstrations.units_of(list(demonstrations.TASKS), [100, 200], {})  # a smaller file is not one of 2,000
    assert not {unit.data for unit in units} & {unit.data for unit in fewer}


def test_the_rows_of_a_finished_training_are_read_as_done(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ocbench", reason="pip install 'ddim-policy[ocbench]'")
    done = [
        Trained(unit=unit, train_s=1.0, swept=swept(solved=1))
        for unit in _units("ocbench", {"tasks": "[block-cpu-lite-single-task1]"}, [8, 1])
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finished, "FINISHED", tmp_path / "rows")
    for mistakes, one in zip((False, True), done, strict=True):
        rows = [row(0.5) | {"training": one.unit.name, "ddim_steps": k, "mistakes": mistakes} for k in (8, 1)]
        finished.keep_rows(tmp_path / "rows/ocbench", one, rows)
    monkeypatch.setattr(sys, "argv", ["quality", "ocbench", "tasks=[block-cpu-lite-single-task1]"])
    quality.main()
    assert "0 trainings" in capsys.readouterr().out
    report = json.loads((tmp_path / "outputs/bench/quality_ocbench.json").read_text())
    assert [line["training"] for line in report] == [*(one.unit.name for one in done for _ in (8, 1)), *4 * ["mean"]]
    kept = json.loads((tmp_path / "rows/ocbench" / f"{done[0].unit.name}.json").read_text())
    assert kept["solved_seeds"] == {"8": [0], "1": [0]}


def test_the_reasons_of_a_failure_follow_from_its_figures():
    found = {"demonstrations": 80, "failed_attempts": 20, "mean_steps": 80.0, "limit": 100}
    found |= {"dead_ends": 200, "corrected": {"state[0]": 0.5}}
    plain = {**found, "failed_attempts": 0, "mean_steps": 50.0, "dead_ends": 0, "train_loss": 1.0, "val_loss": None}
    assert why(plain, results(190)) == ""
    assert why(plain, results(0)) == "none of the known reasons"
    assert why({**found, "train_loss": 1.0, "val_loss": 2.0}, results(0)).split("; ") == [
        "over-fitted: the loss on held-out demonstrations is 2.0 times that on training ones",
        "short of time: a demonstration takes 80% of the time limit",
        "hard for the expert too: 20 of its 100 attempts failed",
        "dead ends: 200 of 200 failures end in a state that cannot be solved",
    ]


def test_rows_of_the_curve_are_kept_for_the_preset_in_either_precision():
    given = {"tasks": "[block-cpu-lite-single-task1]", "counts": "[100]"}
    folder = finished.FINISHED / "demonstrations"
    assert demonstrations.rows_folder(given) == folder
    assert demonstrations.rows_folder({**given, "train.precision": "bfloat16"}) == folder / "train.precision-bfloat16"
    assert demonstrations.rows_folder({**given, "train.steps": "50"}) is None
    assert demonstrations.rows_folder({"episodes": "50"}) is None
    turned = [{"train.precision": "bfloat16", "seed": "1"}, {"seed": "1", "train.precision": "bfloat16"}]
    assert len({demonstrations.rows_folder(changes) for changes in turned}) == 1
    assert len({tuple(quality.variant(changes)) for changes in turned}) == 1


@pytest.mark.slow
def test_ocbench_and_its_curve_run_from_collection_to_table(bench, tmp_path):
    pytest.importorskip("ocbench", reason="pip install 'ddim-policy[ocbench]'")
    tiny = ["tasks=[block-cpu-lite-single-task1]", "episodes=1", "train.steps=5"]
    bench(quality, "ocbench", "demonstrations=2", *tiny)
    (report,) = (tmp_path / "outputs/bench").glob("quality_ocbench_*.json")
    rows = json.loads(report.read_text())
    assert [(line["training"], line["ddim_steps"], line["mistakes"]) for line in rows] == [
        *(
            (f"block-cpu-lite-single-task1{name}", steps, mistakes)
            for name, mistakes in (("", False), ("-mistakes", True))
            for steps in (8, 1)
        ),
        *(("mean", steps, mistakes) for mistakes in (False, True) for steps in (8, 1)),
    ]
    bench(demonstrations, "counts=[1,2]", *tiny)
    (report,) = (tmp_path / "outputs/bench").glob("demonstrations_*.json")
    found = [(line["model"], line["demonstrations"], line["ddim_steps"]) for line in json.loads(report.read_text())]
    kinds = [("diffusion", 8), ("diffusion", 1), ("regression", 1)]
    assert found == [(model, count, steps) for count in (1, 2) for model, steps in kinds]
