"""The sweep as a user types it: killed and gone on with, made larger, over any axes, and its refusals."""

import csv
import itertools
import json
import multiprocessing
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from envs.planar import PlanarEnv
from policy.checkpoint.files import seal
from policy.commands import stage as stage_module
from policy.commands import sweep as sweep_command
from policy.common.errors import WorkerError
from policy.rollout import workers
from policy.rollout.latency import Latency
from policy.rollout.ledger import Ledger
from policy.rollout.workers import RolloutPool
from policy.sweep import timing
from policy.sweep.live import live_page
from policy.tracking.tracker import NoTracker
from tests.conftest import ENVIRONMENT, ROOT
from tests.rollout.test_workers import Faulty

MEASURED = (
    *("latency_ms_median", "latency_ms_p99", "latency_cpu_ms", "latency_quiet", "latency_threads"),
    *("waiting_rate_hz", "planning_ahead_rate_hz"),
)
QUIET = {"p99_ms": 3.0, "cpu_ms": 2.0, "step_p99_ms": 0.1, "quiet": 1.0}
# What a cell's row says about other cells.
COMPARED = {"difference", "difference_low", "difference_high", "p_value", "not_worse"}


@pytest.fixture
def run_sweep(run_command, plain_reports, monkeypatch):
    """The command without videos and with made-up latencies; gives what it printed, or its refusal."""
    monkeypatch.setattr(
        timing,
        "measure_latency",
        lambda controllers, threads: [Latency(median_ms=2.0, **QUIET, threads=threads) for _ in controllers],
    )

    def run(*overrides, check=0):
        without = [] if overrides[0].startswith("merge=") else ["videos=0"]  # a merge records none
        done = run_command("sweep", *without, *overrides, check=check)
        return done.stderr if check else done.stdout

    return run


