"""The ledger: what was written down stays, and nothing is counted twice."""

import json
import math
import os
import re
import signal
import time
import zlib
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.checkpoint import Checkpoint
from policy.diffusion.coefficients import SOLVERS, ddim_coefficients
from policy.diffusion.sampler import LATER_SETTINGS
from policy.rollout.ledger import Ledger, cell_id, recorded_settings
from policy.statistics.results import EpisodeResult
from policy.sweep.grid import make_cells
from policy.sweep.rows import uniform

DATA = Path(__file__).resolve().parents[1] / "data"
SETTINGS = {
    "checkpoint": "0123456789abcdef",
    "ddim_steps": 4,
    "eta": 0.0,
    "spacing": "trailing",
    "clip": 1.0,
    "execution_horizon": 8,
    "env": {"name": "planar", "image_size": 96},
}
OTHER = {**SETTINGS, "ddim_steps": 8}


def result(seed, **changes):
    plain = EpisodeResult(seed=seed, success=seed % 2 == 0, score=1 / (seed + 3), return_=-0.1 * seed, steps=10 + seed)
    return replace(plain, **changes)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "episodes.jsonl"


@pytest.fixture
def written(file):
    """Two cells; gives the file's lines."""
    with Ledger(file) as ledger:
        for given_settings in (SETTINGS, OTHER):
            cell = ledger.introduce(given_settings)
            for seed in (7, 8):
                ledger.add(cell, result(seed))
    return file.read_bytes().splitlines(keepends=True)


def test_a_ledger_gives_back_what_was_added(file):
    with Ledger(file) as ledger:
        cell, other = ledger.introduce(SETTINGS), ledger.introduce(OTHER)
        assert cell != other
        assert ledger.missing(cell, range(3)) == [0, 1, 2]
        for seed in (2, 0):
            ledger.add(cell, result(seed, attempts=seed + 1))
        ledger.add(other, result(0, score=0.5))
        assert ledger.missing(cell, range(3)) == [1]
    before = file.read_bytes()
    with Ledger(file) as ledger:
        assert [ledger.introduce(OTHER), ledger.introduce(SETTINGS)] == [other, cell]
        assert ledger.missing(cell, [3, 2, 1, 0]) == [3, 1]
        assert ledger.results(cell, [0, 2]) == [result(0), result(2, attempts=3)]
        assert ledger.results(cell, [2]) == [result(2, attempts=3)]
        assert ledger.results(other, [0]) == [result(0, score=0.5)]
        assert file.read_bytes() == before  # nothing is rewritten
        ledger.add(cell, result(1))
    assert file.read_bytes().startswith(before)


def test_every_result_is_on_disk_as_soon_as_it_was_added(file):
    with Ledger(file) as ledger:
        cell = ledger.introduce(SETTINGS)
        for count in range(1, 4):
            ledger.add(cell, result(count))
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            assert all(len(line.pop("check")) == 8 for line in lines)
            assert lines[0] == {"cell": cell, "settings": SETTINGS}
            assert lines[1:] == [{"cell": cell, **result(seed).row()} for seed in range(1, count + 1)]


@settings(deadline=None)
@given(
    values=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**63),
            "success": st.booleans(),
            "score": st.floats(0, 1),
            "return_": st.floats(allow_nan=False, allow_infinity=False),
            "steps": st.integers(1, 10**6),
            "late_steps": st.integers(0, 10**6),
            "attempts": st.integers(1, 3),
            "broke_off": st.just("") | st.text(),
        }
    )
)
def test_figures_come_back_to_the_last_bit(tmp_path_factory, values):
    assert values.keys() == {field.name for field in fields(EpisodeResult)}
    file, added = tmp_path_factory.mktemp("ledger") / "episodes.jsonl", EpisodeResult(**values)
    with Ledger(file) as ledger:
        ledger.add(ledger.introduce(SETTINGS), added)
    with Ledger(file) as ledger:
        (back,) = ledger.results(cell_id(SETTINGS), [added.seed])
    assert back == added
    assert str(back) == str(added)  # -0.0 is not 0.0


