"""robomimic's files: one that robomimic's own commands wrote (tests/data), and damaged ones."""

import json
from itertools import count
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy.data.reading import read_demonstrations

FIXTURE = Path(__file__).parent / "robomimic.hdf5"
SETTINGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}


def demo(number, length):
    generator = np.random.default_rng(number)
    return {
        "actions": generator.uniform(-1, 1, (length, 2)),
        "actions_abs": generator.uniform(-1, 1, (length, 3)),
        "action_dict/abs_pos": generator.uniform(-1, 1, (length, 4)),
        "rewards": np.zeros(length),
        "states": generator.normal(size=(length, 9)),
        "obs/eef": generator.normal(size=(length, 3)).astype(np.float32),
        "obs/image": generator.integers(0, 255, (length, 6, 8, 3)).astype(np.uint8),
        "obs/nested/joint.pos": generator.normal(size=(length, 2)),
        "next_obs/eef": generator.normal(size=(length, 3)),
    }


def write(path: Path, lengths=(3, 1, 5), masks=(), env_args=SETTINGS, **options) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(lengths)
        if env_args is not None:
            data.attrs["env_args"] = env_args if isinstance(env_args, str | bytes) else json.dumps(env_args)
        for number, length in enumerate(lengths):
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = length
            for key, values in demo(number, length).items():
                group.create_dataset(key, data=values, **options)
        for name, demos in dict(masks).items():
            file[f"mask/{name}"] = np.array(demos, dtype="S")
    return path


CACHES = count()


def read(path: Path, **request):
    return read_demonstrations(
        format="robomimic", path=path, cache_dir=path.parent / f"cache-{next(CACHES)}", **request
    )


def joined(key, numbers=(0, 1, 2), lengths=(3, 1, 5)):
    return np.concatenate([demo(number, lengths[number])[key] for number in numbers]).astype(np.float32)


@pytest.fixture
def path(tmp_path) -> Path:
    return write(tmp_path / "demos.hdf5")


# A file that robomimic wrote


def test_a_file_of_robomimic_reads_back_as_it_was_made(tmp_path):
    """In its script, an action is (t, demo), and the observed state is the sum of the previous actions."""
    found = read_demonstrations(format="robomimic", path=FIXTURE, cache_dir=tmp_path)
    assert found.episode_names == [f"demo_{number}" for number in range(12)]  # 10 comes after 9
    assert found.episode_lengths.tolist() == [2 + number % 4 for number in range(12)]
    steps = [np.stack([np.arange(n), np.full(n, demo)], 1) for demo, n in enumerate(found.episode_lengths)]
    states = np.concatenate([np.cumsum(actions, axis=0) - actions for actions in steps])
    np.testing.assert_array_equal(found.actions, np.concatenate(steps))
    np.testing.assert_array_equal(found.observations["robot0_eef_pos"], states)
    np.testing.assert_array_equal(found.observations["object"], states.sum(axis=1, keepdims=True))
    assert found.observations["agentview_image"].shape == (42, 6, 8, 3)
    np.testing.assert_array_equal(found.observations["agentview_image"][:, 5, 7, 2], states[:, 0])
    assert found.metadata == {
        "format": "robomimic",
        "env_name": "Lift",
        "env_type": 2,
        "rate_hz": 20,
        "total": 42,
    }


def test_the_split_of_robomimic_is_held_out_and_its_filter_keys_are_subsets(tmp_path):
    with h5py.File(FIXTURE) as file:
        train, valid = ({name.decode() for name in file[f"mask/{mask}"]} for mask in ("train", "valid"))
    assert (len(train), len(valid)) == (9, 3)
    whole = read_demonstrations(format="robomimic", path=FIXTURE, cache_dir=tmp_path)
    assert {whole.episode_names[number] for number in whole.held_out} == valid
    for mask, demos in (("train", train), ("valid", valid)):
        found = read_demonstrations(format="robomimic", path=FIXTURE, subset=mask, cache_dir=tmp_path)
        assert found.episode_names == sorted(demos, key=lambda name: int(name[5:]))
        assert len(found.held_out) == 0


# Its documented layout


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}])
def test_everything_under_obs_is_observed(tmp_path, options):
    found = read(write(tmp_path / "demos.hdf5", **options))
    assert found.observation_shapes == {"eef": (3,), "image": (6, 8, 3), "nested/joint/pos": (2,)}
    for key in ("eef", "image", "nested/joint.pos"):
        np.testing.assert_array_equal(found.observations[key.replace(".", "/")], joined(f"obs/{key}"))
    np.testing.assert_array_equal(found.actions, joined("actions"))
    assert len(found.held_out) == 0


