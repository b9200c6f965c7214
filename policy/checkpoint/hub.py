"""Policies on the Hugging Face Hub: the storage behind `DiffusionPolicy.save_pretrained`, `push_to_hub` and the like.

A shared folder is a checkpoint folder that can act (config.json, policy.safetensors, checksums.json) with a README.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin

from policy.checkpoint.description import dataset_names
from policy.checkpoint.files import CHECKSUMS, CONFIG, TRAINING_RECORD, WEIGHTS, adding
from policy.checkpoint.model_card import model_card
from policy.checkpoint.reading import load_checkpoint
from policy.checkpoint.writing import write_policy
from policy.common.hub import download
from policy.model.diffusion_policy import DiffusionPolicy
from policy.model.storage import Origin

README = "README.md"


class HubStorage:
    """Policies in folders and on the Hub; see `policy.model.storage.SharedPolicy` for arguments and errors."""

    def save(self, policy: DiffusionPolicy, folder: Path, **card: Any) -> None:
        """Write the policy and its model card into a folder; a README.md in it is kept."""
        if (folder / TRAINING_RECORD).exists():
            raise ValueError(f"{folder} is a checkpoint that a training run resumes from: choose another folder")
        text = None if (folder / README).exists() else policy.generate_model_card(**card)
        with adding(folder) as new:
            _write(new, policy)
            if text is not None:
                text.save(new / README)

    def push(self, policy: DiffusionPolicy, repo_id: str, **options: Any) -> str:
        """Upload the policy, and return the address of the commit."""
        # The library's own upload. Of the policy, it only calls `save_pretrained`, with a temporary folder.
        address: str = ModelHubMixin.push_to_hub(policy, repo_id, **options)  # type: ignore[arg-type]
        return address

    def load(self, name: str, *, device: str, **options: Any) -> DiffusionPolicy:
        """Load a policy from a folder or from the Hub."""
        if os.path.isdir(name):
            return load_checkpoint(name, device).policy
        snapshot = download(name, allow_patterns=[CONFIG, WEIGHTS, CHECKSUMS], **options)
        # In the cache, a snapshot's files are links into a folder that lies beside all snapshots of the repository.
        return load_checkpoint(snapshot, device, root=snapshot.parents[1]).policy

    def card(self, policy: DiffusionPolicy, *, evaluation: Path | None, license: str | None) -> ModelCard:
        """The README.md of a saved policy."""
        return model_card(policy, evaluation, license)


def _write(folder: Path, policy: DiffusionPolicy) -> None:
    origin = policy.origin or Origin(execution_horizon=policy.config.action_horizon)
    training = dict(origin.training)
    if names := dataset_names(training):  # the rest of their paths is private
        training["dataset"] = names if isinstance(training["dataset"], list) else names[0]
    write_policy(
        folder,
        policy,
        env=origin.env,
        execution_horizon=origin.execution_horizon,
        sampler=origin.sampler,
        training=training,
        plugins=origin.plugins,
    )
