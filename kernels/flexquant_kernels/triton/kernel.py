# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="no-untyped-def,assignment"
"""out[m, n] = bias[n] + sum_k x[m, k] * (scale * code + offset)[n, k], in one launch for any width.

Inputs are in the form that ``layout.py`` makes; the host side is ``linear.py``. For the tensor
cores, weights are the left operand, [BN, k], and x the right one, so that 8 rows of x fill a tile.

**Codes become numbers** by writing them into the mantissa of a constant, two at a time: with the
lowest bit of the field at bit p of m mantissa bits, ``2^e + 2^(e+p-m) * code`` is exact, and e
gives the field its place in the code. Fields lie at bits 3 to 6. Of bf16's mantissa these are the
upper ones, so little is added: at most 16 times the field's unit, 128 times in fp16. A code has at
most two fields of up to 4 bits, its upper and its lower part; each is a product of its own on the
same accumulator. What the constants add, the excess, is the same for all weights of a chunk, and
leaves with the offset, group by group in fp32:

    sum x * (scale * code + offset) = scale * sum x * number + (offset - scale * excess) * sum x

The sum of x is one more product, with ones. Products are exact in fp32; sums round as the tensor
cores do. An infinity in x gives NaN.

**The width** is read on the device and chooses one of the bodies, which differ in nothing else;
planes above it are not loaded. **Parts of K** write fp32 sums of their own; the last program to
arrive at a tile adds them up in ascending order, so results do not depend on who is last.

The layouts of tensors follow from the form of the words: two halves joined are neighbours in k, as
the tensor core wants them in one register, so nothing is moved between unpacking and the product
(compiled for sm_80 to sm_120; ``benchmarks/kernels/aot.py`` counts instructions). Untested on GPUs.
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret

_PAIR = tl.constexpr(0x00010001)  # the same 16 bits in both halves of a word


@triton.jit
def _rotate(words, RIGHT: tl.constexpr):
    if RIGHT % 32 != 0:
        words = (words >> (RIGHT % 32)) | (words << (32 - RIGHT % 32))
    return words


@triton.constexpr_function
def _shift(field, chunk):
    """How far the fields of a chunk lie above bit 3 of a half: ``layout.py``."""
    if field == 4:
        return 0
    if field == 2:
        return 2 * (chunk % 2)
    return chunk // 2 + 2 * (chunk % 2)


@triton.constexpr_function
def _exponent(field, unit, chunk, bf16):
    """e of a field with the value 2^unit * code; ``_shift`` says where in the mantissa it lies."""
    return unit + (4 if bf16 else 7) - _shift(field, chunk)


@triton.constexpr_function
def excess(high, low, chunk, bf16):
    """What the numbers of both parts of a code are too large by, together."""
    upper = 1 << _exponent(high, low, chunk, bf16)
    return upper + (1 << _exponent(low, 0, chunk, bf16)) if low else upper


@triton.constexpr_function
def _same_excess(high, low):
    """Whether that is the same in all chunks."""
    return high == 4 and low in (0, 4)


@triton.jit
def _slice(words, zero, SLICE: tl.constexpr, MASK: tl.constexpr, MAGIC: tl.constexpr, DTYPE):
    """Numbers [BN, 16] of a slice of a chunk.

    ``zero`` is unknown to the compiler. With two constants, AND and OR were two instructions, as an
    instruction takes one constant; with a register for the second they are one.
    """
    pair = (_rotate(words, 4 * SLICE) & MASK) | (zero + MAGIC)
    low = pair.to(tl.uint16).to(DTYPE, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (words.shape[0], 16))


@triton.jit
def operand(
    words,
    zero,
    PART: tl.constexpr,
    PART_K: tl.constexpr,
    FIELD: tl.constexpr,
    UNIT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Numbers [BN, PART_K] of one part of a block."""
    BN: tl.constexpr = words[0].shape[0]
    CHUNK: tl.constexpr = PART * PART_K // 64
    SLICE: tl.constexpr = PART * PART_K // 16 % 4
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    E: tl.constexpr = _exponent(FIELD, UNIT, CHUNK, BF16)
    MAGIC: tl.constexpr = (((E + 127) << 7) if BF16 else ((E + 15) << 10)) * _PAIR
    MASK: tl.constexpr = (((1 << FIELD) - 1) << (3 + _shift(FIELD, CHUNK))) * _PAIR
    w = words[CHUNK * FIELD // 4]
    a = _slice(w, zero, SLICE, MASK, MAGIC, DTYPE)
    b = _slice(w, zero, SLICE + 1, MASK, MAGIC, DTYPE)
    if PART_K == 32:
        out = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (BN, 32))
    else:
        c = _slice(w, zero, SLICE + 2, MASK, MAGIC, DTYPE)
        d = _slice(w, zero, SLICE + 3, MASK, MAGIC, DTYPE)
        four = tl.join(tl.join(a, b), tl.join(c, d))
        out = tl.reshape(tl.permute(four, (0, 3, 2, 1)), (BN, 64))
    return out