def test_a_last_line_cut_anywhere_costs_its_own_episode_and_no_other(file, written):
    before, last = b"".join(written[:-1]), written[-1]
    for length in range(len(last)):
        file.write_bytes(before + last[:length])
        with Ledger(file) as ledger:
            cell, other = ledger.introduce(SETTINGS), ledger.introduce(OTHER)
            assert ledger.missing(other, [7, 8]) == [8]
            assert ledger.results(cell, [7, 8]) == [result(7), result(8)]
            assert ledger.results(other, [7]) == [result(7)]
            ledger.add(other, result(8))
        assert file.read_bytes() == before + last


def test_a_ledger_cut_anywhere_can_be_completed(file, written):
    """Also inside the lines that introduce a cell."""
    whole = b"".join(written)
    for length in range(0, len(whole), 3):
        file.write_bytes(whole[:length])
        with Ledger(file) as ledger:
            for given_settings in (SETTINGS, OTHER):
                cell = ledger.introduce(given_settings)
                for seed in ledger.missing(cell, [7, 8]):
                    ledger.add(cell, result(seed))
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:20] + b"\n",
        lambda line: b"\n",
        lambda line: b"\x00\xff\xfe" + line,
        lambda line: b"[]\n",
        lambda line: b"3\n",
        lambda line: b"{}\n",
        lambda line: line.replace(b'"score"', b'"skore"'),
        lambda line: line.replace(b'"cell": "', b'"cell": ["').replace(b'", "seed"', b'"], "seed"'),
        lambda line: line.replace(b'"seed": 7', b'"seed": {}'),
        lambda line: line.replace(b'"steps": 17', b'"steps": 71'),
        lambda line: line[: line.rindex(b",")] + b"}\n",  # without its checksum
    ],
)
def test_a_damaged_line_is_an_error_that_names_file_and_line(file, written, damage):
    damaged = damage(written[1])
    assert damaged != written[1]
    file.write_bytes(b"".join([written[0], damaged, *written[2:]]))
    content = file.read_bytes()
    with pytest.raises(
        ValueError, match=rf"{file}, line 2 is damaged .*: remove the line; if it is an episode, that is run"
    ):
        Ledger(file)
    assert file.read_bytes() == content
    file.write_bytes(b"".join([written[0], *written[2:]]))  # as the message says; the lock is free
    with Ledger(file) as ledger:
        assert ledger.missing(ledger.introduce(SETTINGS), [7, 8]) == [7]


def test_a_repeated_episode_is_an_error(file, written):
    file.write_bytes(b"".join([*written, written[1]]))
    with pytest.raises(
        ValueError, match=rf"{file}, line 7 repeats the episode with seed 7 of cell {cell_id(SETTINGS)}"
    ):
        Ledger(file)
    file.write_bytes(b"".join(written))
    with Ledger(file) as ledger, pytest.raises(ValueError, match=r"seed 7 of cell .* was run twice"):
        ledger.add(cell_id(SETTINGS), result(7))
    assert file.read_bytes() == b"".join(written)


