"""`ddim-import`: what it refuses before it reads anything, and how it is interrupted."""

import io
import shutil

import pytest

from policy.checkpoint import load_checkpoint
from policy.commands.import_checkpoint import import_checkpoint
from scripts.command import refusals
from tests.adapters.test_lerobot import TINY


def test_a_training_run_is_not_replaced_and_this_is_said_first(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a training run resumes from .*checkpoint: choose another output_dir="):
        import_checkpoint(lambda: None, source="nowhere", output_dir=tmp_path)
    assert [file.name for file in folder.iterdir()] == ["training.json"]


def test_only_an_earlier_import_is_replaced(tmp_path, capsys):
    source = shutil.copytree(TINY, tmp_path / "checkpoint")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoint exists, and ddim-import did not write it: choose another output"):
        import_checkpoint(lambda: None, source=str(source), output_dir=tmp_path)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    for _ in range(2):
        import_checkpoint(lambda: None, source=str(source), output_dir=tmp_path / "new")
    assert load_checkpoint(tmp_path / "new" / "checkpoint").training["imported"]["source"] == "checkpoint"


def test_the_next_line_samples_as_the_imported_policy_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("policy.commands.import_checkpoint.check_spaces", lambda *_, **__: None)
    import_checkpoint(lambda **_: io.StringIO(), source=str(TINY), env={"name": "tiny"}, output_dir=tmp_path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert "env=tiny ddim_steps=[1,2,4,8,16,100] sampler.spacing=leading sampler.eta=1" in line.replace("'", "")


def test_an_interrupt_that_torch_made_an_error_of_is_an_interrupt():
    error = RuntimeError("Failed to export the model")
    error.__cause__ = KeyboardInterrupt()
    with pytest.raises(SystemExit) as ended, refusals():
        raise error
    assert ended.value.code == 130
    with pytest.raises(RuntimeError, match="a fault"), refusals():
        raise RuntimeError("a fault")
