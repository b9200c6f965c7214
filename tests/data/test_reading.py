"""The code that all formats share: the files of a dataset, the check of each episode, the cache, and reading."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from policy.common import building
from policy.common.registry import Registry
from policy.data import reading
from policy.data.cache import open_cached
from policy.data.episode import Episode, EpisodeChecker, Request, as_images
from policy.data.files import fingerprint, list_files
from policy.data.formats import Format
from policy.data.reading import read_demonstrations

# The files of a dataset


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set" / "meta").mkdir(parents=True)
    (tmp_path / "set" / "meta" / "info.json").write_text("{}")
    (tmp_path / "set" / "a.bin").write_bytes(b"abc")
    return tmp_path / "set"


def test_files_are_listed_by_their_path_in_the_folder(folder):
    files = list_files(folder)
    assert list(files) == ["a.bin", "meta/info.json"]
    assert files["meta/info.json"].read_text() == "{}"
    assert list_files(folder / "a.bin") == {"a.bin": folder / "a.bin"}


def test_a_relative_path_and_a_link_to_the_dataset_are_followed(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert list(list_files(Path("set"))) == ["a.bin", "meta/info.json"]
    Path("link").symlink_to("set")
    assert list(list_files(Path("link"))) == ["a.bin", "meta/info.json"]


@pytest.mark.parametrize(
    "path",
    ["nothing", "empty", "pipe", "circle"],
    ids=["nothing there", "an empty folder", "a pipe", "a circular link"],
)
def test_a_path_without_files_is_one_sentence(tmp_path, path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(
        ValueError, match=rf"no dataset at .*{path}: set dataset.path|circle cannot be read: .* symbolic links"
    ):
        list_files(tmp_path / path)


@pytest.mark.parametrize("target", ["/etc/passwd", "/etc", "../other", "../../nothing/there", "../set-2"])
def test_links_that_leave_the_folder_are_refused(folder, target):
    (folder.parent / "other").mkdir()
    (folder / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"set: link is a link that leaves the folder; .*cp -rL"):
        list_files(folder)


def test_links_within_the_folder_pipes_and_circles(folder):
    (folder / "link").symlink_to("a.bin")
    (folder / "dangling").symlink_to("gone")
    (folder / "circle").symlink_to("circle")
    (folder / "up").symlink_to(".")
    os.mkfifo(folder / "pipe")
    assert list(list_files(folder)) == ["a.bin", "link", "meta/info.json"]


def test_a_file_without_permission_is_one_sentence(folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "info.json" and access(path, mode))
    with pytest.raises(ValueError, match=r"meta/info.json cannot be read: ask its owner"):
        list_files(folder)


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "meta":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"set cannot be read: .*Permission denied: .*meta"):
        list_files(folder)


def test_a_fingerprint_changes_with_files_and_settings(folder):
    def now(**changes):
        return fingerprint(list_files(folder), {"format": "zarr", "path": str(folder), **changes})

    seen = [now()]
    assert now() == seen[0]
    assert len(seen[0]) == 16
    seen.append(now(format="minari"))
    seen.append(now(image_size=3))
    os.utime(folder / "a.bin", ns=(0, 5))
    seen.append(now())
    (folder / "a.bin").write_bytes(b"abcd")
    os.utime(folder / "a.bin", ns=(0, 5))
    seen.append(now())
    (folder / "a.bin").rename(folder / "b.bin")
    seen.append(now())
    (folder / "new").touch()
    seen.append(now())
    assert len(set(seen)) == len(seen)


# The user's request


@pytest.mark.parametrize(
    ("keys", "prefix", "expected"),
    [
        (None, "", {"state": "state"}),
        (["obs.pose", "image"], "", {"obs/pose": "obs.pose", "image": "image"}),
        (["pose"], "obs.", {"pose": "obs.pose"}),
        (["obs.pose"], "obs.", {"pose": "obs.pose"}),
        ({"where": "obs.pose"}, "", {"where": "obs.pose"}),
        ({"x.y": "pose"}, "obs.", {"x.y": "obs.pose"}),
        ({"obs.pose": "obs/pose"}, "", {"obs.pose": "obs.pose"}),  # the policy's name of it, as an error gives it
        (["obs/pose"], "", {"obs/pose": "obs.pose"}),
    ],
)
def test_keys_of_the_file_become_keys_of_the_policy(keys, prefix, expected):
    available = ["state", "image", "obs.pose", "action"]
    assert Request(observation_keys=keys).observations(available, ["state"], prefix) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a.b", "a.b"], "must not repeat a key"),
        ([], "there is no observation to train on"),
        ({}, "there is no observation to train on"),
        (["stat"], r"unknown observation key 'stat' \(did you mean 'state'\?\); allowed: a.b, a/b, o.state, state"),
        (["a.b", "a/b"], "'a/b' and 'a.b' would both be called 'a/b'"),
        (["state", "o.state"], "'o.state' and 'state' would both be called 'state'"),
    ],
)
def test_keys_that_cannot_be_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Request(observation_keys=keys).observations(["state", "o.state", "a.b", "a/b"], ["state"], prefix="o.")


def test_the_action_key_is_the_formats_own_or_the_users():
    assert Request().action(["action", "other"], "action") == "action"
    assert Request(action_key="other").action(["action", "other"], "action") == "other"
    with pytest.raises(ValueError, match=r"unknown action key 'othr' \(did you mean 'other'\?\)"):
        Request(action_key="othr").action(["action", "other"], "action")


# The check of each episode

KINDS = ["f2", "f4", "f8", ">f4", "i1", "i8", "u8", "?", "c8", "U3", "O", "M8[s]"]


@st.composite
def columns(draw):
    length = draw(st.sampled_from([2, 2, 2, 2, 2, 0, 3]))
    dtype = np.dtype(draw(st.sampled_from(KINDS)))
    shape = (length, *draw(st.lists(st.integers(0, 3).map(lambda n: n or 1), min_size=0, max_size=2)))
    if draw(st.integers(0, 20)) == 0:
        shape = (length, 0)
    if dtype.kind not in "biuf":
        return np.zeros(shape, dtype)
    return draw(hnp.arrays(dtype, shape))


@settings(deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(["state", "goal"]), columns(), min_size=1), columns())
def test_the_checker_accepts_exactly_finite_numeric_consistent_episodes(observations, actions):
    arrays = {**observations, "actions": actions}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            key: a.reshape(len(a), -1).astype("f4") for key, a in arrays.items() if a.dtype.kind in "biuf" and a.size
        }
    good = (
        len(expected) == len(arrays)
        and len({len(a) for a in arrays.values()}) == 1
        and all(np.isfinite(a).all() for a in expected.values())
    )
    checker = EpisodeChecker()
    episode = Episode(observations=observations, actions=actions)
    if not good:
        with pytest.raises(ValueError, match=r"'(state|goal|actions)'|no transitions"):
            checker.check(episode)
        assert checker.shapes == {}  # a bad episode does not determine the shapes of the others
        return
    checked = checker.check(episode)
    for key, values in {**checked.observations, "actions": checked.actions}.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[key])
    checker.check(episode)  # an episode of the same shapes is good again


@settings(deadline=None, derandomize=True, database=None)
@given(
    hnp.arrays(
        st.sampled_from([np.dtype(kind) for kind in ("u1", "i2", "f4", "f8", "?")]),
        st.tuples(st.just(2), st.just(1), st.integers(1, 2), st.integers(1, 4)),
    )
    | hnp.arrays("f4", (2, 2, 2, 3), elements=st.sampled_from([0, 1, 255, 255.5, 256, -1, np.nan, np.inf, 7, 8, 9]))
    | hnp.arrays("i8", (2, 2, 1, 1), elements=st.integers(-2, 258))
)
def test_pictures_are_accepted_exactly_if_they_are_bytes(pictures):
    good = pictures.shape[-1] != 2 and all(value in range(256) for value in pictures.ravel().tolist())
    if good:
        pixels = as_images("image", pictures)
        assert pixels.dtype == np.uint8
        assert pixels.tolist() == pictures.astype(int).tolist()
    else:
        with pytest.raises(ValueError, match=r"'image' (has shape|holds)"):
            as_images("image", pictures)


def episode(length=3, start=0, **observations):
    values = np.arange(start, start + length, dtype=np.float32)
    observations = observations or {"state": np.stack([values, -values], axis=1)}
    return Episode(observations=observations, actions=values[:, None] + 0.5)


def broken(values, *where):
    values = np.array(values)
    values[where[:-1]] = where[-1]
    return values


BAD = {
    "NaN": (episode(state=broken(np.ones((3, 2)), 1, 0, np.nan)), "'state' holds a NaN or infinity at transition 1"),
    "infinity": (
        episode(state=broken(np.ones((3, 2)), 2, 1, -np.inf)),
        "'state' holds a NaN or infinity at transition 2",
    ),
    "large": (
        episode(state=broken(np.ones((3, 2)), 2, 0, 1e39)),
        "'state' holds a value too large for float32 at transition 2",
    ),
    "lengths": (episode(state=np.ones((2, 2))), "lengths disagree: 'state' has 2, 'actions' has 3"),
    "none": (episode(0), "it has no transitions"),
    "text": (episode(state=np.full((3, 2), "a")), "'state' must hold numbers; it holds <U1"),
    "scalar": (episode(state=np.float32(1)), r"'state' must hold numbers; it holds float32 of shape \(\)"),
    "ragged": (episode(state=[[1.0], [2.0, 3.0], [4.0]]), "inhomogeneous"),
    "no width": (episode(state=np.ones((3, 0))), r"'state' is empty: one of its rows has shape \(0,\)"),
    "no height": (episode(state=np.ones((3, 0, 2, 3))), r"'state' is empty: one of its rows has shape \(0, 2, 3\)"),
    "other width": (episode(state=np.ones((3, 1))), r"'state' has shape \(1,\), episodes before it have \(2,\)"),
    "other key": (episode(goal=np.ones((3, 2))), r"'goal' has shape \(2,\), episodes before it have None"),
    "more keys": (episode(state=np.ones((3, 2)), goal=np.ones((3, 2))), "'goal' has shape"),
    "called actions": (episode(actions=np.ones((3, 2))), "an observation cannot be called 'actions'"),
    "channels": (episode(state=np.ones((3, 4, 4, 2))), r"'state' has shape \(4, 4, 2\); pictures must be"),
    "fractions": (
        episode(state=broken(np.ones((3, 4, 4, 3)), 2, 0.5)),
        r"'state' holds pictures of float64 within 0.5 to 0.5 at transition 2; pixels must be whole numbers",
    ),
    "NaN pixel": (
        episode(state=broken(np.ones((3, 4, 4, 3)), 1, 2, np.nan)),
        "'state' holds a NaN or infinity at transition 1",
    ),
}


# Reading as a whole


class Memory:
    """A reader of episodes in memory; an exception in place of an episode is raised."""

    def __init__(self, episodes):
        self.held_out = ["last"]
        self.metadata = {"format": "memory", "rate_hz": 10}
        self.episodes = dict(episodes)
        self.names = [name for name, _ in episodes]
        self.closed = False

    def read(self, name):
        found = self.episodes[name]
        if isinstance(found, BaseException):
            raise found
        return found() if callable(found) else found

    def close(self):
        self.closed = True


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Reads the given episodes as a dataset; `opened` lists the readers."""

    def read(*episodes, **request):
        def open_memory(path, files, request):
            read.opened.append(Memory(episodes))
            return read.opened[-1]

        formats = Registry("format", {}, Format)
        formats.register("memory", Format(open=open_memory))
        monkeypatch.setattr(reading, "FORMATS", formats)
        return read_demonstrations(format="memory", path=read.path, cache_dir=read.cache, **request)

    read.opened = []
    read.path, read.cache = tmp_path / "set.mem", tmp_path / "deep" / "cache"
    read.path.touch()
    return read