def test_a_gap_is_an_error_that_says_where(file, written):
    cell = cell_id(OTHER)
    with Ledger(file) as ledger, pytest.raises(ValueError, match=rf"{file}: cell {cell} lacks 3 episodes.* seed 5"):
        ledger.results(cell, [8, 5, 7, 6, 9])


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=rf"cannot write {tmp_path} \(.*choose another output_dir="):
        Ledger(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_second_process_is_refused_until_the_first_has_ended(file, written):
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        try:
            with Ledger(file):
                os.write(write, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(read, 4) == b"held"
        with pytest.raises(ValueError, match=rf"{file} is in use by another process: wait for it, or choose another"):
            Ledger(file)
        assert file.read_bytes() == b"".join(written)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with Ledger(file) as ledger:
        assert ledger.missing(cell_id(OTHER), [7, 8]) == []


# --- every line is checked --------------------------------------------------------------------------------------

MADE_WITH = {
    "versions": {"ddim-policy": "0.1.0", "torch": "2.7.0"},
    "machine": {"processor": "one"},
    "environment": {"envs/planar.py": "0123456789ab"},
}
NEWER = {**MADE_WITH, "versions": {"ddim-policy": "0.1.0", "torch": "2.13.0"}}


@pytest.fixture(scope="module")
def of_all_kinds(tmp_path_factory):
    """The lines of a small ledger that has lines of all kinds, and a file for others."""
    file = tmp_path_factory.mktemp("kinds") / "episodes.jsonl"
    with Ledger(file) as ledger:
        ledger.note_provenance(MADE_WITH)
        cell = ledger.introduce(SETTINGS)
        ledger.note_unpaired("seed 7 does not fix the episode")
        ledger.add(cell, result(7))
        ledger.add(cell, result(8, success=False, steps=0, broke_off="it \u00df"))
    return file.read_bytes().splitlines(keepends=True), file.with_name("edited.jsonl")


def refusal_of(file, lines):
    """What the ledger of these lines is refused with; the file stays as it is."""
    file.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"^{file}, line \d+ ") as caught:
        Ledger(file)
    assert file.read_bytes() == b"".join(lines)
    return str(caught.value).removeprefix(f"{file}, ")


@settings(deadline=None)
@given(data=st.data())
def test_an_edit_of_any_byte_is_found_and_its_line_named(of_all_kinds, data):
    lines, file = of_all_kinds
    number = data.draw(st.integers(0, len(lines) - 1), "line")
    at = data.draw(st.integers(0, len(lines[number]) - 1), "byte")
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != lines[number][at]), "instead")
    edited = lines[number][:at] + bytes([byte]) + lines[number][at + 1 :]
    said = refusal_of(file, [*lines[:number], edited, *lines[number + 1 :]])
    assert said.startswith(f"line {number + 1} is damaged (")


@pytest.mark.parametrize("number", range(5))
def test_an_edit_of_the_checksum_or_of_the_lines_end_is_found(of_all_kinds, number):
    lines, file = of_all_kinds
    for at in range(len(lines[number]) - 24, len(lines[number])):
        edited = lines[number][:at] + bytes([lines[number][at] ^ 1]) + lines[number][at + 1 :]
        assert refusal_of(file, [*lines[:number], edited, *lines[number + 1 :]]).startswith(f"line {number + 1} is")


@settings(deadline=None)
@given(data=st.data())
def test_a_line_that_stands_there_twice_is_named(of_all_kinds, data):
    lines, file = of_all_kinds
    number = data.draw(st.integers(0, len(lines) - 1), "line")
    at = data.draw(st.integers(number + 1, len(lines)), "again at")
    said = refusal_of(file, [*lines[:at], lines[number], *lines[at:]])
    assert re.match(rf"line {at + 1} repeats .*: remove one of the two", said)


@settings(deadline=None)
@given(data=st.data())
def test_a_line_that_was_cut_is_named_unless_it_is_the_last(of_all_kinds, data):
    lines, file = of_all_kinds
    number = data.draw(st.integers(0, len(lines) - 2), "line")
    length = data.draw(st.integers(1, len(lines[number]) - 2), "length")
    end = data.draw(st.sampled_from([b"", b"\n"]), "end")
    said = refusal_of(file, [*lines[:number], lines[number][:length] + end, *lines[number + 1 :]])
    assert said.startswith(f"line {number + 1} is damaged (it is not JSON: it was edited or cut)")


def test_the_settings_of_a_damaged_file_are_those_that_can_be_read(tmp_path):
    file = tmp_path / "episodes.jsonl"
    file.write_bytes(checked({"cell": "a", "settings": {"ddim_steps": 1}}) + b"[" * 100_000 + b"\n{\n")
    assert recorded_settings(file) == [{"ddim_steps": 1}]


