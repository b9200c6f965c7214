"""An environment that returns or does something strange at one call, from one episode on."""

import time

import gymnasium
import numpy as np

FIRST_SEED, STEPS = 100_000, 4
STILL = np.zeros(4, np.float32)


class Unspeakable:
    """An object that no operation can be tried on."""

    def fail(self, *arguments):
        raise LookupError("unspeakable")

    __repr__ = __str__ = __bool__ = __float__ = __array__ = __eq__ = __len__ = fail
    __hash__ = None


class Mute(Exception):
    """An error whose text cannot be had."""

    def __str__(self):
        raise LookupError("mute")


class Odd(BaseException):
    """An error that `except Exception` does not catch."""


def returned(observation=STILL, reward=0.0, terminated=False, truncated=False, info=None):
    return observation, reward, terminated, truncated, {"is_success": False} if info is None else info


# By the call: what is returned or raised there, by name, and what must come of it: `taken`, `success`, `broken` (the
# episode is a failure with a reason) or `refused` (the run ends at once).
SUCCESS = {
    "refused": [np.nan, np.inf, "False", "True", b"1", {"task": False}, -1, 2, 0.5, None, [True, False], [], (),
                np.zeros(2), np.array("x"), 1j, Unspeakable(), object],
    "success": [True, 1, 1.0, np.True_, np.int8(1), np.float16(1), np.array([1]), np.array([[True]]), [1]],
    "taken": [False, 0, 0.0, -0.0, np.False_, np.uint8(0), np.array([0.0]), np.array(False), [False]],
}  # fmt: skip
OBSERVATIONS = {
    "broken": [None, np.full(4, np.nan, np.float32), np.array([0, 0, np.inf, 0], np.float32), 3.0,
               np.zeros(3, np.float32), np.zeros((1, 4), np.float32), np.zeros(4, complex), np.array(["a"] * 4), {},
               {"state": STILL}, Unspeakable(), np.zeros(0, np.float32)],
    "taken": [[0.0] * 4, np.zeros(4), np.zeros(4, np.float16), np.zeros(4, int), np.zeros(4, bool)],
}  # fmt: skip
REWARDS = {
    "broken": [np.nan, np.inf, -np.inf, np.array([np.nan])],
    "refused": [None, "1", {}, [1.0, 2.0], np.zeros(3), 1j, Unspeakable()],
    "taken": [1, np.float32(2), np.array([0.5]), [0.5], True],
}
ENDS = {"refused": [None, "no", np.nan, 2, [], Unspeakable()], "taken": [0, np.False_, np.array([0])]}
RETURNED = {
    "refused": [None, STILL, (STILL, 0.0, False, {}), (STILL, 0.0, False, False, {}, {}), (STILL, 0.0, False, False),
                (STILL, 0.0, False, False, None), (STILL, 0.0, False, False, [("is_success", True)]), "five", 5, ()],
}  # fmt: skip
STARTED = {"refused": [None, STILL, (STILL,), (STILL, None), (STILL, {}, {}), [STILL, {}], {"observation": STILL}]}
RAISED = [RuntimeError("out of coal"), ValueError("1\n2"), KeyError(), AssertionError(), SystemExit(0),
          SystemExit("bye"), StopIteration(), GeneratorExit(), MemoryError(), RecursionError("deep"), Mute(),
          Odd("odd"), np.linalg.LinAlgError("singular"), OSError(28, "No space left on device")]  # fmt: skip


def _cases():
    for name, kind, make in (
        ("success", SUCCESS, lambda value: returned(info={"is_success": value})),
        ("observation", OBSERVATIONS, lambda value: returned(observation=value)),
        ("reward", REWARDS, lambda value: returned(reward=value)),
        ("terminated", ENDS, lambda value: returned(terminated=value)),
        ("truncated", ENDS, lambda value: returned(truncated=value)),
        ("step", RETURNED, lambda value: value),
    ):
        for outcome, values in kind.items():
            yield from ((f"step {name} {n}", outcome, make(value)) for n, value in enumerate(values))
    for outcome, values in OBSERVATIONS.items():
        yield from ((f"reset observation {outcome} {n}", outcome, (value, {})) for n, value in enumerate(values))
    for outcome, values in STARTED.items():
        yield from ((f"reset {n}", outcome, value) for n, value in enumerate(values))
    for call in ("reset", "step"):
        yield from ((f"{call} raises {n}", "broken", error) for n, error in enumerate(RAISED))
    yield from ((f"close raises {n}", "taken", error) for n, error in enumerate(RAISED))
    yield from ((f"make raises {n}", "refused", error) for n, error in enumerate(RAISED))


CASES = {f"{outcome}: {name}": (name.split()[0], outcome, what) for name, outcome, what in _cases()}


class Fuzzed(gymnasium.Env):
    """Succeeds at its third step, except in episodes in which the case happens."""

    observation_space = gymnasium.spaces.Box(-2, 2, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, case, from_seed, step, seconds=0.0):
        self.call, _, self.what = CASES[case]
        self.from_seed, self.step_number, self.seconds = from_seed, step, seconds
        if self.call == "make":
            raise self.what

    def strange(self, call):
        if self.call == call and self.seed >= self.from_seed:
            if isinstance(self.what, BaseException):
                raise self.what
            return True
        return False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return self.what if self.strange("reset") else (STILL, {})

    def step(self, action):
        time.sleep(self.seconds)
        self.steps += 1
        if self.steps == self.step_number and self.strange("step"):
            return self.what
        return returned(info={"is_success": self.steps == 3})

    def close(self):
        if self.call == "close":
            raise self.what


gymnasium.register("Fuzzed-v0", entry_point=Fuzzed, max_episode_steps=STEPS)
