"""The mix on a GPU, forward and backward, in one pass over memory each: the device code, called by triton_mix.py.

A program reads pre-activations once, in float32 or bfloat16, computes in float32 and writes once; the sums for the
coefficients' gradients are reduced inside the program, so nothing depends on the order in which programs run.
Formulas: kernels.common.

A GPU reads and writes a number in the time of some forty instructions, so these are what has to be few
(benchmarks/gpu_instructions.py counts them). Numbers up to FAR take the near path: the mix as lines, a square and
what is left of each activation, its rest. Where a number is larger, infinite or NaN, the row is computed again
activation by activation, on the far path, which yields the limits. Pairs always take that path.
"""
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

FAR = tl.constexpr(0x5368D4A5)  # the bits of 1e12 in float32


@triton.jit
def _bits(u):
    """|u| as an integer of the same order: infinity above all numbers, NaN above infinity."""
    return u.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _inverse(x):
    """1 / x for x from 1 on; Triton's division has four times the instructions, as it scales."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _decay(a):
    """exp(-a); the half of the exponent is what GELU's bell needs too."""
    half = a * -0.7213475204444817
    return tl.exp2(half + half)


@triton.jit
def _rest(a, NAMES: tl.constexpr, K: tl.constexpr, ROUNDED: tl.constexpr):
    """What activation K is but for lines and a square, at a = |u|, and the slope of that.

    Of tanh and sigmoid (less 1/2) the rest changes sign with u. Of the others it does not, and comes divided by a.
    ROUNDED: it will be rounded to bfloat16.
    """
    NAME: tl.constexpr = NAMES[K]
    if NAME == "gelu":  # the normal distribution's tail, density · t · polynomial: off by 4e-8 at most
        bell = tl.exp2(a * (a * -0.7213475204444817))
        t = _inverse(0.4 * a + 1.0)
        p = 0.055784765 * t - 0.252285748
        p = ((p * t + 0.335899925) * t + 0.016160853) * t + 0.187560451
        tail = bell * t * (p * t + 0.156879795)
        rest, slope = -tail, a * (bell * 0.3989422804014327) - tail
    elif NAME == "tanh":
        e = _decay(a)
        rest = (1.0 - e * e) * _inverse(e * e + 1.0)
        slope = 1.0 - rest * rest
        near = a  # the difference cancels near 0
        if not ROUNDED:
            near = a * (1.0 - a * a * (0.3333333333333333 - 0.13333333333333333 * a * a))
        rest = tl.where(a < 0.04, near, rest)
    elif NAME == "sigmoid":
        e = _decay(a)
        i = _inverse(e + 1.0)
        rest, slope = 0.5 - e * i, e * i * i
    else:  # sigmoid(-z), and a · dz/da
        if NAME == "silu":
            z, chain = a, a
        elif NAME == "quick_gelu":
            z, chain = 1.702 * a, 1.702 * a
        else:
            tl.static_assert(NAME == "gelu_tanh", "an activation without a kernel")
            square = a * a
            z = a * (1.5957691216057308 + 0.0713548162726009 * square)
            chain = a * (1.5957691216057308 + 0.2140644488178027 * square)
        e = _decay(z)
        i = _inverse(e + 1.0)
        tail = e * i
        rest, slope = -tail, tail * (chain * i - 1.0)
    return rest, slope


@triton.jit
def _near_mix(u, c_ptr, NAMES: tl.constexpr, ROUNDED: tl.constexpr):
    """The mix at u and its slope in u, for the coefficients at c_ptr; |u| up to FAR."""
    a, positive, above = tl.abs(u), tl.maximum(u, 0.0), u > 0.0
    below, bend, square, constant = 0.0, 0.0, 0.0, 0.0
    zero = tl.zeros(u.shape, tl.float32)
    even, odd, even_slope, odd_slope = zero, zero, zero, zero
    for k in tl.static_range(len(NAMES)):
        c = tl.load(c_ptr + k)
        if NAMES[k] == "identity":
            below += c
        elif NAMES[k] == "relu":
            bend += c
        elif NAMES[k] == "leaky_relu":
            below += 0.01 * c
            bend += 0.99 * c
        elif NAMES[k] == "relu2":
            square += c
        else:
            rest, slope = _rest(a, NAMES, k, ROUNDED)
            if NAMES[k] == "tanh" or NAMES[k] == "sigmoid":
                odd += c * rest
                odd_slope += c * slope
                if NAMES[k] == "sigmoid":
                    constant += 0.5 * c
            else:
                even += c * rest
                even_slope += c * slope
                bend += c
    value = below * u + (square * positive + bend) * positive + a * even + (tl.where(above, odd, -odd) + constant)
    slope = 2.0 * square * positive + tl.where(above, below + bend, below) + odd_slope
    return value, slope + tl.where(above, even_slope, -even_slope)


