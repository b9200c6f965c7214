"""The inspection of a dataset: its figures against directly computed ones, its timeline, its picture, its command."""

import dataclasses
import json
import textwrap
import tracemalloc

import numpy as np
import pytest
import zarr
from PIL import Image

from policy.commands.inspect import inspect
from policy.data.demonstrations import Demonstrations
from policy.inspection import figures as figures_module
from policy.inspection.figures import (
    identical_episodes,
    idle_share,
    inspect_dataset,
    key_figures,
    length_histogram,
)
from policy.inspection.text import format_inspection, format_windows

RED = (250, 10, 20)


def laid_out(lengths, *, seed=0, **changes):
    """Episodes of random states (3) and actions (2)."""
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    arrays = {
        "observations": {"state": generator.normal(5, 2, (total, 3)).astype(np.float32)},
        "actions": generator.normal(-1, 3, (total, 2)).astype(np.float32),
        "episode_ends": np.cumsum(lengths),
    }
    return Demonstrations(**{**arrays, **changes})


def inspected(demonstrations, obs_horizon=2, action_horizon=8, execution_horizon=8):
    return inspect_dataset(
        demonstrations,
        obs_horizon=obs_horizon,
        action_horizon=action_horizon,
        execution_horizon=execution_horizon,
    )


# --- figures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        ({}, "environment  not named"),
        ({"env_name": "AdroitHandPen-v1"}, "environment  AdroitHandPen-v1"),
        ({"env": {"name": "planar"}, "env_name": "Planar"}, "environment  name=planar"),
    ],
)
def test_the_environment_is_shown_as_far_as_the_file_names_it(metadata, shown):
    assert shown in format_inspection(inspected(laid_out([20, 31], metadata=metadata))).splitlines()


@pytest.mark.parametrize("block_rows", [1, 7, 65_536])
def test_ranges_equal_those_of_the_whole_array(monkeypatch, block_rows):
    monkeypatch.setattr(figures_module, "BLOCK_ROWS", block_rows)
    values = laid_out([20, 31]).observations["state"]
    figures = key_figures("state", values)
    exact = values.astype(np.float64)
    assert [r.min for r in figures.dimensions] == exact.min(axis=0).tolist()
    assert [r.max for r in figures.dimensions] == exact.max(axis=0).tolist()
    assert [r.mean for r in figures.dimensions] == pytest.approx(exact.mean(axis=0), rel=1e-12)
    assert (figures.whole.min, figures.whole.max) == (exact.min(), exact.max())
    assert figures.whole.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert (figures.key, figures.shape, figures.dtype) == ("state", (3,), "float32")


@pytest.mark.parametrize("block_bytes", [1, 1000, 2**26])
def test_an_images_dimensions_are_its_channels(monkeypatch, block_bytes):
    monkeypatch.setattr(figures_module, "BLOCK_BYTES", block_bytes)
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 4, 3), dtype=np.uint8)
    images[..., 1] = 7
    figures = key_figures("image", images)
    assert [r.min for r in figures.dimensions] == images.min(axis=(0, 1, 2)).tolist()
    assert [r.max for r in figures.dimensions] == images.max(axis=(0, 1, 2)).tolist()
    assert [r.mean for r in figures.dimensions] == pytest.approx(images.mean(axis=(0, 1, 2)), rel=1e-12)
    assert (figures.constant, figures.nearly_constant) == ([1], [])


def test_dimensions_without_information_are_found():
    ramp = np.linspace(0, 1, 50)
    columns = [
        ramp,
        np.full(50, 3.0),
        np.zeros(50),
        1000 + 0.09 * ramp,  # changes by 0.9e-4 of its magnitude: noise
        1000 + 0.11 * ramp,  # a signal
        1e-6 * ramp,  # small, but not constant
    ]
    figures = key_figures("state", np.stack(columns, axis=1))
    assert figures.constant == [1, 2]
    assert figures.nearly_constant == [3]
    data = laid_out([50], observations={"state": np.stack(columns, axis=1).astype(np.float32)})
    text = format_inspection(inspected(data))
    assert "\nconstant: 2 of 6 dimensions of state: 1 (3), 2 (0)\n" in text
    assert "\nnearly constant: 1 of 6 dimensions of state: 3 (1000)\n" in text
    assert "constant: no dimension" not in text


