"""Minari datasets: those that Minari writes, those that this project writes, and damaged ones."""

import dataclasses
import json
import os
import shutil
import sys
import warnings
from itertools import count
from pathlib import Path

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minari.data_collector import EpisodeBuffer

from policy.data.formats.minari import finding
from policy.data.minari_writer import dataset_name, write_minari
from policy.data.reading import read_demonstrations

DATA_FORMATS = ("hdf5", "arrow", "parquet")
LENGTHS = (3, 1, 5)
ACTIONS = spaces.Box(-1, 1, (2,))
VECTOR = spaces.Box(-10, 10, (4,))
PICTURE = spaces.Box(0, 255, (32, 40, 3), np.uint8)
NESTED = spaces.Dict(
    {
        "observation": spaces.Box(-np.inf, np.inf, (2, 3), np.float64),
        "achieved.goal": VECTOR,
        "sensors": spaces.Dict(touch=spaces.MultiBinary(3), pair=spaces.Tuple((spaces.Discrete(4, start=-1), VECTOR))),
        "mode": spaces.Discrete(3, start=2),
        "modes": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[1, 0], [0, -5]]),
        "depth": spaces.Box(0, 255, (5, 6), np.uint8),
    }
)


def sample(space, rows, generator):
    """Draw observations in Minari's form: dicts of arrays, tuples of arrays."""
    if isinstance(space, spaces.Dict):
        return {key: sample(part, rows, generator) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(sample(part, rows, generator) for part in space.spaces)
    if isinstance(space, spaces.Text):
        return ["word"] * rows
    if space == PICTURE:  # smooth, so that JPEG changes little
        ramp = np.linspace(0, 200, 40).astype(np.uint8)
        return np.stack([np.broadcast_to(ramp[None, :, None] + number, (32, 40, 3)) for number in range(rows)])
    space.seed(int(generator.integers(2**31)))
    return np.stack([space.sample() for _ in range(rows)])


def buffers(observation_space=VECTOR, action_space=ACTIONS, lengths=LENGTHS, infos=None):
    generator = np.random.default_rng(2)
    return [
        EpisodeBuffer(
            observations=sample(observation_space, n + 1, generator),
            actions=sample(action_space, n, generator),
            rewards=np.arange(n, dtype=np.float32),
            terminations=np.arange(n) == n - 1,
            truncations=np.zeros(n, bool),
            infos=infos and infos(n),
        )
        for n in lengths
    ]


def create(root, episodes, observation_space=VECTOR, action_space=ACTIONS, name="task/expert-v0", **options) -> Path:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("MINARI_DATASETS_PATH", str(root))
        minari.create_dataset_from_buffers(
            name, episodes, observation_space=observation_space, action_space=action_space, **options
        )
    return root / name


CACHES = count()


def read(path: Path, **request):
    return read_demonstrations(format="minari", path=path, cache_dir=path.parent / f"cache-{next(CACHES)}", **request)


def joined(episodes, get=lambda observations: observations):
    return np.concatenate([np.asarray(get(e.observations))[:-1] for e in episodes])


def flattened(space, values):
    return np.stack([flatten(space, value) for value in values]).astype(np.float32)


# Datasets that Minari writes


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_vectors_read_back_exactly(tmp_path, data_format, dtype):
    space = spaces.Box(-10, 10, (4,), dtype)
    episodes = buffers(space)
    found = read(create(tmp_path, episodes, space, data_format=data_format))
    assert found.episode_ends.tolist() == [3, 4, 9]  # T + 1 observations are T transitions
    assert found.episode_names == ["0", "1", "2"]
    assert len(found.held_out) == 0
    np.testing.assert_array_equal(found.observations["state"], joined(episodes).astype(np.float32))
    np.testing.assert_array_equal(found.actions, np.concatenate([e.actions for e in episodes]))
    assert found.observations["state"].dtype == found.actions.dtype == np.float32
    assert found.metadata == {"format": "minari", "env": None, "dataset_id": "task/expert-v0"}


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_nested_observations_stand_under_joined_keys_as_gymnasium_flattens_them(tmp_path, data_format):
    episodes = buffers(NESTED)
    found = read(create(tmp_path, episodes, NESTED, data_format=data_format))
    parts = {
        "observation": (NESTED["observation"], lambda o: o["observation"]),
        "achieved/goal": (VECTOR, lambda o: o["achieved.goal"]),
        "sensors/touch": (NESTED["sensors"]["touch"], lambda o: o["sensors"]["touch"]),
        "sensors/pair/0": (NESTED["sensors"]["pair"][0], lambda o: o["sensors"]["pair"][0]),
        "sensors/pair/1": (VECTOR, lambda o: o["sensors"]["pair"][1]),
        "mode": (NESTED["mode"], lambda o: o["mode"]),
        "modes": (NESTED["modes"], lambda o: o["modes"]),
        "depth": (NESTED["depth"], lambda o: o["depth"]),
    }
    assert set(found.observations) == set(parts)
    for key, (space, get) in parts.items():
        expected = flattened(space, joined(episodes, get))
        np.testing.assert_array_equal(found.observations[key], expected, err_msg=key)


def test_nested_observations_agree_with_those_of_a_simulator(tmp_path):
    plain_observations = pytest.importorskip("envs.spaces").plain_observations
    both = spaces.Dict({**NESTED.spaces, "camera": PICTURE})
    episodes = buffers(both)
    found = read(create(tmp_path, episodes, both, jpeg_encoding=False))
    plain = plain_observations(both)
    assert {key: space.shape for key, space in plain.space.spaces.items()} == found.observation_shapes

    def at(observations, row):
        if isinstance(observations, dict):
            return {key: at(values, row) for key, values in observations.items()}
        return tuple(at(v, row) for v in observations) if isinstance(observations, tuple) else observations[row]

    rows = [plain.convert(at(e.observations, row)) for e in episodes for row in range(len(e.actions))]
    for key, values in found.observations.items():
        np.testing.assert_array_equal(values, [row[key] for row in rows], err_msg=key)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("jpeg", [True, False])
def test_pictures_stay_pictures(tmp_path, data_format, jpeg):
    episodes = buffers(PICTURE)
    found = read(create(tmp_path, episodes, PICTURE, data_format=data_format, jpeg_encoding=jpeg))
    pictures = found.observations["image"]
    assert pictures.dtype == np.uint8
    expected = joined(episodes).astype(int)
    assert np.abs(pictures.astype(int) - expected).max() <= (4 if jpeg else 0)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("noise", [True, False])
def test_jpegs_of_different_and_of_equal_length_are_read(tmp_path, data_format, noise):
    """In HDF5, Minari stores JPEGs of different lengths as rows of bytes, and JPEGs of equal length as a matrix."""
    generator = np.random.default_rng(0)
    episodes = buffers(PICTURE)
    for episode in episodes:
        episode.observations[:] = 128
        if noise:
            episode.observations[0] = generator.integers(0, 255, PICTURE.shape)
    path = create(tmp_path, episodes, PICTURE, data_format=data_format)
    if data_format == "hdf5":
        with h5py.File(path / "data" / "main_data.hdf5") as file:
            assert file["episode_0/observations"].ndim == (1 if noise else 2)
    expected = np.concatenate([episode["observations"][:-1] for episode in raw_episodes(path)])
    np.testing.assert_array_equal(read(path).observations["image"], expected)


def raw_episodes(path):
    return minari.MinariDataset(path / "data").storage.get_episodes(range(len(LENGTHS)))


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_one_and_four_channels_are_read(tmp_path, channels):
    space = spaces.Box(0, 255, (32, 32, channels), np.uint8)
    episodes = buffers(space)
    found = read(create(tmp_path, episodes, space, jpeg_encoding=False))
    np.testing.assert_array_equal(found.observations["image"], joined(episodes))


def test_pictures_beside_vectors_and_a_choice_of_keys(tmp_path):
    space = spaces.Dict(agent_pos=VECTOR, pixels=PICTURE)
    path = create(tmp_path, buffers(space), space)
    assert read(path).observation_shapes == {"agent_pos": (4,), "pixels": (32, 40, 3)}
    assert read(path, observation_keys=["agent_pos"]).observation_shapes == {"agent_pos": (4,)}
    assert read(path, observation_keys={"camera": "pixels"}).observation_shapes == {"camera": (32, 40, 3)}


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_infos_of_one_dimension_do_not_matter(tmp_path, data_format):
    """Minari's own reader of arrow fails on them."""
    episodes = buffers(infos=lambda n: {"success": np.zeros(n + 1), "nested": {"value": np.arange(n + 1.0)}})
    found = read(create(tmp_path, episodes, data_format=data_format))
    np.testing.assert_array_equal(found.observations["state"], joined(episodes))


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_actions_of_any_shape_are_flattened(tmp_path, data_format):
    space = spaces.Box(-1, 1, (2, 3))
    episodes = buffers(action_space=space)
    found = read(create(tmp_path, episodes, action_space=space, data_format=data_format))
    np.testing.assert_array_equal(found.actions, np.concatenate([e.actions for e in episodes]).reshape(-1, 6))


def test_text_is_left_out_and_refused_only_when_asked_for(tmp_path):
    space = spaces.Dict(words=spaces.Text(5), state=VECTOR)
    path = create(tmp_path, buffers(space), space)
    assert read(path).observation_shapes == {"state": (4,)}
    with pytest.raises(ValueError, match=r"observation 'words' is Text.*usable: state"):
        read(path, observation_keys=["words"])
    path = create(tmp_path, buffers(spaces.Text(5)), spaces.Text(5), name="words-v0")
    with pytest.raises(ValueError, match=r"none of its observations is an array of a fixed size.*Text"):
        read(path)


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=14), data_format=st.sampled_from(DATA_FORMATS))
def test_order_and_lengths_are_kept(tmp_path_factory, lengths, data_format):
    episodes = buffers(lengths=lengths)
    found = read(create(tmp_path_factory.mktemp("lengths"), episodes, data_format=data_format))
    assert found.episode_lengths.tolist() == lengths  # with more than ten episodes, 10 comes after 9
    np.testing.assert_array_equal(found.observations["state"], joined(episodes))