@pytest.mark.parametrize("key", ["actions_abs", "action_dict/abs_pos"])
def test_observations_and_actions_can_be_chosen(path, key):
    found = read(path, observation_keys={"state": "nested/joint.pos"}, action_key=key)
    assert found.observation_shapes == {"state": (2,)}
    np.testing.assert_array_equal(found.observations["state"], joined("obs/nested/joint.pos"))
    np.testing.assert_array_equal(found.actions, joined(key))


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=14), data=st.data())
def test_order_and_lengths_are_kept(tmp_path_factory, lengths, data):
    names = [f"demo_{number}" for number in range(len(lengths))]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    path = write(tmp_path_factory.mktemp("lengths") / "demos.hdf5", lengths, {"some": chosen})
    assert read(path).episode_lengths.tolist() == lengths
    numbers = sorted(int(name[5:]) for name in chosen)
    found = read(path, subset="some")
    assert found.episode_names == [f"demo_{number}" for number in numbers]
    np.testing.assert_array_equal(found.actions, joined("actions", numbers, lengths))


def test_masks_may_hold_texts_of_any_length(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("mask/train", data=["demo_2", "demo_0"], dtype=h5py.string_dtype())
        file["mask/valid"] = np.array([], dtype="S")
    found = read(path)
    assert found.episode_names == ["demo_0", "demo_2"]
    assert len(found.held_out) == 0


@pytest.mark.parametrize(
    ("env_args", "said"),
    [
        (None, {}),
        ("{oops", {}),
        (b"\xff\xfe", {}),
        ("[" * 100_000, {}),
        ([], {}),
        ({"env_name": 5, "type": "Gym", "env_kwargs": None}, {"env_name": 5, "env_type": "Gym"}),
        ({"env_name": "Lift", "env_kwargs": {"control_freq": float("nan")}}, {"env_name": "Lift"}),
        (json.dumps(SETTINGS).encode(), {"env_name": "Lift", "env_type": 1, "rate_hz": 20}),
    ],
)
def test_what_a_file_says_of_its_environment_is_taken_where_it_can_be_read(tmp_path, env_args, said):
    found = read(write(tmp_path / "demos.hdf5", env_args=env_args))
    assert found.metadata == {"format": "robomimic", "total": 9, **said}


# Damaged files


def change(key, values=None, **options):
    """Replace an array of demo_1, or remove it."""

    def damage(file):
        del file[f"data/demo_1/{key}"]
        if values is not None:
            file.create_dataset(f"data/demo_1/{key}", data=values, **options)

    return damage


def put(key, index, value):
    def damage(file):
        file[f"data/demo_1/{key}"][index] = value

    return damage


def link(kind, *arguments):
    def damage(file):
        del file["data/demo_1/obs/eef"]
        file["data/demo_1/obs/eef"] = kind(*arguments)

    return damage


def external_link(file):
    other = Path(file.filename).with_name("other.hdf5")
    with h5py.File(other, "w") as target:
        target["secret"] = np.zeros((1, 3))
    link(h5py.ExternalLink, str(other), "/secret")(file)


def virtual(file):
    del file["data/demo_1/obs/eef"]
    layout = h5py.VirtualLayout((1, 3), "f4")
    layout[...] = h5py.VirtualSource(file.filename, "data/demo_0/obs/eef", (3, 3))[:1]
    file.create_virtual_dataset("data/demo_1/obs/eef", layout)


def external_storage(file):
    raw = Path(file.filename).with_name("raw.bin")
    raw.write_bytes(bytes(12))
    del file["data/demo_1/obs/eef"]
    file.create_dataset("data/demo_1/obs/eef", (1, 3), "f4", external=[(str(raw), 0, 12)])


def huge(file):
    del file["data/demo_1/obs/eef"]
    file.create_dataset("data/demo_1/obs/eef", (2**40, 3), "f4", chunks=(1024, 3), compression="gzip")


def no_transitions(file):
    for key, values in demo(1, 0).items():
        change(key, values)(file)
    file["data/demo_1"].attrs["num_samples"] = 0


BAD_EPISODES = {
    "missing key": (change("obs/eef"), "there is no 'data/demo_1/obs/eef'"),
    "missing observations": (change("obs"), "there is no 'data/demo_1/obs/eef'"),
    "missing actions": (change("actions"), "there is no 'data/demo_1/actions'"),
    "text": (change("obs/eef", [b"a"]), "'data/demo_1/obs/eef' must hold numbers; it holds text"),
    "objects": (change("obs/eef", ["a"], dtype=h5py.string_dtype()), "'data/demo_1/obs/eef' must hold numbers"),
    "complex": (
        change("actions", np.zeros((1, 2), complex)),
        "'data/demo_1/actions' must hold numbers; it holds complex",
    ),
    "one number": (change("obs/eef", 1.0), "'data/demo_1/obs/eef' is not an array"),
    "nothing": (change("obs/eef", h5py.Empty("f4")), "'data/demo_1/obs/eef' is not an array"),
    "nan": (put("obs/eef", (0, 2), np.nan), "'eef' holds a NaN or infinity at transition 0"),
    "infinity": (put("actions", (0, 1), -np.inf), "'actions' holds a NaN or infinity at transition 0"),
    "no transitions": (no_transitions, "no transitions"),
    "lengths": (change("obs/eef", np.zeros((2, 3))), "lengths disagree: 'eef' has 2"),
    "num_samples": (
        lambda f: f["data/demo_1"].attrs.modify("num_samples", 7),
        "'num_samples' says 7, but 'actions' has 1",
    ),
    "another width": (change("obs/eef", np.zeros((1, 4))), r"'eef' has shape \(4,\)"),
    "another picture": (change("obs/image", np.zeros((1, 6, 9, 3), "u1")), r"'image' has shape \(6, 9, 3\)"),
    "channels first": (change("obs/image", np.zeros((1, 3, 6, 8), "f4")), r"'image' has shape \(3, 6, 8\)"),
    "external link": (external_link, "'data/demo_1/obs/eef' is a link that may leave the file"),
    "dangling link": (link(h5py.ExternalLink, "nowhere.hdf5", "/x"), "'data/demo_1/obs/eef' is a link that may leave"),
    "soft link": (link(h5py.SoftLink, "/data/demo_0/obs/eef"), "'data/demo_1/obs/eef' is a link that may leave"),
    "virtual": (virtual, "'data/demo_1/obs/eef' is stored in other files"),
    "external storage": (external_storage, "'data/demo_1/obs/eef' is stored in other files"),
    "huge": (huge, "'data/demo_1/obs/eef' should have 13194139533312 bytes, but 0 are stored"),
}


@pytest.mark.parametrize("damage", BAD_EPISODES)
def test_a_bad_episode_is_named_and_can_be_left_out(path, damage):
    make, said = BAD_EPISODES[damage]
    with h5py.File(path, "a") as file:
        make(file)
    with pytest.raises(ValueError, match=f"episode demo_1: .*{said}") as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match="left out; the first one is demo_1: "):
        found = read(path, on_bad_episode="skip")
    assert found.episode_names == ["demo_0", "demo_2"]
    np.testing.assert_array_equal(found.observations["eef"], joined("obs/eef", (0, 2)))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_demo_that_lacks_a_key_is_bad_wherever_it_stands(path, missing):
    with h5py.File(path, "a") as file:
        del file[f"data/demo_{missing}/obs/eef"]
    with pytest.warns(UserWarning, match=f"demo_{missing}: there is no"):
        found = read(path, on_bad_episode="skip")
    assert "eef" in found.observations
    assert found.num_episodes == 2


