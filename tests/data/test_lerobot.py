"""The LeRobot reader, against a dataset that the `lerobot` package wrote, and against cuts of it beside this file."""

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from policy.data.formats.lerobot.info import Feature
from policy.data.reading import read_demonstrations
from policy.data.video import VideoFile

HERE = Path(__file__).parent
V30, V21 = HERE / "lerobot_v30", HERE / "lerobot_v21"
SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL, REPLAY = SHARED / "pusht_lerobot_v3", SHARED / "pusht_cchi_v7_replay.zarr.zip"
# Checksums in pusht_lerobot_v3.md, beside the dataset.
STATES = "f616c079f7dcf15b5a33e73f6fc411f0440d7fae738229d8e5782c8aaca7baa3"
ACTIONS = "2c4360657987d837fbebcb0ffa87277971b040838047bad6fe5d62bac5faca17"
LENGTH = 24  # transitions of a cut episode

INFO = "meta/info.json"
TABLE = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
KEY = "observation.image"
VIDEO = f"videos/{KEY}/chunk-000/file-000.mp4"
VIDEO_21 = f"videos/chunk-000/{KEY}/episode_00000{{}}.mp4"
DATA_21 = "data/chunk-000/episode_00000{}.parquet"

real = pytest.mark.skipif(not REAL.exists(), reason="needs the dataset beside the checkout")


@pytest.fixture
def read(tmp_path):
    """Read a dataset as a user does."""

    def reader(path: Path, **asked):
        return read_demonstrations(format="lerobot", path=path, cache_dir=tmp_path / "cache", **asked)

    return reader


@pytest.fixture
def v30(tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(V30, tmp_path / "v30"))


@pytest.fixture
def v21(tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(V21, tmp_path / "v21"))


def change_info(root: Path, **changes) -> None:
    info = json.loads((root / INFO).read_text())
    (root / INFO).write_text(json.dumps({**info, **changes}))


def change_feature(root: Path, key: str, **changes) -> None:
    features = json.loads((root / INFO).read_text())["features"]
    change_info(root, features={**features, key: {**features.get(key, {}), **changes}})


def change_table(file: Path, **columns) -> None:
    """Replace or add columns; None removes a column."""
    table = pq.read_table(file)
    for name, values in columns.items():
        position = table.schema.get_field_index(name)
        if position >= 0:
            table = table.remove_column(position)
        if values is not None:
            table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    file.unlink()
    pq.write_table(table, file)


def cut(file: Path, part: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])


def actions() -> list[list[float]]:
    return pq.read_table(V30 / DATA).column("action").to_pylist()


def columns(demonstrations) -> dict[str, np.ndarray]:
    return {**demonstrations.observations, "actions": demonstrations.actions}


# The values that are read are those that were written.


@real
def test_a_dataset_written_by_lerobot_is_read_exactly(read):
    demonstrations = read(REAL)
    states, images = demonstrations.observations["state"], demonstrations.observations["image"]
    assert hashlib.sha256(np.ascontiguousarray(states)).hexdigest() == STATES
    assert hashlib.sha256(np.ascontiguousarray(demonstrations.actions)).hexdigest() == ACTIONS
    assert demonstrations.episode_lengths.tolist() == [161, 118, 141, 159, 159]
    assert images.shape == (738, 96, 96, 3)
    assert images.dtype == np.uint8


@real
@pytest.mark.skipif(not REPLAY.exists(), reason="needs the replay buffer beside the checkout")
def test_each_frame_of_its_video_is_the_picture_of_its_transition(read, tmp_path):
    demonstrations = read(REAL)
    images = demonstrations.observations["image"].astype(np.float32)
    originals = read_demonstrations(
        format="zarr", path=REPLAY, observation_keys={"image": "img"}, max_episodes=5, cache_dir=tmp_path / "cache"
    ).observations["image"]
    assert np.abs(images - originals).mean() < 0.95  # "within 0.9 of 255 on average", and 0.907 here
    for start, end in zip(demonstrations.episode_starts, demonstrations.episode_ends, strict=True):
        inner = slice(start + 1, end - 1)
        lags = {lag: np.abs(images[inner] - originals[start + 1 + lag : end - 1 + lag]).mean() for lag in (-1, 0, 1)}
        assert min(lags, key=lags.get) == 0


