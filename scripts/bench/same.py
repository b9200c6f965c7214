"""Compare two checkouts of this project: does a user see the same files, to the byte?

    python -m scripts.bench.same BEFORE AFTER dataset.path=pusht_cchi_v7_replay.zarr.zip
    python -m scripts.bench.same BEFORE AFTER presets=[planar]

Each checkout runs its own scripts with its own `.venv` (where it has none: with the Python that runs this), on one
thread. For each preset both collect demonstrations, train 200 steps on those that BEFORE collected, roll out, and
sweep; the preset pusht_state needs `dataset.path`. Then AFTER goes on with the files that BEFORE wrote: it rolls its
checkpoint out, resumes its interrupted training, finishes its half-finished sweep, and concludes from its sweep again.
Both also load the golden checkpoints and sample actions from the same noise.

Not compared are measured times, and what a sweep concludes from them: where two cells succeed equally often, the faster
one counts as the best. `merge=` concludes again from times on disk, and there everything is compared. Pictures and the
report show times, so that only their names are compared; what commands print and hidden files (locks) are not compared
at all. Paths of the work folder are replaced by `WORK`. Everything written, with a `log.txt` of all commands and what
they printed, is in `outputs/same` of AFTER. Exit code 1 where anything differs.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from safetensors.torch import load, load_file

from scripts.bench.report import machine, write_report

# Where an interrupted training stops at the earliest: within the rectification, where a preset has one.
STEPS, INTERRUPTED = 200, 150
BRIEF = (
    "tracker=none",
    "num_envs=4",
    *("train.log_every=10", "train.val_every=50", "train.save_every=50"),
    *("train.rollout_every=100", "train.rollout_episodes=4"),
)
CHECKPOINT = "checkpoint=WORK/train/checkpoint"
ROLLOUT = ("episodes=10", "sampler.ddim_steps=4")
SWEEP = ("ddim_steps=[2,4,8]", "sampler.eta=[0.0,1.0]", "episodes=6", "workers=1", "videos=0")
# Each stage is a script with its settings, and writes to WORK/<stage>.
STAGES = {
    "rollout": ("rollout", CHECKPOINT, *ROLLOUT),
    "continuous": (
        *("rollout", CHECKPOINT, *ROLLOUT),
        *("controller.mode=continuous", "controller.delay_steps=1", "sampler.eta=0.5"),
    ),
    "sweep": ("sweep", CHECKPOINT, *SWEEP),
}
MEASURED = (
    *("latency_ms_median", "latency_ms_p90", "control_rate_hz", "latency_ms_p99", "latency_cpu_ms", "latency_quiet"),
    *("busy", "waiting_rate_hz", "planning_ahead_rate_hz"),
)
CONCLUDED = ("answer", "difference", "difference_low", "difference_high", "p_value")
NAME_ONLY = (".png", ".svg", ".html", ".mp4")
# Actions are of the order of 1: what float32 rounds differently may differ in the last bits.
ROUNDING = 1e-5

WHO = "import policy, torch, numpy; print(policy.__file__, torch.__version__, numpy.__version__, sep='\\n')"
GOLDEN = """
import sys, torch
from safetensors.torch import load_file, save_file
from policy import load_checkpoint
given, loaded = load_file(sys.argv[1] + ".golden.safetensors"), load_checkpoint(sys.argv[1]).policy
def sample(eta):
    generator = torch.Generator().manual_seed(0)
    noise, observations = given["noise"], {"state": given["observations"]}
    return loaded.sample_actions(observations, ddim_steps=8, eta=eta, noise=noise, generator=generator)
save_file({f"eta={eta}": sample(eta) for eta in (0.0, 0.5, 1.0)}, sys.argv[2])
"""

Row = dict[str, str]
Settings = tuple[str, ...]


# Overrides of `scripts/collect.py` (none where the demonstrations are given) and of `scripts/train.py`.
PRESETS: dict[str, tuple[Settings, Settings]] = {
    "planar": (("env=planar", "episodes=100"), (f"train.steps={STEPS}",)),
    "metaworld": (("env=metaworld", "env.task=pick-place-v3", "episodes=10"), (f"train.steps={STEPS}",)),
    "pusht_state": ((), (f"train.steps={INTERRUPTED}", f"train.rectify_steps={STEPS - INTERRUPTED}")),
}


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """One of the two checkouts, at work on one preset.

    Attributes:
        path: the checkout.
        work: the folder that it writes to.
    """

    path: Path
    work: Path

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Python in the checkout, its own packages before any that are installed; output goes to `log.txt`."""
        own = self.path / ".venv/bin/python"
        python = str(own) if own.exists() else sys.executable
        command = [python, *(argument.replace("WORK", str(self.work)) for argument in arguments)]
        env = {**os.environ, "PYTHONPATH": str(self.path), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "log.txt").open("a") as log:
            print("$", *command, file=log, flush=True)
            return subprocess.Popen(command, cwd=self.path, env=env, stdout=log, stderr=subprocess.STDOUT)

    def run(self, *arguments: str) -> None:
        """Run Python in the checkout; what fails ends the comparison."""
        if code := self.start(*arguments).wait():
            log = self.work / "log.txt"
            raise subprocess.CalledProcessError(code, f"{arguments} in {self.path}", output=log.read_text()[-2000:])

    def stage(self, name: str, script: str, *settings: str) -> Path:
        """Run a script that writes to the folder of that name, and give the folder."""
        self.run(f"scripts/{script}.py", *settings, f"output_dir=WORK/{name}")
        return self.work / name


