"""Commands against the clock: each with a limit of its own and all within a deadline, what hangs killed with its children, and what
came of each told at once. Of Python's own library alone, since the first command may be what builds the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

RUNNING, PASSED, FAILED, HUNG, LATE, NOT_RUN = "running", "passed", "failed", "hung", "out of time", "not run"
LEAST = 5.0  # seconds that must be left for a step to begin


@dataclass(frozen=True)
class Step:
    """A command and what it may take, in seconds.

    estimate: what it is reckoned to take. limit: the most. still: the most without a sign of life, which is a byte more in its log
    or in ``grows``; None for any. again: where it ends by a signal, a hang or an exit code that is neither 0 nor 1, after ``grows``
    has grown, it is run again within its limit, and must go on where it was."""

    name: str  # also of its log, so of letters, digits and -_. alone
    command: Sequence[str | os.PathLike]
    estimate: float
    limit: float
    still: float | None = None
    grows: Path | None = None
    again: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None  # that of all steps by default


@dataclass
class Record:
    """What came of a step: result is one of the names above; last the last line that it wrote; runs how often it was begun."""

    result: str = RUNNING
    exit: int | None = None
    seconds: float = 0.0
    estimate: float = 0.0
    last: str = ""
    runs: int = 0


class Steps:
    """Runs steps in the order given; ``records`` holds what came of each so far, and ``told`` is called whenever one changes.

    deadline: by time.monotonic(), the end of everything. Ctrl-C and SystemExit end what runs, and are raised again."""

    def __init__(self, logs: Path, cwd: Path, deadline: float, told: Callable[[], object] = lambda: None):
        self.records: dict[str, Record] = {}
        self.told = told
        self._logs, self._cwd, self._deadline = logs, cwd, deadline

    def left(self) -> float:
        return self._deadline - time.monotonic()

    def run(self, steps: Sequence[Step], beside: int = 1) -> list[Record]:
        """So many at a time; returns their records, in order. One for which no time is left is not run."""
        waiting, running = deque(steps), []
        try:
            while (waiting or running) and self.left() > 0:
                while waiting and len(running) < beside:
                    step = waiting.popleft()
                    if self.left() < LEAST:
                        self.skip([step])
                    else:
                        running.append(self._waiting(step))  # before it starts, so that it is killed whenever this is left
                        self._start(running[-1])
                running = [one for one in running if not self._ended(one)]
                time.sleep(0.05 if running else 0)
        finally:
            _kill(*(one.process for one in running if one.process))
            for one in running:
                self._close(one, FAILED if self.left() > 0 else LATE)
        self.skip(waiting)
        return [self.records[step.name] for step in steps]

    def skip(self, steps: Iterable[Step], why: str = "") -> None:
        for step in steps:
            self.records[step.name] = Record(NOT_RUN, estimate=step.estimate, last=why)
        self.told()

    def _waiting(self, step: Step) -> _Running:
        self._logs.mkdir(parents=True, exist_ok=True)
        self.records[step.name] = Record(estimate=step.estimate)
        log = self._logs / f"{step.name}.log"
        for former in (log, step.grows):
            if former:
                former.unlink(missing_ok=True)
        return _Running(step, log, time.monotonic())

    def _start(self, one: _Running) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **one.step.env}
        one.size, one.seen, one.at_start = one.signs(), time.monotonic(), _size(one.step.grows)  # before it can have grown
        with one.log.open("ab") as out:
            one.process = subprocess.Popen(
                one.step.command,
                cwd=one.step.cwd or self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
            )
        self.records[one.step.name].runs += 1
        self.told()

    def _ended(self, one: _Running) -> bool:
        now, step = time.monotonic(), one.step
        if (code := one.process.poll()) is None:
            if (size := one.signs()) != one.size:
                one.size, one.seen = size, now
            if now - one.begun > step.limit:
                result = LATE
            elif step.still is not None and now - one.seen > step.still:
                result = HUNG
            else:
                return False
        else:
            result = PASSED if code == 0 else FAILED
        _kill(one.process)  # also what a step that ended has left running
        one.worst = one.worst or (result, one.process.returncode) if result != PASSED else one.worst
        got_on = _size(step.grows) > one.at_start
        if step.again and got_on and code not in (0, 1) and result != LATE and self.left() > LEAST:
            with one.log.open("a") as out:
                out.write(f"\n-- {result}, exit {one.process.returncode}: begun again --\n")
            self._start(one)
            return False
        self._close(one, result)
        return True

    def _close(self, one: _Running, result: str) -> None:
        record = self.records[one.step.name]
        record.result, record.exit = one.worst or (result, one.process and one.process.returncode)
        record.seconds = round(time.monotonic() - one.begun, 1)
        record.last = last_line(one.log)
        self.told()


@dataclass
class _Running:
    step: Step
    log: Path
    begun: float
    process: subprocess.Popen | None = None
    size: int = 0  # of its signs of life, and when they last grew
    seen: float = 0.0
    at_start: int = 0
    worst: tuple[str, int | None] | None = None  # what the first run that did not pass came to

    def signs(self) -> int:
        return _size(self.log) + _size(self.step.grows)


def last_line(log: Path) -> str:
    """The last line that says something."""
    with suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, _size(log) - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[-500:]
    return ""


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path else 0
    except FileNotFoundError:
        return 0


def _kill(*processes: subprocess.Popen) -> None:
    """Ends the processes and all that they started but what made a session of its own; waits for them, though no more than a moment
    for all together: a process that the system cannot end, as one whose GPU hangs, is left."""
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0, end - time.monotonic()))
