"""Saving, loading and sharing a policy, as methods of the policy itself.

The model must not import the checkpoint room. These methods therefore call a storage object, which
`policy.checkpoint.hub` defines and `policy/__init__` provides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from policy.diffusion.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of a loaded policy. It is saved again together with the policy.

    Attributes:
        env: settings that make its environment, or None.
        execution_horizon: the execution horizon of the rollouts during its training.
        sampler: the sampler settings of these rollouts; None for the defaults.
        training: the record of its training, as JSON data.
        plugins: names of the plugins that were loaded when it was trained, for messages only.
    """

    env: dict[str, Any] | None = None
    execution_horizon: int
    sampler: Sampler | None = None
    training: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()


class PolicyStorage(Protocol):
    """Saves and loads policies; see `SharedPolicy` for the arguments and exceptions of each method."""

    def save(self, policy: Any, folder: Path, **card: Any) -> None:
        """Write the policy and its model card into a folder."""

    def push(self, policy: Any, repo_id: str, **options: Any) -> str:
        """Upload the policy and return the address of the commit."""
        ...

    def load(self, name: str, *, device: str, **download: Any) -> Any:
        """Load a policy from a folder or from the Hub."""
        ...

    def card(self, policy: Any, *, evaluation: Path | None, license: str | None) -> ModelCard:
        """Return the README.md of a saved policy."""
        ...


_providers: list[Callable[[], PolicyStorage]] = []


def provide_storage(provider: Callable[[], PolicyStorage]) -> None:
    """Set the function that returns the storage. It is called when a policy is saved or loaded."""
    _providers[:] = [provider]


class SharedPolicy:
    """The methods that save, load and share a `DiffusionPolicy`, with the names and conventions of the Hub.

    Attributes:
        origin: the origin of a loaded policy; None for a policy that was not loaded.
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

        The files of an earlier call stay unchanged until all new ones are written.

        Args:
            save_directory: the folder; it is created if needed, and a README.md in it is kept.
            config: not used; the policy's own configuration is saved.
            repo_id: repository for `push_to_hub`, as `owner/name`; by default the folder's name.
            push_to_hub: whether to upload the policy afterwards.
            model_card_kwargs: arguments of `generate_model_card`, such as `{"evaluation": "sweep.json"}`.
            **push_to_hub_kwargs: arguments of the method `push_to_hub`.

        Returns:
            The address of the commit with `push_to_hub=True`, else None.

        Raises:
            ValueError: a training run resumes from that folder, or `generate_model_card` fails.
            SaveError: the policy cannot be written, for example because the disk is full.
        """
        folder, card = Path(save_directory), model_card_kwargs or {}
        _storage().save(self, folder, **card)
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=card, **push_to_hub_kwargs)
        return None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the policy to the Hugging Face Hub, in one commit.

        Args:
            repo_id: the repository, as `owner/name`; it is created if needed.
            **options: arguments of `huggingface_hub.ModelHubMixin.push_to_hub`, such as `private`, `token`,
                `commit_message` and `model_card_kwargs`, the arguments of `generate_model_card`.

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
        """Load a policy that is ready to act, from a folder or from the Hub. No loaded code is executed.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hub as `owner/name`.
            force_download: download the files even if they are in the cache.
            token: access token of the Hub; by default that of `hf auth login`.
            cache_dir: cache folder of the Hub's files; by default the library's own.
            local_files_only: use only the cache.
            revision: a branch, tag or commit.
            device: device for the policy.

        Returns:
            The policy in evaluation mode, without gradients; its `origin` names its environment.

        Raises:
            ValueError: nothing is found there, or it cannot be loaded; see `load_checkpoint`.
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
        """Return the README.md of a saved policy.

        Args:
            evaluation: `sweep.json` or `episodes.json` of this policy, for the card's figures.
            license: licence for the card's metadata, such as `mit`; None leaves it to the user.

        Returns:
            The card.

        Raises:
            ValueError: the evaluation cannot be read, or covers several checkpoints.
        """
        path = None if evaluation is None else Path(evaluation)
        return _storage().card(self, evaluation=path, license=license)


def _storage() -> PolicyStorage:
    return _providers[0]()
