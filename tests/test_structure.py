"""How the source is laid out: who imports whom, what a file may hold, what importing the package costs."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FIRST, unit_of

import sparsekit
from sparsekit import SparsekitError, env

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS, CSRC = ROOT / "sparsekit", ROOT / "kernels", ROOT / "csrc"
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}

# A module imports only what stands before it. A folder is one place; inside it, files may import one another.
ORDER = [
    "errors", "env", "documents", "format", "reference", "tune", "timing", "precision", "ops", "bench", "patterns", "schedules",
    "plan", "config", "catalog", "criteria", "pruners", "linear", "report", "assets", "data", "evaluate", "structured",
    "checkpoint", "pipeline", "gradual", "inspection", "integrations", "demo", "analysis", "console", "cli_analysis", "cli",
    "__main__",
]  # fmt: skip


def source_files() -> list[Path]:
    folders = [ROOT / name for name in ("sparsekit", "csrc", "kernels", "tests", "benchmarks", "examples", "docs")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES]
    return sorted([*found, ROOT / "setup.py"])


def place(path: Path) -> str:
    """The entry of ORDER that a file of the package belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, base: Path, name: str) -> set[str]:
    """The full dotted names that a file imports anywhere in it, functions included; base is the folder of the package `name`.

    ``from . import x`` counts as name.x, and ``import_module`` of a text as that text."""
    package = [name, *path.relative_to(base).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            assert node.level <= len(package), f"{path}: a relative import leaves the package"
            origin = ".".join([*parts, *([node.module] if node.module else [])])
            if node.module and origin != name:
                found.add(origin)
            else:
                found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                text = str(node.args[0].value)
                found.add(f"{name}{text}" if text.startswith(".") else text)
    return found


def inner(path: Path) -> set[str]:
    """The places of the package that a file of it imports; the package's own file as ''."""
    places = {full.split(".")[1] for full in imports(path, PACKAGE, "sparsekit") if full.startswith("sparsekit.")}
    return {"" if name == "__version__" else name for name in places}


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_the_reader_of_imports(tmp_path):
    # The tests below rest on it, so it is shown every form of import.
    (tmp_path / "prune").mkdir()
    file = tmp_path / "prune" / "x.py"
    file.write_text(
        "import torch.nn\nimport sparsekit.a as b\nfrom sparsekit.c import d\nfrom sparsekit import e\nfrom .. import f, g\n"
        "from ..h import i\nfrom . import j\nfrom .k import l\n"
        "def late():\n    from ..m import n\n    importlib.import_module('.o')\n    import_module('sparsekit.p')\n"
    )
    found = imports(file, tmp_path, "sparsekit")
    assert found - {"torch.nn"} == {f"sparsekit.{n}" for n in ("a", "c", "e", "f", "g", "h", "prune.j", "prune.k", "m", "o", "p")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_before_it(path):
    here = place(path)
    assert here in ORDER, f"{here} has no place in the order of imports"
    before = {*ORDER[: ORDER.index(here)], here, ""}
    if here == "ops":
        before |= {"_C", "kernels"}
    assert inner(path) <= before
    assert "sparsekit" not in imports(path, PACKAGE, "sparsekit"), "import the module that is meant, not the package"


def test_the_order_names_what_there_is():
    there = {place(path) for path in MODULES}
    assert set(ORDER) == there


def test_kernels_know_nothing_of_the_package():
    files = sorted(KERNELS.rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path, KERNELS, "kernels"):
            assert name.split(".")[0] in {"torch", "triton", "kernels", "typing", "__future__", "math", "functools"}, (
                f"{path}: {name}"
            )


def test_compiled_code_knows_nothing_of_torch():
    files = [path for path in CSRC.rglob("*") if path.suffix in SUFFIXES]
    assert len(files) > 5
    for path in files:
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE)
        assert included or path.suffix == ".h", path
        for name in included:
            assert not re.match(r"(torch|ATen|c10|caffe2|THC?)\b", name), f"{path} includes {name}"
            assert not re.match(r"(pybind11/|Python\.h)", name) or path == CSRC / "bindings.cpp", f"{path} includes {name}"


def test_no_file_is_longer_than_600_lines():
    assert {str(p): n for p in source_files() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 600} == {}


# ---- tests side by side ----


def test_files_that_share_what_a_session_compiles_run_in_one_process():
    """And those that are to come first are there."""
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    assert {name for files in FIRST for name in files} <= tests.keys()
    for compiled in ("machine_code", "emulator"):
        taking = [name for name, text in tests.items() if re.search(rf"def \w+\(([^)]*, )?{compiled}\b", text)]
        assert len(taking) > 1 and len({unit_of(name) for name in taking}) == 1, taking


# ---- environment variables ----


def strings(path: Path) -> set[str]:
    """Every text in the code of a file that is the name of a variable of ours, and nothing more."""
    constants = [n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)]
    return {text for text in constants if isinstance(text, str) and re.fullmatch("SPARSEKIT_[A-Z_0-9]+", text)}


