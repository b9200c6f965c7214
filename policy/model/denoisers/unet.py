"""A U-Net over the chunk's time axis."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from policy.model.denoisers.denoiser import Denoiser
from policy.model.denoisers.timestep import TimestepEmbedding
from policy.model.sizes import check_sizes

# Channels from which a convolution of a training batch is faster as a matrix product on a CPU.
WIDE = 512


class Convolution(nn.Conv1d):
    """A convolution over time, which wide layers compute as a matrix product in training on a CPU.

    PyTorch's convolutions are slow there, because chunks are short: forward and backward of a batch of 64 take two
    thirds of the time as products of windows (B x T, inputs x kernel) with a matrix (inputs x kernel, outputs).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, T) to (B, outputs, T')."""
        wide = min(self.in_channels, self.out_channels) >= WIDE
        if not (wide and self.training and x.device.type == "cpu"):
            return super().forward(x)
        (kernel_size,), (stride,), padding = self.kernel_size, self.stride, int(self.padding[0])
        windows = nn.functional.pad(x, (padding, padding)).unfold(2, kernel_size, stride)  # (B, inputs, T', kernel)
        rows, length = len(x), windows.shape[2]
        windows = windows.transpose(1, 2).reshape(rows * length, -1)
        return nn.functional.linear(windows, self.weight.flatten(1), self.bias).view(rows, length, -1).transpose(1, 2)


def convolution(inputs: int, outputs: int, kernel_size: int, groups: int) -> nn.Sequential:
    """Build a convolution with group norm and Mish, (B, inputs, T) to (B, outputs, T)."""
    return nn.Sequential(
        Convolution(inputs, outputs, kernel_size, padding=kernel_size // 2), nn.GroupNorm(groups, outputs), nn.Mish()
    )


class FiLMBlock(nn.Module):
    """Residual block of two convolutions, with a scale and a shift per channel in between (FiLM, Perez et al. 2018)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        timestep_size: int,
        obs_size: int,
        kernel_size: int,
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, kernel_size, groups)
        # Together these two are one linear layer on the concatenation of timestep and observation.
        self.modulate_by_timestep = nn.Linear(timestep_size, 2 * outputs)
        self.modulate_by_observation = nn.Linear(obs_size, 2 * outputs, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.second = convolution(outputs, outputs, kernel_size, groups)
        self.skip = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def modulation(self, timestep: Tensor, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Map (..., B or 1, timestep_size) and (B, obs_size) to 1 + scale and shift, each (..., B, outputs)."""
        modulated = self.modulate_by_timestep(timestep) + self.modulate_by_observation(observation)
        scale, shift = modulated.chunk(2, dim=-1)
        return 1 + scale, shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Apply the block to x (B, inputs, T) with its `modulation` (B, outputs); returns (B, outputs, T)."""
        h = self.first(x) * scale.unsqueeze(2) + shift.unsqueeze(2)
        return self.second(self.dropout(h)) + self.skip(x)


class Level(nn.Module):
    """Two blocks, the first of which changes the number of channels."""

    def __init__(self, inputs: int, outputs: int, block: Callable[[int, int], FiLMBlock]) -> None:
        super().__init__()
        self.first, self.second = block(inputs, outputs), block(outputs, outputs)

    def modulation(self, timestep: Tensor, observation: Tensor) -> tuple[Tensor, ...]:
        """Return the four tensors of both blocks; see `FiLMBlock.modulation`."""
        return *self.first.modulation(timestep, observation), *self.second.modulation(timestep, observation)

    def forward(self, x: Tensor, *modulation: Tensor) -> Tensor:
        """Apply both blocks to x (B, inputs, T) with the level's `modulation`; returns (B, outputs, T)."""
        return self.second(self.first(x, *modulation[:2]), *modulation[2:])


class UNet(Denoiser):
    """A U-Net of convolutions over the chunk at several lengths, each half the previous one (Chi et al. 2023, the CNN).

    Any `action_horizon` works: odd lengths are rounded up on the way down and cropped on the way up.

    Args:
        obs_size: width of the observation embedding.
        action_dim: width of one action.
        action_horizon: actions in one chunk.
        widths: channels at each length, from the whole chunk to the shortest; multiples of `groups` and larger than it.
        kernel_size: number of actions that one convolution covers (odd).
        groups: number of channel groups in each group norm.
        last_groups: number of channel groups in the last group norm; None for `groups`.
        timestep_size: width of the timestep embedding (even).
        endpoint: whether the frequencies of the timestep embedding include the lowest one, 1 / 10,000.
        num_steps: T of the schedule.
        dropout: dropout probability inside the blocks.

    Raises:
        ValueError: a size below 1, an even kernel, an odd `timestep_size`, or widths that do not divide into groups.
    """

    def __init__(
        self,
        *,
        obs_size: int,
        action_dim: int,
        action_horizon: int,
        num_steps: int,
        widths: tuple[int, ...] = (64, 128),
        kernel_size: int = 5,
        groups: int = 8,
        last_groups: int | None = None,
        timestep_size: int = 128,
        endpoint: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(
            obs_size=obs_size,
            action_dim=action_dim,
            action_horizon=action_horizon,
            kernel_size=kernel_size,
            groups=groups,
            timestep_size=timestep_size,
            num_steps=num_steps,
        )
        check_widths(widths, groups)
        if last_groups is not None and (last_groups < 1 or widths[0] % last_groups):
            raise ValueError(f"last_groups must divide the first of the widths, {widths[0]}; got {last_groups}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that a convolution is centred; got {kernel_size}")
        self.embed_timestep = nn.Sequential(
            TimestepEmbedding(num_steps, timestep_size, endpoint),
            nn.Linear(timestep_size, 4 * timestep_size),
            nn.Mish(),
            nn.Linear(4 * timestep_size, timestep_size),
        )
        block = partial(
            FiLMBlock,
            timestep_size=timestep_size,
            obs_size=obs_size,
            kernel_size=kernel_size,
            groups=groups,
            dropout=dropout,
        )

        pairs = list(itertools.pairwise((action_dim, *widths)))
        self.down = nn.ModuleList(Level(above, below, block) for above, below in pairs)
        self.shorten = nn.ModuleList(Convolution(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.middle = Level(widths[-1], widths[-1], block)
        self.up = nn.ModuleList(Level(2 * below, above, block) for above, below in reversed(pairs[1:]))
        self.lengthen = nn.ModuleList(
            nn.ConvTranspose1d(width, width, 4, stride=2, padding=1) for width in reversed(widths[:-1])
        )
        self.last = convolution(widths[0], widths[0], kernel_size, last_groups or groups)
        self.leave = nn.Conv1d(widths[0], action_dim, 1)

    def conditions(self, embedded_timestep: Tensor, obs_embedding: Tensor) -> tuple[Tensor, ...]:
        """Return four tensors (..., B, channels) for each level in turn; see `Level.modulation`."""
        timestep, observation = nn.functional.mish(embedded_timestep), nn.functional.mish(obs_embedding)
        levels = [*self.down, self.middle, *self.up]
        return tuple(part for level in levels for part in level.modulation(timestep, observation))

    def denoise(self, noisy_actions: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """Reduce the chunk to its shortest length and expand it again; see `Denoiser.denoise` for the shapes."""
        modulations = (conditions[first : first + 4] for first in range(0, len(conditions), 4))
        x = noisy_actions.transpose(1, 2)
        passed = []
        for level, shorten in zip(self.down, [*self.shorten, nn.Identity()], strict=True):
            passed.append(level(x, *next(modulations)))
            x = shorten(passed[-1])
        x = self.middle(x, *next(modulations))
        for level, lengthen in zip(self.up, self.lengthen, strict=True):
            x = level(torch.cat([x, passed.pop()], dim=1), *next(modulations))
            x = lengthen(x)[..., : passed[-1].shape[-1]]
        return self.leave(self.last(x)).transpose(1, 2)


def check_widths(widths: Sequence[int], groups: int) -> None:
    """Reject channel widths that group norm cannot divide into groups of two or more channels.

    Raises:
        ValueError: invalid widths; the message gives them.
    """
    # With groups of one channel, group norm of a chunk of one action would map every number to zero.
    if not widths or any(
        isinstance(width, bool) or not isinstance(width, int) or width % groups or width <= groups for width in widths
    ):
        raise ValueError(
            f"widths must be whole numbers, each a multiple of groups={groups} and larger; got {list(widths)}"
        )
