"""The replay buffer's reader, against files that zarr wrote."""

import json
import pickle
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy.data.formats import zarr_replay
from policy.data.reading import read_demonstrations

ENDS = np.array([4, 5, 11], dtype=np.int64)
ZARR_FORMATS = (2, 3) if int(zarr.__version__.split(".")[0]) >= 3 else (2,)
needs_format_3 = pytest.mark.skipif(3 not in ZARR_FORMATS, reason="zarr 2 knows only format 2")
PUSHT = Path(__file__).parents[3] / "shared" / "data" / "pusht_cchi_v7_replay.zarr.zip"


def replay(dtype="float32"):
    generator = np.random.default_rng(1)
    return {
        "data/state": (10 * generator.normal(size=(11, 5))).astype(dtype),
        "data/action": (10 * generator.normal(size=(11, 2))).astype(dtype),
        "data/img": generator.integers(0, 255, (11, 4, 4, 3)).astype(np.uint8),
        "meta/episode_ends": ENDS,
    }


# zarr takes longer to write a store than it takes to copy it, so each content is written once.
WRITTEN = {}
FOLDER = tempfile.TemporaryDirectory(prefix="ddim-policy-zarr-")


def write_replay(path: Path, arrays, zarr_format=2, chunks=None, **options) -> Path:
    """Write arrays with zarr, each as one chunk unless `chunks` gives its shape by the array's name."""
    contents = [(name, values.dtype.str, values.shape, values.tobytes()) for name, values in arrays.items()]
    key = repr((path.suffix == ".zip", zarr_format, chunks, options, contents))
    if key not in WRITTEN:
        original = Path(FOLDER.name) / f"{len(WRITTEN)}{'.zip' if path.suffix == '.zip' else ''}"
        WRITTEN[key] = write_anew(original, arrays, zarr_format, chunks, **options)
    if path.suffix == ".zip":
        shutil.copyfile(WRITTEN[key], path)
    else:
        shutil.copytree(WRITTEN[key], path, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return path


def write_anew(path: Path, arrays, zarr_format, chunks, **options) -> Path:
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else str(path)
    root = zarr.open_group(store, mode="w", **({"zarr_format": zarr_format} if 3 in ZARR_FORMATS else {}))
    for name, values in arrays.items():
        how = {
            "shape": values.shape,
            "chunks": (chunks or {}).get(name, tuple(max(1, n) for n in values.shape)),
            "dtype": values.dtype,
        }
        if 3 in ZARR_FORMATS:
            root.create_array(name, **how, **options)[...] = values
        else:
            root.create_dataset(name, **how, **options)[...] = values
    if path.suffix == ".zip":
        store.close()
    return path


def read(path: Path, **request):
    cache = path.parent / "cache"
    return read_demonstrations(format="zarr", path=path, cache_dir=cache, **{"max_bytes": 8 * 2**30, **request})


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("name", ["replay.zarr", "replay.zarr.zip"])
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4", "float16", "uint8", "int64", "bool"])
def test_a_replay_buffer_reads_back_exactly(tmp_path, name, zarr_format, dtype):
    arrays = replay(dtype)
    found = read(write_replay(tmp_path / name, arrays, zarr_format), observation_keys=["state", "img"])
    np.testing.assert_array_equal(found.observations["state"], arrays["data/state"].astype(np.float32))
    np.testing.assert_array_equal(found.observations["img"], arrays["data/img"])
    np.testing.assert_array_equal(found.actions, arrays["data/action"].astype(np.float32))
    np.testing.assert_array_equal(found.episode_ends, ENDS)
    assert found.observations["state"].dtype == found.actions.dtype == np.float32
    assert found.observations["img"].dtype == np.uint8
    assert found.episode_names == ["0", "1", "2"]
    assert found.source == str(tmp_path / name)


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("block_bytes", [1, 100, 10**6])
def test_chunks_and_blocks_may_cut_episodes_anywhere(tmp_path, monkeypatch, zarr_format, rows, block_bytes):
    monkeypatch.setattr(zarr_replay, "BLOCK_BYTES", block_bytes)
    arrays = replay()
    chunks = {"data/state": (rows, 2), "data/action": (rows + 1, 1), "meta/episode_ends": (1,)}
    found = read(write_replay(tmp_path / "r.zarr", arrays, zarr_format, chunks))
    np.testing.assert_array_equal(found.observations["state"], arrays["data/state"])
    np.testing.assert_array_equal(found.actions, arrays["data/action"])


def test_each_chunk_is_decoded_once(tmp_path, monkeypatch):
    decoded = []
    decode = zarr_replay._Rows._decode
    monkeypatch.setattr(zarr_replay, "BLOCK_BYTES", 1)
    monkeypatch.setattr(
        zarr_replay._Rows,
        "_decode",
        lambda rows, *which: (decoded.append((rows.name, *which)), decode(rows, *which))[1],
    )
    read(write_replay(tmp_path / "r.zarr", replay(), chunks={"data/state": (3, 5), "data/action": (11, 2)}))
    assert sorted(decoded) == [
        ("data/action", 0, 1),
        *(("data/state", first, first + 1) for first in range(4)),
        ("meta/episode_ends", 0, 1),
    ]


@needs_format_3
def test_sharded_arrays_are_read(tmp_path):
    arrays = replay()
    path = write_replay(tmp_path / "r.zarr", arrays, 3)
    del (group := zarr.open_group(str(path))["data"])["state"]
    group.create_array("state", shape=(11, 5), shards=(6, 5), chunks=(2, 5), dtype="f4")[...] = arrays["data/state"]
    np.testing.assert_array_equal(read(path).observations["state"], arrays["data/state"])
    (path / "data" / "state" / "c" / "1" / "0").unlink()
    with pytest.raises(ValueError, match=r"'data/state/c/1/0' is missing"):
        read(path)


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
def test_keys_may_be_nested(tmp_path, zarr_format):
    arrays = replay()
    arrays["data/obs/camera/img"] = arrays.pop("data/img")
    arrays["data/obs/pose"] = arrays.pop("data/state")
    path = write_replay(tmp_path / "r.zarr.zip", arrays, zarr_format)
    found = read(path, observation_keys={"pose": "obs/pose", "top.image": "obs/camera/img"})
    assert found.observation_shapes == {"pose": (5,), "top.image": (4, 4, 3)}
    with pytest.raises(ValueError, match=r"key 'obs/pos' \(did you mean .*allowed: action, obs/camera/img, obs/pose$"):
        read(path, observation_keys=["obs/pos"])


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("top", ["", "pusht_v7.zarr/", "downloads/pusht/pusht_v7.zarr/"])
def test_the_store_may_lie_within_a_zip_or_a_folder(tmp_path, top, zarr_format):
    arrays = replay()
    folder = write_replay(tmp_path / "outer" / top / "", arrays, zarr_format)
    with zipfile.ZipFile(tmp_path / "r.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in folder.rglob("*"):
            archive.write(entry, top + entry.relative_to(folder).as_posix())
        archive.writestr("__MACOSX/data/state/._.zarray", "junk")
    for path in (tmp_path / "r.zip", tmp_path / "outer"):
        np.testing.assert_array_equal(read(path).observations["state"], arrays["data/state"])


def test_the_caller_chooses_keys_and_episodes(tmp_path):
    arrays = replay()
    path = write_replay(tmp_path / "r.zarr", arrays)
    found = read(path, observation_keys=["img"], action_key="state", max_episodes=2)
    np.testing.assert_array_equal(found.observations["img"], arrays["data/img"][:5])
    np.testing.assert_array_equal(found.actions, arrays["data/state"][:5])
    assert found.episode_ends.tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"has 3 episodes; dataset.max_episodes asks for 4"):
        read(path, max_episodes=4)
    with pytest.raises(ValueError, match=r"names no subsets; got dataset.subset='train'"):
        read(path, subset="train")


# Missing chunks


@needs_format_3
@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
def test_what_zarr_leaves_out_because_it_is_zero_is_read_with_a_warning(tmp_path, zarr_format):
    arrays = replay()
    arrays["data/state"][:, 4] = 0  # a whole column of chunks
    arrays["data/action"][2:10] = 0  # the first and the last chunk of the gap hold other values too
    chunks = {"data/state": (4, 2), "data/action": (3, 2)}
    path = write_replay(tmp_path / "r.zarr", arrays, zarr_format, chunks)
    folder, separator = (path / "data" / "state", ".") if zarr_format == 2 else (path / "data" / "state" / "c", "/")
    assert (folder / f"0{separator}1").exists()
    assert not (folder / f"0{separator}2").exists()
    with pytest.warns(UserWarning, match=r"not every chunk of 'data/\S+' .* is stored; .* are read as 0") as caught:
        found = read(path)
    assert len(caught) == 2  # one per array
    np.testing.assert_array_equal(found.observations["state"], arrays["data/state"])
    np.testing.assert_array_equal(found.actions, arrays["data/action"])


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("array", ["data/pose", "data/action", "data/img", "meta/episode_ends"])
@pytest.mark.parametrize("lost", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}], ids=str)
def test_lost_chunks_are_refused_and_never_read_as_zero(tmp_path, monkeypatch, zarr_format, array, lost):
    arrays = {**replay(), "data/pose": 1 + replay()["data/state"], "meta/episode_ends": np.array([4, 5, 8, 11])}
    chunks = {name: (1 if name.startswith("meta") else 4, *values.shape[1:]) for name, values in arrays.items()}
    path = write_replay(tmp_path / "r.zarr", arrays, zarr_format, chunks)
    zeros = [0] * (arrays[array].ndim - 1)
    for row in lost:
        name = ".".join(map(str, [row, *zeros])) if zarr_format == 2 else "/".join(map(str, ["c", row, *zeros]))
        (path / array / name).unlink()
    if array == "data/pose" and len(lost) == 3 and zarr_format == 2:
        return  # nothing distinguishes it from a constant, see below
    message = rf"chunk '{array}/\S+' is missing|'{array}' is not whole: 0 of its"
    with pytest.raises(ValueError, match=message):
        read(path, observation_keys=["pose", "img"])
    monkeypatch.setattr(zarr_replay, "BLOCK_BYTES", 1)  # each row of chunks is decoded alone
    if len(lost) < 3 and array != "meta/episode_ends":
        with pytest.warns(UserWarning, match=message):
            found = read(path, observation_keys=["pose", "img"], on_bad_episode="skip")
        hit = {0: {"0"}, 1: {"1", "2"}, 2: {"3"}}
        assert list(found.episode_names) == sorted({"0", "1", "2", "3"} - set.union(*(hit[row] for row in lost)))