def test_values_that_are_not_finite_are_refused_by_their_key():
    data = laid_out([5])
    data.actions[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"'actions': .*NaN"):
        inspected(data)


def test_what_relabelling_made_is_told_from_the_episodes_of_the_file():
    data = laid_out([4, 3, 5])
    assert "\nepisodes     3 with 12 transitions\n" in format_inspection(inspected(data))
    inspection = inspected(dataclasses.replace(data, originals=np.array([0, 0, 2])))
    assert (inspection.episodes.count, inspection.episodes.originals) == (3, 2)
    assert "\nepisodes     3 with 12 transitions, made of 2 by relabelling\n" in format_inspection(inspection)


def test_identical_episodes_are_found_byte_for_byte(monkeypatch):
    monkeypatch.setattr(figures_module, "BLOCK_ROWS", 2)
    data = laid_out([4, 3, 4, 4, 3, 3, 4])
    state, actions = data.observations["state"], data.actions
    for source, copy in [(slice(0, 4), slice(7, 11)), (slice(0, 4), slice(21, 25)), (slice(4, 7), slice(15, 18))]:
        state[copy], actions[copy] = state[source], actions[source]
    # The same states with one other action, and the same actions with other states, are episodes of their own.
    state[11:15], actions[11:15] = state[0:4], actions[0:4]
    actions[14, 1] += 1e-3
    actions[18:21] = actions[4:7]
    assert identical_episodes(data) == [[0, 2, 6], [1, 4]]

    data = laid_out(
        [], observations=data.observations, actions=actions, episode_ends=data.episode_ends, held_out=[4, 5]
    )
    episodes = inspected(data).episodes
    assert episodes.identical == [["0", "2", "6"], ["1", "4"]]
    assert episodes.held_out == ["4", "5"]
    assert episodes.held_out_copies == 1
    assert "3 of the episodes repeat another one (0 = 2 = 6; 1 = 4)" in format_inspection(inspected(data))


def test_the_same_rows_cut_elsewhere_are_other_episodes():
    ones = {"observations": {"state": np.ones((7, 1), np.float32)}, "actions": np.ones((7, 1), np.float32)}
    assert identical_episodes(Demonstrations(**ones, episode_ends=np.array([3, 7]))) == []
    assert identical_episodes(Demonstrations(**ones, episode_ends=np.array([3, 6, 7]))) == [[0, 1]]


@pytest.mark.parametrize("block_rows", [1, 3, 65_536])
def test_idle_actions_are_counted_inside_episodes_only(monkeypatch, block_rows):
    monkeypatch.setattr(figures_module, "BLOCK_ROWS", block_rows)
    actions = np.array([[1, 1], [1, 1], [1, 2], [1, 2], [1, 2], [1, 2], [5, 2]], np.float32)
    data = Demonstrations(
        observations={"state": np.zeros((7, 1), np.float32)}, actions=actions, episode_ends=np.array([4, 7])
    )
    # First episode: repeats, new, repeats. Second: its first action repeats one of another episode; repeats, new.
    assert idle_share(data) == 3 / 5
    assert idle_share(laid_out([1, 1])) is None


