"""The training loop: phases, optimiser steps, the weight average, logging and saving."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field
from itertools import count
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from policy.common.errors import reason_of
from policy.common.listing import first_of
from policy.common.observations import Batch
from policy.common.progress import progress, say
from policy.common.seeding import derive_generator, derive_seed
from policy.common.torchrun import ALONE, World
from policy.data.windows import Windows
from policy.model.diffusion_policy import DiffusionPolicy
from policy.tracking.tracker import MetricsLog
from policy.training.phases import Phase, phases_of
from policy.training.preparation import Run
from policy.training.settings import TrainSettings, learning_rate
from policy.training.share import check_agreement, check_shares, draws, learner_of, parts
from policy.training.state import TrainState, newest_metrics

VALIDATION_WINDOWS = 1024
# Batches gathered ahead of the trainer, so that it does not wait for page faults.
BATCHES_AHEAD = 2
# Of one training step: the numbers of its windows, and (2,) the loss and the gradient's norm, on the training device.
Outcome = tuple[NDArray[np.int64], torch.Tensor]
# The metrics that the terminal shows while training, under which name, and how.
SHOWN = {
    "train/loss": ("loss", "{:.4f}"),
    "val/loss": ("validation loss", "{:.4f}"),
    "rollout/success_rate": ("rollout success", "{:.0%}"),
}
# Steps between measurements of the chunks' errors, each of which takes about as long as ten to twenty steps.
MEASURE_EVERY = 1_000
# Training fails after this many skipped steps in a row, because the weights have then diverged.
MOST_SKIPPED_IN_A_ROW = 100
# An error or a warning names so many episodes.
MOST_EPISODES_NAMED = 8
# Measures a policy, by a short rollout or the errors of its chunks, and returns metrics by name.
Measure = Callable[[DiffusionPolicy], dict[str, float]]


@dataclass
class _Trainer:
    """One call of `train`: its arguments, the phase begun last, and outcomes of steps that have not been read yet."""

    run: Run
    settings: TrainSettings
    _: KW_ONLY
    rollout: Measure | None
    measure: Measure | None
    should_stop: Callable[[], bool]
    tracker: MetricsLog
    save: Callable[[TrainState], None]
    seed: int
    world: World
    phases: list[Phase] = field(init=False)
    begun: int = -1
    learner: nn.Module = field(init=False)
    unread: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.phases = phases_of(self.settings)
        for phase in self.phases:
            check_shares(phase.rows(min(self.settings.batch_size, len(self.run.training))), self.world)

    def windows_of(self, step: int) -> NDArray[np.int64]:
        """The numbers of the windows that a step learns from, those of all processes together."""
        windows = self.run.training.batch_at(step, self.settings.batch_size, self.seed)
        phase = self.phases[self.settings.place(step)[0]]
        return windows[: phase.rows(len(windows))]

    def walk(self, until: int | None) -> None:
        """Train from the state's step to the last one, or to `until`, or until the user asks for an end."""
        state = self.run.state
        check_agreement(self.world, step=state.step, windows=len(self.run.training))
        if self.rollout_due() and not self.rolled_out():  # the run had been interrupted in it
            return
        end = self.settings.all_steps if until is None else min(until, self.settings.all_steps)
        with progress(total=end, initial=state.step, desc="train", unit="step") as bar:
            for windows, batch in batches_ahead(self.run.training, range(state.step, end), self.windows_of, self.world):
                self.unread.append((windows, self.take_step(batch)))
                state.step += 1
                bar.update()
                stopping = self.world.any(self.should_stop()) or state.step == until
                if metrics := self.metrics_due():
                    self.record(metrics)
                rollout_due = self.rollout_due()
                if metrics and not rollout_due:
                    self.tracker.log(metrics, state.step)
                if stopping or rollout_due or self.saving_due():
                    self.save_now()
                if stopping or (rollout_due and not self.rolled_out()):
                    break
                if metrics or rollout_due:
                    bar.set_postfix(_figures(state), refresh=rollout_due)

    def begun_phase(self) -> Phase:
        """The phase of the next step; it is begun if this call of `train` has not taken a step of it."""
        number = self.settings.place(self.run.state.step)[0]
        if number != self.begun:
            self.phases[number].begin(self.run.state)
            self.learner = learner_of(self.run.state.policy, self.world)
            self.begun = number
        return self.phases[number]

    def take_step(self, batch: Batch) -> torch.Tensor:
        """Take one optimiser step and update the average; return (2,) loss and gradient norm, on the device."""
        state, settings, phase = self.run.state, self.settings, self.begun_phase()
        torch.manual_seed(derive_seed(self.seed, 1, state.step))  # the source of dropout and observation noise
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, settings)
        state.policy.train()
        generator = derive_generator(self.seed, 2, state.step)
        with draws(self.world):
            examples = phase.examples(self.run.varied(batch, generator), generator)
            with torch.autocast(state.policy.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                loss = self.learner(phase.loss, examples, generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(state.policy.parameters(), settings.grad_clip)
        figures = torch.stack([self.world.mean(loss.detach()), norm])
        # As `torch.amp.GradScaler` does: if `found_inf` is 1, the fused kernel changes neither weights nor optimiser
        # state.
        state.optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
        state.optimizer.step()
        state.optimizer.zero_grad()
        update_ema(state.ema, state.policy, state.step, settings.ema_decay)
        return figures

    def metrics_due(self) -> dict[str, float]:
        """The losses and errors to log after the newest step; empty after most steps."""
        state, settings, metrics = self.run.state, self.settings, dict[str, float]()
        last = state.step == settings.all_steps
        if last or state.step % settings.log_every == 0:
            self.read()
            metrics.update(_loss_metrics(state, settings))
            state.recent.clear()
        if self.world.first and len(self.run.validation) and (last or state.step % settings.val_every == 0):
            # Of the first phase to the last step, so that the losses of one run can be compared.
            metrics["val/loss"] = validation_loss(self.phases[0], state.ema, self.run.validation)
        if self.measure and (last or state.step % MEASURE_EVERY == 0):
            metrics.update(self.measure(state.ema))
        return metrics

    def rollout_due(self) -> bool:
        """Whether the newest step is followed by a rollout that is not in the history yet."""
        state, every = self.run.state, self.settings.rollout_every
        if not (self.rollout and every and state.step and state.step % every == 0):
            return False
        return not any(name.startswith("rollout/") for name in self.recorded())

    def rolled_out(self) -> bool:
        """Let the first process roll out while the others wait; return False in all if the user interrupted it."""
        return not self.world.any(not self.roll_out())

    def roll_out(self) -> bool:
        """Roll out the averaged policy, record its metrics and save; return False if the user interrupted it."""
        assert self.rollout is not None
        try:
            self.record({f"rollout/{name}": value for name, value in self.rollout(self.run.state.ema).items()})
        except KeyboardInterrupt:
            if not self.should_stop():
                raise
            return False
        except Exception as error:  # whatever a simulator does, training goes on
            step = self.run.state.step
            warnings.warn(
                f"the rollout at step {step} did not finish, training goes on: {reason_of(error)}", stacklevel=2
            )
        recorded = self.recorded()
        self.tracker.log(recorded, self.run.state.step)
        self.save_now()
        if "rollout/success_rate" in recorded:
            said = ", ".join(f"{name} {figure}" for name, figure in _figures(self.run.state).items())
            say(f"step {self.run.state.step:,}: {said} (of {self.settings.rollout_episodes} episodes)")
        return True

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the newest step's entry in the history."""
        state = self.run.state
        if not self.recorded():
            state.history.append({"step": state.step})
        state.history[-1].update(metrics)

    def recorded(self) -> dict[str, float]:
        """The metrics of the newest step in the history; empty if it has none."""
        state = self.run.state
        entry = state.history[-1] if state.history and state.history[-1]["step"] == state.step else {}
        return {name: value for name, value in entry.items() if name != "step"}

    def save_now(self) -> None:
        """Save the state, once every step in it has been read and its weights are known to be finite."""
        self.read()
        _check_weights(self.run.state)
        self.save(self.run.state)

    def saving_due(self) -> bool:
        """Whether to save after the newest step: at intervals and at the end."""
        step = self.run.state.step
        return step == self.settings.all_steps or step % self.settings.save_every == 0

    def read(self) -> None:
        """Copy the loss and the gradient norm of the newest steps to the CPU and into the state."""
        _read(self.unread, self.run.state, self.run.training, self.settings)


def train(
    run: Run,
    settings: TrainSettings,
    *,
    seed: int,
    tracker: MetricsLog,
    save: Callable[[TrainState], None],
    rollout: Measure | None = None,
    measure: Measure | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    until: int | None = None,
    world: World = ALONE,
) -> None:
    """Train from the state's step up to `settings.all_steps`, or a part of the way.

    Step n draws from (seed, n) alone, so that a run that was interrupted and resumed equals an uninterrupted one.

    A step whose loss or gradient is not finite leaves the weights unchanged; the device itself checks this.

    Args:
        run: its state is changed in place.
        settings: see `TrainSettings`.
        seed: the run's seed.
        tracker: receives the metrics.
        save: called every `save_every` steps, before and after rollouts, and at the end, also when stopped.
        rollout: called with the averaged policy every `rollout_every` steps; returns metrics. One that raises is a
            warning without metrics; one that was interrupted is repeated when training goes on.
        measure: called with the averaged policy every 1,000 steps and at the end; returns metrics.
        should_stop: called after every step; if it returns True, the state is saved and training ends.
        until: the step to stop and save at; None for the last one.
        world: the processes that train together, each with its share of every batch; all call this with a run prepared
            alike. Only the first measures validation losses; the others should be given callbacks that do nothing, and
            a rollout if the first has one.

    Raises:
        ValueError: the processes cannot share the batches equally, or differ in their data or their step.
        RuntimeError: another process ended before its time.
        FloatingPointError: a loss or gradient is not finite and `on_bad_loss` is `stop`, or a hundred steps in a row,
            or half of all, have such a loss or gradient, or the weights are not finite. The state is then not saved.
    """
    trainer = _Trainer(
        run,
        settings,
        rollout=rollout,
        measure=measure,
        should_stop=should_stop,
        tracker=tracker,
        save=save,
        seed=seed,
        world=world,
    )
    trainer.walk(until)


@torch.no_grad()
def update_ema(ema: DiffusionPolicy, policy: DiffusionPolicy, updates: int, max_decay: float) -> None:
    """Move the weight average towards the weights; buffers, as the statistics of a batch normalisation, are copied.

    Args:
        ema: changed in place.
        policy: the newest weights.
        updates: number n of updates before this one.
        max_decay: upper bound of the decay, which is (1 + n) / (10 + n) until it reaches this.
    """
    decay = min(max_decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(ema.parameters()), list(policy.parameters()), 1 - decay)
    torch._foreach_copy_(list(ema.buffers()), list(policy.buffers()))


def batches_ahead(
    training: Windows, steps: range, windows_of: Callable[[int], NDArray[np.int64]], world: World = ALONE
) -> Generator[tuple[NDArray[np.int64], Batch]]:
    """Yield the batches of training steps, which a thread gathers in advance.

    Args:
        training: the windows.
        steps: the steps whose batches are gathered.
        windows_of: returns the numbers of a step's windows.
        world: the processes that share each batch.

    Yields:
        For each step, the numbers of its windows and this process's part of its batch.
    """
    drawn = (windows_of(step) for step in steps)
    waiting: deque[Future[tuple[NDArray[np.int64], Batch]]] = deque()
    with (
        closing(parts(training, drawn, world)) as batches,
        ThreadPoolExecutor(1, thread_name_prefix="batches") as thread,
    ):
        try:
            for _ in steps:
                waiting.append(thread.submit(next, batches))
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for batch in waiting:  # of a training that ends early
                batch.cancel()


def _read(unread: list[Outcome], state: TrainState, training: Windows, settings: TrainSettings) -> None:
    """Copy the outcomes of the newest steps to the CPU and into the state; warn or raise if one is not finite.

    This is done only before logging and saving: reading each step's loss would make a GPU wait for the CPU.
    """
    if not unread:
        return
    all_windows, figures = zip(*unread, strict=True)
    unread.clear()
    first = state.step - len(figures) + 1
    for step, windows, (loss, norm) in zip(count(first), all_windows, torch.stack(figures).tolist(), strict=False):
        if math.isfinite(loss) and math.isfinite(norm):
            state.recent.append(loss)
            continue
        episodes = training.episodes_of(windows)
        what = (
            f"step {step} has the loss {loss} and a gradient of norm {norm},"
            f" on a batch of the episodes {first_of(episodes, MOST_EPISODES_NAMED)}"
        )
        if settings.on_bad_loss == "stop":
            raise FloatingPointError(f"{what}: lower train.learning_rate, or leave it out with train.on_bad_loss=skip")
        warnings.warn(f"{what}: skipped", stacklevel=2)
        state.skipped.append(step)
        most = min(MOST_SKIPPED_IN_A_ROW, max(2, settings.all_steps // 2))
        if state.skipped[-most:] == [*range(step - most + 1, step + 1)]:
            raise FloatingPointError(f"{what}, like {most - 1} before it: lower train.learning_rate")


def _loss_metrics(state: TrainState, settings: TrainSettings) -> dict[str, float]:
    """Metrics of the training steps since the last log entry, and the learning rate of the next step."""
    metrics = {"train/learning_rate": learning_rate(state.step, settings)}
    if state.recent:
        metrics["train/loss"] = fmean(state.recent)
    if settings.on_bad_loss == "skip":
        metrics["train/skipped_steps"] = len(state.skipped)
    return metrics


def _figures(state: TrainState) -> dict[str, str]:
    """The newest metrics, as the terminal shows them."""
    newest = newest_metrics(state.history)
    return {name: form.format(newest[key]["value"]) for key, (name, form) in SHOWN.items() if key in newest}


def _check_weights(state: TrainState) -> None:
    """Raise if a weight is not finite: at an absurd learning rate, a finite gradient can still overflow float32."""
    if not torch.stack([p.isfinite().all() for p in state.policy.parameters()]).all():
        raise FloatingPointError(f"the weights are not finite after step {state.step}: lower train.learning_rate")


@torch.no_grad()
def validation_loss(phase: Phase, policy: DiffusionPolicy, validation: Windows) -> float:
    """The loss on held-out episodes, with the same windows, timesteps and noise in every call.

    Args:
        phase: says which loss; it has begun.
        policy: in evaluation mode.
        validation: held-out windows, one or more.

    Returns:
        Mean loss over up to 1024 windows spread evenly over the episodes.
    """
    count = min(VALIDATION_WINDOWS, len(validation))
    windows = np.linspace(0, len(validation) - 1, phase.rows(count)).round().astype(np.int64)
    return phase.validation_loss(policy, validation.gather(windows), derive_generator(0)).item()
