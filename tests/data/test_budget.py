"""What would need more memory or disk than allowed is refused before it is read, by the sizes in its headers."""

import bz2
import gzip
import json
import lzma
import resource
import shutil
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from policy.data.budget import Budget, BudgetError, free_disk, free_memory
from policy.data.episode import Episode
from policy.data.formats.chunk_sizes import SIZES, grows_beyond
from policy.data.formats.hdf5 import HDF5File
from policy.data.reading import read_demonstrations

LEROBOT = Path(__file__).parent / "lerobot_v30"
SAID = r"needs? [\d.e+]+ [KMGTPE]iB of (memory|disk) as its headers say, and dataset.max_bytes allows .*max_episodes"
needs_zarr_3 = pytest.mark.skipif(not hasattr(zarr, "create_array"), reason="zarr 2 writes all chunks")


def refuse(format, path, **request):
    """Read in vain; little memory and time may be spent."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=SAID):
        read_demonstrations(format=format, path=path, cache_dir=path.parent / "cache", **request)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    assert time.perf_counter() - began < 5
    assert not list((path.parent / "cache").glob("*"))


def test_the_budget_counts_bytes_of_pixels_and_of_numbers():
    shapes = {"state": (3,), "image": (10, 10, 3), "actions": (2,)}
    Budget(memory=20 * 340, disk=30 * 320).check_episodes([10, 20], shapes)
    with pytest.raises(BudgetError, match=r"its longest episode, 20 transitions, needs 6.64 KiB of memory"):
        Budget(memory=20 * 340 - 1).check_episodes([10, 20], shapes)
    with pytest.raises(BudgetError, match=r"its 2 episodes need 9.38 KiB of disk .*: set dataset.cache_dir"):
        Budget(disk=30 * 320 - 1).check_episodes([10, 20], shapes)
    Budget(disk=10 * 320, max_episodes=1).check_episodes([10, 20], shapes)
    Budget(disk=30 * 32, image_size=2).check_episodes([10, 20], shapes)
    Budget(disk=1, is_transformed=True).check_episodes([10, 20], shapes)


def test_what_is_free_is_known(tmp_path):
    assert 2**20 < free_memory() < 2**50
    assert free_disk(tmp_path / "not" / "there") > 2**20


@needs_zarr_3
def test_arrays_that_grow_when_they_are_decoded(tmp_path):
    rows = 10**6
    group = zarr.open_group(str(tmp_path / "r.zarr"), mode="w")
    group.create_array("data/state", shape=(rows, 10**6), chunks=(rows, 1), dtype="f4")[0, :1] = 1
    group.create_array("data/large", shape=(rows, 25), chunks=(1000, 25), dtype="f4")[:1000] = 1
    for name in ("data/pose", "data/action"):
        group.create_array(name, shape=(rows, 1), chunks=(rows, 1), dtype="f4")[...] = 1
    group["meta/episode_ends"] = np.array([rows])
    refuse("zarr", tmp_path / "r.zarr", max_bytes=2**30)  # 4 TB from 4 MB
    refuse("zarr", tmp_path / "r.zarr", observation_keys=["pose"], max_bytes=2**22)  # the episode
    refuse("zarr", tmp_path / "r.zarr", observation_keys=["large", "pose"], max_bytes=2**26)


@needs_zarr_3
@pytest.mark.parametrize("codec", ["GzipCodec", "ZstdCodec"])
def test_a_chunk_that_grows_beyond_its_array_is_damaged(tmp_path, codec):
    path = tmp_path / "r.zarr"
    for shape in ((20_000, 300), (20, 2)):
        group = zarr.open_group(str(path), mode="w")
        group.create_array(
            "data/state", shape=shape, chunks=shape, dtype="f4", compressors=getattr(zarr.codecs, codec)()
        )[...] = 1
        if shape[1] == 300:
            bomb = (path / "data/state/c/0/0").read_bytes()
    group["data/action"], group["meta/episode_ends"] = np.ones((20, 2)), np.array([20])
    assert read_demonstrations(format="zarr", path=path, cache_dir=tmp_path / "cache").num_episodes == 1
    (path / "data/state/c/0/0").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"chunk 'data/state/c/0/0' is damaged"):
        read_demonstrations(format="zarr", path=path, cache_dir=tmp_path / "cache")


FORGED = (8).to_bytes(4, "little")  # what a gzip stream says of its size, in its last bytes


@pytest.mark.parametrize(
    ("codec", "bomb"),
    [
        ("zlib", zlib.compress(bytes(2**27))),
        ("gzip", gzip.compress(bytes(2**27))[:-4] + FORGED),
        ("gzip", gzip.compress(b"a") + gzip.compress(bytes(2**27))[:-4] + FORGED),
        ("gzip", gzip.compress(b"") + bytes(3) + gzip.compress(bytes(2**27))[:-4] + FORGED),
        ("bz2", bz2.compress(bytes(2**27))),
        ("lzma", lzma.compress(bytes(2**27), preset=0)),
    ],
)
def test_streams_are_counted_whatever_they_say(codec, bomb):
    assert grows_beyond(codec, bomb, 8)
    assert not grows_beyond(codec, bomb, 2**28)
    assert not grows_beyond(codec, b"nothing" * 10_000_000, 8)


def test_a_zstd_stream_without_a_size_is_counted():
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(bytes(2**27))
    bomb = sink.getvalue().to_pybytes()
    assert SIZES["zstd"](bomb)[0] is None
    assert grows_beyond("zstd", bomb, 8)
    assert not grows_beyond("zstd", bomb, 2**28)


def change_features(root: Path, **changes) -> None:
    info = json.loads((root / "meta/info.json").read_text())
    for key, change in changes.items():
        info["features"][f"observation.{key}"].update(change)
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("dtype", ["video", "image", "uint8"])
def test_pictures_of_16k(tmp_path, dtype):
    root = Path(shutil.copytree(LEROBOT, tmp_path / "set"))
    change_features(root, image={"dtype": dtype, "shape": [16_000, 16_000, 3]})
    refuse("lerobot", root, max_bytes=2**30)


def test_parquet_pages_that_grow(tmp_path):
    root = Path(shutil.copytree(LEROBOT, tmp_path / "set"))
    rows = pa.table({"length": pa.array(np.zeros(200_000, np.int64))})
    (table,) = (root / "meta/episodes").rglob("*.parquet")
    columns = pq.read_table(table).column_names
    pq.write_table(pa.table({name: rows["length"] for name in columns}), table, use_dictionary=True)
    assert table.stat().st_size < 2**20
    refuse("lerobot", root, max_bytes=2**22)


def test_hdf5_that_grows(tmp_path):
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        for name in ("obs/state", "actions"):
            file.create_dataset(f"data/demo_0/{name}", data=np.zeros((100_000, 50)), compression="gzip")
    assert path.stat().st_size < 2**20
    refuse("robomimic", path, max_bytes=2**24)


def test_a_format_without_sizes_is_stopped_at_the_limit_of_the_disk(tmp_path, monkeypatch):
    from policy.common.registry import Registry
    from policy.data import reading
    from policy.data.formats import Format

    class Reader:
        names, held_out, metadata = ("a", "b"), (), {}

        def read(self, name):
            return Episode(observations={"state": np.ones((1000, 3))}, actions=np.ones((1000, 1)))

        def close(self):
            pass

    formats = Registry("format", {}, Format)
    formats.register("mine", Format(open=lambda *_: Reader()))
    monkeypatch.setattr(reading, "FORMATS", formats)
    (tmp_path / "set").touch()
    refuse("mine", tmp_path / "set", max_bytes=20_000, on_bad_episode="skip")


def test_a_file_that_is_open_for_writing_elsewhere(tmp_path, monkeypatch):
    def locked(*_, **__):
        raise BlockingIOError(11, "unable to lock file")

    (tmp_path / "f.hdf5").touch()
    monkeypatch.setattr(h5py, "File", locked)
    with pytest.raises(ValueError, match=r"f.hdf5 is open for writing elsewhere: close the program"):
        HDF5File(tmp_path / "f.hdf5", Budget())


def test_an_hdf5_filter_that_is_not_installed(tmp_path, monkeypatch):
    path = tmp_path / "demos.hdf5"
    with h5py.File(path, "w") as file:
        for name in ("obs/state", "actions"):
            file.create_dataset(f"data/demo_0/{name}", data=np.zeros((10, 2)), compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: False)
    with pytest.raises(ValueError, match=r"filter 32000 \(lzf\), which is not installed: pip install hdf5plugin"):
        read_demonstrations(format="robomimic", path=path, cache_dir=tmp_path)


@needs_zarr_3
def test_a_zarr_codec_that_is_not_installed(tmp_path):
    path = tmp_path / "r.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    for name in ("data/state", "data/action"):
        group.create_array(name, shape=(4, 2), chunks=(4, 2), dtype="f4")[...] = 1
    group.create_array("meta/episode_ends", shape=(1,), dtype="i8")[...] = 4
    metadata = path / "data/state/.zarray"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "compressor": {"id": "imagecodecs_jpegxl"}}))
    with pytest.raises(ValueError, match=r"imagecodecs_jpegxl.*the codec is not installed; pip install imagecodecs"):
        read_demonstrations(format="zarr", path=path, cache_dir=tmp_path / "cache")
