"""The sizes to which compressed chunks decode: stated by the codec, or counted before memory is taken."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import IO, Any

# A chunk that cannot grow beyond this is not counted: it fills no memory.
HARMLESS_BYTES = 2**26
# The most that one byte of each codec can become; the others have no such limit.
MOST_GROWTH = {"gzip": 1032, "zlib": 1032}
PIECE_BYTES = 2**20


def _blosc_sizes(content: bytes) -> tuple[int | None, int]:
    return int.from_bytes(content[4:8], "little"), int.from_bytes(content[12:16], "little")


def _lz4_sizes(content: bytes) -> tuple[int | None, int]:
    return int.from_bytes(content[:4], "little"), len(content)


def _gzip_sizes(content: bytes) -> tuple[int | None, int]:
    return int.from_bytes(content[-4:], "little"), len(content)


def _zstd_sizes(content: bytes) -> tuple[int | None, int]:
    """See RFC 8878, 3.1.1.1: the content's size follows the window's and the dictionary's descriptors."""
    if len(content) < 6:
        return None, len(content)
    flags = content[4]
    single = flags >> 5 & 1
    width = (single, 2, 4, 8)[flags >> 6]
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    size = int.from_bytes(content[start : start + width], "little") + (256 if width == 2 else 0)
    return (size if width else None), len(content)


# By codec: the number of bytes to which a compressed chunk decodes, None if it does not say, and its own size.
SIZES = {"blosc": _blosc_sizes, "lz4": _lz4_sizes, "gzip": _gzip_sizes, "zstd": _zstd_sizes}


def grows_beyond(codec: str, content: bytes, limit: int) -> bool:
    """Whether a chunk decodes to more bytes than it may, whatever it says of itself.

    Args:
        codec: name of the codec in lower letters.
        content: the compressed chunk.
        limit: the most bytes that the chunk may decode to; up to `HARMLESS_BYTES` are allowed anyway.

    Returns:
        False also for a codec that decodes into memory of the size it states, and for content that is no such stream.
    """
    limit = max(limit, HARMLESS_BYTES)
    states_size = codec == "zstd" and _zstd_sizes(content)[0] is not None
    if codec not in STREAMS or states_size or len(content) * MOST_GROWTH.get(codec, limit) <= limit:
        return False
    try:
        with STREAMS[codec](BytesIO(content)) as stream:
            while limit >= 0 and (piece := stream.read(PIECE_BYTES)):
                limit -= len(piece)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        return False  # the codec itself says what is wrong
    return limit < 0


class _Deflated:
    """A stream of zlib or gzip."""

    def __init__(self, file: IO[bytes]) -> None:
        self._stream, self._left = zlib.decompressobj(wbits=47), file.read()  # 47: whichever header it has

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end alone: a stream may hold nothing, and another one follow it."""
        piece = b""
        while self._left and not piece:
            piece = self._stream.decompress(self._left, size)
            self._left = self._stream.unconsumed_tail
            # gzip may hold several streams, one after the other, with zeros between them.
            if self._stream.eof and (following := self._stream.unused_data.lstrip(b"\0")):
                self._left, self._stream = following, zlib.decompressobj(wbits=47)
        return piece

    def __enter__(self) -> _Deflated:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _zstd_stream(file: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


STREAMS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": _Deflated,
    "zlib": _Deflated,
    "bz2": bz2.open,
    "lzma": lzma.open,
    "zstd": _zstd_stream,
}
