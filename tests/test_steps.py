"""Commands against the clock, which the GPU's evidence is made by: what hangs, crashes or comes late costs no more than itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cases, gpu_evidence
from benchmarks.steps import FAILED, HUNG, LATE, NOT_RUN, PASSED, Step, Steps, last_line

ROOT = Path(__file__).resolve().parents[1]


def python(name: str, code: str, limit: float = 20, **options) -> Step:
    return Step(name, [sys.executable, "-c", code], 1, limit, **options)


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether the process ends in a moment; a zombie, which waits for its parent, has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def runner(tmp_path):
    return lambda seconds=60.0: Steps(tmp_path / "logs", tmp_path, time.monotonic() + seconds)


def test_what_ends_is_told_by_its_exit_code(runner):
    run = runner()
    code = "import os, sys; print('said'); print('last', file=sys.stderr); os.{}"
    steps = [python(name, code.format(how)) for name, how in
             (("good", "_exit(0)"), ("bad", "_exit(3)"), ("crashed", "abort()"))]  # fmt: skip
    good, bad, crashed = run.run(steps)
    assert (good.result, good.exit, good.last) == (PASSED, 0, "said") or good.last == "last"
    assert (bad.result, bad.exit) == (FAILED, 3) and (crashed.result, crashed.exit) == (FAILED, -signal.SIGABRT)


@pytest.mark.parametrize("how", ["signs", "limit", "ends"])
def test_a_step_takes_its_children_with_it(how, runner, tmp_path):
    """One that shows no sign of life, one over its limit, and one that ends and leaves a child running."""
    code = f"""import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
print("begun", flush=True)
while {how == "limit"}: print(".", flush=True); time.sleep(0.05)
time.sleep({0 if how == "ends" else 600})"""
    begin = time.monotonic()
    (record,) = runner().run([python("step", code, 1.5 if how == "limit" else 20, still=1.5 if how == "signs" else None)])
    assert record.result == {"signs": HUNG, "limit": LATE, "ends": PASSED}[how]
    assert time.monotonic() - begin < 15 and gone(int((tmp_path / "child").read_text()))


def test_what_grows_is_a_sign_of_life(runner, tmp_path):
    rows = tmp_path / "rows"
    code = f"import time\nfor _ in range(8): time.sleep(0.25); open({str(rows)!r}, 'a').write('row')"
    (record,) = runner().run([python("step", code, still=1.5, grows=rows)])
    assert record.result == PASSED and record.seconds >= 2


def test_the_end_of_all_time(runner, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.steps.LEAST", 0.5)
    rows, begin = tmp_path / "rows", time.monotonic()
    code = f"import time; open({str(rows)!r}, 'w').write('a row'); time.sleep(600)"
    run = runner(2.0)
    late, never = run.run([python("late", code), python("never", code)])
    assert late.result == LATE and rows.read_text() == "a row" and never.result == NOT_RUN
    assert 1.5 < time.monotonic() - begin < 8


def test_at_the_end_none_waits_for_another_to_die(runner, monkeypatch):
    """As where a GPU hangs: the system cannot end them."""
    monkeypatch.setattr("benchmarks.steps.LEAST", 0.5)
    killed, waited = [], []
    monkeypatch.setattr(os, "killpg", lambda pid, sent: killed.append(pid))
    monkeypatch.setattr(subprocess.Popen, "wait", lambda self, seconds: waited.append((len(killed), seconds)))
    found = runner(1.0).run([python(str(i), "import time; time.sleep(5)") for i in range(3)], beside=3)
    assert [record.result for record in found] == [LATE] * 3 and len({*killed}) == 3
    assert [count for count, _ in waited] == [3] * 3 and all(0 <= seconds <= 10 for _, seconds in waited)


def test_rows_of_a_former_run_are_not_this_one_s(runner, tmp_path):
    rows = tmp_path / "rows"
    rows.write_text("of another commit")
    runner().run([python("step", "exit(1)", grows=rows)])
    assert not rows.exists()


def test_steps_beside_each_other(runner):
    begin = time.monotonic()
    records = runner().run([python(str(i), "import time; time.sleep(1.5)") for i in range(4)], beside=4)
    assert [record.result for record in records] == [PASSED] * 4 and time.monotonic() - begin < 5.5


@pytest.mark.parametrize("over", [False, True], ids=["runs", "is over when the runner looks"])
def test_one_that_crashed_goes_on_where_it_was(runner, tmp_path, monkeypatch, over):
    """Two steps of three crash it; that is not forgotten when the last run passes. Without getting on it is not begun again."""
    popen = subprocess.Popen

    def begun(*command, **how):
        process = popen(*command, **how)
        process.wait()
        return process

    if over:
        monkeypatch.setattr(subprocess, "Popen", begun)
    lines = tmp_path / "lines"
    code = f"""import os