def main() -> None:
    """Run the comparison; exit code 1 where the checkouts differ."""
    folders, settings = _arguments(sys.argv[1:])
    work = folders[1] / "outputs/same"
    shutil.rmtree(work, ignore_errors=True)
    before = Checkout(path=folders[0], work=work / "before")
    after = Checkout(path=folders[1], work=work / "after")
    print(machine())
    for side in (before, after):
        _introduce(side)
    rows, began = [], time.perf_counter()
    try:
        for row in _all_rows(before, after, settings):
            rows.append(row)
            print(f"{time.perf_counter() - began:4.0f} s  " + ": ".join(filter(None, row.values())), flush=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.output}\n{error}")
    write_report("same", rows)
    if differing := sum(row["result"] != "same" for row in rows):
        sys.exit(f"{differing} of {len(rows)} comparisons differ: the files are in {work}")


def _arguments(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    folders = [Path(argument).resolve() for argument in arguments if "=" not in argument]
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(folders) != 2 or settings.keys() - {"dataset.path", "presets"} or set(_chosen(settings)) - set(PRESETS):
        usage = f"BEFORE AFTER [dataset.path=PUSHT.zarr.zip] [presets=[{','.join(PRESETS)}]]"
        sys.exit(f"usage: python -m scripts.bench.same {usage}; got {arguments}")
    return folders, settings


def _chosen(settings: Mapping[str, str]) -> list[str]:
    return settings["presets"].strip("[]").split(",") if "presets" in settings else list(PRESETS)


def _introduce(side: Checkout) -> None:
    """Say what a checkout runs with, and make sure that it runs its own code."""
    side.run("-c", WHO)
    file, torch, numpy = (side.work / "log.txt").read_text().split()[-3:]
    if Path(file) != side.path / "policy/__init__.py":
        sys.exit(f"{side.path} imports policy from {file}, not its own")
    print(f"{side.work.name}: {side.path}, torch {torch}, numpy {numpy}")


def _all_rows(before: Checkout, after: Checkout, settings: Mapping[str, str]) -> Iterator[Row]:
    yield from _golden(before, after)
    for name in _chosen(settings):
        collect, training = PRESETS[name]
        one, other = (replace(side, work=side.work / name) for side in (before, after))
        if collect:
            folders = _both(one, other, "collect", ("collect", *collect))
            yield {"preset": name, **_row("collect", *folders)}
            given = next(path for path in folders[0].iterdir() if path.is_dir())
        elif "dataset.path" in settings:
            given = Path(settings["dataset.path"]).resolve()
        else:
            print(f"{name}: not compared without dataset.path=...")
            continue
        training = (f"experiment={name}", *training, *BRIEF, f"dataset.path={given}", "dataset.cache_dir=WORK/cache")
        for row in chain(_side_by_side(one, other, training), _handed_over(one, other, training)):
            yield {"preset": name, **row}


def _golden(before: Checkout, after: Checkout) -> Iterator[Row]:
    for folder in sorted((before.path / "tests/data").glob("checkpoint_schema?")):
        for side in (before, after):
            side.run("-c", GOLDEN, str(folder), f"WORK/{folder.name}.safetensors")
        ours, theirs = (load_file(side.work / f"{folder.name}.safetensors") for side in (before, after))
        largest = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
        result = "same" if largest <= ROUNDING else "differs"
        where = f"largest difference of an action: {largest:.2g}"
        yield {"preset": "golden", "what": f"actions of {folder.name}", "result": result, "files": "", "where": where}


def _side_by_side(before: Checkout, after: Checkout, training: Settings) -> Iterator[Row]:
    """What each side does on its own."""
    yield _row("train", *_both(before, after, "train", ("train", *training)))
    entries = [next((side.work / "cache").iterdir()) for side in (before, after)]
    yield _row("cached demonstrations", *entries)
    # A new name would cost a user another conversion.
    ours, theirs = (entry.name for entry in entries)
    result, where = ("same", "") if ours == theirs else ("differs", f"{ours} is now {theirs}")
    yield {"what": "name of the cached demonstrations", "result": result, "files": "", "where": where}
    for name, stage in STAGES.items():
        yield _row(name, *_both(before, after, name, stage))


def _handed_over(before: Checkout, after: Checkout, training: Settings) -> Iterator[Row]:
    """What AFTER makes of the files that BEFORE wrote, beside what BEFORE made of them."""
    checkpoint = CHECKPOINT.replace("WORK", str(before.work))
    rolled_out = after.stage("handed_over", "rollout", checkpoint, *ROLLOUT)
    yield _row("rollout of BEFORE's checkpoint", before.work / "rollout", rolled_out)

    step = _interrupt(before, training)
    after.run("scripts/train.py", *training, f"output_dir={before.work}/interrupted")
    whole, resumed = (before.work / name / "checkpoint" for name in ("train", "interrupted"))
    yield _row(f"BEFORE's training, resumed at step {step}", whole, resumed)

    ledger = (before.work / "sweep/episodes.jsonl").read_text().splitlines(keepends=True)
    (after.work / "finished").mkdir()
    (after.work / "finished/episodes.jsonl").write_text("".join(ledger[: len(ledger) // 2]))
    finished = after.stage("finished", "sweep", checkpoint, *SWEEP)
    yield _row("BEFORE's sweep, half-finished", before.work / "sweep", finished)

    merged = after.stage("merged", "sweep", f"merge=[{before.work}/sweep]")
    yield _row("BEFORE's sweep, concluded again", before.work / "sweep", merged, times=True)


def _both(before: Checkout, after: Checkout, name: str, stage: Settings) -> list[Path]:
    """Run a stage in both checkouts, side by side."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda side: side.stage(name, *stage), (before, after)))


def _interrupt(side: Checkout, training: Settings) -> int:
    """Interrupt a training after its checkpoint at step 150; gives the step at which it stopped."""
    process = side.start("scripts/train.py", *training, "output_dir=WORK/interrupted")
    record = side.work / "interrupted/checkpoint/training.json"
    while process.poll() is None and _step(record) < INTERRUPTED:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait()
    if not 0 < (step := _step(record)) < STEPS:
        sys.exit(f"a training in {side.path} was to stop before step {STEPS}, and stopped at {step}")
    return step


def _step(record: Path) -> int:
    try:
        return int(json.loads(record.read_text())["step"])
    except FileNotFoundError:  # not yet, or just being replaced
        return 0


def _row(what: str, ours: Path, theirs: Path, *, times: bool = False) -> Row:
    """Compare two folders; with `times` only the files in both, measured times and all."""
    names, others = _files(ours), _files(theirs)
    # Checksums last: they differ because another file does.
    compared = sorted(names & others, key=lambda name: (name.endswith("checksums.json"), name))
    found = [f"{name}: only on one side" for name in sorted(names ^ others) if not times]
    for name in compared:
        if Path(name).suffix not in NAME_ONLY and (where := _first_difference(ours / name, theirs / name, times)):
            found.append(f"{name}: {where}")
    if not compared:
        found.append("no file to compare")
    more = f" (and {len(found) - 1} more files)" if len(found) > 1 else ""
    read = dict.fromkeys(Path(name).name for name in compared if Path(name).suffix not in NAME_ONLY)
    where = found[0] + more if found else ""
    return {"what": what, "result": "differs" if found else "same", "files": ", ".join(read), "where": where}


def _files(folder: Path) -> set[str]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in files if not any(part.startswith(".") for part in path.parts)}


def _first_difference(ours: Path, theirs: Path, times: bool) -> str:
    a, b = (_normalized(file, times) for file in (ours, theirs))
    if a == b:
        return ""
    if ours.suffix == ".safetensors":
        x, y = load(a), load(b)
        if unequal := sorted(x.keys() ^ y.keys()) or [key for key in x if x[key].shape != y[key].shape]:
            return f"{unequal[0]} is on one side only, or of another shape"
        key = next((key for key in x if not x[key].equal(y[key])), None)
        return f"{key} by up to {(x[key] - y[key]).abs().max().item():.2g}" if key else "same tensors, other bytes"
    at = next((n for n, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
    shown = slice(max(0, at - 30), at + 30)
    return f"byte {at}: {a[shown]!r} is now {b[shown]!r}"


def _normalized(file: Path, times: bool) -> bytes:
    """The file's bytes without paths of the work folder and, unless asked for, without times."""
    content = file.read_bytes()
    if file.suffix not in (".json", ".jsonl", ".csv", ".txt"):
        return content
    text = re.sub(r"/[^\s\",]*/outputs/same/(before|after)/\w+", "WORK", content.decode())
    fields = () if times else (*MEASURED, *CONCLUDED)
    if file.name == "sweep.csv" and fields:
        rows = csv.DictReader(io.StringIO(text))
        text = json.dumps([{key: "" if key in fields else value for key, value in row.items()} for row in rows])
    elif file.suffix == ".jsonl":  # in the order in which episodes ended
        text = "".join(sorted(text.splitlines(keepends=True)))
    elif fields:
        text = re.sub(rf'"({"|".join(fields)})": ("(\\.|[^"\\])*"|[^\s,}}]+)', r'"\1": ""', text)
    return text.encode()


if __name__ == "__main__":
    main()
