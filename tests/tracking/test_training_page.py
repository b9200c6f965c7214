"""The page of a training run: everything that its history holds, in one file, whenever it is looked at."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from policy.common.panel import MOST_POINTS, Point, thinned
from policy.statistics.intervals import wilson_interval
from policy.tracking.tracker import NoTracker, SentToAll
from policy.tracking.training_page import TrainingFacts, TrainingPage, panels_of, training_page, video_name

CHROMIUM = shutil.which("chromium")
NASTY = """<b>&"it's" {{ seed }} é</b>"""


def entry(step, **others):
    return {"step": step, "train/loss": 1 / step, "train/learning_rate": 1e-3, **others}


HISTORY = [
    entry(10),
    entry(20, **{"val/loss": 0.5}),
    entry(30, **{"rollout/success_rate": 0.75, "rollout/score_mean": 0.8, "rollout/return_mean": 3.0}),
]


def facts(**changes):
    given = {"title": "Training: planar", "all_steps": 40, "phases": [], "rollout_episodes": 4, "settings": {"seed": 0}}
    return TrainingFacts(**{**given, **changes})


class Page(HTMLParser):
    """The elements of a page, and the text within each kind."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "path", "circle"):
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data


def page_of(folder):
    return Page((folder / "training.html").read_text(encoding="utf-8"))


def test_the_charts_hold_the_whole_history_and_intervals_of_its_rollouts():
    history = [*HISTORY, entry(40, **{"train/loss": float("nan"), "val/loss": float("inf")})]
    losses, rollouts, rate = panels_of(history, 40, 4, [(30, "best")])
    train, held_out = losses.lines
    assert [(p.x, p.y) for p in train.points] == [(10, 0.1), (20, 0.05), (30, 1 / 30)]
    assert [(p.x, p.y) for p in held_out.points] == [(20, 0.5)]
    success, score = rollouts.lines
    low, high = wilson_interval(3, 4)
    assert [(p.x, p.y, p.low, p.high) for p in success.points] == [(30, 75, 100 * low, 100 * high)]
    assert [p.y for p in score.points] == [80]
    assert rate.note == "times 1e-3"
    assert [p.y for p in rate.lines[0].points] == 4 * [1]
    for panel in (losses, rollouts, rate):
        assert (panel.x.low, panel.x.high) == (0, 40)
        assert panel.places == [(30, "best")]
    assert panels_of([], 40, 4) == []


def test_errors_have_a_chart_and_their_meaning_stands_on_the_page_once_training_is_complete(tmp_path):
    logs = {"val/sampled_chunk_error": 0.6, "val/averaged_chunk_error": 0.5, "train/averaged_chunk_error": 0.2}
    history = [entry(20, **logs), entry(40, **logs, **{"val/neighbour_chunk_error": 0.7})]
    errors = panels_of(history, 40, 4)[1]
    assert [[p.y for p in line.points] for line in errors.lines] == [[0.6, 0.6], [0.5, 0.5], [0.2, 0.2], [0.7]]
    assert len({line.style for line in errors.lines}) == 4
    for log, said in ((history[:1], False), (history, True)):
        TrainingPage(tmp_path, facts(), log, lambda: None)
        assert ("too few held-out episodes" in (tmp_path / "training.html").read_text()) is said


def test_what_chunks_correct_has_a_chart_with_the_numbers_that_are_corrected_least():
    last = {f"recovery/state[{number}]": (number * 7 % 10) / 10 for number in range(10)}
    history = [entry(20, **{**dict.fromkeys(last, 0.05), "train/stalls": 0.1}), entry(40, **last)]
    corrected = panels_of(history, 40, 4)[1]
    assert corrected.title == "What a chunk corrects"
    shown = [number for number in range(10) if number * 7 % 10 < 8]
    assert [line.name for line in corrected.lines] == [f"state[{number}]" for number in shown]
    assert [[p.y for p in line.points] for line in corrected.lines] == [[5, 10 * (number * 7 % 10)] for number in shown]
    assert len({line.style for line in corrected.lines}) == 8


