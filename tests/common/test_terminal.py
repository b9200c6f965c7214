"""Texts from files do not control the terminal."""

import sys

import pytest
from tqdm import tqdm

from policy.common.terminal import printable, printable_output


@pytest.mark.parametrize("plain", ["a\tb\r\n", "Größe 部屋", "100 %", "\x1b[A"])
def test_plain_texts_line_ends_and_moves_of_progress_bars_stay(plain):
    assert printable(plain) == plain


@pytest.mark.parametrize("code", ["\x1b", "\x07", "\x00", "\x08", "\x9b", "\x7f", "\u202e", "\u2066"])
def test_control_characters_are_written_with_their_codes(code):
    shown = printable(f"a{code}[2Jb")
    assert code not in shown
    assert shown.startswith("a\\")
    assert shown.endswith("[2Jb")


def test_nothing_that_is_printed_controls_the_terminal(capsys):
    with printable_output():
        print("name\x1b[2J")
        print("error\x1b]0;title\x07", file=sys.stderr)
        list(tqdm(range(2), desc="a\x1b[31m"))
    done = capsys.readouterr()
    assert done.out == "name\\x1b[2J\n"
    assert done.err.startswith("error\\x1b]0;title\\x07\n")
    assert "\x1b" not in done.err.replace("\x1b[A", "")
