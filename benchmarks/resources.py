"""What the compiler made of the CUDA kernels, and how many blocks share a multiprocessor: a row for each instance and tile.

    python -m benchmarks.resources [--json] [--out FILE]

Needs nvcc and cuobjdump (of a CUDA toolkit or of the triton package), no GPU. registers, shared_static, stack and local are
cuobjdump's, all but the first in bytes; spills counts the local loads and stores in the machine code; threads and shared_dynamic
are what the launcher asks for, told by a stand-in for the runtime (recorder.cpp); tile is the launcher's number. blocks is the
least of what registers, shared memory and threads leave room for. products counts sparse tensor-core instructions, loads_128 the
loads of global memory of 16 bytes a lane, asynchronous ones included, loads_tma those of TMA. Where warps hand registers over
(setmaxnreg), registers is what each thread starts with.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import write
from sparsekit.ops.linear import DECODE, DECODE_TILES, HOPPER, MMA_SP, MMA_SP_TILES

CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90a", "120")  # Ampere, Hopper, consumer Blackwell; by the names of the files, as setup.py has it
KERNELS = {DECODE: ARCHITECTURES, MMA_SP: ARCHITECTURES, HOPPER: ("90a",)}
ALL_HOPPER_TILES = range(1, 11)  # csrc/launch.h; those of the shared form are measured only by hand
_DTYPES = {1: "half", 2: "bfloat16"}  # csrc/launch.h

_REGISTERS = 65536  # a multiprocessor's; a warp's come in 256, so a thread's in eights
_RESERVED = 1024  # shared memory that the driver takes of every block
# By architecture: bytes of shared memory, threads and blocks of a multiprocessor. Source: CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability".
_LIMITS = {"80": (164 * 1024, 2048, 32), "90a": (228 * 1024, 2048, 32), "120": (100 * 1024, 1536, 24)}


def find_cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(own) if own and own.exists() else None)


CUOBJDUMP = find_cuobjdump()


class Compiled(NamedTuple):
    """What one .cu file became for one architecture: the compiler's notes; by mangled kernel name, machine code and resources."""

    notes: str
    code: dict[str, str]
    usage: dict[str, str]


