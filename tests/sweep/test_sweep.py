"""The sweep: cells that can be compared, and files that say the same."""

import csv
import dataclasses
import itertools
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from envs.planar import PlanarEnv
from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.checkpoint import Checkpoint
from policy.common.panel import LIGHT
from policy.diffusion.sampler import LATER_SETTINGS
from policy.model.cost import multiply_adds
from policy.rollout import latency
from policy.rollout.cells import Cell
from policy.rollout.episodes import run_in_process
from policy.rollout.latency import Latency
from policy.rollout.ledger import cell_id
from policy.statistics.intervals import wilson_interval
from policy.statistics.results import summarize
from policy.sweep import timing
from policy.sweep.grid import make_cells, row_of, with_backends
from policy.sweep.panels import facets_of
from policy.sweep.plot import draw_rows, plot_rows
from policy.sweep.rows import costs_of, shared, uniform, varying
from policy.sweep.table import COLUMNS, format_table, in_millions, write_files
from policy.sweep.timing import check_max_ms, latencies_of, within
from tests.conftest import BRIEFLY

SEEDS = range(70, 76)
ENV = {"name": "planar"}


def make_checkpoint(name, num_steps=20, execution_horizon=5, seed=0):
    torch.manual_seed(seed)
    policy = DiffusionPolicy(
        PolicyConfig(
            observation_shapes={"state": (4,)},
            action_dim=2,
            obs_size=16,
            encoder={"name": "state", "hidden_size": 32},
            denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 1},
            schedule={"num_steps": num_steps, "beta_schedule": "squaredcos_cap_v2"},
        )
    ).eval()
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return Checkpoint(
        policy=policy,
        env=ENV,
        execution_horizon=execution_horizon,
        training={},
        path=Path("runs") / name,
        digest=f"weights of {name}",
    )


@pytest.fixture(scope="module")
def checkpoints():
    return [make_checkpoint("a"), make_checkpoint("b", num_steps=10, execution_horizon=8, seed=1)]


def cells_of(checkpoints, *, ddim_steps=4, sampler=None, controller=None, execution_horizon=None, env=ENV):
    return make_cells(
        checkpoints,
        env,
        ddim_steps=ddim_steps,
        sampler=sampler or {},
        controller=controller or {},
        execution_horizon=execution_horizon,
        backend="fused",
    )


# --- cells -------------------------------------------------------------------------------------------------------


def test_cells_are_every_combination_with_ddim_steps_changing_fastest(checkpoints):
    steps, horizons, etas, spacings = [4, 2], [8, 2], [0.0, 0.5], ["leading", "trailing"]
    cells = cells_of(
        checkpoints, ddim_steps=steps, sampler={"eta": etas, "spacing": spacings}, execution_horizon=horizons
    )
    expected = [
        Cell(policy=number, sampler=Sampler(ddim_steps=k, eta=eta, spacing=spacing), execution_horizon=horizon)
        for number, horizon, eta, spacing, k in itertools.product(range(2), horizons, etas, spacings, steps)
    ]
    assert [cell.cell for cell in cells] == expected
    assert [cell.checkpoint for cell in cells] == [checkpoints[cell.policy] for cell in expected]
    assert len({cell_id(cell.settings) for cell in cells}) == 32


def test_a_single_value_makes_a_single_cell_with_the_checkpoints_own_horizon(checkpoints):
    cells = cells_of(checkpoints, sampler={"clip": None})
    assert [cell.cell.execution_horizon for cell in cells] == [5, 8]
    assert {cell.cell.sampler for cell in cells} == {Sampler(ddim_steps=4, clip=None)}


def test_a_setting_that_is_left_open_is_the_checkpoints_own(checkpoints):
    own = [Sampler(noise_scale=0.5, ddim_steps=2), Sampler(eta=0.5)]
    recorded = [dataclasses.replace(one, sampler=sampler) for one, sampler in zip(checkpoints, own, strict=True)]
    assert [cell.cell.sampler for cell in cells_of(recorded)] == [
        Sampler(ddim_steps=4, noise_scale=0.5),
        Sampler(ddim_steps=4, eta=0.5),
    ]
    cells = cells_of(recorded, sampler={"noise_scale": [1.0, 0.0], "eta": 0})  # a default that is given counts too
    assert [cell.cell.sampler for cell in cells] == [Sampler(ddim_steps=4, noise_scale=scale) for scale in (1, 0)] * 2