@pytest.fixture(scope="module")
def other_checkpoint(planar_run, tmp_path_factory):
    """Nearly the same weights."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(planar_run / "checkpoint", folder)
    weights = load_file(folder / "policy.safetensors")
    torch.manual_seed(0)
    save_file({k: v + 0.01 * torch.randn(v.shape) * v.abs() for k, v in weights.items()}, folder / "policy.safetensors")
    seal(folder)
    return folder


def ledger_of(folder):
    """Cells, and episodes as (cell, seed), in the order of the file; a line that is not whole does not count."""
    file = folder / "episodes.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    cells = [line["cell"] for line in lines if "settings" in line]
    return cells, [(line["cell"], line["seed"]) for line in lines if "seed" in line]


def check_exactly_once(folder, cells, episodes):
    introduced, ran = ledger_of(folder)
    assert len(set(introduced)) == len(introduced) == cells
    assert len(ran) == cells * episodes
    assert set(ran) == set(itertools.product(introduced, range(100_000, 100_000 + episodes)))


def document_of(folder, may_be_busy=False):
    """sweep.json without what differs from one run to the next; and that the other files say the same."""
    document = json.loads((folder / "sweep.json").read_text())
    for name, lines in (("sweep", document["cells"]), ("episodes", document["episodes"])):
        with (folder / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file)) == [
                {key: "" if value is None else str(value) for key, value in line.items()} for line in lines
            ]
    assert (folder / "sweep.png").exists()
    assert (folder / "sweep.svg").exists()
    assert document.pop("answer")  # names a latency
    for line in document["cells"]:
        assert all(line.pop(name) > 0 for name in MEASURED)
        assert line.pop("busy") in ([False, True] if may_be_busy else [False])
    return document


# --- killed ------------------------------------------------------------------------------------------------------


def interrupt(settings, folder, total, dice, number=signal.SIGKILL, code=-9, meanwhile=lambda: None):
    """Start the sweep, and end it at a random moment after it wrote some episodes down, or the last."""
    before = len(ledger_of(folder)[1]) if (folder / "episodes.jsonl").exists() else 0
    log = folder.with_name("log")
    with log.open("w") as opened:
        process = subprocess.Popen(
            [sys.executable, ROOT / "scripts/sweep.py", *settings, f"output_dir={folder}"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=opened,
            stderr=opened,
        )
        wanted = min(before + dice.randint(1, total // 9), total)
        while not (folder / "episodes.jsonl").exists() or len(ledger_of(folder)[1]) < wanted:
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.02))
        process.send_signal(signal.SIGSTOP)
        meanwhile()
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=30) == code, log.read_text()


def settings_of(planar_run, episodes, num_envs, *others):
    return [
        f"checkpoint={planar_run}/checkpoint",
        "ddim_steps=[1,16]",
        "sampler.eta=1.0",
        f"episodes={episodes}",
        f"num_envs={num_envs}",
        "videos=0",
        *others,
    ]


@pytest.mark.reliability
def test_a_sweep_that_was_killed_twice_goes_on_and_ends_with_the_files_of_an_undisturbed_one(
    planar_run, run_sweep, tmp_path
):
    dice, killed, whole = random.Random(time.time_ns()), tmp_path / "killed", tmp_path / "whole"
    settings, second = settings_of(planar_run, 20, 3), settings_of(planar_run, 20, 8, "workers=1")

    def refused():
        err = run_sweep(*settings, f"output_dir={killed}", check=2)
        assert err.startswith(f"error: {killed}/episodes.jsonl is in use by another process: wait for it, or choose")

    interrupt(settings, killed, 40, dice, meanwhile=refused)
    interrupt(second, killed, 40, dice)
    assert not (killed / "sweep.json").exists()
    done = len(ledger_of(killed)[1])
    assert f"{done} of 40 episodes are on disk already" in run_sweep(*settings, f"output_dir={killed}")
    check_exactly_once(killed, cells=2, episodes=20)
    assert "on disk already" not in run_sweep(*settings_of(planar_run, 20, 1), f"output_dir={whole}")
    assert document_of(killed) == document_of(whole)
    assert (killed / "episodes.csv").read_bytes() == (whole / "episodes.csv").read_bytes()


@pytest.mark.slow
def test_a_sweep_that_is_interrupted_again_and_again_loses_nothing(planar_run, run_script, tmp_path):
    """Killed and with Ctrl-C, with and without processes; nothing but real commands."""
    dice, stopped, whole = random.Random(time.time_ns()), tmp_path / "stopped", tmp_path / "whole"
    codes = {signal.SIGKILL: -9, signal.SIGINT: 130}
    for number in [signal.SIGKILL, signal.SIGINT] * 4:
        settings = settings_of(planar_run, 200, dice.choice([1, 2, 7]), "adaptive=false")
        interrupt(settings, stopped, 400, dice, number, codes[number])
        if len(ledger_of(stopped)[1]) > 350:
            break  # with nothing left to wait for, the signal would reach Python before it has started
    for folder in (stopped, whole):
        run_script("sweep", *settings_of(planar_run, 200, 4, "adaptive=false"), f"output_dir={folder}")
        check_exactly_once(folder, cells=2, episodes=200)
    # In processes of their own, the latencies are measured as usual, and other work may run beside them.
    assert document_of(stopped, may_be_busy=True) == document_of(whole, may_be_busy=True)


def make_faulty(name, *, folder, faults, times):
    assert name == "planar"
    return Faulty(folder, faults, times)


def test_what_finished_before_an_episode_that_always_fails_is_kept(planar_run, run_sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: context)
    sweep_planar = partial(
        sweep_command.sweep,
        checkpoint=planar_run / "checkpoint",
        ddim_steps=[1, 2],
        episodes=6,
        num_envs=2,
        output_dir=tmp_path / "out",
        videos=0,
        tracker=NoTracker,
    )
    make = partial(make_faulty, folder=tmp_path, faults={100_002: "kill"}, times=99)
    with pytest.raises(WorkerError, match="the episode with seed 100002 failed 3 times"):
        sweep_planar(make)
    _, ran = ledger_of(tmp_path / "out")
    assert len(set(ran)) == len(ran) >= 9  # all that did not share a process with it
    assert 100_002 not in {seed for _, seed in ran}
    failures = (tmp_path / "100002").stat().st_size
    # As if whatever was wrong had got better after one more failure.
    sweep_planar(partial(make_faulty, folder=tmp_path, faults={100_002: "kill"}, times=failures + 1))
    check_exactly_once(tmp_path / "out", cells=2, episodes=6)
    attempts = {(line["cell"], line["seed"]): line["attempts"] for line in document_of(tmp_path / "out")["episodes"]}
    assert sorted(attempts.values())[-1] == 2
    assert {seed for (_, seed), count in attempts.items() if count == 2} >= {100_002}


# --- made larger -------------------------------------------------------------------------------------------------


@pytest.fixture
def resets(monkeypatch):
    """Seeds of the episodes that were started, without those of the probe before a run."""
    monkeypatch.setattr(RolloutPool, "probe", lambda pool, seed: "")
    seeds, reset = [], PlanarEnv.reset
    monkeypatch.setattr(PlanarEnv, "reset", lambda env, *, seed=None: (seeds.append(seed), reset(env, seed=seed))[1])
    return seeds


def test_more_cells_and_more_episodes_run_only_what_is_new(planar_run, run_sweep, resets, tmp_path):
    checkpoint, grown, once = f"checkpoint={planar_run}/checkpoint", tmp_path / "grown", tmp_path / "once"

    def run(folder, ddim_steps, episodes, new, *others):
        resets.clear()
        out = run_sweep(checkpoint, f"ddim_steps={ddim_steps}", f"episodes={episodes}", *others, f"output_dir={folder}")
        assert len(resets) == new
        return [line for line in out.splitlines() if "on disk already" in line]

    assert run(grown, [2], 3, 3) == []
    assert run(grown, [2], 3, 0) == ["3 of 3 episodes are on disk already"]
    assert run(grown, [1, 2], 3, 3) == ["3 of 6 episodes are on disk already"]
    assert run(grown, [2, 4, 1], 5, 9) == ["6 of 15 episodes are on disk already"]
    check_exactly_once(grown, cells=3, episodes=5)
    assert run(grown, [4], 2, 0) == ["2 of 2 episodes are on disk already"]  # fewer: the files hold what was asked for
    assert len(document_of(grown)["episodes"]) == 2
    assert run(grown, [1, 2], 5, 10, "seed=100005") == []  # fresh seeds may leave cells out
    assert run(once, [2, 4, 1], 5, 15) == []
    run(grown, [2, 4, 1], 5, 0)
    for name in ("sweep.csv", "episodes.csv", "sweep.png"):
        assert (grown / name).read_bytes() == (once / name).read_bytes()
    documents = [json.loads((folder / "sweep.json").read_text()) for folder in (grown, once)]
    first, later = [document["plan"].pop("alpha") for document in reversed(documents)]
    for document in documents:
        del document["answer"], document["alpha"]  # the answer says how near the undecided cells came
    assert documents[0] == documents[1]
    assert 0 < later < first < 0.05  # a plan on a ledger that has been looked at has less left to spend


def test_a_checkpoint_that_moved_is_known_by_its_weights(planar_run, run_sweep, resets, tmp_path):
    moved = tmp_path / "moved"
    for number, folder in enumerate((planar_run / "checkpoint", moved)):
        if number:
            shutil.copytree(planar_run / "checkpoint", moved)
        run_sweep(f"checkpoint={folder}", "ddim_steps=1", "episodes=2", f"output_dir={tmp_path}/out")
        assert len(resets) == 2


# --- the same simulator all through ------------------------------------------------------------------------------


@pytest.fixture
def simulator(monkeypatch):
    """Sets the version of the simulator's package as the command sees it."""
    genuine = stage_module.provenance

    def use(version):
        def made_up(env, device):
            found = genuine(env, device)
            return {**found, "versions": {**found["versions"], "simulator": version}}

        monkeypatch.setattr(stage_module, "provenance", made_up)

    return use


