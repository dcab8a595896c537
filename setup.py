"""Builds sparsekit._C by writing one build.ninja and running it. Needs setuptools, pybind11 and ninja, and not torch.

csrc/bindings.cpp and csrc/cpu/*.cpp are always compiled, csrc/cuda/*.cu where nvcc is found. A .cu file's name ends in
the lowest architecture it is for: *_sm80.cu is compiled for every architecture from 80 on, *_sm90a.cu for 90a alone,
since code for an architecture with a letter runs on no other.

SPARSEKIT_CUDA=0 leaves CUDA out; SPARSEKIT_CUDA_ARCHS="80 90a 120" chooses the architectures.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = ("80", "90a", "120")

# A file's instruction set is chosen here, the path in use by the CPU at run time. GCC's own intrinsics warn (PR 105593).
# Loops of a few instructions, such as those that count, take a third longer where they straddle lines.
AVX2 = "-mavx2 -mfma -mf16c -mbmi2 -falign-loops=64 -Wno-uninitialized -Wno-maybe-uninitialized"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISA_FLAGS = {"avx2": AVX2, "avx512": AVX512, "vbmi2": f"{AVX512} -mavx512vbmi2"}


def cpu_sources() -> list[Path]:
    """csrc/cpu/*.cpp, without the x86 paths elsewhere."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [s for s in sorted(CSRC.glob("cpu/*.cpp")) if x86 or isa(s) is None]


def isa(source: Path) -> str | None:
    suffix = source.stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else None


class Toolkit:
    """The CUDA toolkit of one nvcc: where it lies and what it compiles for."""

    def __init__(self, nvcc: str):
        self.nvcc = nvcc
        with tempfile.TemporaryDirectory() as folder:
            dummy = Path(folder, "dummy.cu")
            dummy.touch()
            # The path of nvcc itself says nothing: it may be a wrapper script.
            dry = subprocess.run([nvcc, "-v", "-dryrun", str(dummy)], cwd=folder, capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
        if dry.returncode or not top:
            raise RuntimeError(f"setup.py: nvcc -v -dryrun must print TOP=, got from {nvcc}: {dry.stderr.strip()[-300:]}")
        self.top = Path(top[1].strip().strip('"')).resolve()
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        self.known = set(re.findall(r"compute_(\d+)", listed))

    def folder(self, name: str, holds: str) -> Path:
        """include or lib, in whichever of the toolkit's layouts."""
        places = [self.top / name, self.top / f"{name}64", *sorted(self.top.glob(f"targets/*/{name}"))]
        found = [place for place in places if (place / holds).exists()]
        if not found:
            raise RuntimeError(f"setup.py: the CUDA toolkit must have {holds}, not found under {self.top}")
        return found[0]

    def archs(self) -> list[str]:
        """The architectures to compile for, ascending."""
        asked = os.environ.get("SPARSEKIT_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
        archs = asked or [a for a in DEFAULT_ARCHS if a.rstrip("af") in self.known]
        for arch in archs:
            if not re.fullmatch(r"\d+[af]?", arch) or arch.rstrip("af") not in self.known:
                known = " ".join(sorted(self.known, key=int))
                raise RuntimeError(f"setup.py: SPARSEKIT_CUDA_ARCHS must be of {known} (or 90a and the like), got {arch!r}")
        return sorted(set(archs), key=lambda a: (number(a), a))


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def archs_of(source: Path, archs: list[str]) -> list[str]:
    """Those of `archs` that a .cu file is for, by the rule at the head of this file."""
    lowest = re.search(r"_sm(\d+[af]?)$", source.stem)
    if not lowest:
        raise RuntimeError(f"setup.py: the name of a .cu file must end in _sm and its lowest architecture, got {source.name}")
    if not lowest[1].isdigit():
        return [a for a in archs if a == lowest[1]]
    return [a for a in archs if number(a) >= int(lowest[1])]


def gencode(archs: list[str], lowest: bool) -> list[str]:
    """One binary an architecture; with `lowest`, PTX too, from which a driver compiles for what is not in the list."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    if lowest:
        flags.append(f"-gencode=arch=compute_{number(archs[0])},code=compute_{number(archs[0])}")
    return flags


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def find_toolkit() -> Toolkit | None:
    """The toolkit to build with, or None after one line that says why not."""
    if os.environ.get("SPARSEKIT_CUDA", "1") == "0":
        print("sparsekit: SPARSEKIT_CUDA=0, building for the CPU only", file=sys.stderr)
    elif nvcc := find_nvcc():
        return Toolkit(nvcc)
    else:
        print("sparsekit: no nvcc found, building for the CPU only", file=sys.stderr)
    return None


def find_ninja() -> str:
    try:
        import ninja

        beside = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        beside = None
    # In an isolated build the package does not know where its program is, but the path does.
    if not (found := beside or shutil.which("ninja")):
        raise RuntimeError("setup.py: ninja must be installed, found neither the package nor the program")
    return found


def quote(path) -> str:
    """A path or value as ninja text."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Build:
    """The text of build.ninja."""

    def __init__(self, folder: Path):
        import pybind11

        self.folder = folder
        self.flags = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"]
        self.flags += ["-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
        self.includes = [pybind11.get_include(), sysconfig.get_path("include")]
        self.link = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
        self.libraries = ["-pthread"]
        self.edges, self.objects = [], []

    def compile(self, rule: str, source: Path, flags: list[str]) -> None:
        target = Path(source.relative_to(CSRC)).with_suffix(".o")
        self.objects.append(target)
        self.edges += [f"build {quote(target)}: {rule} {quote(source)}", f"  flags = {' '.join(flags)}"]

    def add_cpu(self, defines: list[str]) -> None:
        includes = [f"-isystem {quote(i)}" for i in self.includes]
        self.compile("cxx", CSRC / "bindings.cpp", self.flags + defines + includes)
        for source in cpu_sources():
            self.compile("cxx", source, self.flags + ISA_FLAGS.get(isa(source), "").split())

    def add_cuda(self, toolkit: Toolkit, sources: list[Path], archs: list[str]) -> list[str]:
        """Compiles the .cu files; returns what bindings.cpp must define."""
        host = "-fPIC,-fvisibility=hidden"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-DSPARSEKIT_CUDA", "--threads=0", f"-Xcompiler={host}"]
        chosen = {source: archs_of(source, archs) for source in sources}
        if not any(chosen.values()):
            print(f"sparsekit: no kernel is for the architectures {' '.join(archs)}, building for the CPU only", file=sys.stderr)
            return []
        for source in filter(chosen.get, sources):
            self.compile("nvcc", source, flags + gencode(chosen[source], lowest=source.stem[-1].isdigit()))
        self.includes.append(toolkit.folder("include", "cuda_runtime.h"))
        library = toolkit.folder("lib", "libcudart_static.a") / "libcudart_static.a"
        # Static, its symbols kept inside: torch brings a runtime of its own, and no driver is needed to import.
        self.libraries += [quote(library), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
        # A kernel for one architecture alone may be missing: bindings.cpp asks for SPARSEKIT_LINEAR24_SM90A and the like.
        kernels = [f"-DSPARSEKIT_{source.stem.upper()}" for source in filter(chosen.get, sources)]
        return ["-DSPARSEKIT_CUDA", "-DSPARSEKIT_CUDA_ARCHS='\"" + ",".join(archs) + "\"'", *kernels]

    def write(self, target: Path, nvcc: str) -> None:
        cxx = os.environ.get("CXX", "c++")
        objects = " ".join(map(quote, self.objects))
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {cxx} -MD -MF $out.d $flags {os.environ.get('CXXFLAGS', '')} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {quote(nvcc)} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} {' '.join(self.link)} $in {os.environ.get('LDFLAGS', '')} {' '.join(self.libraries)} -o $out",
            *self.edges,
            f"build {quote(target)}: link {objects}",
            f"default {quote(target)}",
        ]
        (self.folder / "build.ninja").write_text("\n".join(lines) + "\n")


class BuildWithNinja(build_ext):
    """setuptools decides where the module goes, ninja what has to be compiled again."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build, defines = Build(folder), []
        cuda = sorted(CSRC.glob("cuda/*.cu"))
        toolkit = find_toolkit() if cuda else None
        if toolkit:
            defines = build.add_cuda(toolkit, cuda, toolkit.archs())
        build.add_cpu(defines)
        build.write(target, toolkit.nvcc if toolkit else "nvcc")
        subprocess.run([find_ninja(), "-C", str(folder), *(["-v"] if self.verbose > 1 else [])], check=True)


# Folders outside sparsekit/ that install as parts of it.
PLACED = {
    "sparsekit.kernels": "kernels",
    "sparsekit.assets.kjv1m": "tests/data/kjv1m",
    "sparsekit.assets.text": "examples/data",
}
placed = {package: folder for package, folder in PLACED.items() if (ROOT / folder).is_dir()}

setup(
    packages=[*find_packages(include=["sparsekit", "sparsekit.*"]), *placed],
    package_dir=placed,
    package_data={"sparsekit": ["tune.json"], "sparsekit.analysis": ["page.html", "page.js"]}
    | {package: ["*", "**/*"] for package in placed if package.startswith("sparsekit.assets.")},
    ext_modules=[
        Extension(
            "sparsekit._C",
            sources=[str(s.relative_to(ROOT)) for s in sorted(CSRC.glob("**/*.c*")) if s.suffix in (".cpp", ".cu")],
            depends=[str(s.relative_to(ROOT)) for s in sorted(CSRC.glob("**/*.*h"))],
        )
    ],
    cmdclass={"build_ext": BuildWithNinja},
)
