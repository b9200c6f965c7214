"""Checkpoints: folders of safetensors and JSON. Loading one never executes anything it holds.

A run folder holds

checkpoint/              the newest, which a resumed run goes on from, and which all commands name
  config.json            what the policy is made of, its environment, how it was trained
  policy.safetensors     the averaged weights and the normalisers' statistics: what acts
  training.safetensors   the newest weights and the optimiser's memory: what a resumed run needs besides
  training.json          step and history
  checksums.json         the SHA-256 of every file above
checkpoints/             acts like any other, but does not resume: config.json, policy.safetensors, checksums.json
  step_0003000/          the last `train.keep_last`, the newest among them
  best/                  of those saved right after a rollout, the one with the highest success, then score; without
                         rollouts, of those saved right after a validation, the one with the lowest loss

A folder is written beside its place, synced, and renamed, so that at every moment a whole one can be found. The files
of `checkpoints/` are hard links where the file system has them: the newest costs no space of its own.

Schemas: 1 had no checksums.json; 2 is the current one.
"""

from policy.checkpoint.environment import check_env, choose_env
from policy.checkpoint.files import SCHEMA_VERSION, is_checkpoint
from policy.checkpoint.keeping import keep_checkpoint
from policy.checkpoint.reading import Checkpoint, load_checkpoint, resume_training
from policy.checkpoint.writing import save_checkpoint
from policy.common.errors import SaveError

__all__ = [
    "SCHEMA_VERSION",
    "Checkpoint",
    "SaveError",
    "check_env",
    "choose_env",
    "is_checkpoint",
    "keep_checkpoint",
    "load_checkpoint",
    "resume_training",
    "save_checkpoint",
]