def test_episodes_of_another_simulator_are_refused_or_mixed_and_shown(planar_run, run_sweep, simulator, tmp_path):
    out, settings = tmp_path / "out", [f"checkpoint={planar_run}/checkpoint", "ddim_steps=1", "num_envs=1"]
    simulator("1.0")
    run_sweep(*settings, "episodes=2", f"output_dir={out}")
    assert [one["versions"]["simulator"] for one in document_of(out)["made_with"]] == ["1.0"]
    simulator("2.0")
    before = (out / "episodes.jsonl").read_bytes()
    refused = run_sweep(*settings, "episodes=3", f"output_dir={out}", check=2)
    assert refused == (
        f"error: {out}/episodes.jsonl would mix episodes that were not run alike: simulator 1.0 and 2.0. Use what the"
        " finished ones were run with, or another output_dir=, or accept the mixture with mix=true: the report shows it"
        "\n"
    )
    assert (out / "episodes.jsonl").read_bytes() == before
    run_sweep(*settings, "episodes=2", f"output_dir={out}")  # nothing is run, and so nothing is mixed
    assert (out / "episodes.jsonl").read_bytes() == before
    assert [one["versions"]["simulator"] for one in document_of(out)["made_with"]] == ["1.0"]
    said = "the episodes were not all run alike (mix=true): simulator 1.0 and 2.0"
    run_sweep(*settings, "episodes=3", "mix=true", f"output_dir={out}")
    assert document_of(out)["warnings"] == [said]
    assert said in (out / "report.html").read_text()
    assert "simulator 2.0" in (out / "report.html").read_text()
    refused = run_sweep(*settings, "episodes=3", f"output_dir={out}", check=2)  # also when all is there
    assert "simulator 1.0 and 2.0" in refused


