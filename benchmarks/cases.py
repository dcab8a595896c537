"""Tests that may take their process with them: what came of each is a line of a file at once, and the next process goes on after.

    python -m benchmarks.cases FILE [--part I/N] -- PYTEST ARGUMENTS

A kernel that hangs, or that reads where it may not, ends its process or every later call of it. So a test is written down before it
runs and after; one that was begun is not run again, and where the CUDA context no longer answers the process ends with BROKEN. The
exit code is 1 where any test in the file failed or did not end, 0 where none did.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

BROKEN = 70  # the exit code of a process whose CUDA context is lost
KILLED = "did not end"  # what came of a test that hung, or ended its process
OUTCOMES = ("passed", "failed", "skipped", KILLED, "not run")


class Cases:
    """A plugin of pytest: the I-th of every N tests, without those of the file; each outcome a line of the file."""

    def __init__(self, path: Path, part: tuple[int, int] = (0, 1)):
        self._path, self._part, self._begun = path, part, set(outcomes(path))
        self._failed = False  # the test that runs, so far

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, config, items) -> None:
        index, parts = self._part
        mine = [item for i, item in enumerate(sorted(items, key=_last)) if i % parts == index]
        left = [item for item in mine if item.nodeid not in self._begun]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left
        if left and not self._begun:
            self._write({"collected": len(mine)})

    def pytest_runtest_logstart(self, nodeid) -> None:
        self._failed = False
        self._write({"case": nodeid})

    def pytest_runtest_logreport(self, report) -> None:
        self._failed |= report.failed
        if report.when == "call" or report.outcome != "passed":
            said = report.longrepr[-1] if isinstance(report.longrepr, tuple) else _why(report)
            self._write({"case": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "why": said})

    def pytest_runtest_logfinish(self, nodeid) -> None:
        if self._failed and not _context_answers():
            pytest.exit("the CUDA context is lost", BROKEN)

    def _write(self, line: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _last(item) -> bool:
    """Hopper's kernel waits for barriers in memory: what can hang comes after what cannot."""
    return "sm90a" in item.nodeid or "hopper" in item.nodeid


def _why(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    said = crash.message if crash else str(report.longrepr or "")
    return next((line for line in said.splitlines() if line.strip()), "")[:300]


def _context_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def outcomes(path: Path) -> dict[str, tuple[str, str]]:
    """What came of each test of a file, and why."""
    found: dict[str, tuple[str, str]] = {}
    for line in _lines(path):
        if "case" in line:
            former = found.get(line["case"], (KILLED, ""))
            now = line.get("outcome", KILLED), line.get("why", "")
            found[line["case"]] = former if former[0] == "failed" else now
    return found


def count(paths: Iterable[Path]) -> dict[str, int]:
    """How many tests of all the files came to what."""
    paths = list(paths)
    found = Counter(outcome for path in paths for outcome, _ in outcomes(path).values())
    collected = sum(line.get("collected", 0) for path in paths for line in _lines(path))
    found["not run"] = max(0, collected - sum(found.values()))
    return {name: found[name] for name in OUTCOMES}


def _lines(path: Path) -> list[dict]:
    """Whole lines alone: a process may have ended within the last."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.endswith("}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--part", default="0/1", metavar="I/N", help="the tests numbered I, I + N, I + 2 N, ... from 0")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # the rest is pytest's
    args = parser.parse_args(sys.argv[1:cut])
    index, parts = map(int, args.part.split("/"))
    args.file.parent.mkdir(parents=True, exist_ok=True)
    code = int(pytest.main(sys.argv[cut + 1 :], plugins=[Cases(args.file, (index, parts))]))
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        return code
    return int(any(outcome in ("failed", KILLED) for outcome, _ in outcomes(args.file).values()))


if __name__ == "__main__":
    sys.exit(main())
