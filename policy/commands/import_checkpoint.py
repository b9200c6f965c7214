"""`ddim-import`: turn another project's policy into a checkpoint of ours.

output_dir/
  checkpoint/          the policy, for all other commands
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from policy.adapters.imported import Imported, build_policy, with_keys
from policy.adapters.parity import Comparison, compare, read_reference
from policy.adapters.reading import read_source
from policy.checkpoint.files import CHECKPOINT, TRAINING_RECORD, is_checkpoint, open_folder, replacing
from policy.checkpoint.writing import write_policy
from policy.common.arguments import at_home
from policy.common.errors import ParityError
from policy.common.markdown import markdown_table
from policy.common.next_line import next_line
from policy.common.output import output_folder
from policy.diffusion.sampler import steps_to_compare
from policy.model.diffusion_policy import DiffusionPolicy
from policy.rollout.episodes import check_spaces


def import_checkpoint(
    make_env: Callable[..., Any],
    *,
    source: str,
    keys: Mapping[str, str] | None = None,
    average: bool = True,
    env: dict[str, Any] | None = None,
    verify: Path | None = None,
    output_dir: Path | None = None,
) -> None:
    """Import a diffusion policy of LeRobot or of diffusion_policy as a checkpoint of ours. Nothing in it is executed.

    Args:
        make_env: makes an environment from its settings.
        source: a folder or a repository (`owner/name`) of LeRobot, or a .ckpt file of diffusion_policy.
        keys: names of the observations in the source by the names to use, `{ours: theirs}`.
        average: take the averaged weights of a .ckpt file; `false` takes the plain ones.
        env: the environment that the policy acts in, which is recorded in the checkpoint.
        verify: file with outputs of the other project's code (.npz), which the imported policy must reproduce.
        output_dir: receives the folder `checkpoint`; by default it is a new folder under outputs/import.

    Raises:
        ValueError: the source cannot be imported, or does not fit the environment.
        ParityError: an output of the imported policy differs from `verify`.
    """
    if output_dir:
        _check_replaceable(output_dir / CHECKPOINT)
    reference = None if verify is None else read_reference(verify)
    read = read_source(source, average=average)
    imported = with_keys(read, keys or {})
    policy = build_policy(imported, source)
    print(_described(imported, policy, source))
    if env:
        with closing(make_env(**env)) as made:
            check_spaces(imported.config, made, keys, family=env["name"])
    if reference is not None:
        ours = dict(zip(read.config.observation_shapes, imported.config.observation_shapes, strict=True))
        _verify(compare(policy, reference, keys=ours, execution_horizon=imported.execution_horizon), source)
    folder = output_folder(output_dir, "import") / CHECKPOINT
    _write(folder, imported, policy, source, env)
    print(f"checkpoint: {folder}")
    if not env:
        print("no environment is chosen: import again with env=..., or choose one with env=... of ddim-sweep")
        print(next_line("ddim-export", checkpoint=folder))
        return
    own = dict(imported.sampler)
    steps = own.pop("ddim_steps")
    print(next_line("ddim-sweep", checkpoint=folder, env=env, ddim_steps=steps_to_compare(steps), sampler=own))


def _check_replaceable(folder: Path) -> None:
    """Reject a place where anything but an earlier import would be lost, such as the source itself."""
    if (folder / TRAINING_RECORD).exists():
        raise ValueError(f"a training run resumes from {folder}: choose another output_dir=")
    if is_checkpoint(folder) and not _was_imported(folder):
        raise ValueError(f"{folder} exists, and ddim-import did not write it: choose another output_dir=")


def _was_imported(folder: Path) -> bool:
    try:
        training = open_folder(folder).config.get("training")
    except ValueError:  # it is not a checkpoint of ours
        return False
    return isinstance(training, dict) and "imported" in training


def _described(imported: Imported, policy: DiffusionPolicy, source: str) -> str:
    config = imported.config
    facts = {
        "policy": f"{imported.project}, {policy.num_parameters / 1e6:.2f} M parameters,"
        f" encoder {config.encoder['name']}, denoiser {config.denoiser['name']}",
        **imported.found,
        "observations here": ", ".join(f"{key} {shape}" for key, shape in config.observation_shapes.items())
        + f"; the last {config.obs_horizon}",
        "actions here": f"chunks of {config.action_horizon}, after {config.past_actions} past ones that are cut off;"
        f" execution_horizon={imported.execution_horizon}",
    }
    width = max(map(len, facts))
    lines = [f"{source} holds", *(f"  {name:<{width}}  {text}" for name, text in facts.items())]
    return "\n".join([*lines, "what differs", *(f"  - {sentence}" for sentence in imported.differences)])


def _verify(comparisons: Sequence[Comparison], source: str) -> None:
    """Print how far the policy is from the other project's outputs.

    Raises:
        ParityError: one of them is beyond its bound.
    """
    rows = [(c.name, f"{c.difference:.1e}", f"{c.bound:.0e}", "yes" if c.holds else "NO") for c in comparisons]
    print(markdown_table(("compared", "largest difference", "allowed", "holds"), rows))
    if failed := [comparison.name for comparison in comparisons if not comparison.holds]:
        raise ParityError(
            f"the policy imported from {source} differs from the reference in {', '.join(failed)}: nothing was written"
        )


def _write(
    folder: Path, imported: Imported, policy: DiffusionPolicy, source: str, env: Mapping[str, Any] | None
) -> None:
    training = {
        "imported": {
            "project": imported.project,
            # The rest of a path on this machine is private; the name of a repository is not.
            "source": Path(source).name if at_home("source", source).exists() else source,
            **imported.found,
        }
    }
    with replacing(folder) as new:
        write_policy(new, policy, env=env, execution_horizon=imported.execution_horizon, training=training)