def test_a_recorded_setting_that_does_not_fit_is_said_to_be_recorded(checkpoints):
    late = dataclasses.replace(checkpoints[0], sampler=Sampler(start=0.1, ddim_steps=2))
    with pytest.raises(ValueError, match=r"start=0.1 leaves 2 .*: .*runs/a records sampler.start"):
        cells_of([late])
    with pytest.raises(ValueError, match=r"ddim_steps$"):
        cells_of([late], sampler={"start": 0.15})


def test_settings_say_the_weights_and_axes_their_folder(checkpoints):
    (cell,) = cells_of(checkpoints[:1], sampler={"eta": 1}, env={"name": "planar", "image_size": 64})
    shared = {"ddim_steps": 4, "eta": 1.0, "spacing": "trailing", "clip": 1.0, "execution_horizon": 5}
    shared |= {"backend": "fused", "weights": "float32", "warm_start": None}
    shared |= {"mode": "synchronous", "delay_steps": 0, "late": "hold", "candidates": 1}
    assert cell.axes == {"checkpoint": "runs/a", **LATER_SETTINGS, **shared}
    assert cell.settings == {
        "checkpoint": "weights of a",
        **shared,
        "device": "cpu",
        "env": {"name": "planar", "image_size": 64},
    }
    assert json.loads(json.dumps(cell.settings)) == cell.settings
    moved = dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, path=Path("elsewhere")))
    assert cell_id(moved.settings) == cell_id(cell.settings)


def test_the_id_of_a_default_cell_stays_so_that_ledgers_keep_their_episodes(checkpoints):
    """It changes with any new setting of a cell. Add the setting to `LATER_SETTINGS` instead of changing this id."""
    (cell,) = cells_of(checkpoints[:1])
    assert cell_id(cell.settings) == "77fa5295b868"


def test_numbers_that_are_written_differently_are_the_same_cell(checkpoints):
    plain, written = (cells_of(checkpoints[:1], sampler={"eta": eta}) for eta in (0, "0.0"))
    assert [cell_id(cell.settings) for cell in plain] == [cell_id(cell.settings) for cell in written]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ddim_steps": []}, "ddim_steps is empty: give one value, or several"),
        ({"ddim_steps": [1, 2, 1]}, r"ddim_steps must not repeat a value; got \[1, 2, 1\]"),
        ({"ddim_steps": [1, 21]}, r"within 1\.\.20 .*got 21"),
        ({"ddim_steps": 0}, "ddim_steps must be 1 or more; got 0"),
        ({"ddim_steps": [4, -1]}, "got -1"),
        ({"ddim_steps": [2.5]}, r"ddim_steps should be int; got 2\.5"),
        ({"execution_horizon": [4, 9]}, r"execution_horizon must be within 1\.\.8; got 9"),
        ({"execution_horizon": []}, "execution_horizon is empty"),
        ({"sampler": {"eta": []}}, r"sampler\.eta is empty"),
        ({"sampler": {"eta": [0, 2]}}, "eta must lie within 0.*2"),
        ({"sampler": {"eta": ["a"]}}, r"sampler\.eta should be float; got 'a'"),
        ({"sampler": {"eta": [[0.5]]}}, r"sampler\.eta should be float; got \[0\.5\]"),
        ({"sampler": {"eta": [{}, {}]}}, r"sampler\.eta must not repeat a value; got \[\{\}, \{\}\]"),
        ({"sampler": {"eta": [0, "0"]}}, "are the same cell: give each value and each policy once"),
        ({"sampler": {"spacing": "even"}}, "leading, linspace, trailing"),
        ({"sampler": {"clip": 0}}, r"sampler\.clip must be positive"),
        ({"sampler": {"ddim_steps": 3}}, r"a sweep takes its steps from ddim_steps=\[...\]; got sampler\.ddim_steps=3"),
        ({"sampler": {"spacng": "leading"}}, r"'spacng' \(did you mean 'spacing'\?\); allowed: clip, ddim_steps, eta"),
    ],
)
def test_axes_that_make_no_sweep_are_refused(checkpoints, settings, message):
    with pytest.raises(ValueError, match=message):
        cells_of(checkpoints[:1], **settings)


