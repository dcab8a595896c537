"""The Triton kernels compile, without a GPU, for the chips they are meant for, and to the code they are meant to become.

What is compiled is what the launchers launch: a child process (ahead_of_time.py), in which Triton compiles instead of interpreting
and is told that there is such a chip, calls them with tensors of a model's shapes and stops each launch once it is compiled. What
is asserted is in the machine code: 16-byte loads, and nothing in local memory. Nothing here has run on hardware.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ARCHS = (80, 90, 100)
# Launches by name that stream matrices in.
STREAMING = {
    "prune_compress24 bf16": "prune_compress24(dense(bf16))",
    "prune_compress24 fp16": "prune_compress24(dense(fp16))",
    "prune_compress24 fp32": "prune_compress24(dense(fp32))",
    "prune_compress24 int8": "prune_compress24(dense(int8))",
    "prune_compress24 fp8": "prune_compress24(dense(fp8))",
    "prune_compress24 transposed": "prune_compress24(dense(bf16).t())",
    "prune_compress24 rows of a wider matrix": "prune_compress24(dense(bf16)[:, :2048])",
    "prune_compress24 by fp32 scores": "prune_compress24(dense(bf16), scores=dense(fp32))",
    "prune_compress24 by mask": "prune_compress24(dense(bf16), mask=dense(torch.bool))",
    "prune24 bf16": "prune24(dense(bf16))",
    "prune24 fp32": "prune24(dense(fp32))",
    "prune24 int8": "prune24(dense(int8))",
    "prune24 fp8": "prune24(dense(fp8))",
    "prune24 transposed": "prune24(dense(bf16).t())",
    "prune24 rows of a wider matrix": "prune24(dense(bf16)[:, :2048])",
    "prune24 by fp32 scores": "prune24(dense(bf16), scores=dense(fp32))",
    "prune24 by mask": "prune24(dense(bf16), mask=dense(torch.bool))",
    "compress24 bf16": "compress24(dense(bf16))",
    "compress24 fp16": "compress24(dense(fp16))",
    "compress24 fp32": "compress24(dense(fp32))",
    "compress24 int8": "compress24(dense(int8))",
    "compress24 fp8": "compress24(dense(fp8))",
    "compress24 transposed": "compress24(dense(bf16).t())",
    "validate24 bf16": "validate24(dense(bf16, 2048), dense(torch.uint8, 512), 4096)",
    "mask_nm 2:4 bf16": "mask_nm(dense(bf16), 2, 4)",
    "mask_nm 4:8 fp32": "mask_nm(dense(fp32), 4, 8)",
    "mask_nm 16:32 bf16": "mask_nm(dense(bf16), 16, 32)",
    "mask_nm 2:4 pairs fp16": "mask_nm(dense(fp16), 2, 4, pairs=True)",
    "mask_rows bf16": "mask_rows(dense(bf16), 2048)",
    "mask_rows 16384 columns fp32": "mask_rows(dense(fp32, 16384), 8192)",
    "mask_rows 53248 columns fp32": "mask_rows(dense(fp32, 53248), 16384)",
    "mask_rows transposed": "mask_rows(dense(bf16).t(), 2048)",
    "gram bf16": "gram(dense(fp32), dense(bf16))",
    "gram fp16, small": "gram(dense(fp32, 1024)[:1024], dense(fp16, 1024))",
}
# Launches of several kernels, which also read what one kernel left to the next.
LONG = {
    "mask_rows fp32, a long row": "mask_rows(torch.empty(1, 524288), 200000)",
    "mask_rows bf16, a long row": "mask_rows(torch.empty(1, 524288, dtype=bf16), 200000)",
}
# The OBS step: panels of w are read and written 16 bytes at a time, rows of U by halves of a thread's four columns.
BLOCK, UPPER = "dense(fp32)[:, :128]", "dense(fp32)[:128, :128]"
OBS = {
    "obs 2:4": f"obs({BLOCK}, {UPPER}, None, 2, 4)",
    "obs 4:8": f"obs({BLOCK}, {UPPER}, None, 4, 8)",
    "obs 16:32": f"obs({BLOCK}, {UPPER}, None, 16, 32)",
    "obs 4:8 pairs": f"obs({BLOCK}, {UPPER}, None, 2, 4, pairs=True)",
    "obs 32:64 pairs": f"obs({BLOCK}, {UPPER}, None, 16, 32, pairs=True)",
    "obs by a mask": f"obs({BLOCK}, {UPPER}, dense(torch.bool, 128))",
    "obs 2:4 of a batch": "obs(dense(fp32).view(4, 1024, 4096)[..., :128], dense(fp32)[:512, :128].view(4, 128, 128), None, 2, 4)",
}
OBS_UNEVEN = {
    "obs 3:5": f"obs({BLOCK}, {UPPER}, None, 3, 5)",
    "obs a ragged block": "obs(dense(fp32, 100), dense(fp32, 100)[:100], None, 2, 4)",
}
# Launches by name that also look at the end of each row.
ENDING = {
    "validate24 bf16, half a byte": "validate24(dense(bf16, 2048), dense(torch.uint8, 512), 4092)",
    "validate24 fp32, half a byte": "validate24(dense(fp32, 2048), dense(torch.uint8, 512), 4092)",
}
# Launches by name that stream one out, at twice the width of what they read.
WRITING = {
    "expand24 bf16": "expand24(dense(bf16, 2048), dense(torch.uint8, 512))",
    "expand24 fp32": "expand24(dense(fp32, 2048), dense(torch.uint8, 512))",
    "expand24 fp8": "expand24(dense(fp8, 2048), dense(torch.uint8, 512))",
    "expand24 without the last columns": "expand24(dense(bf16, 2048), dense(torch.uint8, 512), 4080)",
}
# And from fragment order.
FRAGMENTS = {
    "expand_fragments bf16": "expand_fragments(torch.empty(256, 64, 2, 32, 8).to(bf16), words(256, 16), 4096, 4096)",
    "expand_fragments fp8": "expand_fragments(torch.empty(256, 64, 1, 32, 16).to(fp8), words(256, 16), 4096, 4096)",
    "expand_fragments ragged": "expand_fragments(torch.empty(256, 64, 2, 32, 8).to(bf16), words(256, 16), 4090, 4080)",
}
# Launches by name of masks whose groups are no power of two, and the bytes of the neighbours that one load takes.
UNEVEN = {
    "mask_nm 2:3 int8": ("mask_nm(dense(int8), 2, 3)", 1),
    "mask_nm 3:5 bf16": ("mask_nm(dense(bf16), 3, 5)", 2),
    "mask_nm 3:5 pairs bf16": ("mask_nm(dense(bf16), 3, 5, pairs=True)", 4),
    "mask_nm 3:6 bf16": ("mask_nm(dense(bf16), 3, 6)", 4),
    "mask_nm 7:12 bf16": ("mask_nm(dense(bf16), 7, 12)", 8),
    "mask_nm 12:24 fp16": ("mask_nm(dense(fp16), 12, 24)", 16),
    "mask_nm 5:31 fp32": ("mask_nm(dense(fp32), 5, 31)", 4),
    "mask_nm 3:12 transposed": ("mask_nm(dense(bf16).t(), 3, 12)", 16),
}
# Launches whose sizes are 1, which become constants of the kernel.
TINY = {
    "prune_compress24 one weight": "prune_compress24(torch.empty(1, 1))",
    "prune_compress24 one score": "prune_compress24(torch.empty(1, 1), scores=torch.empty(1, 1).double())",
    "prune24 one weight": "prune24(torch.empty(1, 1))",
    "prune24 one mask": "prune24(torch.empty(1, 1), mask=torch.ones(1, 1, dtype=torch.bool))",
    "compress24 one byte": "compress24(torch.empty(1, 8))",
    "expand24 one byte": "expand24(torch.empty(1, 4), torch.empty(1, 1, dtype=torch.uint8))",
    "expand24 one column": "expand24(torch.empty(2, 4), torch.empty(2, 1, dtype=torch.uint8), 1)",
    "validate24 one byte": "validate24(torch.empty(1, 4), torch.empty(1, 1, dtype=torch.uint8), 1)",
    "validate24 one word": "validate24(torch.empty(1, 16), torch.empty(1, 4, dtype=torch.uint8), 32)",
    "validate24 one byte a row": "validate24(torch.empty(4, 4).to(fp8), torch.empty(4, 1, dtype=torch.uint8), 5)",
    "expand_fragments one weight": "expand_fragments(torch.empty(1, 1, 2, 32, 8).to(bf16), words(1, 1), 1, 1)",
    "expand_fragments one int8": "expand_fragments(torch.empty(1, 1, 1, 32, 16).to(int8), words(1, 1), 1, 1)",
    "mask_nm one of one": "mask_nm(torch.empty(1, 1), 1, 1)",
    "mask_nm one of 16": "mask_nm(torch.empty(1, 1), 1, 16)",
    "mask_nm one of 5": "mask_nm(torch.empty(1, 1), 1, 5)",
    "mask_nm one pair of fp8": "mask_nm(torch.empty(1, 1).to(fp8), 1, 2, pairs=True)",
    "mask_rows one column": "mask_rows(torch.empty(1, 1), 1)",
    "gram one": "gram(torch.empty(1, 1), torch.empty(1, 1, dtype=bf16))",
    "obs one weight": "obs(torch.empty(1, 1), torch.empty(1, 1), None, 1, 2)",
    "mask_rows one of a long row": "mask_rows(torch.empty(1, 20000).double(), 1)",
}
# Launches that differ from one of that name in a number that no address hangs on: they are not compiled anew.
ALIKE = {
    "obs 2:4": f"obs({BLOCK}, {UPPER}, None, 0, 4)",
    "mask_nm 2:4 bf16": "mask_nm(dense(bf16), 1, 4)",
    "mask_rows bf16": "mask_rows(dense(bf16), 2047)",
    "mask_rows fp32, a long row": "mask_rows(torch.empty(1, 524288), 1)",
    "expand24 without the last columns": "expand24(dense(bf16, 2048)[:4095], dense(torch.uint8, 512)[:4095], 4080)",
    "expand_fragments bf16": "expand_fragments(torch.empty(256, 64, 2, 32, 8).to(bf16), words(256, 16), 4095, 4096)",
    "validate24 bf16, half a byte": "validate24(dense(bf16, 2048)[:4095], dense(torch.uint8, 512)[:4095], 4089)",
}


# What is compiled for every chip: each kernel, dtype and layout, what takes the most of a kernel's registers, what has none left,
# and what uses tensor cores. The others move the same bytes on every chip, as these do: of them one chip's code is read.
EVERYWHERE = {
    "prune_compress24 bf16", "prune_compress24 fp8", "prune_compress24 transposed", "prune_compress24 by fp32 scores",
    "prune24 fp32", "prune24 int8", "prune24 transposed", "prune24 rows of a wider matrix", "prune24 by mask", "compress24 fp16",
    "compress24 fp8", "validate24 bf16", "validate24 fp32, half a byte", "expand24 bf16", "expand24 without the last columns",
    "expand_fragments fp8", "expand_fragments ragged", "mask_nm 16:32 bf16", "mask_nm 2:4 pairs fp16", "mask_nm 5:31 fp32",
    "mask_nm 3:12 transposed", "mask_rows 53248 columns fp32", "mask_rows transposed", "mask_rows bf16, a long row", "gram bf16",
    "gram fp16, small", *OBS, *OBS_UNEVEN,
}  # fmt: skip


def on(*groups):
    """(name, arch) for the launches of the groups, each for the chips that it is compiled for."""
    return [(name, arch) for group in groups for name in group for arch in ARCHS if arch == 90 or name in EVERYWHERE]


CASES = on(STREAMING, WRITING, FRAGMENTS, ENDING, UNEVEN, LONG, OBS, OBS_UNEVEN) + [(name, 90) for name in TINY]
CASES += [(f"like {name}", 90) for name in ALIKE]


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """What two processes that share nothing with this one compiled, every other case each."""
    calls = STREAMING | WRITING | FRAGMENTS | ENDING | LONG | OBS | OBS_UNEVEN | TINY
    calls = calls | {name: call for name, (call, _) in UNEVEN.items()} | {f"like {name}": call for name, call in ALIKE.items()}
    folder = tmp_path_factory.mktemp("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, Path(__file__).with_name("ahead_of_time.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = []
    for half in (CASES[::2], CASES[1::2]):
        child = subprocess.Popen(command, **pipes, text=True, env=env, cwd=folder)
        child.stdin.write(json.dumps([(calls[name], arch) for name, arch in half]))
        child.stdin.close()
        child.stdin = None
        started.append(child)
    said = [child.communicate() for child in started]
    assert [child.returncode for child in started] == [0, 0], said[0][1][-4000:] + said[1][1][-4000:]
    return [json.loads(out) for out, _ in said]


@pytest.fixture(scope="module")
def compiled(children):
    """{(name, arch): what the machine code holds}."""
    return dict(zip(CASES[::2] + CASES[1::2], children[0]["found"] + children[1]["found"]))


def test_all_the_machine_code_is_read_as_that_of_one_kernel_is(children):
    # All kernels of a chip are disassembled as one: what is read for the last of them is what cuobjdump reads in its file.
    for child in children:
        assert set(child["last"]) == {str(arch) for arch in ARCHS}
        for ours, theirs in child["last"].values():
            assert len(ours) > 50 and ours == theirs


def test_the_child_finds_what_it_looks_for(compiled):
    # Were the patterns that read PTX and SASS wrong, the tests below would pass on nothing.
    assert set(compiled) == set(CASES)
    for (name, _), result in compiled.items():
        assert result["loads"] and (result["stores"] or "validate24" in name)
        assert result["instructions"] > 50 and result["registers"] > 8


def test_every_kernel_is_compiled_for_every_chip():
    assert {name.split()[0] for name, _ in CASES} - {"like"} == {name.split()[0] for name in EVERYWHERE}
    assert set(CASES) >= {(name, arch) for name in EVERYWHERE for arch in ARCHS}


@pytest.mark.parametrize("name", ALIKE)
def test_a_number_that_no_address_hangs_on_compiles_nothing_anew(compiled, name):
    assert compiled[f"like {name}", 90]["hashes"] == compiled[name, 90]["hashes"]


@pytest.mark.parametrize("name, arch", on(STREAMING))
def test_every_load_is_16_bytes(compiled, name, arch):
    assert set(compiled[name, arch]["loads"]) == {16}


@pytest.mark.parametrize("name, arch", on(UNEVEN))
def test_a_load_is_a_run_of_neighbours(compiled, name, arch):
    assert set(compiled[name, arch]["loads"]) == {UNEVEN[name][1]}


@pytest.mark.parametrize("name, arch", on(LONG))
def test_long_rows_are_read_16_bytes_at_a_time(compiled, name, arch):
    result = compiled[name, arch]
    assert result["kernels"] == (5 if "fp32" in name else 3)
    assert set(result["loads"]) == {16, 4}  # 4: how many ties each program of the row saw
    assert result["loads"].count(4) <= 4 and set(result["stores"]) == {8, 16}


@pytest.mark.parametrize("name, arch", on(OBS))
def test_the_obs_step_moves_w_16_bytes_at_a_time(compiled, name, arch):
    result = compiled[name, arch]
    assert 16 in result["loads"] and 16 in result["stores"] and 16 in result["copies"] and result["tensor"] == []


@pytest.mark.parametrize("name, arch", on(name for name in STREAMING if name.startswith("gram")))
def test_the_gram_matrix_is_summed_on_tensor_cores(compiled, name, arch):
    result = compiled[name, arch]
    assert set(result["tensor"]) == {{80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]}
    assert set(result["copies"]) == set(result["stores"]) == {16}


@pytest.mark.parametrize("name, arch", on(ENDING))
def test_a_row_end_is_two_loads(compiled, name, arch):
    # 256 row ends and 8 KiB of metadata, for 128 threads.
    end = 16 if "fp32" in name else 8
    assert sorted(compiled[name, arch]["loads"]) == sorted(4 * [16] + 2 * [1, end])


@pytest.mark.parametrize("name, arch", on(FRAGMENTS))
def test_fragments_are_exchanged_once(compiled, name, arch):
    """128 threads read 4 KiB of values and 512 bytes of metadata (8 bits: 1 KiB), and write 8 KiB."""
    result = compiled[name, arch]
    assert sorted(result["loads"]) == [8 if "fp8" in name else 4, 16, 16] and result["stores"] == [16] * 4
    assert result["shared"] <= 8192


@pytest.mark.parametrize("name, arch", on(WRITING, [name for name in STREAMING if name.startswith("prune24")]))
def test_every_store_is_16_bytes(compiled, name, arch):
    result = compiled[name, arch]
    assert set(result["stores"]) == {16}
    assert name in STREAMING or (max(result["loads"]) == 8 and len(result["loads"]) <= 2 * len(result["stores"]))


@pytest.mark.parametrize("name, arch", on(name for name in STREAMING if "compress24" in name))
def test_values_are_stored_8_bytes_at_a_time_or_more(compiled, name, arch):
    # A 16-byte load of a weight leaves 8 bytes of values; only the metadata, a sixteenth or less, is stored in small pieces.
    stores = compiled[name, arch]["stores"]
    wide = [width for width in stores if width >= 8]
    assert 2 * len(wide) >= len(stores) and sum(wide) >= 4 * (sum(stores) - sum(wide))


@pytest.mark.parametrize("name, arch", CASES)
def test_nothing_is_in_local_memory(compiled, name, arch):
    result = compiled[name, arch]
    assert result["local"] == [] and result["stack"] == 0


@pytest.mark.parametrize(
    "name, arch",
    on(
        ["prune_compress24 bf16", "prune24 bf16", "compress24 bf16", "expand24 bf16", "validate24 bf16"],
        ["mask_nm 2:4 bf16", "mask_nm 4:8 fp32", "mask_nm 3:5 bf16", "mask_nm 3:5 pairs bf16"],
    ),
)
def test_groups_stay_in_their_thread(compiled, name, arch):
    # Shared memory then holds one word a warp, for the reduction that reports bad groups.
    assert compiled[name, arch]["shared"] <= 64