def test_groups_in_groups_without_end_do_no_harm(path):
    with h5py.File(path, "a") as file:
        file["data/demo_1/obs/again"] = file["data/demo_1/obs"]
        file["mask/one"] = np.array(["demo_1"], "S")
    assert read(path).num_episodes == 3  # the other demos determine the observed keys
    with pytest.raises(ValueError, match="'data/demo_1' holds groups in groups without end"):
        read(path, subset="one")


def whole(content):
    """Replace the file's bytes."""
    return lambda path: path.write_bytes(content(path.read_bytes()))


def inside(edit):
    def damage(path):
        with h5py.File(path, "a") as file:
            edit(file)

    return damage


def masks(**demos):
    return inside(lambda file: [file.__setitem__(f"mask/{k}", np.array(d, "S")) for k, d in demos.items()])


BAD_FILES = {
    "missing": (Path.unlink, "no dataset at"),
    "truncated": (whole(lambda content: content[: len(content) // 2]), "demos.hdf5 is not a readable HDF5 file"),
    "empty": (whole(lambda content: b""), "demos.hdf5 is not a readable HDF5 file"),
    "a zip": (whole(lambda content: b"PK\x03\x04" + content), "demos.hdf5 is not a readable HDF5 file"),
    "no data": (inside(lambda file: file.__delitem__("data")), "it holds nothing under 'data'"),
    "data is an array": (inside(lambda f: (f.__delitem__("data"), f.__setitem__("data", [1]))), "nothing under 'data'"),
    "data is elsewhere": (
        inside(lambda f: (f.__delitem__("data"), f.__setitem__("data", h5py.ExternalLink("other.hdf5", "/data")))),
        "'data' is a link that may leave the file",
    ),
    "something else": (
        inside(lambda file: file.create_group("data/episode_1")),
        "'data' holds 'episode_1', which is no",
    ),
    "no observations": (
        inside(lambda file: [file.__delitem__(f"data/demo_{number}/obs") for number in range(3)]),
        "no demo has observations under 'obs': extract them with robomimic's dataset_states_to_obs",
    ),
    "unknown demo": (
        masks(train=["demo_0"], valid=["demo_7"]),
        "'mask/valid' lists 'demo_7', but there is no such demo",
    ),
    "repeated demo": (masks(train=["demo_0", "demo_0"], valid=["demo_1"]), "'mask/train' lists 'demo_0' twice"),
    "in both masks": (
        masks(train=["demo_0", "demo_1"], valid=["demo_1"]),
        "demo_1 is in 'mask/train' and in 'mask/valid'",
    ),
    "numbers in a mask": (
        inside(lambda f: (f.__setitem__("mask/train", [0, 2]), f.__setitem__("mask/valid", [1]))),
        "'mask/train' must be a list of texts; it holds int",
    ),
}


@pytest.mark.parametrize("damage", BAD_FILES)
def test_a_damaged_file_is_one_clear_error_that_names_it(path, damage):
    make, said = BAD_FILES[damage]
    make(path)
    with pytest.raises(ValueError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"observation_keys": ["eff"]}, r"unknown observation key 'eff' \(did you mean 'eef'\?\); allowed: eef, image"),
        ({"action_key": "action"}, r"unknown action key 'action' \(did you mean 'actions'\?\)"),
        ({"subset": "trian"}, r"unknown subset 'trian' \(did you mean 'train'\?\); allowed: train"),
    ],
)
def test_what_a_file_does_not_have_is_refused(tmp_path, request_, said):
    path = write(tmp_path / "demos.hdf5", masks={"train": ["demo_0"]})
    with pytest.raises(ValueError, match=said) as error:
        read(path, **request_)
    assert str(path) in str(error.value)


