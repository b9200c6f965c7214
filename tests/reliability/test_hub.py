"""Policies as models of the Hugging Face Hub, offline: the Hub is a folder, a cache, or a recorder of calls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl

from policy import DiffusionPolicy, PolicyConfig, Sampler, load_checkpoint
from policy.model.storage import Origin
from tests.conftest import ENVIRONMENT, ROOT, randomize

CONFIG = PolicyConfig(
    observation_shapes={"state": (4,)},
    action_dim=2,
    obs_size=8,
    encoder={"name": "state", "hidden_size": 8},
    denoiser={"name": "modulated_mlp", "hidden_size": 8, "num_layers": 1},
)
ORIGIN = Origin(
    env={"name": "planar"},
    execution_horizon=5,
    sampler=Sampler(noise_scale=0.5),
    training={"dataset": "/home/me/secret/planar-v0", "step": 7, "seed": 1},
)
FILES = {"config.json", "policy.safetensors", "checksums.json", "README.md"}
EPISODES = [
    {"seed": s, "success": s % 4 > 0, "score": 0.5, "return": 1.0, "steps": 9, "attempts": 1, "late_steps": 0}
    for s in range(20)
]
CELL = {
    **{"cell": "a", "checkpoint": "run/checkpoint", "episodes": 200, "successes": 190, "success_rate": 0.95},
    **{"success_low": 0.91, "success_high": 0.973, "score_mean": 0.97},
}
CELLS = [
    {**CELL, "ddim_steps": 1, "latency_ms_median": 0.42},
    {**CELL, "ddim_steps": 8, "latency_ms_median": 1.93, "success_rate": 0.96},
]


@pytest.fixture
def policy() -> DiffusionPolicy:
    policy = DiffusionPolicy(CONFIG).eval()
    randomize(policy)
    policy.action_normalizer.fit([-2.0, 0.1], [3.0, 0.7])
    policy.origin = ORIGIN
    return policy


@pytest.fixture
def hub_cache(policy, tmp_path, monkeypatch) -> Path:
    """A cache as the Hub's client leaves it, with the policy as me/reach; the network is out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    saved, repository, commit = tmp_path / "saved", tmp_path / "cache" / "models--me--reach", "a" * 40
    policy.save_pretrained(saved)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(saved.iterdir())):
        blob = repository / "blobs" / f"{number:040d}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return tmp_path / "cache"


def same(one: DiffusionPolicy, other: DiffusionPolicy) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return one.config == other.config and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_saved_policy_comes_back_bit_for_bit(policy, tmp_path):
    assert policy.save_pretrained(tmp_path / "reach") is None
    assert {file.name for file in (tmp_path / "reach").iterdir()} == FILES
    back = DiffusionPolicy.from_pretrained(tmp_path / "reach")
    assert type(back) is DiffusionPolicy
    assert same(policy, back)
    assert not back.training
    observations, noise = {"state": torch.full((2, 2, 4), 0.3)}, torch.ones(2, 8, 2)
    assert torch.equal(
        *(p.sample_actions(observations, ddim_steps=4, noise=noise) for p in (policy, back)),
    )


def test_what_it_acts_in_travels_along_but_not_the_folders_of_a_machine(policy, tmp_path):
    policy.save_pretrained(tmp_path / "reach")
    loaded = load_checkpoint(tmp_path / "reach")
    assert (loaded.env, loaded.execution_horizon, loaded.sampler) == (ORIGIN.env, 5, ORIGIN.sampler)
    assert loaded.training == {"dataset": "planar-v0", "step": 7, "seed": 1}
    assert "secret" not in "".join((tmp_path / "reach" / n).read_text() for n in FILES - {"policy.safetensors"})
    loaded.policy.save_pretrained(tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").env == ORIGIN.env
    assert load_checkpoint(tmp_path / "again").digest == loaded.digest


def test_a_policy_that_was_never_trained_is_saved_too(tmp_path):
    policy = DiffusionPolicy(CONFIG)
    policy.save_pretrained(tmp_path / "new")
    loaded = load_checkpoint(tmp_path / "new")
    assert same(policy, loaded.policy)
    assert (loaded.env, loaded.execution_horizon) == (None, 8)


def test_the_commands_act_from_a_saved_folder(policy, tmp_path, run_command):
    policy.save_pretrained(tmp_path / "reach")
    done = run_command(
        "rollout",
        f"checkpoint={tmp_path}/reach",
        "episodes=2",
        "num_envs=1",
        "tracker=none",
        f"output_dir={tmp_path}/out",
    )
    assert "success" in done.stdout
    assert len(json.loads((tmp_path / "out" / "episodes.json").read_text())) == 2


def test_saving_again_replaces_the_weights_and_keeps_the_card_and_other_files(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("my own words")
    (tmp_path / "video.mp4").write_bytes(b"1")
    (tmp_path / ".git").mkdir()
    with torch.no_grad():
        policy.denoiser.leave.bias.add_(1)
    policy.save_pretrained(tmp_path)
    assert same(policy, DiffusionPolicy.from_pretrained(tmp_path))
    assert (tmp_path / "README.md").read_text() == "my own words"
    assert (tmp_path / "video.mp4").exists()


def test_a_runs_own_checkpoint_is_not_saved_over(policy, tmp_path):
    (tmp_path / "training.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a training run resumes from: choose another folder"):
        policy.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


# The Hub


def test_a_repository_is_loaded_from_the_cache_without_a_network(policy, hub_cache):
    assert same(policy, DiffusionPolicy.from_pretrained("me/reach", cache_dir=hub_cache))
    assert same(policy, DiffusionPolicy.from_pretrained("me/reach", cache_dir=hub_cache, local_files_only=True))


def test_a_link_out_of_the_cache_is_refused(hub_cache):
    """The cache's own links lead to files of the repository; these do not."""
    (weights,) = hub_cache.rglob("policy.safetensors")
    outside = hub_cache / "outside"
    outside.write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leaves the folder"):
        DiffusionPolicy.from_pretrained("me/reach", cache_dir=hub_cache)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("me/nowhere", {}), ("me/reach", {"revision": "v2"}), ("no such folder", {}), ("a/b/c", {}), ("./gone", {})],
)
def test_a_missing_repository_is_one_clear_sentence(hub_cache, name, settings):
    with pytest.raises(ValueError) as error:
        DiffusionPolicy.from_pretrained(name, cache_dir=hub_cache, **settings)
    message = str(error.value)
    assert message.startswith(f"{name} is not here, and neither the Hub nor its local cache gives such a repository")
    assert message.endswith("check the name, the connection and your access")
    assert "\n" not in message


