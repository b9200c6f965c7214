"""The report's page: everything it is given stands in it as text, in its place."""

import base64
import html
import itertools
from html.parser import HTMLParser

import numpy as np
import pytest

from policy.common.panel import DARK, LIGHT
from policy.common.terminal import printable
from policy.statistics.recommendation import recommend
from policy.sweep.facts import facts_of
from policy.sweep.panels import facets_of
from policy.sweep.plot import plot_rows
from policy.sweep.report import Clip, write_report
from policy.sweep.table import table_cells

NASTY = """<b>&"it's" {{ seed }} $title é</b>"""


def row(ddim_steps, success=0.5):
    return {
        "checkpoint": "runs/a",
        "ddim_steps": ddim_steps,
        "episodes": 4,
        "success_rate": success,
        "success_low": success / 2,
        "success_high": (1 + success) / 2,
        "score_mean": 0.5,
        "score_low": 0.25,
        "score_high": 0.75,
        "return_mean": 1.5,
        "steps_mean": 20.0,
        "latency_ms_median": 0.5 * ddim_steps,
        "waiting_rate_hz": 2000 / ddim_steps,
        "planning_ahead_rate_hz": 8000 / ddim_steps,
        "busy": False,
    }


class Page(HTMLParser):
    """The text and the sources of each kind of element; the plots apart, whose own elements count for nothing here."""

    def __init__(self, text):
        super().__init__()
        self.text, self.classes, self.sources, self.open, self.plots = {}, [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "svg":
            self.plots += 1
        if tag in ("meta", "link"):
            return
        self.open.append(tag)
        if "svg" not in self.open:
            self.text.setdefault(tag, []).append("")
            self.classes += [(tag, value) for name, value in attrs if name == "class"]
            self.sources += [value for name, value in attrs if name == "src"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every element is closed where it was opened

    def handle_data(self, data):
        if "svg" not in self.open and self.open:
            self.text[self.open[-1]][-1] += data


@pytest.fixture
def write(tmp_path):
    def write(rows, **changes):
        settings = {
            "title": "planar",
            "answer": "ddim_steps 4",
            "chosen": 0,
            "differences": [f"difference {number}" for number in range(len(rows))],
            "clips": [],
            "without_clips": "nothing was recorded",
            "settings": {"margin": 0.05},
        }
        write_report(tmp_path / "report.html", rows, **{**settings, **changes})
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


def test_what_looks_like_markup_is_shown_as_it_is(write, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"video")
    page = write(
        [row(1), row(4)],
        title=NASTY,
        answer=NASTY,
        differences=[NASTY, "best"],
        clips=[Clip(seed=7, caption=NASTY, file=tmp_path / "a.mp4")],
        settings={NASTY: {"name": NASTY}, "items": None},
    )
    assert (page.text["title"], page.text["h1"]) == ([NASTY], [NASTY])
    assert page.text["figcaption"] == [NASTY]
    assert page.text["p"][0] == NASTY
    assert NASTY in page.text["td"]
    assert page.text["dt"] == [NASTY, "items"]
    assert page.text["dd"] == [str({"name": NASTY}), "None"]
    assert "b" not in page.text
    page = write([row(1)], without_clips=NASTY)
    assert NASTY in page.text["p"]
    assert "video" not in page.text


def test_names_are_drawn_as_they_stand(write, tmp_path):
    names = ["a$b", r"$\frac$", "_x", "</text><script>x</script>", "a\x1b[2J\nb", "{x}", "%s"]
    rows = [{**row(1), "checkpoint": name} for name in names]
    page = write(rows, title="".join(names))
    assert page.plots == 2 + len(names)  # two panels, and each line of the legend
    assert "script" not in page.text
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\x1b" not in text
    for name in names:
        assert f"checkpoint {html.escape(printable(name), quote=False)}".splitlines()[0] in text
    plot_rows(rows, [tmp_path / "plot.png"], title="".join(names), margin=None)
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize("chosen", [0, 1, None])
def test_each_cell_is_a_line_and_the_recommended_one_is_marked(write, chosen):
    page = write([row(1, 0.25), row(4, 1.0)], chosen=chosen)
    assert page.text["th"][0] == "ddim_steps"
    assert page.text["th"][-1] == "against the best"
    width = len(page.text["th"])
    lines = [page.text["td"][start : start + width] for start in range(0, len(page.text["td"]), width)]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        ("1", "25%", "difference 0"),
        ("4", "100%", "difference 1"),
    ]
    marked = [name == "chosen" for tag, name in page.classes if tag == "tr"]
    assert len(marked) == (0 if chosen is None else 1)
    assert len(page.text["tr"]) == 3
    assert page.plots == 2


def test_the_marked_line_is_the_recommended_one(write, tmp_path):
    write([row(1), row(4)], chosen=1)
    before, marked = (tmp_path / "report.html").read_text().split('<tr class="chosen">')
    assert "difference 0" in before
    assert "difference 1" in marked
    assert "difference 1" not in before


def test_clips_of_one_episode_stand_side_by_side_in_the_order_given(write, tmp_path):
    clips = []
    for seed in (9, 3):
        for steps in (1, 4):
            file = tmp_path / f"{steps}_{seed}.mp4"
            file.write_bytes(f"{steps} {seed}".encode() * 99)
            clips.append(Clip(seed=seed, caption=f"ddim_steps {steps}", file=file))
    page = write([row(1), row(4)], clips=[clips[0], clips[2], clips[1], clips[3]])
    assert page.text["h3"] == ["Episode 9", "Episode 3"]
    assert page.text["figcaption"] == ["ddim_steps 1", "ddim_steps 4"] * 2
    assert page.classes.count(("div", "clips")) == 2
    content = [base64.b64decode(source.removeprefix("data:video/mp4;base64,")) for source in page.sources]
    assert content == [clip.file.read_bytes() for clip in clips]


def test_the_number_of_differences_must_be_that_of_the_rows(write):
    with pytest.raises(ValueError):
        write([row(1), row(4)], differences=["best"])


def test_the_page_opens_with_the_sentence_and_its_facts(write, tmp_path):
    page = write([row(1), row(4)], facts={"how sure": NASTY, "episodes": "8"})
    assert page.text["dt"][:2] == ["how sure", "episodes"]
    assert page.text["dd"][:2] == [NASTY, "8"]
    text = (tmp_path / "report.html").read_text()
    assert text.index("<h1>") < text.index('class="answer"') < text.index("how sure") < text.index("<svg")


def cell(ddim_steps, success, half=0.01, **others):
    interval = {"success_low": success - half, "success_high": min(1.0, success + half)}
    return {**row(ddim_steps, success), **interval, **others}


@pytest.mark.parametrize(
    ("success", "ends"),
    [([0.92, 0.99], (90, 100)), ([0.985, 0.99], (95, 100)), ([0.3, 0.99], (0, 100)), ([0.02, 0.08], (0, 10))],
)
def test_the_axis_shows_the_range_that_decides_and_says_so(success, ends):
    rows = [cell(steps, rate) for steps, rate in zip((1, 4), success, strict=True)]
    (facet,) = facets_of(rows, margin=None)
    for panel in facet.panels:
        assert (panel.y.low, panel.y.high) == ends
        assert panel.note.endswith(f"axis from {ends[0]} to {ends[1]}")


def test_differences_have_a_panel_where_cells_far_below_the_best_are_arrows(write):
    differences = [(-0.5, -0.6, -0.4), (-0.02, -0.04, 0.01), (0.0, -0.02, 0.02)]
    rows = [
        cell(steps, 0.9, difference=d, difference_low=low, difference_high=high)
        for steps, (d, low, high) in zip((1, 2, 4), differences, strict=True)
    ]
    (facet,) = facets_of(rows, margin=0.05, chosen=1)
    _, panel, _ = facet.panels
    assert (panel.y.low, panel.y.high) == (-20, 2)
    assert "simultaneous" in panel.note
    assert "▼ lies below" in panel.note
    assert [height for height, _ in panel.levels] == [0, -5]
    (line,) = panel.lines
    assert [(p.y, p.low, p.high, p.note) for p in line.points] == [
        (-50, -60, -40, "-50"),
        (-2, -4, 1, ""),
        (0, -2, 2, ""),
    ]
    assert [point.ringed for point in line.points] == [False, True, False]
    assert write(rows, chosen=1, margin=0.05).plots == 3


def test_cells_that_stopped_at_an_earlier_look_are_hollow_and_say_after_how_many_episodes():
    rows = [
        cell(1, 0.5, episodes=100, stopped=100),
        cell(2, 0.9, episodes=600, stopped=600),
        cell(4, 0.9, episodes=600, stopped=200),
    ]
    (facet,) = facets_of(rows, margin=None)
    assert [(p.hollow, p.note) for p in facet.panels[0].lines[0].points] == [(True, "100"), (False, ""), (True, "200")]
    heads, *lines = table_cells(rows)
    assert [line[heads.index("episodes")] for line in lines] == ["100", "600", "600"]


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"eta": 2, "execution_horizon": 4}, [""]),
        ({"eta": 2, "execution_horizon": 6}, ["eta 0", "eta 1"]),
        ({"checkpoint": 20}, ["series 1 to 8", "series 9 to 16", "series 17 to 20"]),
    ],
)
def test_more_than_eight_series_are_spread_over_facets_with_the_same_axes(axes, names):
    values = itertools.product(*(range(count) for count in axes.values()))
    rows = [cell(1, 0.5 + 0.01 * n, **dict(zip(axes, chosen, strict=True))) for n, chosen in enumerate(values)]
    facets = facets_of(rows, margin=None)
    assert [facet.name for facet in facets] == names
    assert sum(len(facet.legend) for facet in facets) == len(rows)
    assert max(len(facet.legend) for facet in facets) <= 8
    assert len({(panel.y.low, panel.y.high) for facet in facets for panel in facet.panels}) == 1


