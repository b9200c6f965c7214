"""Denoising Diffusion Implicit Models (Song, Meng and Ermon, ICLR 2021, arXiv 2010.02502): the public functions."""

from policy.diffusion.ddim import *  # noqa: F403
from policy.diffusion.ddim import SPACINGS as SPACINGS
