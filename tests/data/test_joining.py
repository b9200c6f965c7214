"""Lists of datasets: read each on its own, and trained on as one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from policy.checkpoint import describe_checkpoint, load_checkpoint
from policy.data import reading
from policy.data.demonstrations import Demonstrations
from policy.data.frames import Frames
from policy.data.joined_array import JoinedArray
from policy.data.reading import read_demonstrations
from policy.data.windows import Windows
from tests.data.test_minari import ACTIONS, PICTURE, VECTOR, buffers, create
from tests.data.test_robomimic import SETTINGS, write

LEROBOT = Path(__file__).parent / "lerobot_v30"


@pytest.fixture
def read(tmp_path):
    def reader(path, format="minari", **asked):
        return read_demonstrations(format=format, path=path, cache_dir=tmp_path / "cache", **asked)

    return reader


def minari_set(
    root: Path, name: str, observation_space=VECTOR, action_space=ACTIONS, lengths=(3, 1, 5), **said
) -> Path:
    """A dataset that Minari writes, with entries of its metadata as this project notes them."""
    path = create(root, buffers(observation_space, action_space, lengths), observation_space, action_space, name)
    file = path / "data/metadata.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    return path


def all_windows(demonstrations: Demonstrations) -> Windows:
    return Windows(demonstrations, np.arange(demonstrations.num_episodes), obs_horizon=2, action_horizon=4)


# The arrays


parts_and_rows = st.tuples(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from([(1,), (3,), (2, 3, 1)]),
    st.lists(st.integers(0, 99), max_size=12),
    st.tuples(*[st.none() | st.integers(-9, 9)] * 2, st.sampled_from([None, 1, 2, -1])),
)


@given(parts_and_rows)
def test_rows_are_those_of_the_concatenation(drawn):
    lengths, shape, picked, bounds = drawn
    generator = np.random.default_rng(sum(lengths))
    parts = [generator.normal(size=(length, *shape)).astype(np.float32) for length in lengths]
    joined, whole = JoinedArray(parts), np.concatenate(parts)
    assert (len(joined), joined.shape, joined.ndim, joined.size) == (len(whole), whole.shape, whole.ndim, whole.size)
    assert joined.dtype == whole.dtype
    rows = np.array([number % len(whole) for number in picked], np.int64)
    for some in (rows, rows.reshape(-1, 1), rows.reshape(1, -1), np.broadcast_to(rows, (2, len(rows)))):
        np.testing.assert_array_equal(joined.take(some, axis=0), whole.take(some, axis=0), strict=True)
        np.testing.assert_array_equal(joined[some], whole[some], strict=True)
    np.testing.assert_array_equal(joined[slice(*bounds)], whole[slice(*bounds)], strict=True)
    np.testing.assert_array_equal(joined[-1], whole[-1])
    np.testing.assert_array_equal(joined[np.arange(len(whole)) % 2 == 0], whole[::2])
    np.testing.assert_array_equal(np.asarray(joined), whole, strict=True)
    for wrong in (-1, len(whole)):
        with pytest.raises(IndexError, match=f"rows must be within 0..{len(whole) - 1}"):
            joined.take(np.array([0, wrong]))


def test_rows_within_one_part_are_not_copied():
    parts = [np.zeros((3, 2)), np.ones((4, 2))]
    assert np.shares_memory(JoinedArray(parts)[3:6], parts[1])
    assert not np.shares_memory(JoinedArray(parts)[2:4], parts[0])


# Datasets of each format


def test_windows_of_a_list_are_those_of_each_dataset(read, tmp_path):
    paths = [minari_set(tmp_path, "one/a-v0"), minari_set(tmp_path, "two/a-v0", lengths=(4, 2))]
    both, single = read(paths), [read(path) for path in paths]
    assert both.source == f"{paths[0]}, {paths[1]}"
    assert both.joined_from == [str(path) for path in paths]
    assert both.name == "one/a-v0, two/a-v0"
    assert both.episode_names == ["one/a-v0/0", "one/a-v0/1", "one/a-v0/2", "two/a-v0/0", "two/a-v0/1"]
    assert both.episode_lengths.tolist() == [3, 1, 5, 4, 2]
    assert both.metadata["dataset_id"] == ["one/a-v0", "two/a-v0"]
    assert both.metadata["format"] == "minari"
    windows = all_windows(both)
    found = windows.gather(np.arange(len(windows)))
    each = [all_windows(one).gather(np.arange(len(one.actions))) for one in single]
    assert torch.equal(found["observations"]["state"], torch.cat([batch["observations"]["state"] for batch in each]))
    assert torch.equal(found["actions"], torch.cat([batch["actions"] for batch in each]))
    assert torch.equal(found["mask"], torch.cat([batch["mask"] for batch in each]))
    blocks = [actions for _, actions in windows.blocks()]
    np.testing.assert_array_equal(np.concatenate(blocks), np.concatenate([one.actions for one in single]))


def test_another_dataset_reads_none_again(read, tmp_path, monkeypatch):
    paths = [minari_set(tmp_path, f"{name}-v0") for name in "abc"]
    read(paths[:2])
    converted = []
    monkeypatch.setattr(
        reading,
        "write_cached",
        lambda *given, write=reading.write_cached, **more: (converted.append(more["source"]), write(*given, **more)),
    )
    read([paths[2], *paths[:2]])
    read(paths[::-1])
    assert converted == [str(paths[2])]


def test_a_list_of_one_is_that_dataset(read, tmp_path):
    path = minari_set(tmp_path, "a-v0")
    one, listed = read(path), read([path])
    assert (listed.source, listed.joined_from, listed.metadata) == (one.source, (), one.metadata)
    assert listed.episode_names == one.episode_names
    assert type(listed.actions) is np.ndarray


@pytest.mark.parametrize("decode", ["cache", "stream"])
def test_videos_of_several_datasets(read, tmp_path, decode):
    paths = [Path(shutil.copytree(LEROBOT, tmp_path / name)) for name in ("one", "two")]
    asked = {"format": "lerobot", "decode": decode, "decode_workers": 0}
    single, both = read(LEROBOT, **asked), read(paths, **asked)
    assert isinstance(both.observations["image"], Frames if decode == "stream" else JoinedArray)
    last = len(single.actions) - 1
    rows = np.array([[last, 0], [0, last], [5, 3]])
    expected = single.observations["image"].take(rows % (last + 1), axis=0)
    for shift in (0, last + 1):
        np.testing.assert_array_equal(both.observations["image"].take(rows + shift, axis=0), expected)
    assert both.metadata["tasks"] == single.metadata["tasks"]
    assert both.metadata["rate_hz"] == single.metadata["rate_hz"]
    windows, numbers = all_windows(both), [np.array([0, last, last + 1, 2 * last + 1])]
    ((_, batch),) = windows.batches(numbers)
    pictures = batch["observations"]["image"]
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[1], pictures[3])


def test_held_out_episodes_bad_ones_and_the_first_ones_are_of_each_dataset(read, tmp_path):
    masks = {"train": ["demo_0", "demo_2"], "valid": ["demo_1"]}
    paths = [write(tmp_path / f"{name}.hdf5", lengths=(3, 2, 5), masks=masks) for name in "ab"]
    both = read(paths, "robomimic")
    assert both.held_out == [1, 4]
    assert [both.episode_names[number] for number in both.held_out] == ["a.hdf5/demo_1", "b.hdf5/demo_1"]
    assert both.metadata["env_name"] == SETTINGS["env_name"]
    assert read(paths, "robomimic", max_episodes=2).episode_names == [
        *("a.hdf5/demo_0", "a.hdf5/demo_1"),
        *("b.hdf5/demo_0", "b.hdf5/demo_1"),
    ]


def twice(observations, actions):
    return [(observations, actions)] * 2


def test_demonstrations_that_relabelling_adds_are_numbered_through_all_datasets(read, tmp_path):
    paths = [write(tmp_path / f"{name}.hdf5", lengths=(3, 2)) for name in "ab"]
    both = read(paths, "robomimic", relabel=twice)
    assert both.originals.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert both.episode_names[4:6] == ["b.hdf5/demo_0", "b.hdf5/demo_0, on the way 1"]


def test_bad_episodes_are_counted_with_their_dataset(read, tmp_path):
    paths = [minari_set(tmp_path, f"{name}-v0") for name in "ab"]
    episodes = buffers()
    episodes[1].actions[:] = np.nan
    paths.append(create(tmp_path, episodes, name="c-v0"))
    with pytest.warns(UserWarning, match="c-v0: 1 of 3 episodes are bad"):
        both = read(paths, on_bad_episode="skip")
    assert list(both.skipped) == ["c-v0/1"]
    assert both.num_episodes == 8


# What datasets say of themselves

PLANAR, REACH = (json.dumps({"name": name}) for name in ("planar", "gym"))


@pytest.mark.parametrize(
    ("said", "env", "rate"),
    [
        ([{}, {}], None, None),
        ([{"ddim_policy_env": PLANAR}, {}], {"name": "planar"}, None),
        ([{"ddim_policy_env": PLANAR, "ddim_policy_rate_hz": 30}, {"ddim_policy_env": PLANAR}], {"name": "planar"}, 30),
        ([{"ddim_policy_rate_hz": 29.97}, {"ddim_policy_rate_hz": 30}], None, 29.97),
    ],
)
def test_environment_and_rate_are_those_that_are_stated(read, tmp_path, said, env, rate):
    paths = [minari_set(tmp_path, f"{name}-v0", **one) for name, one in zip("ab", said, strict=True)]
    found = read(paths).metadata
    assert (found.get("env"), found.get("rate_hz")) == (env, rate)


def test_datasets_of_different_environments_have_none(read, tmp_path):
    said = {"a": PLANAR, "b": PLANAR, "c": REACH}
    paths = [minari_set(tmp_path, f"{name}-v0", ddim_policy_env=env) for name, env in said.items()]
    found = read(paths).metadata
    assert "env" not in found
    assert found["envs"] == [json.loads(PLANAR), json.loads(REACH)]


def test_tasks_are_put_together(read, tmp_path):
    paths = [Path(shutil.copytree(LEROBOT, tmp_path / name)) for name in ("one", "two")]
    for path, tasks in zip(paths, (["push", "pull"], ["pull", "lift"]), strict=True):
        pq.write_table(pa.table({"task_index": [0, 1], "task": tasks}), path / "meta/tasks.parquet")
    assert read(paths, "lerobot").metadata["tasks"] == ["push", "pull", "lift"]


# What is refused

TWO = spaces.Dict({"pose": VECTOR, "goal": VECTOR})


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"action_space": spaces.Box(-1, 1, (3,))}, {}, r"'actions' is \(3,\) in the first and \(2,\) in the second"),
        ({}, {"observation_space": spaces.Box(-1, 1, (5,))}, r"'state' is \(4,\) in the first and \(5,\) in the sec"),
        (
            {"observation_space": TWO},
            {"observation_space": spaces.Dict({"pose": VECTOR, "touch": VECTOR})},
            r"'goal' is \(4,\) in the first and missing in the second; 'touch' is missing in the first and \(4,\)",
        ),
        (
            {"observation_space": spaces.Dict({"seen": PICTURE})},
            {"observation_space": spaces.Dict({"seen": VECTOR})},
            r"'seen' is \(32, 40, 3\) in the first and \(4,\) in the second \(dataset.observation_keys=, ",
        ),
        ({"ddim_policy_rate_hz": 10}, {"ddim_policy_rate_hz": 30}, "10 Hz in the first and 30 Hz in the second, .*res"),
    ],
)
def test_what_differs_is_named(read, tmp_path, first, second, said):
    paths = [minari_set(tmp_path, "a-v0", **first), minari_set(tmp_path, "b-v0", **second)]
    with pytest.raises(ValueError, match=rf"cannot be trained on both {paths[0]} and {paths[1]}: {said}"):
        read(paths)


def test_a_dataset_is_compared_with_all_before_it(read, tmp_path):
    rates = [{}, {"ddim_policy_rate_hz": 10}, {"ddim_policy_rate_hz": 30}]
    paths = [minari_set(tmp_path, f"{name}-v0", **one) for name, one in zip("abc", rates, strict=True)]
    with pytest.raises(ValueError, match=rf"both {paths[1]} and {paths[2]}: 10 Hz"):
        read(paths)


def test_pictures_that_are_decoded_do_not_go_with_those_in_videos(read, tmp_path, monkeypatch):
    one, two = (Path(shutil.copytree(LEROBOT, tmp_path / name)) for name in ("one", "two"))
    with monkeypatch.context() as patch:
        patch.setattr("policy.data.formats.lerobot.STREAM_BYTES", 0)
        read(one, "lerobot")
    with pytest.raises(
        ValueError, match=r"'image' is left in videos of 96 x 96 in the first and decoded in the second"
    ):
        read([one, two], "lerobot")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], r"dataset\.path=\[\] names no dataset: give one path or more"),
        (["a-v0", "a-v0"], r"dataset\.path names .*a-v0 twice: .*leave one out"),
        (["a-v0", "link"], r"dataset\.path names .*link twice"),
    ],
)
def test_lists_that_make_no_sense(read, tmp_path, names, said):
    minari_set(tmp_path, "a-v0")
    (tmp_path / "link").symlink_to("a-v0")
    with pytest.raises(ValueError, match=said):
        read([tmp_path / name for name in names])


def test_a_dataset_that_is_not_there_is_missed_before_any_is_converted(read, tmp_path):
    path = Path(shutil.copytree(LEROBOT, tmp_path / "one"))
    with pytest.raises(ValueError, match=r"no dataset at .*two: set dataset\.path"):
        read([path, tmp_path / "two"], "lerobot")
    assert not (tmp_path / "cache").exists()


# The commands


@pytest.fixture(scope="module")
def planar_sets(run_command, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("planar")
    for name, seed in (("one", 0), ("two", 100)):
        run_command("collect", "env=planar", "episodes=4", f"seed={seed}", f"output_dir={folder / name}")
    return [folder / name / "planar-v0" for name in ("one", "two")]


@pytest.fixture
def train(run_command, tmp_path):
    def run(name, paths):
        run_command(
            "train",
            "experiment=planar",
            f"dataset.path={paths}",
            *("train.steps=3", "train.batch_size=16", "train.rollout_every=0", "tracker=none", "videos=0"),
            f"output_dir={tmp_path / name}",
        )
        return load_checkpoint(tmp_path / name / "checkpoint")

    return run


def test_a_policy_is_trained_on_two_datasets_and_records_both(train, planar_sets, tmp_path):
    paths = f"[{planar_sets[0]},{planar_sets[1]}]"
    trained = train("run", paths)
    assert trained.training["dataset"] == [str(path) for path in planar_sets]
    assert trained.training["episodes"] == 8
    assert trained.env == {"name": "planar"}
    shown = describe_checkpoint(trained)["trained on"]
    assert shown.startswith(f"{planar_sets[0]}, {planar_sets[1]}: 8 episodes, ")
    card = str(trained.policy.generate_model_card())
    assert "| dataset | one/planar-v0, two/planar-v0 |" in card.replace("\\", "")
    trained.policy.save_pretrained(tmp_path / "shared")
    assert load_checkpoint(tmp_path / "shared").training["dataset"] == ["one/planar-v0", "two/planar-v0"]


def test_a_list_is_inspected(planar_sets, run_command, tmp_path):
    paths = f"[{planar_sets[0]},{planar_sets[1]}]"
    seen = run_command("inspect_data", f"dataset.path={paths}", "episodes=1", f"output_dir={tmp_path}/seen").stdout
    assert f"source       {planar_sets[0]}, {planar_sets[1]}" in seen
    assert "episodes     8 with" in seen


def test_a_list_of_one_trains_the_same_policy(train, planar_sets):
    one, listed = train("one", planar_sets[0]), train("listed", f"[{planar_sets[0]}]")
    assert one.training == listed.training
    for name, weight in one.policy.state_dict().items():
        assert torch.equal(weight, listed.policy.state_dict()[name]), name