def test_sweeps_of_other_simulators_are_merged_only_if_that_is_wanted(planar_run, run_sweep, simulator, tmp_path):
    for version, steps in (("1.0", 1), ("2.0", 2)):
        simulator(version)
        settings = [f"checkpoint={planar_run}/checkpoint", f"ddim_steps={steps}", "episodes=2", "num_envs=1"]
        run_sweep(*settings, f"output_dir={tmp_path}/{steps}")
    merge = [f"merge=[{tmp_path}/1,{tmp_path}/2]", f"output_dir={tmp_path}/all"]
    assert run_sweep(*merge, check=2) == (
        f"error: merging {tmp_path}/2 with {tmp_path}/1 would mix episodes that were not run alike: simulator 1.0 and"
        " 2.0. Leave one of them out, or accept the mixture with mix=true: the report shows it\n"
    )
    run_sweep(*merge, "mix=true")
    document = document_of(tmp_path / "all")
    assert document["warnings"] == ["the episodes were not all run alike (mix=true): simulator 1.0 and 2.0"]
    assert [one["versions"]["simulator"] for one in document["made_with"]] == ["1.0", "2.0"]
    edited = json.loads((tmp_path / "2/sweep.json").read_text())
    (tmp_path / "2/sweep.json").write_text(json.dumps({**edited, "made_with": "yesterday"}))
    assert "made_with is not a list of provenances" in run_sweep(*merge, "mix=true", check=2)
    del edited["made_with"]  # as earlier versions have written it
    (tmp_path / "2/sweep.json").write_text(json.dumps(edited))
    run_sweep(*merge)
    (said,) = document_of(tmp_path / "all")["warnings"]
    assert said.startswith("some of the episodes come from a version that did not record what they were run with")


