"""Readers and writers, against files that the formats' own libraries wrote or read."""

import dataclasses
import json
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
import zarr
from minari.data_collector import EpisodeBuffer

from policy.data import Demonstrations, dataset_name, read_minari, read_zarr_replay, write_minari

ENDS = np.array([4, 5, 11], dtype=np.int64)
ZARR_FORMATS = (2, 3) if int(zarr.__version__.split(".")[0]) >= 3 else (2,)


def replay(dtype="float32"):
    generator = np.random.default_rng(1)
    return {
        "data/state": generator.normal(size=(11, 5)).astype(dtype),
        "data/action": generator.normal(size=(11, 2)).astype(dtype),
        "data/img": generator.integers(0, 255, (11, 4, 4, 3)).astype(np.uint8),
        "meta/episode_ends": ENDS,
    }


def write_replay(path: Path, arrays, zarr_format=2) -> Path:
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else str(path)
    version = {"zarr_format": zarr_format} if len(ZARR_FORMATS) > 1 else {}
    root = zarr.open_group(store, mode="w", **version)
    for name, values in arrays.items():
        group = root.require_group(name.split("/")[0])
        if version:
            array = group.create_array(name.split("/")[1], shape=values.shape, dtype=values.dtype, chunks=values.shape)
            array[...] = values
        else:
            group[name.split("/")[1]] = values
    if path.suffix == ".zip":
        store.close()
    return path


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("name", ["replay.zarr", "replay.zarr.zip"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_replay_buffer_reads_back_exactly(tmp_path, name, zarr_format, dtype):
    arrays = replay(dtype)
    read = read_zarr_replay(path=write_replay(tmp_path / name, arrays, zarr_format))
    assert read.observations.keys() == {"state"}
    np.testing.assert_array_equal(read.observations["state"], arrays["data/state"].astype(np.float32))
    np.testing.assert_array_equal(read.actions, arrays["data/action"].astype(np.float32))
    np.testing.assert_array_equal(read.episode_ends, ENDS)
    assert read.observations["state"].dtype == read.actions.dtype == np.float32
    assert read.num_episodes == 3
    assert str(tmp_path / name) == read.source


def test_other_keys_can_be_chosen_and_pictures_keep_their_bytes(tmp_path):
    arrays = replay()
    read = read_zarr_replay(path=write_replay(tmp_path / "r.zarr", arrays), observation_key="img", action_key="state")
    np.testing.assert_array_equal(read.observations["state"], arrays["data/img"])
    assert read.observations["state"].dtype == np.uint8
    np.testing.assert_array_equal(read.actions, arrays["data/state"])


def test_the_transform_maps_the_stored_observations(tmp_path):
    arrays = replay()
    path = write_replay(tmp_path / "r.zarr", arrays)
    read = read_zarr_replay(path=path, transform=lambda state: 2.0 * state[:, :3])
    np.testing.assert_array_equal(read.observations["state"], 2 * arrays["data/state"][:, :3])
    assert read.observation_shapes == {"state": (3,)}


def test_max_episodes_keeps_the_first_episodes(tmp_path):
    arrays = replay()
    path = write_replay(tmp_path / "r.zarr", arrays)
    read = read_zarr_replay(path=path, max_episodes=2)
    assert read.episode_ends.tolist() == [4, 5]
    np.testing.assert_array_equal(read.actions, arrays["data/action"][:5])
    np.testing.assert_array_equal(read.observations["state"], arrays["data/state"][:5])
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"3 episodes; max_episodes asks for {count}"):
            read_zarr_replay(path=path, max_episodes=count)


@pytest.mark.parametrize("name", ["r.zarr", "r.zarr.zip"])
def test_a_missing_array_is_named_with_those_that_are_there(tmp_path, name):
    path = write_replay(tmp_path / name, replay())
    with pytest.raises(ValueError, match=r"no array 'data/keypoint'; data/ holds: action, img, state"):
        read_zarr_replay(path=path, observation_key="keypoint")


def test_a_zarr_group_that_is_no_replay_buffer_is_refused(tmp_path):
    path = write_replay(tmp_path / "r.zarr", {"other/state": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"no array 'meta/episode_ends'; meta/ holds: nothing"):
        read_zarr_replay(path=path)


@pytest.mark.parametrize(
    ("label", "damage"),
    [
        ("missing", lambda path: path.unlink()),
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])),
        ("empty", lambda path: path.write_bytes(b"")),
        ("no zip", lambda path: path.write_bytes(b"PK\x03\x04 not a zip")),
        ("another zip", lambda path: zipfile.ZipFile(path, "w").writestr("readme.txt", "hello")),
    ],
)
def test_a_damaged_zip_is_one_clear_error(tmp_path, label, damage):
    path = write_replay(tmp_path / "r.zarr.zip", replay())
    damage(path)
    with pytest.raises(ValueError, match=r"no dataset at|not a readable zarr") as error:
        read_zarr_replay(path=path)
    assert str(path) in str(error.value)