@triton.jit
def _near_sums(sums, weight, u, NAMES: tl.constexpr, ROUNDED: tl.constexpr):
    """sums (see _totals) and what weight · sigma_k(u) adds to them, number by number; |u| up to FAR."""
    a, positive, above = tl.abs(u), tl.maximum(u, 0.0), u > 0.0
    risen = weight * positive
    added = (sums[0] + weight, sums[1] + weight * u, sums[2] + risen, sums[3] + risen * positive)
    for k in tl.static_range(len(NAMES)):
        total = sums[4 + k]
        if NAMES[k] == "tanh" or NAMES[k] == "sigmoid":
            rest, _ = _rest(a, NAMES, k, ROUNDED)
            total += tl.where(above, weight, -weight) * rest
        elif NAMES[k] != "identity" and NAMES[k] != "relu" and NAMES[k] != "leaky_relu" and NAMES[k] != "relu2":
            rest, _ = _rest(a, NAMES, k, ROUNDED)
            total += weight * a * rest
        added += (total,)
    return added


@triton.jit
def _totals(sums, NAMES: tl.constexpr):
    """The gradient of each coefficient from the sums of weight times 1, u, max(u, 0), its square and each rest."""
    line, risen = tl.sum(sums[1], 0), tl.sum(sums[2], 0)
    totals = ()
    for k in tl.static_range(len(NAMES)):
        if NAMES[k] == "identity":
            totals += (line,)
        elif NAMES[k] == "relu":
            totals += (risen,)
        elif NAMES[k] == "leaky_relu":
            totals += (0.01 * line + 0.99 * risen,)
        elif NAMES[k] == "relu2":
            totals += (tl.sum(sums[3], 0),)
        elif NAMES[k] == "tanh":
            totals += (tl.sum(sums[4 + k], 0),)
        elif NAMES[k] == "sigmoid":
            totals += (tl.sum(sums[4 + k], 0) + 0.5 * tl.sum(sums[0], 0),)
        else:
            totals += (tl.sum(sums[4 + k], 0) + risen,)
    return totals


@triton.jit
def _times(u, weight):
    """u · weight where the weight vanishes faster than u grows."""
    return tl.where(weight == 0.0, 0.0, u * weight)


@triton.jit
def _logistic(z):
    """sigmoid(z) and its slope."""
    e = tl.exp(-tl.abs(z))
    i = 1.0 / (1.0 + e)
    return tl.where(z < 0.0, e * i, i), e * i * i


@triton.jit
def _activate(u, NAMES: tl.constexpr, K: tl.constexpr):
    """sigma_K(u) and its slope. NaN goes through; infinite u gives the limits."""
    NAME: tl.constexpr = NAMES[K]
    above = u > 0.0
    positive = tl.where(u < 0.0, 0.0, u)
    if NAME == "identity":
        value, slope = u, tl.full(u.shape, 1.0, tl.float32)
    elif NAME == "relu":
        value, slope = positive, tl.where(above, 1.0, 0.0)
    elif NAME == "leaky_relu":
        value, slope = tl.where(u < 0.0, 0.01 * u, u), tl.where(above, 1.0, 0.01)
    elif NAME == "relu2":
        value, slope = positive * positive, 2.0 * positive
    elif NAME == "gelu":
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327
        distribution = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        value, slope = _times(u, distribution), distribution + _times(u, density)
    elif NAME == "silu":
        s, ds = _logistic(u)
        value, slope = _times(u, s), s + _times(u, ds)
    elif NAME == "sigmoid":
        value, slope = _logistic(u)
    elif NAME == "quick_gelu":
        s, ds = _logistic(1.702 * u)
        value, slope = _times(u, s), s + 1.702 * _times(u, ds)
    elif NAME == "gelu_tanh":
        s, ds = _logistic(u * (1.5957691216057308 + 0.0713548162726009 * u * u))
        chain = ds * (1.5957691216057308 + 0.2140644488178027 * u * u)
        value, slope = _times(u, s), s + tl.where(ds == 0.0, 0.0, u * chain)
    else:
        tl.static_assert(NAME == "tanh", "an activation without a kernel")
        e = tl.exp(-tl.abs(u))
        square = e * e
        j = 1.0 / (1.0 + square)
        t = (1.0 - square) * j
        near = u * (1.0 - u * u * (0.3333333333333333 - 0.13333333333333333 * u * u))  # the quotient cancels near 0
        value = tl.where(tl.abs(u) < 0.04, near, tl.where(u < 0.0, -t, t))
        slope = 4.0 * square * j * j
    return value, slope


