"""The compiled module: what it links, what it refuses, and the rules by which setup.py builds it."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekit import _C

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))
CPU = ("x", "values", "meta", "bias", "y", "m", "n", "k", "ldx", "x_dtype", "w_dtype", "activation", "threads")


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)


def test_no_source_includes_torch_and_one_knows_python():
    assert SOURCES
    for path in SOURCES:
        for header in includes(path):
            assert not re.match(r"(torch|ATen|c10|caffe2)\b", header), f"{path} includes {header}"
            if re.match(r"(pybind11|Python\.h)", header):
                assert path.name == "bindings.cpp", f"{path} includes {header}"


def test_setup_imports_no_torch():
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_module_links_neither_torch_nor_cuda():
    needed = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc" in needed
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\b|libcuda\.so|libgomp|libomp", needed), needed


def test_module_imports_without_torch_and_without_a_driver():
    """Loaded by its path in a bare interpreter; nothing of CUDA may be mapped by that."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('sparsekit._C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.cpu_isa() in ('avx512', 'avx2', 'portable') and 'torch' not in sys.modules\n"
        "assert 'libcuda' not in open('/proc/self/maps').read()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def arguments(**changed):
    """A call of linear24_cpu that is right: one element of everything, at real addresses."""
    numbers = torch.zeros(64)
    at = numbers.data_ptr()
    right = dict(zip(CPU, (at, at, at, 0, at, 1, 1, 4, 4, 0, 0, 0, 1)))
    arguments.keep = numbers
    return right | changed


def test_a_right_call_passes():
    _C.linear24_cpu(**arguments())
    _C.linear24_cpu(**arguments(bias=arguments()["x"]))


@pytest.mark.parametrize("name", ["x", "values", "meta", "bias", "y"])
@pytest.mark.parametrize(
    "value",
    [torch.zeros(4), torch.tensor(4096), torch.tensor([4096]), 4096.0, None, "4096", -1],
    ids=["tensor", "integer scalar", "one integer", "float", "none", "text", "negative"],
)
def test_only_an_integer_is_an_address(name, value):
    """An integer tensor of one element would convert to an integer, which is not its address."""
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.linear24_cpu(**arguments(**{name: value}))


@pytest.mark.parametrize("name, value", [
    *((name, -1) for name in ("m", "n", "k", "ldx", "x_dtype", "w_dtype", "activation", "threads")),
    *((name, 2**31) for name in ("m", "n", "k")),
    ("x_dtype", 3), ("w_dtype", 3), ("activation", 5), ("threads", 0),
])  # fmt: skip
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"linear24_cpu: {name} must be from .* to .*, got {value}$"):
        _C.linear24_cpu(**arguments(**{name: value}))


@pytest.mark.parametrize("name", ["x", "values", "meta", "y"])
def test_null_where_there_are_elements(name):
    with pytest.raises(ValueError, match=f"linear24_cpu: {name} must be the address of its data, got 0"):
        _C.linear24_cpu(**arguments(**{name: 0}))


def test_null_where_there_are_none():
    _C.linear24_cpu(**arguments(x=0, values=0, meta=0, k=0))
    _C.linear24_cpu(**arguments(x=0, y=0, m=0))
    _C.linear24_cpu(**arguments(values=0, meta=0, y=0, n=0))


def test_isa_is_chosen_by_name():
    before = _C.cpu_isa()
    try:
        _C.set_cpu_isa("portable")
        assert _C.cpu_isa() == "portable"
        with pytest.raises(ValueError, match=r"set_cpu_isa: .* got 'avx1024'"):
            _C.set_cpu_isa("avx1024")
        assert _C.cpu_isa() == "portable"
    finally:
        _C.set_cpu_isa(before)


def test_default_isa_is_the_best_of_the_cpu():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs /proc/cpuinfo")
    flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)[1].split())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "bmi2"} <= flags:
        best = "avx512"
    else:
        best = "avx2" if {"avx2", "fma", "bmi2"} <= flags else "portable"
    assert _C.cpu_isa() == best


def test_archs_say_whether_cuda_is_compiled_in():
    archs = _C.cuda_archs()
    assert all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs)
    assert bool(archs) == hasattr(_C, "linear24_sm80")