def test_damaged_chunks_are_one_clear_error(tmp_path):
    path = write_replay(tmp_path / "r.zarr", replay(), zarr_format=2)
    chunk = path / "data" / "action" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:8])
    with pytest.raises(ValueError, match="'data/action' is damaged") as error:
        read_zarr_replay(path=path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "ends",
    [[4, 5, 12], [4, 5, 10], [5, 4, 11], [4, 4, 11], [0, 5, 11], [-1, 5, 11], []],
    ids=["beyond", "short", "falling", "empty episode", "empty first", "negative", "none"],
)
def test_episode_ends_that_do_not_fit_are_refused(tmp_path, ends):
    path = write_replay(tmp_path / "r.zarr", {**replay(), "meta/episode_ends": np.array(ends, np.int64)})
    with pytest.raises(ValueError, match=r"do not cut its 11 transitions into episodes") as error:
        read_zarr_replay(path=path)
    assert str(path) in str(error.value)


def test_episode_ends_of_two_dimensions_are_refused(tmp_path):
    path = write_replay(tmp_path / "r.zarr", {**replay(), "meta/episode_ends": ENDS[:, None]})
    with pytest.raises(ValueError) as error:
        read_zarr_replay(path=path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("key", "column"), [("state", 4), ("action", 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_located(tmp_path, key, column, value):
    arrays = replay()
    arrays[f"data/{key}"][8, column] = value  # episode 2 is rows 5..10
    path = write_replay(tmp_path / "r.zarr", arrays)
    name = {"state": "state", "action": "actions"}[key]
    with pytest.raises(ValueError, match=rf"'{name}' holds a NaN or infinity in episode 2, transition 3"):
        read_zarr_replay(path=path)


def test_a_nan_at_an_episodes_first_transition_belongs_to_that_episode():
    actions = np.zeros((11, 2), np.float32)
    actions[4, 0] = np.nan
    with pytest.raises(ValueError, match="episode 1, transition 0"):
        Demonstrations(observations={"state": np.zeros((11, 1))}, actions=actions, episode_ends=ENDS)


def test_rows_of_observations_and_actions_must_be_equally_many(tmp_path):
    path = write_replay(tmp_path / "r.zarr", {**replay(), "data/state": np.zeros((10, 5))})
    with pytest.raises(ValueError, match="'state' has 10 rows, actions have 11"):
        read_zarr_replay(path=path)


def test_actions_must_be_vectors(tmp_path):
    path = write_replay(tmp_path / "r.zarr", {**replay(), "data/action": np.zeros((11,))})
    with pytest.raises(ValueError, match=r"actions must be \(transitions, width\); got shape \(11,\)"):
        read_zarr_replay(path=path)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize(
    "metadata",
    [
        {"dtype": "|O", "filters": [{"id": "pickle", "protocol": 4}], "fill_value": None},
        {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}], "fill_value": ""},
        {"filters": [{"id": "pickle", "protocol": 4}]},
        {"filters": None, "compressor": {"id": "pickle", "protocol": 4}},
    ],
)
def test_an_array_that_would_unpickle_is_refused_and_nothing_runs(tmp_path, metadata):
    path, marker = write_replay(tmp_path / "r.zarr", replay(), zarr_format=2), tmp_path / "ran"
    described = path / "data" / "state" / ".zarray"
    described.write_text(json.dumps({**json.loads(described.read_text()), "compressor": None, **metadata}))
    (path / "data" / "state" / "0.0").write_bytes(pickle.dumps(Payload(marker)))
    pickle.loads(pickle.dumps(Payload(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # the payload does work
    with pytest.raises(ValueError, match="data/state"):
        read_zarr_replay(path=path)
    assert not marker.exists()


# Minari


def buffers(lengths=(3, 1, 5), width=2, observation_width=4, dtype=np.float32):
    generator = np.random.default_rng(2)
    return [
        EpisodeBuffer(
            observations=generator.normal(size=(n + 1, observation_width)).astype(dtype),
            actions=generator.uniform(-1, 1, (n, width)).astype(np.float32),
            rewards=np.arange(n, dtype=np.float32),
            terminations=np.arange(n) == n - 1,
            truncations=np.zeros(n, bool),
        )
        for n in lengths
    ]


def box(width, low=-10.0, dtype=np.float32):
    return gymnasium.spaces.Box(low, -low, (width,), dtype)


def create(root: Path, monkeypatch, episodes, observation_space, action_space, **settings) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    minari.create_dataset_from_buffers(
        "task/expert-v0",
        episodes,
        observation_space=observation_space,
        action_space=action_space,
        algorithm_name="none",
        author="a",
        author_email="b",
        code_permalink="c",
        description="d",
        **settings,
    )
    return root / "task" / "expert-v0"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_dataset_of_minari_reads_back_exactly(tmp_path, monkeypatch, dtype):
    episodes = buffers(dtype=dtype)
    path = create(tmp_path, monkeypatch, episodes, box(4, dtype=dtype), box(2, -1.0))
    read = read_minari(path=path)
    assert read.episode_ends.tolist() == [3, 4, 9]  # T + 1 observations are T transitions
    np.testing.assert_array_equal(read.actions, np.concatenate([e.actions for e in episodes]))
    expected = np.concatenate([e.observations[:-1] for e in episodes]).astype(np.float32)
    np.testing.assert_array_equal(read.observations["state"], expected)
    assert read.observations["state"].dtype == read.actions.dtype == np.float32
    assert read.metadata["env"] is None
    assert read_minari(path=path, max_episodes=2).episode_ends.tolist() == [3, 4]


@dataclasses.dataclass
class Recorded:
    seed: int
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class Spaces(gymnasium.Env):
    observation_space = box(4)
    action_space = box(2, -1.0)


SETTINGS = {"name": "gym", "id": "Some-v0", "kwargs": {"x": 1, "names": ["a", "b"]}}


def recorded():
    return [
        Recorded(seed, e.observations, e.actions, e.rewards, e.terminations, e.truncations)
        for seed, e in enumerate(buffers())
    ]


@pytest.fixture
def written(tmp_path) -> Path:
    return write_minari(
        recorded(), folder=tmp_path / "root", dataset_id="gym-Some-v0-v0", env=Spaces(), env_settings=SETTINGS
    )


def test_what_is_written_is_read_by_minaris_own_loader(written, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(written.parent))
    dataset = minari.load_dataset(written.name)
    assert (dataset.total_episodes, dataset.total_steps) == (3, 9)
    assert dataset.observation_space == Spaces.observation_space
    assert dataset.action_space == Spaces.action_space
    for episode, expected in zip(dataset.iterate_episodes(), buffers(), strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(episode, name), getattr(expected, name))


def test_what_is_written_reads_back_with_its_environment(written):
    read = read_minari(path=written)
    assert read.metadata["env"] == SETTINGS
    assert read.episode_ends.tolist() == [3, 4, 9]
    np.testing.assert_array_equal(read.actions, np.concatenate([e.actions for e in buffers()]))
    np.testing.assert_array_equal(read.observations["state"], np.concatenate([e.observations[:-1] for e in buffers()]))


def test_minaris_root_is_put_back_after_writing(written, tmp_path, monkeypatch):
    assert os.environ.get("MINARI_DATASETS_PATH") != str(written.parent)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "before")
    with pytest.raises(Exception, match=r".+"):  # an id that Minari does not take
        write_minari([], folder=tmp_path, dataset_id="no version", env=Spaces(), env_settings={})
    assert os.environ["MINARI_DATASETS_PATH"] == "before"


def test_nothing_is_overwritten(written):
    before = {file: file.read_bytes() for file in written.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="is there already"):
        write_minari([], folder=written.parent, dataset_id=written.name, env=Spaces(), env_settings={})
    assert before == {file: file.read_bytes() for file in written.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"name": "planar"}, "planar-v0"),
        ({"name": "metaworld", "task": "pick-place-v3"}, "metaworld-pick-place-v3-v0"),
        ({"name": "gym", "id": "module:Some/Env-v1"}, "gym-module-Some-Env-v1-v0"),
    ],
)
def test_dataset_names_are_names_to_minari(settings, name):
    from minari.dataset.minari_dataset import parse_dataset_id

    assert dataset_name(settings) == name
    parse_dataset_id(name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_discrete_actions_are_refused(tmp_path, monkeypatch):
    episodes = [dataclasses.replace(e, actions=np.zeros(len(e.actions), np.int64)) for e in buffers()]
    path = create(tmp_path, monkeypatch, episodes, box(4), gymnasium.spaces.Discrete(3))
    with pytest.raises(ValueError, match=r"actions must be continuous \(Box\); this dataset has Discrete\(3\)"):
        read_minari(path=path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pictures_are_refused(tmp_path, monkeypatch):
    pictures = (np.zeros((len(e.observations), 8, 8, 3), np.uint8) for e in buffers())
    episodes = [dataclasses.replace(e, observations=p) for e, p in zip(buffers(), pictures, strict=True)]
    space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="observations must be vectors"):
        read_minari(path=create(tmp_path, monkeypatch, episodes, space, box(2, -1.0)))


def metadata_of(path: Path) -> dict:
    return json.loads((path / "data" / "metadata.json").read_text())


def rewrite(path: Path, **changes) -> None:
    (path / "data" / "metadata.json").write_text(json.dumps({**metadata_of(path), **changes}))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "missing": lambda path: shutil.rmtree(path),
    "truncated hdf5": lambda path: cut(path / "data" / "main_data.hdf5"),
    "no hdf5": lambda path: (path / "data" / "main_data.hdf5").unlink(),
    "no metadata": lambda path: (path / "data" / "metadata.json").unlink(),
    "truncated metadata": lambda path: cut(path / "data" / "metadata.json"),
    "metadata is a list": lambda path: (path / "data" / "metadata.json").write_text("[]"),
    "unknown format": lambda path: rewrite(path, data_format="parchment"),
    "unknown space": lambda path: rewrite(path, observation_space='{"type": "Sphere"}'),
    "no space": lambda path: rewrite(path, action_space=None),
    "more episodes than there are": lambda path: rewrite(path, total_episodes=5),
    "no episodes": lambda path: rewrite(path, total_episodes=0),
    "environment is no JSON": lambda path: rewrite(path, ddim_policy_env="{oops"),
    "environment is a number": lambda path: rewrite(path, ddim_policy_env=5),
    "environment is text": lambda path: rewrite(path, ddim_policy_env='"planar"'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_one_clear_error_that_names_it(written, damage):
    DAMAGES[damage](written)
    with pytest.raises(ValueError) as error:
        read_minari(path=written)
    assert str(written) in str(error.value)


def test_a_dataset_without_spaces_builds_no_environment(written, tmp_path, monkeypatch):
    """Minari would make the environment of `env_spec`, which imports what its entry point names."""
    (tmp_path / "trap.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = gymnasium.envs.registration.EnvSpec(id="Trap-v0", entry_point="trap:Env")
    metadata = {**metadata_of(written), "env_spec": spec.to_json()}
    del metadata["observation_space"]
    (written / "data" / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="does not state its observation and action spaces"):
        read_minari(path=written)
    assert not (tmp_path / "ran").exists()
    assert "trap" not in sys.modules
    with pytest.raises(AttributeError):  # the trap does work: Minari itself steps into it
        minari.MinariDataset(written / "data")
    assert (tmp_path / "ran").exists()
    sys.modules.pop("trap", None)


def test_a_relative_folder_works_and_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_minari(recorded(), folder=Path("a/b"), dataset_id="kept-v0", env=Spaces(), env_settings={})
    assert path == Path("a/b/kept-v0")
    assert read_minari(path=path).num_episodes == 3
    monkeypatch.setattr("policy.data.minari_format.json.dumps", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_minari(recorded(), folder=Path("a/b"), dataset_id="lost-v0", env=Spaces(), env_settings={})
    assert [entry.name for entry in Path("a/b").iterdir()] == ["kept-v0"]
