"""docs/format.md says what is so: its code is run, its tables and its row by hand are compared with the code."""

import itertools
import re
from fractions import Fraction
from pathlib import Path

import cutlass_model
import numpy as np
import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from weights24 import any_sparse, array, group_weight, same

from sparsekit import format, ops
from sparsekit.format import DTYPES, nbytes24

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/format.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def table(text: str) -> list[list[str]]:
    """The rows below the head of a table, as cells."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


@pytest.fixture(scope="module")
def code() -> dict:
    """What the page's Python defines."""
    names = {}
    for block in re.findall(r"(?m)^```python\n(.*?)^```", PAGE, re.S):
        exec(block, names)
    return names


def test_the_reader_in_ten_lines(code):
    lines = re.search(r"(?m)^```python\n(.*?)^```", section("From numpy"), re.S)[1].splitlines()
    assert len([line for line in lines if line]) <= 10
    for dtype in DTYPES:
        for n, k in [(5, 13), (3, 64), (1, 1), (0, 8), (4, 0)]:
            s = any_sparse(n, k, dtype)
            assert (code["expand24"](array(s.values), s.meta.numpy(), k) == array(ops.expand24(s))).all()


def test_the_row_by_hand():
    lines = {line.split()[0]: line.replace("|", " ").split()[1:] for line in section("A row by hand").splitlines() if "|" in line}
    w = [float(number) for number in lines["w"]]
    s = ops.compress24(torch.tensor([w]))
    nibbles = [n for byte in s.meta[0].tolist() for n in (byte & 15, byte >> 4)]
    assert len(w) == 10 and s.values[0].tolist() == [float(number) for number in lines["values"]]
    assert [f"{n:X}" for n in nibbles] == lines["nibble"] and [f"{byte:X}" for byte in s.meta[0].tolist()] == lines["meta"]
    assert [4 * i + c for i, n in enumerate(nibbles) for c in (n & 3, n >> 2)] == [int(column) for column in lines["keeps"]]
    assert [int(column) for column in lines["columns"]] == list(range(16))


def test_the_picture():
    picture = re.search(r"^values +a +b +c +d.*\nmeta +(\d{4}) (\d{4})", section("The layout"), re.M)
    s = ops.compress24(torch.tensor([[0, 1.0, 0, 2, 3, 0, 4, 0]]))
    assert s.values.tolist() == [[1, 2, 3, 4]] and s.meta.item() == int(picture[1] + picture[2], 2)