@pytest.mark.skipif(not _C.cuda_archs(), reason="built without CUDA")
def test_cuda_launch_is_checked():
    at = torch.zeros(64, dtype=torch.float16).data_ptr()
    right = dict(x=at, values=at, meta=at, bias=0, y=at, m=1, n=1, k=8, ldx=8, dtype=1, activation=0, tile=0, device=0, stream=0)
    wrong = dict(m=-1, n=2**31, k=-1, ldx=-1, dtype=0, activation=5, tile=5, device=-1)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"linear24_sm80: {name} must be"):
            _C.linear24_sm80(**right | {name: value})
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.linear24_sm80(**right | {"x": torch.zeros(64)})
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^linear24_sm80: .*CUDA"):
            _C.linear24_sm80(**right)
        assert _C.cuda_driver() == 0


@pytest.mark.gpu
def test_the_driver_is_asked_for_its_version():
    """That of CUDA 13 serves its own runtime and older ones."""
    assert _C.cuda_driver() >= 1000 * int(torch.version.cuda.split(".")[0]) > 0


@pytest.fixture
def build(monkeypatch):
    """setup.py's functions, its call of setup() left out."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("name, archs", [
    ("a_sm80.cu", ["80", "90a", "120"]), ("a_sm90.cu", ["90a", "120"]), ("a_sm90a.cu", ["90a"]),
    ("a_sm100a.cu", []), ("a_sm120.cu", ["120"]),
])  # fmt: skip
def test_a_file_is_built_for_the_architectures_its_name_says(build, name, archs):
    assert build["archs_of"](Path(name), ["80", "90a", "120"]) == archs


def test_a_cuda_file_without_an_architecture_is_refused(build):
    with pytest.raises(RuntimeError, match=r"must end in _sm .* got a\.cu"):
        build["archs_of"](Path("a.cu"), ["80"])


def test_ptx_is_of_the_lowest_architecture(build):
    assert build["gencode"](["80", "90a"], True) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    assert build["gencode"](["90a"], False) == ["-gencode=arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize("asked", ["80 90a 120", "80;90a;120", "120, 90a,80"])
def test_architectures_are_read_from_the_environment(build, monkeypatch, asked):
    toolkit = object.__new__(build["Toolkit"])
    toolkit.known = {"80", "90", "120"}
    monkeypatch.setenv("SPARSEKIT_CUDA_ARCHS", asked)
    assert toolkit.archs() == ["80", "90a", "120"]
    monkeypatch.delenv("SPARSEKIT_CUDA_ARCHS")
    toolkit.known = {"80", "86", "90"}
    assert toolkit.archs() == ["80", "90a"]
    for wrong in ("35", "80 sm_90", "120"):
        monkeypatch.setenv("SPARSEKIT_CUDA_ARCHS", wrong)
        with pytest.raises(RuntimeError, match="SPARSEKIT_CUDA_ARCHS must be"):
            toolkit.archs()


def test_cuda_can_be_switched_off_in_one_line(build, monkeypatch, capfd):
    monkeypatch.setenv("SPARSEKIT_CUDA", "0")
    assert build["find_toolkit"]() is None
    assert capfd.readouterr().err == "sparsekit: SPARSEKIT_CUDA=0, building for the CPU only\n"


def test_no_nvcc_is_said_in_one_line(build, monkeypatch, capfd):
    monkeypatch.delenv("SPARSEKIT_CUDA", raising=False)
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert build["find_toolkit"]() is None
    assert capfd.readouterr().err == "sparsekit: no nvcc found, building for the CPU only\n"


@pytest.mark.parametrize("suffix", [None, ".cpython-27m-x86_64-linux-gnu.so"], ids=["no extension", "another Python's"])
def test_what_runs_in_a_source_tree_is_the_installed_package(tmp_path, suffix):
    """`python -m pytest` and `python -m benchmarks.X` put the tree before what is installed, and a tree that was not installed
    in place has no extension for this Python."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name in ("tests", "sparsekit"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    (tmp_path / "sparsekit/__init__.py").write_text("raise AssertionError('the source tree was imported')\n")
    if suffix:
        (tmp_path / f"sparsekit/_C{suffix}").touch()
    shows = f"import sparsekit.kernels\nfrom sparsekit import _C\nassert _C.__file__ == {_C.__file__!r}\n"
    (tmp_path / "benchmarks/shows.py").write_text(shows)
    (tmp_path / "tests/test_shows.py").write_text("def test_shows():\n    import benchmarks.shows\n")
    environment = os.environ | {"PYTHONPATH": str(Path(_C.__file__).parents[1])}
    for command in (["benchmarks.shows"], ["pytest", "-q", "-p", "no:cacheprovider", "tests"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
