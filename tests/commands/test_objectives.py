"""Policies of all objectives through the commands: trained, rolled out, and swept together."""

import json

import pytest

from policy.diffusion.objective import OBJECTIVES


@pytest.mark.slow  # four trainings
def test_all_objectives_are_trained_rolled_out_and_swept_together(planar_run, run_command, tmp_path):
    small = ["denoiser.hidden_size=16", "denoiser.num_layers=1", "encoder.hidden_size=16", "obs_size=16"]
    quick = ["train.steps=8", "train.log_every=4", "train.rollout_every=0", "tracker=none"]
    for objective in OBJECTIVES:
        folder = tmp_path / objective
        data = f"dataset.path={planar_run}/planar-v0"
        run_command("train", data, f"objective={objective}", *small, *quick, f"output_dir={folder}")
        stored = json.loads((folder / "checkpoint/config.json").read_text())
        assert stored["policy"]["objective"] == objective
        done = run_command("rollout", f"checkpoint={folder}/checkpoint", "episodes=2", f"output_dir={folder}/rollout")
        assert f"with { {'regression': 1, 'mip': 2}.get(objective, 8) } ddim_steps" in done.stdout
    checkpoints = ",".join(f"{tmp_path}/{objective}/checkpoint" for objective in OBJECTIVES)
    swept = tmp_path / "swept"
    settings = ["ddim_steps=[1,4]", "episodes=4", "videos=0", f"output_dir={swept}"]
    done = run_command("sweep", f"checkpoint=[{checkpoints}]", *settings)
    assert done.stdout.count("always takes 1 call of its network: it is one cell for all ddim_steps") == 1
    found = json.loads((swept / "sweep.json").read_text())
    cells = [(row["objective"], row["ddim_steps"]) for row in found["cells"]]
    assert cells == [("diffusion", 1), ("diffusion", 4), ("flow", 1), ("flow", 4), ("regression", 1), ("mip", 2)]
    verdicts = [row for row in found["between_checkpoints"] if "verdict" in row]
    assert len(verdicts) == 4
    assert "what another training seed would change is left out" in done.stdout
    page = (swept / "report.html").read_text()
    assert all(row["sentence"] in page for row in verdicts)
    assert "A line across: a policy that takes a fixed number of calls" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective=regresion"], "unknown objective 'regresion' (did you mean 'regression'?)"),
        (["objective=flow", "prediction_type=epsilon"], "objective=flow has no prediction_type"),
        (["objective=mip", "schedule.num_steps=1"], "2 calls need a timestep each: raise schedule.num_steps"),
        (["objective=mip", "sampler.ddim_steps=4"], "always takes 2 calls of its network"),
        (["objective=regression", "train.rectify_steps=4"], "objective=regression has no noise"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(planar_run, run_command, settings, message):
    done = run_command("train", f"dataset.path={planar_run}/planar-v0", "tracker=none", *settings, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