def test_a_subset_of_a_file_without_masks_is_refused(path):
    with pytest.raises(ValueError, match="unknown subset 'train'; allowed: none"):
        read(path, subset="train")


def test_a_folder_is_refused_with_the_files_in_it(path):
    with pytest.raises(ValueError, match=r"set dataset.path to a robomimic file, not a folder; in it: demos\.hdf5"):
        read(path.parent)


def test_zeros_over_a_heap_are_found_before_hdf5_runs_in_circles(path):
    content = bytearray(path.read_bytes())
    start = content.index(b"GCOL") + 16  # of the text env_args
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"demos\.hdf5 is damaged \(a part of it was overwritten\)"):
        read(path)


# The file has no heap: there, one flip in some tens of thousands crashes HDF5 itself.
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "demos.hdf5", (3, 2), env_args=np.bytes_(b"{}"))


@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bytes_give_an_error_or_demonstrations(small, flips):
    whole = small.read_bytes()
    damaged = bytearray(whole)
    for place, byte in flips:
        damaged[int(place * len(damaged))] = byte
    small.write_bytes(damaged)
    try:
        found = read(small, on_bad_episode="skip")
    except ValueError:
        return
    finally:
        small.write_bytes(whole)
    shapes = {"eef": (3,), "image": (6, 8, 3), "nested/joint/pos": (2,)}
    assert all(shapes.get(key, shape) == shape for key, shape in found.observation_shapes.items())
    assert set(found.episode_lengths.tolist()) <= {3, 2}
    assert found.actions.shape[1] == 2
    assert np.isfinite(found.actions).all()
