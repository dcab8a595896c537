"""A process in which Triton compiles instead of launching, for a chip that need not be there: ``python ahead_of_time.py``.

Reads a JSON list of (call, architecture) from stdin, each call an expression of a launcher and the names below. Prints what is in
the kernels of each, ``found``, and for each architecture the ``last`` kernel's operations as two programs read them."""

import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sparsekit.kernels.compress24 import compress24, compress24_kernel
from sparsekit.kernels.expand24 import expand24, expand24_kernel
from sparsekit.kernels.expand_fragments import expand_fragments, expand_fragments_kernel
from sparsekit.kernels.gram import gram, gram_kernel
from sparsekit.kernels.mask_long_rows import count_digits_kernel, keep_above_kernel
from sparsekit.kernels.mask_nm import mask_nm, mask_nm_kernel
from sparsekit.kernels.mask_rows import mask_rows, mask_rows_kernel
from sparsekit.kernels.obs import obs, obs_block_kernel
from sparsekit.kernels.prune24 import prune24, prune24_kernel
from sparsekit.kernels.prune_compress24 import prune_compress24, prune_compress24_kernel
from sparsekit.kernels.validate24 import validate24, validate24_kernel

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CHIPS = {80: "SM80", 90: "SM90a", 100: "SM100a"}  # as Triton compiles for them, by nvdisasm's names
KERNELS = (
    prune_compress24_kernel, prune24_kernel, compress24_kernel, expand24_kernel, expand_fragments_kernel, validate24_kernel,
    mask_nm_kernel, mask_rows_kernel, gram_kernel, obs_block_kernel, count_digits_kernel, keep_above_kernel,
)  # fmt: skip


def dense(dtype: torch.dtype, cols: int = 4096) -> torch.Tensor:
    return torch.empty((4096, cols), dtype=dtype)


def words(tiles: int, chunks: int) -> torch.Tensor:
    return torch.empty((tiles, chunks, 32, 4), dtype=torch.int32)


NAMES = {
    **dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32, fp8=torch.float8_e4m3fn, int8=torch.int8),
    **{f.__name__: f for f in (prune_compress24, prune24, compress24, expand24, expand_fragments, validate24)},
    **{f.__name__: f for f in (mask_nm, mask_rows, gram, obs, dense, words)},
    "torch": torch,
}


def stop_launches() -> list:
    """From here on a launch ends in the list, compiled."""
    compiled = []
    for kernel in KERNELS:
        kernel.run = lambda *args, run=kernel.run, **kwargs: compiled.append(run(*args, **kwargs | {"warmup": True}))
    return compiled


def launched(call: str, arch: int, compiled: list) -> list:
    """Every kernel that the call launches."""
    chip = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(chip)
    compiled.clear()
    eval(call, dict(NAMES))
    return list(compiled)


def machine_code(cubin: bytes) -> bytes:
    """The section of an ELF file that holds the code of its one kernel."""
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    text = [head for head in heads if cubin.startswith(b".text.", heads[names][4] + head[0])]
    if len(text) != 1:
        raise ValueError(f"ahead_of_time: a file must hold one kernel, got {len(text)}")
    return cubin[text[0][4] : text[0][4] + text[0][5]]


def run(tool: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def instructions(listing: str) -> list[str]:
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)


def disassembled(cubins: list[bytes], arch: int) -> list[list[str]]:
    """The instructions of each file, all read at once: a start of nvdisasm takes longer than all that it reads then."""
    codes = [machine_code(cubin) for cubin in cubins]
    listed = instructions(run("nvdisasm", b"".join(codes), "--binary", CHIPS[arch]))
    if len(listed) != sum(map(len, codes)) // 16:
        raise ValueError(f"ahead_of_time: each 16 bytes must be an instruction, got {len(listed)} of {sum(map(len, codes))} bytes")
    left = iter(listed)
    return [list(itertools.islice(left, len(code) // 16)) for code in codes]


def read(built, code: list[str]) -> dict:
    """What is in a kernel of these instructions."""
    widths = {"ld": [], "st": []}
    ptx = built.asm["ptx"]
    for op, vector, bits in re.findall(r"\b(ld|st)\.global\S*?\.(?:v(\d)\.)?[bsuf](\d+)\b", ptx):
        widths[op].append(int(vector or 1) * int(bits) // 8)
    copies = [int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x\w+|\d+)", ptx)]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", built.asm["cubin"], "-res-usage")).groups()
    code = [line for line in code if "NOP" not in line]
    return dict(
        loads=widths["ld"], stores=widths["st"], copies=copies, local=[line for line in code if re.search(r"\b(LDL|STL)\b", line)],
        tensor=re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", " ".join(code)),
        stack=int(stack), registers=int(registers), instructions=len(code), shared=built.metadata.shared, hash=built.hash,
    )  # fmt: skip


def together(kernels: list[dict]) -> dict:
    """What is in the kernels of one launch."""
    whole = {key: [held for one in kernels for held in one[key]] for key in ("loads", "stores", "copies", "local", "tensor")}
    whole |= {key: max(one[key] for one in kernels) for key in ("stack", "registers", "instructions", "shared")}
    return whole | dict(kernels=len(kernels), hashes=[one["hash"] for one in kernels])


def operations(code: list[str]) -> list[str]:
    """Without the operands, among which are addresses."""
    return [re.match(r"(?:@\S+\s+)?\S+", line)[0] for line in code]


def main() -> None:
    asked, compiled = json.load(sys.stdin), stop_launches()
    calls = [(arch, launched(call, arch, compiled)) for call, arch in asked]
    codes, last = {}, {}
    for arch in CHIPS:
        cubins = [built.asm["cubin"] for of, kernels in calls if of == arch for built in kernels]
        if cubins:
            listed = disassembled(cubins, arch)
            last[arch] = [operations(listed[-1]), operations(instructions(run("cuobjdump", cubins[-1], "-sass")))]
            codes[arch] = iter(listed)
    found = [together([read(built, next(codes[arch])) for built in kernels]) for arch, kernels in calls]
    json.dump({"found": found, "last": last}, sys.stdout)


if __name__ == "__main__":
    main()
