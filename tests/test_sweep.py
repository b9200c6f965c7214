"""The sweep: cells that can be compared, and three files that say the same."""

import csv
import json
import math

import pytest
import torch

from envs.planar import PlanarEnv
from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.evaluation import run_in_process, summarize
from policy.sweep import check_cells, format_table, plot_rows, run_sweep, write_rows
from policy.workers import RolloutPool

SEEDS = range(70, 76)
CELLS = [4, 1, 2]
SAMPLER = Sampler(eta=0.5, spacing="linspace", clip=2.0)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        PolicyConfig(
            observation_shapes={"state": (4,)},
            action_dim=2,
            obs_size=16,
            encoder={"name": "state", "hidden_size": 32},
            denoiser={"name": "modulated_mlp", "hidden_size": 32, "num_layers": 1},
            schedule={"num_steps": 20, "beta_schedule": "squaredcos_cap_v2"},
        )
    ).eval()
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


@pytest.fixture(scope="module")
def swept(policy):
    """The rows, and the results of each cell as they were reported."""
    seen = {cell: [] for cell in CELLS}
    with RolloutPool(policy, PlanarEnv, 1) as pool:
        rows = list(
            run_sweep(
                policy,
                pool,
                ddim_steps=CELLS,
                seeds=SEEDS,
                sampler=SAMPLER,
                execution_horizon=4,
                on_episode=lambda steps, result: seen[steps].append(result),
            )
        )
    return rows, seen


def test_each_cell_is_a_row_of_its_own_results(policy, swept):
    rows, seen = swept
    assert [row["ddim_steps"] for row in rows] == CELLS
    for row in rows:
        results = seen[row["ddim_steps"]]
        assert [result.seed for result in results] == list(SEEDS)  # the same episodes in every cell
        assert {key: row[key] for key in summarize(results)} == summarize(results)
        assert (row["eta"], row["spacing"], row["clip"], row["execution_horizon"]) == (0.5, "linspace", 2.0, 4)
        assert row["control_rate_hz"] == pytest.approx(4 / (row["latency_ms_median"] / 1000))
    assert len({tuple(result.score for result in results) for results in seen.values()}) == 3


def test_a_cell_is_the_rollout_with_that_many_steps(policy, swept):
    for cell, results in swept[1].items():
        sampler = Sampler(ddim_steps=cell, eta=0.5, spacing="linspace", clip=2.0)
        assert run_in_process(policy, [PlanarEnv()], SEEDS, sampler=sampler, execution_horizon=4) == results


def test_csv_and_json_say_the_same(swept, tmp_path):
    rows, _ = swept
    rows = [*rows[:2], {**rows[2], "clip": None}]
    write_rows(rows, tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text()) == rows
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [list(row) for row in table] == [list(row) for row in rows]
    assert table == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    assert [float(row["latency_ms_median"]) for row in table] == [row["latency_ms_median"] for row in rows]


def test_the_table_is_markdown_with_the_rows_figures(swept):
    rows, _ = swept
    lines = format_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert len({len(line) for line in lines}) == 1  # aligned
    assert {len(row) for row in cells} == {11}
    assert all(set(cell) == {"-", ":"} and cell.endswith(":") and len(cell) >= 2 for cell in cells[1])
    assert len(lines) == 2 + len(rows)
    for row, printed in zip(rows, cells[2:], strict=True):
        shown = dict(zip(cells[0], printed, strict=True))
        assert shown["ddim_steps"] == str(row["ddim_steps"])
        assert shown["success"] == f"{100 * row['success_rate']:.0f}%"
        assert float(shown["score"]) == pytest.approx(row["score_mean"], abs=5e-4)
        assert printed[5:7] == [f"{row['score_low']:.3f}", f"{row['score_high']:.3f}"]
        assert float(shown["ms a chunk"]) == pytest.approx(row["latency_ms_median"], abs=0.051)


def row(ddim_steps, successes, episodes):
    from policy.statistics import wilson_interval

    low, high = wilson_interval(successes, episodes)
    return {
        "ddim_steps": ddim_steps,
        "episodes": episodes,
        "success_rate": successes / episodes,
        "success_low": low,
        "success_high": high,
        "score_mean": 0.5,
        "latency_ms_median": 0.5 * ddim_steps,
    }


@pytest.mark.parametrize("episodes", [1, 3, 10, 49, 50, 97, 200])
def test_the_picture_is_a_png_also_at_no_and_at_full_success(tmp_path, episodes):
    rows = [row(1, 0, episodes), row(8, episodes, episodes), row(2, episodes // 2, episodes)]
    plot_rows(rows, tmp_path / "sweep.png", title="planar")
    data = (tmp_path / "sweep.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert (width, height) == (9 * 150, 4 * 150)


def test_intervals_never_lie_on_the_wrong_side_of_their_rate():
    """Rounding would: the picture's error bars must not be negative."""
    for episodes in range(1, 300):
        for successes in (0, episodes // 2, episodes):
            one = row(1, successes, episodes)
            assert one["success_low"] <= one["success_rate"] <= one["success_high"]
            assert 100 * one["success_rate"] - 100 * one["success_low"] >= 0
            assert 100 * one["success_high"] - 100 * one["success_rate"] >= 0


def test_cells_within_the_schedule_are_accepted():
    check_cells([1, 50, 7, 100], 100)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([], "ddim_steps is empty: give one or more"),
        ([1, 2, 1], r"must not repeat a value; got \[1, 2, 1\]"),
        ([1, 101], "101"),
        ([0], "0"),
        ([4, -1], "-1"),
    ],
)
def test_cells_that_make_no_sweep_are_refused(cells, message):
    with pytest.raises(ValueError, match=message):
        check_cells(cells, 100)


def test_latency_grows_over_the_cells(swept):
    latency = {row["ddim_steps"]: row["latency_ms_median"] for row in swept[0]}
    assert 0 < latency[1] < latency[4]
    assert all(math.isfinite(row["control_rate_hz"]) for row in swept[0])