def test_a_sweep_of_an_earlier_version_goes_on(planar_run, run_sweep, tmp_path):
    settings = [f"checkpoint={planar_run}/checkpoint", "ddim_steps=1", "num_envs=1", f"output_dir={tmp_path}"]
    run_sweep(*settings, "episodes=2")
    file = tmp_path / "episodes.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    new = {"made_with", "plan"}
    earlier = [{name: row[name] for name in row if name != "check"} for row in rows if not new & row.keys()]
    file.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    assert "2 of 3 episodes are on disk already" in run_sweep(*settings, "episodes=3")
    (said,) = document_of(tmp_path)["warnings"]
    assert said.startswith("some of the episodes come from a version that did not record what they were run with")
    check_exactly_once(tmp_path, cells=1, episodes=3)


# --- axes --------------------------------------------------------------------------------------------------------


def test_any_setting_makes_an_axis(planar_run, run_sweep, tmp_path):
    axes = {
        "execution_horizon": [4, 8],
        "eta": [0.0, 1.0],
        "spacing": ["trailing", "leading"],
        "ddim_steps": [2, 4],
    }
    out = run_sweep(
        f"checkpoint={planar_run}/checkpoint",
        "ddim_steps=[2,4]",
        "sampler.eta=[0.0,1.0]",
        "sampler.spacing=[trailing,leading]",
        "execution_horizon=[4,8]",
        "episodes=2",
        f"output_dir={tmp_path}",
    )
    check_exactly_once(tmp_path, cells=16, episodes=2)
    document = document_of(tmp_path)
    cells, episodes = document["cells"], document["episodes"]
    assert document["env"] == {"name": "planar"}
    assert [tuple(cell[name] for name in axes) for cell in cells] == list(itertools.product(*axes.values()))
    assert {(cell["checkpoint"], cell["clip"]) for cell in cells} == {(f"{planar_run}/checkpoint", 1.0)}
    assert [(line["cell"], line["seed"]) for line in episodes] == [
        (cell["cell"], seed) for cell in cells for seed in (100_000, 100_001)
    ]
    for cell in cells:  # each row is the sum of its own episodes
        mine = [line for line in episodes if line["cell"] == cell["cell"]]
        assert cell["successes"] == sum(line["success"] for line in mine)
        assert cell["return_mean"] == pytest.approx(sum(line["return"] for line in mine) / 2)
        assert cell["steps_mean"] == pytest.approx(sum(line["steps"] for line in mine) / 2)
    acted = [[(line["score"], line["steps"]) for line in episodes[start : start + 2]] for start in range(0, 32, 2)]
    for axis, distance in (("execution_horizon", 8), ("spacing", 2), ("ddim_steps", 1)):
        assert any(acted[i] != acted[i + distance] for i in range(16 - distance)), axis
    assert acted[1] != acted[5]  # eta, with two steps: with one there is no noise to add
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [head.strip() for head in table[0].split("|")][1:5] == ["eta", "spacing", "execution_horizon", "ddim_steps"]
    assert len(table) == 2 + 16


def test_several_checkpoints_are_compared_on_the_same_episodes(planar_run, other_checkpoint, run_sweep, tmp_path):
    both = [planar_run / "checkpoint", other_checkpoint]
    settings = ["ddim_steps=1", "episodes=3"]
    run_sweep(f"checkpoint=[{both[0]},{both[1]}]", *settings, f"output_dir={tmp_path}/both")
    document = document_of(tmp_path / "both")
    assert [cell["checkpoint"] for cell in document["cells"]] == [str(folder) for folder in both]
    for number, folder in enumerate(both):
        run_sweep(f"checkpoint={folder}", *settings, f"output_dir={tmp_path}/{number}")
        single = document_of(tmp_path / str(number))
        alone, beside = single["cells"][0], document["cells"][number]
        assert {name: alone[name] for name in alone.keys() - COMPARED} == {
            name: beside[name] for name in beside.keys() - COMPARED
        }
        assert single["episodes"] == document["episodes"][3 * number : 3 * number + 3]
    first, second = (document["episodes"][start : start + 3] for start in (0, 3))
    assert [line["seed"] for line in first] == [line["seed"] for line in second]
    assert [line["score"] for line in first] != [line["score"] for line in second]