# Finding a dataset


def test_an_id_is_found_under_the_local_root(tmp_path, monkeypatch):
    path = create(tmp_path, buffers())
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path / "task")  # no folder of that name here
    assert finding.find_minari(Path("task/expert-v0")) == path
    assert finding.find_minari(Path("expert-v0")) == Path("expert-v0")  # a folder goes before an id
    found = read_demonstrations(format="minari", path="task/expert-v0", cache_dir=tmp_path / "cache")
    assert found.num_episodes == 3


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder and an empty local root, with a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    monkeypatch.setattr(finding, "_check_reachable", lambda: None)
    return tmp_path / "root"


def test_an_id_that_is_not_there_is_downloaded(elsewhere, monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", lambda name: create(elsewhere, buffers(), name=name))
    assert read(finding.find_minari(Path("task/expert-v0"))).num_episodes == 3


def test_a_download_that_fails_says_why_and_leaves_nothing(elsewhere, monkeypatch):
    def fail(name):
        (elsewhere / name / "data").mkdir(parents=True)
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(minari, "download_dataset", fail)
    expected = (
        r"D4RL/door/human-v2 is not a folder, is not under Minari's local root .*root, and could not be downloaded"
        r" \(Name or service not known\): correct dataset.path, or connect .*, or copy the dataset to .*human-v2$"
    )
    with pytest.raises(ValueError, match=expected):
        read_demonstrations(format="minari", path=Path("D4RL/door/human-v2"))
    assert not (elsewhere / "D4RL/door/human-v2").exists()


def test_no_network_is_found_out_before_minari_tries(elsewhere, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(elsewhere))
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(minari, "download_dataset", lambda name: pytest.fail("tried anyway"))
    with pytest.raises(ValueError, match=r"could not be downloaded \(.*refused"):
        finding.find_minari(Path("no-such-dataset-v0"))


@pytest.mark.parametrize("path", ["/nowhere/expert-v0", "../expert-v0", "expert", "a b-v0", "https://x/expert-v0"])
def test_what_is_no_id_is_never_asked_for(elsewhere, monkeypatch, path):
    monkeypatch.setattr(minari, "download_dataset", lambda name: pytest.fail("asked for"))
    with pytest.raises(ValueError, match="no dataset at"):
        read_demonstrations(format="minari", path=Path(path))


# Datasets that this project writes


@dataclasses.dataclass
class Recorded:
    seed: int
    observations: object
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class Spaces(gymnasium.Env):
    def __init__(self, observation_space=VECTOR):
        self.observation_space = observation_space
        self.action_space = ACTIONS


SETTINGS = {"name": "gym", "id": "Some-v0", "kwargs": {"x": 1, "names": ["a", "b"]}}


def recorded(observation_space=VECTOR):
    return [
        Recorded(seed, e.observations, e.actions, e.rewards, e.terminations, e.truncations)
        for seed, e in enumerate(buffers(observation_space))
    ]


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "root/gym-Some-v0-v0"
    write_minari(recorded(), path=path, env=Spaces(), env_settings=SETTINGS)
    return path


def test_what_is_written_is_read_by_minaris_own_loader(written, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(written.parent))
    dataset = minari.load_dataset(written.name)
    assert (dataset.total_episodes, dataset.total_steps) == (3, 9)
    assert dataset.observation_space == VECTOR
    assert dataset.action_space == ACTIONS
    for episode, expected in zip(dataset.iterate_episodes(), buffers(), strict=True):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(episode, name), getattr(expected, name))