@needs_format_3
@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("name", ["r.zarr", "r.zarr.zip"])
def test_an_array_that_is_one_constant_is_read_with_a_warning(tmp_path, name, zarr_format):
    arrays = {**replay(), "data/gripper": np.zeros((11, 1), np.float32)}
    path = write_replay(tmp_path / name, arrays, zarr_format, fill_value=0)
    with pytest.warns(UserWarning, match="no chunk of 'data/gripper' is stored; its values are read as 0"):
        found = read(path, observation_keys=["state", "gripper"])
    np.testing.assert_array_equal(found.observations["gripper"], arrays["data/gripper"])
    np.testing.assert_array_equal(found.observations["state"], arrays["data/state"])
    with pytest.raises(ValueError, match=r"'data/gripper' is not whole: .*write_empty_chunks=True"):
        read(path, observation_keys=["gripper"])
    with pytest.raises(ValueError, match="'data/gripper' is not whole"):
        read(path, action_key="gripper")


@needs_format_3
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lost_chunk_casts_no_doubt_on_those_left_out_before_it(tmp_path):
    arrays = {**replay(), "meta/episode_ends": np.array([4, 8, 11])}
    arrays["data/state"][:5] = 0
    path = write_replay(tmp_path / "r.zarr", arrays, chunks={"data/state": (2, 5)})
    assert not (path / "data" / "state" / "0.0").exists()
    (path / "data" / "state" / "4.0").unlink()  # rows 8 and 9
    found = read(path, on_bad_episode="skip")
    assert found.episode_names == ["0", "1"]
    np.testing.assert_array_equal(found.observations["state"], arrays["data/state"][:8])


