"""Observation and action spaces of every kind: their conversion for a policy, and the spaces that are refused."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

import envs
from envs.spaces import plain_actions, plain_observations
from policy.data.reading import resized


class Recorder(gymnasium.Env):
    """Returns samples of a given observation space, or a given observation, and keeps the actions that it gets."""

    metadata = {"render_modes": [], "render_fps": 10}  # noqa: RUF012

    def __init__(self, observation_space, action_space=None, returns=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Box(-1, 1, (2,))
        self.returns, self.actions, self.last = returns, [], None

    def observe(self):
        if self.returns is None:
            self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.last = self.observation_space.sample() if self.returns is None else self.returns
        return self.last

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        self.actions.append(action)
        return self.observe(), 0.0, False, False, {}


gymnasium.register("envs_test/Recorder-v0", entry_point=Recorder, max_episode_steps=100)


def make(observation_space, observation_keys=None, **kwargs):
    kwargs = {"observation_space": observation_space, **kwargs}
    return envs.make("gym", id="envs_test/Recorder-v0", kwargs=kwargs, observation_keys=observation_keys)


def vector(size):
    return ((size,), np.float32)


def image(*shape):
    return (shape, np.uint8)


CAMERA = spaces.Box(0, 255, (8, 6, 3), np.uint8)
ARM = spaces.Box(-np.inf, np.inf, (3,), np.float64)

PLAIN = [
    (spaces.Box(-1, 1, (4,), np.float32), vector(4)),
    (spaces.Box(-1, 1, (4,), np.float64), vector(4)),
    (spaces.Box(-1, 1, (), np.float32), vector(1)),
    (spaces.Box(-1, 1, (2, 3, 4), np.float32), vector(24)),
    (spaces.Box(0, 9, (2, 2), np.int64), vector(4)),
    (spaces.Box(0, 255, (5,), np.uint8), vector(5)),
    (spaces.Box(0, 1, (8, 8, 3), np.float32), vector(192)),
    (spaces.Box(0, 255, (8, 6, 1), np.uint8), image(8, 6, 1)),
    (CAMERA, image(8, 6, 3)),
    (spaces.Box(0, 255, (8, 6, 4), np.uint8), image(8, 6, 4)),
    (spaces.Discrete(5, start=-2), vector(5)),
    (spaces.MultiDiscrete([2, 3]), vector(5)),
    (spaces.MultiDiscrete([[2, 3], [4, 5]]), vector(14)),
    (spaces.MultiBinary(4), vector(4)),
    (spaces.MultiBinary([2, 3]), vector(6)),
]
BY_KEY = [
    (spaces.Dict({"pose": ARM, "speed": spaces.Box(-1, 1, ())}), {"pose": vector(3), "speed": vector(1)}),
    (spaces.Dict({"wrist": CAMERA, "front": CAMERA}), {"wrist": image(8, 6, 3), "front": image(8, 6, 3)}),
    (
        spaces.Dict({"observation.image": CAMERA, "observation.state": ARM}),
        {"observation/image": image(8, 6, 3), "observation/state": vector(3)},
    ),
    (
        spaces.Dict({"observation": ARM, "achieved_goal": ARM, "desired_goal": ARM}),
        {"observation": vector(3), "achieved_goal": vector(3), "desired_goal": vector(3)},
    ),
    (
        spaces.Dict({"goal": spaces.Dict({"kettle": ARM, "door": spaces.Discrete(2)}), "arm": ARM}),
        {"goal/kettle": vector(3), "goal/door": vector(2), "arm": vector(3)},
    ),
    (spaces.Tuple([ARM, CAMERA]), {"0": vector(3), "1": image(8, 6, 3)}),
    (spaces.Dict({"arms": spaces.Tuple([ARM, ARM])}), {"arms/0": vector(3), "arms/1": vector(3)}),
    (spaces.Dict({"only": ARM}), {"only": vector(3)}),
]


@pytest.mark.parametrize(("space", "expected"), PLAIN, ids=str)
def test_a_plain_space_gives_one_array(space, expected):
    env = make(space)
    for advance in (lambda: env.reset(seed=0), lambda: env.step(np.zeros(2, np.float32))):
        observation = advance()[0]
        assert (observation.shape, observation.dtype) == expected
        assert env.observation_space.contains(observation)
        flat = spaces.flatten(space, env.unwrapped.last)
        np.testing.assert_array_equal(observation.ravel(), np.asarray(flat, np.float32))


@pytest.mark.parametrize(("space", "expected"), BY_KEY, ids=str)
def test_a_dict_gives_arrays_by_key(space, expected):
    env = make(space)
    for advance in (lambda: env.reset(seed=0), lambda: env.step(np.zeros(2, np.float32))):
        observation = advance()[0]
        assert {key: (value.shape, value.dtype) for key, value in observation.items()} == expected
        assert env.observation_space.contains(observation)
        total = sum(value.astype(np.float64).sum() for value in observation.values())
        assert total == pytest.approx(spaces.flatten(space, env.unwrapped.last).sum(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("space", [case[0] for case in PLAIN + BY_KEY], ids=str)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gymnasiums_own_checker_accepts_it(space):
    check_env(make(space), skip_render_check=True, skip_close_check=True)


def test_values_stand_under_their_own_keys():
    space = spaces.Dict({"a.b": spaces.Dict({"c": spaces.Box(0, 9, (2,))}), "d": spaces.Tuple([spaces.Discrete(3)])})
    env = make(space, returns={"a.b": {"c": np.array([1.5, 2.5], np.float32)}, "d": (2,)})
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["a/b/c"], [1.5, 2.5])
    np.testing.assert_array_equal(observation["d/0"], [0, 0, 1])


def test_an_observation_does_not_change_after_it_was_given():
    state, picture = np.zeros(3, np.float32), np.zeros((8, 6, 3), np.uint8)
    space = spaces.Dict({"state": spaces.Box(-9, 9, (3,)), "picture": CAMERA})
    observation, _ = make(space, returns={"state": state, "picture": picture}).reset(seed=0)
    state[:], picture[:] = 7, 7  # a simulator that writes into its own buffers
    assert not observation["state"].any()
    assert not observation["picture"].any()


def test_bounds_are_kept_and_what_is_unbounded_stays_so():
    observed = plain_observations(
        spaces.Box(np.array([[-np.inf, -2]]), np.array([[3, np.inf]]), dtype=np.float64)
    ).space
    np.testing.assert_array_equal(observed.low, [-np.inf, -2])
    np.testing.assert_array_equal(observed.high, [3, np.inf])
    whole = plain_observations(spaces.Box(-np.inf, np.inf, (2,), np.int64)).space
    assert np.isneginf(whole.low).all()
    assert np.isposinf(whole.high).all()
    huge = plain_observations(spaces.Box(-1e300, 1e300, (1,), np.float64)).space
    assert np.isinf([*huge.low, *huge.high]).all()
    assert plain_observations(CAMERA).space == CAMERA


NESTED = spaces.Dict({"goal": spaces.Dict({"kettle": ARM, "door": ARM}), "goals": ARM, "arm": ARM})


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["arm"], ["arm"]),
        (["arm", "goals"], ["goals", "arm"]),
        (["goal/kettle", "arm"], ["goal/kettle", "arm"]),
        (["goal"], ["goal/kettle", "goal/door"]),
        (["goal.door"], ["goal/door"]),
        ("arm", ["arm"]),
    ],
)
def test_keys_can_be_chosen(keys, expected):
    env = make(NESTED, observation_keys=keys)
    assert sorted(env.reset(seed=0)[0]) == sorted(expected)
    assert sorted(env.observation_space) == sorted(expected)


@pytest.mark.parametrize(
    ("space", "keys", "words"),
    [
        (NESTED, ["arn"], ["'arn'", "Did you mean 'arm'?", "goal/kettle"]),
        (NESTED, [], ["choose one key or more"]),
        (spaces.Dict({}), None, ["choose one key or more"]),
        (ARM, ["arm"], ["['arm']", "needs a Dict"]),
        (spaces.Text(5), None, ["Text", "not an array of a fixed size", "wrap"]),
        (spaces.Dict({"arm": ARM, "task": spaces.Text(5)}), None, ["'task'", "Text", "observation_keys"]),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Sequence(ARM)})}), None, ["'a/b'", "Sequence"]),
        (spaces.Dict({"g": spaces.Graph(ARM, None)}), None, ["'g'", "Graph"]),
        (spaces.Dict({"o": spaces.OneOf([ARM, CAMERA])}), None, ["'o'", "OneOf"]),
        (spaces.Box(0, 255, (3, 8, 6), np.uint8), None, ["(3, 8, 6)", "(height, width, channels)", "transpose"]),
        (spaces.Dict({"cam": spaces.Box(0, 255, (3, 8, 6), np.uint8)}), None, ["'cam'", "(height, width, channels)"]),
        (spaces.Dict({"a.b": ARM, "a": spaces.Dict({"b": ARM})}), None, ["'a/b'", "rename"]),
    ],
    ids=str,
)
def test_observations_that_do_not_fit_are_refused_with_the_reason(space, keys, words):
    with pytest.raises(ValueError) as error:
        make(space, observation_keys=keys)
    assert all(word in str(error.value) for word in [*words, "envs_test/Recorder-v0"])
    assert "\n" not in str(error.value)


def test_a_part_that_does_not_fit_can_be_left_out():
    space = spaces.Dict({"arm": ARM, "cam": spaces.Box(0, 255, (3, 8, 6), np.uint8), "task": spaces.Text(5)})
    observation, _ = make(space, observation_keys=["arm"]).reset(seed=0)
    assert list(observation) == ["arm"]


@pytest.mark.parametrize(
    ("space", "returned", "words"),
    [
        (spaces.Box(0, 1, (4,)), np.zeros(3), ["Box", "(4,)", "shape (3,)"]),
        (spaces.Box(0, 1, (4,)), np.zeros((2, 2)), ["shape (2, 2)"]),
        (CAMERA, np.zeros((3, 8, 6), np.uint8), ["shape (3, 8, 6)"]),
        (CAMERA, np.zeros((8, 6, 3), np.float32), ["uint8", "float32"]),
        (spaces.Discrete(3), 3, ["Discrete(3)", "3"]),
        (spaces.Discrete(3), -1, ["Discrete(3)", "-1"]),
        (spaces.MultiDiscrete([2, 2]), np.array([1, 2]), ["MultiDiscrete"]),
        (spaces.MultiBinary(3), np.array([0, 1, 2]), ["MultiBinary(3)"]),
        (spaces.Dict({"a": ARM}), {"b": np.zeros(3)}, ["'a'", "returned no"]),
        (spaces.Dict({"a": ARM}), np.zeros(3), ["'a'", "returned no"]),
        (spaces.Dict({"a": spaces.Tuple([ARM, ARM])}), {"a": (np.zeros(3),)}, ["'a/1'", "returned no"]),
    ],
    ids=str,
)
def test_an_observation_unlike_its_declaration_ends_the_episode(space, returned, words):
    reason = make(space, returns=returned).reset(seed=0)[1]["broke_off"]
    assert all(word in reason for word in [*words, "observation_space"])


@given(st.integers(-5, 5), st.integers(1, 9), st.data())
def test_a_choice_is_one_hot_and_comes_back(start, count, data):
    space = spaces.Discrete(count, start=start)
    choice = data.draw(st.integers(start, start + count - 1))
    one_hot = plain_observations(space).convert(choice)
    assert one_hot.dtype == np.float32
    assert one_hot.sum() == 1
    assert spaces.unflatten(space, one_hot) == choice


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_several_choices_are_one_hot_and_come_back(counts, data):
    space = spaces.MultiDiscrete(counts)
    choices = np.array([data.draw(st.integers(0, count - 1)) for count in counts])
    one_hot = plain_observations(space).convert(choices)
    assert one_hot.shape == (sum(counts),)
    np.testing.assert_array_equal(spaces.unflatten(space, one_hot), choices)


ACTIONS = [
    spaces.Box(-1, 1, (), np.float32),
    spaces.Box(-1, 1, (1,), np.float32),
    spaces.Box(-1, 1, (3,), np.float64),
    spaces.Box(-2, 2, (2, 3), np.float32),
    spaces.Box(-2, 2, (2, 3), np.float16),
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(0, np.inf, (2,), np.float64),
    spaces.Box(-np.inf, 0, (2,), np.float32),
    spaces.Box(-5, 5, (2, 2), np.int64),
    spaces.Box(0, 255, (2,), np.uint8),
]


@pytest.mark.parametrize("space", ACTIONS, ids=str)
def test_actions_are_flat_outside_and_as_declared_inside(space):
    env = make(ARM, action_space=space)
    env.reset(seed=0)
    assert env.action_space.dtype == np.float32
    assert env.action_space.shape == (int(np.prod(space.shape)),)
    np.testing.assert_array_equal(env.action_space.low, space.low.ravel())
    np.testing.assert_array_equal(env.action_space.high, space.high.ravel())
    env.action_space.seed(0)
    for _ in range(5):
        action = env.action_space.sample()
        env.step(action)
        received = env.unwrapped.actions[-1]
        assert space.contains(received)
        rounding = 0.0 if space.dtype == np.float64 else 1e-3 if space.dtype == np.float16 else 1e-6
        tolerance = rounding if np.issubdtype(space.dtype, np.floating) else 0.5
        np.testing.assert_allclose(received.ravel(), action, atol=tolerance)


def test_the_order_of_a_matrix_of_actions_is_kept():
    env = make(ARM, action_space=spaces.Box(-9, 9, (2, 3)))
    env.reset(seed=0)
    env.step(np.arange(6, dtype=np.float32))
    np.testing.assert_array_equal(env.unwrapped.actions[-1], [[0, 1, 2], [3, 4, 5]])


def test_actions_are_rounded_and_clipped_to_what_the_simulator_declares():
    integers = plain_actions(spaces.Box(0, 3, (4,), np.uint8))
    np.testing.assert_array_equal(integers.convert(np.array([-4.0, 0.6, 2.4, 300.0])), [0, 1, 2, 3])
    odd = spaces.Box(-0.1, 0.1, (1,), np.float64)  # float32's 0.1 is above it
    assert np.float64(np.float32(0.1)) > odd.high
    assert odd.contains(plain_actions(odd).convert(np.full(1, 0.1, np.float32)))
    whole = plain_actions(spaces.Box(-np.inf, np.inf, (1,), np.int64)).space
    assert np.isinf([*whole.low, *whole.high]).all()


@pytest.mark.parametrize("action", [np.full(6, np.nan), np.zeros(5), np.zeros((2, 3))])
def test_an_action_of_another_shape_or_not_finite_is_refused(action):
    env = make(ARM, action_space=spaces.Box(-9, 9, (2, 3)))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="An action is 6 finite numbers"):
        env.step(action)


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(2), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2), spaces.Dict({"a": ARM}), spaces.Text(3)],
    ids=str,
)
def test_actions_that_are_not_continuous_are_refused_with_the_reason(space):
    with pytest.raises(ValueError, match="a diffusion policy denoises continuous actions") as error:
        make(ARM, action_space=space)
    assert str(space) in str(error.value)


# --- images of another size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_come_in_the_size_asked_for_as_the_readers_resize_them(channels):
    picture = np.zeros((40, 60, channels), np.uint8)
    picture[:, 30:, :3] = 200  # a fourth channel, such as a depth, stays 0 and is not taken for transparency
    space = spaces.Dict({"camera": spaces.Box(0, 255, picture.shape, np.uint8), "position": spaces.Box(-1, 1, (2,))})
    returns = {"camera": picture, "position": np.ones(2, np.float32)}
    env = envs.make(
        "gym", id="envs_test/Recorder-v0", kwargs={"observation_space": space, "returns": returns}, image_size=20
    )
    observation, _ = env.reset(seed=0)
    assert env.observation_space["camera"] == spaces.Box(0, 255, (20, 20, channels), np.uint8)
    assert (observation["camera"][:, :9] == 0).all()
    assert (observation["camera"][:, 11:, :3] == 200).all()
    np.testing.assert_array_equal(observation["camera"], resized(picture[None], 20)[0])
    assert observation["position"].tolist() == [1.0, 1.0]