@triton.jit
def _weighted(c, v):
    return tl.where(c == 0.0, 0.0, c * v)


@triton.jit
def _far_mix(u, c_ptr, NAMES: tl.constexpr):
    """The mix at u and its slope in u, for the coefficients at c_ptr; any u."""
    total = tl.zeros(u.shape, tl.float32)
    total_slope = tl.zeros(u.shape, tl.float32)
    for k in tl.static_range(len(NAMES)):
        value, slope = _activate(u, NAMES, k)
        c = tl.load(c_ptr + k)
        total += _weighted(c, value)
        total_slope += _weighted(c, slope)
    return total, total_slope


@triton.jit
def _far_pairs(a, b, c_ptr, NAMES: tl.constexpr):
    """sum_kl c_kl sigma_k(a) sigma_l(b) and its slopes in a and b; any a and b."""
    zero = tl.zeros(a.shape, tl.float32)
    value, slope_a, slope_b = zero, zero, zero
    for k in tl.static_range(len(NAMES)):
        first, first_slope = _activate(a, NAMES, k)
        for l in tl.static_range(len(NAMES)):  # noqa: E741
            second, second_slope = _activate(b, NAMES, l)
            c = tl.load(c_ptr + k * len(NAMES) + l)
            value += _weighted(c, first * second)
            slope_a += _weighted(c, first_slope * second)
            slope_b += _weighted(c, first * second_slope)
    return value, slope_a, slope_b


@triton.jit
def _far_sums(sums, weight, u, NAMES: tl.constexpr):
    """sums, one a coefficient, with what weight · sigma_k(u) adds to them."""
    added = ()
    for k in tl.static_range(len(NAMES)):
        value, _ = _activate(u, NAMES, k)
        added += (sums[k] + tl.sum(weight * value, 0),)
    return added


@triton.jit
def _far_pair_sums(sums, weight, a, b, NAMES: tl.constexpr):
    """The same for weight · sigma_k(a) sigma_l(b)."""
    added = ()
    for k in tl.static_range(len(NAMES)):
        first, _ = _activate(a, NAMES, k)
        for l in tl.static_range(len(NAMES)):  # noqa: E741
            second, _ = _activate(b, NAMES, l)
            added += (sums[k * len(NAMES) + l] + tl.sum(weight * first * second, 0),)
    return added


@triton.jit
def _repeated(value, COUNT: tl.constexpr):
    values = (value,)
    for _ in tl.static_range(COUNT - 1):
        values += (value,)
    return values


