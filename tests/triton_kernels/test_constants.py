"""Constants of the Triton kernels that the C++ headers have, too: Triton can read no header.

Equal results in the other tests do not show all of them: a margin may be too small for years.
A margin of 8 in either file, and two columns of the table swapped in one, failed here when tried.
"""

from __future__ import annotations

import importlib
import re

from gpu_tools import require
from repository import ROOT

from sparse_optim import estimate
from sparse_optim.backends import noise

require("triton")

CORE = ROOT / "csrc" / "core"
kernels = importlib.import_module("sparse_optim.triton_kernels")
elements, update, triton_noise = (
    importlib.import_module(f"sparse_optim.triton_kernels.{name}")
    for name in ("device_functions", "update", "noise")
)


def found(pattern: str, header: str) -> str:
    """What the group of the pattern matches in a header."""
    match = re.search(pattern, (CORE / header).read_text())
    assert match is not None, f"{header} has no {pattern}"
    return match[1]


def constant(name: str, header: str) -> int:
    """Value of a constexpr integer, which may be written as a shift."""
    text = found(rf"constexpr \w+ {name} = ([^;]+);", header)
    base, _, shift = text.replace("u", "").partition("<<")
    return int(base, 0) << int(shift or "0")


def test_keys() -> None:
    assert elements.POWER_MARGIN.value == constant("kPowMargin", "importance.h")
    assert elements.INFINITY_BITS.value == constant("kInfinityBits", "types.h")


def test_tile() -> None:
    """The plan of `estimate` counts the tiles that both GPU backends have, the largest allowed."""
    cuda = (ROOT / "sparse_optim" / "backends" / "cuda.py").read_text()  # imports only when built
    assert re.findall(r"^TILE = (\d+)$", cuda, re.MULTILINE) == [str(kernels.TILE)]
    assert kernels.TILE == estimate.TILE == constant("kMaxTile", "pool.h")


def test_noise() -> None:
    below = triton_noise.REFINED_BELOW.value
    assert below == noise.REFINED_BELOW == constant("kRefinedBelow", "noise.h")
    assert triton_noise.LN2.value == noise.LN2
    assert float.fromhex(found(r"halvings \* (\S+)f ", "noise.h")) == noise.LN2


def test_table() -> None:
    columns = re.findall(r"k(\w+)", found(r"enum Column \{(.*?)\}", "pool.h"))
    assert [getattr(elements, name.upper()).value for name in columns] == [0, 1, 2, 3, 4]
    codes = re.findall(r"k(\w+) = (\d)", found(r"enum class DType : int32_t \{(.*?)\}", "types.h"))
    assert len(codes) == 3
    for name, code in codes:
        assert getattr(elements, name.upper()).value == int(code)


def test_hyper_parameters() -> None:
    columns = found(r"struct Hyper \{\s+double (.*?);", "pool.h").split(", ")
    assert [getattr(update, name.upper()).value for name in columns] == [0, 1, 2, 3, 4, 5]
    assert update.NUM_HYPER.value == len(columns)