def test_every_checkpoint_must_be_able_to_run_each_cell(checkpoints):
    with pytest.raises(ValueError, match=r"within 1\.\.10 .*got 16"):
        cells_of(checkpoints, ddim_steps=[1, 16])


def test_the_same_policy_twice_is_refused(checkpoints):
    copy = dataclasses.replace(checkpoints[0], path=Path("runs/copy"))
    with pytest.raises(ValueError, match=r"^checkpoint runs/a and checkpoint runs/copy are the same cell"):
        cells_of([*checkpoints, copy])
    cells_of([*checkpoints, dataclasses.replace(copy, execution_horizon=7)])  # that acts differently


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(checkpoints):
    """Cells, and their results."""
    cells = cells_of(checkpoints[:1], ddim_steps=[4, 1, 2], sampler={"eta": 0.5, "spacing": "linspace", "clip": 2.0})
    tasks = list(itertools.product(range(3), SEEDS))
    found = dict(run_in_process([checkpoints[0].policy], [PlanarEnv()], [cell.cell for cell in cells], tasks))
    return cells, [[found[number, seed] for seed in SEEDS] for number in range(3)]


@pytest.fixture(scope="module")
def rows(swept):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**BRIEFLY, "QUIET": 0.0}.items():
            patch.setattr(latency, name, value)
        timed = zip(*swept, latencies_of(swept[0]), strict=True)
    return [
        {"cell": f"id {number}", **row_of(cell, summarize(results), measured)}
        for number, (cell, results, measured) in enumerate(timed)
    ]


def test_a_row_holds_settings_figures_and_latency(swept, rows):
    for cell, results, row in zip(*swept, rows, strict=True):
        assert cell.axes.items() <= row.items()
        assert summarize(results).items() <= row.items()
        assert row["waiting_rate_hz"] == pytest.approx(1000 / row["latency_ms_p99"])
        assert row["planning_ahead_rate_hz"] > 0
        assert row["multiply_adds"] == cell.multiply_adds
    assert [row["ddim_steps"] for row in rows] == [4, 1, 2]
    # One step takes less time than four, but three rounds on a busy machine do not always show it.
    assert all(row["latency_cpu_ms"] > 0 for row in rows)
    cost = {row["ddim_steps"]: row["multiply_adds"] for row in rows}
    assert 0 < cost[1] < cost[2] < cost[4]


def test_the_cost_counts_the_calls_of_all_candidates_for_each_control_step(checkpoints):
    counted = multiply_adds(checkpoints[0].policy)
    one, several = cells_of(checkpoints[:1], ddim_steps=8, controller={"candidates": [1, 3]})
    assert one.multiply_adds == (counted.encoder + 8 * counted.denoiser) / 5
    assert several.multiply_adds == pytest.approx(3 * one.multiply_adds)
    (often,) = cells_of(checkpoints[:1], ddim_steps=8, execution_horizon=1)
    assert often.multiply_adds == pytest.approx(5 * one.multiply_adds)
    late = {"mode": ["synchronous", "asynchronous"], "delay_steps": 3, "candidates": 3}
    waits, ahead = cells_of(checkpoints[:1], ddim_steps=8, execution_horizon=8, controller=late)
    assert waits.multiply_adds == pytest.approx(5 / 11 * one.multiply_adds)  # nothing is left to be close to
    assert ahead.multiply_adds == pytest.approx(3 * one.multiply_adds)  # 5 of 8 actions, then it plans again


def test_the_cost_ranks_cells_and_rows_that_lack_it_are_ranked_by_their_calls():
    rows = [row(4, execution_horizon=8), row(1, execution_horizon=1), row(3, execution_horizon=8)]
    assert costs_of(rows) == [5e5, 1.25e5, 3.75e5]
    old = {name: value for name, value in rows[1].items() if name != "multiply_adds"}
    assert costs_of([rows[0], old, {**rows[2], "candidates": 2}]) == [0.5, 1.0, 0.75]
    merged = uniform([rows[0], old])
    assert merged[0].keys() == merged[1].keys()  # as a CSV file needs
    assert [line["multiply_adds"] for line in merged] == [5e5, None]
    assert costs_of(merged) == [0.5, 1.0]
    assert "million multiply-adds" in format_table(merged)
    assert "million multiply-adds" not in format_table([old])