def test_sizes():
    text, seen = section("Sizes"), []
    for names, values, metadata, share in table(text):
        for name in names.split(", "):
            dtype = getattr(torch, name)
            dense = 64 * 512 * dtype.itemsize
            assert Fraction(nbytes24(64, 512, dtype), dense) == Fraction(share) == Fraction(values) + Fraction(metadata)
            if dtype != torch.float32:
                assert Fraction(format.to_fragments(any_sparse(64, 512, dtype)).nbytes, dense) == Fraction(share)
            seen.append(dtype)
    assert set(seen) == set(DTYPES)
    n, k, stored, dense = (
        int(number.replace(",", "")) for number in re.search(r"A (\d+) x (\d+) .*?: ([\d,]+) bytes of ([\d,]+\d)", text).groups()
    )
    assert (nbytes24(n, k, torch.bfloat16), n * k * 2) == (stored, dense)
    f = format.to_fragments(any_sparse(33, 300, torch.float16))
    assert "nf * (kf / 2 * itemsize + kq / 8)" in text and f.nbytes == 48 * (320 // 2 * 2 + 512 // 8)


@pytest.mark.parametrize("row", table(section("Groups with fewer than two non-zeros")), ids=lambda row: row[0])
def test_zeros_that_are_kept(row):
    columns = () if row[0] == "none" else (int(row[0].split()[1]),)
    w = group_weight(columns, 32, 128, torch.float16)
    theirs = format.from_torch_cutlass(*sparse_semi_structured_from_dense_cutlass(w))
    _, cutlass = cutlass_model.compress(array(w), 128, True)
    found = [
        ops.compress24(w).meta.numpy(),
        theirs.meta.numpy(),
        cutlass[cutlass_model.metadata_layout(32, 128, 16, 128)(0, 0) // 8],
    ]
    assert [f"{meta.item() if meta.ndim == 0 else np.unique(meta).item():02X}" for meta in found] == [
        2 * nibble for nibble in row[1:]
    ]


def test_all_five_ways_are_there():
    assert len(table(section("Groups with fewer than two non-zeros"))) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_the_picture_of_fragments(dtype):
    s, width = any_sparse(16, 64, dtype), 4 // dtype.itemsize  # elements of a register
    f = format.to_fragments(s)
    for first_row, line in ((0, r"row g \(0 to 7\)"), (8, r"row g \+ 8 ")):
        places = re.findall(r"q=(\d) a(\d)", re.search(f"^{line}.*", section("Fragment order"), re.MULTILINE)[0])
        assert len(places) == 8
        for g, (i, (q, a)) in itertools.product(range(8), enumerate(places)):
            held = f.values[0, 0, 0, 4 * g + int(q), width * int(a) : width * int(a) + width]
            assert same(held, s.values[first_row + g, width * i : width * i + width])
    words = array(f.meta)[0, 0, :, 0]
    for g, q in np.ndindex(8, 4):
        if dtype == torch.float16:
            half = array(s.meta).view("<u2")
            assert words[4 * g + q] == int(half[g, q]) | int(half[g + 8, q]) << 16
        else:
            assert words[4 * g + q] == array(s.meta).view("<u4")[g + 8 * (q % 2), q // 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_where_words_lie_in_torch(dtype, code):
    s = any_sparse(96, 256, dtype)
    words = s.meta.view(torch.int16 if dtype == torch.float16 else torch.int32)
    place = code["torch_word16" if dtype == torch.float16 else "torch_word32"]
    there = format.to_torch_cutlass(s)[1].flatten()
    assert sorted(place(96, r, c) for r, c in np.ndindex(*words.shape)) == list(range(len(there)))
    assert all(there[place(96, r, c)] == words[r, c] for r, c in np.ndindex(*words.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("tile_k", [64, 128])
def test_where_bytes_lie_in_cutlass(tile_k, dtype, code):
    s = any_sparse(130, 264, dtype)
    place = code["sm90_byte16" if dtype == torch.bfloat16 else "sm90_byte8"]
    there = format.to_cutlass_sm90(s, tile_k)[1].flatten()
    assert all(there[place(130, m, 8 * byte, tile_k)] == s.meta[m, byte] for m, byte in np.ndindex(*s.meta.shape))


def test_the_page_and_the_module_name_the_same_converters():
    converters = {name for name in vars(format) if re.match("to_|from_|dense_to_|bitmask_to_", name)}
    assert converters == set(re.findall(r"`(\w*(?:to|from)_\w+)`", section("Other layouts")))


def test_what_the_table_says_is_refused_and_taken():
    # The dtypes and multiples of the table of layouts.
    for row in table(section("Other layouts"))[:4]:
        names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
        taken = DTYPES if row[3] == "all five" else [names[name] for name in re.split("[,;] ", row[3])]
        convert = getattr(format, re.match(r"`(\w+)`", row[2])[1])
        for dtype in DTYPES:
            if dtype in taken:
                convert(any_sparse(32, 64, dtype))
            else:
                with pytest.raises(TypeError):
                    convert(any_sparse(32, 64, dtype))
        if "multiple of 4" in row[4]:
            with pytest.raises(ValueError, match="multiples of 4"):
                convert(any_sparse(3, 6, torch.float16))
        if row[4] == "any":
            assert same(format.from_fragments(convert(any_sparse(3, 6, torch.float16))), any_sparse(3, 6, torch.float16))


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