def test_another_kind_of_repository_is_refused(hub_cache):
    (config,) = hub_cache.rglob("config.json")
    config.unlink()
    config.write_text(json.dumps({"architectures": ["BertModel"]}))
    next(hub_cache.rglob("checksums.json")).unlink()
    with pytest.raises(ValueError, match="is not a checkpoint of ddim-policy"):
        DiffusionPolicy.from_pretrained("me/reach", cache_dir=hub_cache)


def test_pushing_uploads_the_folder_that_loads(policy, monkeypatch, tmp_path):
    uploaded = {}

    def create(self, repo_id, **settings):
        uploaded.update(repo_id=repo_id, private=settings["private"], token=self.token)
        return RepoUrl(f"https://hub.invalid/{repo_id}", endpoint="https://hub.invalid")

    def upload(self, *, folder_path, **settings):
        uploaded.update(settings)
        for file in Path(folder_path).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return "https://hub.invalid/commit"

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"cells": CELLS}))
    address = policy.push_to_hub(
        "me/reach", private=True, token="mine", model_card_kwargs={"evaluation": sweep, "license": "mit"}
    )
    assert address == "https://hub.invalid/commit"
    assert (uploaded["repo_id"], uploaded["private"], uploaded["token"]) == ("me/reach", True, "mine")
    assert uploaded["repo_type"] == "model"
    assert same(policy, DiffusionPolicy.from_pretrained(tmp_path))
    assert "95.0%" in (tmp_path / "README.md").read_text()


# The model card


def front_matter(policy, **settings) -> dict:
    return yaml.safe_load(str(policy.generate_model_card(**settings)).split("---\n")[1])


def test_the_card_states_what_the_policy_takes_and_gives(policy):
    card = policy.generate_model_card()
    assert isinstance(card, ModelCard)
    assert card.data.library_name == "ddim-policy"
    assert {"diffusion-policy", "robotics"} <= set(card.data.tags)
    assert "license" not in front_matter(policy)
    for said in ("(B, 2, 4)", "(B, 8, 2)", f"{sum(p.numel() for p in policy.parameters()):,}", "planar", "planar-v0"):
        assert said in card.text
    assert "secret" not in str(card)
    assert "No evaluation was given" in card.text


def test_the_card_carries_the_figures_of_a_sweep(policy, tmp_path):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"cells": CELLS}))
    text = policy.generate_model_card(evaluation=file).text
    assert "| 1 | 95.0% | 91.0% to 97.3% | 200 | 0.970 | 0.4 ms |" in text
    assert "| 8 | 96.0% | 91.0% to 97.3% | 200 | 0.970 | 1.9 ms |" in text
    (model,) = front_matter(policy, evaluation=file, license="mit")["model-index"]
    metrics = [metric for result in model["results"] for metric in result["metrics"]]
    assert [metric["value"] for metric in metrics] == [0.95, 0.96]
    assert metrics[0]["args"] == {
        **{"episodes": 200, "success_low": 0.91, "success_high": 0.973, "ddim_steps": 1, "latency_ms_median": 0.42},
    }
    assert front_matter(policy, license="mit")["license"] == "mit"


def test_the_card_carries_the_figures_of_a_rollout(policy, tmp_path):
    file = tmp_path / "episodes.json"
    file.write_text(json.dumps(EPISODES))
    # 15 of 20; the Wilson interval by the closed form: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    p, n, z = 0.75, 20, 1.959964
    middle, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    text = policy.generate_model_card(evaluation=file).text
    assert f"| not noted | 75.0% | {low:.1%} to {high:.1%} | 20 | 0.500 | not noted |" in text


@pytest.mark.parametrize(
    "content", ["", "[", "{}", "[]", "[1]", '{"cells": []}', '{"cells": [{}]}', '{"cells": [{"checkpoint": "a"}]}']
)
def test_figures_that_are_none_are_refused(policy, tmp_path, content):
    file = tmp_path / "sweep.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json is"):
        policy.generate_model_card(evaluation=file)


def test_a_sweep_of_several_policies_does_not_make_a_card(policy, tmp_path):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"cells": [CELLS[0], {**CELLS[1], "checkpoint": "other"}]}))
    with pytest.raises(ValueError, match="is of 2 checkpoints"):
        policy.generate_model_card(evaluation=file)


def test_importing_the_policy_reads_no_token_and_needs_no_network():
    code = "import socket, policy\nfrom huggingface_hub import constants\nprint(constants.HF_TOKEN_PATH)"
    offline = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