def compile_sass(source: Path, arch: str, folder: Path) -> Compiled:
    """Compiles a .cu file as setup.py does. Raises RuntimeError with the compiler's words where it cannot."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    notes = _nvcc("-Xptxas", "-v", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", cubin, source)
    sass, usage = (
        subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout
        for what in ("-sass", "-res-usage")
    )
    functions = re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.S)
    return Compiled(notes, dict(functions), dict(re.findall(r"Function (\S+):\n\s*(.*)", usage)))


def _nvcc(*arguments: str | Path) -> str:
    """What it says."""
    command = [NVCC, "-std=c++17", "-O3", "-DSPARSEKIT_CUDA", f"-I{CUDA}", *arguments]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"resources: nvcc must compile csrc/cuda, got {built.stderr}")
    return built.stderr


def instance(mangled: str) -> str:
    """A kernel with its template arguments, as C++ has them but for the namespace: linear24_sm80<half, 32, 8, 5>."""
    name, arguments = re.search(r"\d(linear24_[a-z0-9_]+?)I((?:6__half|13__nv_bfloat16|L[ib]\d+E)+)E", mangled).groups()
    parts = re.findall(r"6__(half)|13__nv_(bfloat16)|Li(\d+)E|Lb([01])E", arguments)
    return f"{name}<{', '.join(half or bf16 or number or ('false', 'true')[int(flag)] for half, bf16, number, flag in parts)}>"


def blocks_by_registers(registers: int, threads: int) -> int:
    return _REGISTERS // (-(-registers // 8) * 8 * threads)


class Launch(NamedTuple):
    """What a launcher asked for."""

    kernel: str  # instance()
    tile: int
    threads: int
    shared: int  # bytes of dynamic shared memory


def launches(folder: Path) -> list[Launch]:
    """One launch of every instance in every tile, by the launchers themselves over a runtime that runs nothing."""
    objects = []
    for kernel, (arch, *_) in KERNELS.items():  # the host's half; PTX is as little of the other half as nvcc makes
        objects.append(folder / f"{kernel}.o")
        virtual = f"-gencode=arch=compute_{arch},code=compute_{arch}"
        _nvcc("-Xcompiler=-fPIC", "-c", virtual, "-o", objects[-1], CUDA / f"{kernel}.cu")
    library = folder / "launches.so"
    _nvcc("-Xcompiler=-fPIC", "-shared", "-cudart=none", "-o", library, Path(__file__).with_name("recorder.cpp"), *objects)
    loaded = ctypes.CDLL(str(library))
    loaded.recorded.restype = ctypes.c_char_p
    found = {}
    for kernel, m, tile, split in _problems():
        for dtype in _DTYPES:
            if error := loaded.launch(kernel.encode(), m, 4096, 4096, dtype, tile, split):
                raise RuntimeError(f"resources: {kernel} must launch {m} tokens in tile {tile}, got error {error}")
            for line in loaded.recorded().decode().splitlines():
                name, threads, shared = line.split()
                launch = Launch(instance(name), tile if "_sum" not in name else 0, int(threads), int(shared))
                found[launch[:2]] = launch
    return list(found.values())


def _problems() -> Iterator[tuple[str, int, int, int]]:
    """Kernel, tokens, tile and split. Tokens are the most of each class, for which a block takes the most memory."""
    for tile in MMA_SP_TILES:
        yield MMA_SP, 128, tile, 0
    for tile in ALL_HOPPER_TILES:
        yield HOPPER, 128, tile, 0
    for tokens in (8, 16, 32, 64):
        tiles = next(tiles for most, tiles in DECODE_TILES.items() if tokens <= most)
        yield from ((DECODE, tokens, tile, 2) for tile in tiles)


def resources(arch: str, compiled: Compiled, asked: list[Launch]) -> list[dict]:
    """The rows of one compiled file. Raises RuntimeError for a kernel that nothing launches."""
    shared, threads, most = _LIMITS[arch]
    rows = []
    for name, code in sorted(compiled.code.items(), key=lambda item: instance(item[0])):
        of_kernel = [launch for launch in asked if launch.kernel == instance(name)]
        if not of_kernel:
            raise RuntimeError(f"resources: every kernel must be launched, none launches {instance(name)}")
        usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", compiled.usage[name])}
        products = re.findall(r"\b(HG?MMA\.SP)\.", code)
        for launch in sorted(of_kernel):
            limits = {
                "blocks_by_registers": blocks_by_registers(usage["REG"], launch.threads),
                "blocks_by_shared": shared // (max(usage["SHARED"], _RESERVED) + launch.shared),
                "blocks_by_threads": min(threads // launch.threads, most),
            }
            rows.append({
                "architecture": f"sm_{arch}",
                "kernel": launch.kernel,
                "tile": launch.tile,
                "threads": launch.threads,
                "registers": usage["REG"],
                "shared_static": usage["SHARED"],
                "shared_dynamic": launch.shared,
                "stack": usage["STACK"],
                "local": usage["LOCAL"],
                "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
                **limits,
                "blocks": min(limits.values()),
                "product": products[0] if products else None,
                "products": len(products),
                "loads_128": len(re.findall(r"\bLDG(?:STS)?\.\S*\b128\b", code)),
                "loads_tma": len(re.findall(r"\bUTMALDG\b", code)),
                "nvcc": nvcc_version(),
            })  # fmt: skip
    return rows


def nvcc_version() -> str:
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d+\.\d+\.\d+)", said)[1]


def rows() -> list[dict]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        asked = launches(folder)
        return [
            row
            for kernel, architectures in KERNELS.items()
            for arch in architectures
            for row in resources(arch, compile_sass(CUDA / f"{kernel}.cu", arch, folder), asked)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for tool, found in (("nvcc", NVCC), ("cuobjdump", CUOBJDUMP)):
        if found is None:
            sys.exit(f"resources: {tool} must be on the path, found none")
    write(rows(), args.json, args.out)


if __name__ == "__main__":
    main()