def test_a_single_number_is_a_sweep_of_one_cell(planar_run, run_sweep, tmp_path):
    out = run_sweep(f"checkpoint={planar_run}/checkpoint", "ddim_steps=4", "episodes=2", f"output_dir={tmp_path}")
    assert [cell["ddim_steps"] for cell in document_of(tmp_path)["cells"]] == [4]
    named = out.splitlines()[-1].removeprefix("files: ").split(", ")
    assert sorted(named) == sorted(str(file) for file in tmp_path.iterdir() if file.name != "episodes.jsonl")


def test_cells_above_max_ms_are_left_out_before_the_first_episode(planar_run, run_sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(
        timing,
        "measure_latency",
        lambda controllers, threads: [
            Latency(median_ms=2.0 * one.sampler.ddim_steps, **QUIET, threads=threads) for one in controllers
        ],
    )
    given = (f"checkpoint={planar_run}/checkpoint", "ddim_steps=[1,2,4]", "episodes=2", f"output_dir={tmp_path}")
    out = run_sweep(*given, "max_ms=4")
    document = document_of(tmp_path)
    assert [cell["ddim_steps"] for cell in document["cells"]] == [1, 2]
    assert document["left_out"] == "Left out, as slower than max_ms=4: ddim_steps 4 (8.0 ms)."
    assert document["left_out"] in out
    assert len(ledger_of(tmp_path)[0]) == 2
    err = run_sweep(*given, "max_ms=1", check=2)
    assert "error: no cell plans within max_ms=1: the fastest is ddim_steps 1 (2.0 ms); raise max_ms\n" in err


# --- refusals ----------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "no time": (["max_ms=0"], ["max_ms must be above 0 milliseconds; got 0"]),
    "no threads": (["threads=0"], ["threads must be within 1..", "got 0"]),
    "no steps": (["ddim_steps=0"], ["ddim_steps must be 1 or more", "0"]),
    "negative steps": (["ddim_steps=[1,-2]"], ["ddim_steps must be 1 or more", "-2"]),
    "more than num_steps": (["ddim_steps=[1,101]"], ["1..100", "101"]),
    "repeated": (["ddim_steps=[2,4,2]"], ["ddim_steps must not repeat", "[2, 4, 2]"]),
    "fraction": (["ddim_steps=2.5"], ["ddim_steps should be", "2.5"]),
    "fraction in a list": (["ddim_steps=[1,2.5]"], ["ddim_steps", "2.5"]),
    "word": (["ddim_steps=many"], ["ddim_steps should be", "'many'"]),
    "quoted word": (['ddim_steps="many"'], ["ddim_steps should be", "'many'"]),
    "empty": (["ddim_steps=[]"], ["ddim_steps is empty", "ddim_steps=[...,...]"]),
    "nothing": (["ddim_steps=null"], ["ddim_steps"]),
    "no episodes": (["episodes=0"], ["episodes must be 1 or more; got 0"]),
    "no environments": (["num_envs=0"], ["num_envs must be 1 or more; got 0"]),
    "negative seed": (["seed=-1"], ["seed must be 0 or more; got -1"]),
    "misspelt sampler setting": (["sampler.spacng=leading"], ["spacng", "did you mean 'spacing'"]),
    "steps in the sampler": (["sampler.ddim_steps=3"], ["ddim_steps=[...]", "sampler.ddim_steps=3"]),
    "empty axis": (["execution_horizon=[]"], ["execution_horizon is empty", "execution_horizon=[...,...]"]),
    "settings beside merge": (
        ["merge=[a,b]", "episodes=600", "adaptive=false"],
        ["merge= takes only margin, mix, output_dir, tracker beside it", "checkpoint=, ", "episodes=, "],
    ),
    "empty sampler axis": (["sampler.eta=[]"], ["sampler.eta is empty", "leave sampler.eta= out"]),
    "repeated sampler axis": (["sampler.eta=[0,0.0]"], ["sampler.eta must not repeat"]),
    "sampler value": (["sampler.spacing=[trailing,even]"], ["leading, linspace, trailing", "even"]),
    "nested list": (["sampler.eta=[[0.5]]"], ["sampler.eta should be float", "[0.5]"]),
    "long horizon": (["execution_horizon=9"], ["execution_horizon must be within 1..8; got 9"]),
    "long horizon in a list": (["execution_horizon=[4,9]"], ["execution_horizon must be within 1..8; got 9"]),
    "misspelt setting": (["episods=3"], ["episods", "did you mean 'episodes'"]),
    "another environment": (["env=gym", "env.id=Pendulum-v1"], ["do not fit the policy's state (4,)", "env="]),
    "no such environment": (["env=planr"], ["unknown env 'planr' (did you mean 'planar'?)"]),
}


