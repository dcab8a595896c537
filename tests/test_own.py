"""What tells a criterion of one's own from another of its name, and that a run is not resumed with the other one."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from models import build
from ranks import Power

import sparsekit
from sparsekit import SparsekitError, prune_folder
from sparsekit.criteria import CRITERIA, Wanda
from sparsekit.pruners import identity, own

SOURCE = """
SCALE = 2.0

def scaled(w, by=1.0):
    return w.abs() * SCALE * by

class Base:
    floor = 0.0

class Own(Base):
    name, statistics, rowwise = "own", None, False

    def scores(self, weight, statistics):
        # of any width
        rows = [scaled(row.float()) for row in weight]
        return sum(rows) if self.name in {"a", "b", "c"} else scaled(weight.float()).clamp(self.floor)
"""
HERE = Path(__file__).parent


def made(source: str):
    """The criterion of a module ``mine`` with that source."""
    module = ModuleType("mine")
    exec(source, module.__dict__)
    return module.Own()


def differing(one, other) -> list[str]:
    before, after = identity(one), identity(other)
    return [name.split()[0] for name in before if before[name] != after[name]]


def test_where_it_stands_and_its_comments_do_not_matter():
    moved = "# A note.\n\n" + SOURCE.replace("# of any width", "# of any\n        # width")
    assert differing(made(SOURCE), made(moved)) == []
    assert identity(made(SOURCE))["class of the criterion"] == "mine.Own"


@pytest.mark.parametrize(
    "was, now",
    [
        ("clamp(self.floor)", "clamp(self.floor + 1)"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("w.abs() * SCALE", "w.square() * SCALE"),
        ("by=1.0", "by=0.5"),
        ("floor = 0.0", "floor = 0.1"),
        ('rowwise = "own", None, False', 'rowwise = "own", None, True'),
        ('{"a", "b", "c"}', '{"a", "b", "d"}'),
        ("for row in weight]", "for row in weight if 1]"),
        ("class Own(Base)", "class Own"),
    ],
    ids=["body", "a global", "a function it calls", "a default", "a base", "an attribute", "a set", "a comprehension", "bases"],
)
def test_its_code_tells(was, now):
    assert SOURCE.count(was) == 1
    changed = SOURCE.replace(was, now).replace("for row in weight if 1]", "for row in weight[:1]]")
    assert differing(made(SOURCE), made(changed)) == ["code"]


@pytest.mark.parametrize("was, now, differ", [
    ("return w.abs()", "return w.square()", ["code"]),  # mine.deep.inner.f
    ("LIMIT = 2", "LIMIT = 3", ["code"]),  # mine.deep.LIMIT
    ("unused = 1", "unused = 2", []),
    ("other = 1", "other = 2", []),  # of another package, whose code is not followed
])  # fmt: skip
def test_helpers_in_modules_of_its_package_tell(was, now, differ):
    sources = {
        "mine.deep.inner": "def f(w):\n    return w.abs()\nunused = 1\n",
        "mine.deep": "LIMIT = 2\n",
        "theirs": "other = 1\n",
        "mine": "class Own:\n    name, statistics, rowwise = 'own', None, False\n\n"
        "    def scores(self, weight, statistics):\n        return deep.inner.f(weight).clamp(deep.LIMIT) + theirs.other\n",
    }  # fmt: skip

    def whole(changed: dict[str, str]):
        modules = {name: ModuleType(name) for name in changed}
        modules["mine.deep"].inner, modules["mine.deep.inner"].deep = modules["mine.deep.inner"], modules["mine.deep"]
        modules["mine"].deep, modules["mine"].theirs = modules["mine.deep"], modules["theirs"]
        for name, source in changed.items():
            exec(source, modules[name].__dict__)
        return modules["mine"].Own()

    assert sum(was in source for source in sources.values()) == 1
    other = {name: source.replace(was, now) for name, source in sources.items()}
    assert differing(whole(sources), whole(sources)) == [] and differing(whole(sources), whole(other)) == differ


@pytest.mark.parametrize(
    "how", ["from .deep import helper", "from . import deep", "import kit_of_mine.deep", "from kit_of_mine.deep import helper"]
)
def test_helpers_imported_within_a_body_tell(how, tmp_path, monkeypatch):
    # Of its own package alone; and before its first run, which imports them, as after it.
    package, found = tmp_path / "kit_of_mine", []
    package.mkdir()
    use = {"from . import deep": "deep.helper", "import kit_of_mine.deep": "kit_of_mine.deep.helper"}.get(how, "helper")
    (package / "__init__.py").write_text(
        f"class Own:\n    name, statistics, rowwise = 'own', None, False\n"
        f"    def scores(self, weight, statistics):\n        import json\n        {how}\n        return {use}(weight)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for source in ("abs()", "abs()  # a note", "square()"):
        (package / "deep.py").write_text(f"def helper(w):\n    return w.{source}\n")
        for name in ("kit_of_mine", "kit_of_mine.deep"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(package / "__pycache__", ignore_errors=True)
        own = importlib.import_module("kit_of_mine").Own()
        found.append(identity(own))
        own.scores(torch.ones(2, 2), None)
        assert identity(own) == found[-1]
    assert found[0] == found[1] and found[0] != found[2]
    for name in ("kit_of_mine", "kit_of_mine.deep"):
        del sys.modules[name]


def test_a_version_stands_for_the_code():
    first = made(SOURCE + "    version = 1\n")
    other = made(SOURCE.replace("2.0", "3.0") + "    version = 1\n")
    assert differing(first, other) == []
    assert differing(first, made(SOURCE + "    version = 2\n")) == ["code"]


def test_its_state_tells():
    assert differing(Power(2.0), Power(2.0)) == [] and differing(Power(2.0), Power(3.0)) == ["state"]
    assert identity(Power(2.0))["state of the criterion"] == "p = 2.0"
    factor = 2.0
    values = [
        torch.ones(3), torch.ones(3).half(), torch.ones(3, 1), torch.tensor([1.0, 1.0, 2.0]), np.ones(3), np.zeros(3), [1, 2],
        (1, 2), [1, [2]], [[1, 2]], [[1], 2], {1, 2}, {"a": 1}, {"a": 2}, Power(1.0), Power(2.0),
        partial(torch.add, alpha=1), partial(torch.add, alpha=2),
        lambda w: w * 2, lambda w: w * 3, lambda w: w * factor, Power(1.0).scores, torch.float16, "x" * 50, "x" * 51, None, Wanda,
    ]  # fmt: skip
    told = [identity(Power(value))["state of the criterion"] for value in values]
    assert len(set(told)) == len(told)
    slotted = [type("Slotted", (), {"__slots__": slots, "name": "slotted"})() for slots in ("p", ("p", "q"))]
    for one in slotted:
        one.p = 2.0
    assert [identity(one)["state of the criterion"] for one in slotted] == ["p = 2.0"] * 2
    loop = Power(None)
    loop.p = [loop]
    assert identity(loop)["state of the criterion"].startswith("p = list ")


def test_of_sparsekits_own_the_version_of_the_package_tells():
    assert set(identity("wanda").values()) == {None} and identity(CRITERIA["wanda"]) == identity("sparsegpt")
    assert None not in identity(Wanda()).values()  # its state may have been changed


def test_another_process_tells_the_same(tmp_path):
    here = identity(made(SOURCE))
    (tmp_path / "mine.py").write_text(SOURCE)
    code = f"import sys, json; sys.path[:0] = {[str(tmp_path), str(HERE)]}; import mine; from sparsekit.pruners import identity\n"
    path = os.pathsep.join(filter(None, [str(Path(sparsekit.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    run = [sys.executable, "-c", code + "print(json.dumps(identity(mine.Own())))"]
    said = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"})
    assert json.loads(said.stdout) == here, said.stderr


def stop(what: str, done: int, total: int) -> None:
    if done == 2:
        raise KeyboardInterrupt


def test_a_run_is_not_resumed_with_another_of_its_name(tmp_path):
    build("llama").save_pretrained(tmp_path / "model")
    arguments = dict(folder=tmp_path / "model", out=tmp_path / "out", pattern="50%", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        prune_folder(method=Power(2.0), **arguments, progress=stop)
    cheat = SimpleNamespace(name="power", statistics=None, rowwise=False, scores=lambda weight, _: -weight.float().abs(), p=2.0)
    for other, says in (
        (Power(3.0), "its state of the criterion differs: 'p = 2.0' then, 'p = 3.0' now"),
        (cheat, r"its class of the criterion differs: 'ranks.Power' then, 'types.SimpleNamespace' now \(and 2 more\)"),
    ):
        with pytest.raises(SparsekitError, match=says):
            prune_folder(method=other, **arguments, resume=True)
    report = prune_folder(method=Power(2.0), **arguments, resume=True)
    assert report.fingerprint["state of the criterion"] == "p = 2.0" and report.sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(SparsekitError, match="its state of the criterion differs"):  # of one that is finished
        prune_folder(method=Power(3.0), **arguments, resume=True)


def test_imports_are_found_in_long_code():
    """With more than 256 constants and names, what an import takes stands before it with other steps between."""
    lines = "".join(f"    x{i} = {i + 1000}.5; x{i}.a{i}\n" for i in range(300))
    space = {}
    exec(f"def f():\n{lines}    from json import decoder, encoder\n    import math\n", space)
    assert list(own._imports(space["f"].__code__)) == [(0, "json", ("decoder", "encoder")), (0, "math", None)]
