"""Triton kernels of the synthesis, forward and backward, each over up to eight syntheses in one launch.

A slot is one synthesis: its tensors, `total` elements in rows of `inner`, how far each coefficient steps from row to
row (see `replfx.kernels.layout`), and how many tiles it has, one a program. Each program goes along the slots,
subtracts the tiles of those before its own, and works where it falls into one. Slots not in use have no tiles. All
arithmetic is in float32, or in float64 for float64 tensors; no two programs write to the same place, so results are
the same every time.

The slots are named one by one, because kernels that take tuples of tensors cannot be traced by torch.compile. Nor
do helpers that get pointers give anything back: PyTorch's analysis, by which a compiler knows what a kernel writes
to, would take every tensor that such a result may depend on for written to, and copy it.
"""
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

__all__ = ["gradients_kernel", "synthesis_kernel", "totals_kernel"]


@triton.jit
def _synthesis_tile(
    program, p, n, a, b, w, total, inner, step_a, step_b,
    height: tl.constexpr, width: tl.constexpr, double: tl.constexpr,
):  # fmt: skip
    """Makes w = a·p + b·n on one tile of height × width, the slot's `program`th."""
    kind: tl.constexpr = tl.float64 if double else tl.float32
    across = tl.cdiv(inner, width)
    row = ((program // across) * height + tl.arange(0, height)).to(tl.int64)
    column = (program % across) * width + tl.arange(0, width)
    offset = row[:, None] * inner + column[None, :]
    there = (column[None, :] < inner) & (offset < total)
    scale_a = tl.load(a + row * step_a, mask=row * inner < total, other=0.0).to(kind)
    scale_b = tl.load(b + row * step_b, mask=row * inner < total, other=0.0).to(kind)
    before = tl.load(p + offset, mask=there, other=0.0).to(kind)
    after = tl.load(n + offset, mask=there, other=0.0).to(kind)
    made = scale_a[:, None] * before + scale_b[:, None] * after
    tl.store(w + offset, made.to(w.dtype.element_ty), mask=there)


@triton.jit
def synthesis_kernel(
    p0, n0, a0, b0, w0, total0, inner0, step_a0, step_b0, tiles0,
    p1, n1, a1, b1, w1, total1, inner1, step_a1, step_b1, tiles1,
    p2, n2, a2, b2, w2, total2, inner2, step_a2, step_b2, tiles2,
    p3, n3, a3, b3, w3, total3, inner3, step_a3, step_b3, tiles3,
    p4, n4, a4, b4, w4, total4, inner4, step_a4, step_b4, tiles4,
    p5, n5, a5, b5, w5, total5, inner5, step_a5, step_b5, tiles5,
    p6, n6, a6, b6, w6, total6, inner6, step_a6, step_b6, tiles6,
    p7, n7, a7, b7, w7, total7, inner7, step_a7, step_b7, tiles7,
    height: tl.constexpr, width: tl.constexpr, double: tl.constexpr,
):  # fmt: skip
    """Makes w = a·p + b·n for each slot; reads each neighbour once and writes w once."""
    program = tl.program_id(0)
    # fmt: off
    if (program >= 0) & (program < tiles0):
        _synthesis_tile(program, p0, n0, a0, b0, w0, total0, inner0, step_a0, step_b0, height, width, double)
    program -= tiles0
    if (program >= 0) & (program < tiles1):
        _synthesis_tile(program, p1, n1, a1, b1, w1, total1, inner1, step_a1, step_b1, height, width, double)
    program -= tiles1
    if (program >= 0) & (program < tiles2):
        _synthesis_tile(program, p2, n2, a2, b2, w2, total2, inner2, step_a2, step_b2, height, width, double)
    program -= tiles2
    if (program >= 0) & (program < tiles3):
        _synthesis_tile(program, p3, n3, a3, b3, w3, total3, inner3, step_a3, step_b3, height, width, double)
    program -= tiles3
    if (program >= 0) & (program < tiles4):
        _synthesis_tile(program, p4, n4, a4, b4, w4, total4, inner4, step_a4, step_b4, height, width, double)
    program -= tiles4
    if (program >= 0) & (program < tiles5):
        _synthesis_tile(program, p5, n5, a5, b5, w5, total5, inner5, step_a5, step_b5, height, width, double)
    program -= tiles5
    if (program >= 0) & (program < tiles6):
        _synthesis_tile(program, p6, n6, a6, b6, w6, total6, inner6, step_a6, step_b6, height, width, double)
    program -= tiles6
    if (program >= 0) & (program < tiles7):
        _synthesis_tile(program, p7, n7, a7, b7, w7, total7, inner7, step_a7, step_b7, height, width, double)
    # fmt: on


@triton.jit
def _gradient_tile(
    program, g, p, n, a, b, gp, gn, ga, gb, total, inner, step_a, step_b,
    height: tl.constexpr, width: tl.constexpr, double: tl.constexpr,
    to_p: tl.constexpr, to_n: tl.constexpr, to_a: tl.constexpr, to_b: tl.constexpr,
):  # fmt: skip
    """Makes all gradients of `height` whole rows, the slot's `program`th.

    <g, p> and <g, n> of each row go to ga and gb. Of a scalar coefficient these are partial sums.
    """
    kind: tl.constexpr = tl.float64 if double else tl.float32
    row = (program * height + tl.arange(0, height)).to(tl.int64)
    scale_a = tl.load(a + row * step_a, mask=row * inner < total, other=0.0).to(kind)
    scale_b = tl.load(b + row * step_b, mask=row * inner < total, other=0.0).to(kind)
    sum_a = tl.zeros((height, width), dtype=kind)
    sum_b = tl.zeros((height, width), dtype=kind)
    for start in range(0, inner, width):
        column = start + tl.arange(0, width)
        offset = row[:, None] * inner + column[None, :]
        there = (column[None, :] < inner) & (offset < total)
        grad = tl.load(g + offset, mask=there, other=0.0).to(kind)
        if to_p:
            tl.store(gp + offset, (scale_a[:, None] * grad).to(gp.dtype.element_ty), mask=there)
        if to_n:
            tl.store(gn + offset, (scale_b[:, None] * grad).to(gn.dtype.element_ty), mask=there)
        if to_a:
            sum_a += grad * tl.load(p + offset, mask=there, other=0.0).to(kind)
        if to_b:
            sum_b += grad * tl.load(n + offset, mask=there, other=0.0).to(kind)
    if to_a:
        tl.store(ga + row, tl.sum(sum_a, axis=1).to(ga.dtype.element_ty), mask=row * inner < total)
    if to_b:
        tl.store(gb + row, tl.sum(sum_b, axis=1).to(gb.dtype.element_ty), mask=row * inner < total)


@triton.jit
def gradients_kernel(
    g0, p0, n0, a0, b0, gp0, gn0, ga0, gb0, total0, inner0, step_a0, step_b0, tiles0,
    g1, p1, n1, a1, b1, gp1, gn1, ga1, gb1, total1, inner1, step_a1, step_b1, tiles1,
    g2, p2, n2, a2, b2, gp2, gn2, ga2, gb2, total2, inner2, step_a2, step_b2, tiles2,
    g3, p3, n3, a3, b3, gp3, gn3, ga3, gb3, total3, inner3, step_a3, step_b3, tiles3,
    g4, p4, n4, a4, b4, gp4, gn4, ga4, gb4, total4, inner4, step_a4, step_b4, tiles4,
    g5, p5, n5, a5, b5, gp5, gn5, ga5, gb5, total5, inner5, step_a5, step_b5, tiles5,
    g6, p6, n6, a6, b6, gp6, gn6, ga6, gb6, total6, inner6, step_a6, step_b6, tiles6,
    g7, p7, n7, a7, b7, gp7, gn7, ga7, gb7, total7, inner7, step_a7, step_b7, tiles7,
    height: tl.constexpr, width: tl.constexpr, double: tl.constexpr,
    to_p: tl.constexpr, to_n: tl.constexpr, to_a: tl.constexpr, to_b: tl.constexpr,
):  # fmt: skip
    """Gradients of each slot's neighbours and coefficients; reads each dW once, and each neighbour at most once."""
    program = tl.program_id(0)
    # fmt: off
    if (program >= 0) & (program < tiles0):
        _gradient_tile(
            program, g0, p0, n0, a0, b0, gp0, gn0, ga0, gb0, total0, inner0, step_a0, step_b0,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles0
    if (program >= 0) & (program < tiles1):
        _gradient_tile(
            program, g1, p1, n1, a1, b1, gp1, gn1, ga1, gb1, total1, inner1, step_a1, step_b1,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles1
    if (program >= 0) & (program < tiles2):
        _gradient_tile(
            program, g2, p2, n2, a2, b2, gp2, gn2, ga2, gb2, total2, inner2, step_a2, step_b2,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles2
    if (program >= 0) & (program < tiles3):
        _gradient_tile(
            program, g3, p3, n3, a3, b3, gp3, gn3, ga3, gb3, total3, inner3, step_a3, step_b3,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles3
    if (program >= 0) & (program < tiles4):
        _gradient_tile(
            program, g4, p4, n4, a4, b4, gp4, gn4, ga4, gb4, total4, inner4, step_a4, step_b4,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles4
    if (program >= 0) & (program < tiles5):
        _gradient_tile(
            program, g5, p5, n5, a5, b5, gp5, gn5, ga5, gb5, total5, inner5, step_a5, step_b5,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles5
    if (program >= 0) & (program < tiles6):
        _gradient_tile(
            program, g6, p6, n6, a6, b6, gp6, gn6, ga6, gb6, total6, inner6, step_a6, step_b6,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    program -= tiles6
    if (program >= 0) & (program < tiles7):
        _gradient_tile(
            program, g7, p7, n7, a7, b7, gp7, gn7, ga7, gb7, total7, inner7, step_a7, step_b7,
            height, width, double, to_p, to_n, to_a, to_b,
        )
    # fmt: on


@triton.jit
def _total(parts, sum, count, width: tl.constexpr, double: tl.constexpr):
    """Makes sum = Σ parts."""
    sums = tl.zeros((width,), dtype=tl.float64 if double else tl.float32)
    for start in range(0, count, width):
        offset = start + tl.arange(0, width)
        sums += tl.load(parts + offset, mask=offset < count, other=0.0)
    tl.store(sum, tl.sum(sums).to(sum.dtype.element_ty))


@triton.jit
def totals_kernel(  # noqa: C901 (one line a slot)
    parts0, sum0, count0, parts1, sum1, count1, parts2, sum2, count2, parts3, sum3, count3,
    parts4, sum4, count4, parts5, sum5, count5, parts6, sum6, count6, parts7, sum7, count7,
    parts8, sum8, count8, parts9, sum9, count9, parts10, sum10, count10, parts11, sum11, count11,
    parts12, sum12, count12, parts13, sum13, count13, parts14, sum14, count14, parts15, sum15, count15,
    width: tl.constexpr, double: tl.constexpr,
):  # fmt: skip
    """Sums each slot's partial sums, one program a slot: what is left of the gradients of scalar coefficients."""
    slot = tl.program_id(0)
    # fmt: off
    if slot == 0:
        _total(parts0, sum0, count0, width, double)
    if slot == 1:
        _total(parts1, sum1, count1, width, double)
    if slot == 2:
        _total(parts2, sum2, count2, width, double)
    if slot == 3:
        _total(parts3, sum3, count3, width, double)
    if slot == 4:
        _total(parts4, sum4, count4, width, double)
    if slot == 5:
        _total(parts5, sum5, count5, width, double)
    if slot == 6:
        _total(parts6, sum6, count6, width, double)
    if slot == 7:
        _total(parts7, sum7, count7, width, double)
    if slot == 8:
        _total(parts8, sum8, count8, width, double)
    if slot == 9:
        _total(parts9, sum9, count9, width, double)
    if slot == 10:
        _total(parts10, sum10, count10, width, double)
    if slot == 11:
        _total(parts11, sum11, count11, width, double)
    if slot == 12:
        _total(parts12, sum12, count12, width, double)
    if slot == 13:
        _total(parts13, sum13, count13, width, double)
    if slot == 14:
        _total(parts14, sum14, count14, width, double)
    if slot == 15:
        _total(parts15, sum15, count15, width, double)
    # fmt: on
