"""Diffusion policies: train them from demonstrations, roll them out, find out how few denoising steps suffice."""

from policy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from policy.controller import RecedingHorizonController
from policy.diffusion_policy import Batch, DiffusionPolicy, PolicyConfig
from policy.execution import ControllerSettings
from policy.real_time import RealTimeController
from policy.sampler import Sampler
from policy.schedule import NoiseSchedule, make_schedule
from policy.training import TrainSettings

__all__ = [
    "Batch",
    "Checkpoint",
    "ControllerSettings",
    "DiffusionPolicy",
    "NoiseSchedule",
    "PolicyConfig",
    "RealTimeController",
    "RecedingHorizonController",
    "Sampler",
    "TrainSettings",
    "load_checkpoint",
    "make_schedule",
    "save_checkpoint",
]
