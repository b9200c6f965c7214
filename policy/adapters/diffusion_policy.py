"""Diffusion policies of real-stanford/diffusion_policy."""

from __future__ import annotations

from pathlib import Path

from policy.adapters.imported import Imported


def read_diffusion_policy(path: Path, *, average: bool = True) -> Imported:
    raise ValueError(f"{path}: not read yet")