def test_only_episodes_in_a_damaged_chunk_are_left_out(tmp_path):
    arrays = {**replay(), "meta/episode_ends": np.array([2, 4, 6, 8, 11])}
    path = write_replay(tmp_path / "r.zarr", arrays, chunks={"data/state": (3, 5)})
    (path / "data" / "state" / "1.0").write_bytes(b"oops")  # rows 3 to 5
    with pytest.raises(ValueError, match=r"r.zarr: episode 1: chunk 'data/state/1.0' is damaged"):
        read(path)
    with pytest.warns(
        UserWarning, match=r"2 of 5 episodes are bad and left out; the first one is 1: chunk 'data/state/1.0'"
    ):
        found = read(path, on_bad_episode="skip")
    rows = [0, 1, 6, 7, 8, 9, 10]
    assert found.episode_names == ["0", "3", "4"]
    np.testing.assert_array_equal(found.observations["state"], arrays["data/state"][rows])
    np.testing.assert_array_equal(found.actions, arrays["data/action"][rows])


@pytest.mark.parametrize("zarr_format", ZARR_FORMATS)
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("size", [0, 10, 15, -20, -1], ids="{} bytes".format)
def test_a_blosc_chunk_cut_short_is_refused(tmp_path, zarr_format, zipped, size):
    """Blosc itself would decode the memory behind it."""
    from numcodecs import Blosc

    if 3 in ZARR_FORMATS:
        options = {"compressors": Blosc() if zarr_format == 2 else zarr.codecs.BloscCodec()}
    else:
        options = {"compressor": Blosc()}
    path = write_replay(tmp_path / "r.zarr", replay(), zarr_format, **options)
    assert read(path).num_episodes == 3
    chunk = path / "data" / "state" / ("0.0" if zarr_format == 2 else "c/0/0")
    chunk.write_bytes(chunk.read_bytes()[:size])
    if zipped:
        path = Path(shutil.make_archive(str(tmp_path / "r.zarr"), "zip", path))
    with pytest.raises(ValueError, match=r"chunk 'data/state/\S+' is damaged"):
        read(path)


