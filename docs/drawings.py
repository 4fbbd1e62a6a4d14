"""Make the drawings of docs/concepts.md: `python docs/drawings.py` writes docs/images/*.svg."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

import replfx

FOLDER = Path(__file__).parent / "images"
INK, QUIET, FLOW = "#1f2933", "#5f6b76", "#9aa5b1"
KEPT, REPLACED = ("#c3daf0", "#1d5a94"), ("#fde0b2", "#b45309")  # fill and edge, as replfx.draw has them


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing; one unit is an inch."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, text: str, colours: tuple[str, str] = KEPT, width: float = 1.1, height: float = 0.5
) -> None:
    """A rounded box with its middle at (x, y)."""
    fill, edge = colours
    style = "dashed" if colours is REPLACED else "solid"
    corner = (x - width / 2, y - height / 2)
    shape = "round,pad=0,rounding_size=0.07"
    axes.add_patch(FancyBboxPatch(corner, width, height, shape, facecolor=fill, edgecolor=edge, linestyle=style))
    axes.text(x, y, text, ha="center", va="center", color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = FLOW, bend: float = 0
) -> None:
    """From one point to another."""
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def save(figure: Figure, name: str) -> None:
    """Write an SVG that is the same each time."""
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def row(axes: Axes, y: float, texts: Sequence[str], replaced: Sequence[int], left: float = 1.0) -> list[float]:
    """A chain of blocks from left to right; gives their x."""
    places = [left + 1.6 * index for index in range(len(texts))]
    for index, (x, text) in enumerate(zip(places, texts, strict=True)):
        box(axes, x, y, text, REPLACED if index in replaced else KEPT)
        if index:
            arrow(axes, (places[index - 1] + 0.58, y), (x - 0.58, y))
    return places


def block() -> None:
    """A block: one main activation in, one out."""
    figure, axes = canvas(7.6, 2.0)
    axes.add_patch(FancyBboxPatch((1.5, 0.45), 4.6, 1.1, "round,pad=0,rounding_size=0.1", facecolor="#f3f7fb", ec=FLOW))
    for x, text in ((2.2, "norm"), (3.6, "attention"), (5.3, "+")):
        box(axes, x, 0.9, text, width=0.5 if text == "+" else 1.0)
    for start, end in ((0.5, 1.7), (2.7, 3.1), (4.1, 5.05), (5.55, 7.1)):
        arrow(axes, (start, 0.9), (end, 0.9))
    arrow(axes, (1.6, 0.93), (5.3, 1.17), bend=-0.14)
    axes.text(0.5, 1.1, "x", color=INK, ha="center")
    axes.text(6.95, 1.1, "y", color=INK, ha="center")
    axes.text(3.8, 0.15, "one block: one main activation in, one out", color=QUIET, ha="center")
    save(figure, "block")


def fusion() -> None:
    """A fusion: weights out of the neighbours' weights."""
    figure, axes = canvas(7.6, 2.6)
    for x, name, colours in ((1.2, "block 1", KEPT), (3.8, "block 2", REPLACED), (6.4, "block 3", KEPT)):
        box(axes, x, 0.6, name, colours, width=1.5)
    arrow(axes, (2.0, 0.6), (3.0, 0.6))
    arrow(axes, (4.6, 0.6), (5.6, 0.6))
    axes.text(1.2, 1.05, "$W_1$", ha="center", color=INK)
    axes.text(6.4, 1.05, "$W_3$", ha="center", color=INK)
    box(axes, 3.8, 1.75, "fusion:  $W_2 = a\\,W_1 + b\\,W_3$", ("white", REPLACED[1]), width=3.0)
    arrow(axes, (1.4, 1.15), (2.25, 1.7), REPLACED[1], bend=-0.2)
    arrow(axes, (6.2, 1.15), (5.35, 1.7), REPLACED[1], bend=0.2)
    arrow(axes, (3.8, 1.48), (3.8, 0.9), REPLACED[1])
    axes.text(3.8, 2.25, "trained: $W_1$, $W_3$, $a$, $b$; there is no $W_2$ to store", ha="center", color=QUIET)
    save(figure, "fusion")


def operator() -> None:
    """The operators: what runs in a replaced block."""
    figure, axes = canvas(7.6, 3.3)
    rows = (
        ("full", KEPT, ("norm", "attention", "+", "norm", "MLP", "+")),
        ("block", REPLACED, ("norm", "attention", "+", "norm", "MLP", "+")),
        ("mixer", REPLACED, ("norm", "attention", "+")),
        ("light", REPLACED, ("norm", "one map", "+")),
        ("identity", REPLACED, ()),
    )
    for index, (name, colours, parts) in enumerate(rows):
        y = 2.95 - 0.63 * index
        axes.text(0.15, y, name, va="center", color=INK, family="monospace")
        x = 1.3
        for part in parts:
            width = 0.42 if part == "+" else 0.95
            own = part in ("norm", "+")
            box(axes, x + width / 2, y, part, KEPT if own else colours, width=width, height=0.4)
            arrow(axes, (x - 0.2, y), (x, y))
            x += width + 0.2
        arrow(axes, (x - 0.2, y), (7.3, y))
    save(figure, "operator")


def unroll() -> None:
    """Share first, unroll later."""
    figure, axes = canvas(7.6, 2.9)
    names = [f"block {index}" for index in range(1, 5)]
    places = row(axes, 2.1, names, replaced=(1,), left=1.9)
    axes.text(0.1, 2.1, "shared", va="center", color=INK)
    for place, bend in ((places[0], -0.45), (places[2], 0.45)):
        arrow(axes, (place, 2.37), (places[1], 2.4), REPLACED[1], bend=bend)
    row(axes, 0.6, names, replaced=(), left=1.9)
    axes.text(0.1, 0.6, "full depth", va="center", color=INK)
    arrow(axes, (places[1], 1.8), (places[1], 0.9), REPLACED[1])
    axes.text(places[1] + 0.12, 1.35, "unroll: gets its weights of now, and trains them", va="center", color=QUIET)
    save(figure, "unroll")


def chain() -> None:
    """A chain as replfx.draw shows it: a transformer with twelve blocks."""
    layers = [nn.TransformerEncoderLayer(64, 4, 256, batch_first=True) for _ in range(12)]
    model = nn.Sequential(nn.Linear(16, 64), nn.Sequential(*layers), nn.Linear(64, 10))
    replfx.draw(replfx.inspect(model), FOLDER / "chain.svg")


def main() -> None:
    """Make all of them."""
    mpl.rcParams.update({"svg.hashsalt": "replfx", "svg.fonttype": "path", "font.size": 11})
    FOLDER.mkdir(exist_ok=True)
    for draw in (block, chain, fusion, operator, unroll):
        draw()


if __name__ == "__main__":
    main()