def checked(row):
    """A line with a checksum that fits."""
    text = json.dumps(row)[:-1].encode()
    return text + b', "check": "%08x"}\n' % zlib.crc32(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": -1}, "seed must be a whole number, 0 or more; got -1"),
        ({"seed": True}, "seed must be a whole number, 0 or more; got True"),
        ({"seed": 7.0}, "seed must be a whole number, 0 or more; got 7.0"),
        ({"success": 1}, "success must be true or false; got 1"),
        ({"score": 1.0001}, "score must be a number within 0..1; got 1.0001"),
        ({"score": None}, "score must be a number within 0..1; got None"),
        ({"score": float("nan")}, "score must be a number within 0..1; got nan"),
        ({"return": "3"}, "return must be a finite number; got '3'"),
        ({"return": float("inf")}, "return must be a finite number; got inf"),
        ({"steps": 0}, "steps must be a whole number, 1 or more; got 0"),
        ({"late_steps": -1}, "late_steps must be a whole number, 0 or more; got -1"),
        ({"attempts": 0}, "attempts must be a whole number, 1 or more; got 0"),
        ({"broke_off": 3}, "broke_off must be a text; got 3"),
        ({"cell": 3}, "3 is not the id of a cell"),
    ],
)
def test_what_a_line_holds_is_checked(file, changes, said):
    """With and without a checksum: an earlier version has written none."""
    row = {"cell": cell_id(SETTINGS), **result(7).row(), **changes}
    for line in (checked(row), json.dumps(row).encode() + b"\n"):
        assert refusal_of(file, [line]).startswith(f"line 1 is damaged ({said}): remove the line; if it is an episode")


@pytest.mark.parametrize(
    "row",
    [
        {"cell": "0123456789ab", "settings": SETTINGS},
        {"cell": cell_id(SETTINGS), "settings": {**SETTINGS, "ddim_steps": 5}},
        {"cell": cell_id(SETTINGS), "settings": 3},
        {"cell": cell_id(SETTINGS), "settings": None},
        {"settings": SETTINGS},
        {"unpaired": ""},
        {"unpaired": 3},
        {"made_with": {}},
        {"made_with": {"versions": {"torch": 2}}},
        {"made_with": ["torch"]},
        {"cell": cell_id(SETTINGS)},
        {},
        [],
        None,
    ],
)
def test_lines_of_the_other_kinds_are_checked_too(file, row):
    line = checked(row) if row else json.dumps(row).encode() + b"\n"
    assert refusal_of(file, [line]).startswith("line 1 is damaged (")


def test_a_damaged_line_that_names_the_shard_is_not_to_be_removed(file):
    """Without it, the share of a sweep would go on as a whole one."""
    with Ledger(file) as ledger:
        ledger.note_shard("3/16")
    damaged = file.read_bytes().replace(b"3/16", b"3/17")
    said = refusal_of(file, [damaged])
    assert said.startswith("line 1 is damaged (")
    assert said.endswith("edited): run the shard anew with another output_dir=")


def test_a_line_nested_too_deeply_is_damaged(file):
    assert refusal_of(file, [b"[" * 100_000 + b"\n"]).startswith("line 1 is damaged (it is not JSON")


def test_a_return_that_was_not_finite_can_be_read(file):
    with Ledger(file) as ledger:
        ledger.add(ledger.introduce(SETTINGS), result(7, return_=float("inf")))
    with Ledger(file) as ledger:
        (back,) = ledger.results(cell_id(SETTINGS), [7])
    assert math.isnan(back.return_)


def test_a_ledger_of_an_earlier_version_goes_on(file):
    """This file was written before lines had checksums and said what episodes were run with."""
    before = (DATA / "ledger_before_checksums.jsonl").read_bytes()
    file.write_bytes(before)
    with Ledger(file) as ledger:
        cells = [ledger.introduce(given_settings) for given_settings in (BEFORE_SOLVERS, OTHER)]
        assert [ledger.missing(cell, range(6, 11)) for cell in cells] == [[6, 10], [6, 9, 10]]
        assert ledger.results(cells[1], [7, 8]) == [result(7), result(8)]
        assert ledger.results(cells[0], [9])[0].attempts == 2
        assert ledger.unpaired.startswith("equal seeds are not equal episodes")
        assert ledger.made_with(cells, range(10)) == [{}]
        assert file.read_bytes() == before
        ledger.note_provenance(MADE_WITH)
        ledger.add(cells[1], result(9))
    with Ledger(file) as ledger:
        assert ledger.missing(cells[1], range(6, 11)) == [6, 10]
        assert ledger.made_with(cells, range(10)) == [{}, MADE_WITH]
    written = file.read_bytes()
    assert written.startswith(before)
    lines = written.splitlines(keepends=True)
    assert refusal_of(file, [*lines, lines[3]]).startswith("line 11 is damaged (its checksum is missing)")
    assert refusal_of(file, [lines[0].replace(b'"candidates": 1', b'"candidates": 2')]).startswith("line 1 is damaged")