@triton.jit
def _store(totals, ptr, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(ptr + k, totals[k])


@triton.jit
def forward_kernel(
    a_ptr, b_ptr, c_ptr, e_ptr, y_ptr, h, a_stride, b_stride, c_stride, e_stride,
    NAMES: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y for one row and one block of hidden units; strides are numbers from row to row, 0 for shared coefficients."""
    ROUNDED: tl.constexpr = y_ptr.dtype.element_ty == tl.bfloat16
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < h
    c_ptr += row * c_stride
    e_ptr += row * e_stride
    a = tl.load(a_ptr + row * a_stride + columns, mask=inside, other=0.0).to(tl.float32)
    b = a
    if FORM != "plain":
        b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if FORM == "pairs":
        y, _, _ = _far_pairs(a, b, c_ptr, NAMES)
    else:
        bits = _bits(a)
        if FORM == "both":
            bits = tl.maximum(bits, _bits(b))
        if tl.max(bits, 0) <= FAR:
            y, _ = _near_mix(a, c_ptr, NAMES, ROUNDED)
            if FORM == "both":
                b, _ = _near_mix(b, e_ptr, NAMES, ROUNDED)
        else:
            y, _ = _far_mix(a, c_ptr, NAMES)
            if FORM == "both":
                b, _ = _far_mix(b, e_ptr, NAMES)
        if FORM != "plain":
            y *= b
    tl.store(y_ptr + row * h + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _near_backward(
    g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr, h,
    NAMES: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """da and db of a program's blocks, and their sums for dc and de, by the near path. Returns whether a number is too
    large for it."""
    ROUNDED: tl.constexpr = da_ptr.dtype.element_ty == tl.bfloat16
    bits = tl.zeros((BLOCK,), tl.int32)
    dc = _repeated(tl.zeros((BLOCK,), tl.float32), 4 + len(NAMES))
    de = _repeated(tl.zeros((BLOCK,), tl.float32), 4 + len(NAMES))
    for time in range(TIMES):
        columns = (time * tl.num_programs(1) + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < h
        g = tl.load(g_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, _bits(a))
        value, slope = _near_mix(a, c_ptr, NAMES, ROUNDED)
        if FORM != "plain":
            b = tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            db = g * value
            if FORM == "both":
                bits = tl.maximum(bits, _bits(b))
                de = _near_sums(de, db, b, NAMES, ROUNDED)
                b, other_slope = _near_mix(b, e_ptr, NAMES, ROUNDED)
                db *= other_slope
            tl.store(db_ptr + columns, db.to(db_ptr.dtype.element_ty), mask=inside)
            g *= b
        dc = _near_sums(dc, g, a, NAMES, ROUNDED)
        tl.store(da_ptr + columns, (g * slope).to(da_ptr.dtype.element_ty), mask=inside)
    _store(_totals(dc, NAMES), dc_ptr, len(NAMES))
    if FORM == "both":
        _store(_totals(de, NAMES), de_ptr, len(NAMES))
    return tl.max(bits, 0) > FAR


@triton.jit
def _far_backward(
    g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr, h,
    NAMES: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """The same by the far path."""
    ENTRIES: tl.constexpr = len(NAMES) * len(NAMES) if FORM == "pairs" else len(NAMES)
    dc = _repeated(0.0, ENTRIES)
    de = _repeated(0.0, ENTRIES)
    for time in range(TIMES):
        columns = (time * tl.num_programs(1) + tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < h
        g = tl.load(g_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if FORM == "plain":
            _, slope = _far_mix(a, c_ptr, NAMES)
        else:
            b = tl.load(b_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            if FORM == "pairs":
                _, slope, other_slope = _far_pairs(a, b, c_ptr, NAMES)
                dc = _far_pair_sums(dc, g, a, b, NAMES)
                db = g * other_slope
            else:
                value, slope = _far_mix(a, c_ptr, NAMES)
                db = g * value
                if FORM == "both":
                    de = _far_sums(de, db, b, NAMES)
                    b, other_slope = _far_mix(b, e_ptr, NAMES)
                    db *= other_slope
                g *= b
            tl.store(db_ptr + columns, db.to(db_ptr.dtype.element_ty), mask=inside)
        if FORM != "pairs":
            dc = _far_sums(dc, g, a, NAMES)
        tl.store(da_ptr + columns, (g * slope).to(da_ptr.dtype.element_ty), mask=inside)
    _store(dc, dc_ptr, ENTRIES)
    if FORM == "both":
        _store(de, de_ptr, ENTRIES)


@triton.jit
def backward_kernel(
    g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr,
    h, g_stride, a_stride, b_stride, c_stride, e_stride,
    NAMES: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """da, db for one row and every P-th of its blocks, TIMES in all, of P programs a row, and their part of
    dc (rows, P, entries) and de."""
    row = tl.program_id(0).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    g_ptr += row * g_stride
    a_ptr += row * a_stride
    b_ptr += row * b_stride
    c_ptr += row * c_stride
    e_ptr += row * e_stride
    da_ptr += row * h
    db_ptr += row * h
    dc_ptr += part * len(NAMES) * (len(NAMES) if FORM == "pairs" else 1)
    de_ptr += part * len(NAMES)
    far = FORM == "pairs"
    if FORM != "pairs":
        far = _near_backward(
            g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr, h, NAMES, FORM, BLOCK, TIMES
        )  # fmt: skip
    if far:
        tl.debug_barrier()  # other threads' writes come before those that replace them
        _far_backward(
            g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr, h, NAMES, FORM, BLOCK, TIMES
        )  # fmt: skip