@triton.jit
def _load(plane, rows, block, blocks, W: tl.constexpr):
    """Words of a block of 256 k: W tensors uint32 [BN, 8]."""
    BN: tl.constexpr = rows.shape[0]
    column = tl.arange(0, 8 * W)
    start = (rows // 16).to(tl.int64) * blocks * (128 * W) + (rows % 16) * (8 * W)
    words = tl.load(plane + start[:, None] + (block * (128 * W) + column[None, :]))
    words = words.to(tl.uint32, bitcast=True)
    if W == 1:
        out = (words,)
    elif W == 2:
        out = tl.split(tl.reshape(words, (BN, 8, 2)))
    else:
        even, odd = tl.split(tl.reshape(words, (BN, 8, 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        out = (w0, w1, w2, w3)
    return out


@triton.jit
def _halves(t):
    """[BN, C] -> the even and the odd columns, [BN, C/2] each."""
    return tl.split(tl.reshape(t, (t.shape[0], t.shape[1] // 2, 2)))


@triton.jit
def load_pairs(scales, rows, block, blocks, GROUPS: tl.constexpr):
    """(scale, offset) of the groups of a block of 256 k: uint32 [BN, GROUPS]."""
    start = (rows // 16).to(tl.int64) * blocks * (16 * GROUPS) + (rows % 16) * GROUPS
    column = block * (16 * GROUPS) + tl.arange(0, GROUPS)
    return tl.load(scales + start[:, None] + column[None, :]).to(tl.uint32, bitcast=True)


@triton.jit
def columns(t):
    """[BN, C] -> its C columns, for 2, 4 and 8."""
    if t.shape[1] == 2:
        out = tl.split(t)
    elif t.shape[1] == 4:
        even, odd = _halves(t)
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        out = (a0, a1, a2, a3)
    else:
        even, odd = _halves(t)
        even0, even1 = _halves(even)
        odd0, odd1 = _halves(odd)
        a0, a4 = tl.split(even0)
        a2, a6 = tl.split(even1)
        a1, a5 = tl.split(odd0)
        a3, a7 = tl.split(odd1)
        out = (a0, a1, a2, a3, a4, a5, a6, a7)
    return out


@triton.jit
def scale_and_offset(pair, SHARED: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 [BN] each, from the pairs of a group; those of 8 bits become those of the width."""
    scale = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    offset = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    if SHARED:
        STEP: tl.constexpr = 1 << (8 - WIDTH)
        offset += scale * ((STEP - 1) / 2)
        scale *= STEP
    return scale, offset


@triton.jit
def _merge(high, low, W: tl.constexpr):
    """Words of width W from two planes -> twice as many words of width 2 * W."""
    # 0x33333333 and 0x55555555, rotated as the words are
    KEEP: tl.constexpr = 0x99999999 if W == 2 else 0xAAAAAAAA
    OTHER: tl.constexpr = 0xFFFFFFFF - KEEP
    first = (low & KEEP) | (_rotate(high, 32 - W) & OTHER)
    second = (_rotate(low, W) & KEEP) | (high & OTHER)
    return first, second


@triton.jit
def _merge2(high, low):
    """Two planes of 2 bits -> 4-bit words."""
    w0, w1 = _merge(high[0], low[0], 2)
    w2, w3 = _merge(high[1], low[1], 2)
    return w0, w1, w2, w3


@triton.jit
def parts(planes, rows, block, blocks, LAYOUT: tl.constexpr, WIDTH: tl.constexpr):
    """Words of the upper and of the lower bits of the codes of a block.

    Where one part is the whole code, the second means nothing.
    """
    if LAYOUT == 422:
        high = _load(planes[0], rows, block, blocks, 4)
        low = high
        if WIDTH == 6:
            low = _load(planes[1], rows, block, blocks, 2)
        elif WIDTH == 8:
            low = _merge2(
                _load(planes[1], rows, block, blocks, 2), _load(planes[2], rows, block, blocks, 2)
            )
    elif LAYOUT == 224:
        high = _load(planes[0], rows, block, blocks, 2)
        low = high
        if WIDTH > 2:
            high = _merge2(high, _load(planes[1], rows, block, blocks, 2))
        if WIDTH == 8:
            low = _load(planes[2], rows, block, blocks, 4)
    else:
        high = _load(planes[0], rows, block, blocks, 2)
        low = high
        if WIDTH == 3:
            low = _load(planes[1], rows, block, blocks, 1)
        elif WIDTH > 3:
            second = _load(planes[1], rows, block, blocks, 1)
            third = _load(planes[2], rows, block, blocks, 1)
            high = _merge2(high, _merge(second[0], third[0], 1))
        if WIDTH == 6:
            low = _load(planes[3], rows, block, blocks, 2)
        elif WIDTH == 8:
            low = _merge2(
                _load(planes[3], rows, block, blocks, 2), _load(planes[4], rows, block, blocks, 2)
            )
    return high, low


@triton.jit
def _dot(a, b, acc, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter has no bf16 arithmetic
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc)
    return tl.dot(a, tl.trans(b), acc)


@triton.jit
def _product(
    x_ptr,
    planes,
    scales_ptr,
    zero,
    rows,
    rm,
    blocks,
    of_split,  # (first, last) block
    sizes,  # (M, K, N_pad)
    LAYOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    SET: tl.constexpr,
    SHARED: tl.constexpr,
    G: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """fp32 [BN, BM]: the product over some blocks at one width."""
    M, K, n_pad = sizes
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    BF16: tl.constexpr = tl.bfloat16 == DTYPE
    HIGH: tl.constexpr = 2 if (LAYOUT != 422 and WIDTH < 4) else 4
    LOW: tl.constexpr = WIDTH - HIGH
    PART_K: tl.constexpr = 32 if G == 32 else 64
    half = tl.full((BN, PART_K // 2), 1.0, tl.float32).to(DTYPE)
    ones = tl.reshape(tl.join(half, half), (BN, PART_K))
    # Parts of K whose sum of x is multiplied at once.
    SUM_K: tl.constexpr = G if _same_excess(HIGH, LOW) else PART_K
    # A width's scales are a block of memory; the sets may exceed 2^31 bytes together.
    start = (0 if SHARED else SET) * blocks.to(tl.int64) * (256 // G) * n_pad
    acc = tl.full((BN, BM), 0.0, tl.float32)
    ag = tl.full((BN, BM), 0.0, tl.float32)
    xs = tl.full((BN, BM), 0.0, tl.float32)
    of_block = load_pairs(scales_ptr + start, rows, of_split[0], blocks, 256 // G)
    for block in range(of_split[0], of_split[1]):
        high, low = parts(planes, rows, block, blocks, LAYOUT, WIDTH)
        pairs = columns(of_block)
        following = tl.minimum(block + 1, of_split[1] - 1)
        of_block = load_pairs(scales_ptr + start, rows, following, blocks, 256 // G)
        for part in tl.static_range(256 // PART_K):
            rk = block * 256 + part * PART_K + tl.arange(0, PART_K)
            mask = (rm < M)[:, None]
            if not EVEN_K:
                mask = mask & (rk < K)[None, :]
            x = tl.load(x_ptr + rm.to(tl.int64)[:, None] * K + rk[None, :], mask=mask, other=0.0)
            if part * PART_K % G == 0:
                ag = tl.full((BN, BM), 0.0, tl.float32)
                scale, offset = scale_and_offset(pairs[part * PART_K // G], SHARED, WIDTH)
            if part * PART_K % SUM_K == 0:
                xs = tl.full((BN, BM), 0.0, tl.float32)
            ag = _dot(operand(high, zero, part, PART_K, HIGH, LOW, DTYPE), x, ag, UPCAST)
            if LOW > 0:
                ag = _dot(operand(low, zero, part, PART_K, LOW, 0, DTYPE), x, ag, UPCAST)
            xs = _dot(ones, x, xs, UPCAST)
            if (part + 1) * PART_K % SUM_K == 0:
                less = offset - scale * excess(HIGH, LOW, part * PART_K // 64, BF16)
                acc = tl.fma(less[:, None], xs, acc)
            if (part + 1) * PART_K % G == 0:
                acc = tl.fma(scale[:, None], ag, acc)
    return acc


@triton.constexpr_function
def width_of(layout, index):
    """The width that the first planes give, from index 0."""
    return sum(int(digit) for digit in str(layout)[: index + 1])


@triton.constexpr_function
def is_last(layout, index):
    """Whether that is the highest width."""
    return index + 1 == len(str(layout))


@triton.jit
def _at_width(
    width,
    x_ptr,
    planes,
    scales_ptr,
    zero,
    rows,
    rm,
    blocks,
    of_split,
    sizes,
    LAYOUT: tl.constexpr,
    SET: tl.constexpr,
    SHARED: tl.constexpr,
    G: tl.constexpr,
    EVEN_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``_product`` at the least width from the SET-th on that is enough, else the highest.

    One body per width, so that each is unrolled; the branches are the same for all threads.
    """
    WIDTH: tl.constexpr = width_of(LAYOUT, SET)
    if is_last(LAYOUT, SET):  # noqa: SIM114 - known to the compiler, unlike the next
        acc = _product(
            x_ptr, planes, scales_ptr, zero, rows, rm, blocks, of_split, sizes,
            LAYOUT, WIDTH, SET, SHARED, G, EVEN_K, BM, BN, UPCAST,
        )  # fmt: skip
    elif width <= WIDTH:
        acc = _product(
            x_ptr, planes, scales_ptr, zero, rows, rm, blocks, of_split, sizes,
            LAYOUT, WIDTH, SET, SHARED, G, EVEN_K, BM, BN, UPCAST,
        )  # fmt: skip
    else:
        acc = _at_width(
            width, x_ptr, planes, scales_ptr, zero, rows, rm, blocks, of_split, sizes,
            LAYOUT, SET + 1, SHARED, G, EVEN_K, BM, BN, UPCAST,
        )  # fmt: skip
    return acc


@triton.jit
def _add_bias(acc, bias_ptr, rows, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(
    do_not_specialize=["M", "N", "blocks", "top"],
    do_not_specialize_on_alignment=["width_ptr", "bias_ptr", "zero_ptr"],
)
def linear_kernel(
    x_ptr,  # bf16 or fp16 [M, K]
    p0,  # int32, planes as in layout.py; those that the layout has not are not read
    p1,
    p2,
    p3,
    p4,
    scales_ptr,  # int32 [S, N_pad/16, K_pad/256, 16, 256/g]: fp16 pairs, scale in the lower half
    width_ptr,  # int32 [1]
    bias_ptr,  # any floating dtype [N]
    partial_ptr,  # fp32 [splits, M, N_pad]
    counters_ptr,  # int32 [one a tile of out], zero before and after
    zero_ptr,  # int32 [1], zero: see _slice
    out_ptr,  # as x [M, N]
    M,
    N,
    K,
    blocks,  # K_pad / 256
    n_pad,
    top,  # the highest width whose planes there are
    LAYOUT: tl.constexpr,  # plane widths as decimal digits
    SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    G: tl.constexpr,
    EVEN_K: tl.constexpr,  # K == K_pad
    BM: tl.constexpr,
    BN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (ceil(M/BM), N_pad/BN, splits): programs that read the same planes start together."""
    width = tl.minimum(tl.load(width_ptr), top)
    zero = tl.load(zero_ptr + tl.full((1, 1), 0, tl.int32)).to(tl.uint32, bitcast=True)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    planes = (p0, p1, p2, p3, p4)
    of_split = (split * blocks // splits, (split + 1) * blocks // splits)
    sizes = (M, K, n_pad)
    acc = _at_width(
        width, x_ptr, planes, scales_ptr, zero, rows, rm, blocks, of_split, sizes,
        LAYOUT, 0, SHARED, G, EVEN_K, BM, BN, UPCAST,
    )  # fmt: skip
    mask = (rows < N)[:, None] & (rm < M)[None, :]
    target = out_ptr + rm.to(tl.int64)[None, :] * N + rows[:, None]
    if SPLIT:
        place = partial_ptr + rm.to(tl.int64)[None, :] * n_pad + rows[:, None]
        stride = M.to(tl.int64) * n_pad
        tl.store(place + split * stride, acc, mask=(rm < M)[None, :])
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter = counters_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == splits - 1:
            acc = tl.full((BN, BM), 0.0, tl.float32)
            for s in range(splits):
                acc += tl.load(
                    place + s * stride, mask=(rm < M)[None, :], other=0.0, cache_modifier=".cg"
                )
            acc = _add_bias(acc, bias_ptr, rows, N, HAS_BIAS)
            tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(counter, 0)
    else:
        acc = _add_bias(acc, bias_ptr, rows, N, HAS_BIAS)
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)
