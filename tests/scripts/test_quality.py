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

from policy.statistics.results import EpisodeResult
from scripts.bench import compare, quality, trainings
from scripts.bench.quality import _units, total
from scripts.bench.trainings import Trained, Unit
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

    def run(command, *, env, stdout, stderr, check):
        assert command[:2] == [sys.executable, "-m"]
        assert (env["OMP_NUM_THREADS"], stderr, check) == ("1", subprocess.STDOUT, True)
        overrides = [part.replace("backend=onnx", "backend=eager") for part in command[3:]]  # compiles in no time
        stdout.write(run_command(re.fullmatch(r"scripts\.(\w+)", command[2])[1], *overrides).stdout)

    def bench(benchmark, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("policy.commands.sweep.plot_rows", lambda *_, **__: None)  # nobody looks at them
        monkeypatch.setattr(trainings, "ThreadPoolExecutor", OneAfterTheOther)
        processes = SimpleNamespace(run=run, STDOUT=subprocess.STDOUT, CalledProcessError=subprocess.CalledProcessError)
        monkeypatch.setattr(trainings, "subprocess", processes)
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
    assert "scripts.train experiment=planar" in done.stderr
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
    for preset, variants in {
        "metaworld_tasks": [*several, {**several[0], "demonstrations": "5"}],
        "metaworld": [{"tasks": "[reach-v3]"}, {"tasks": "[push-v3]"}, {"tasks": "[reach-v3]", "demonstrations": "5"}],
    }.items():
        found = [places(preset, **overrides) for overrides in variants]
        assert len({folder for folder, _ in found}) == len({data for _, data in found}) == 3
    plain, wider = (places("metaworld", tasks="[reach-v3]", **more) for more in ({}, {"denoiser.hidden_size": "64"}))
    assert plain[0] != wider[0]
    assert plain[1] == wider[1]


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
    found = total(rows, seeds, {"success_rate": 0.93})
    assert found["reached"]
    assert found["success_low"] < 0.76
    assert 0.93 < found["success_high"] < 0.97
    assert not total(rows, seeds, {"success_rate": 0.97})["reached"]


def test_a_variant_is_compared_over_its_training_seeds():
    def trained(*solved):
        return [
            Trained(
                unit=Unit(name="seed", commands=[], folder=Path()),
                train_s=1.0,
                swept={
                    "cells": [{"cell": f"c{steps}", "ddim_steps": steps} for steps in (8, 1)],
                    "episodes": [{"cell": f"c{steps}", **r.row()} for steps in (8, 1) for r in results(count)],
                },
            )
            for count in solved
        ]

    base, other = trained(100, 104, 108), trained(20, 24, 28)
    found = compare.row("other", other, base)
    assert (found["success at 8"], found["seeds at 8"]) == (pytest.approx(0.12), "10%, 12%, 14%")
    assert found["95 % at 8"].endswith("%")
    assert found["points from the first at 8"].startswith("-40 (-")
    assert "points from the first at 8" not in compare.row("base", base, base)
    assert "95 % at 8" not in compare.row("other", other[:1], base)


@pytest.mark.slow
def test_variants_are_trained_alike_but_for_one_thing_and_compared_on_the_same_episodes(planar_run, bench, tmp_path):
    shared = ["experiment=planar", f"dataset.path={planar_run}/planar-v0", "train.steps=5", "episodes=3"]
    variants = "variants=[base,prediction_type=epsilon loss_weighting=min_snr]"
    bench(compare, *shared, variants, "seeds=[1]")
    rows = json.loads((tmp_path / "outputs/bench/compare.json").read_text())
    assert [row["variant"] for row in rows] == ["base", "prediction_type=epsilon loss_weighting=min_snr"]
    folder = tmp_path / "outputs/compare/experiment-planar/train.steps-5"
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