# --- what episodes were run with ---------------------------------------------------------------------------------


def test_each_episode_is_of_the_last_provenance_before_it(file):
    with Ledger(file) as ledger:
        one, other = ledger.introduce(SETTINGS), ledger.introduce(OTHER)
        ledger.note_provenance(MADE_WITH)
        ledger.note_provenance(dict(reversed(MADE_WITH.items())))  # the same
        ledger.add(one, result(7))
        ledger.note_provenance(NEWER)
        ledger.add(one, result(8))
        ledger.add(other, result(7))
        ledger.note_provenance(MADE_WITH)
        ledger.add(other, result(8))
    assert file.read_bytes().count(b"made_with") == 3
    with Ledger(file) as ledger:
        assert ledger.made_with([one], [7]) == [MADE_WITH]
        assert ledger.made_with([one], [8]) == ledger.made_with([other], [7]) == [NEWER]
        assert ledger.made_with([one], [7, 8, 9]) == ledger.made_with([one, other], range(10)) == [MADE_WITH, NEWER]
        assert ledger.made_with([other], [9]) == ledger.made_with(["unknown"], [7]) == []


# --- cells -------------------------------------------------------------------------------------------------------

values_of_settings = {
    "checkpoint": st.text("0123456789abcdef", min_size=16, max_size=16),
    "ddim_steps": st.integers(1, 1000),
    "eta": st.floats(0, 1),
    "spacing": st.sampled_from(["trailing", "leading", "linspace"]),
    "clip": st.none() | st.floats(0.1, 10),
    "execution_horizon": st.integers(1, 8),
    "env": st.dictionaries(
        st.text(min_size=1), st.text() | st.integers() | st.none() | st.lists(st.text(), max_size=2), max_size=3
    ),
}


@settings(deadline=None)
@given(one=st.fixed_dictionaries(values_of_settings), other=st.fixed_dictionaries(values_of_settings), data=st.data())
def test_a_cells_id_depends_on_each_setting_and_on_nothing_else(one, other, data):
    shuffled = {name: one[name] for name in data.draw(st.permutations(list(one)))}
    shuffled["env"] = dict(reversed(shuffled["env"].items()))
    assert cell_id(shuffled) == cell_id(one)
    assert cell_id(json.loads(json.dumps(one))) == cell_id(one)
    for name in one:
        changed = {**one, name: other[name]}
        assert (cell_id(changed) == cell_id(one)) == (changed == one)


def test_ids_of_recorded_cells_stay():
    """Changing this would make every sweep on disk begin anew."""
    assert cell_id(SETTINGS) == "774593c525c8"
    assert cell_id({**SETTINGS, "env": {"image_size": 96, "name": "planar"}}) == cell_id(SETTINGS)


# --- settings that came later than ledgers on disk ---------------------------------------------------------------

# What a sweep wrote into its ledger before samplers had solvers, and the id that it had there.
BEFORE_SOLVERS = {
    "checkpoint": "0123456789abcdef",
    "ddim_steps": 4,
    "eta": 0.0,
    "spacing": "trailing",
    "clip": 1.0,
    "warm_start": None,
    "execution_horizon": 8,
    "mode": "synchronous",
    "delay_steps": 0,
    "late": "hold",
    "candidates": 1,
    "backend": "fused",
    "weights": "float32",
    "device": "cpu",
    "env": {"name": "planar", "image_size": 96},
}
CONTINUOUS = {"ddim_steps": 2, "eta": 0.5, "clip": None, "warm_start": 0.5, "mode": "continuous", "delay_steps": 2}