@real
def test_the_committed_cuts_are_made_by_their_script(tmp_path):
    subprocess.run([sys.executable, HERE / "make_lerobot_fixture.py", REAL, tmp_path], check=True, timeout=120)
    for name in ("lerobot_v30", "lerobot_v21"):
        made = {f.relative_to(tmp_path): f for f in (tmp_path / name).rglob("*") if f.is_file()}
        assert set(made) == {f.relative_to(HERE) for f in (HERE / name).rglob("*") if f.is_file()}
        for relative, file in made.items():
            if file.suffix == ".parquet":
                assert pq.read_table(file).equals(pq.read_table(HERE / relative), check_metadata=True)
            elif file.suffix != ".mp4":
                assert file.read_text() == (HERE / relative).read_text()


@real
@pytest.mark.parametrize("path", [V30, V21], ids=["v3.0", "v2.1"])
def test_the_cuts_hold_what_they_were_cut_from(read, path):
    whole, part = columns(read(REAL)), columns(read(path))
    rows = np.r_[:LENGTH, 161 : 161 + LENGTH]
    for key, values in part.items():
        np.testing.assert_array_equal(values, whole[key][rows], err_msg=key)


@pytest.mark.parametrize(("path", "version"), [(V30, "v3.0"), (V21, "v2.1")], ids=["v3.0", "v2.1"])
def test_a_dataset_describes_itself(read, path, version):
    demonstrations = read(path)
    assert demonstrations.episode_names == ["0", "1"]
    assert demonstrations.episode_lengths.tolist() == [LENGTH, LENGTH]
    assert demonstrations.observation_shapes == {"state": (5,), "image": (96, 96, 3)}
    assert list(demonstrations.held_out) == []
    assert demonstrations.metadata == {
        "format": "lerobot",
        "version": version,
        "rate_hz": 10,
        "robot_type": "pusht",
        "tasks": ["Push the T onto the target"],
    }
    table = pq.read_table(V30 / DATA)
    np.testing.assert_array_equal(demonstrations.actions, np.array(table.column("action").to_pylist(), np.float32))


def test_version_20_has_the_layout_of_21(read, v21):
    change_info(v21, codebase_version="v2.0")
    (v21 / "meta" / "episodes_stats.jsonl").unlink()
    assert read(v21).metadata["version"] == "v2.0"


def test_files_that_only_describe_may_be_missing(read, v30):
    for name in ("stats.json", "tasks.parquet"):
        (v30 / "meta" / name).unlink()
    demonstrations = read(v30)
    assert demonstrations.metadata["tasks"] == []
    assert demonstrations.num_episodes == 2


# The user's request.


def test_keys_are_chosen_with_and_without_their_prefix(read):
    assert list(read(V30, observation_keys=["state"]).observations) == ["state"]
    assert list(read(V30, observation_keys=["observation.state"]).observations) == ["state"]
    named = read(V30, observation_keys={"agent": "observation.state", "clock": "timestamp"})
    assert named.observation_shapes == {"agent": (5,), "clock": (1,)}
    twice = read(V30, observation_keys={"left": KEY, "right": KEY}).observations
    np.testing.assert_array_equal(twice["left"], twice["right"])
    assert read(V30, observation_keys=["state"], action_key="observation.state").actions.shape == (48, 5)


def test_dots_of_a_key_become_slashes(read, v30):
    for file in (v30 / TABLE, v30 / DATA):
        table = pq.read_table(file)
        pq.write_table(
            table.rename_columns([n.replace(KEY, "observation.images.top") for n in table.column_names]), file
        )
    (v30 / "videos" / KEY).rename(v30 / "videos" / "observation.images.top")
    features = json.loads((v30 / INFO).read_text())["features"]
    change_info(v30, features={k.replace(KEY, "observation.images.top"): f for k, f in features.items()})
    images = read(v30).observations
    assert list(images) == ["state", "images/top"]
    np.testing.assert_array_equal(images["images/top"], read(V30).observations["image"])


def test_text_and_depth_are_no_observations(read, v30):
    change_feature(v30, "observation.words", dtype="string", shape=[1])
    change_feature(v30, KEY, info={"video.is_depth_map": True})
    assert list(read(v30).observations) == ["state"]
    with pytest.raises(
        ValueError, match=r"'observation\.words' holds values of dtype 'string'; a policy takes numbers"
    ):
        read(v30, observation_keys=["words"])
    with pytest.raises(ValueError, match=r"'observation\.image' holds pictures of depth"):
        read(v30, observation_keys=["observation.image"])


