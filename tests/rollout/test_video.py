"""Videos, read back by a decoder."""

import av
import numpy as np
import pytest

from policy.rollout.video import write_video


def frames(count, height, width):
    """A bright square that moves to the right over a dark ground."""
    pictures = np.full((count, height, width, 3), (20, 30, 60), np.uint8)
    for i, picture in enumerate(pictures):
        picture[4:20, 2 * i : 2 * i + 16] = (240, 220, 40)
    return list(pictures)


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return pictures, stream


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 96, (64, 96)), (65, 96, (64, 96)), (64, 97, (64, 96)), (65, 97, (64, 96))],
)
@pytest.mark.parametrize("count", [1, 2, 17])
def test_a_video_holds_every_frame_at_the_right_size(tmp_path, height, width, size, count):
    original = frames(count, height, width)
    write_video(tmp_path / "v.mp4", original, fps=10)
    pictures, _ = decode(tmp_path / "v.mp4")
    assert [picture.shape for picture in pictures] == [(*size, 3)] * count
    for picture, expected in zip(pictures, original, strict=True):
        # Lossy, but the same picture: also its colours and which way round it is.
        assert np.abs(picture.astype(int) - expected[: size[0], : size[1]]).mean() < 8


def test_the_frame_rate_and_the_codec_are_those_that_players_expect(tmp_path):
    write_video(tmp_path / "v.mp4", frames(30, 64, 64), fps=15)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 15
        assert container.duration / av.time_base == pytest.approx(2.0, abs=0.1)


def test_the_frames_are_not_changed_and_may_be_views(tmp_path):
    stack = np.stack(frames(5, 64, 64))
    before = stack.copy()
    write_video(tmp_path / "v.mp4", [picture[::-1, ::-1] for picture in stack], fps=10)
    np.testing.assert_array_equal(stack, before)
    pictures, _ = decode(tmp_path / "v.mp4")
    assert np.abs(pictures[0].astype(int) - before[0, ::-1, ::-1]).mean() < 8