GOOD = (("first", episode(3)), ("second", episode(1, 3)), ("last", episode(2, 4)))


def assert_good(found):
    values = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(found.observations["state"], np.stack([values, -values], axis=1))
    np.testing.assert_array_equal(found.actions, values[:, None] + 0.5)
    assert found.episode_ends.tolist() == [3, 4, 6]
    assert list(found.episode_names) == ["first", "second", "last"]
    assert list(found.held_out) == [2]
    assert found.metadata == {"format": "memory", "rate_hz": 10}
    assert found.skipped == {}


def test_episodes_are_laid_end_to_end_and_found_again(dataset):
    for _ in range(2):
        found = dataset(*GOOD)
        assert_good(found)
        assert found.source == str(dataset.path)
        assert not found.actions.flags.writeable
    assert [reader.closed for reader in dataset.opened] == [True]  # the second time, the cache was enough
    os.utime(dataset.path, ns=(0, 5))
    assert_good(dataset(*GOOD))
    assert len(dataset.opened) == 2


def test_pictures_vectors_and_other_orders(dataset):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    cube = np.arange(24.0).reshape(3, 2, 4)[:, :, ::2]  # neither contiguous nor a picture
    one = episode(image=pictures, cube=cube)
    other = Episode(observations={"cube": cube.astype(int), "image": pictures.astype(float)}, actions=np.ones((3, 1)))
    found = dataset(("a", one), ("b", other))
    np.testing.assert_array_equal(found.observations["image"], np.concatenate([pictures, pictures]))
    np.testing.assert_array_equal(found.observations["cube"], np.concatenate([cube, cube]).reshape(6, 4))


