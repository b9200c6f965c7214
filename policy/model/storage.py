"""Saving, loading and sharing a policy, as methods of the policy itself.

A model does not know checkpoints. These methods ask a storage, which `policy.checkpoint.hub` provides and
`policy/__init__` puts in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a loaded policy comes from: it is saved with the policy again.

    Attributes:
        env: how to make its environment, or None.
        execution_horizon: the execution horizon that it was evaluated with while training.
        training: how it was trained: JSON data.
    """

    env: dict[str, Any] | None = None
    execution_horizon: int
    training: dict[str, Any] = field(default_factory=dict)


class PolicyStorage(Protocol):
    """Saves and loads policies; `SharedPolicy` says what each method takes and raises."""

    def save(self, policy: Any, folder: Path, **card: Any) -> None:
        """Write the policy and its model card into a folder."""

    def push(self, policy: Any, repo_id: str, **options: Any) -> str:
        """Upload the policy; gives the address of the commit."""
        ...

    def load(self, name: str, *, device: str, **download: Any) -> Any:
        """Load a policy from a folder or from the Hub."""
        ...

    def card(self, policy: Any, *, evaluation: Path | None, license: str | None) -> ModelCard:
        """The README.md of a saved policy."""
        ...


_providers: list[Callable[[], PolicyStorage]] = []


def provide_storage(provider: Callable[[], PolicyStorage]) -> None:
    """Say what gives the storage; it is asked when a policy is saved or loaded. The newest provider counts."""
    _providers[:] = [provider]


class SharedPolicy:
    """The methods by which `DiffusionPolicy` is saved and shared, with the names and conventions of the Hub.

    Attributes:
        origin: where a loaded policy comes from; None for a policy that was not loaded.
    """

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

        It leaves the files of an earlier call as they were until everything new is written.

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
            SaveError: it cannot be written, because the disk is full, say.
        """
        folder, card = Path(save_directory), model_card_kwargs or {}
        _storage().save(self, folder, **card)
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)
        return None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the policy to the Hugging Face Hub, in one commit.

        Args:
            repo_id: the repository, as `owner/name`; made if need be.
            **options: of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`, `token`, `commit_message` and
                `model_card_kwargs`, the arguments of `generate_model_card`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: see `save_pretrained`.
        """
        return _storage().push(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        device: str = "cpu",
    ) -> Self:
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
            The policy in evaluation mode, without gradients; its `origin` names its environment.

        Raises:
            ValueError: nothing there, or nothing that can be loaded; see `load_checkpoint`.
        """
        loaded: Self = _storage().load(
            str(pretrained_model_name_or_path),
            device=device,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            token=token,
            local_files_only=local_files_only,
        )
        return loaded

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
        path = None if evaluation is None else Path(evaluation)
        return _storage().card(self, evaluation=path, license=license)


def _storage() -> PolicyStorage:
    return _providers[0]()
