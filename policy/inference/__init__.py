"""Sampling compiled into one program, behind one name, and exported for programs that have no torch."""

from __future__ import annotations

from policy.inference.backends import BACKENDS, SamplerProgram, check_backend, compile_sampler

__all__ = ["BACKENDS", "SamplerProgram", "check_backend", "compile_sampler"]
