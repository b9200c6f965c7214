"""`ddim-import`: what it refuses before it reads anything."""

import pytest

from policy.commands.import_checkpoint import import_checkpoint


def test_a_training_run_is_not_replaced_and_this_is_said_first(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "training.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a training run resumes from .*checkpoint: choose another output_dir="):
        import_checkpoint(lambda: None, source="nowhere", output_dir=tmp_path)
    assert [file.name for file in folder.iterdir()] == ["training.json"]