def write_numbers(root: Path, lengths: list[int], **info) -> Path:
    """Write a dataset like the fixture without videos; the state is the number of the episode."""
    shutil.copytree(V30, root)
    shutil.rmtree(root / "videos")
    ends = np.cumsum(lengths)
    pq.write_table(
        pa.table(
            {
                "observation.state": [[float(n)] * 5 for n, length in enumerate(lengths) for _ in range(length)],
                "action": [[0.0, 1.0]] * int(ends[-1]),
                "frame_index": [t for length in lengths for t in range(length)],
                "episode_index": [n for n, length in enumerate(lengths) for _ in range(length)],
                "index": range(int(ends[-1])),
            }
        ),
        root / DATA,
    )
    zeros = [0] * len(lengths)
    pq.write_table(
        pa.table(
            {
                "episode_index": range(len(lengths)),
                "length": lengths,
                "data/chunk_index": zeros,
                "data/file_index": zeros,
                "dataset_from_index": ends - lengths,
                "dataset_to_index": ends,
            }
        ),
        root / TABLE,
    )
    features = json.loads((root / INFO).read_text())["features"]
    del features[KEY]
    change_info(root, total_episodes=len(lengths), features=features, **info)
    return root


@pytest.mark.parametrize(
    ("splits", "subset", "names", "held_out"),
    [
        ({"train": "0:4", "val": "4:5"}, None, "01234", [4]),
        ({"valid": "0:2", "train": "2:5"}, None, "23401", [3, 4]),
        ({"train": "0:3", "validation": "3:4", "test": "4:5"}, None, "0123", [3]),
        ({"train": "0:3", "test": "3:5"}, None, "012", []),
        ({"train": "0:3", "val": "3:5"}, "val", "34", []),
        ({"train": "0:3", "val": "3:5"}, "train", "012", []),
        ({"train": "0:50"}, None, "01234", []),  # a dataset that was cut without correcting the split
        ({"train": "0:4"}, None, "01234", []),
        ({}, None, "01234", []),
    ],
)
def test_splits(read, tmp_path, splits, subset, names, held_out):
    path = write_numbers(tmp_path / "set", [3, 4, 5, 6, 7], splits=splits)
    demonstrations = read(path, subset=subset)
    assert demonstrations.episode_names == list(names)
    assert list(demonstrations.held_out) == held_out
    starts = demonstrations.episode_starts
    assert demonstrations.observations["state"][starts, 0].tolist() == [float(name) for name in names]


@pytest.mark.parametrize("inner", [pa.list_(pa.float32()), pa.list_(pa.float32(), 3), pa.large_list(pa.float64())])
def test_matrices_are_laid_out_flat(read, v30, inner):
    matrices = np.arange(48 * 6).reshape(48, 2, 3)
    change_table(v30 / DATA, **{"observation.grid": pa.array(matrices.tolist(), pa.list_(inner))})
    change_feature(v30, "observation.grid", dtype="float32", shape=[2, 3])
    np.testing.assert_array_equal(read(v30).observations["grid"], matrices.reshape(48, 6))


@pytest.mark.parametrize("shape", [(4, 5, 3), (3, 4, 5), (4, 5, 1)], ids=str)
def test_pictures_stored_as_numbers_are_pictures(read, v30, shape):
    pictures = np.random.default_rng(0).integers(0, 256, (48, *shape)).astype(np.uint8)
    change_table(
        v30 / DATA, **{"observation.camera": pa.array(pictures.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))}
    )
    change_feature(v30, "observation.camera", dtype="uint8", shape=list(shape))
    found = read(v30, observation_keys=["camera"]).observations["camera"]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pictures.transpose(0, 2, 3, 1) if shape[0] == 3 else pictures)


def test_numbers_of_rank_3_that_cannot_be_pictures_are_laid_out_flat(read, v30):
    voxels = np.random.default_rng(0).integers(0, 2, (48, 2, 2, 2))
    change_table(v30 / DATA, **{"observation.voxels": pa.array(voxels.tolist())})
    for dtype in ("uint8", "int64"):
        change_feature(v30, "observation.voxels", dtype=dtype, shape=[2, 2, 2])
        np.testing.assert_array_equal(read(v30).observations["voxels"], voxels.reshape(48, 8))