def test_the_table_marks_what_a_busy_machine_measured_and_rounds_rates_down():
    heads, (quiet, busy) = parse(
        format_table([row(1, waiting_rate_hz=99.9, planning_ahead_rate_hz=9.99), row(4, busy=True)])
    )
    assert heads[-3:] == ["ms a chunk", "waits up to Hz", "plans ahead up to Hz"]
    assert quiet[-3:] == ["0.5", "99", "9.9"]
    assert busy[-3:] == ["2.0 busy", "500 busy", "2000 busy"]
    assert "busy" not in "".join(busy[:-3])


@pytest.mark.parametrize(("count", "shown"), [(1234, "0.00"), (5e5, "0.50"), (1.239e7, "12.4"), (5.6789e9, "5,679")])
def test_multiply_adds_are_shown_in_millions(count, shown):
    assert in_millions(count) == shown


def test_cells_above_the_limit_are_left_out_by_name(checkpoints):
    axes = [cell.axes for cell in cells_of(checkpoints[:1], ddim_steps=[1, 4, 8])]
    latencies = [{"latency_ms_median": ms, "busy": ms > 20} for ms in (1.0, 20.0, 20.1)]
    assert within(axes, latencies, 20.1) == ([0, 1, 2], "")
    left_out = "Left out, as slower than max_ms=20: ddim_steps 8 (20.1 ms, on a busy machine)."
    assert within(axes, latencies, 20) == ([0, 1], left_out)
    with pytest.raises(ValueError, match=r"no cell plans within max_ms=0.5: the fastest is ddim_steps 1 \(1.0 ms\)"):
        within(axes, latencies, 0.5)
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"max_ms must be above 0 milliseconds; got {wrong}"):
            check_max_ms(wrong)


def test_latency_is_that_of_the_cells_sampler_and_policy(swept, monkeypatch):
    cells, _ = swept
    seen = []

    def measured(controllers, threads):
        seen.extend(controllers)
        times = {"median_ms": 16.0, "p99_ms": 20.0, "cpu_ms": 15.0, "step_p99_ms": 0.1, "quiet": 0.5}
        return [Latency(**times, threads=threads) for _ in controllers]

    monkeypatch.setattr(timing, "measure_latency", measured)
    (row,) = latencies_of(cells[1:2], threads=2)
    assert (row["waiting_rate_hz"], row["planning_ahead_rate_hz"]) == (50, 200)
    assert (row["busy"], row["latency_threads"]) == (True, 2)
    (controller,) = seen
    assert (controller.policy, controller.sampler) == (cells[1].checkpoint.policy, cells[1].cell.sampler)
    assert controller.execution_horizon == cells[1].cell.execution_horizon


def row(ddim_steps, successes=3, episodes=4, **changes):
    low, high = wilson_interval(successes, episodes)
    return {
        "checkpoint": "runs/a",
        "ddim_steps": ddim_steps,
        "eta": 0.0,
        "spacing": "trailing",
        "clip": 1.0,
        "execution_horizon": 8,
        "episodes": episodes,
        "successes": successes,
        "success_rate": successes / episodes,
        "success_low": low,
        "success_high": high,
        "score_mean": 0.5,
        "score_low": 0.25,
        "score_high": 0.75,
        "return_mean": 1.5,
        "steps_mean": 20.0,
        "multiply_adds": 1e6 * ddim_steps / 8,
        "latency_ms_median": 0.5 * ddim_steps,
        "latency_ms_p99": 0.6 * ddim_steps,
        "waiting_rate_hz": 2000 / ddim_steps,
        "planning_ahead_rate_hz": 8000 / ddim_steps,
        "busy": False,
        **changes,
    }


def four_series(successes=3):
    return [
        row(k, successes, eta=eta, execution_horizon=horizon, latency_ms_median=k * (1 + eta))
        for horizon, eta, k in itertools.product([4, 8], [0.0, 1.0], [1, 2, 8])
    ]


