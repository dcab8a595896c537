"""A CUDA device that is none: tensors that say "cuda:0" and hold their numbers on the CPU, so that all Python of a GPU's branches
runs without a GPU. What mixes devices is refused as CUDA refuses it; kernels are the CPU's, or Triton's under its interpreter.

    python -m pytest -p pretend -m gpu tests                    (PYTHONPATH=tests)
    python tests/pretend.py benchmarks.linear24 --device cuda   any module, as python -m would run it

It says nothing of kernels, of streams or of time. With TRITON_INTERPRET=1 Triton's kernels are interpreted, which is slow; else the
ops' CPU halves stand in for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # first, since it makes a table of torch's functions
import torch.utils._device
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

sys.path.append(
    str(Path(__file__).resolve().parents[1])
)  # last, and first imported, as in conftest.py: the installed package is meant
import benchmarks  # noqa: F401

CAPABILITY, NAME = (9, 0), "NVIDIA H100 80GB HBM3"
CPU, GPU = {}, {}  # by the op's name: its halves, as they are registered
# Of these a tensor on the CPU may go with one on a GPU: copies, and places to index by.
CROSSING = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::index_put", "aten::set_"}


class OnGpu(torch.Tensor):
    """A tensor on the device that is none; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device="cuda:0", requires_grad=False, **layout)
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def is_pinned(self) -> bool:
        return False

    def tolist(self):
        return self.held.tolist()

    def __deepcopy__(self, memo):
        made = memo.setdefault(id(self), OnGpu(self.held.clone()).requires_grad_(self.requires_grad))
        made._is_param = getattr(self, "_is_param", False)
        return made

    def __reduce_ex__(self, protocol):
        return OnGpu, (self.held,)

    def __repr__(self) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.of = torch.device(device).type


class Everywhere(TorchDispatchMode):
    """Sees what makes tensors out of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if OnGpu not in types and not (kwargs and kwargs.get("device")):
            return func(*args, **(kwargs or {}))
        return run(func, args, kwargs or {})


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func, args, kwargs):
    name = func._schema.name
    flat, _ = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnGpu)]
    if name.startswith("sparsekit::") and ours:
        refuse_mixed(func, tensors)
        with MODE:
            return GPU[name.removeprefix("sparsekit::")](*args, **kwargs)
    device = kwargs.get("device")
    to_gpu = is_cuda(device) if device is not None else bool(ours)
    if name == "aten::histc":  # of integers a GPU's alone
        args = (args[0].double(), *args[1:])
    if name == "aten::_fused_sdp_choice":
        return 0  # the product written out: the fused ones are other ops on a GPU
    if ours and name not in CROSSING:
        refuse_mixed(func, tensors)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if is_cuda(device) else device}
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking") or not value}
    with _disable_current_modes():
        found = func(*tree_map(held, args), **tree_map(held, kwargs))
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.returns]
    if any(written):
        by = {id(t.held): t for t in ours}
        return tree_map(lambda t: by.get(id(t), t) if isinstance(t, torch.Tensor) else t, found)
    return tree_map(lambda t: OnGpu(t) if to_gpu and type(t) is torch.Tensor else t, found)


def held(value):
    return value.held if isinstance(value, OnGpu) else value


def refuse_mixed(func, tensors) -> None:
    wrong = next((t for t in tensors if not isinstance(t, OnGpu) and t.dim() and t.device.type == "cpu"), None)
    if wrong is not None:
        raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu, {tuple(wrong.shape)}")


class Numbered(TorchFunctionMode):
    """The current CUDA device is number 0, for which torch would ask a build with CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(map(_unnumbered, args)):
            args = tuple(torch.device("cuda:0") if _unnumbered(a) else a for a in args)
        if kwargs and _unnumbered(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cuda:0")}
        if kwargs and (generator := kwargs.get("generator")) is not None:  # a mode of dispatch sees another object
            device = next((a.device for a in args if isinstance(a, torch.Tensor)), kwargs.get("device") or "cpu")
            if torch.device(device).type != generator.of:
                raise RuntimeError(f"{func}: the generator must be on the tensor's device, {device}, got one on {generator.of}")
        if func == torch.Tensor.__getitem__ and type(args[1]) is tuple:  # a list of places becomes a tensor where no mode sees it
            args = (args[0], tuple(torch.tensor(place) if type(place) is list else place for place in args[1]))
        if func == torch.Tensor.data.__set__ and isinstance(args[0], OnGpu):
            args[0].held = args[1].held
        if func in (torch.tensor, torch.as_tensor) and is_cuda((kwargs or {}).get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to("cuda:0")
        return func(*args, **(kwargs or {}))


def _unnumbered(value) -> bool:
    return value == "cuda" if type(value) is str else type(value) is torch.device and value.type == "cuda" and value.index is None


MODE = Everywhere()


# ---- what a CUDA build of torch has ----


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end) -> float:
        return (end.at - self.at) * 1e3


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class Graph:
    """Calls once more what was called while it was captured: here the calls themselves are lost, so a replay does nothing."""

    def replay(self):
        pass


def _patch_torch() -> None:
    torch.utils._device._device_constructors()  # what `with torch.device` sees, before torch.empty is another
    cuda, nothing = torch.cuda, lambda *args, **kwargs: None
    properties = SimpleNamespace(name=NAME, L2_cache_size=50 << 20, multi_processor_count=132, total_memory=80 << 30,
                                 shared_memory_per_block_optin=227 << 10, major=9, minor=0)  # fmt: skip
    torch.Generator = Generator
    cuda._lazy_init = cuda.init = cuda.synchronize = cuda.set_device = cuda.empty_cache = nothing
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_name, cuda.get_device_capability = lambda device=None: NAME, lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: properties
    cuda.mem_get_info = lambda device=None: (70 << 30, 80 << 30)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 1 << 20)
    cuda.reset_peak_memory_stats = nothing
    cuda.Event, cuda.Stream, cuda.CUDAGraph = Event, Stream, Graph
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()
    cuda.device = cuda.stream = cuda.graph = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.clock_rate, cuda.power_draw = lambda device=None: 1980, lambda device=None: 700_000
    cuda.manual_seed_all = cuda.manual_seed = nothing
    cuda.is_bf16_supported = lambda *args: True
    torch._C._cuda_getCurrentRawStream = lambda index: 0
    torch.version.cuda = "13.0"
    torch.Tensor.cuda = lambda self, device=None, **kwargs: self.to("cuda")
    pinned, empty = torch.Tensor.is_pinned, torch.empty
    torch.Tensor.is_pinned = lambda self: getattr(self, "pretends_pinned", False) or pinned(self)

    def empty_pinned(*args, pin_memory=False, **kwargs):
        made = empty(*args, **kwargs)
        if pin_memory:
            made.pretends_pinned = True
        return made

    torch.empty = empty_pinned
    register = torch.library.Library.impl

    def recorded(self, name, function, key="", **kwargs):
        if self.ns == "sparsekit":
            {"CPU": CPU, "CUDA": GPU}.get(key, {})[str(name)] = function
        return register(self, name, function, key, **kwargs)

    torch.library.Library.impl = recorded