# Broken stores


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def array(name, values):
    return lambda path: write_replay(path, {**replay(), name: np.asarray(values)})


def without(name):
    return lambda path: write_replay(path, {key: values for key, values in replay().items() if key != name})


def damaged(file, damage):
    return lambda path: damage(write_replay(path, replay()) / file)


def zarray(name, **changes):
    return damaged(f"data/{name}/.zarray", lambda file: rewrite(file, **changes))


def with_nan(name, row):
    values = replay()[name]
    values[row, 1] = np.nan
    return array(name, values)


BROKEN = {
    "nothing there": (lambda path: None, "no dataset at"),
    "an empty folder": (lambda path: path.mkdir(), "no dataset at"),
    "no data": (array("meta/other", [1]), None),  # the other arrays are good: the control
    "no ends": (without("meta/episode_ends"), "not a zarr replay buffer: there is no array 'meta/episode_ends'"),
    "no actions": (without("data/action"), r"no 'action': .* dataset\.action_key=NAME; there are img, state$"),
    "no state": (without("data/state"), r"no 'state': .* dataset\.observation_keys=\[\.\.\.\]; there are img$"),
    "two stores": (
        lambda path: [write_replay(path / name, replay()) for name in "ab"],
        "holds 2 replay buffers, take one of them: a/, b/",
    ),
    "no episodes": (array("meta/episode_ends", np.zeros(0, int)), "'meta/episode_ends' names 0 episodes"),
    "ends fall": (array("meta/episode_ends", [5, 4, 11]), "ends episode 1 at 4, which must be more than its start, 5"),
    "empty episode": (array("meta/episode_ends", [4, 4, 11]), "ends episode 1 at 4"),
    "empty first": (array("meta/episode_ends", [0, 5, 11]), "ends episode 0 at 0"),
    "negative end": (array("meta/episode_ends", [-1, 5, 11]), "ends episode 0 at -1"),
    "beyond the data": (array("meta/episode_ends", [4, 12]), "last episode at 12, 'data/state' has 11 rows"),
    "data beyond": (array("meta/episode_ends", [4, 10]), "last episode at 10, 'data/state' has 11 rows"),
    "huge end": (array("meta/episode_ends", np.array([4, 2**64 - 1], np.uint64)), "at 18446744073709551615"),
    "more ends than rows": (array("meta/episode_ends", np.arange(1, 13)), "names 12 episodes, 'data/state' has 11"),
    "fractional ends": (array("meta/episode_ends", [4.5, 11.0]), "must hold whole numbers, .* got float64"),
    "NaN among ends": (array("meta/episode_ends", [np.nan, 11]), "must hold whole numbers, .* got float64"),
    "a table of ends": (array("meta/episode_ends", ENDS[:, None]), r"must hold whole numbers, .* \(3, 1\)"),
    "a scalar": (array("data/state", 1.0), r"'data/state' must hold rows of numbers; it holds float64 \(\)"),
    "complex": (array("data/state", np.ones((11, 2), complex)), "'data/state' must hold rows of numbers.*complex128"),
    "text": (array("data/state", np.full((11, 2), "a")), "'data/state' must hold rows of numbers.*<U1"),
    "dates": (array("data/state", np.zeros((11, 2), "M8[s]")), "'data/state' must hold rows of numbers"),
    "short state": (array("data/state", np.ones((10, 5))), "last episode at 11, 'data/state' has 10 rows"),
    "no width": (array("data/state", np.zeros((11, 0))), "episode 0: 'state' is empty"),
    "NaN": (with_nan("data/state", 8), "r.zarr: episode 2: 'state' holds a NaN or infinity at transition 3"),
    "NaN in actions": (with_nan("data/action", 4), "r.zarr: episode 1: 'actions' holds a NaN .* at transition 0"),
    "no JSON": (damaged("data/state/.zarray", lambda file: file.write_text("{oops")), "'data/state' cannot be opened"),
    "a list": (damaged("data/state/.zarray", lambda file: file.write_text("[]")), "'data/state' cannot be opened"),
    "negative shape": (zarray("state", shape=[-11, 5]), "'data/state' (cannot be opened|must hold)"),
    "no chunk size": (zarray("state", chunks=[0, 5]), "'data/state' (cannot be opened|must hold)"),
    "unknown codec": (zarray("state", compressor={"id": "nosuch"}), "'data/state' cannot be opened .*nosuch"),
    "unknown dtype": (zarray("state", dtype="<x9"), "'data/state' cannot be opened"),
    "other dtype": (zarray("state", dtype="<f8"), "chunk 'data/state/0.0' is damaged"),
    "other codec": (zarray("state", compressor={"id": "zlib"}), "chunk 'data/state/0.0' is damaged"),
    "long": (zarray("action", shape=[1000, 2]), "last episode at 11, 'data/action' has 1000 rows"),
    "wide": (zarray("state", shape=[11, 10**12]), "'data/state' .* of memory .*dataset.max_bytes allows 8 GiB"),
    "large chunk": (zarray("state", chunks=[10**9, 5]), "'data/state' .* of memory .*dataset.max_bytes allows 8 GiB"),
    "not so large chunk": (zarray("state", chunks=[10**8, 5]), "chunk 'data/state/0.0' is damaged"),
    "not so wide": (zarray("state", shape=[11, 9 * 10**7], chunks=[11, 9 * 10**7]), "'data/state/0.0' is damaged"),
    "many columns": (zarray("state", shape=[11, 9 * 10**7]), "'data/state' is not whole: 1 of its 18000000 chunks"),
    "more columns": (zarray("state", shape=[11, 10]), "chunk 'data/state/0.1' is missing"),
    "longer than its chunk": (
        lambda path: [
            write_replay(path, {**replay(), "meta/episode_ends": np.array([4, 10**12])}),
            *(rewrite(path / f"data/{name}/.zarray", shape=[10**12, 5]) for name in ("state", "action")),
        ],
        "'data/state' is not whole: 1 of its 90909090910 chunks are there",
    ),
    "empty chunk": (damaged("data/state/0.0", lambda file: file.write_bytes(b"")), "'data/state/0.0' is damaged"),
    "a folder as chunk": (
        damaged("data/state/0.0", lambda file: (file.unlink(), file.mkdir())),
        "'data/state' is not whole: 0 of its 1 chunks are there",
    ),
    "ends cut short": (
        damaged("meta/episode_ends/0", lambda file: file.write_bytes(file.read_bytes()[:9])),
        "chunk 'meta/episode_ends/0' is damaged",
    ),
    "a link that leaves": (
        damaged("data/state/0.0", lambda file: (file.unlink(), file.symlink_to("/etc/passwd"))),
        "data/state/0.0 is a link that leaves the folder",
    ),
}