def test_environment_variables_have_one_place():
    documented = set(re.findall(r"^(SPARSEKIT_\w+)", env.__doc__, re.MULTILINE))
    assert strings(PACKAGE / "env.py") | strings(ROOT / "setup.py") == documented
    assert 1 <= len(documented) <= 5
    for path in [*MODULES, PACKAGE / "__init__.py", *KERNELS.rglob("*.py")]:
        if path != PACKAGE / "env.py":
            assert not strings(path), f"{path} names a variable that env.py is to read"
    for path in CSRC.rglob("*"):
        assert path.suffix not in SUFFIXES or "getenv" not in path.read_text(encoding="utf-8"), f"{path} reads the environment"


@pytest.mark.parametrize("text", ["0", "-1", "two", "", " ", "1.5", "²", "1_0"])
def test_threads_must_be_a_positive_integer(text, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_THREADS", text)
    with pytest.raises(SparsekitError, match="SPARSEKIT_THREADS must be a positive integer, got "):
        env._positive("SPARSEKIT_THREADS")


def test_threads(monkeypatch):
    monkeypatch.setenv("SPARSEKIT_THREADS", "3")
    assert env._positive("SPARSEKIT_THREADS") == 3
    monkeypatch.delenv("SPARSEKIT_THREADS")
    assert env._positive("SPARSEKIT_THREADS") is None


# ---- the package from outside ----


def run(code: str) -> str:
    """What a fresh interpreter prints that finds the package where this one did."""
    path = [str(Path(sparsekit.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_cheap_and_has_no_effects():
    heavy = ("transformers", "triton", "typer", "rich", "gguf", "pytest")
    out = run(
        "import sys, warnings; warnings.simplefilter('error'); import torch; brought = set(sys.modules)\n"
        "import sparsekit, sparsekit.ops, sparsekit.linear; sparsekit.SparseLinear, sparsekit.compress\n"
        f"print(sorted({{name.split('.')[0] for name in set(sys.modules) - brought}} & set({heavy})), torch.cuda.is_initialized())"
    )
    assert out.split("\n") == ["[] False", ""]


def test_every_public_name_is_what_it_says_and_stays_so():
    # Loaded at first use, and a submodule of the same name must not take its place once it has been imported.
    out = run(
        "import importlib, sparsekit, types\n"
        "first = {name: getattr(sparsekit, name) for name in sparsekit.__all__}\n"
        f"[importlib.import_module('sparsekit.' + name) for name in {[n for n in ORDER if n != '__main__']}]\n"
        "print([name for name in first if getattr(sparsekit, name) is not first[name]])\n"
        "print([name for name in first if isinstance(first[name], types.ModuleType)])\n"
        "print(set(sparsekit.__all__) - set(dir(sparsekit)))\n"
    )
    assert out.split("\n") == ["[]", "['ops']", "set()", ""]


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'sparsekit' has no attribute 'speed'"):
        _ = sparsekit.speed


@pytest.mark.skipif(not importlib.util.find_spec("ruff"), reason="ruff is not installed")
def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
