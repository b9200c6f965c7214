"""Checkpoints: folders of safetensors and JSON. Loading one never executes any of its content.

A run folder holds, beside the page of the run and its metrics (history.jsonl),

checkpoint/              the newest checkpoint: a run resumes from it, and other commands are given this folder
  config.json            the policy's configuration, its environment and its training settings
  policy.safetensors     the averaged weights and the normalisers' statistics, which acting needs
  training.safetensors   the newest weights and the optimiser's state, which only resuming needs
  training.json          step and history
  checksums.json         the SHA-256 of every file above
checkpoints/             kept checkpoints, which can act but not resume: config.json, policy.safetensors, checksums.json
  step_0003000/          the last `train.keep_last`, including the newest
  best/                  of those saved right after a rollout, the one with the highest success, then score; without
                         rollouts, of those saved right after a validation, the one with the lowest loss

A folder is written beside its final place, synced and renamed, so that a complete one exists at every moment. The files
of `checkpoints/` are hard links where the file system supports them, so that the newest takes no extra space.

Schemas: 1 had no checksums.json; up to 2, a state encoder had no skip connection; up to 3, no sampler was recorded;
4 is the current one.
"""

from policy.checkpoint.description import describe_checkpoint, next_use
from policy.checkpoint.environment import choose_env, merge_env, only_of_the_user
from policy.checkpoint.files import SCHEMA_VERSION, is_checkpoint
from policy.checkpoint.keeping import best_entry, describe_best, keep_checkpoint, measured
from policy.checkpoint.reading import Checkpoint, digest_of, load_checkpoint, read_history
from policy.checkpoint.resuming import resume_training
from policy.checkpoint.writing import save_checkpoint
from policy.common.errors import SaveError

__all__ = [
    "SCHEMA_VERSION",
    "Checkpoint",
    "SaveError",
    "best_entry",
    "choose_env",
    "describe_best",
    "describe_checkpoint",
    "digest_of",
    "is_checkpoint",
    "keep_checkpoint",
    "load_checkpoint",
    "measured",
    "merge_env",
    "next_use",
    "only_of_the_user",
    "read_history",
    "resume_training",
    "save_checkpoint",
]