# ---- kernels ----


def _tensor_at(address: int, shape, dtype: torch.dtype) -> torch.Tensor:
    n = int(torch.Size(shape).numel())
    if not n:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(address), dtype=dtype).view(shape)


class Extension:
    """sparsekit._C of a build with CUDA: its launchers read pointers as the kernels do, and multiply on the CPU."""

    def __init__(self, built):
        self._built = built

    def __getattr__(self, name):
        return getattr(self._built, name)

    def cuda_driver(self):
        return 13000

    def cuda_archs(self):
        return ["80", "90a"]

    def linear24_decode_workspace(self, m, n, k, tile, split, device):
        return 4 * m * n * (split or 2) if (split or 2) > 1 else 0

    linear24_sm90a_workspace = linear24_decode_workspace

    def linear24_decode_sm80(self, x, values, meta, bias, y, parts, m, n, k, ldx, dtype, activation, tile, split, device, stream):
        assert m <= 64 and tile in (0, 16, 32, 64, 128, 256) and (split or 2) in (1, 2, 4, 8) and (parts or split == 1)
        self._product(x, values, meta, bias, y, m, n, k, ldx, dtype, activation)

    def linear24_sm90a(self, x, values, meta, bias, y, parts, m, n, k, ldx, dtype, activation, tile, split, device, stream):
        assert tile in range(11)
        if x % 16 or ldx % 8:
            return False  # TMA cannot take it
        self._product(x, values, meta, bias, y, m, n, k, ldx, dtype, activation, plain=tile > 7)
        return True

    def linear24_sm80(self, x, values, meta, bias, y, m, n, k, ldx, dtype, activation, tile, device, stream):
        assert tile in range(5)
        self._product(x, values, meta, bias, y, m, n, k, ldx, dtype, activation)

    def _product(self, x, values, meta, bias, y, m, n, k, ldx, dtype, activation, plain=False):
        """plain: the values are in canonical order, as a tile that reads them from shared memory takes them."""
        from sparsekit.format import Fragments24, _fragment_layout, from_fragments

        kind = {1: torch.float16, 2: torch.bfloat16}[dtype]
        with _disable_current_modes():
            _, of_values, _, of_meta = _fragment_layout(n, k, kind)
            held = torch.zeros(of_values, dtype=kind) if plain else _tensor_at(values, of_values, kind)
            s = from_fragments(Fragments24(held, _tensor_at(meta, of_meta, torch.int32), (n, k)))
            values = values if plain else s.values.data_ptr()
            self._built.linear24_cpu(x, values, s.meta.data_ptr(), bias, y, m, n, k, ldx, dtype, dtype, activation, 1)


