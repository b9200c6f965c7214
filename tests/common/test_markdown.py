"""Tables that a Markdown reader takes for tables, and whose columns line up in a terminal."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.common.markdown import markdown_table, markdown_text

HEADS, ROWS = ("steps", "to"), [("1", "9%"), ("16", "100%")]


def test_cells_stay_as_they_are_without_an_alignment():
    assert markdown_table(HEADS, ROWS).splitlines() == [
        "| steps | to |",
        "| --- | --- |",
        "| 1 | 9% |",
        "| 16 | 100% |",
    ]


def test_columns_line_up_on_the_side_asked_for():
    assert markdown_table(HEADS, ROWS, align="lr").splitlines() == [
        "| steps |   to |",
        "| ----- | ---: |",
        "| 1     |   9% |",
        "| 16    | 100% |",
    ]
    assert markdown_table(HEADS, ROWS, align="rl").splitlines() == [
        "| steps | to   |",
        "| ----: | ---- |",
        "|     1 | 9%   |",
        "|    16 | 100% |",
    ]


def test_narrow_columns_have_a_rule_that_markdown_accepts():
    assert markdown_table(["K", "K"], [["1", ""]], align="lr").splitlines() == [
        "| K |  K |",
        "| - | -: |",
        "| 1 |    |",
    ]
    assert markdown_table([""], [], align="l").splitlines() == ["|   |", "| - |"]


cells = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="\\"), max_size=5)
tables = st.integers(1, 4).flatmap(
    lambda width: st.tuples(
        st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=4),
        st.just("") | st.text("lr", min_size=width, max_size=width),
    )
)


@given(tables)
def test_every_cell_comes_back_in_its_place(drawn):
    """Read as the GitHub specification says: cells are split at pipes that no backslash escapes."""
    table, align = drawn
    lines = markdown_table(table[0], table[1:], align=align).split("\n")
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rule = split.pop(1)
    assert [[cell.replace("\\|", "|") for cell in line] for line in split] == table
    rules = ["-+:" if letter == "r" else "-+" for letter in align or "l" * len(rule)]
    assert all(re.fullmatch(form, cell) for form, cell in zip(rules, rule, strict=True))
    assert not align or len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("row", [["1"], ["1", "2", "3"]])
@pytest.mark.parametrize("align", ["", "ll"])
def test_a_row_that_does_not_fit_the_heads_is_an_error(row, align):
    with pytest.raises(ValueError, match=rf"a row has {len(row)} cells, the table 2 columns"):
        markdown_table(HEADS, [*ROWS, row], align=align)


@pytest.mark.parametrize("align", ["l", "lrr", "lc"])
def test_an_alignment_that_does_not_fit_the_heads_is_an_error(align):
    with pytest.raises(ValueError, match=rf"align must be l or r for each of 2 columns, or empty; got '{align}'"):
        markdown_table(HEADS, ROWS, align=align)


@pytest.mark.parametrize(
    "text", ["_a_ __b__ ~~c~~", "*a* `b` \\", "[a](http://b) ![c](d)", "www.evil.example a@b.example", "<b>&lt;"]
)
def test_a_text_is_shown_as_it_stands(text):
    written = markdown_text(text)
    assert not re.search(r"://|www\.|@", written)  # of which GitHub's Markdown makes links
    parser = pytest.importorskip("markdown_it").MarkdownIt().enable("strikethrough")
    assert parser.render(written) == f"<p>{html.escape(text)}</p>\n"
