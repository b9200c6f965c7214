"""Drive a robot with an exported policy, with numpy and onnxruntime alone: python robot_loop.py FOLDER [HZ [STEPS]]."""

import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
from run_exported_policy import ExportedPolicy


class Robot:
    """A stand-in, so that this file runs as it is: replace its methods by those of your robot."""

    def __init__(self, example: dict[str, np.ndarray]) -> None:
        self.example = example
        self.commands: list[np.ndarray] = []

    def observe(self) -> dict[str, np.ndarray]:
        """The newest observation under each key, as one row of the demonstrations: the same shape, dtype and units."""
        return {key: values[0, -1] for key, values in self.example.items()}

    def act(self, action: np.ndarray) -> None:
        """Send one action, in the units of the demonstrations; clip it to the robot's limits here."""
        self.commands.append(action)


class Driver:
    """Observations in, one action out: plans a chunk, executes its beginning, and plans again."""

    def __init__(self, policy: ExportedPolicy, seed: int = 0) -> None:
        self.policy, self.generator = policy, np.random.default_rng(seed)
        self.execution_horizon = policy.about["execution_horizon"]
        self.sizes = {name: about["shape"] for name, about in policy.about["inputs"].items()}
        self.start()

    def start(self) -> None:
        """Forget the episode before."""
        self.history: dict[str, deque[np.ndarray]] = {}
        self.planned: deque[np.ndarray] = deque()

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """Take the newest observation and return the next action, (action_dim,)."""
        for key, value in observation.items():
            horizon = self.sizes[f"observations.{key}"][1]
            # At the start of an episode, the first observation stands for those before it, as in training.
            self.history.setdefault(key, deque([value] * horizon, maxlen=horizon)).append(value)
        if not self.planned:
            self.planned.extend(self.policy(self.inputs())[0, : self.execution_horizon])
        return self.planned.popleft()

    def inputs(self) -> dict[str, np.ndarray]:
        """Everything that the model takes, for a chunk that begins anew from noise."""
        inputs = {f"observations.{key}": np.stack(values)[None] for key, values in self.history.items()}
        for name in self.sizes.keys() - inputs.keys():
            shape = [1 if size == "batch" else size for size in self.sizes[name]]
            noise = self.generator.standard_normal(shape, dtype=np.float32)
            inputs[name] = noise if "noise" in name else np.zeros(shape, np.float32)
        return inputs


def drive(driver: Driver, robot: Robot, rate_hz: float, steps: int) -> int:
    """Act `steps` times at a fixed rate; returns the number of steps that came too late."""
    late, due = 0, time.monotonic()
    for _ in range(steps):
        robot.act(driver.act(robot.observe()))
        due += 1 / rate_hz
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        else:
            late, due = late + 1, time.monotonic()  # no hurry afterwards: actions are timed like the demonstrations
    return late


if __name__ == "__main__":
    folder, *given = sys.argv[1:]
    policy = ExportedPolicy(Path(folder))
    rate_hz = float(given[0]) if given else policy.about.get("rate_hz")
    if not rate_hz:
        sys.exit(f"{folder} does not state the demonstrations' control rate: python robot_loop.py {folder} HZ")
    example = np.load(Path(folder) / "example_input.npz", allow_pickle=False)
    keys = [name for name in policy.about["inputs"] if name.startswith("observations.")]
    robot = Robot({name.removeprefix("observations."): example[name] for name in keys})
    late = drive(Driver(policy), robot, rate_hz, steps=int(given[1]) if given[1:] else 20)
    print(f"{len(robot.commands)} actions at {rate_hz:g} Hz, {late} of them late; the last: {robot.commands[-1]}")