def test_what_all_rows_share_is_said_where_it_is_no_default():
    assert shared([row(1), row(2)]) == "execution_horizon 8"
    assert shared(four_series()) == ""  # its axes are in the table
    less = [{**row(steps), "noise_scale": 0.6, "clip": None, "candidates": 4} for steps in (1, 2)]
    assert shared(less) == "execution_horizon 8, clip None, noise_scale 0.6, candidates 4"
    assert shared([less[0], {**less[1], "noise_scale": 1.0}]) == "execution_horizon 8, clip None, candidates 4"
    control = {**row(1), "objective": "regression", "solver": "one_call"}
    assert shared([control]) == "execution_horizon 8"  # the objective brings the solver


def test_varying_axes_are_those_that_differ_ddim_steps_apart():
    assert varying([row(1), row(2)]) == []
    assert varying(four_series()) == ["eta", "execution_horizon"]
    mixed = [row(1), row(1, checkpoint="b", clip=None, spacing="leading"), row(4, eta=1.0, execution_horizon=2)]
    assert varying(mixed) == ["checkpoint", "eta", "spacing", "clip", "execution_horizon"]


# --- files -------------------------------------------------------------------------------------------------------


def episodes_of(swept):
    return [{"cell": f"id {k}", **result.row()} for k, results in enumerate(swept[1]) for result in results]


def test_csv_and_json_say_the_same(swept, rows, tmp_path):
    rows = [*rows[:2], {**rows[2], "clip": None}]
    episodes = episodes_of(swept)
    files = write_files(tmp_path, rows, episodes, {"env": ENV})
    assert [file.name for file in files] == ["sweep.csv", "episodes.csv", "sweep.json"]
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document == {"env": ENV, "cells": rows, "episodes": episodes}
    for name, expected in (("sweep", rows), ("episodes", episodes)):
        with (tmp_path / f"{name}.csv").open() as file:
            table = list(csv.DictReader(file))
        assert [list(line) for line in table] == [list(line) for line in expected]
        assert table == [{k: "" if v is None else str(v) for k, v in line.items()} for line in expected]
    assert [float(line["score"]) for line in table] == [line["score"] for line in episodes]
    assert len(table) == 3 * len(SEEDS)
    assert len({(line["cell"], line["seed"]) for line in table}) == len(table)
    assert {line["cell"] for line in table} == {line["cell"] for line in document["cells"]}


def parse(table):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(line.startswith("| ") and line.endswith(" |") for line in table.splitlines())
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned
    assert all(set(cell) == {"-", ":"} and cell.endswith(":") and len(cell) >= 2 for cell in lines[1])
    return lines[0], lines[2:]


def test_the_table_is_markdown_with_the_rows_figures(rows):
    heads, body = parse(format_table(rows))
    left_out = ("episodes", "training_seeds")  # all have the same number
    assert heads == [head for key, (head, _) in COLUMNS.items() if key not in left_out]
    assert len(body) == len(rows)
    for row, printed in zip(rows, body, strict=True):
        shown = dict(zip(heads, printed, strict=True))
        assert shown["ddim_steps"] == str(row["ddim_steps"])
        assert shown["success"] == f"{100 * row['success_rate']:.0f}%"
        assert float(shown["score"]) == pytest.approx(row["score_mean"], abs=5e-4)
        assert printed[5:7] == [f"{row['score_low']:.3f}", f"{row['score_high']:.3f}"]
        assert float(shown["ms a chunk"]) == pytest.approx(row["latency_ms_median"], abs=0.051)


def test_the_table_begins_with_the_axes_that_vary():
    heads, body = parse(format_table(four_series()))
    assert heads[:4] == ["eta", "execution_horizon", "ddim_steps", "success"]
    expected = [[str(eta), str(h), str(k)] for h, eta, k in itertools.product([4, 8], [0.0, 1.0], [1, 2, 8])]
    assert [line[:3] for line in body] == expected
    heads, body = parse(format_table([row(1, clip=None), row(1, checkpoint="b")]))
    assert heads[:3] == ["checkpoint", "clip", "ddim_steps"]
    assert [line[:2] for line in body] == [["runs/a", "None"], ["b", "1.0"]]