@pytest.fixture
def nothing_starts(monkeypatch, resets, tmp_path):
    """No episode, no process and no file."""

    def start(*arguments):
        raise AssertionError("rollouts were started")

    monkeypatch.setattr(stage_module, "RolloutPool", start)
    yield
    assert resets == []
    assert not (tmp_path / "out").exists()


def check_refused(err, *parts):
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("label", BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence_before_anything_starts(planar_run, run_sweep, tmp_path, label):
    overrides, parts = BAD_INPUT[label]
    err = run_sweep(f"checkpoint={planar_run}/checkpoint", *overrides, f"output_dir={tmp_path}/out", check=2)
    check_refused(err, *parts)


@pytest.mark.usefixtures("nothing_starts")
def test_checkpoints_that_make_no_sweep_are_refused(planar_run, other_checkpoint, run_sweep, tmp_path):
    real, copy, elsewhere = planar_run / "checkpoint", tmp_path / "copy", tmp_path / "elsewhere"
    shutil.copytree(real, copy)
    shutil.copytree(other_checkpoint, elsewhere)
    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**config, "env": {"name": "planar", "image_size": 64}}))
    seal(elsewhere)
    out = f"output_dir={tmp_path}/out"
    for overrides, parts in (
        ([], ["checkpoint is missing: add checkpoint=..."]),
        (["checkpoint=[]"], ["checkpoint=[] has an empty list"]),
        ([f"checkpoint={tmp_path}/none"], [f"no checkpoint at {tmp_path}/none"]),
        ([f"checkpoint=[{real},{tmp_path}/none]"], [f"no checkpoint at {tmp_path}/none"]),
        ([f"checkpoint=[{real},{real}]"], ["checkpoint must not repeat a checkpoint"]),
        ([f"checkpoint=[{real},{copy}]"], [str(real), str(copy), "are the same cell"]),
        ([f"checkpoint=[{real},{elsewhere}]"], [str(elsewhere), "a sweep compares policies in one environment"]),
    ):
        check_refused(run_sweep(*overrides, out, check=2), *parts)


def test_a_folder_in_use_or_damaged_is_refused_and_left_as_it_is(planar_run, run_sweep, resets, tmp_path):
    settings = [f"checkpoint={planar_run}/checkpoint", "ddim_steps=1", "episodes=2", f"output_dir={tmp_path}"]
    run_sweep(*settings)
    content = (tmp_path / "episodes.jsonl").read_bytes()
    resets.clear()
    with Ledger(tmp_path / "episodes.jsonl"):
        err = run_sweep(*settings, "episodes=4", check=2)
    check_refused(err, f"{tmp_path}/episodes.jsonl is in use by another process", "output_dir=")
    damaged = content.replace(b"{", b"(", 2)
    (tmp_path / "episodes.jsonl").write_bytes(damaged)
    check_refused(run_sweep(*settings, "episodes=4", check=2), f"{tmp_path}/episodes.jsonl, line 1 is damaged")
    assert resets == []
    assert (tmp_path / "episodes.jsonl").read_bytes() == damaged