def test_what_is_written_reads_back_with_its_environment(written):
    found = read(written)
    assert found.metadata["env"] == SETTINGS
    assert found.episode_ends.tolist() == [3, 4, 9]
    np.testing.assert_array_equal(found.actions, np.concatenate([e.actions for e in buffers()]))
    np.testing.assert_array_equal(found.observations["state"], joined(buffers()))


def test_observations_by_key_are_written_without_loss(tmp_path):
    space = spaces.Dict(camera=PICTURE, inner=spaces.Dict(state=VECTOR))
    write_minari(recorded(space), path=tmp_path / "any name", env=Spaces(space), env_settings=SETTINGS)
    found = read(tmp_path / "any name")
    np.testing.assert_array_equal(found.observations["camera"], joined(buffers(space), lambda o: o["camera"]))
    np.testing.assert_array_equal(
        found.observations["inner/state"], joined(buffers(space), lambda o: o["inner"]["state"])
    )


def test_minaris_root_is_put_back_after_writing(written, tmp_path, monkeypatch):
    assert os.environ.get("MINARI_DATASETS_PATH") != str(written.parent)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "before")
    with pytest.raises(Exception, match=r".+"):  # an id that Minari does not take
        write_minari([], path=tmp_path / "new", env=Spaces(), env_settings={})
    assert os.environ["MINARI_DATASETS_PATH"] == "before"