def test_a_long_history_is_thinned_and_keeps_its_extremes():
    points = [Point(x=step, y=1 / (1 + step)) for step in range(10_000)]
    points[1234] = Point(x=1234, y=99.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert points[1234] in kept
    assert [p.x for p in kept] == sorted({p.x for p in kept})
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_the_page_needs_nothing_else_and_shows_what_looks_like_markup_as_it_is(tmp_path):
    (tmp_path / "training_videos").mkdir()
    for step in (30, 20, 10, 50, 40, 60):
        (tmp_path / "training_videos" / video_name(step, 50_000, success=step > 20)).write_bytes(f"v{step}".encode())
    (tmp_path / "training_videos" / "of_somebody_else.mp4").write_bytes(b"x")
    TrainingPage(tmp_path, facts(title=NASTY, settings={NASTY: NASTY}), HISTORY, lambda: (30, NASTY))
    page = page_of(tmp_path)
    assert page.text["h1"] == [NASTY]
    assert page.text["dd"][0] == NASTY
    assert page.text["dd"][-1] == NASTY
    assert "b" not in page.tags
    assert page.tags.count("svg") == 3 + 4  # three charts, and the lines in the legends of two
    shown = [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in page.sources]
    assert shown == [b"v10", b"v20", b"v50", b"v60"]  # the first and the newest
    assert page.text["figcaption"] == [
        "step 10, episode 50000: failure",
        "step 20, episode 50000: failure",
        "step 50, episode 50000: success",
        "step 60, episode 50000: success",
    ]


@pytest.mark.parametrize(
    ("steps", "error", "words"),
    [
        (40, None, "Trained to its end: step 40 of 40"),
        (30, None, "Stopped and saved: step 30 of 40"),
        (30, FloatingPointError("the loss is inf"), "Ended by an error (the loss is inf): step 30 of 40"),
    ],
)
def test_it_says_how_the_run_ended_and_loads_itself_again_only_before(tmp_path, steps, error, words):
    history = HISTORY[:]
    try:
        with training_page(tmp_path, facts(), history, lambda: None) as page:
            assert "location.reload" in (tmp_path / "training.html").read_text()
            if steps == 40:
                history.append(entry(40))
            page.log({"train/loss": 1.0}, steps)
            if error:
                raise error
    except FloatingPointError:
        assert error
    assert words in page_of(tmp_path).text["p"][0]
    assert "location.reload" not in (tmp_path / "training.html").read_text()


def test_losses_alone_do_not_rewrite_the_page_at_once_and_a_rollout_does(tmp_path):
    history = HISTORY[:1]
    page = TrainingPage(tmp_path, facts(), history, lambda: None)
    both = SentToAll(NoTracker(), page)
    before = (tmp_path / "training.html").read_text()
    history.append(HISTORY[1])
    both.log({"train/loss": 0.05}, 20)
    assert (tmp_path / "training.html").read_text() == before
    history.append(HISTORY[2])
    both.log({"rollout/success_rate": 0.75}, 30)
    assert "step 30 of 40" in page_of(tmp_path).text["p"][0]


def test_a_page_that_cannot_be_written_costs_a_warning(tmp_path):
    page = TrainingPage(tmp_path, facts(), HISTORY, lambda: None)
    (tmp_path / "training.html").unlink()
    (tmp_path / "training.html").mkdir()
    with pytest.warns(UserWarning, match="was not written.*training goes on"):
        page.write("Running")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
def test_a_browser_shows_it_on_a_phone(tmp_path):
    TrainingPage(tmp_path, facts(settings={"dataset": 300 * "x"}), HISTORY, lambda: (30, "step 30")).write("Stopped")
    probe = """<script>window.onload = () => { document.title = JSON.stringify({
      overflow: document.documentElement.scrollWidth - window.innerWidth,
      panels: [...document.querySelectorAll(".panels svg")].map(svg => svg.getBoundingClientRect().width),
    }); }</script></body>"""
    path = tmp_path / "page.html"
    path.write_text((tmp_path / "training.html").read_text().replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout)[1])
    assert seen["overflow"] <= 0
    assert sum(width > 300 for width in seen["panels"]) == 3
