"""Device functions that the kernels share: entries of any dtype, searches, importance keys.

    importance = |grad| / (|param| + eps)^exp,  float32     (scoring.importance)

Scores are bitwise equal to the reference for exp in {-1, -0.5, 0, 0.5, 1, 2}: correctly rounded
operations alone (`tl.div_rn` and `tl.sqrt_rn`; `/` compiles to an approximate division), launched
with `enable_fp_fusion=False`. Other exponents go through float64 and promise no equality.

A table row describes one tensor (`bind` writes it): address of the gradient (0 if missing), address
of the parameter, entries, dtypes (of the parameter in bits 0 to 7, of the gradient in 8 to 15; the
C++ `bind` seals the row in the bits above). Not run on a GPU yet: compiled ahead of time and
interpreted.
"""

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)

GRAD = tl.constexpr(0)
PARAM = tl.constexpr(1)
NUMEL = tl.constexpr(2)
DTYPES = tl.constexpr(3)
COLUMNS = tl.constexpr(4)

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY_BITS = tl.constexpr(0x7F800000)

# Units in the last place that a bound through a general power is raised by: float64 `exp` and
# `log` round to within one, and are monotone only up to their own error.
POWER_MARGIN = tl.constexpr(16)

# Up to so many active entries of a tile are compared one by one: each costs a load that all lanes
# share and a comparison a lane. A search costs log2 of the count in loads that wait for each other,
# scattered over all lanes. At B = 3.5 million of 6.74 billion entries, a tile of 4096 holds two.
# Unmeasured.
FEW_ACTIVE = tl.constexpr(16)


@triton.jit
def grad_dtype(table_ptr, tensor):
    """Dtype code of the gradients of `tensor`, a scalar or a block."""
    return (tl.load(table_ptr + tensor * COLUMNS + DTYPES) >> 8 & 0xFF).to(tl.int32)


@triton.jit
def param_dtype(table_ptr, tensor):
    """Dtype code of the parameters of `tensor`, a scalar or a block."""
    return (tl.load(table_ptr + tensor * COLUMNS + DTYPES) & 0xFF).to(tl.int32)


@triton.jit
def load_run(address, dtype, first, count, BLOCK: tl.constexpr):
    """Entries first:first + count of the tensor at `address`, as float32, followed by zeros.

    Whole blocks at 16-byte boundaries are read 16 bytes at a time. Elsewhere (the end of a tensor,
    gradients that are views into a bucket) neither mask nor address lets the compiler do that.
    """
    start = address + first * tl.where(dtype == FLOAT32, 4, 2)
    values = tl.zeros((BLOCK,), tl.float32)
    if (count == BLOCK) & (start % 16 == 0):
        if dtype == FLOAT32:
            values = _load_aligned(start, tl.float32, BLOCK)
        elif dtype == BFLOAT16:
            values = _load_aligned(start, tl.bfloat16, BLOCK)
        else:
            values = _load_aligned(start, tl.float16, BLOCK)
    else:
        values = load_lanes(address, dtype, first, count, BLOCK)
    return values


@triton.jit
def load_lanes(address, dtype, first, count, BLOCK: tl.constexpr):
    """As `load_run`, but neighbouring lanes read neighbouring entries, one each at a time.

    For values whose fate is a scattered store or addition, which wants that layout: from loads of
    16 bytes the compiler would compute all that lies between twice, once in either layout.
    """
    start = address + first * tl.where(dtype == FLOAT32, 4, 2)
    if dtype == FLOAT32:
        values = _load_masked(start, count, tl.float32, BLOCK)
    elif dtype == BFLOAT16:
        values = _load_masked(start, count, tl.bfloat16, BLOCK)
    else:
        values = _load_masked(start, count, tl.float16, BLOCK)
    return values