def test_nothing_is_overwritten(written):
    before = {file: file.read_bytes() for file in written.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="is there already"):
        write_minari([], path=written, env=Spaces(), env_settings=SETTINGS)
    assert before == {file: file.read_bytes() for file in written.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("env_settings", "name"),
    [
        ({"name": "planar"}, "planar-v0"),
        ({"name": "metaworld", "task": "pick-place-v3"}, "metaworld-pick-place-v3-v0"),
        ({"name": "gym", "id": "module:Some/Env-v1"}, "gym-module-Some-Env-v1-v0"),
    ],
)
def test_dataset_names_are_names_to_minari(env_settings, name):
    from minari.dataset.minari_dataset import parse_dataset_id

    assert dataset_name(env_settings) == name
    parse_dataset_id(name)


def test_a_relative_folder_works_and_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("a/b/kept-v0")
    write_minari(recorded(), path=path, env=Spaces(), env_settings=SETTINGS)
    assert read_demonstrations(format="minari", path=path, cache_dir=tmp_path / "cache").num_episodes == 3
    monkeypatch.setattr("policy.data.minari_writer.json.dumps", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_minari(recorded(), path=Path("a/b/lost-v0"), env=Spaces(), env_settings=SETTINGS)
    assert [entry.name for entry in Path("a/b").iterdir()] == ["kept-v0"]


# Damaged datasets


def edit(change):
    """Make a function that damages the HDF5 file; `change` is called with the opened file."""

    def damage(path: Path) -> None:
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            change(file)

    return damage


def replace(key, values):
    def change(file):
        del file[key]
        file[key] = values

    return edit(change)


def put(key, index, value):
    def change(file):
        file[key][index] = value

    return edit(change)


def external_link(file):
    other = Path(file.filename).with_name("other.hdf5")
    with h5py.File(other, "w") as target:
        target["secret"] = np.zeros((2, 4))
    del file["episode_1/observations"]
    file["episode_1/observations"] = h5py.ExternalLink(str(other), "/secret")


def soft_link(file):
    del file["episode_1/observations"]
    file["episode_1/observations"] = h5py.SoftLink("/episode_0/observations")


def virtual(file):
    del file["episode_1/observations"]
    layout = h5py.VirtualLayout((2, 4), "f4")
    layout[...] = h5py.VirtualSource(file.filename, "episode_0/observations", (4, 4))[:2]
    file.create_virtual_dataset("episode_1/observations", layout)


def external_storage(file):
    raw = Path(file.filename).with_name("raw.bin")
    raw.write_bytes(bytes(32))
    del file["episode_1/observations"]
    file.create_dataset("episode_1/observations", (2, 4), "f4", external=[(str(raw), 0, 32)])


def huge(file):
    del file["episode_1/observations"]
    file.create_dataset("episode_1/observations", (2**40, 4), "f4", chunks=(1024, 4), compression="gzip")


def references(file):
    del file["episode_1/observations"]
    file.create_dataset("episode_1/observations", data=[file["episode_0"].ref] * 2, dtype=h5py.ref_dtype)


def group_of_actions(file):
    del file["episode_1/actions"]
    file.create_group("episode_1/actions")


def no_transitions(file):
    file["episode_1/observations"].resize(1, 0)
    file["episode_1/actions"].resize(0, 0)


# Damages to episode 1 alone, and the expected messages.
BAD_EPISODES = {
    "missing observations": (edit(lambda f: f.__delitem__("episode_1/observations")), "no 'episode_1/observations'"),
    "missing actions": (edit(lambda f: f.__delitem__("episode_1/actions")), "no 'episode_1/actions'"),
    "actions are a group": (edit(group_of_actions), "'episode_1/actions' is not an array"),
    "text": (
        replace("episode_1/observations", ["a", "b"]),
        "'episode_1/observations' must hold numbers; it holds text",
    ),
    "references": (edit(references), "'episode_1/observations' must hold numbers; it holds object"),
    "nan": (put("episode_1/observations", (0, 2), np.nan), "'state' holds a NaN or infinity at transition 0"),
    "infinity": (put("episode_1/actions", (0, 1), -np.inf), "'actions'"),
    "no transitions": (edit(no_transitions), "no transitions"),
    "as many observations as actions": (
        edit(lambda f: f["episode_1/observations"].resize(1, 0)),
        "'observations' has 1 rows, 1 actions need 2",
    ),
    "another width": (
        replace("episode_1/observations", np.zeros((2, 5))),
        r"'observations' holds arrays of shape \(5,\); its space is Box",
    ),
    "a number for an array": (replace("episode_1/actions", 3.0), "'episode_1/actions' is not an array"),
    "above the bounds": (
        put("episode_1/actions", (0, 1), 1.01),
        "'actions' is 1.01 at transition 0, index 1; its space allows -1 to 1",
    ),
    "below the bounds": (put("episode_1/actions", (0, 0), -1.01), "'actions' is -1.01 at transition 0, index 0"),
    "external link": (edit(external_link), "'episode_1/observations' is a link that may leave the file"),
    "soft link": (edit(soft_link), "'episode_1/observations' is a link that may leave the file"),
    "virtual": (edit(virtual), "'episode_1/observations' is stored in other files"),
    "external storage": (edit(external_storage), "'episode_1/observations' is stored in other files"),
    "huge": (edit(huge), "'episode_1/observations' should have 17592186044416 bytes, but 0 are stored"),
}


@pytest.mark.parametrize("damage", BAD_EPISODES)
def test_a_bad_episode_is_named_and_can_be_left_out(tmp_path, damage):
    path = create(tmp_path, buffers())
    make, said = BAD_EPISODES[damage]
    make(path)
    with pytest.raises(ValueError, match=f"episode 1: .*{said}") as error:
        read(path)
    assert str(path) in str(error.value)
    with pytest.warns(UserWarning, match="left out; the first one is 1: "):
        found = read(path, on_bad_episode="skip")
    assert found.episode_names == ["0", "2"]
    assert list(found.skipped) == ["1"]
    good = [buffers()[0], buffers()[2]]
    np.testing.assert_array_equal(found.observations["state"], joined(good))


def test_actions_may_miss_their_bounds_by_a_rounding_error(tmp_path):
    path = create(tmp_path, buffers())
    put("episode_1/actions", (0, 1), 1.0001)(path)
    assert read(path).num_episodes == 3
    with_one_bound = spaces.Box(np.float32([-100, -np.inf]), np.float32([np.inf, np.inf]))
    path = create(tmp_path, buffers(), action_space=with_one_bound, name="one-v0")
    put("episode_1/actions", (0, 0), -100.005)(path)
    assert read(path).num_episodes == 3
    put("episode_1/actions", (0, 0), -100.02)(path)
    with pytest.raises(ValueError, match="its space allows -100 to inf"):
        read(path)


def test_actions_beyond_their_space_are_clipped_by_a_setting(tmp_path):
    path = create(tmp_path, buffers())
    expected = read(path).actions.copy()
    put("episode_1/actions", (0, 1), 7)(path)
    with pytest.raises(ValueError, match=r"'actions' is 7 .*: clip such actions, .* dataset.on_action_outside=clip"):
        read(path)
    expected[LENGTHS[0], 1] = 1
    np.testing.assert_array_equal(read(path, on_action_outside="clip").actions, expected)
    with pytest.raises(ValueError, match="on_action_outside"):
        read(path, on_action_outside="clp")


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("choice", [1, 5])
def test_a_choice_outside_of_its_space_is_a_bad_episode(tmp_path, data_format, choice):
    space = spaces.Dict(mode=spaces.Discrete(3, start=2))
    episodes = buffers(space)
    episodes[1].observations["mode"][0] = choice
    path = create(tmp_path, episodes, space, data_format=data_format)
    with pytest.raises(ValueError, match=rf"episode 1: 'observations/mode' is {choice} at transition 0; its space is"):
        read(path)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_a_jpeg_that_is_none_is_a_bad_episode(tmp_path, data_format, monkeypatch):
    from PIL import Image

    def save(image, buffer, format):
        buffer.write(b"\xff\xd8 no picture")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        path = create(tmp_path, buffers(PICTURE, lengths=[2]), PICTURE, data_format=data_format)
    with pytest.raises(ValueError, match="episode 0: 'observations' cannot be read at transition 0"):
        read(path)


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_a_damaged_file_of_one_episode_is_a_bad_episode(tmp_path, data_format):
    path = create(tmp_path, buffers(), data_format=data_format)
    cut(path / "data" / "1" / f"part-0.{data_format}")
    with pytest.raises(ValueError, match=rf"episode 1: part-0.{data_format} cannot be read"):
        read(path)
    with pytest.warns(UserWarning, match="left out; the first one is 1: "):
        assert read(path, on_bad_episode="skip").episode_names == ["0", "2"]


def rewrite(path: Path, **changes) -> None:
    file = path / "data" / "metadata.json"
    kept = {key: value for key, value in {**json.loads(file.read_text()), **changes}.items() if value is not ...}
    file.write_text(json.dumps(kept))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def metadata(text):
    return lambda path: (path / "data" / "metadata.json").write_text(text)


def hdf5(content):
    return lambda path: (path / "data" / "main_data.hdf5").write_bytes(content)


def space(which, text):
    return lambda path: rewrite(path, **{f"{which}_space": text})


HUGE = '{"type": "Box", "shape": [1000000000000], "low": 0, "high": 1, "dtype": "float32"}'
STATES_NO_SPACES = "does not state the observation_space and action_space"


def no_episodes(path: Path) -> None:
    with h5py.File(path / "data" / "main_data.hdf5", "w"):
        rewrite(path, total_episodes=0)


def overwrite_heap(path: Path) -> None:
    """Write zeros over a part of the heap of JPEGs: HDF5 itself would loop forever there."""
    file = path / "data" / "main_data.hdf5"
    content = bytearray(file.read_bytes())
    start = content.index(b"GCOL") + 16
    content[start : start + 64] = bytes(64)
    file.write_bytes(content)


BAD_DATASETS = {
    "missing": (shutil.rmtree, "no dataset at"),
    "another folder": (lambda path: (path / "data").rename(path / "date"), "no Minari dataset is there .* data/$"),
    "the folder above": (
        lambda path: shutil.move(path / "data", path / "toy" / "pick-v0" / "data"),
        "to the folder that holds data/, such as toy/pick-v0 in it$",
    ),
    "truncated hdf5": (
        lambda path: cut(path / "data" / "main_data.hdf5"),
        "main_data.hdf5 is not a readable HDF5 file",
    ),
    "empty hdf5": (hdf5(b""), "main_data.hdf5 is not a readable HDF5 file"),
    "something else": (hdf5(b"PK\x03\x04 a zip"), "main_data.hdf5 is not a readable HDF5 file"),
    "no hdf5": (lambda path: (path / "data" / "main_data.hdf5").unlink(), "it has no data/main_data.hdf5"),
    "overwritten heap": (overwrite_heap, r"main_data.hdf5 is damaged \(a part of it was overwritten\)"),
    "no metadata": (lambda path: (path / "data" / "metadata.json").unlink(), "it has no data/metadata.json"),
    "truncated metadata": (lambda path: cut(path / "data" / "metadata.json"), "metadata.json is damaged"),
    "metadata is binary": (metadata("\0\1"), "metadata.json is damaged"),
    "metadata is deep": (metadata("[" * 100_000), "metadata.json is damaged"),
    "metadata is a list": (metadata("[]"), STATES_NO_SPACES),
    "unknown format": (lambda path: rewrite(path, data_format="parchment"), "data_format 'parchment'"),
    "unknown space": (space("observation", '{"type": "Sphere"}'), "observation_space in data/metadata.json"),
    "space is no JSON": (space("action", "{"), "action_space in data/metadata.json"),
    "huge space": (space("observation", HUGE), "observation_space in"),
    "no space": (space("action", None), STATES_NO_SPACES),
    "discrete actions": (
        space("action", '{"type": "Discrete", "n": 3, "start": 0}'),
        r"its actions are Discrete\(3\); a diffusion policy denoises continuous",
    ),
    "only a huge choice": (
        space("observation", '{"type": "Discrete", "n": 1000000000, "start": 0}'),
        "none of its observations",
    ),
    "more episodes than there are": (
        lambda path: rewrite(path, total_episodes=5),
        "should have 5 episodes, but 3 are there",
    ),
    "no episodes": (no_episodes, "should have 0 episodes, but 0 are there"),
    "environment is no JSON": (lambda path: rewrite(path, ddim_policy_env="{oops"), "ddim_policy_env .* is damaged"),
    "environment is a number": (lambda path: rewrite(path, ddim_policy_env=5), "ddim_policy_env .* is damaged"),
    "environment is text": (
        lambda path: rewrite(path, ddim_policy_env='"planar"'),
        "ddim_policy_env .* must be the settings",
    ),
}


@pytest.mark.parametrize("damage", BAD_DATASETS)
def test_a_damaged_dataset_is_one_clear_error_that_names_it(tmp_path, damage):
    episodes = buffers(PICTURE)
    generator = np.random.default_rng(0)
    for episode in episodes:
        episode.observations[0] = generator.integers(0, 255, PICTURE.shape)
    path = create(tmp_path, episodes, PICTURE)
    make, said = BAD_DATASETS[damage]
    make(path)
    with pytest.raises(ValueError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"observation_keys": ["stat"]}, r"unknown observation key 'stat' \(did you mean 'state'\?\); allowed: state"),
        ({"action_key": "actions"}, "Minari names its actions itself: leave out dataset.action_key='actions'"),
        ({"subset": "train"}, "Minari names no subsets of its episodes: leave out dataset.subset='train'"),
    ],
)
def test_what_a_dataset_does_not_have_is_refused(tmp_path, request_, said):
    path = create(tmp_path, buffers())
    with pytest.raises(ValueError, match=said) as error:
        read(path, **request_)
    assert str(path) in str(error.value)