@pytest.mark.parametrize("label", BROKEN)
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning" if ZARR_FORMATS[1:] else "default")
def test_a_broken_store_is_one_sentence(tmp_path, label):
    make, message = BROKEN[label]
    path = tmp_path / "r.zarr"
    make(path)
    if message is None:
        assert read(path).num_episodes == 3
        return
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def rezip(change):
    """Make a function that changes the entries of a zip, name to content, and writes it again."""

    def make(path):
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        change(entries)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return make


def edit(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flip_in_chunk(content):
    """Change one byte of the actions' chunk, which its CRC covers."""
    at = content.index(b"data/action/0.0") + len(b"data/action/0.0") + 10
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


BROKEN_ZIPS = {
    "truncated": (edit(lambda content: content[: len(content) // 2]), "not a folder and not a whole zip"),
    "empty": (edit(lambda content: b""), "not a folder and not a whole zip"),
    "no zip": (edit(lambda content: b"PK\x03\x04 not a zip"), "not a folder and not a whole zip"),
    "text": (edit(lambda content: b"404: Not Found"), "not a folder and not a whole zip"),
    "flipped": (edit(flip_in_chunk), "chunk 'data/action/0.0' cannot be read .*CRC"),
    "another": (lambda path: zipfile.ZipFile(path, "w").writestr("readme", "hello"), "there is no array 'meta/ep"),
    "nested": (
        rezip(lambda entries: (entries.clear(), entries.update({"r.zarr.zip": b"PK"}))),
        "not a zarr replay buffer: there is no array 'meta/episode_ends'",
    ),
    "leaves": (rezip(lambda entries: entries.update({"data/../../x": b""})), "names a file outside itself, 'data/.."),
    "absolute": (rezip(lambda entries: entries.update({"/etc/x": b""})), "names a file outside itself, '/etc/x'"),
    "no chunk": (rezip(lambda entries: entries.pop("data/state/0.0")), "'data/state' is not whole: 0 of its"),
    "two stores": (
        rezip(lambda entries: entries.update({f"b/{name}": content for name, content in entries.items()})),
        "holds 2 replay buffers",
    ),
}


@pytest.mark.parametrize("label", BROKEN_ZIPS)
def test_a_broken_zip_is_one_sentence(tmp_path, label):
    make, message = BROKEN_ZIPS[label]
    path = write_replay(tmp_path / "r.zarr.zip", replay())
    make(path)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


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
@pytest.mark.parametrize("name", ["data/state", "meta/episode_ends"])
def test_an_array_that_would_unpickle_is_refused_and_nothing_runs(tmp_path, metadata, name):
    path, marker = write_replay(tmp_path / "r.zarr", replay()), tmp_path / "ran"
    rewrite(path / name / ".zarray", **{"compressor": None, **metadata})
    (path / name / ("0.0" if name == "data/state" else "0")).write_bytes(pickle.dumps(Payload(marker)))
    pickle.loads(pickle.dumps(Payload(tmp_path / "control")))
    assert (tmp_path / "control").exists()  # the payload does work
    with pytest.raises(ValueError, match=f"array '{name}' (holds pickled objects|cannot be opened)"):
        read(path)
    assert not marker.exists()


# Changed bytes


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Small valid stores, name to path and files."""
    root = tmp_path_factory.mktemp("stores")
    found = {}
    for zarr_format in ZARR_FORMATS:
        chunks = {"data/state": (4, 5)}
        folder = write_replay(root / f"{zarr_format}.zarr", replay(), zarr_format, chunks)
        found[folder.name] = (folder, sorted(file for file in folder.rglob("*") if file.is_file()))
        archive = write_replay(root / f"{zarr_format}.zarr.zip", replay(), zarr_format, chunks)
        found[archive.name] = (archive, [archive])
    return found


@settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_byte_is_a_value_error_or_whole_demonstrations(stores, tmp_path, data):
    path, files = stores[data.draw(st.sampled_from(sorted(stores)))]
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytes([content[at] ^ data.draw(st.integers(1, 255))])
    cache = tmp_path / "cache"
    file.write_bytes(content[:at] + changed + content[at + 1 :])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_demonstrations(
                format="zarr", path=path, observation_keys=["state", "img"], cache_dir=cache, on_bad_episode="error"
            )
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert found.episode_ends[-1] == len(found.actions) == len(found.observations["state"]) == 11
        assert found.observations["img"].dtype == np.uint8
        assert np.isfinite(found.actions).all()
        assert np.isfinite(found.observations["state"]).all()
    finally:
        file.write_bytes(content)
        shutil.rmtree(cache, ignore_errors=True)


@pytest.mark.skipif(not PUSHT.exists(), reason="needs the Push-T demonstrations")
def test_the_push_t_demonstrations(tmp_path):
    found = read_demonstrations(
        format="zarr", path=PUSHT, observation_keys=["state", "keypoint"], cache_dir=tmp_path / "cache"
    )
    assert (found.num_episodes, len(found.actions)) == (206, 25_650)
    assert found.episode_lengths[:5].tolist() == [161, 118, 141, 159, 159]
    root = zarr.open_group(zarr.storage.ZipStore(PUSHT, mode="r"), mode="r")
    np.testing.assert_array_equal(found.actions, root["data/action"][:])
    np.testing.assert_array_equal(found.observations["state"], root["data/state"][:])
    np.testing.assert_array_equal(found.observations["keypoint"], root["data/keypoint"][:].reshape(25_650, -1))
    pictures = read_demonstrations(
        format="zarr", path=PUSHT, observation_keys=["img"], max_episodes=2, cache_dir=tmp_path / "cache"
    )
    np.testing.assert_array_equal(pictures.observations["img"], root["data/img"][:279])