@pytest.mark.parametrize("label", BAD)
def test_a_bad_episode_is_refused_or_left_out(dataset, label):
    bad, message = BAD[label]
    episodes = (GOOD[0], ("bad", bad), *GOOD[1:])
    with pytest.raises(ValueError, match=rf"set.mem: episode bad: .*{message}.*dataset.on_bad_episode=skip"):
        dataset(*episodes)
    assert not list(dataset.cache.iterdir())
    for _ in range(2):  # also from the cache
        with pytest.warns(
            UserWarning, match=f"1 of 4 episodes are bad and left out; the first one is bad: .*{message}"
        ):
            found = dataset(*episodes, on_bad_episode="skip")
        assert list(found.skipped) == ["bad"]
        found.skipped.clear()
        assert_good(found)


@pytest.mark.parametrize("error", [ValueError("its video ends early"), OSError(5, "Input/output error")])
def test_what_a_reader_raises_names_dataset_and_episode(dataset, error):
    with pytest.raises(ValueError, match=r"set.mem: episode second: .*(ends early|Input/output error)"):
        dataset(GOOD[0], ("second", error), GOOD[2])
    with pytest.warns(UserWarning, match="1 of 3 episodes are bad and left out; the first one is second"):
        found = dataset(GOOD[0], ("second", error), GOOD[2], on_bad_episode="skip")
    assert found.episode_ends.tolist() == [3, 5]
    assert list(found.held_out) == [1]


