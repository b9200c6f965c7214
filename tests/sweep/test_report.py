"""The report's page: everything it is given stands in it as text, in its place."""

import base64
import html
from html.parser import HTMLParser

import pytest

from policy.common.terminal import printable
from policy.sweep.plot import plot_rows
from policy.sweep.report import Clip, write_report

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
        "control_rate_hz": 16000 / ddim_steps,
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
    plot_rows(rows, [tmp_path / "plot.png"], title="".join(names))
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
