"""`Alignment` against loops over indices (tests/reference/alignment.py), in values, gradients and starts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from replfx.fusion.alignment import AlignedFusion, Alignment, Layout, layout_of
from replfx.fusion.fusions import Fusion, ScalarFusion, fusions
from replfx.fusion.magnitude import is_finite, largest
from tests.reference.alignment import align, differing, split_gains, starts

Shape = tuple[int, ...]
Drawn = tuple[Layout, Shape, Shape]  # and the neighbour's shape, the block's

TWO = torch.float64


@st.composite
def aligned(draw: st.DrawFn) -> Drawn:
    """Shapes of one parameter in both blocks; often alike along a dimension, often in one integer ratio."""
    layout = draw(st.sampled_from(("kernel", "matrix", "table")))
    if layout == "table":
        m, n = (draw(st.sampled_from((1, 3, 5, 7))) ** 2 for _ in range(2))
        return Layout("table"), (m, draw(st.integers(1, 4))), (n, draw(st.integers(1, 4)))
    dims = draw(st.integers(3, 5) if layout == "kernel" else st.integers(1, 4))
    most = 7 if dims <= 2 else 5 if dims == 3 else 4
    sizes = st.integers(1, most)
    source, target = ([draw(sizes) for _ in range(dims)] for _ in range(2))
    for dim in range(dims):
        if draw(st.integers(0, 3)) == 0:
            target[dim] = source[dim]
    if dims > 1 and draw(st.booleans()):
        factor, first = draw(st.integers(1, 4)), draw(st.integers(0, 1))
        for shape in (source, target):
            shape[1 - first] = min(shape[1 - first], 4)
            shape[first] = factor * shape[1 - first]
    return Layout(layout), tuple(source), tuple(target)


@st.composite
def grouped(draw: st.DrawFn) -> Drawn:
    """Kernels of convolutions in groups: of one number or not, of one width or not."""
    groups = draw(st.tuples(st.sampled_from((1, 2, 3, 4)), st.sampled_from((1, 2, 3, 4))))
    rows = [many * draw(st.integers(1, 12 // many)) for many in groups]
    if draw(st.booleans()):
        rows, channels = [12, 12], draw(st.sampled_from((12, 24)))
        columns = [channels // many for many in groups]
    else:
        columns = [draw(st.integers(1, 6)) for _ in groups]
    taps = [draw(st.sampled_from((1, 3))) for _ in range(draw(st.integers(1, 2)))]
    source, target = ((row, column, *taps) for row, column in zip(rows, columns, strict=True))
    return Layout("kernel", groups if columns != [1, 1] else (1, 1)), source, target


def alignment_of(drawn: list[Drawn]) -> tuple[Alignment, dict[str, Shape], dict[str, Shape]]:
    sources = {f"p{i}": source for i, (_, source, _) in enumerate(drawn)}
    targets = {f"p{i}": target for i, (_, _, target) in enumerate(drawn)}
    made = Alignment(
        {name: torch.Size(shape) for name, shape in sources.items()},
        {name: torch.Size(shape) for name, shape in targets.items()},
        {f"p{i}": layout for i, (layout, _, _) in enumerate(drawn)},
        dtype=TWO,
        device=torch.device("cpu"),
    )
    return made, sources, targets


@given(drawn=st.lists(aligned() | grouped(), min_size=1, max_size=3), seed=st.integers(0, 2**20))
def test_it_is_the_formula(drawn: list[Drawn], seed: int) -> None:
    made, sources, targets = alignment_of(drawn)
    layouts = [layout for layout, _, _ in drawn]
    generator = torch.Generator().manual_seed(seed)

    def random(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=TWO)

    begin = split_gains(made.gains, sources, targets)
    for name, layout in zip(sources, layouts, strict=True):
        wanted = starts(sources[name], targets[name], layout.what, layout.groups)
        for gains, start in zip(begin[name].values(), wanted, strict=True):
            assert torch.equal(gains.detach(), torch.full_like(gains, start))

    theta = {name: random(shape).requires_grad_() for name, shape in sources.items()}
    if made.gains is not None:
        with torch.no_grad():
            made.gains.copy_(random(tuple(made.gains.shape)))
    results = made(theta)
    gains = split_gains(made.gains, sources, targets)
    leaves = [*theta.values(), *([] if made.gains is None else [made.gains])]
    losses: list[Tensor] = []
    for name, layout in zip(sources, layouts, strict=True):
        expected = align(theta[name], gains[name], targets[name], layout.what, layout.groups)
        assert results[name].shape == expected.shape
        # The same two to five factors, multiplied in another order.
        torch.testing.assert_close(results[name], expected, rtol=1e-14, atol=0)
        weight = random(targets[name])
        losses = [(results[name] * weight).sum() + sum(losses[:1]), (expected * weight).sum() + sum(losses[1:])]
    one, other = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses)
    for gradient, wanted_gradient in zip(one, other, strict=True):
        # Sums of up to a few hundred products in another order.
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-11)


@given(drawn=aligned())
def test_where_nothing_differs_nothing_is_done(drawn: Drawn) -> None:
    layout, source, target = drawn
    made, _, _ = alignment_of([(layout, source, source), (layout, source, target)])
    theta = {"p0": torch.randn(source, dtype=TWO), "p1": torch.randn(source, dtype=TWO)}
    assert made(theta)["p0"] is theta["p0"]
    assert (made(theta)["p1"] is theta["p1"]) == (not differing(source, target))
    assert (made.gains is None) == (source == target)
    shapes = {"p0": torch.Size(source)}
    rule = ScalarFusion(shapes, dtype=TWO, device=torch.device("cpu"))
    idle, _, _ = alignment_of([(layout, source, source)])
    fused = AlignedFusion(rule, idle, idle)
    assert {name for name, _ in fused.named_parameters()} == {"rule.previous", "rule.next"}
    only = {"p0": theta["p0"]}
    assert torch.equal(fused(only, only)["p0"], rule(only, only)["p0"])


@given(drawn=aligned(), seed=st.integers(0, 2**20))
def test_there_and_back(drawn: Drawn, seed: int) -> None:
    """Growing and shrinking back loses nothing: what was repeated or padded is cut off again."""
    layout, source, target = drawn
    grown = tuple(max(m, n) for m, n in zip(source, target, strict=True))
    if layout.what == "table" or differing(source, grown) == []:
        return
    up, down = alignment_of([(layout, source, grown)])[0], alignment_of([(layout, grown, source)])[0]
    theta = torch.randn(source, dtype=TWO, generator=torch.Generator().manual_seed(seed))
    for made in (up, down):
        with torch.no_grad():
            made.gains.fill_(1.0)
    assert torch.equal(down(up({"p0": theta}))["p0"], theta)


@pytest.mark.parametrize(("have", "want"), [(16, 25), (10, 25), (25, 16), (1, 9), (9, 1), (4, 9), (8, 9)])
def test_rows_that_are_no_table_on_either_side_are_rows(have: int, want: int) -> None:
    """A table is told by its (2w − 1)² rows, which both must have: 16 rows are not those of a window."""
    owner = nn.Module()
    layout = layout_of(owner, owner, torch.Size((have, 2)), torch.Size((want, 2)))
    assert layout == Layout("table" if {have, want} == {1, 9} else "matrix")
    made, _, _ = alignment_of([(layout, (have, 2), (want, 2))])
    theta = torch.randn(have, 2, dtype=TWO)
    with torch.no_grad():
        made.gains.fill_(1.0)
    result = made({"p0": theta})["p0"]
    if layout.what == "matrix":
        assert torch.equal(result, theta[[i % have for i in range(want)]])
    elif want == 1:
        assert torch.equal(result, theta[4:5])  # no offset at all is the middle one


def convolution(channels: int, wide: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(channels, wide, 3, groups=groups, bias=False, padding=1, dtype=TWO)


@pytest.mark.parametrize(("have", "want"), [(1, 4), (2, 4), (4, 2), (4, 1), (6, 3), (3, 6)])
def test_groups_keep_what_each_channel_reads(have: int, want: int) -> None:
    """As many channels on both sides: a coarser block computes what the neighbour does, a finer one its diagonal."""
    source, target = convolution(12, 24, have), convolution(12, 24, want)
    shapes = source.weight.shape, target.weight.shape
    layout = layout_of(source, target, *shapes)
    made = Alignment({"p": shapes[0]}, {"p": shapes[1]}, {"p": layout}, dtype=TWO, device=torch.device("cpu"))
    with torch.no_grad():
        kernel = made({"p": source.weight})["p"]
        x = torch.randn(2, 12, 5, 5, dtype=TWO)
        if have > want:
            assert torch.equal(made.gains, torch.ones_like(made.gains))  # nothing is added, so nothing is scaled
            assert_equal_up_to_order(nn.functional.conv2d(x, kernel, padding=1, groups=want), source(x))
            return
        assert torch.allclose(made.gains, torch.full_like(made.gains, (want / have) ** 0.5))
        made.gains.fill_(1.0)
        kernel = made({"p": source.weight})["p"]
        for group in range(want):  # what one group of the block gives is what the neighbour makes of its channels
            alone = torch.zeros_like(x)
            channels = slice(group * 12 // want, (group + 1) * 12 // want)
            alone[:, channels] = x[:, channels]
            rows = slice(group * 24 // want, (group + 1) * 24 // want)
            mine = nn.functional.conv2d(x, kernel, padding=1, groups=want)[:, rows]
            assert_equal_up_to_order(mine, source(alone)[:, rows])


def assert_equal_up_to_order(one: Tensor, other: Tensor) -> None:
    """Sums of at most 108 products in float64, added in another order."""
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_depthwise_kernels_have_no_groups_to_keep() -> None:
    one, other = (nn.Conv2d(d, d, 3, groups=d) for d in (4, 6))
    assert layout_of(one, other, one.weight.shape, other.weight.shape) == Layout("kernel")


# ---- magnitudes, and the bounds that fusions give from them

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.floats(width=16) | st.sampled_from((math.nan, math.inf, -math.inf)), max_size=70),
    stride=st.integers(1, 3),
)
def test_largest_is_that_of_the_definition(dtype: torch.dtype, values: list[float], stride: int) -> None:
    tensor = torch.zeros(len(values), stride, dtype=dtype)[:, 0]
    tensor.copy_(torch.tensor(values))
    found, wanted = largest(tensor), float(tensor.abs().max()) if values else 0.0
    assert found == wanted or (math.isnan(found) and math.isnan(wanted))
    assert is_finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("name", ["scalar", "scalar_layer", "channel"])
@given(drawn=st.lists(aligned(), min_size=1, max_size=3), scale=st.sampled_from((1.0, 1e100)), seed=st.integers(0, 999))
def test_nothing_synthesised_exceeds_the_bound(name: str, drawn: list[Drawn], scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    before, sources, targets = alignment_of(drawn)
    after = alignment_of(drawn)[0]
    rule = fusions[name]({n: torch.Size(s) for n, s in targets.items()}, dtype=TWO, device=torch.device("cpu"))
    fusion = AlignedFusion(rule, before, after)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.normal_(0, 2)
    sides = [{n: scale * torch.randn(s, dtype=TWO) for n, s in sources.items()} for _ in range(2)]
    made: dict[str, Tensor] = fusion(*sides)
    bound = fusion.bound(*({n: largest(theta) for n, theta in side.items()} for side in sides))
    actual = max(map(largest, made.values()))
    assert actual <= bound * (1 + 1e-12)
    assert bound < math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bound_from_what_is_not_finite_promises_nothing(bad: float) -> None:
    for name in ("scalar", "scalar_layer", "channel"):
        shapes = dict.fromkeys("pqr", torch.Size((2, 2)))
        fusion, ones = fusions[name](shapes, dtype=TWO, device=torch.device("cpu")), dict.fromkeys(shapes, 1.0)
        assert not fusion.bound({**ones, "q": bad}, ones) < math.inf
        fusion.next.data[len(fusion.next) // 2] = bad
        assert not fusion.bound(ones, ones) < math.inf


def test_a_fusion_that_knows_none_gives_none() -> None:
    assert Fusion({}, dtype=TWO, device=torch.device("cpu")).bound({}, {}) == math.inf