done = len(open({str(lines)!r}).readlines()) if os.path.exists({str(lines)!r}) else 0
if done < 3: open({str(lines)!r}, "a").write("line\\n"); os.abort()"""
    run = runner()
    (record,) = run.run([python("step", code, grows=lines, again=True)])
    assert record.runs == 4 and (record.result, record.exit) == (FAILED, -signal.SIGABRT)
    (record,) = run.run([python("stuck", "import os; os.abort()", grows=tmp_path / "none", again=True)])
    assert record.runs == 1 and record.result == FAILED


def test_stopped_while_a_step_begins_it_is_ended(runner, monkeypatch):
    popen, begun, run = subprocess.Popen, [], runner()

    def stop():
        if begun and begun[0].returncode is None:
            sys.exit("told to stop")

    monkeypatch.setattr(subprocess, "Popen", lambda *command, **how: begun.append(popen(*command, **how)) or begun[-1])
    run.told = stop
    with pytest.raises(SystemExit, match="told to stop"):
        run.run([python("step", "import time; time.sleep(60)")])
    assert begun[0].returncode == -signal.SIGKILL and run.records["step"].result == FAILED


def test_a_last_line_is_found_in_a_long_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("x\n" * 9000 + "the last \N{BULLET}\n\n")
    assert last_line(log) == "the last \N{BULLET}" and last_line(tmp_path / "none") == ""


TESTS = """import os, time, pytest
@pytest.mark.parametrize("i", range(4))
def test_good(i): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_crash(): os.abort()
def test_hang(): time.sleep(600)
def test_skipped(): pytest.skip("for a reason")
@pytest.fixture
def broken():
    yield
    raise ValueError("after")