def test_features_without_numbers_are_left_out_with_a_word(read, v30):
    change_feature(v30, "observation.nothing", dtype="float32", shape=[0])
    with pytest.warns(UserWarning, match=r"v30: 'observation\.nothing' has the shape \(0,\).* left out"):
        assert "nothing" not in read(v30).observations
    with pytest.raises(ValueError, match=r"shape of feature 'observation\.nothing'"):
        read(v30, observation_keys=["nothing"])


# The places of rows and frames.


def spread(root: Path) -> None:
    """Spread the same episodes over several files of each kind, whose chunk and file numbers all differ."""
    table, data = pq.read_table(root / TABLE), pq.read_table(root / DATA)
    shutil.rmtree(root / "data")
    shutil.rmtree(root / "videos")
    change = {
        "data/chunk_index": [0, 2],
        "data/file_index": [7, 1],
        f"videos/{KEY}/chunk_index": [1, 0],
        f"videos/{KEY}/file_index": [0, 3],
        f"videos/{KEY}/from_timestamp": [0.0, 0.0],
        f"videos/{KEY}/to_timestamp": [2.4, 2.4000000000000004],
    }
    for number in range(2):
        row = table.slice(number, 1)
        for name, values in change.items():
            row = row.set_column(row.schema.get_field_index(name), name, pa.array(values[number : number + 1]))
        places = {name: values[number] for name, values in change.items()}
        files = {
            root / f"meta/episodes/chunk-00{number}/file-000.parquet": row,
            root / f"data/chunk-00{places['data/chunk_index']}/file-00{places['data/file_index']}.parquet": data.slice(
                number * LENGTH, LENGTH
            ),
        }
        for file, content in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(content, file, row_group_size=10)
        chunk, file_index = places[f"videos/{KEY}/chunk_index"], places[f"videos/{KEY}/file_index"]
        video = root / f"videos/{KEY}/chunk-00{chunk}/file-00{file_index}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(V21 / VIDEO_21.format(number), video)


def test_files_and_chunks_are_followed_episode_by_episode(read, v30):
    spread(v30)
    expected, found = columns(read(V30)), columns(read(v30))
    for key, values in found.items():
        np.testing.assert_array_equal(values, expected[key], err_msg=key)


@pytest.mark.parametrize("error", [1e-7, -1e-7, 4e-16])
def test_float_error_of_the_offsets_does_no_harm(read, v30, error):
    change_table(v30 / TABLE, **{f"videos/{KEY}/from_timestamp": [abs(error), 2.4 + error]})
    np.testing.assert_array_equal(read(v30).observations["image"], read(V30).observations["image"])


def test_episodes_in_order_are_decoded_once(read, monkeypatch):
    calls = []
    monkeypatch.setattr(VideoFile, "_seek", lambda *_: calls.append("seek"))
    monkeypatch.setattr(av, "open", lambda *a, _open=av.open, **k: calls.append("open") or _open(*a, **k))
    read(V30)
    assert calls == ["open"]


