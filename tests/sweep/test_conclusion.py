"""What a sweep ends with: the sentence, the report in a browser, merging, and launchers that exist."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from policy.statistics.paired import paired_interval
from policy.statistics.recommendation import recommend
from policy.statistics.results import EpisodeResult
from policy.sweep.conclusion import Swept, answer_of, between_checkpoints, conclude, telling_seeds
from policy.sweep.looks import LookPlan
from policy.sweep.rows import costs_of

CHROMIUM = shutil.which("chromium")


def row(ddim_steps, success):
    return {
        "checkpoint": "c",
        "ddim_steps": ddim_steps,
        "eta": 0.0,
        "spacing": "trailing",
        "clip": 1.0,
        "execution_horizon": 8,
        "success_rate": success,
        "success_low": success - 0.02,
        "success_high": success + 0.02,
        "multiply_adds": 1e6 * ddim_steps / 8,
        "latency_ms_median": 0.5 * ddim_steps,
        "waiting_rate_hz": 2000 / ddim_steps,
        "planning_ahead_rate_hz": 8000 / ddim_steps,
        "busy": False,
    }


def test_the_answer_names_the_cheapest_good_cell_with_its_latency_and_rate():
    success = [[True] * 300 + [False] * 200, [True] * 480 + [False] * 20, [True] * 481 + [False] * 19]
    rows = [row(1, 0.6), row(4, 0.96), row(16, 0.962)]
    advice = recommend(success, costs_of(rows))
    answer = answer_of(rows, advice)
    assert answer.startswith(
        "ddim_steps 4: the cheapest cell that is shown to be not worse than the best by 5 points (95 % sure)"
    )
    rates = "a robot keeps pace up to 500 Hz if it waits, up to 2000 Hz if it plans ahead."
    assert f"Success 96% (94% to 98%), 2.0 ms a chunk: {rates}" in answer
    loud = answer_of([{**r, "busy": True} for r in rows], advice)
    assert f"2.0 ms a chunk (measured on a busy machine, and so too slow): {rates}" in loud
    old = [{name: value for name, value in r.items() if name not in ("waiting_rate_hz", "busy")} for r in rows]
    assert answer_of(old, advice).endswith("2.0 ms a chunk.")


def swept_of(*rows, outcomes):
    results = [
        [EpisodeResult(seed=n, success=s, score=float(s), return_=0.0, steps=1) for n, s in enumerate(solved)]
        for solved in outcomes
    ]
    rows = [{**r, "cell": f"id {n}", "episodes": len(results[n])} for n, r in enumerate(rows)]
    return Swept(rows=rows, results=results, env={"name": "planar"})


def plan_of(*looks):
    """A plan for two cells, of which the second one costs more."""
    return LookPlan(
        asked=(),
        max_ms=None,
        left_out="",
        cells=("id 0", "id 1"),
        recipes=(1, 1),
        cost=(1.0, 2.0),
        seed=0,
        looks=looks,
        margin=0.05,
        alpha=0.0475,
    )


def test_measured_latency_changes_no_recommendation():
    solved = [[True] * 200, [True] * 200, [True] * 199 + [False]]
    horizons = [{**row(4, 1.0), "execution_horizon": h, "multiply_adds": 4e6 / h} for h in (8, 8, 4)]
    for latencies in ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]):
        timed = [{**r, "latency_ms_median": ms} for r, ms in zip(horizons, latencies, strict=True)]
        concluded = conclude(swept_of(*timed, outcomes=solved), margin=0.05)
        assert (concluded.advice.cell, concluded.shown) == (0, [0])
    fewer_calls = [{**row(8, 1.0), "multiply_adds": 1e6}, {**row(4, 1.0), "multiply_adds": 2e6}]
    assert conclude(swept_of(*fewer_calls, outcomes=solved[:2]), margin=0.05).advice.cell == 0


def test_intervals_of_a_sweep_that_may_stop_early_say_what_they_leave_out():
    once = swept_of(row(1, 1.0), row(4, 1.0), outcomes=[[True] * 200] * 2)
    plan = plan_of(100, 200)
    early = conclude(dataclasses.replace(once, plan=plan, alpha=plan.alpha), margin=0.05)
    assert "as if the number of episodes had been fixed beforehand" in early.summary["intervals"]
    assert "beforehand" not in conclude(once, margin=0.05).scope


def test_too_few_episodes_give_no_recommendation_but_say_what_the_difference_would_have_to_be():
    success = [[True, False] * 10, [False, True] * 10]
    answer = answer_of([row(1, 0.5), row(8, 0.5)], recommend(success, [1, 8]))
    assert answer.startswith(
        "No recommendation: no cell is shown to be not worse than the best by 5 points (95 % sure)"
    )
    assert re.search(r"; ddim_steps \d is 0.0 points below ddim_steps \d, and would have to be .* above it", answer)


@pytest.mark.parametrize(
    ("solved", "said"),
    [
        ((0, 0), "no cell solved an episode, so that"),
        ((0, 9), "no cell solved more than 4.5% of its episodes, so that"),
    ],
)
def test_where_no_cell_reaches_the_margin_none_is_recommended(solved, said):
    """A cell that solves nothing is less than the margin below the best one then, and the cheapest."""
    outcomes = [[True] * count + [False] * (200 - count) for count in solved]
    swept = swept_of(row(1, solved[0] / 200), row(8, solved[1] / 200), outcomes=outcomes)
    concluded = conclude(swept, margin=0.05)
    assert concluded.advice.cell is None
    assert concluded.answer.startswith(f"No recommendation: {said} with a margin of 5 points")
    assert "Hz" not in concluded.answer
    assert concluded.facts["how sure"] == "Nothing is recommended."
    assert concluded.facts["what would change it"] == "A better policy, more episodes, or a smaller margin."


def test_where_more_steps_solve_fewer_episodes_less_noise_is_what_to_try():
    outcomes = [[True] * 180 + [False] * 20, [True] * 178 + [False] * 22, [True] * 120 + [False] * 80]
    rows = [row(1, 0.9), row(2, 0.89), row(8, 0.6)]

    def hint(rows, outcomes=outcomes):
        concluded = conclude(swept_of(*rows, outcomes=outcomes), margin=0.05)
        assert concluded.summary.get("what_to_try", "") == concluded.what_to_try
        return concluded.what_to_try

    def with_noise(*scales):
        return [{**r, "noise_scale": scale} for r, scale in zip(rows, scales, strict=True)]

    said = hint(rows)
    assert re.match(r"ddim_steps 8 is 30\.0 points below ddim_steps 1 \(\d+\.\d to \d+\.\d\), perhaps", said)
    assert "sampler.noise_scale=[0,1]" in said
    assert "sampler.noise_scale=[0,0.6]" in hint(with_noise(0.6, 0.6, 0.6))
    assert not hint(rows, outcomes[::-1])  # more steps are better
    assert not hint(rows[:2], outcomes[:2])  # not shown
    assert not hint(with_noise(1, 0, 1))  # it is an axis already
    assert not hint(with_noise(0, 0, 0))  # there is none
    assert not hint([{**r, "candidates": 4} for r in rows])  # they would all be the same
    assert not hint([{**r, "execution_horizon": r["ddim_steps"]} for r in rows])  # another cause is possible
    none = [[True] * 9 + [False] * 191, [False] * 200, [False] * 200]
    assert not hint([row(1, 0.045), row(2, 0.0), row(8, 0.0)], none)  # nothing is recommended


def test_a_cell_that_reaches_the_margin_can_be_recommended():
    outcomes = [[False] * 200, [True] * 10 + [False] * 190]
    once = conclude(swept_of(row(1, 0.0), row(8, 0.05), outcomes=outcomes), margin=0.05)
    assert once.advice.cell == 1
    assert "ddim_steps 8" in once.answer


def test_a_sweep_that_stops_early_without_success_says_what_decided_it():
    failed = swept_of(row(1, 0.0), row(4, 0.0), outcomes=[[False] * 200] * 2)
    plan = plan_of(200, 400)
    early = conclude(dataclasses.replace(failed, plan=plan, alpha=plan.alpha), margin=0.05)
    assert early.advice.cell is None
    assert early.answer.endswith("good enough. 400 of at most 800 episodes decided this.")


def test_episodes_that_tell_cells_apart_are_shown_first_and_failures_are_not_hidden():
    def results(*solved):
        return [EpisodeResult(seed=n, success=s, score=float(s), return_=0.0, steps=1) for n, s in enumerate(solved)]

    cells = [results(True, False, False, True), results(True, False, True, True)]
    assert telling_seeds(cells, 3) == [2, 0, 1]
    assert telling_seeds(cells, 4) == [2, 0, 1, 3]
    assert telling_seeds(cells, 0) == []


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


@pytest.fixture(scope="session")
def swept(planar_run, run_command, made_once):
    """The folder of a sweep of four cells, with what the command printed in `out.txt`."""

    def sweep(folder):
        settings = ["ddim_steps=[2,4]", "sampler.eta=[0.0,1.0]", "episodes=8", "videos=2", f"output_dir={folder}"]
        done = run_command("sweep", f"checkpoint={planar_run}/checkpoint", *settings)
        (folder / "out.txt").write_text(done.stdout)

    return made_once("swept", sweep)


def test_the_report_is_one_file_that_needs_no_other(swept):
    text = (swept / "report.html").read_text()
    page = Page(text)
    assert page.links
    assert all(link.startswith(("data:video/mp4;base64,", "#")) for link in page.links)
    assert "url(http" not in text
    assert page.tags.count("svg") == 3 + 2  # the panels, and the legend's two lines
    assert page.tags.count("tr") == 5
    assert 4 <= page.tags.count("video") <= 6  # two episodes at the cheapest, the recommended and the best cell
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert json.loads((swept / "sweep.json").read_text())["answer"] in (swept / "out.txt").read_text()


def test_each_row_says_how_it_compares_with_the_best(swept):
    rows = json.loads((swept / "sweep.json").read_text())["cells"]
    best = max(rows, key=lambda r: r["success_rate"])["success_rate"]
    for cell in rows:
        assert cell["difference"] == pytest.approx(cell["success_rate"] - best)
        assert cell["difference_low"] <= cell["difference"] <= cell["difference_high"]
        assert cell["not_worse"] in ("not worse", "worse", "open")
        assert 0 <= cell["p_value"] <= 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme", "background"), [(1200, 1, "255, 255, 255"), (390, 0, "20, 24, 29")])
def test_a_browser_shows_the_report_on_a_screen_and_on_a_phone_light_and_dark(
    swept, tmp_path, width, scheme, background
):
    probe = """<script>window.onload = () => {
      const video = document.querySelector("video");
      const done = () => { document.title = JSON.stringify({
        overflow: document.documentElement.scrollWidth - window.innerWidth, width: window.innerWidth,
        background: getComputedStyle(document.body).backgroundColor, frames: video.videoWidth,
        panels: [...document.querySelectorAll(".panels svg")].map(svg => svg.getBoundingClientRect().width),
        text: [...document.querySelectorAll(".panels text")].map(e => e.getBoundingClientRect().height),
      }); };
      video.readyState > 0 ? done() : video.onloadedmetadata = done;
    };</script></body>"""
    page = tmp_path / "page.html"
    page.write_text((swept / "report.html").read_text().replace("</body>", probe))
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},900",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:300]
    seen = json.loads(title[1])
    assert seen["overflow"] <= 0  # wide tables scroll inside the page, not with it
    assert seen["background"] == f"rgb({background})"
    assert len(seen["panels"]) == 3
    assert all(300 < panel < seen["width"] for panel in seen["panels"])  # side by side, or below each other
    assert min(seen["text"]) > 10  # pixels
    assert seen["frames"] > 0


def test_cells_that_ran_apart_are_merged_into_the_same_sweep(swept, planar_run, run_command, plain_reports, tmp_path):
    for steps in (2, 4):
        run_command(
            "sweep",
            f"checkpoint={planar_run}/checkpoint",
            f"ddim_steps={steps}",
            "sampler.eta=[0.0,1.0]",
            "episodes=8",
            "videos=0",
            f"output_dir={tmp_path}/{steps}",
        )
    out = run_command("sweep", f"merge=[{tmp_path}/2,{tmp_path}/4]", f"output_dir={tmp_path}/all").stdout
    assert "| ddim_steps |" in out
    whole = episodes_of(swept)
    assert episodes_of(tmp_path / "all") == whole
    assert len(whole) == 32
    twice = run_command("sweep", f"merge=[{tmp_path}/2,{tmp_path}/2]", f"output_dir={tmp_path}/x", check=2).stderr
    assert "repeats the cell" in twice
    other = run_command("sweep", f"merge=[{tmp_path}/none]", f"output_dir={tmp_path}/x", check=2).stderr
    assert "holds no finished sweep" in other
    run = ["checkpoint=x", "episodes=5", "ddim_steps=[1,2]", "adaptive=false", "max_ms=20", "watch=true"]
    both = run_command("sweep", f"merge=[{tmp_path}/1]", *run, check=2).stderr
    assert "leave checkpoint=, episodes=, ddim_steps=, adaptive=, max_ms=, watch= out" in both


def episodes_of(folder):
    with (folder / "episodes.csv").open() as file:
        return {tuple(episode.items()) for episode in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_that_exist_run_a_cell_a_job(launcher, planar_run, run_script, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    run_script(
        "sweep",
        "--multirun",
        f"checkpoint={planar_run}/checkpoint",
        "ddim_steps=1,4",
        "episodes=6",
        "videos=0",
        "workers=1",
        f"hydra/launcher={launcher}",
        f"hydra.sweep.dir={tmp_path}",
    )
    run_script("sweep", f"merge=[{tmp_path}/0,{tmp_path}/1]", f"output_dir={tmp_path}/all")
    rows = json.loads((tmp_path / "all" / "sweep.json").read_text())["cells"]
    assert [cell["ddim_steps"] for cell in rows] == [1, 4]


def compared_cells(*cells, paired=True):
    """The comparisons between checkpoints of cells, given as (checkpoint, ddim_steps, outcomes)."""
    rows = [
        {**row(steps, sum(solved) / len(solved)), "checkpoint": checkpoint, "cell": f"{checkpoint}{steps}"}
        for checkpoint, steps, solved in cells
    ]
    return between_checkpoints(rows, [solved for *_, solved in cells], paired=paired)


def test_checkpoints_are_compared_at_their_cheapest_cell_with_the_first_ones_most_expensive():
    slow, fast, other = [True] * 380 + [False] * 20, [True] * 376 + [False] * 24, [True] * 400
    cells = [("slow", 1, other), ("slow", 100, slow), ("fast", 8, other), ("fast", 1, fast), ("third", 2, other)]
    found, third = compared_cells(*cells)
    assert (found["cell"], found["reference"]) == ("fast1", "slow100")
    low, high = paired_interval(0, 4, 400)
    assert found["difference"] == pytest.approx(-0.01)
    assert (found["difference_low"], found["difference_high"]) == (pytest.approx(low), pytest.approx(high))
    assert found["sentence"] == (
        "ddim_steps 1, checkpoint fast differs from ddim_steps 100, checkpoint slow by -1.0 points (95 %:"
        f" {100 * low:+z.1f} to {100 * high:+z.1f}) of success, over 400 episodes; a chunk takes 0.5 ms instead of"
        " 50.0."
    )
    assert (third["cell"], third["difference"]) == ("third2", pytest.approx(0.05))
    wide = compared_cells(*cells, paired=False)[0]
    assert wide["difference_low"] < low
    assert compared_cells(*cells[:2]) == []
