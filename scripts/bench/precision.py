"""Training steps a second with `train.precision=bfloat16` beside float32, on one thread of the CPU.

    python -m scripts.bench.precision

Both train in turns, with the same batches. A product as a step has it is timed alone, too: a step, which does more than
products, gains less.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, get_args, get_type_hints

import torch

from policy import TrainSettings
from scripts.bench.kept_rows import KeptRows, Row
from scripts.bench.train import NETWORKS, prepared, timed

PRECISIONS = get_args(get_type_hints(TrainSettings)["precision"])
TURNS, PRODUCTS = 7, 20
# Rows, inner size and columns of a product in the forward pass of the default network, with batches of 256.
PRODUCT = (256, 256, 1024)


def main() -> None:
    """Run the benchmark; the same command goes on where it was stopped."""
    torch.set_num_threads(1)
    with KeptRows("precision", measurements=1 + len(NETWORKS)) as rows:
        rows.measure({"network": "a product alone"}, partial(_row, "a product alone", _products))
        for name in NETWORKS:
            rows.measure({"network": name}, partial(_row, name, partial(_training, name)))
    rows.report()


def _row(name: str, made: Callable[[str], Callable[[], float]]) -> Iterator[Row]:
    """One row, of all turns."""
    load = os.getloadavg()[0]
    taken = {precision: made(precision) for precision in PRECISIONS}
    turns = [{precision: take() for precision, take in taken.items()} for _ in range(1 + TURNS)]
    del turns[0]  # it warms up
    ratios = [turn["float32"] / turn["bfloat16"] for turn in turns]
    yield {
        "network": name,
        **{f"{precision}_ms": 1e3 * median(turn[precision] for turn in turns) for precision in PRECISIONS},
        "times_faster": median(ratios),
        "from": min(ratios),
        "to": max(ratios),
        "load_before": load,
        "load_after": os.getloadavg()[0],
    }


def _products(precision: str) -> Callable[[], float]:
    """Seconds of a product."""
    rows, inner, columns = PRODUCT
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, inner), (inner, columns)
    left, right = (torch.randn(shape, generator=generator).to(getattr(torch, precision)) for shape in shapes)

    def take() -> float:
        began = time.perf_counter()
        for _ in range(PRODUCTS):
            left @ right
        return (time.perf_counter() - began) / PRODUCTS

    return take


def _training(name: str, precision: Any) -> Callable[[], float]:
    """Seconds of a training step."""
    overrides, batch_size, steps = NETWORKS[name]
    settings = TrainSettings(steps=10**6, batch_size=batch_size, log_every=10**6, val_fraction=0.0, precision=precision)
    run = prepared(overrides, settings)

    def take() -> float:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            return timed(run, settings, steps)["wall"] / steps

    return take


if __name__ == "__main__":
    main()
