"""Diffusion policies: train them from demonstrations, roll them out, find out how few denoising steps suffice."""

from policy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from policy.control.real_time import RealTimeController
from policy.control.receding_horizon import RecedingHorizonController
from policy.control.timeline import ControllerSettings
from policy.diffusion.sampler import Sampler
from policy.diffusion.schedule import NoiseSchedule, make_schedule
from policy.model.diffusion_policy import Batch, DiffusionPolicy, PolicyConfig
from policy.training.loop import TrainSettings

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