def test_a_sweep_that_runs_has_a_page_without_latencies_and_one_without_any_episode(write):
    known = ("checkpoint", "ddim_steps", "episodes", "success_rate", "success_low", "success_high")
    page = write([{key: row(steps)[key] for key in known} for steps in (1, 4)], differences=[], chosen=None)
    assert page.plots == 1
    assert "ms a chunk" not in page.text["th"]
    assert write([], differences=[], chosen=None).plots == 0


# Machado, Oliveira and Fernandes 2009: linear RGB as people without red, green or blue cones see it.
VISIONS = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    value = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(light):
    xyz = TO_XYZ @ np.clip(light, 0, 1) / TO_XYZ.sum(1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("colours", "background"), [(LIGHT, "#ffffff"), (DARK, "#14181d")])
def test_the_colours_differ_for_every_kind_of_colour_vision_and_from_the_background(colours, background):
    for vision in VISIONS.values():
        seen = [lab(np.array(vision) @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 20
    for colour in colours:
        dark, bright = sorted(TO_XYZ[1] @ linear(each) for each in (colour, background))
        assert (bright + 0.05) / (dark + 0.05) > 3  # WCAG 2.2, 1.4.11


def test_the_facts_name_the_cell_that_could_change_the_answer():
    solved = [[True] * 120 + [False] * 80, [True] * 192 + [False] * 8, [True] * 193 + [False] * 7]
    compared = [(-0.365, -0.5, -0.3), (-0.005, -0.03, 0.02), (0.0, -0.02, 0.02)]
    rows = [
        {
            **cell(steps, sum(outcomes) / 200, episodes=200, difference=d, difference_low=low, difference_high=high),
            "execution_horizon": 8,
        }
        for steps, outcomes, (d, low, high) in zip((1, 4, 16), solved, compared, strict=True)
    ]
    found = facts_of(rows, recommend(solved, [1, 4, 16]))
    assert list(found) == ["how sure", "episodes", "what would change it"]
    assert found["how sure"].startswith("95 %")
    assert found["episodes"] == "200 a cell, the same in each cell, 600 in all."
    assert found["what would change it"].startswith(
        "ddim_steps 1, which is cheaper, if it were shown to be less than 5"
    )
    assert "so far its difference is -36.5 points (-50.0 to -30.0)." in found["what would change it"]
    cheapest = facts_of(rows[1:], recommend(solved[1:], [4, 16]), paired=False)
    assert cheapest["what would change it"] == "A cheaper cell, which this sweep does not have, or another margin."
    assert "others in each cell" in cheapest["episodes"]


def test_without_a_recommendation_the_best_cell_is_nearest_by_its_difference_to_another():
    solved = [[True] * 6 + [False] * 4, [True] * 8 + [False] * 2, [True] * 9 + [False]]
    compared = [(-0.3, -0.5, 0.1), (-0.1, -0.4, 0.2), (0.0, 0.0, 0.0)]
    rows = [
        {
            **cell(steps, sum(outcomes) / 10, episodes=10, difference=d, difference_low=low, difference_high=high),
            "execution_horizon": 8,
        }
        for steps, outcomes, (d, low, high) in zip((1, 4, 16), solved, compared, strict=True)
    ]
    advice = recommend(solved, [1, 4, 16])
    assert (advice.cell, advice.undecided) == (None, advice.best)
    found = facts_of(rows, advice)
    assert found["how sure"].startswith("Not enough")
    assert found["what would change it"] == (
        "A cell that is shown to be less than 5 points below every other one: the nearest is ddim_steps 16; so far its"
        " difference to ddim_steps 4 is +10.0 points (-20.0 to +40.0)."
    )
