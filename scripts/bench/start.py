"""How long a command takes to answer: CPU seconds of `--help`, of a misspelt setting, and of `import policy`.

    python -m scripts.bench.start

Each row is a process of its own. It runs once uncounted (so that Python's files are compiled and in memory) and then
five times, in turns with the others. CPU seconds are what the kernel counts for the process, user and system, with all
its threads and children. `floor` is the ratio to a Python that does nothing, timed in the same turns. The heaviest
imports come from one more run, under `python -X importtime`: the time spent in a package's own modules (without those
that they import), summed up by the name before the first dot.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.kept_rows import KeptRows
from scripts.bench.report import write_report

ROOT = Path(__file__).resolve().parents[2]
RUNS = 5
HEAVIEST = 5
# Settings with a typing mistake; the other commands get the last one.
MISSPELT = {
    "ddim-train": "denoiser.hiden_size=3",
    "ddim-rollout": "sampler.ddim_step=3",
    "ddim-export": "sampler.ddim_step=3",
}
MISSPELT_ELSEWHERE = "epsiodes=3"
IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", re.MULTILINE)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A process to time.

    Attributes:
        name: what a user types.
        code: what Python runs.
        arguments: of the command.
        expected: what its output contains if it answers what was asked.
    """

    name: str
    code: str
    arguments: tuple[str, ...] = ()
    expected: str = ""


def main() -> None:
    """Run the benchmark."""
    floor = Case(name="python -c pass", code="pass")
    cases = [floor, Case(name='python -c "import policy"', code="import policy"), *_commands()]
    with KeptRows("start_turns", measurements=RUNS) as turns:
        answers = {case: _run(case)[1] for case in cases}
        times: dict[str, list[float]] = {case.name: [] for case in cases}
        for turn in range(RUNS):
            for row in turns.measure({"turn": turn}, lambda: ({"process": c.name, "cpu_s": _run(c)[0]} for c in cases)):
                times[row["process"]].append(row["cpu_s"])
    bare = median(times[floor.name])
    write_report("start", [_row(case, times[case.name], bare, answers[case]) for case in cases])


def _commands() -> list[Case]:
    """Each console command of the project, with `--help` and with a misspelt setting."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cases = []
    for command, place in sorted(project["scripts"].items()):
        module, function = place.split(":")
        code = f"import sys; from {module} import {function}; sys.exit({function}())"  # as the installed command does
        setting = MISSPELT.get(command, MISSPELT_ELSEWHERE)
        name = setting.split("=")[0].split(".")[-1]
        cases.append(Case(name=f"{command} --help", code=code, arguments=("--help",), expected="Example"))
        cases.append(Case(name=f"{command} {setting}", code=code, arguments=(setting,), expected=name))
    return cases


def _run(case: Case, *options: str) -> tuple[float, str]:
    """Run a case to its end; gives its CPU seconds and its output, errors included."""
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, *options, "-c", case.code, *case.arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return usage.ru_utime + usage.ru_stime, output.read()


def _row(case: Case, times: list[float], bare: float, answer: str) -> Row:
    modules = [(name, int(microseconds)) for microseconds, name in IMPORT.findall(_run(case, "-X", "importtime")[1])]
    packages: Counter[str] = Counter()
    for name, microseconds in modules:
        packages[name.split(".")[0]] += microseconds
    heaviest = packages.most_common(HEAVIEST)
    return {
        "process": case.name,
        "cpu_s": median(times),
        "from": min(times),
        "to": max(times),
        "floor": median(times) / bare,
        "answers": "yes" if case.expected in answer and "Traceback" not in answer else "no",
        "torch": "yes" if "torch" in packages else "no",
        "modules": len(modules),
        "heaviest imports (ms)": ", ".join(f"{name} {microseconds / 1e3:.0f}" for name, microseconds in heaviest),
    }


if __name__ == "__main__":
    main()