SERIES = {
    "one": [row(8), row(1, 1), row(2, 2)],
    "one point": [row(4)],
    "never": [row(1, 0), row(50, 0)],
    "always": [row(1, 4), row(50, 4)],
    "four": four_series(),
    "four never": four_series(0),
    "four always": four_series(4),
}


@pytest.mark.parametrize("name", SERIES)
def test_the_pictures_show_something(tmp_path, name):
    files = [tmp_path / "sweep.png", tmp_path / "sweep.svg"]
    plot_rows(SERIES[name], files, title="planar", margin=None)
    pixels = np.asarray(Image.open(files[0]).convert("RGB"))
    assert pixels.shape == (3.7 * 150, 2 * 4.4 * 150, 3)
    for half in np.array_split(pixels, 2, axis=1):
        coloured = np.ptp(half.astype(int), axis=2) > 60  # a curve, not the black and grey of axes and text
        assert coloured.sum() > 150
    root = ET.parse(files[1]).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    colours = {
        part.split(":")[1].strip()
        for element in root.iter("{http://www.w3.org/2000/svg}path")
        for part in element.get("style", "").split(";")
        if part.strip().startswith("stroke:")
    }
    series = [colour for colour in colours if len(set(colour.strip("#")[i : i + 2] for i in (0, 2, 4))) > 1]
    assert len(series) == (4 if name.startswith("four") else 1)


def labels_of(axes):
    """The tick labels that are drawn, of the x axis and of the y axis."""
    axes.figure.draw_without_rendering()
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        labels = [t.label1 for t in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= t.get_loc() <= high]
        yield [label for label in labels if label.get_visible() and label.get_text()]


def test_notes_of_points_below_the_axis_do_not_overlap():
    differences = {0.0: 0.0, 0.25: -0.6, 0.5: -0.62, 0.75: -0.7, 1.0: -0.72}
    rows = [
        row(k, eta=eta, difference=gap, difference_low=gap - 0.02, difference_high=gap + 0.02)
        for eta, gap in differences.items()
        for k in (1, 2, 8)
    ]
    figure = draw_rows(rows, margin=0.05)
    notes = [note for note in figure.axes[1].texts if note.get_text()[:1] in "+-"]
    assert sorted(note.get_text() for note in notes) == sorted(["-60", "-62", "-70", "-72"] * 3)
    for one, other in itertools.combinations(figure.axes[1].texts, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


@pytest.mark.parametrize(
    ("steps", "latency"),
    [
        ([1, 2, 4, 8, 16, 50], (0.9, 50)),
        ([1, 2, 4, 8, 9, 10], (0.012, 3)),
        (range(1, 17), (1.01, 4.99)),
        pytest.param([90, 95, 100], (3, 3.01), marks=pytest.mark.slow),
        ([4], (3, 3)),
        pytest.param(range(1, 101), (0.06, 900), marks=pytest.mark.slow),
    ],
)
def test_tick_labels_do_not_overlap_and_each_ddim_steps_has_one(steps, latency):
    latencies = np.geomspace(*latency, len(steps))
    figure = draw_rows([row(k, latency_ms_median=ms) for k, ms in zip(steps, latencies, strict=True)], margin=None)
    for axes in figure.axes:
        for labels in labels_of(axes):
            for one, other in itertools.combinations(labels, 2):
                assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)
    by_steps, by_latency = ([label.get_text() for label in next(labels_of(axes))] for axes in figure.axes)
    assert by_steps == [str(k) for k in steps] or (len(steps) == 100 and len(by_steps) > 20)  # no room for 100
    assert len(by_latency) >= min(2, len({*latencies}))


def points_of(rows, tmp_path, monkeypatch):
    """What is drawn, by colour and picture: (x, success, the ends of its interval)."""
    from matplotlib.axes import Axes

    drawn, plain = {}, Axes.errorbar

    def errorbar(axes, x, y, *, yerr, color, **settings):
        assert np.min(yerr) >= 0
        drawn.setdefault(color, []).append(
            [(a, b, b - low, b + high) for a, b, low, high in zip(x, y, *yerr, strict=True)]
        )
        return plain(axes, x, y, yerr=yerr, color=color, **settings)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    plot_rows(rows, [tmp_path / "sweep.svg"], title="planar", margin=None)
    return drawn


