"""Noise on where the robot is in a batch of demonstrations, and what it holds, with actions that lead them back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from policy.common.observations import Batch, Observations
from policy.data.corrections import Corrections
from policy.data.holding import NOTHING
from policy.training.numbers import joined_numbers, split_numbers

# Share of the windows that get noise, of those in which nothing moves but the robot and what it holds.
NOISY = 0.8
# The robot is back after this share of the chunk. A gripper comes down in half a chunk, and a rollout that plans again
# after as much should not have half of the error left.
BACK = 0.5


class CorrectiveNoise:
    """Moves the robot in some windows of a batch, and corrects the chunk so that the error is gone in the middle of it.

    A demonstration shows one way to the goal, and nothing of what to do beside it. An action that is a displacement
    says where to be next, so that the correction of an error is known: the displacement back, here in equal parts over
    the first half of the chunk. (DART, Laskey et al., CoRL 2017, lets the demonstrator correct noise; CCIL, Ke et al.,
    ICLR 2024, learns a model of the dynamics for it.)

    The noise is small where a window moves little: robots slow down where it matters that they are exact.

    What the robot is doing is blurred by noise of its own, without correction and whatever the amount: a policy that
    sees how fast the robot moves goes on as fast, and having slowed down a little it stops; one that sees a hand half
    closed closes it. Two observations show the speed all the same: `obs_horizon=1` belongs to it.

    Args:
        corrections: what was found out from the demonstrations.
        amount: standard deviation of the noise, as a share of what each number moves within a chunk, in a window that
            moves as much as the usual one.
        past_actions: actions of a window that lie before its newest observation.

    Attributes:
        reach: (F,) how far each number that follows the action usually moves within a chunk.
        moved: the numbers that it moves, such as `state[3]`; those of things only where the robot holds them.
        blurred: the numbers that it blurs.
    """

    def __init__(self, corrections: Corrections, amount: float, past_actions: int) -> None:
        followed, carried = corrections.followed, corrections.carried
        self._widths = dict(corrections.widths)
        held = set(corrections.held.tolist())
        things = [
            place
            for kind, thing in enumerate(corrections.things, NOTHING + 1)
            if kind in held
            for place in thing.places
        ]
        places = {*(one.number for one in followed), *carried.places, *things}
        self.moved = [corrections.names[place] for place in sorted(places)]
        self._past_actions = past_actions
        self._places = [one.number for one in followed]
        self._actions = [one.action for one in followed]
        self._gains = torch.tensor([one.gain for one in followed])
        self._amount, self.reach = amount, torch.tensor([one.reach for one in followed])
        self._low, self._high = torch.from_numpy(corrections.low), torch.from_numpy(corrections.high)
        self._blurred = [one.number for one in corrections.blurred]
        self.blurred = [corrections.names[place] for place in self._blurred]
        ranges = [(one.noise, one.low, one.high) for one in corrections.blurred]
        self._blur, self._least, self._most = torch.tensor(ranges).reshape(-1, 3).T
        self._velocities = [one.number for one in corrections.blurred if one.velocity]
        self._things, self._parted = corrections.things, torch.from_numpy(corrections.parted)
        self._numbers, self._cosines, self._apart = map(list, (carried.numbers, carried.cosines, carried.apart))
        self._center, self._spread, self._frequencies, self._phases = (
            torch.from_numpy(array).to(torch.float32)
            for array in (carried.center, carried.spread, carried.frequencies, carried.phases)
        )
        self._weights, self._turns, self._slopes = (
            torch.from_numpy(array).to(torch.float32) for array in (carried.weights, carried.turns, carried.slopes)
        )

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Move the robot in most of the windows in which nothing else moves, and the thing that it holds with it.

        What is blurred is so in as large a share of all windows.

        Args:
            batch: B windows with `held`, on the CPU.
            generator: source of the noise; what is drawn depends on B alone.

        Returns:
            A new batch.
        """
        rows, held = len(batch["actions"]), batch["held"]
        noise = torch.randn((rows, len(self._places)), generator=generator)
        moved = (torch.rand(rows, generator=generator) < NOISY) & (held >= NOTHING)
        blurred = torch.rand(rows, generator=generator) < NOISY
        blur = self._blur * torch.randn((rows, 1, len(self._blurred)), generator=generator)
        actions = batch["actions"].clone()
        noise = noise[moved] * self._amount * self.reach * self._pace(actions[moved])[:, None]
        actions[moved] = self._corrected(actions[moved], noise)
        numbers = joined_numbers(batch["observations"], self._widths)
        numbers[moved] = self._shifted(numbers[moved], noise[:, None], held[moved])
        own = numbers[..., self._blurred]  # a mirrored one may lie outside of what was seen
        noisy = (own + blur).clamp(own.minimum(self._least), own.maximum(self._most))
        numbers[..., self._blurred] = torch.where(blurred[:, None, None], noisy, own)
        observations = {**batch["observations"], **split_numbers(numbers, self._widths)}
        return {**batch, "observations": observations, "actions": actions}

    def displaced(self, observations: Observations, offsets: Tensor, held: Tensor) -> dict[str, Tensor]:
        """Show the robot elsewhere, and what it holds with it.

        Args:
            observations: (N, H, *) of N windows under each key that it moves.
            offsets: (N, F) of the numbers that follow the action, in the units of the observation.
            held: (N,) what the robot holds, see `Batch`.

        Returns:
            The observations of the same keys and shapes.
        """
        numbers = self._shifted(joined_numbers(observations, self._widths), offsets[:, None], held)
        return split_numbers(numbers, self._widths)

    def slowed(self, observations: Observations, share: float) -> dict[str, Tensor]:
        """Show the robot moving at a share of its speed, in observations (N, H, *) under each key that it moves."""
        numbers = joined_numbers(observations, self._widths)
        numbers[..., self._velocities] *= share
        return split_numbers(numbers, self._widths)

    def _pace(self, actions: Tensor) -> Tensor:
        """How far the robot moves within chunks (N, P, A), beside how far it usually does: (N,)."""
        moves = self._gains * actions[:, self._past_actions :, self._actions].sum(dim=1)
        return (moves / self.reach).square().mean(dim=1).sqrt()

    def _corrected(self, actions: Tensor, noise: Tensor) -> Tensor:
        """Lead the robot back in equal parts over the first actions of the chunk: actions (N, P, A), noise (N, F)."""
        first = math.ceil(BACK * (actions.shape[1] - self._past_actions))
        back = torch.zeros_like(actions[:, 0])
        back[:, self._actions] = noise / (self._gains * first)
        actions[:, self._past_actions : self._past_actions + first] -= back[:, None]
        return actions.clamp(self._low, self._high)

    def _shifted(self, numbers: Tensor, noise: Tensor, held: Tensor) -> Tensor:
        """Add noise (N, 1, F) to the followed numbers (N, H, D), and move along what they determine or hold."""
        original, numbers = numbers, numbers.clone()
        before = numbers[..., self._places]
        after = before + noise
        numbers[..., self._places] = after
        along = self._determined(after) - self._determined(before)
        numbers[..., self._numbers] += along
        numbers[..., self._apart] += torch.cat([noise.expand_as(before), along], dim=-1) @ self._slopes
        turns = noise @ self._turns
        _turn(numbers, self._cosines, turns)
        for thing, (what, parted) in enumerate(zip(self._things, self._parted, strict=True), NOTHING + 1):
            rows = held == thing
            with_it = numbers[rows]
            with_it[..., what.numbers] += (with_it - original[rows])[..., what.partners]
            turned_by = [self._cosines.index(cosine) for cosine in what.turned_by]
            _turn(with_it, what.cosines, turns[rows][..., turned_by])
            stays = [place for place, parts in zip(self._apart, parted.tolist(), strict=True) if not parts]
            with_it[..., stays] = original[rows][..., stays]
            numbers[rows] = with_it
        return numbers

    def _determined(self, followed: Tensor) -> Tensor:
        scaled = (followed - self._center) / self._spread
        waves = (scaled @ self._frequencies + self._phases).cos()
        return torch.cat([waves, scaled, torch.ones_like(scaled[..., :1])], dim=-1) @ self._weights


def _turn(numbers: Tensor, cosines: Sequence[int], turns: Tensor) -> None:
    """Turn directions of numbers (N, H, D), given by the places of their cosines, by angles (N, 1, directions)."""
    if cosines:
        sines = [place + 1 for place in cosines]
        angles = torch.atan2(numbers[..., sines], numbers[..., list(cosines)]) + turns
        numbers[..., list(cosines)], numbers[..., sines] = angles.cos(), angles.sin()
