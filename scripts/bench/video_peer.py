"""LeRobot's own dataset class in a PyTorch DataLoader, timed on request; it runs with a Python that holds `lerobot`.

    python scripts/bench/video_peer.py DATASET BATCH OBS_HORIZON WORKERS FPS KEY...

Each line on the standard input is a number of batches; the answer is the seconds that they took. The first answer,
without a question, says what decodes.
"""

import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader

BUFFERED = 12  # batches that its workers made while nobody was waiting: they are not timed


def main() -> None:
    """Answer until the standard input ends."""
    from lerobot import __version__
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    folder, batch, horizon, workers, fps, *keys = sys.argv[1:]
    torch.set_num_threads(1)
    backend = _backend()
    past = [-n / float(fps) for n in reversed(range(int(horizon)))]
    dataset = LeRobotDataset(
        "local/made_up",
        root=Path(folder),
        delta_timestamps={key: past for key in keys},
        video_backend=backend,
    )
    loader = DataLoader(
        dataset,
        int(batch),
        shuffle=True,
        num_workers=int(workers),
        drop_last=True,
        generator=torch.Generator().manual_seed(0),
    )
    print(f"lerobot {__version__}, {backend}", flush=True)
    batches = _endless(loader)
    for line in sys.stdin:
        for _ in range(BUFFERED):
            next(batches)
        began = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        print(time.perf_counter() - began, flush=True)


def _endless(loader: DataLoader):  # type: ignore[no-untyped-def]
    while True:
        yield from loader


def _backend() -> str:
    """What LeRobot decodes with by default, or PyAV where torchcodec finds no FFmpeg."""
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception as error:
        warnings.warn(f"torchcodec does not work here: {error!s:.200}", stacklevel=1)
        return "pyav"
    return "torchcodec"


if __name__ == "__main__":
    main()