def cell_of(ddim_steps=4, sampler=(), controller=()):
    """One cell of a sweep today."""
    policy = SimpleNamespace(
        device=torch.device("cpu"),
        settled=lambda sampler: sampler.settled("diffusion", 100),
        config=SimpleNamespace(action_horizon=8, objective="diffusion"),
    )
    path, digest = Path("run/checkpoint"), "0123456789abcdef"
    checkpoint = Checkpoint(path=path, digest=digest, execution_horizon=8, policy=policy, env=None, training={})
    (cell,) = make_cells(
        [checkpoint],
        {"name": "planar", "image_size": 96},
        ddim_steps=ddim_steps,
        sampler=dict(sampler),
        controller=dict(controller),
        execution_horizon=8,
        backend="fused",
    )
    return cell


@pytest.fixture
def heun(monkeypatch):
    """The name of another solver."""
    monkeypatch.setattr(SOLVERS, "_parts", {**SOLVERS._parts, "heun": ddim_coefficients})
    return "heun"


def test_a_cell_of_today_has_the_id_that_it_had_before_there_were_solvers():
    assert cell_of().settings == BEFORE_SOLVERS
    assert cell_id(cell_of().settings) == cell_id(BEFORE_SOLVERS) == "e581b93e3209"
    sampler = {name: CONTINUOUS[name] for name in ("eta", "clip", "warm_start")}
    controller = {name: CONTINUOUS[name] for name in ("mode", "delay_steps")}
    cell = cell_of(2, sampler, controller)
    assert cell.settings == {**BEFORE_SOLVERS, **CONTINUOUS}
    assert cell_id(cell.settings) == "996b5322ad8b"


def test_the_episodes_of_an_older_ledger_are_not_run_again(file):
    with Ledger(file) as ledger:
        cell = ledger.introduce(BEFORE_SOLVERS)
        ledger.add(cell, result(7))
    before = file.read_bytes()
    with Ledger(file) as ledger:
        assert ledger.missing(ledger.introduce(cell_of().settings), [7, 8]) == [8]
        assert file.read_bytes() == before


def test_another_solver_makes_another_cell_and_is_recorded(heun):
    cell = cell_of(sampler={"solver": heun})
    assert cell.settings == {**BEFORE_SOLVERS, "solver": heun}
    assert cell_id(cell.settings) != cell_id(BEFORE_SOLVERS)
    assert cell_of(sampler={"solver": "ddim"}).settings == BEFORE_SOLVERS  # said or not


@pytest.mark.parametrize("setting", [{"solver": "dpmpp_2m"}, {"start": 0.5}, {"noise_scale": 0}])
def test_another_way_to_few_steps_makes_another_cell(setting):
    cell = cell_of(sampler=setting)
    assert cell.settings == {**BEFORE_SOLVERS, **setting}
    assert cell_id(cell.settings) != cell_id(BEFORE_SOLVERS)
    assert cell_of(sampler={"start": 1, "noise_scale": 1}).settings == BEFORE_SOLVERS  # said or not


def test_rows_of_the_default_solver_have_no_column_for_it():
    rows = [{**cell_of(steps).axes, "success_rate": 0.5} for steps in (1, 2)]
    assert all("solver" in row for row in rows)  # axes name all, so that they can be compared
    for row, written in zip(rows, uniform(rows), strict=True):
        assert written == {name: value for name, value in row.items() if name not in LATER_SETTINGS}
    assert uniform([]) == []


def test_rows_have_the_column_of_a_later_setting_once_one_of_them_uses_it(heun):
    """Also rows of before, which know nothing of it."""
    rows = [
        {"ddim_steps": 1, "success_rate": 0.25},
        {**cell_of(2).axes, "success_rate": 0.5},
        {**cell_of(4, {"solver": heun}).axes, "success_rate": 0.75},
    ]
    given = [dict(row) for row in rows]
    written = uniform(rows)
    assert [row["solver"] for row in written] == ["ddim", "ddim", heun]
    assert [row["ddim_steps"] for row in written] == [1, 2, 4]
    assert [row["success_rate"] for row in written] == [0.25, 0.5, 0.75]
    assert written[1].keys() == written[2].keys()
    assert rows == given  # not changed in place
