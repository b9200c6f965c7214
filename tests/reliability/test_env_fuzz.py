"""A fuzz of environments: what comes, at which call, from which episode, in how many processes."""

import json
import os
import time
from functools import partial
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

import envs
from policy import DiffusionPolicy
from policy.commands.rollout import roll_out
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler
from policy.rollout.latency import Latency
from policy.tracking.tracker import NoTracker
from scripts.command import refusals
from tests.conftest import PLANAR_CONFIG, as_a_process
from tests.reliability.fuzzed_env import CASES, FIRST_SEED

EPISODES = 4
EXAMPLES = {"full": 500}.get(os.environ.get("HYPOTHESIS_PROFILE", ""), 20)

QUICK = Latency(median_ms=1.0, p99_ms=1.0, cpu_ms=1.0, step_p99_ms=0.1, quiet=1.0, threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    DiffusionPolicy(PLANAR_CONFIG).save_pretrained(folder)
    return folder


def rolled_out(checkpoint, kwargs, processes, folder):
    """Run `ddim-rollout` without reading its settings, which takes longer than all the rest; return its exit code."""
    env = {"name": "gym", "id": "tests.reliability.fuzzed_env:Fuzzed-v0", "kwargs": kwargs}
    parts = {"sampler": partial(Sampler, ddim_steps=1), "controller": ControllerSettings(), "tracker": NoTracker}
    try:
        timed = mock.patch("policy.commands.rollout.measure_latency", return_value=[QUICK])
        with as_a_process("rollout", cores=processes), timed, refusals():
            roll_out(
                envs.make,
                checkpoint=checkpoint,
                env=env,
                episodes=EPISODES,
                num_envs=processes,
                output_dir=folder,
                **parts,
            )
    except SystemExit as end:
        return end.code
    return 0


# Shrinking would run each failing case a hundred times.
@settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
@given(
    case=st.sampled_from(sorted(CASES)),
    first_strange=st.integers(0, EPISODES),
    step=st.integers(1, 3),
    # A process takes seconds to start.
    processes=st.just(1) if EXAMPLES < 100 else st.sampled_from([1] * 19 + [2]),
)
@example(case="broken: step observation 2", first_strange=2, step=2, processes=2)
@pytest.mark.slow
def test_whatever_a_simulator_does(case, first_strange, step, processes, checkpoint, capsys, tmp_path_factory):
    folder, began = tmp_path_factory.mktemp("out"), time.monotonic()
    kwargs = {"case": case, "from_seed": FIRST_SEED + first_strange, "step": step}
    code = rolled_out(checkpoint, kwargs, processes, folder)
    out, err = capsys.readouterr()
    said = out + err
    assert "Traceback" not in said
    assert time.monotonic() - began < 60
    call, outcome, _ = CASES[case]
    strange = range(first_strange, EPISODES) if call in ("reset", "step") else range(0)
    # The probe of the seeds plays the first two episodes before the run.
    refused = outcome == "refused" and (call == "make" or first_strange < EPISODES)
    assert code == (2 if refused else 0), said
    assert said.count("error: ") == refused, said
    ledger = folder / "rollout.jsonl"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    episodes = {row["seed"] - FIRST_SEED: row for row in rows if "seed" in row}
    if processes == 1 and refused and first_strange > 1 and call != "make":
        assert sorted(episodes) == list(range(first_strange))  # what was finished is kept
    if not refused:
        assert sorted(episodes) == list(range(EPISODES))
    for number, row in episodes.items():
        odd = number in strange
        goes_on = outcome == "taken" and (step < 3 or call == "reset")
        assert row["success"] == (not odd or outcome == "success" or goes_on)
        assert bool(row.get("broke_off")) == (odd and outcome == "broken")
    if not refused and any(row.get("broke_off") for row in episodes.values()):
        assert f"warning: {len(strange)} of {EPISODES} episodes broke off: " in out
