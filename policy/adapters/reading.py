"""Which adapter reads what a user names: a folder or a repository of LeRobot, or a .ckpt of diffusion_policy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from policy.adapters.diffusion_policy import read_diffusion_policy
from policy.adapters.imported import Imported
from policy.adapters.lerobot import ADAPTER, CONFIG, LEROBOT_FILES, WEIGHTS, adapter_weights, read_lerobot
from policy.checkpoint.files import CHECKSUMS, refusing
from policy.common.arguments import at_home
from policy.common.hub import REPOSITORY, download

# Where the projects' trainings leave policies inside their own folders, the newest first.
INSIDE = (
    "pretrained_model",
    "last/pretrained_model",
    "checkpoints/last/pretrained_model",
    "*/pretrained_model",
    "checkpoints/*/pretrained_model",
    "latest.ckpt",
    "checkpoints/latest.ckpt",
    "*.ckpt",
    "checkpoints/*.ckpt",
)
# What `git clone` leaves in place of a large file where Git LFS is not installed.
POINTER = b"version https://git-lfs"


def read_source(source: str, *, average: bool = True) -> Imported:
    """Read another project's checkpoint.

    Args:
        source: a folder or a repository (`owner/name`) of LeRobot, or a .ckpt file of diffusion_policy.
        average: whether to take the averaged weights of a .ckpt file that has them.

    Returns:
        The checkpoint in our terms.

    Raises:
        ValueError: there is no such source, it is something else, or it has parts that cannot be imported.
    """
    path = at_home("source", source)
    with refusing(path):
        if path.is_file():
            _refuse_other_files(path)
            return read_diffusion_policy(path, average=average)
        if not path.exists():
            if not REPOSITORY.fullmatch(source):
                raise ValueError(
                    f"source={source} is neither a file, nor a folder, nor a repository of the Hub (owner/name)"
                )
            path = download(source, allow_patterns=list(LEROBOT_FILES))
        if not average:
            raise ValueError(f"average=false is for .ckpt files; {source} is a folder, which has one set of weights")
        _refuse_other_folders(path)
        return read_lerobot(path)


def _refuse_other_files(file: Path) -> None:
    _refuse_pointers([file])
    if file.name in (CONFIG, WEIGHTS):
        raise ValueError(f"{file} is a part of a LeRobot policy: name its folder, source={file.parent}")


def _refuse_pointers(files: Iterable[Path]) -> None:
    for file in files:
        if file.is_file():  # opening a pipe would block
            with file.open("rb") as opened:
                if opened.read(len(POINTER)) == POINTER:
                    raise ValueError(f"{file} is a pointer of Git LFS and not the file: run `git lfs pull` there")


def _refuse_other_folders(folder: Path) -> None:
    if (folder / CHECKSUMS).exists():
        raise ValueError(f"{folder} is a checkpoint of ddim-policy already: use checkpoint={folder}")
    if (folder / "meta" / "info.json").exists():
        raise ValueError(f"{folder} is a LeRobot dataset and not a policy: name the policy's own folder")
    if (folder / ADAPTER).exists():
        raise adapter_weights(folder)
    if not (folder / CONFIG).is_file():
        inside = next((found for place in INSIDE for found in sorted(folder.glob(place), reverse=True)), None)
        hint = f"source={inside}" if inside else f"a LeRobot folder with {CONFIG}, or a .ckpt file of diffusion_policy"
        raise ValueError(f"{folder} holds no policy: name {hint}")
    _refuse_pointers(sorted(folder.glob("*.safetensors")))
