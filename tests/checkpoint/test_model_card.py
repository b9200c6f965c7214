"""The whole text of a model card; its parts and figures are looked at in reliability/test_hub.py."""

import dataclasses
import json
import re

import pytest
import yaml

from policy import DiffusionPolicy, PolicyConfig, Sampler
from policy.checkpoint.model_card import model_card
from policy.model.storage import Origin

CONFIG = PolicyConfig(
    observation_shapes={"state": (4,), "goal|x": (2,)},
    action_dim=2,
    obs_size=8,
    encoder={"name": "state", "hidden_size": 8},
    denoiser={"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1},
)
ROW = {
    "checkpoint": "run/checkpoint",
    "episodes": 200,
    "success_rate": 0.95,
    "success_low": 0.91,
    "success_high": 0.973,
    "score_mean": 0.97,
    "ddim_steps": 1,
    "latency_ms_median": 0.42,
}
METADATA = """---
library_name: ddim-policy
model_name: diffusion policy for an environment of your choice
pipeline_tag: robotics
tags:
- diffusion-policy
- ddim
- imitation-learning
- robotics
---
"""
TEXT = """
# A diffusion policy for {env}

It encodes the last observations, denoises a chunk of actions with DDIM, and is asked again once a part of the \
chunk is executed. Made with `ddim-policy`.

## Use

```python
from policy import DiffusionPolicy

policy = DiffusionPolicy.from_pretrained("owner/name")  # or the folder
chunk = policy.sample_actions({{"state": ..., "goal|x": ...}}, ddim_steps=8)
```

`ddim-rollout checkpoint=FOLDER` runs it in its environment{rollouts}. Loading it executes nothing.

## What it takes and gives

|  | shape |
| --- | --- |
| observation `state` | (B, 2, 4) |
| observation `goal\\|x` | (B, 2, 2) |
| action chunk | (B, 8, 2) |
| parameters | {parameters} |

## Training

{training}

## Evaluation

{evaluation}
"""


@pytest.fixture
def policy():
    return DiffusionPolicy(CONFIG)


def text(policy, **parts):
    return TEXT.format(parameters=f"{sum(p.numel() for p in policy.parameters()):,}", **parts)


def test_a_policy_of_which_nothing_is_known_has_a_card(policy):
    assert str(model_card(policy, None, None)) == METADATA + text(
        policy,
        env="an environment of your choice",
        rollouts="",
        training="Nothing is noted about it.",
        evaluation="No evaluation was given.",
    )


def test_an_imported_policy_says_where_it_comes_from(policy):
    training = {"imported": {"project": "LeRobot", "source": "diffusion_*pusht"}}
    policy.origin = Origin(env=None, execution_horizon=8, training=training)
    assert "| imported | LeRobot: diffusion\\_\\*pusht |" in model_card(policy, None, None).text


def test_everything_that_is_known_stands_on_the_card_as_it_is(policy, tmp_path):
    """Nothing of it is taken for the template's language, for Markdown or for HTML."""
    env = "<planar> & {{ env }}"
    policy.origin = Origin(
        env={"name": env},
        execution_horizon=5,
        sampler=Sampler(noise_scale=0.6, clip=None),
        training={"dataset": "/home/me/reach-v0", "init": "0f3a", "step": 7, "seed": 1, "x": 2},
    )
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [ROW]}))
    card = model_card(policy, tmp_path / "sweep.json", "mit")
    assert card.text == text(
        policy,
        env="&lt;planar> &amp; {{ env }}",
        rollouts=", with `execution_horizon=5 sampler.clip=null sampler.noise_scale=0.6`, which it records",
        training="|  | value |\n| --- | --- |\n| init | 0f3a |\n| dataset | reach-v0 |\n| step | 7 |\n| seed | 1 |",
        evaluation="| ddim_steps | success | 95 % interval | episodes | mean score | latency (median) |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 1 | 95.0% | 91.0% to 97.3% | 200 | 0.970 | 0.4 ms |\n\n"
        "Episodes from seeds that training never saw. Latencies are of a whole control step of one robot that plans,"
        " with 1 thread(s).",
    )
    assert card.data.license == "mit"
    assert card.data.model_name == f"diffusion policy for {env}"
    assert card.data.eval_results[0].metric_value == 0.95


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [{**ROW, "latency_threads": 2, "busy": True}, {**ROW, "latency_threads": 1}],
            "never saw. Latencies are of a whole control step of one robot that plans, with 1 or 2 thread(s); some were"
            " measured on a busy machine, and are too long.\n",
        ),
        ([{name: value for name, value in ROW.items() if name != "latency_ms_median"}], "never saw.\n"),
    ],
)
def test_the_card_says_what_its_latencies_are_of(policy, tmp_path, rows, said):
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": rows}))
    assert said in str(model_card(policy, tmp_path / "sweep.json", None)) + "\n"


def test_nothing_in_a_name_is_obeyed_by_markdown_or_yaml():
    hostile = "x`\n---\n# head\n![a](http://b/c) <img src=x onerror=1>\x1b[2J | y"
    policy = DiffusionPolicy(dataclasses.replace(CONFIG, observation_shapes={hostile: (4,)}))
    policy.origin = Origin(env={"name": hostile}, execution_horizon=8, training={"dataset": hostile}, plugins=())
    text = str(model_card(policy, None, None))
    metadata, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(metadata)["library_name"] == "ddim-policy"
    assert "\x1b" not in text
    code = re.compile(r"```.*?```|(?<!\\)`[^`\n]*`", re.DOTALL)
    shown = code.sub("", body)
    assert "<img" not in shown
    assert "![a]" not in shown
    assert not [line for line in body.splitlines() if line.startswith(("---", "# head", "![a]"))]
