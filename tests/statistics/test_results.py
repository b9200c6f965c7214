"""An episode's result as a row of a file, the summary of many, and what a summary loads."""

import json
import subprocess
import sys

import numpy as np
import pytest

from policy.statistics.results import EpisodeResult, format_summary, summarize
from tests.conftest import ENVIRONMENT, ROOT


def test_the_row_of_a_result_calls_its_return_return_and_gives_the_result_back():
    row = {"seed": 3, "success": True, "score": 0.3, "return": 15.0, "steps": 5, "late_steps": 0, "attempts": 1}
    assert EpisodeResult(seed=3, success=True, score=0.3, return_=15.0, steps=5).row() == row
    again = EpisodeResult(seed=3, success=False, score=1 / 3, return_=-1e-17, steps=5, late_steps=2, attempts=3)
    assert EpisodeResult.from_row(json.loads(json.dumps(again.row()))) == again
    for name in row.keys() - {"late_steps"}:
        with pytest.raises(KeyError, match=name):
            EpisodeResult.from_row({key: value for key, value in row.items() if key != name})


def test_a_row_written_before_delays_were_simulated_has_no_late_steps():
    row = EpisodeResult(seed=3, success=True, score=0.3, return_=15.0, steps=5).row()
    del row["late_steps"]
    assert EpisodeResult.from_row(row).late_steps == 0


def test_summary_figures():
    results = [
        EpisodeResult(seed=i, success=i < 45, score=1.0 if i < 45 else 0.5, return_=float(i), steps=10 + i)
        for i in range(50)
    ]
    summary = summarize(results)
    low, high = summary.pop("success_low"), summary.pop("success_high")
    score_low, score_high = summary.pop("score_low"), summary.pop("score_high")
    # One more observation at either bound, weights drawn uniformly (Learned-Miller and Thomas 2019), by hand.
    draw = np.random.default_rng(0).dirichlet
    lower = draw([1, 5, 45], 200_000) @ [0.0, 0.5, 1.0]
    upper = draw([5, 46], 200_000) @ [0.5, 1.0]
    by_hand = (np.quantile(lower, 0.025), np.quantile(upper, 0.975))
    assert (score_low, score_high) == pytest.approx(by_hand, abs=0.005)
    assert summary == {
        "episodes": 50,
        "successes": 45,
        "success_rate": 0.9,
        "score_mean": pytest.approx(0.95),
        "return_mean": 24.5,
        "steps_mean": 34.5,
        "late_steps_mean": 0.0,
        "broke_off": 0,
    }
    z, p, n = 1.959963984540054, 0.9, 50  # Wilson (1927), by hand
    centre, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx(((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)))
    line = format_summary(summarize(results))
    assert line == (
        f"success 90% (45 of 50, 95 % 79% to 96%), score 0.950 ({score_low:.3f} to {score_high:.3f}),"
        " return 24.5, 34 control steps"
    )


def test_nothing_to_summarize_is_refused():
    with pytest.raises(ValueError, match="got 0 of 0: count finished episodes"):
        summarize([])


def test_a_summary_needs_neither_scipy_nor_torch():
    """In a process of its own: a rollout should start at once, and scipy.stats alone takes a second to import."""
    program = """
import sys
from policy.statistics.results import EpisodeResult, format_summary, summarize
results = [EpisodeResult(seed=i, success=i > 3, score=i / 9, return_=i, steps=i) for i in range(10)]
print(format_summary(summarize(results)))
print(*sorted({name.split(".")[0] for name in sys.modules} & {"scipy", "torch", "gymnasium", "matplotlib"}))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    line, heavy = done.stdout.splitlines()
    assert line.startswith("success 60% (6 of 10, 95 % 31% to 83%), score 0.500 (")
    assert heavy == ""
