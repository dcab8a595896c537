"""What the tests share: hypothesis without chance, the devices, and weights that hold 2:4."""

import os
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for the benchmarks; last, so that an installed sparsekit comes first
from benchmarks import gpu_evidence  # first: it takes a source tree without the extension off the path, where `python -m` put it

import sparsekit  # isort: skip

# In the background of a shell, or under nohup, they ignore what some tests send to processes, which would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# What is timed fails on a busy machine.
timed = [HealthCheck.too_slow]
settings.register_profile("sparsekit", deadline=None, derandomize=True, database=None, suppress_health_check=timed)
settings.load_profile("sparsekit")

# Under pytest-xdist a file's tests run in one process, and those of files that share what a session compiles. What takes minutes
# comes first, so that no process ends with it alone.
FIRST = (
    ("test_kernels_aot.py",),
    ("test_world.py",),
    ("test_resources.py", "test_cuda_sass.py", "test_cuda_hopper_sass.py"),
    ("test_cuda_hopper.py",),
    ("test_forecast.py",),
    ("test_cli.py",),
    ("test_kernels_triton.py",),
    ("test_memory.py",),
    ("test_avx512_emulated.py",),
    ("test_pretend.py",),
    ("test_resume.py",),
    ("test_prune_triton.py",),
    ("test_cuda_emulated.py", "test_cuda_decode.py"),
)


def unit_of(name: str) -> int | str:
    """What runs in one process with a file of this name: a place in FIRST, or the file alone."""
    return next((place for place, files in enumerate(FIRST) if name in files), name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(unit_of(nodeid.split("::")[0].rpartition("/")[2]))

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    if address := next((item.nodeid for item in items if " at 0x" in item.nodeid), None):
        raise pytest.UsageError(f"the ids of tests must be the same in every process, got {address}; give ids that hold no address")
    if torch.cuda.is_available():  # Triton's tests need no interpreter there, and so no process of their own: they are the GPU's
        for item in items:
            if hasattr(getattr(item, "module", None), "IN_A_PROCESS_OF_ITS_OWN"):
                item.add_marker(pytest.mark.gpu)
    found = {item.path for item in items if item.get_closest_marker("gpu")}
    if found and (lost := found - set(map(Path, gpu_evidence.gpu_files()))):
        raise pytest.UsageError(f"gpu_evidence.gpu_files must give each file with a test for a GPU, got none of {min(lost)}")
    if hasattr(config, "workerinput"):
        places = {item: unit_of(item.path.name) for item in items}
        items.sort(key=lambda item: places[item] if isinstance(places[item], int) else len(FIRST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def beside_the_package():
    """Tests run where ``python -m sparsekit`` finds the package under test: a source tree may lack the extension."""
    before = os.getcwd()
    os.chdir(Path(sparsekit.__file__).resolve().parents[1])
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def machine_code(tmp_path_factory):
    """A function (kernel, architecture) -> what csrc/cuda/<kernel>.cu became, compiled once."""
    from benchmarks.resources import CUDA, CUOBJDUMP, NVCC, compile_sass

    if NVCC is None or CUOBJDUMP is None:
        pytest.skip("needs nvcc and cuobjdump")
    folder = tmp_path_factory.mktemp("machine_code")
    return cache(lambda kernel, arch: compile_sass(CUDA / f"{kernel}.cu", arch, folder))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def weight24():
    """A function (n, k, dtype, seed, integers) -> a dense weight (n, k) with at most two non-zeros in each group of four."""

    def make(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0, integers: bool = False) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        groups = -(-k // 4)
        kept = torch.rand(n, groups, 4, generator=g).argsort(-1) < 2
        dense = torch.randint(-4, 5, (n, groups, 4), generator=g).float() if integers else torch.randn(n, groups, 4, generator=g)
        return (dense * kept).view(n, 4 * groups)[:, :k].to(dtype).contiguous()

    return make


@pytest.fixture
def dense24(weight24):
    """A function that makes an nn.Linear, or a Conv1D, whose weight holds 2:4."""
    from transformers.pytorch_utils import Conv1D

    def make(k: int, n: int, bias: bool = True, dtype: torch.dtype = torch.float32, conv1d: bool = False, integers: bool = False):
        layer = Conv1D(n, k) if conv1d else nn.Linear(k, n, bias=bias)
        weight = weight24(n, k, dtype, integers=integers)
        layer.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight)
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.arange(n).sub(2).to(dtype))
        return layer

    return make


@pytest.fixture
def in_fragments(monkeypatch) -> None:
    """The CPU holds 16-bit weights in fragment order, as a CUDA device does."""
    import sparsekit.linear

    monkeypatch.setattr(sparsekit.linear, "_reads_fragments", lambda values: values.dtype in (torch.float16, torch.bfloat16))
