"""The mix on a GPU, forward and backward, in one pass over memory each: the device code, called by triton_mix.py.

A program takes one token and a block of its hidden units. It reads the pre-activations once, in float32 or bfloat16,
computes in float32 and writes once; the sums for the coefficients' gradients are reduced inside the program and written
as one partial sum a block, so nothing depends on the order in which programs run. Activations are written on shared
subexpressions, exp(-|u|) and exp(-u²/2), which the compiler computes once. Formulas: kernels.common.
"""

import triton
import triton.language as tl


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
def _activate(u, NAME: tl.constexpr):
    """sigma(u) and sigma'(u). NaN goes through; infinite u gives the limits."""
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
def _mix(u, c_ptr, NAMES: tl.constexpr):
    """The mix at u and its slope in u, for the coefficients at c_ptr."""
    total = tl.zeros(u.shape, tl.float32)
    total_slope = tl.zeros(u.shape, tl.float32)
    for k in tl.static_range(len(NAMES)):
        value, slope = _activate(u, NAMES[k])
        c = tl.load(c_ptr + k)
        total += _weighted(c, value)
        total_slope += _weighted(c, slope)
    return total, total_slope


@triton.jit
def _store_sums(weight, u, sums_ptr, NAMES: tl.constexpr):
    """Partial sums over hidden units of weight · sigma_k(u), one a coefficient."""
    for k in tl.static_range(len(NAMES)):
        value, _ = _activate(u, NAMES[k])
        tl.store(sums_ptr + k, tl.sum(weight * value, 0))


@triton.jit
def forward_kernel(
    a_ptr, b_ptr, c_ptr, e_ptr, y_ptr, h, a_stride, b_stride, c_stride, e_stride,
    NAMES: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y for one row and one block of hidden units; strides are numbers from row to row, 0 for shared coefficients."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < h
    a = tl.load(a_ptr + row * a_stride + columns, mask=inside, other=0.0).to(tl.float32)
    c_ptr += row * c_stride
    if FORM == "pairs":
        b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
        y = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(len(NAMES)):
            first, _ = _activate(a, NAMES[k])
            for l in tl.static_range(len(NAMES)):  # noqa: E741
                second, _ = _activate(b, NAMES[l])
                y += _weighted(tl.load(c_ptr + k * len(NAMES) + l), first * second)
    else:
        y, _ = _mix(a, c_ptr, NAMES)
        if FORM != "plain":
            b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
            if FORM == "both":
                b, _ = _mix(b, e_ptr + row * e_stride, NAMES)
            y *= b
    tl.store(y_ptr + row * h + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    g_ptr, a_ptr, b_ptr, c_ptr, e_ptr, da_ptr, db_ptr, dc_ptr, de_ptr,
    h, g_stride, a_stride, b_stride, c_stride, e_stride,
    NAMES: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """da, db for one row and block, and the block's share of dc (rows, blocks, entries) and de."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < h
    part = row * tl.num_programs(1) + tl.program_id(1)
    g = tl.load(g_ptr + row * g_stride + columns, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + row * a_stride + columns, mask=inside, other=0.0).to(tl.float32)
    c_ptr += row * c_stride
    if FORM == "pairs":
        b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
        da = tl.zeros((BLOCK,), tl.float32)
        db = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(len(NAMES)):
            first, first_slope = _activate(a, NAMES[k])
            for l in tl.static_range(len(NAMES)):  # noqa: E741
                second, second_slope = _activate(b, NAMES[l])
                entry = k * len(NAMES) + l
                c = tl.load(c_ptr + entry)
                da += _weighted(c, first_slope * second)
                db += _weighted(c, first * second_slope)
                tl.store(dc_ptr + part * len(NAMES) * len(NAMES) + entry, tl.sum(g * first * second, 0))
        tl.store(db_ptr + row * h + columns, (g * db).to(db_ptr.dtype.element_ty), mask=inside)
        da = g * da
    else:
        mixed, slope = _mix(a, c_ptr, NAMES)
        if FORM != "plain":
            b = tl.load(b_ptr + row * b_stride + columns, mask=inside, other=0.0).to(tl.float32)
            db = g * mixed
            if FORM == "both":
                _store_sums(db, b, de_ptr + part * len(NAMES), NAMES)
                b, other_slope = _mix(b, e_ptr + row * e_stride, NAMES)
                db *= other_slope
            tl.store(db_ptr + row * h + columns, db.to(db_ptr.dtype.element_ty), mask=inside)
            g *= b
        _store_sums(g, a, dc_ptr + part * len(NAMES), NAMES)
        da = g * slope
    tl.store(da_ptr + row * h + columns, da.to(da_ptr.dtype.element_ty), mask=inside)
