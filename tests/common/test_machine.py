"""What a machine has: cores, a processor, a home folder, a user name, a safe folder to start processes in."""

import multiprocessing
import os
import pwd
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from policy.common import machine
from policy.common.drawing import drawing
from policy.data.cache import default_cache_dir


@pytest.fixture
def nobody(monkeypatch):
    """A user without an entry in passwd, and no variables that could say more."""

    def missing(key):
        raise KeyError(key)

    monkeypatch.setattr(pwd, "getpwuid", missing)
    monkeypatch.setattr(machine, "_TEMPORARY", [])
    monkeypatch.setattr(machine.atexit, "register", lambda *given, **settings: None)
    for name in ("HOME", "LOGNAME", "USER", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("home", [None, "", "/nonexistent", "/dev/null"])
def test_a_temporary_home_stands_in_for_one_that_is_missing(nobody, home, tmp_path):
    nobody.setattr(machine.tempfile, "tempdir", str(tmp_path))
    if home is not None:
        nobody.setenv("HOME", home)
    machine.settle_home()
    assert Path.home().parent == tmp_path
    assert os.environ["LOGNAME"] == f"uid{os.getuid()}"
    with pytest.warns(UserWarning, match=r"there is no home folder.*dataset\.cache_dir"):
        assert default_cache_dir().is_relative_to(tmp_path)


def test_an_existing_home_is_left_alone(nobody, tmp_path):
    nobody.setenv("HOME", str(tmp_path))
    machine.settle_home()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_cache_dir() == tmp_path / ".cache/ddim-policy"


def test_neither_a_home_nor_a_temporary_folder_is_one_sentence(nobody, tmp_path):
    nobody.setattr(machine.tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="set HOME, or TMPDIR, to a folder that you may write to"):
        machine.settle_home()


def test_a_process_started_outside_the_current_folder_does_not_search_it(tmp_path, monkeypatch):
    (tmp_path / "multiprocessing").mkdir()
    (tmp_path / "multiprocessing/__init__.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    with machine.outside_current_folder():
        process.start()
    process.join()
    assert process.exitcode == 0
    assert not (tmp_path / "mark").exists()
    assert machine.SAFE_PATH not in os.environ


def test_the_users_own_choice_of_a_safe_path_stays(monkeypatch):
    monkeypatch.setenv(machine.SAFE_PATH, "1")
    with machine.outside_current_folder():
        machine.leave_children_alone()
    assert os.environ[machine.SAFE_PATH] == "1"
    monkeypatch.delenv(machine.SAFE_PATH)
    with machine.outside_current_folder():
        machine.leave_children_alone()
        assert machine.SAFE_PATH not in os.environ


def test_drawing_reads_no_settings_of_the_current_folder(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 2.5\n")
    code = (
        "from policy.common.drawing import drawing\nwith drawing():\n    import matplotlib\n"
        "    print(matplotlib.rcParams['font.size'], matplotlib.rcParamsOrig['font.size'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["10.0", "10.0"]


def test_drawing_leaves_the_folder_and_the_settings_of_the_process(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.chdir(tmp_path)
    before = dict(matplotlib.rcParams)
    with drawing():
        assert Path.cwd() == tmp_path
        assert matplotlib.rcParams["text.parse_math"] is False
    assert dict(matplotlib.rcParams) == before


def test_cores_are_those_this_process_may_use():
    assert 1 <= machine.available_cores() <= os.cpu_count()
    if hasattr(os, "sched_setaffinity"):
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(before)})
        assert machine.available_cores() == 1
        os.sched_setaffinity(0, before)


def test_a_machine_without_proc_has_a_processor_too(monkeypatch):
    monkeypatch.setattr("platform.processor", lambda: "arm")

    def missing(file):
        raise FileNotFoundError(file)

    monkeypatch.setattr(machine, "open", missing, raising=False)
    assert machine.processor() == "arm"