@triton.jit
def _load_aligned(address, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    # The hint must stand on the pointer: the compiler forgets it over a cast from an integer.
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return tl.load(pointer + tl.arange(0, BLOCK)).to(tl.float32)


@triton.jit
def _load_masked(address, count, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    pointer = address.to(tl.pointer_type(DTYPE))
    return tl.load(pointer + offs, mask=offs < count, other=0.0).to(tl.float32)


@triton.jit
def load_entries(address, dtype, position, in_bounds):
    """Entries at `position` as float32; `address` and `dtype` are scalars or a block alike."""
    single = tl.load(
        address.to(tl.pointer_type(tl.float32)) + position,
        mask=in_bounds & (dtype == FLOAT32),
        other=0.0,
    )
    brain = tl.load(
        address.to(tl.pointer_type(tl.bfloat16)) + position,
        mask=in_bounds & (dtype == BFLOAT16),
        other=0.0,
    ).to(tl.float32)
    half = tl.load(
        address.to(tl.pointer_type(tl.float16)) + position,
        mask=in_bounds & (dtype == FLOAT16),
        other=0.0,
    ).to(tl.float32)
    return tl.where(dtype == FLOAT32, single, tl.where(dtype == BFLOAT16, brain, half))


@triton.jit
def store_entries(address, dtype, position, values, in_bounds):
    """Round float32 values to nearest even and store them at `position`."""
    tl.store(
        address.to(tl.pointer_type(tl.float32)) + position,
        values,
        mask=in_bounds & (dtype == FLOAT32),
    )
    tl.store(
        address.to(tl.pointer_type(tl.bfloat16)) + position,
        values.to(tl.bfloat16),
        mask=in_bounds & (dtype == BFLOAT16),
    )
    tl.store(
        address.to(tl.pointer_type(tl.float16)) + position,
        values.to(tl.float16),
        mask=in_bounds & (dtype == FLOAT16),
    )


@triton.jit
def lower_bound(ascending_ptr, first, last, longest, value):
    """First index in [first, last) whose element is >= value, else `last`; all are blocks.

    `longest`, a scalar no less than any last - first, bounds the halvings: a loop condition on the
    blocks themselves would cost a reduction over the program in each round.
    """
    while longest > 0:
        middle = first + (last - first) // 2
        is_open = first < last
        is_less = is_open & (tl.load(ascending_ptr + middle, mask=is_open, other=0) < value)
        last = tl.where(is_open & (is_less == 0), middle, last)
        first = tl.where(is_less, middle + 1, first)
        longest = longest // 2
    return first


@triton.jit
def is_listed(ascending_ptr, count, value):
    """Whether each of `value` is among the first `count` elements, in ascending order, int32."""
    listed = value < 0
    if count <= FEW_ACTIVE:
        for i in range(count):
            listed |= value == tl.load(ascending_ptr + i)
    else:
        first = tl.zeros_like(value)
        place = lower_bound(ascending_ptr, first, first + count, count, value)
        listed = tl.load(ascending_ptr + place, mask=place < count, other=-1) == value
    return listed


@triton.jit
def importance_key(grad, param, eps, EXP: tl.constexpr):
    """Importance as int32 of the same order; 0 (never unmasked) for scores of 0 and NaN."""
    magnitude = tl.abs(grad)
    base = tl.abs(param) + eps
    if EXP == 0.0:
        score = magnitude
    elif EXP == 1.0:
        score = tl.div_rn(magnitude, base)
    elif EXP == 2.0:
        score = tl.div_rn(magnitude, base * base)
    elif EXP == 0.5:
        score = tl.div_rn(magnitude, tl.sqrt_rn(base))
    elif EXP == -1.0:
        score = magnitude * base
    elif EXP == -0.5:
        score = magnitude * tl.sqrt_rn(base)
    else:
        power = tl.exp(EXP * tl.log(base.to(tl.float64))).to(tl.float32)
        score = tl.div_rn(magnitude, power)
    return tl.where(score > 0.0, score.to(tl.int32, bitcast=True), 0)


@triton.jit
def bound_key(tile_max, param_bound, eps, EXP: tl.constexpr):
    """Key that no frozen entry of a tile exceeds, from its largest |grad| and |param|.

    Every operation of an exact exponent is monotone, so that no margin is needed. For exp > 0 the
    most favourable param is 0; `param_bound` is ignored.
    """
    grad = tile_max.to(tl.float32, bitcast=True)
    if EXP < 0.0:
        key = importance_key(grad, param_bound, eps, EXP)
    else:
        key = importance_key(grad, tl.zeros_like(grad), eps, EXP)
    if not (EXP == 0.0 or EXP == 0.5 or EXP == 1.0 or EXP == 2.0 or EXP == -0.5 or EXP == -1.0):
        raised = tl.minimum(key + POWER_MARGIN, INFINITY_BITS)
        key = tl.where(grad > 0.0, raised, 0)
    return key
