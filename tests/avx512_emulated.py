"""The AVX-512 sources of csrc/cpu on a CPU without it: compiled for AVX2 with tests/emulator/avx512_host.h, which has each
intrinsic as Intel's Intrinsics Guide defines it. The library stands in for sparsekit._C and has the one path."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

from sparsekit import _C

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("g++")
FLAGS = "-std=c++17 -O0 -DNDEBUG -fPIC -Wall -Wextra -Werror -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized".split()
FLAGS += ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-D__builtin_cpu_supports(name)=true", "-fno-math-errno", "-fno-trapping-math"]
EMULATED = ["linear24_avx512", "format24_vbmi2", "obs_avx512"]
OTHERS = ["linear24", "format24", "obs", "threads"]


def compiled(folder: Path) -> Path:
    """The library, from a process of the compiler for each source."""
    sources = {name: ROOT / f"csrc/cpu/{name}.cpp" for name in EMULATED + OTHERS}
    sources["entry"] = ROOT / "tests/emulator/avx512_entry.cpp"
    running = {}
    for name, source in sources.items():
        host = ["-include", ROOT / "tests/emulator/avx512_host.h"] if name in EMULATED else []
        command = [COMPILER, *FLAGS, *host, "-c", source, "-o", folder / f"{name}.o"]
        running[name] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for name, process in running.items():
        errors = process.communicate()[1]
        assert process.returncode == 0, f"{name}: {errors}"
    library = folder / "avx512.so"
    subprocess.run([COMPILER, "-shared", "-pthread", *(folder / f"{name}.o" for name in sources), "-o", library], check=True)
    return library


class Emulated:
    """sparsekit._C's functions for the CPU, with its names of arguments, from the library at a path."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in vars(_C):
            if name.endswith("_cpu"):
                setattr(self, name, self._function(name))

    def _function(self, name: str):
        arguments = re.findall(r"(\w+): ", getattr(_C, name).__doc__.split("->")[0])
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(
            ctypes.c_void_p.in_dll(self._library, f"emulated_{name}").value
        )

        def call(*given, **named):
            assert len(given) + len(named) == len(arguments), name
            function(*given, *[named[argument] for argument in arguments[len(given) :]])
            assert self._library.emulated_misaligned() == 0, f"{name}: a streamed store that is not aligned"
            assert self._library.emulated_unfenced_threads() == 0, f"{name}: no fence after streamed stores"

        return call

    def cpu_isa(self) -> str:
        return "avx512"

    def set_cpu_isa(self, name: str) -> None:
        if name != "avx512":
            raise ValueError(f"set_cpu_isa: name must be avx512, got {name!r}")
