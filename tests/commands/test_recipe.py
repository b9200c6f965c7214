"""`recipe=auto` as a user types it: `pytest -m slow tests/commands/test_recipe.py`."""

import json

import pytest

from policy.recipe.candidates import CANDIDATES

pytestmark = pytest.mark.slow


def test_the_chosen_run_equals_a_plain_training_with_its_settings(planar_run, run_command, tmp_path):
    settings = [
        "experiment=planar",
        f"dataset.path={planar_run}/planar-v0",
        "train.steps=96",
        "train.batch_size=16",
        "train.warmup_steps=8",
        "train.rollout_every=0",
        "denoiser.hidden_size=32",
        "tracker=none",
    ]
    search = ["recipe=auto", "recipe.candidates=[as_given,dropout,narrow]", "recipe.budget=1h"]
    done = run_command("train", *settings, *search, f"output_dir={tmp_path}/auto")
    found = json.loads((tmp_path / "auto/recipe.json").read_text())
    assert [len(rung) for rung in found["rungs"]] == [3, 2]
    assert "denoiser.hidden_size" not in found["recipes"]["narrow"]
    assert "chosen: " in done.stdout
    assert f"checkpoint: {tmp_path}/auto/checkpoint" in done.stdout
    changes = found["recipes"][found["chosen"]]
    assert changes.items() <= CANDIDATES[found["chosen"]].items()
    run_command("train", *settings, *(f"{k}={v}" for k, v in changes.items()), f"output_dir={tmp_path}/plain")
    for file in ("policy.safetensors", "training.safetensors", "training.json"):
        ours, plain = ((tmp_path / name / "checkpoint" / file).read_bytes() for name in ("auto", "plain"))
        assert ours == plain, file
    again = run_command("train", *settings, *search, f"output_dir={tmp_path}/auto").stdout
    assert "going on at step 96 of 96" in again
    assert "timing" not in again
