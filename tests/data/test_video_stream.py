"""Frames that stay in their videos: the same pixels and batches as from the cache, whoever decodes them."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policy.data import stream
from policy.data.formats import lerobot
from policy.data.frames import Frames
from policy.data.groups import Groups
from policy.data.reading import read_demonstrations
from policy.data.windows import Windows
from policy.training.loop import batches_ahead

FPS, WIDTH, HEIGHT = 30, 64, 48
LENGTHS = (50, 1, 73, 34)
CAMERAS = ("observation.images.front", "observation.images.wrist")
TABLE = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/{}/chunk-000/file-000.mp4"
HERE = Path(__file__).parent


def write_video(file: Path, camera: int, key_interval: int, codec: str) -> None:
    """Encode moving content, each episode from a key frame on, as LeRobot joins the videos of episodes."""
    file.parent.mkdir(parents=True)
    generator = np.random.default_rng(camera)
    table = np.kron(generator.integers(0, 200, (HEIGHT // 8, WIDTH // 8, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": str(key_interval), "preset": PRESETS[codec]})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(sum(LENGTHS)):
            picture = table.copy()
            picture[number % 40 : number % 40 + 8, (3 * number) % 56 : (3 * number) % 56 + 8] = 5 * number % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


PRESETS = {"libx264": "ultrafast", "libsvtav1": "12"}


def write_set(root: Path, key_interval: int, codec: str) -> Path:
    for camera, key in enumerate(CAMERAS):
        write_video(root / VIDEO.format(key), camera, key_interval, codec)
    ends = np.cumsum(LENGTHS)
    total, firsts = int(ends[-1]), ends - LENGTHS
    generator = np.random.default_rng(0)
    places = {"index": np.arange(total), "episode_index": np.repeat(np.arange(len(LENGTHS)), LENGTHS)}
    places["frame_index"] = np.arange(total) - np.repeat(firsts, LENGTHS)
    vectors = {"observation.state": 3, "action": 2}
    rows = {key: list(generator.standard_normal((total, width)).astype(np.float32)) for key, width in vectors.items()}
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table({**places, **rows}), root / "data/chunk-000/file-000.parquet")
    zeros = np.zeros(len(LENGTHS), int)
    table = {"episode_index": np.arange(len(LENGTHS)), "length": LENGTHS}
    table |= {"data/chunk_index": zeros, "data/file_index": zeros}
    table |= {"dataset_from_index": firsts, "dataset_to_index": ends}
    for key in CAMERAS:
        table |= {f"videos/{key}/chunk_index": zeros, f"videos/{key}/file_index": zeros}
        table |= {f"videos/{key}/from_timestamp": firsts / FPS, f"videos/{key}/to_timestamp": ends / FPS}
    (root / TABLE).parent.mkdir(parents=True)
    pq.write_table(pa.table(table), root / TABLE)
    features = {key: {"dtype": "float32", "shape": [width]} for key, width in vectors.items()}
    features |= {key: {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]} for key in CAMERAS}
    info = {"codebase_version": "v3.0", "fps": FPS, "features": features, "total_episodes": len(LENGTHS)}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    info |= {"video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


SETS = {
    "key 2": (2, "libx264"),
    "key 30": (30, "libx264"),
    "AV1, key 2": (2, "libsvtav1"),
    "AV1, key 30": (30, "libsvtav1"),
}


@pytest.fixture(scope="module", params=SETS)
def dataset(request, tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "made", *SETS[request.param])


@pytest.fixture(scope="module")
def one_set(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("one") / "made", 30, "libx264")


@pytest.fixture
def read(tmp_path):
    def reader(path: Path, decode: str | None = "stream", **asked):
        return read_demonstrations(
            format="lerobot", path=path, decode=decode, cache_dir=tmp_path / "cache", **{"decode_workers": 0, **asked}
        )

    return reader


def windows_of(demonstrations, **asked) -> Windows:
    return Windows(
        demonstrations, np.arange(demonstrations.num_episodes), **{"obs_horizon": 2, "action_horizon": 4, **asked}
    )


def one_by_one(root: Path, key: str) -> np.ndarray:
    """All frames of a video, as PyAV itself converts each of them."""
    with av.open(str(root / VIDEO.format(key))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def drawn(windows: Windows, steps: range, batch_size: int = 16) -> list:
    return list(batches_ahead(windows, steps, lambda step: windows.batch_at(step, batch_size, 3)))


def assert_same(found, expected) -> None:
    for (numbers, batch), (others, other) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(numbers, others)
        assert batch["observations"].keys() == other["observations"].keys()
        for key, values in batch["observations"].items():
            assert torch.equal(values, other["observations"][key]), key
        assert torch.equal(batch["actions"], other["actions"])
        assert torch.equal(batch["mask"], other["mask"])


def test_pixels_are_those_of_frames_decoded_one_by_one(dataset, read):
    streamed, cached = read(dataset), read(dataset, "cache")
    for key in CAMERAS:
        name = key.removeprefix("observation.").replace(".", "/")
        frames, expected = streamed.observations[name], one_by_one(dataset, key)
        assert isinstance(frames, Frames)
        np.testing.assert_array_equal(cached.observations[name], expected)
        np.testing.assert_array_equal(frames[:], expected)
        rows = np.random.default_rng(0).integers(0, len(expected), (7, 2))
        np.testing.assert_array_equal(frames.take(rows), expected[rows])
    np.testing.assert_array_equal(streamed.observations["state"], cached.observations["state"])
    np.testing.assert_array_equal(streamed.actions, cached.actions)


@pytest.mark.parametrize("size", [None, 20])
def test_a_batch_is_that_of_the_cache(dataset, read, size):
    """The window numbers differ, and the content of each window is the same."""
    streamed, cached = (windows_of(read(dataset, decode, image_size=size)) for decode in ("stream", "cache"))
    found = drawn(streamed, range(20))
    assert_same(found, [(numbers, cached.gather(numbers)) for numbers, _ in found])
    assert_same(found, [(numbers, streamed.gather(numbers)) for numbers, _ in found])


def test_each_number_of_workers_draws_the_same_batches(one_set, read):
    expected = drawn(windows_of(read(one_set)), range(14))
    for workers in (1, 2):
        assert_same(drawn(windows_of(read(one_set, decode_workers=workers)), range(14)), expected)
    assert not multiprocessing.active_children()


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(one_set, read):
    expected = drawn(windows_of(read(one_set)), range(25))
    for first in (1, 7, 19):
        assert_same(drawn(windows_of(read(one_set)), range(first, 25)), expected[first:])


def test_counterparts_are_those_of_the_cache(one_set, read):
    """A symmetry of the pictures is applied to decoded frames; fitting normalisers decodes nothing."""

    def mirror(observations, actions):
        assert all(values.shape[-3:-1] == (HEIGHT, WIDTH) for key, values in observations.items() if "/" in key)
        return {k: v[..., ::-1, :] if "/" in k else -v for k, v in observations.items()}, -actions

    streamed, cached = (windows_of(read(one_set, decode), augment=mirror) for decode in ("stream", "cache"))
    found = drawn(streamed, range(15), 32)
    assert any((numbers >= streamed.num_transitions).any() for numbers, _ in found)
    assert_same(found, [(numbers, cached.gather(numbers)) for numbers, _ in found])
    for name in CAMERAS:
        (one_set / VIDEO.format(name)).rename(one_set / f"{name}.away")
    blocks = [
        [actions for _, actions in windows.blocks()]
        for windows in (windows_of(streamed.demonstrations, augment=mirror), cached)
    ]
    for name in CAMERAS:
        (one_set / f"{name}.away").rename(one_set / VIDEO.format(name))
    np.testing.assert_array_equal(*map(np.concatenate, blocks))


# The order.


@example(lengths=[61, 1, 31, 12, 1], obs_horizon=1, frame_bytes=4_000_000, batch=32)  # groups of one window
@example(lengths=[1] * 300, obs_horizon=1, frame_bytes=4_000_000, batch=40)  # of nothing else
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=12),
    obs_horizon=st.integers(1, 5),
    frame_bytes=st.sampled_from([100, 10_000, 4_000_000]),
    batch=st.integers(1, 40),
)
@settings(deadline=None, max_examples=40)
def test_an_epoch_has_each_window_once_and_groups_hold_their_frames(lengths, obs_horizon, frame_bytes, batch):
    ends = np.cumsum(lengths)
    starts = ends - lengths
    groups = Groups(starts, ends, obs_horizon, frame_bytes)
    episodes = np.repeat(np.arange(len(lengths)), lengths)
    numbers = groups.of(episodes, np.arange(ends[-1]))
    first, stop = groups.bounds(numbers)
    oldest = np.maximum(np.arange(ends[-1]) - obs_horizon + 1, starts[episodes])
    assert (first <= oldest).all()
    assert (np.arange(ends[-1]) < stop).all()
    assert (stop - first <= groups.rows).all()
    assert numbers.max() + 1 == len(groups)
    order = groups.shuffled(numbers, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(ends[-1]))
    # What memory is made for: the groups of a batch and of those behind it.
    for start in range(0, len(order) - batch, batch):
        assert len(set(numbers[order[start : start + batch]].tolist())) <= groups.needed(batch, stream.AHEAD)


def test_windows_of_a_batch_come_from_many_places():
    lengths = np.full(100, 400)
    groups = Groups(np.cumsum(lengths) - lengths, np.cumsum(lengths), 2, 2 * 640 * 480 * 3)
    numbers = groups.of(np.repeat(np.arange(100), 400), np.arange(40_000))
    order = groups.shuffled(numbers, np.random.default_rng(0))
    batch = order[64 * 50 : 64 * 51]
    assert len(set((batch // 400).tolist())) >= 12
    other = groups.shuffled(numbers, np.random.default_rng(1))
    assert len(set(order[:4000].tolist()) & set(other[:4000].tolist())) < 1000


# Memory and processes.


def test_memory_holds_a_bounded_number_of_groups_and_each_is_decoded_once(one_set, read, monkeypatch):
    windows = windows_of(read(one_set))
    monkeypatch.setattr(windows._groups, "spread", 4)
    decoded = []
    original = stream._Decoder.decode
    monkeypatch.setattr(stream._Decoder, "decode", lambda *task: decoded.append(task[1:]) or original(*task))
    slots = 4 + 2 + 3 * (8 // 30 + 1)
    found = drawn(windows, range(len(windows) // 8), 8)
    assert len(found) == 19
    assert max(slot for _, slot, _, _ in decoded) < slots
    assert len(decoded) == len(set((key, first) for key, _, first, _ in decoded)) == 2 * len(windows._groups)


def test_a_batch_with_more_groups_than_there_is_memory_for_is_one_sentence():
    ends = np.arange(1, 9)
    groups = Groups(ends - 1, ends, 1, 100)
    decoded = stream.DecodedGroups({"image": np.zeros((3, groups.rows, 2, 2, 3), np.uint8)}, groups, lambda *_: None)
    batches = decoded.ahead([("first", np.arange(3)), ("second", np.arange(4, 8))])
    assert next(batches)[0] == "first"
    with pytest.raises(ValueError, match="the 4 groups of frames of a batch do not fit into the memory for 3 of them"):
        next(batches)


def test_memory_that_is_not_there_is_asked_for_in_one_sentence(one_set, read, monkeypatch):
    monkeypatch.setattr(stream, "free_memory", lambda: 10_000)
    with pytest.raises(ValueError, match=r"decoded frames of the coming batches need .* 9.77 KiB are free: make them"):
        drawn(windows_of(read(one_set)), range(3))


def script(root: Path, cache: Path, tmp_path: Path, work: str) -> subprocess.Popen:
    text = f"""
    import numpy as np
    from pathlib import Path
    from policy.data.reading import read_demonstrations
    from policy.data.windows import Windows
    from policy.training.loop import batches_ahead
    if __name__ == "__main__":
        data = read_demonstrations(format="lerobot", path=Path({str(root)!r}), decode="stream", decode_workers=2,
                                   cache_dir=Path({str(cache)!r}))
        windows = Windows(data, np.arange(4), obs_horizon=2, action_horizon=4)
        for windows, _ in batches_ahead(windows, range(10**9), lambda step: windows.batch_at(step, 8, 0)):
            {work}
    """
    (tmp_path / "work.py").write_text(textwrap.dedent(text))
    command = [sys.executable, str(tmp_path / "work.py")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def group_of(pid: int) -> list[int]:
    """The processes of a process group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rsplit(") ", 1)[1].split()[:3]
        except (OSError, IndexError):
            continue
        if int(group) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(one_set, tmp_path, number):
    process = script(one_set, tmp_path / "cache", tmp_path, "print('drawn', flush=True)")
    assert process.stdout.readline() == "drawn\n"
    assert len(group_of(process.pid)) >= 3
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal sends it to all of them
    else:
        process.kill()
    _, said = process.communicate(timeout=20)
    assert said.count("Traceback") == (number == signal.SIGINT)  # the parent's own KeyboardInterrupt
    until = time.monotonic() + 10
    while group_of(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not group_of(process.pid)


# Bad input.


@pytest.fixture
def copy(one_set, tmp_path) -> Path:
    return Path(shutil.copytree(one_set, tmp_path / "made"))


def cut_video(root: Path, count: int) -> None:
    """Copy the first frames of a video in its place, whose header then tells of no more."""
    file = root / VIDEO.format(CAMERAS[1])
    with av.open(str(file)) as opened, av.open(str(root / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(opened.streams.video[0], opaque=True)
        for packet in [packet for packet in opened.demux(video=0) if packet.dts is not None][:count]:
            packet.stream = stream
            target.mux(packet)
    (root / "cut.mp4").replace(file)


def test_a_video_with_too_few_frames_is_named_before_training(copy, read):
    cut_video(copy, 130)
    said = (
        r"made: episode 3: 'observation.images.wrist': videos/.*/file-000.mp4 has 130 frames, and the episode's 34"
        r" frames end at 158: the video is not whole"
    )
    with pytest.raises(ValueError, match=said):
        read(copy)
    with pytest.warns(UserWarning, match="1 of 4 episodes are bad and left out"):
        assert read(copy, on_bad_episode="skip").num_episodes == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_behind_the_header_is_named_when_it_is_met(copy, read, workers):
    file = copy / VIDEO.format(CAMERAS[1])
    demonstrations = read(copy, decode_workers=workers)
    content = file.read_bytes()
    file.write_bytes(content[:2000] + b"\0" * (len(content) // 2) + content[2000 + len(content) // 2 :])
    said = r"episode \d, frames \d+ to \d+ of \d+ in .*made/videos/observation.images.wrist/.*mp4: .*; fetch the file"
    with pytest.raises(ValueError, match=said):
        drawn(windows_of(demonstrations), range(9))


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(one_set, read, tmp_path):
    with pytest.raises(ValueError, match=r"dataset.decode 'strem' .did you mean 'stream'"):
        read(one_set, "strem")
    for workers in (-1, 100_000):
        with pytest.raises(ValueError, match=rf"dataset.decode_workers must be within 0\.\.64; got {workers}"):
            read(one_set, decode_workers=workers)
    with pytest.raises(ValueError, match=r"dataset.transform needs whole episodes: use dataset.decode=cache"):
        read(one_set, transform=lambda observations: observations)
    with pytest.raises(ValueError, match=r"datasets of the format zarr have none: leave it out"):
        read_demonstrations(format="zarr", path=tmp_path, decode="stream")
    with pytest.raises(ValueError, match=r"dataset.decode=stream is for videos, and no observation is one"):
        read(one_set, observation_keys=["state"])


def test_large_sets_stay_in_their_videos_by_default(one_set, read, monkeypatch, tmp_path):
    assert not read(one_set, None).frames
    monkeypatch.setattr(lerobot, "STREAM_BYTES", 100_000)
    shutil.rmtree(tmp_path / "cache")
    assert len(read(one_set, None).frames) == 2
    written = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert written < 158 * (3 + 2) * 4 + 5000  # the vectors and the index
    shutil.rmtree(tmp_path / "cache")
    assert not read(one_set, None, image_size=8).frames  # small again