def test_an_output_folder_that_is_a_file_is_refused(planar_run, run_sweep, resets, tmp_path):
    (tmp_path / "out").write_text("")
    err = run_sweep(f"checkpoint={planar_run}/checkpoint", "episodes=2", f"output_dir={tmp_path}/out", check=2)
    check_refused(err, f"cannot write to output_dir={tmp_path}/out (Not a directory)", "choose another")
    assert resets == []


# --- watched while it runs ---------------------------------------------------------------------------------------


def test_a_watched_sweep_serves_its_page_from_the_first_episode_to_the_report(
    planar_run, run_sweep, tmp_path, monkeypatch
):
    monkeypatch.setattr("policy.common.throttle.Throttle.due", lambda throttle: True)
    monkeypatch.setattr("policy.common.serving.INTERVAL", 0.01)
    page, seen = tmp_path / "report.html", []
    plain = sweep_command.run_looks

    def run_looks(*args, after_each, **settings):
        def look():
            after_each()
            seen.append(page.read_text())

        return plain(*args, after_each=look, **settings)

    monkeypatch.setattr(sweep_command, "run_looks", run_looks)
    cells = [f"checkpoint={planar_run}/checkpoint", "ddim_steps=[1,2]", "episodes=2", f"output_dir={tmp_path}"]
    out = run_sweep(*cells, "watch=true")
    assert re.search(r"watch it at http://127\.0\.0\.1:\d+/ ", out)
    assert [re.search(r"Running: (\d) of at most 4 episodes", text)[1] for text in seen] == ["0", "1", "2", "3", "4"]
    assert all("<svg" in text and "recommend" in text for text in seen[1:])
    assert "Running" not in page.read_text()
    assert "against the best" in page.read_text()
    report = page.read_text()
    run_sweep(*cells)
    assert page.read_text() == report  # as if nobody had watched
    assert "beside it: leave watch= out" in run_sweep(f"merge=[{tmp_path}]", "watch=true", check=2)
    assert "is one of the sweeps to merge" in run_sweep(f"merge=[{tmp_path}]", f"output_dir={tmp_path}", check=2)


def test_a_watched_sweep_that_is_stopped_says_so_on_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr("policy.common.serving.INTERVAL", 0.01)
    page = tmp_path / "report.html"

    def stopped():
        with live_page(page, "planar", {}) as shown:
            assert "The sweep begins." in page.read_text()
            monkeypatch.setattr("policy.common.throttle.Throttle.due", lambda throttle: True)
            shown.refresh([], lambda: [], 10)
            assert "0 of at most 10 episodes" in page.read_text()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert "The sweep stopped before its end" in page.read_text()


def test_a_watched_sweep_that_is_refused_leaves_the_report_of_before_as_it_was(tmp_path):
    page = tmp_path / "report.html"
    page.write_text("the report")
    with pytest.raises(ValueError, match="refused"), live_page(page, "planar", {}):
        raise ValueError("refused")
    assert page.read_text() == "the report"


# --- stages that share a folder ----------------------------------------------------------------------------------


def test_training_rollout_and_sweep_share_a_folder_and_none_overwrites_a_file_of_another(
    planar_run, run_command, plain_reports, tmp_path
):
    """As in `make demo`."""
    folder = tmp_path / "demo"
    shutil.copytree(planar_run, folder)
    told = (planar_run / "train.txt").read_text()
    assert f"page: {planar_run}/training.html" in told
    settings = [f"checkpoint={folder}/checkpoint", "episodes=2", f"output_dir={folder}"]

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    trained = files()
    assert {folder / "training.html", folder / "checkpoint" / "training.json"} <= set(trained)
    assert list((folder / "training_videos").glob("0000300_50000_*.mp4"))
    run_command("rollout", *settings, "video=1")
    rolled_out = files()
    assert {path: rolled_out[path] for path in trained} == trained
    run_command("sweep", *settings, "ddim_steps=[1,2]", "videos=1")
    swept = files()
    assert {path: swept[path] for path in rolled_out} == rolled_out
    assert folder / "report.html" in set(swept) - set(rolled_out)