def test_what_was_skipped_once_is_no_good_dataset_later(dataset):
    episodes = (GOOD[0], ("bad", episode(0)), *GOOD[1:])
    with pytest.warns(UserWarning, match="1 of 4 episodes are bad"):
        dataset(*episodes, on_bad_episode="skip")
    with pytest.raises(ValueError, match=r"set.mem: episode bad: it has no transitions"):
        dataset(*episodes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in ("error", "skip"):
            assert_good(dataset(*GOOD, on_bad_episode=mode, max_episodes=3))


def test_only_bad_episodes_are_no_dataset(dataset):
    with pytest.raises(ValueError, match=r"holds no usable episode \(2 bad ones: it has no transitions\)"):
        dataset(("a", episode(0)), ("b", episode(0)), on_bad_episode="skip")
    with pytest.raises(ValueError, match=r"holds no usable episode \(0 bad ones\)"):
        dataset()


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_two_episodes_of_one_name_are_refused(dataset, mode):
    with pytest.raises(ValueError, match=r"set.mem names two episodes 'first'"):
        dataset(*GOOD, ("first", episode(2)), on_bad_episode=mode)


def test_max_episodes_takes_the_first_good_ones(dataset):
    episodes = (GOOD[0], ("bad", episode(0)), *GOOD[1:])
    with pytest.warns(UserWarning, match="1 of 3 episodes are bad and left out"):
        found = dataset(*episodes, on_bad_episode="skip", max_episodes=2)
    assert list(found.episode_names) == ["first", "second"]
    assert dataset(*episodes, max_episodes=1).episode_ends.tolist() == [3]
    with pytest.raises(ValueError, match=r"has 3 episodes; dataset.max_episodes asks for 4"):
        dataset(*GOOD, max_episodes=4)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"on_bad_episode": "skp"}, r"unknown dataset.on_bad_episode 'skp' \(did you mean 'skip'\?\)"),
        ({"max_episodes": 0}, "dataset.max_episodes must be 1 or more; got 0"),
        ({"image_size": 0}, "dataset.image_size must be 1 or more; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(dataset, request_, message):
    with pytest.raises(ValueError, match=message):
        dataset(*GOOD, **request_)
    assert not dataset.opened


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"unknown format of demonstrations 'zar' \(did you mean 'zarr'\?\).*plugins="):
        read_demonstrations(format="zar", path=tmp_path)


