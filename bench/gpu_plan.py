"""List the phases of a GPU report, most important first.

Two calls of less than five minutes each (`bench.gpu_first`, `bench.gpu_second`) take the phases
that a first quarter of an hour on a GPU needs; `bench.gpu` takes all of them.

Estimated (not measured) seconds for an H200 (4 TB/s) with 16 cores. A process takes 8 s to start. A
timed subject is called 20 times: 0.3 s for the device's head starts, 0.4 s to build our optimizer,
and 20 times its traffic, in multiples of the parameters' bytes P: ours 1.1, fused AdamW 7, 10 and
12 in its three modes, foreach about 20, 23 and 25. A `steps` phase (10 of ours, 6 of AdamW, the
read) then takes 8 + 17 * 0.3 + 10 * 0.4 s and 2200 P of traffic.

    first    build 60 (the checks of kernels_alone run beside it), library 8          68 s
             tests of both backends, side by side, some eighty Triton kernels: 100   168 s
             bandwidth 12, steps 7B 27, timings 15, stages 27, steps DeBERTa 18      267 s
             ncu 20                                                                  287 s
    second   training: eight of 15, two that are absent 8                            135 s
             caps 2 * 25, sampled_grad 15, top-k 15                                  215 s
             factors, steps 1B, DeBERTa bf16, tests of the reference: what fits

Phases that no longer fit are left out and named; `--only` runs them in a later call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.shapes import DTYPES, MODELS, num_entries

FIRST, SECOND = 1, 2


@dataclass(frozen=True)
class Cell:
    """A model, a dtype, and the settings around which `factors` varies one at a time."""

    model: str
    dtype: str
    budget: int = 3_500_000
    quota: int = 466
    exp: float = 0.0


@dataclass(frozen=True)
class Phase:
    """A step of the report, run as a process.

    Attributes:
        name: unique name.
        kind: a key of `gpu_commands.COMMANDS`, or of `gpu_phases.MEASURE`.
        limit_s: time limit in seconds.
        cell: settings of a phase that measures.
        which: what of its kind: tests (pytest -k), a tool, an optimizer, GiB.
        after: the phases that must have ended before; None: all before it in the list. Those that
            name others may run at the same time.
        calls: the calls that take it; `bench.gpu` takes all phases.
        needs_gpu: left out in a dry run.
    """

    name: str
    kind: str
    limit_s: float
    cell: Cell | None = None
    which: str = ""
    after: tuple[str, ...] | None = None
    calls: tuple[int, ...] = ()
    needs_gpu: bool = False

    @property
    def least_bytes(self) -> int:
        """Return the device memory of parameters, gradients, and the largest tensor in float32."""
        if self.cell is None or self.kind not in ("steps", "stages", "factors"):
            return 0
        shapes = MODELS[self.cell.model]
        largest = max(num_entries([shape]) for shape in shapes)
        return 2 * DTYPES[self.cell.dtype].itemsize * num_entries(shapes) + 4 * largest


ONE, SMALL, LARGE = "Llama-3.2-1B", "DeBERTa-base", "Llama-7B"
SEVEN, CENTRE = Cell(LARGE, "bf16"), Cell(ONE, "bf16")
DEFAULT = Cell(LARGE, "bf16", quota=17_500)  # 3.5M entries in a fifth of 1,000 steps
SMALL_FP32, SMALL_BF16 = Cell(SMALL, "fp32", 320_000), Cell(SMALL, "bf16", 320_000)
TINY = Cell("tiny", "bf16", 2000, 32)
TRAININGS = (
    "ordinary", "fused", "sampled", "AdamW", "LoRA", "torchao 8-bit", "bitsandbytes 8-bit",
)  # fmt: skip
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CAPS = {"40": "a100-40", "48": "a6000"}  # GiB of the cards that `sparse_optim.estimate` names


def _first() -> list[Phase]:
    tools = [  # one after the other, on the GPU, while the CPU builds
        Phase(tool, "sanitizer", 40, None, tool, (earlier,), (FIRST,), needs_gpu=True)
        for earlier, tool in zip(("check", *TOOLS), TOOLS, strict=False)
    ]
    return [
        Phase("build", "build", 120, after=(), calls=(FIRST,)),
        Phase("compile alone", "compile", 90, after=(), calls=(FIRST,)),
        Phase("check", "check", 30, after=("compile alone",), calls=(FIRST,)),
        Phase("check large", "check", 30, None, "large", ("check",), (FIRST,), needs_gpu=True),
        *tools,
        Phase("library", "library", 40, after=("build",), calls=(FIRST, SECOND)),
        Phase("tests cuda", "tests", 90, None, "cuda", ("library",), (FIRST,)),
        Phase("tests triton", "tests", 120, None, "triton", ("library",), (FIRST,), True),
        Phase("bandwidth", "bandwidth", 30, calls=(FIRST,)),
        Phase("steps 7B bf16", "steps", 75, SEVEN, calls=(FIRST,)),
        Phase("timings", "timings", 45, calls=(FIRST,)),
        Phase("stages 7B bf16", "stages", 60, SEVEN, calls=(FIRST,)),
        Phase("steps DeBERTa fp32", "steps", 45, SMALL_FP32, calls=(FIRST,)),
        Phase("ncu", "ncu", 45, calls=(FIRST,), needs_gpu=True),
    ]


def _second() -> list[Phase]:
    phases = [
        *(Phase(f"training {kind}", "training", 50, SEVEN, kind) for kind in TRAININGS),
        Phase("training fused, default quota", "training", 50, DEFAULT, "fused"),
        *(Phase(f"in {size} GiB", "capped", 60, SEVEN, size, needs_gpu=True) for size in CAPS),
        Phase("sampled_grad", "sampled_grad", 40, SEVEN),
        Phase("top-k", "topk", 40, SEVEN),
        Phase("factors 1B bf16", "factors", 60, CENTRE),
        Phase("steps 1B bf16", "steps", 60, CENTRE),
        Phase("steps DeBERTa bf16", "steps", 45, SMALL_BF16),
        Phase("tests reference", "tests", 90, which="not cuda and not triton", needs_gpu=True),
    ]
    return [replace(phase, calls=(SECOND,)) for phase in phases]


PHASES = (
    *_first(),
    *_second(),
    Phase("stages 1B bf16", "stages", 30, CENTRE),
    Phase("steps 1B fp32", "steps", 60, Cell(ONE, "fp32")),
    Phase("stages DeBERTa fp32", "stages", 30, SMALL_FP32),
    Phase("memcheck of tests", "sanitizer tests", 90, which="memcheck", needs_gpu=True),
    Phase("racecheck of tests", "sanitizer tests", 90, which="racecheck", needs_gpu=True),
    Phase("steps 7B fp32", "steps", 90, Cell(LARGE, "fp32")),
)


def dry(phase: Phase) -> Phase:
    """Return the phase as a dry run takes it: a tiny model, and few tests."""
    cell = phase.cell and replace(TINY, dtype=phase.cell.dtype)
    which = "cpp and fifty" if phase.kind == "tests" else phase.which
    return replace(phase, cell=cell, which=which)


def select(call: int | None, only: Sequence[str] = ()) -> list[Phase]:
    """Return the phases of a call (None: all) in order; with `only`, those of these names."""
    if only:
        return [phase for phase in PHASES if phase.name in only]
    return [phase for phase in PHASES if call is None or call in phase.calls]