def test_a_series_is_drawn_over_ddim_steps_and_over_latency(tmp_path, monkeypatch):
    drawn = points_of(four_series(), tmp_path, monkeypatch)
    names = [line.name for line in facets_of(four_series(), margin=None)[0].legend]
    assert names == [f"eta {eta}, execution_horizon {h}" for h in (4, 8) for eta in (0.0, 1.0)]
    assert list(drawn) == list(LIGHT[:4])
    low, high = (100 * end for end in wilson_interval(3, 4))
    for name, (by_steps, by_latency) in zip(names, drawn.values(), strict=True):
        assert by_steps == [pytest.approx((k, 75, low, high), rel=0.06) for k in (1, 2, 8)]  # series stand side by side
        factor = 2 if name.startswith("eta 1.0") else 1
        assert by_latency == [pytest.approx((k * factor, 75, low, high)) for k in (1, 2, 8)]


def test_a_single_series_is_in_the_order_of_its_steps(tmp_path, monkeypatch):
    (by_steps, _), *others = points_of(SERIES["one"], tmp_path, monkeypatch).values()
    assert others == []
    assert [point[:2] for point in by_steps] == [(1, 25), (2, 50), (8, 75)]


def test_intervals_never_lie_on_the_wrong_side_of_their_rate():
    """Rounding would: the picture's error bars must not be negative."""
    for episodes in range(1, 300):
        for successes in (0, episodes // 2, episodes):
            one = row(1, successes, episodes)
            assert one["success_low"] <= one["success_rate"] <= one["success_high"]
            assert 100 * one["success_rate"] - 100 * one["success_low"] >= 0
            assert 100 * one["success_high"] - 100 * one["success_rate"] >= 0


def test_figures_are_finite(rows):
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def replace_backend(one):
    return dataclasses.replace(one, cell=dataclasses.replace(one.cell, backend="auto"))


def test_auto_takes_the_back_end_of_the_ledger(checkpoints, tmp_path, monkeypatch, capsys):
    ledger = tmp_path / "episodes.jsonl"
    cells = [replace_backend(one) for one in cells_of(checkpoints, ddim_steps=[1, 2])]
    assert {one.cell.backend for one in with_backends(cells, ledger)} == {"fused"}
    assert capsys.readouterr().out == "backend: fused\n"
    ledger.write_text(json.dumps({"cell": "a", "settings": {"backend": "eager", "weights": "float32"}}) + "\n")
    assert {one.cell.backend for one in with_backends(cells, ledger)} == {"eager"}
    ledger.write_text(json.dumps({"cell": "a", "settings": {"backend": "onnx", "weights": "float32"}}) + "\n")
    monkeypatch.setattr("policy.inference.onnx_backend.ONNX_PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match=r"cannot go on here. .*needs the package .*: pip install"):
        with_backends(cells, ledger)


def test_auto_does_not_guess_between_several_back_ends(checkpoints, tmp_path):
    ledger = tmp_path / "episodes.jsonl"
    rows = [{"cell": name, "settings": {"backend": name, "weights": "float32"}} for name in ("fused", "eager")]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [replace_backend(one) for one in cells_of(checkpoints, ddim_steps=[1])]
    with pytest.raises(ValueError, match=r"several back ends: say which with backend=\[fused,eager\]"):
        with_backends(cells, ledger)


def test_an_axis_of_back_ends_with_auto_goes_on(checkpoints, tmp_path):
    """The results of the one that is named belong to its own cells."""
    ledger = tmp_path / "episodes.jsonl"
    rows = [{"cell": name, "settings": {"backend": name, "weights": "float32"}} for name in ("fused", "eager")]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, *_ = cells_of(checkpoints, ddim_steps=[1])
    named = dataclasses.replace(plain, cell=dataclasses.replace(plain.cell, backend="fused"))
    assert [one.cell.backend for one in with_backends([replace_backend(plain), named], ledger)] == ["eager", "fused"]