def test_the_histogram_has_every_episode_in_its_bin():
    lengths = np.random.default_rng(0).integers(40, 300, 500)
    bins = length_histogram(lengths)
    assert len(bins) <= 10
    assert bins[0][0] == lengths.min()
    assert bins[-1][1] == lengths.max()
    assert [low for low, _, _ in bins[1:]] == [high + 1 for _, high, _ in bins[:-1]]
    assert [count for *_, count in bins] == [int(((lengths >= a) & (lengths <= b)).sum()) for a, b, _ in bins]
    assert length_histogram(np.array([6, 6])) == [(6, 6, 2)]


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(figures_module, "BLOCK_ROWS", 4096)
    rows, width = 60_000, 64
    state = np.memmap(tmp_path / "state", np.float32, "w+", shape=(rows, width))
    state[:, 0] = np.arange(rows)
    data = Demonstrations(
        observations={"state": np.asarray(state)},
        actions=np.zeros((rows, 2), np.float32),
        episode_ends=np.arange(100, rows + 1, 100),
    )
    tracemalloc.start()
    found = inspected(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.keys[0].dimensions[0].mean == (rows - 1) / 2
    assert peak < state.nbytes / 4


# --- the timeline ------------------------------------------------------------------------------------------------


def test_the_timeline_of_three_windows_in_seconds():
    data = laid_out([9, 5, 3], metadata={"rate_hz": 10}, episode_names=["long", "middle", "short"])
    expected = """\
        Training windows of episode middle (5 transitions): obs_horizon 3, action_horizon 4

                         t-2  t-1    t  t+1  t+2  t+3
        seconds from t  -0.2 -0.1    0  0.1  0.2  0.3
        the first window, t = 0 (0 s)
          observations     0*   0*   0
          actions                    0    1    2    3
        a window in the middle, t = 2 (0.2 s)
          observations     0    1    2
          actions                    2    3    4    4x
        the last window, t = 4 (0.4 s)
          observations     2    3    4
          actions                    4    4x   4x   4x

        * the episode's first observation, repeated before its start
        x the episode's last action, repeated after its end, and masked: left out of the loss
        A rollout executes the actions of t to t+1 (0.2 s), observes, and plans again at t+2 (execution_horizon 2)."""
    assert format_windows(inspected(data, 3, 4, 2)) == textwrap.dedent(expected)


def test_the_timeline_without_a_rate_and_without_padding():
    expected = """\
        Training windows of episode 0 (4 transitions): obs_horizon 1, action_horizon 1

                         t
        the first window, t = 0
          observations   0
          actions        0
        a window in the middle, t = 2
          observations   2
          actions        2
        the last window, t = 3
          observations   3
          actions        3

        A rollout executes the action of t, observes, and plans again at t+1 (execution_horizon 1)."""
    assert format_windows(inspected(laid_out([4]), 1, 1, 1)) == textwrap.dedent(expected)


def test_long_timelines_leave_out_the_middle_in_text_and_nothing_in_data():
    found = inspected(laid_out([200]), 10, 64, 32)
    assert max(map(len, format_windows(found).splitlines())) <= 120
    assert " ..." in format_windows(found)
    assert found.windows[1].observations == list(range(91, 101))
    assert found.windows[1].actions == list(range(100, 164))
    assert found.windows[2].actions == [199] * 64
    assert found.windows[2].masked == [False] + [True] * 63


# --- the picture -------------------------------------------------------------------------------------------------


def test_the_picture_shows_lines_paths_and_frames(tmp_path):
    images = np.broadcast_to(np.array(RED, np.uint8), (90, 12, 16, 3))
    data = laid_out([40, 20, 30])
    with_images = laid_out([40, 20, 30], observations={"image": images, "state": data.observations["state"]})
    sizes = {}
    for name, dataset in (("plain", data), ("images", with_images)):
        inspect(dataset=dataset, episodes=2, output_dir=tmp_path / name)
        picture = np.asarray(Image.open(tmp_path / name / "inspect.png").convert("RGB"))
        sizes[name] = picture.shape
        # Ink in the left and the right half: an episode in each.
        assert all((half < 128).any(axis=-1).mean() > 0.01 for half in np.array_split(picture, 2, axis=1))
        assert (np.abs(picture.astype(int) - RED).max(axis=-1) < 3).mean() > 0.01 or name == "plain"
    assert sizes["images"][0] > sizes["plain"][0]


def test_names_that_look_like_formulas_or_control_the_terminal_are_drawn(tmp_path, capsys):
    names = ["$\\frac$", "a\x1b[2J", "$x"]
    states = {name: laid_out([40]).observations["state"] for name in names}
    data = laid_out([40], observations=states, episode_names=["$\\frac$\x07"], source="$_$\n")
    inspect(dataset=data, episodes=1, output_dir=tmp_path)
    assert (tmp_path / "inspect.png").stat().st_size > 1000


def test_wide_constant_and_single_ones_can_be_drawn(tmp_path):
    state = np.zeros((3, 40), np.float32)
    gray = np.zeros((3, 8, 8, 1), np.uint8)
    data = Demonstrations(
        observations={"state": state, "gray": gray}, actions=state[:, :2], episode_ends=np.array([1, 3])
    )
    inspect(dataset=data, episodes=9, output_dir=tmp_path)
    assert np.asarray(Image.open(tmp_path / "inspect.png").convert("L")).std() > 5


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def replay(tmp_path):
    """A replay buffer of five episodes: the third has a NaN, the fifth equals the first."""
    data = laid_out([6, 9, 4, 7, 6])
    state, actions = data.observations["state"], data.actions
    state[-6:], actions[-6:] = state[:6], actions[:6]
    state[17, 2] = np.nan
    state[:, 1] = 4
    images = np.broadcast_to(np.array(RED, np.uint8), (32, 12, 16, 3))
    root = zarr.open_group(str(tmp_path / "replay.zarr"), mode="w")
    root["data/state"], root["data/action"], root["data/img"] = state, actions, np.ascontiguousarray(images)
    root["meta/episode_ends"] = data.episode_ends
    return tmp_path / "replay.zarr"


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_the_command_prints_and_writes_what_is_inside(run_command, replay, tmp_path):
    out = run_command(
        "inspect_data",
        "dataset=zarr",
        f"dataset.path={replay}",
        "dataset.observation_keys=[state,img]",
        f"dataset.cache_dir={tmp_path}/cache",
        "action_horizon=4",
        "execution_horizon=3",
        "episodes=2",
        f"output_dir={tmp_path}/out",
    ).stdout
    for line in (
        f"source       {replay}",
        "episodes     4 with 28 transitions",
        "lengths      6 to 9 transitions, median 6.5",
        "rate         not stated",
        "bad          1 left out, and not counted in any figure here:",
        "episode 2: 'state' holds a NaN or infinity at transition 2",
        "identical    1 of the episodes repeats another one (0 = 4)",
        "constant: 1 of 3 dimensions of state: 1 (4)",
        "| img        | 12 x 16 x 3 |   uint8 |",
        "| state[1]   |             |         |",
        "plans again at t+3 (execution_horizon 3).",
        f"files: {tmp_path}/out/inspect.json, {tmp_path}/out/inspect.png",
    ):
        assert line in out
    found = json.loads((tmp_path / "out/inspect.json").read_text(), parse_constant=refuse_constant)
    root = zarr.open_group(str(replay), mode="r")
    good = np.r_[0:15, 19:32]
    actions = next(key for key in found["keys"] if key["key"] == "actions")
    exact = np.asarray(root["data/action"])[good].astype(np.float64)
    assert [d["min"] for d in actions["dimensions"]] == exact.min(axis=0).tolist()
    assert [d["mean"] for d in actions["dimensions"]] == pytest.approx(exact.mean(axis=0))
    assert found["episodes"]["bad"].keys() == {"2"}
    assert found["episodes"]["identical"] == [["0", "4"]]
    assert [window["now"] for window in found["windows"]] == [0, 3, 5]
    picture = np.asarray(Image.open(tmp_path / "out/inspect.png").convert("RGB"))
    assert (np.abs(picture.astype(int) - RED).max(axis=-1) < 3).mean() > 0.005


def test_bad_input_is_refused_in_one_sentence(run_command, replay, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = ["dataset=zarr", f"dataset.path={replay}", f"dataset.cache_dir={tmp_path}/cache"]
    for overrides, message in (
        ([], "dataset.path is missing"),
        (["dataset=zarr", "dataset.path=none.zarr"], "no dataset at none.zarr"),
        ([*known, "dataset.on_bad_episode=error"], "episode 2: 'state' holds a NaN"),
        ([*known, "obs_horizon=0"], "obs_horizon must be 1 or more; got 0"),
        ([*known, "action_horizon=0"], "action_horizon must be 1 or more; got 0"),
        ([*known, "episodes=0"], "episodes must be 1 or more; got 0"),
        ([*known, "execution_horizon=9"], "execution_horizon must be within 1..8; got 9"),
        ([*known, "horizon=9"], "unknown setting of inspect 'horizon'"),
    ):
        err = run_command("inspect_data", *overrides, check=2).stderr
        assert err.splitlines()[-1].startswith("error: "), overrides  # after the reader's progress bar, not on its line
        assert message in err.splitlines()[-1], overrides
        assert "Traceback" not in err, overrides
    assert not (tmp_path / "outputs").exists()