def test_torn_down(broken): pass
def test_after(): pass
"""


@pytest.fixture
def some_tests(tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "test_some.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder / "test_some.py"


def test_a_lost_context_ends_the_process_and_the_next_goes_on(some_tests, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "_context_answers", lambda: False)
    some_tests.write_text("def test_a(): assert False\ndef test_b(): pass\n")
    file = tmp_path / "t.jsonl"
    arguments = ["cases", str(file), "--", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", str(some_tests)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert cases.main() == cases.BROKEN and cases.count([file])["not run"] == 1
    assert cases.main() == 1 and [outcome for outcome, _ in cases.outcomes(file).values()] == ["failed", "passed"]


def test_what_can_hang_comes_last(tmp_path):
    """In every part: whatever of the Hopper kernel hangs, the others have been tested."""
    items = [SimpleNamespace(nodeid=name) for name in ("a", "tests/test_hopper_gpu.py::b", "c[linear24_sm90a]", "d")]
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    cases.Cases(tmp_path / "t.jsonl").pytest_collection_modifyitems(config, items)
    assert [item.nodeid[-1] for item in items] == ["a", "d", "b", "]"]


def test_half_a_line_is_none(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"collected": 3}\n{"case": "a"}\n{"case": "a", "outcome": "passed", "why": ""}\n{"case": "b"')
    assert cases.outcomes(file) == {"a": ("passed", "")} and cases.count([file])["not run"] == 2


# ---- the evidence itself, of steps that need no GPU ----


def evidence(tmp_path, groups, first=(), seconds=60.0) -> tuple[int, dict, str]:
    code = gpu_evidence.run(groups, list(first), tmp_path / "out", False, seconds / 60, time.monotonic() + seconds)
    return code, json.loads((tmp_path / "out" / "summary.json").read_text()), (tmp_path / "out" / "summary.md").read_text()


@pytest.fixture
def no_machine(monkeypatch):
    monkeypatch.setattr(gpu_evidence, "what_ran", lambda left: {"gpu": "a GPU", "date": "today"})
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def test_all_that_was_learned_is_in_the_summary(tmp_path, some_tests, no_machine, monkeypatch, capsys):
    """Of tests in two processes, each of which is killed by one: nothing else is lost, nothing is run twice."""
    monkeypatch.setattr(gpu_evidence, "gpu_files", lambda: [str(some_tests)])
    monkeypatch.setitem(gpu_evidence.STUCK, "test", 10)
    monkeypatch.setattr("benchmarks.steps.LEAST", 0.5)
    tests = gpu_evidence.tests("tests", tmp_path / "out", "not gpu", 2, 1, 120)
    groups = [tests, [python("bad", "print('what is wrong'); exit(1)")], [python("good", "")]]
    code, summary, page = evidence(tmp_path, groups, [python("build", "")], 200)
    assert code == 1 and summary["machine"]["gpu"] == "a GPU"
    assert summary["tests"] == {"tests": {"passed": 5, "failed": 2, "skipped": 1, "did not end": 2, "not run": 0}}
    assert [*summary["steps"]] == ["build", "tests-0", "tests-1", "bad", "good"]
    assert summary["steps"]["bad"]["last"] == "what is wrong" and summary["steps"]["good"]["result"] == PASSED
    files = [tmp_path / "out" / "tests" / f"tests-{part}.jsonl" for part in range(2)]
    found = {name.rpartition("::")[2]: outcome for file in files for name, outcome in cases.outcomes(file).items()}
    assert found["test_wrong"] == ("failed", "AssertionError: one is not two") and found["test_torn_down"][0] == "failed"
    assert found["test_crash"][0] == found["test_hang"][0] == "did not end" and found["test_skipped"][1].endswith("for a reason")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sum(line.keys() == {"case"} for line in lines) == 10, "a test was begun twice"
    assert "one is not two" in page and "| good | passed |" in page and "5 passed, 2 failed" in page
    assert page in capsys.readouterr().out


def test_steps_are_chosen_by_their_names_or_the_beginning():
    every = ("linear24", "memcheck-0 memcheck-1 racecheck-0", "tune-4x4")
    groups = [[python(name, "") for name in names.split()] for names in every]

    def names(*only):
        return [[step.name for step in group] for group in gpu_evidence.chosen(groups, only)]

    assert gpu_evidence.chosen(groups, None) == groups and names("line") == []
    assert names("racecheck") == [["racecheck-0"]] and names("memcheck-1", "tune") == [["memcheck-1"], ["tune-4x4"]]


def test_without_a_build_nothing_runs(tmp_path, no_machine):
    code, summary, _ = evidence(tmp_path, [[python("step", "")]], [python("build", "exit(1)")])
    assert code == 1 and summary["steps"]["step"]["result"] == NOT_RUN and summary["steps"]["step"]["last"] == "the build failed"


def test_a_former_run_does_not_count(tmp_path, no_machine):
    for old in ("tests/tests-0.jsonl", "logs/step.log"):
        (tmp_path / "out" / old).parent.mkdir(parents=True)
        (tmp_path / "out" / old).write_text('{"collected": 1}\n{"case": "a", "outcome": "failed"}\n')
    code, summary, page = evidence(tmp_path, [[python("step", "")]])
    assert code == 0 and summary["tests"] == {} and "failed" not in page


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda sent: sent.name)
def test_stopped_at_any_moment_the_summary_is_whole(sent, tmp_path):
    """By what a shell sends at its limit: nothing is left running but after SIGKILL, and what came before stands in the summary."""
    code = f"""import sys, time
from pathlib import Path
from benchmarks import gpu_evidence
from benchmarks.steps import Step
gpu_evidence.what_ran = lambda left: dict()
write = lambda text: [sys.executable, "-c", text]
long = "import os, time; open('child', 'w').write(str(os.getpid())); time.sleep(60)"
groups = [[Step("one", write("print(1)"), 1, 60)], [Step("two", write(long), 1, 60, cwd=Path({str(tmp_path)!r}))]]
sys.exit(gpu_evidence.run(groups, [], Path({str(tmp_path / "out")!r}), False, 1, time.monotonic() + 60))"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child, end = tmp_path / "child", time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=30)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert process.returncode and summary["steps"]["one"]["result"] == PASSED
    if sent == signal.SIGKILL:
        assert summary["steps"]["two"]["result"] == "running"
        os.kill(int(child.read_text()), signal.SIGKILL)
    else:
        assert summary["steps"]["two"]["result"] == FAILED and gone(int(child.read_text()))