def test_two_observations_of_one_name_are_refused(tmp_path):
    space = spaces.Dict({"a/b": VECTOR, "a": spaces.Dict(b=VECTOR)})
    path = create(tmp_path, buffers(space), space, data_format="arrow")
    with pytest.raises(ValueError, match="two of its observations are called 'a/b'"):
        read(path)


def test_a_dataset_without_spaces_builds_no_environment(written, tmp_path, monkeypatch):
    """Minari would make the environment of `env_spec`, and so import the module that its entry point names."""
    (tmp_path / "trap.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = gymnasium.envs.registration.EnvSpec(id="Trap-v0", entry_point="trap:Env")
    rewrite(written, env_spec=spec.to_json(), observation_space=...)
    with pytest.raises(ValueError, match=STATES_NO_SPACES):
        read(written)
    assert not (tmp_path / "ran").exists()
    assert "trap" not in sys.modules
    with pytest.raises(AttributeError):  # the trap does work: Minari itself steps into it
        minari.MinariDataset(written / "data")
    assert (tmp_path / "ran").exists()
    sys.modules.pop("trap", None)


@pytest.mark.parametrize("damage", [None, 5, "", "[1]", "{}", '{"id": 5}', 50_000 * "["])
def test_the_name_of_the_environment_is_read_and_nothing_else_of_it(written, damage):
    spec = gymnasium.envs.registration.EnvSpec(id="Trap-v0", entry_point="trap:Env")
    rewrite(written, env_spec=spec.to_json())
    assert read(written).metadata["env_name"] == "trap:Trap-v0"
    rewrite(written, env_spec=gymnasium.spec("Pendulum-v1").to_json())
    assert read(written).metadata["env_name"] == "Pendulum-v1"
    rewrite(written, env_spec=damage)
    assert "env_name" not in read(written).metadata


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    space = spaces.Dict(p=VECTOR, mode=spaces.Discrete(3), image=PICTURE)
    return {
        f: create(tmp_path_factory.mktemp(f), buffers(space, lengths=[3, 2]), space, data_format=f)
        for f in DATA_FORMATS
    }


@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data_format=st.sampled_from(DATA_FORMATS),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bytes_give_an_error_or_demonstrations(small, data_format, flips):
    path = small[data_format]
    file = path / "data" / {"hdf5": "main_data.hdf5"}.get(data_format, f"0/part-0.{data_format}")
    whole = file.read_bytes()
    damaged = bytearray(whole)
    for place, byte in flips:
        damaged[int(place * len(damaged))] = byte
    file.write_bytes(damaged)
    try:
        found = read(path, on_bad_episode="skip")
    except ValueError:
        return
    finally:
        file.write_bytes(whole)
    assert found.observation_shapes == {"image": (32, 40, 3), "mode": (3,), "p": (4,)}
    assert set(found.episode_lengths.tolist()) <= {3, 2}
    assert np.isfinite(found.observations["p"]).all()
    assert np.isfinite(found.actions).all()
