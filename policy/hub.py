"""Policies on the Hugging Face Hub, by its conventions: `save_pretrained`, `from_pretrained`, `push_to_hub`.

What travels is a checkpoint folder that acts (config.json, policy.safetensors, checksums.json) with a README.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

if TYPE_CHECKING:
    from policy.model.diffusion_policy import DiffusionPolicy

README = "README.md"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a loaded policy comes from: what is saved with it again.

    Attributes:
        env: how to make its environment, or None.
        execution_horizon: what it was evaluated with while training.
        training: how it was trained: JSON data.
    """

    env: dict[str, Any] | None = None
    execution_horizon: int
    training: dict[str, Any] = field(default_factory=dict)


class HubPolicy(ModelHubMixin):
    """What makes `DiffusionPolicy` a model of the Hub; only the format of the files is ours.

    `push_to_hub(repo_id, ...)` is `ModelHubMixin`'s own: it saves into a temporary folder and uploads that. Its
    `model_card_kwargs` are the arguments of `generate_model_card`.

    Attributes:
        origin: where a loaded policy comes from; None for one that was not loaded.
    """

    # The files are read and written by `policy.checkpoint`, which knows policies: hence the imports inside functions.

    origin: Origin | None = None

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Save the policy and its model card into a folder that `from_pretrained` and all commands load.

        Unlike `ModelHubMixin`'s own, it leaves what an earlier call saved as it was until everything new is written.

        Args:
            save_directory: made if need be; a README.md in it is kept.
            config: not used: the policy's own is saved.
            repo_id: with `push_to_hub`, as `owner/name`; by default the folder's name.
            push_to_hub: upload it afterwards.
            model_card_kwargs: of `generate_model_card`, such as `{"evaluation": "sweep.json"}`.
            **push_to_hub_kwargs: of `push_to_hub`.

        Returns:
            The address of the commit with `push_to_hub=True`, else None.

        Raises:
            ValueError: a training run resumes from that folder, or `generate_model_card` refuses.
            SaveError: it cannot be written: the disk is full, say.
        """
        from policy.checkpoint.files import TRAINING_RECORD, adding

        folder, card = Path(save_directory), model_card_kwargs or {}
        if (folder / TRAINING_RECORD).exists():
            raise ValueError(f"{folder} is what a training run resumes from: choose another folder")
        text = None if (folder / README).exists() else self.generate_model_card(**card)
        with adding(folder) as new:
            self._save_pretrained(new)
            if text is not None:
                text.save(new / README)
        if push_to_hub:
            address: str = self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)
            return address
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        from policy.checkpoint.writing import write_policy

        policy = _policy(self)
        origin = policy.origin or Origin(execution_horizon=policy.config.action_horizon)
        training = dict(origin.training)
        if isinstance(training.get("dataset"), str):
            training["dataset"] = Path(training["dataset"]).name  # the folders of a machine are nobody else's business
        write_policy(
            save_directory, policy, env=origin.env, execution_horizon=origin.execution_horizon, training=training
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # nothing but the device can be chosen about a saved policy
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str = "cpu",
    ) -> DiffusionPolicy:
        """Load a policy that is ready to act, from a folder or from the Hub. It executes nothing that it loads.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hub as `owner/name`.
            force_download: even if it is in the cache.
            token: of the Hub; by default that of `hf auth login`.
            cache_dir: of the Hub's files; by default the usual one.
            local_files_only: use the cache alone.
            revision: a branch, tag or commit.
            device: where to put it.

        Returns:
            The policy in evaluation mode, without gradients; its `origin` says what it acts in.

        Raises:
            ValueError: nothing there, or nothing that can be loaded; see `load_checkpoint`.
        """
        from policy.checkpoint.files import CHECKSUMS, CONFIG, WEIGHTS
        from policy.checkpoint.reading import load_checkpoint

        name = str(pretrained_model_name_or_path)
        if os.path.isdir(name):
            return load_checkpoint(name, device).policy
        try:
            snapshot = snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=[CONFIG, WEIGHTS, CHECKSUMS],
            )
        except (OSError, ValueError, EntryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name} is no folder here, and neither the Hub nor its local cache gives such a repository ({reason}):"
                " check the name, the connection and your access"
            ) from error
        # The cache keeps a repository's files in a folder beside its snapshots, which link to them.
        return load_checkpoint(snapshot, device, root=Path(snapshot).parents[1]).policy

    def generate_model_card(self, *, evaluation: str | Path | None = None, license: str | None = None) -> ModelCard:
        """The README.md of a saved policy.

        Args:
            evaluation: `sweep.json` or `episodes.json` of this policy, for the figures.
            license: for the card's metadata, such as `mit`; left to the user.

        Returns:
            The card.

        Raises:
            ValueError: the evaluation cannot be read, or is of several checkpoints.
        """
        from policy.model_card import model_card

        return model_card(_policy(self), None if evaluation is None else Path(evaluation), license)


def _policy(mixin: HubPolicy) -> DiffusionPolicy:
    from policy.model.diffusion_policy import DiffusionPolicy

    assert isinstance(mixin, DiffusionPolicy)
    return mixin