def test_a_format_of_ones_own_is_read_by_its_name_and_can_have_names_for_its_datasets(tmp_path, monkeypatch):
    formats = Registry("format", {}, Format)
    monkeypatch.setattr(reading, "FORMATS", formats)
    (tmp_path / "set.mem").touch()
    asked = []

    def open_memory(path, files, request):
        asked.append((path, list(files), request.subset))
        return Memory(GOOD)

    formats.register("memory", Format(open=open_memory, find=lambda name: tmp_path / f"{name}.mem"))
    assert_good(read_demonstrations(format="memory", path="set", subset="some", cache_dir=tmp_path / "cache"))
    assert asked == [(tmp_path / "set.mem", ["set.mem"], "some")]


HEAVY = ("torch", "minari", "gymnasium", "h5py", "pyarrow", "zarr", "av", "PIL", "scipy", "pandas")


def test_only_the_format_that_is_read_is_imported():
    heavy = f"print(*(name for name in {HEAVY} if name in sys.modules), sep=',')"
    statements = [
        "import sys, policy.data.demonstrations, policy.data.minari_writer, policy.data.reading, policy.data.windows",
        heavy,
        "policy.data.reading.FORMATS['robomimic']",
        heavy,
    ]
    done = subprocess.run([sys.executable, "-c", ";".join(statements)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["", "h5py"]


# The cache


def edited(change):
    def damage(entry):
        content = json.loads((entry / "index.json").read_text())
        change(content["index"])
        (entry / "index.json").write_text(json.dumps(content))

    return damage


def shorten(file):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "no index": lambda entry: (entry / "index.json").unlink(),
    "short index": lambda entry: shorten(entry / "index.json"),
    "empty index": lambda entry: (entry / "index.json").write_text(""),
    "no text": lambda entry: (entry / "index.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda entry: (entry / "index.json").write_text("[1]"),
    "a number": lambda entry: (entry / "index.json").write_text("1"),
    "deep": lambda entry: (entry / "index.json").write_text("[" * 100_000),
    "an older kind": lambda entry: (entry / "index.json").write_text('{"columns": {}}'),
    "no array": lambda entry: (entry / "0.bin").unlink(),
    "short array": lambda entry: shorten(entry / "1.bin"),
    "long array": lambda entry: (entry / "1.bin").write_bytes((entry / "1.bin").read_bytes() + b"\0"),
    "a folder": lambda entry: ((entry / "0.bin").unlink(), (entry / "0.bin").mkdir()),
    "other lengths": edited(lambda index: index.update(lengths=[2, 2, 2])),
    "other dtype": edited(lambda index: index["columns"][0].update(dtype="<i4")),
    "objects": edited(lambda index: index["columns"][0].update(dtype="|O")),
    "other shape": edited(lambda index: index["columns"][0].update(shape=[3, 4])),
    "another file": edited(lambda index: index["columns"][0].update(file="../0.bin", key="../0.bin")),
    "other names": edited(lambda index: index["episode_names"].reverse()),
    "an empty folder": lambda entry: (shutil.rmtree(entry), entry.mkdir()),
}


@pytest.mark.parametrize("label", DAMAGES)
def test_a_damaged_entry_is_built_again(dataset, label):
    dataset(*GOOD)
    (entry,) = dataset.cache.iterdir()
    DAMAGES[label](entry)
    assert open_cached(entry, "", {}) is None
    assert_good(dataset(*GOOD))
    assert len(dataset.opened) == 2
    assert list(dataset.cache.iterdir()) == [entry]


def test_an_interrupted_conversion_leaves_nothing(dataset):
    with pytest.raises(KeyboardInterrupt):
        dataset(GOOD[0], ("second", KeyboardInterrupt()))
    assert not list(dataset.cache.iterdir())
    assert dataset.opened[0].closed
    assert_good(dataset(*GOOD))


def test_two_conversions_at_once_give_one_entry(dataset):
    several = 4
    barrier = Barrier(several, timeout=60)

    def second():
        barrier.wait()
        return GOOD[1][1]

    for mtime in range(5):
        os.utime(dataset.path, ns=(0, mtime))  # a new fingerprint
        with ThreadPoolExecutor(several) as pool:
            running = [pool.submit(dataset, GOOD[0], ("second", second), GOOD[2]) for _ in range(several)]
            for one in running:
                assert_good(one.result())
        assert len(list(dataset.cache.iterdir())) == mtime + 1
    assert len(dataset.opened) == 5 * several


def test_a_slower_conversion_keeps_the_entry_of_the_faster(dataset):
    files = []

    def faster():
        found = dataset(*GOOD)
        files.extend(entry.stat().st_ino for entry in sorted(dataset.cache.glob("set.mem-*/*")))
        assert_good(found)
        return GOOD[1][1]

    assert_good(dataset(GOOD[0], ("second", faster), GOOD[2]))
    assert len(files) == 3
    assert files == [entry.stat().st_ino for entry in sorted(dataset.cache.glob("*/*"))]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("length", [2, 100_000])  # noticed when closing, or when writing
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_full_disk_is_one_sentence(dataset, monkeypatch, length, mode):
    real = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, *args, **how: real(Path("/dev/full") if path.suffix == ".bin" else path, *args, **how),
    )
    with pytest.raises(ValueError, match=r"the disk is full: .*set.mem does not fit into .*; set dataset.cache_dir"):
        dataset(("a", episode(length)), on_bad_episode=mode)
    assert not list(dataset.cache.iterdir())


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_cannot_be_written_to_is_one_sentence(dataset, tmp_path, below):
    (tmp_path / "file").touch()
    dataset.cache = tmp_path / "file" / below
    with pytest.raises(ValueError, match=r"cannot write into .*: set dataset.cache_dir to a folder you may write to"):
        dataset(*GOOD)
    assert dataset.opened[0].closed


def test_what_killed_conversions_left_is_removed_and_what_is_alive_stays(dataset):
    """Whatever their times say: a clock may jump."""
    for name in ("killed", "alive"):
        leftover = dataset.cache / f".building-{name}"
        leftover.mkdir(parents=True)
        (leftover / "0.bin").touch()
        os.utime(leftover, (0, 0))
    (dataset.cache / "old-data").mkdir()
    with building.locked(dataset.cache / ".building-alive"):
        dataset(*GOOD)
    left = {entry.name for entry in dataset.cache.iterdir() if not entry.name.startswith("set.mem-")}
    assert left == {".building-alive", "old-data"}


def test_a_dataset_is_named_as_it_was_given_this_time(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset.path = Path("set.mem")
    assert dataset(*GOOD).source == "set.mem"
    dataset.path = tmp_path / "set.mem"
    assert dataset(*GOOD).source == str(dataset.path)
    assert len(dataset.opened) == 1  # it was not read again


def test_every_changed_byte_of_the_cache_is_noticed(dataset):
    dataset(*GOOD)
    (entry,) = dataset.cache.iterdir()
    for file in sorted(entry.glob("*.bin")):
        for place in range(file.stat().st_size):
            changed = bytearray(file.read_bytes())
            changed[place] ^= 4
            whole = file.read_bytes()
            file.write_bytes(changed)
            assert open_cached(entry, "", {}) is None
            file.write_bytes(whole)
    assert_good(open_cached(entry, "", {}))
    file.write_bytes(changed)
    assert_good(dataset(*GOOD))  # converted again
    assert len(dataset.opened) == 2


def test_empty_observations_are_left_out_with_a_word(dataset):
    def beside(length):
        nothing = {"state": np.ones((length, 2)), "nothing": np.empty((length, 0))}
        return Episode(observations=nothing, actions=np.zeros((length, 1)))

    with pytest.warns(UserWarning, match=r"set.mem: 'nothing' has the shape \(0,\).* left out") as caught:
        assert list(dataset(("a", beside(3)), ("b", beside(2))).observations) == ["state"]
    assert len(caught) == 1
    with pytest.raises(ValueError, match="'nothing' is empty"):
        dataset(("a", beside(3)), observation_keys=["state", "nothing"])


# Transforms and sizes


def doubled(observations):
    return {"twice": 2 * observations["state"]}


def test_the_transform_maps_the_observations_of_an_episode(dataset):
    found = dataset(*GOOD, transform=doubled)
    assert found.observation_shapes == {"twice": (2,)}
    np.testing.assert_array_equal(found.observations["twice"][:, 0], 2 * np.arange(6))
    assert_good(dataset(*GOOD))  # not the entry that the transform left in the cache


def test_pictures_are_resized(dataset):
    picture = np.zeros((3, 4, 6, 3), np.uint8)
    picture[:, :2, :3] = 200
    grey = np.full((3, 4, 4, 1), 7, np.uint8)
    found = dataset(("a", episode(image=picture, grey=grey, state=np.ones((3, 2)))), image_size=2)
    assert found.observation_shapes == {"image": (2, 2, 3), "grey": (2, 2, 1), "state": (2,)}
    assert found.observations["image"].dtype == np.uint8
    top_left, others = found.observations["image"][:, 0, 0], found.observations["image"][:, 1, 1]
    assert (top_left > 120).all()
    assert (others < 80).all()
    assert (found.observations["grey"] == 7).all()


def swapped(observations, actions):
    return {"state": observations["state"] + 1}, actions[:, ::-1]


def test_an_episode_is_relabelled_before_it_is_transformed(dataset):
    plain = dataset(*GOOD)
    found = dataset(*GOOD, relabel=swapped, transform=doubled)
    np.testing.assert_array_equal(found.observations["twice"], 2 * (plain.observations["state"] + 1))
    np.testing.assert_array_equal(found.actions, plain.actions[:, ::-1])
    assert_good(dataset(*GOOD))  # not the entry of the relabelled episodes


def halves(observations, actions):
    """The episode itself, and its first half if it has one."""
    half = len(actions) // 2
    parts = [({"state": 10 * observations["state"][:half]}, actions[:half])] if half else []
    return [(observations, actions), *parts]


def test_a_relabelling_may_make_several_demonstrations_of_an_episode(dataset):
    for _ in range(2):  # converted, and from the cache
        found = dataset(*GOOD, relabel=halves, transform=doubled)
        assert list(found.episode_names) == ["first", "first, on the way 1", "second", "last", "last, on the way 1"]
        assert found.originals.tolist() == [0, 0, 2, 3, 3]
        assert found.episode_ends.tolist() == [3, 4, 5, 7, 8]
        assert found.observations["twice"][:, 0].tolist() == [0, 2, 4, 0, 6, 8, 10, 80]
        assert list(found.held_out) == [3]
    assert dataset(*GOOD, relabel=halves, max_episodes=2).originals.tolist() == [0, 0, 2]
    with pytest.raises(ValueError, match=r"has 3 episodes; dataset\.max_episodes asks for 4"):
        dataset(*GOOD, relabel=halves, max_episodes=4)
    assert dataset(*GOOD).originals.tolist() == [0, 1, 2]


def test_a_demonstration_on_the_way_is_checked_as_its_episode_is(dataset):
    def spoilt(observations, actions):
        return [(observations, actions), ({"state": np.full((1, 2), np.nan)}, actions[:1])]

    with pytest.raises(ValueError, match="episode first: 'state' holds a NaN or infinity at transition 0"):
        dataset(*GOOD, relabel=spoilt)
    with pytest.raises(ValueError, match=r"dataset\.relabel failed with ValueError: it must return one demonstration"):
        dataset(*GOOD, relabel=lambda observations, actions: [])


def test_a_relabelling_that_fails_is_named(dataset):
    with pytest.raises(ValueError, match=r"episode first: dataset\.relabel failed with TypeError"):
        dataset(*GOOD, relabel=missing_key)


def scaled(observations, by):
    return {"state": by * observations["state"]}


def test_a_transforms_settings_are_part_of_the_fingerprint(dataset):
    one, two = (dataset(*GOOD, transform=partial(scaled, by=by)) for by in (1, 2))
    np.testing.assert_array_equal(two.observations["state"], 2 * one.observations["state"])


def test_a_transform_that_fails_is_named(dataset):
    with pytest.raises(ValueError, match=r"episode first: dataset\.transform failed with KeyError: 'position'"):
        dataset(*GOOD, transform=missing_key)


def missing_key(observations):
    return {"state": observations["position"]}


def test_a_conversion_that_skipped_bad_episodes_is_found_again_and_refused_to_those_who_skip_none(dataset):
    episodes = (GOOD[0], ("bad", episode(0)), *GOOD[1:])
    with pytest.warns(
        UserWarning, match="1 of 4 episodes are bad and left out; the first one is bad: it has no transit"
    ):
        dataset(*episodes, on_bad_episode="skip")
    with pytest.raises(ValueError, match=r"episode bad: it has no transitions; repair it, or leave bad episodes out"):
        dataset(*episodes)


@pytest.mark.parametrize("asked", ["minari", "lerobot", "robomimic", "zarr"])
def test_another_format_is_recognised_by_its_files(asked, tmp_path):
    """The file of each format is the one that tests of that format read."""
    here = Path(__file__).parent
    (tmp_path / "set" / "meta" / "episode_ends").mkdir(parents=True)
    (tmp_path / "set" / "meta" / "episode_ends" / "0").touch()
    (tmp_path / "minari" / "data").mkdir(parents=True)
    (tmp_path / "minari" / "data" / "metadata.json").write_text("{}")
    places = {
        "lerobot": here / "lerobot_v30",
        "minari": tmp_path / "minari",
        "robomimic": here / "robomimic.hdf5",
        "zarr": tmp_path / "set",
    }
    for name, place in places.items():
        if name != asked:
            with pytest.raises(ValueError, match=rf"; its files look like those of dataset={name}$"):
                read_demonstrations(format=asked, path=place, cache_dir=tmp_path / "cache")
