"""What the figures of the commands share: the slide, its type and its colours."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# From Okabe and Ito's palette, for the colour-blind. What is drawn on top is the darker or the broken of the two, so
# that it is told apart without colour too.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
INK, MUTED, BAND = "#222222", "#666666", "#EFEFEF"
PALE: dict[str, Any] = {"color": BLUE, "alpha": 0.35, "linewidth": 9, "solid_capstyle": "butt"}
DOTS: dict[str, Any] = {"linestyle": "none", "marker": "o", "markeredgewidth": 0, "rasterized": True}


def slide(title: str, detail: str, note: str) -> Figure:
    """16:9, 1920 × 1080 pixels, with a title, a line below it and a note at the foot; the panels are to be added."""
    figure = Figure(figsize=(16, 9), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.04, 0.92, title, size=29, weight="bold", color=INK)
    figure.text(0.04, 0.865, detail, size=21, color=INK)
    figure.text(0.04, 0.03, note, size=13, color=MUTED, parse_math=False, linespacing=1.5)
    return figure


def finish(axes: Axes) -> None:
    """Open to the top and right, with ticks and labels to be read from the last row."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(which="both", labelsize=14, color=MUTED, labelcolor=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=15, color=INK)


def heading(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", size=17, weight="bold", color=INK, pad=14)


def log_steps(axes: Axes, steps: int) -> None:
    axes.set(xscale="log", xlabel="step", xlim=(0.8, 1.3 * max(steps, 8)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:.0f}"))


def point_out(axes: Axes, text: str, colour: str, point: tuple[Any, Any], offset: tuple[int, int]) -> None:
    """A label beside a point, with a line to it."""
    if not np.isfinite(point).all():
        return  # a diverged training
    axes.annotate(
        text,
        point,
        offset,
        textcoords="offset points",
        size=16,
        weight="bold",
        color=colour,
        ha="left" if offset[0] > 0 else "right",
        va="center",
        arrowprops={"arrowstyle": "-", "color": colour, "shrinkA": 1, "shrinkB": 5},
    )