@pytest.mark.parametrize("kind", ["png bytes", "jpeg bytes", "path"])
def test_pictures_in_the_data_files(read, v30, kind):
    images = read(V30).observations["image"]
    cells = []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG" if kind == "jpeg bytes" else "PNG", quality=95)
        cells.append({"bytes": buffer.getvalue(), "path": f"images/{number}.png"})
        if kind == "path":
            (v30 / "images").mkdir(exist_ok=True)
            (v30 / "images" / f"{number}.png").write_bytes(cells[-1]["bytes"])
            cells[-1]["bytes"] = None
    change_table(v30 / DATA, **{KEY: pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    change_feature(v30, KEY, dtype="image", shape=[3, 96, 96])
    shutil.rmtree(v30 / "videos")
    found = read(v30).observations["image"]
    tolerance = 3.0 if kind == "jpeg bytes" else 0.0
    assert np.abs(found.astype(np.float32) - images).mean() <= tolerance


def write_counting_video(file: Path, count: int, fps: int, **options) -> None:
    """Write H.264 with few keyframes and reordered frames, as other writers do; frame n is gray 4n."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"qp": "0", **options})
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(count):
            picture = np.full((16, 32, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    "options", [{"g": "250", "bf": "3"}, {"g": "12", "bf": "2", "b-pyramid": "normal"}, {"g": "2"}]
)
@pytest.mark.parametrize("fps", [5, 30])
def test_any_order_of_episodes_finds_its_frames(tmp_path, options, fps):
    """Keyframes, stored order and times differ between writers; frames are known by their times."""
    write_counting_video(tmp_path / "a.mp4", 60, fps, **options)
    feature = Feature(key="x", dtype="video", shape=[16, 32, 3], is_depth=False)
    video = VideoFile("a.mp4", tmp_path / "a.mp4")
    for first, count in [(0, 7), (7, 13), (50, 10), (20, 30), (59, 1), (0, 60), (3, 2), (31, 9), (41, 4), (40, 20)]:
        pictures = video.read(first / fps + 1e-9, fps, count, feature.check_picture)
        assert np.rint(pictures.mean((1, 2, 3)) / 4).astype(int).tolist() == list(range(first, first + count))
    with pytest.raises(ValueError, match=r"a\.mp4 ends after 5 of 6 frames"):
        video.read(55 / fps, fps, 6, feature.check_picture)
    assert len(video.read(1 / fps, fps, 3, feature.check_picture)) == 3
    with pytest.raises(ValueError, match="frame 1 of 4 is missing"):  # a video of another rate
        video.read(0.0, fps * 2, 4, feature.check_picture)
    video.close()


# One bad episode.


BAD_EPISODES = {
    "no transitions": (
        "v30",
        lambda p: change_table(
            p / TABLE,
            length=[LENGTH, 0],
            dataset_to_index=[LENGTH, LENGTH],
            **{f"videos/{KEY}/to_timestamp": [2.4, 2.4]},
        ),
        "it has no transitions",
    ),
    "lengths in the table": (
        "v30",
        lambda p: change_table(p / TABLE, length=[LENGTH, 20]),
        "length is 20, transitions 24 to 48 are 24",
    ),
    "time in the video": (
        "v30",
        lambda p: change_table(p / TABLE, **{f"videos/{KEY}/to_timestamp": [2.4, 4.6]}),
        r"length is 24, its time in the video of 'observation\.image' is that of 22 frames",
    ),
    "beyond the data": (
        "v30",
        lambda p: change_table(p / TABLE, dataset_from_index=[0, 30], dataset_to_index=[LENGTH, 54]),
        r"file-000\.parquet has 48 rows; rows 30 to 54 are not there",
    ),
    "rows of another episode": (
        "v30",
        lambda p: change_table(p / TABLE, dataset_from_index=[0, 20], dataset_to_index=[LENGTH, 44]),
        r"disagrees with the episode table: 'episode_index' is 0 at transition 0, expected 1",
    ),
    "rows out of order": (
        "v30",
        lambda p: change_table(p / DATA, frame_index=[*range(LENGTH), *reversed(range(LENGTH))]),
        r"'frame_index' is 23 at transition 0, expected 0",
    ),
    "numbers missing": (
        "v30",
        lambda p: change_table(p / DATA, action=[*actions()[:40], *[[0.0, None]] * 8]),
        r"'action': a value is missing",
    ),
    "lists of many lengths": (
        "v30",
        lambda p: change_table(p / DATA, action=[*actions()[:40], *[[0.0], [0.0, 1.0, 2.0]] * 4]),
        r"'action': its values are of different lengths",
    ),
    "not a number": (
        "v30",
        lambda p: change_table(p / DATA, action=[*actions()[:40], *[[0.0, float("nan")]] * 8]),
        "'actions' holds a NaN or infinity at transition 16",
    ),
    "short video": (
        "v30",
        lambda p: shutil.copyfile(V21 / VIDEO_21.format(0), p / VIDEO),
        r"'observation\.image': videos/.*mp4 ends after 0 of 24 frames",
    ),
    "data without rows": (
        "v21",
        lambda p: pq.write_table(pq.read_table(p / DATA_21.format(1)).slice(0, 0), p / DATA_21.format(1)),
        r"episode_000001\.parquet has 0 rows, the episode table says 24",
    ),
    "no data file": (
        "v21",
        lambda p: (p / DATA_21.format(1)).unlink(),
        r"no file data/chunk-000/episode_000001\.parquet",
    ),
    "no video file": ("v21", lambda p: (p / VIDEO_21.format(1)).unlink(), r"no file videos/.*episode_000001\.mp4"),
    "data of another episode": (
        "v21",
        lambda p: shutil.copyfile(V21 / DATA_21.format(0), p / DATA_21.format(1)),
        "'episode_index' is 0 at transition 0, expected 1",
    ),
    "truncated data": ("v21", lambda p: cut(p / DATA_21.format(1)), r"episode_000001\.parquet is damaged"),
    "truncated video": ("v21", lambda p: cut(p / VIDEO_21.format(1)), r"episode_000001\.mp4 is damaged"),
    "empty video": ("v21", lambda p: cut(p / VIDEO_21.format(1), 0), r"episode_000001\.mp4 is damaged"),
    "long video": (
        "v21",
        lambda p: shutil.copyfile(V30 / VIDEO, p / VIDEO_21.format(1)),
        r"episode_000001\.mp4 has more frames than the episode's 24",
    ),
    "lengths of table and data": (
        "v21",
        lambda p: change_lines(p / "meta" / "episodes.jsonl", 1, length=23),
        r"episode_000001\.parquet has 24 rows, the episode table says 23",
    ),
}


def change_lines(file: Path, number: int, **changes) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[number] |= changes
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("damage", BAD_EPISODES)
def test_one_bad_episode(read, damage, v30, v21):
    version, apply, message = BAD_EPISODES[damage]
    path = {"v30": v30, "v21": v21}[version]
    apply(path)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: episode 1: ")
    with pytest.warns(UserWarning, match="1 of [0-9]+ episodes are bad and left out"):
        kept = read(path, on_bad_episode="skip")
    assert kept.episode_names == ["0"]
    assert list(kept.skipped) == ["1"]
    for key, values in columns(kept).items():
        np.testing.assert_array_equal(values, columns(read(V30))[key][:LENGTH], err_msg=key)


def test_the_episode_after_a_bad_one_keeps_its_own_frames(read, v30):
    change_table(v30 / DATA, frame_index=[*reversed(range(LENGTH)), *range(LENGTH)])
    with pytest.warns(UserWarning, match="the first one is"):
        kept = read(v30, on_bad_episode="skip")
    np.testing.assert_array_equal(kept.observations["image"], read(V30).observations["image"][LENGTH:])


# A bad dataset.

BAD_DATASETS = {
    "no info": (lambda p: (p / INFO).unlink(), r"there is no file meta/info\.json: dataset\.path should be the folder"),
    "truncated info": (lambda p: cut(p / INFO), r"meta/info\.json is not JSON"),
    "nested info": (lambda p: (p / INFO).write_text("[" * 100_000), r"meta/info\.json is not JSON"),
    "info of another type": (
        lambda p: (p / INFO).write_text("[1]"),
        r"meta/info\.json must be a JSON object; got \[1\]",
    ),
    "old version": (
        lambda p: change_info(p, codebase_version="v1.6"),
        r"versions v2\.0, v2\.1, v3\.0 are read; codebase_version is 'v1\.6': convert it",
    ),
    "no version": (lambda p: change_info(p, codebase_version=None), "codebase_version is None"),
    "no rate": (lambda p: change_info(p, fps=0), r"meta/info\.json: fps must be a number above 0; got 0"),
    "rate is not finite": (lambda p: change_info(p, fps=float("nan")), "fps must be a number above 0; got nan"),
    "rate is text": (lambda p: change_info(p, fps="10"), "fps must be a number above 0"),
    "no features": (lambda p: change_info(p, features=[]), "features must state a dtype"),
    "no actions": (
        lambda p: change_info(p, features={KEY: {"dtype": "video", "shape": [96, 96, 3]}}),
        "there is no 'action': say which array holds the actions, dataset.action_key=NAME; there are no arrays",
    ),
    "only actions": (
        lambda p: change_info(p, features={"action": {"dtype": "float32", "shape": [2]}}),
        "there is no observation to train on",
    ),
    "a shape that is none": (lambda p: change_feature(p, "action", shape="2"), "shape of feature 'action' must be"),
    "another width": (
        lambda p: change_feature(p, "observation.state", shape=[4]),
        r"'observation\.state': 5 numbers are stored for each transition; expected 4",
    ),
    "another picture": (
        lambda p: change_feature(p, KEY, shape=[64, 64, 3]),
        r"'observation\.image': a picture has shape \(96, 96, 3\); meta/info\.json says \(64, 64, 3\)",
    ),
    "a feature without data": (
        lambda p: change_feature(p, "observation.force", dtype="float32", shape=[2]),
        r"data/chunk-000/file-000\.parquet has no column 'observation\.force'",
    ),
    "a feature without video": (
        lambda p: change_feature(p, "observation.wrist", dtype="video", shape=[96, 96, 3]),
        r"file-000\.parquet has no column 'videos/observation\.wrist/chunk_index'",
    ),
    "text under a number's name": (
        lambda p: change_table(p / DATA, action=["left", "right"] * LENGTH),
        "'action': its values are of type string, not numbers",
    ),
    "no place in the dataset": (lambda p: change_table(p / DATA, index=None), r"has no column 'index'"),
    "no episodes": (
        lambda p: (p / TABLE).unlink(),
        r"there is no file meta/episodes/chunk-000/file-000\.parquet",
    ),
    "truncated episodes": (lambda p: cut(p / TABLE), r"meta/episodes/chunk-000/file-000\.parquet is damaged"),
    "an episode twice": (
        lambda p: change_table(p / TABLE, episode_index=[0, 0]),
        "meta/episodes holds episode_index 0 twice",
    ),
    "an episode too few": (
        lambda p: change_info(p, total_episodes=3),
        r"meta/episodes holds 2 episodes, meta/info\.json says total_episodes=3: the dataset is not complete",
    ),
    "an offset that is none": (
        lambda p: change_table(p / TABLE, **{f"videos/{KEY}/from_timestamp": [0.0, float("inf")]}),
        "must be a time in seconds; got inf",
    ),
    "a negative length": (lambda p: change_table(p / TABLE, length=[24, -1]), "'length' must be a whole number"),
    "no data": (lambda p: (p / DATA).unlink(), r"episode 0: there is no file data/chunk-000/file-000\.parquet"),
    "truncated data": (lambda p: cut(p / DATA), r"episode 0: data/chunk-000/file-000\.parquet is damaged"),
    "no video": (lambda p: (p / VIDEO).unlink(), r"episode 0: 'observation\.image': there is no file videos/"),
    "truncated video": (
        lambda p: cut(p / VIDEO),
        r"episode 0: 'observation\.image': videos/.*file-000\.mp4 is damaged",
    ),
    "truncated tasks": (lambda p: cut(p / "meta" / "tasks.parquet"), r"meta/tasks\.parquet is damaged"),
    "a field that is none": (
        lambda p: change_info(p, data_path="data/{episode_index:06d}.parquet"),
        r"unknown field \{episode_index:06d\}; known: chunk_index, file_index",
    ),
    "data elsewhere": (
        lambda p: change_info(p, data_path="data/../../secret/{chunk_index}{file_index}.parquet"),
        "leaves the dataset's folder",
    ),
    "video elsewhere": (lambda p: change_info(p, video_path="/{video_key}/secret.mp4"), "leaves the dataset's folder"),
    "no video path": (lambda p: change_info(p, video_path=None), r"meta/info\.json has no video_path"),
    "unreadable split": (
        lambda p: change_info(p, splits={"train": "80%", "val": "20%"}),
        r"split 'train' must be a range of episodes such as '0:40'; got 80%",
    ),
    "splits that overlap": (
        lambda p: change_info(p, splits={"train": "0:2", "val": "1:2"}),
        "episode 1 is in the splits 'train' and 'val'",
    ),
    "empty split": (
        lambda p: change_info(p, splits={"train": "0:1", "val": "7:9"}),
        r"split 'val' \(7:9\) has none of the dataset's 2 episodes",
    ),
}


@pytest.mark.parametrize("damage", BAD_DATASETS)
def test_a_bad_dataset_is_one_clear_error(read, damage, v30):
    apply, message = BAD_DATASETS[damage]
    apply(v30)
    with pytest.raises(ValueError, match=message) as error:
        read(v30)
    assert str(error.value).startswith(f"{v30}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda p: (p / "meta" / "episodes.jsonl").unlink(), r"there is no file meta/episodes\.jsonl"),
        (lambda p: cut(p / "meta" / "episodes.jsonl", 0.8), r"meta/episodes\.jsonl, line 2 is not JSON"),
        (lambda p: change_lines(p / "meta" / "episodes.jsonl", 1, episode_index=0), "holds episode_index 0 twice"),
        (lambda p: change_lines(p / "meta" / "episodes.jsonl", 1, length="24"), "'length' must be a whole number"),
        (lambda p: change_info(p, chunks_size=0), "chunks_size must be 1 or more; got 0"),
        (lambda p: cut(p / "meta" / "tasks.jsonl"), r"meta/tasks\.jsonl, line 1 is not JSON"),
    ],
)
def test_a_bad_dataset_of_21_is_one_clear_error(read, v21, apply, message):
    apply(v21)
    with pytest.raises(ValueError, match=message) as error:
        read(v21)
    assert str(error.value).startswith(f"{v21}: ")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"subset": "trian"}, r"unknown split 'trian' \(did you mean 'train'\?\)"),
        (
            {"observation_keys": ["observation.stat"]},
            r"unknown observation key 'observation.stat' \(did you mean 'observation\.state'\?\)",
        ),
        ({"action_key": "actions"}, r"unknown action key 'actions' \(did you mean 'action'\?\)"),
        ({"action_key": KEY}, "unknown action key 'observation.image'"),
    ],
)
def test_what_is_not_there_is_named(read, asked, message):
    with pytest.raises(ValueError, match=message):
        read(V30, **asked)


def test_a_file_is_no_dataset(read):
    with pytest.raises(ValueError, match=r"there is no file meta/info\.json"):
        read(V30 / INFO)


def forge_size(png: bytes, size: int) -> bytes:
    """Make a small file that claims to be a large picture, and that Pillow would decode as such."""
    header = b"IHDR" + struct.pack(">II", size, size) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "picture at transition 5: it is missing"),
        ({"bytes": None, "path": None}, "there are no bytes, and no file None"),
        ({"bytes": None, "path": "../secret.png"}, r"no file \.\./secret\.png in the dataset's folder"),
        ({"bytes": b"GIF89a", "path": "a.png"}, "it cannot be decoded"),
        ({"bytes": "truncated", "path": None}, "it cannot be decoded"),
        ({"bytes": "small", "path": None}, r"a picture has shape \(8, 8, 3\)"),
        ({"bytes": "huge", "path": None}, r"a picture has shape \(10000, 10000, 3\)"),
        ({"bytes": "deep", "path": None}, "it is of mode I;16"),
    ],
)
def test_a_bad_picture_is_named(read, v30, tmp_path, cell, message):
    def png(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    good = png(Image.new("RGB", (96, 96)))
    (tmp_path / "secret.png").write_bytes(good)
    made = {
        "truncated": lambda: good[:-30],
        "small": lambda: png(Image.new("RGB", (8, 8))),
        "huge": lambda: forge_size(good, 10_000),
        "deep": lambda: png(Image.new("I;16", (96, 96))),
    }
    if cell and cell["bytes"] in made:
        cell = {**cell, "bytes": made[cell["bytes"]]()}
    cells = [{"bytes": good, "path": None}] * 48
    cells[5] = cell
    change_table(v30 / DATA, **{KEY: pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    change_feature(v30, KEY, dtype="image")
    with pytest.raises(ValueError, match=message) as error:
        read(v30)
    assert str(error.value).startswith(f"{v30}: episode 0: 'observation.image': picture at transition 5")


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile '{}'\n", "#EXTM3U\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"])
def test_a_playlist_leads_to_no_other_file(read, v21, tmp_path, text):
    outside = tmp_path / "outside.mp4"
    shutil.copyfile(v21 / VIDEO_21.format(0), outside)
    playlist = v21 / VIDEO_21.format(0)
    playlist.write_text(text.format(outside))
    with pytest.raises(ValueError, match=r"episode_000000\.mp4 is damaged"):
        read(v21)


@settings(deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from([INFO, TABLE, DATA, VIDEO, "meta/tasks.parquet"]),
    from_end=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 255)), min_size=1, max_size=6),
)
def test_flipped_bytes_end_in_a_valueerror_or_in_demonstrations(tmp_path_factory, name, from_end, flips):
    folder = tmp_path_factory.mktemp("fuzz")
    path = Path(shutil.copytree(V30, folder / "set"))
    content = bytearray((path / name).read_bytes())
    for position, change in flips:
        place = position % len(content)
        content[-1 - place if from_end else place] ^= change
    (path / name).write_bytes(content)
    try:
        demonstrations = read_demonstrations(format="lerobot", path=path, cache_dir=folder / "cache")
    except ValueError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        return
    assert demonstrations.episode_lengths.tolist() == [LENGTH, LENGTH]
    assert demonstrations.actions.shape == (2 * LENGTH, 2)
    assert all(len(values) == 2 * LENGTH for values in demonstrations.observations.values())