def _launchers() -> dict:
    """In place of each Triton launcher the op's CPU half, which refuses what is wrong where the kernel would say so."""
    clean = 2**63 - 1

    def status(like, words):
        return like.new_full((words,), clean, dtype=torch.int64)

    def into(name, *read, out=None):
        """The CPU half on what is held, its results on the device."""
        with _disable_current_modes():
            if out is not None and all(t is not None for t in out):
                CPU[name](*map(held, read), out=tuple(map(held, out)))
                return out
            return tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) else t, CPU[name](*map(held, read)))

    def compress24(w, out=None):
        return *into("compress24", w, out=out), status(w, 2)

    def prune_compress24(w, scores=None, mask=None, out=None):
        return *into("prune_compress24", w, scores, mask, out=out), status(w, 2)

    def prune24(w, scores=None, mask=None, out=None):
        made = into("prune24", w, scores, mask, out=None if out is None else (out,))
        return made if isinstance(made, torch.Tensor) else made[0], status(w, 2)

    def expand24(values, meta, cols=None, out=None):
        made = into("expand24", values, meta, cols, out=None if out is None else (out,))
        return made if isinstance(made, torch.Tensor) else made[0]

    def expand_fragments(values, meta, rows, cols):
        return into("expand_fragments", values, meta, rows, cols)

    def validate24(values, meta, cols):
        return into("validate24", values, meta, cols)

    def mask_nm(scores, n, m, pairs=False, out=None):
        made = into("mask_nm", scores, n, m, pairs, out=None if out is None else (out,))
        return made if isinstance(made, torch.Tensor) else made[0], status(scores, 1)

    def mask_rows(scores, k, out=None):
        made = into("mask_rows", scores, k, out=None if out is None else (out,))
        return made if isinstance(made, torch.Tensor) else made[0], status(scores, 1)

    def obs(w, upper, mask=None, n=0, m=0, pairs=False):
        return *into("obs_block_", w, upper, mask, n, m, pairs), status(w, 1)

    def gram(total, x):
        into("gram_", total, x)

    return {name: made for name, made in locals().items() if callable(made) and name not in ("status", "into")}


def _patch_kernels() -> None:
    import importlib

    import sparsekit
    from sparsekit import _C

    extension = Extension(_C)
    sparsekit._C = sys.modules["sparsekit._C"] = extension
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret()
        return
    for name, made in _launchers().items():
        setattr(importlib.import_module(f"sparsekit.kernels.{name}"), name, made)


def _interpret() -> None:
    """A launch takes what lies on the device alone."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def checked(self, *args, **kwargs):
        wrong = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu)]
        assert not wrong, f"{self.fn}: a kernel is given a tensor of the CPU, {tuple(wrong[0].shape)}"
        with _disable_current_modes():
            return launch(self, *map(held, args), **{name: held(value) for name, value in kwargs.items()})

    interpreter.GridExecutor.__call__ = checked


# Torch asks the device's guard which device and stream are current; without one of CUDA it refuses to index a tensor there.
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
    c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
    c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
    c10::Stream exchangeStream(c10::Stream s) const override { return s; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""


def _guard() -> None:
    """Compiled once for a torch."""
    torch_folder = Path(torch.__file__).parent
    made = Path(tempfile.gettempdir(), f"pretend-guard-{torch.__version__}-{os.getuid()}.so")
    if not made.exists():
        part = made.with_suffix(f".{os.getpid()}")
        command = ["c++", "-std=c++20", "-shared", "-fPIC", "-xc++", "-", f"-I{torch_folder}/include", "-o", part]
        subprocess.run([*command, f"-L{torch_folder}/lib", "-lc10"], input=GUARD, text=True, check=True)
        part.rename(made)
    ctypes.CDLL(str(made))


@cache
def install() -> None:
    _guard()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # in place of one's data a parameter of another class
    _patch_torch()
    _patch_kernels()
    MODE.__enter__()
    Numbered().__enter__()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    install()
