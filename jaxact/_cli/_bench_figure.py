"""The figure of `bench`: every function's time over its peer's, on one slide."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from jaxact._cli._bench_measure import Cell
from jaxact._cli._bench_report import CHANGED, Outcome
from jaxact._cli._figures import BAND, BLUE, INK, MUTED, ORANGE, slide

STYLES = {"float32": (BLUE, "o"), "bfloat16": (ORANGE, "D")}
# From top to bottom in a function's row: what is not a place of its own would be hidden.
LANES = [(dtype, what) for what in ("value+gradient", "value") for dtype in STYLES]
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 50)


def draw(outcome: Outcome) -> Figure:
    """16:9, 1920 × 1080 pixels."""
    # Eager calls and small arrays would show dispatching; where nothing else was measured, they are what there is.
    cells = outcome.large or [c for c in outcome.cells if c.mode == "jit"]
    figure = slide(*_message(outcome), _settings(outcome))
    axes = figure.add_axes((0.225, 0.155, 0.76, 0.635))
    _rows(axes, cells)
    _scale(axes, cells)
    handles = [_handle(dtype, what) for what in ("value+gradient", "value") for dtype in STYLES]
    legend: dict[str, Any] = {"loc": "lower right", "ncols": 4, "frameon": False, "fontsize": 15, "handletextpad": 0.1}
    axes.legend(handles=handles, bbox_to_anchor=(1.0, 1.0), columnspacing=1.4, borderaxespad=0.1, **legend)
    return figure


def _message(outcome: Outcome) -> tuple[str, str]:
    """The title, and the line below it."""
    mean = outcome.mean("value+gradient")
    if math.isnan(mean):
        return "Time of jaxact over its peers'", "Only arrays below 64 KiB were measured: it is the time of a call"
    worst = max(outcome.large, key=lambda c: c.of_peer.ratio)
    count = sum(c.of_peer.ratio > 1 + CHANGED for c in outcome.large)
    title = f"Value and gradient take {mean:.2f} of the time of jax.nn and optax"
    if not count:
        return title, f"No function is slower by more than 5 % at any of {len(outcome.large)} points"
    share = f"{count} of {len(outcome.large)} points are slower by more than 5 %"
    return title, f"{share}, the slowest takes {worst.of_peer.ratio:.1f} times its peer's"


def _settings(outcome: Outcome) -> str:
    versions, hardware = outcome.versions, outcome.hardware
    return (
        "Medians of interleaved runs under jit, arguments of 64 KiB or more, a marker for each shape; pale where the "
        f"spread is above a tenth.\nIn the title the geometric mean. Logits of scale {outcome.scale:g}. "
        f"jax {versions['jax']}, optax {versions['optax']}; {hardware['cpu']}, {hardware['cores']} cores."
    )


def _rows(axes: Axes, cells: list[Cell]) -> None:
    peers = {c.function: c.peer for c in cells}
    for row, name in enumerate(peers):
        if row % 2 == 0:
            axes.axhspan(row - 0.5, row + 0.5, color=BAND, alpha=0.6, linewidth=0)
        for i, lane in enumerate(LANES):
            of = [c for c in cells if c.function == name and (c.dtype, c.what) == lane]
            for c in of:
                axes.plot(
                    c.of_peer.ratio, row + 0.2 * (i - 1.5), alpha=1.0 if c.of_peer.certain else 0.35, **_style(*lane)
                )
    axes.set_ylim(len(peers) - 0.5, -0.5)
    axes.set_yticks(range(len(peers)), [_broken(name) for name in peers])
    axes.tick_params(axis="y", length=0, labelsize=14, labelcolor=INK)
    for row, peer in enumerate(peers.values()):
        axes.text(0.005, row, peer, transform=axes.get_yaxis_transform(), size=12, color=MUTED, va="center")


def _broken(name: str) -> str:
    """In two lines, if long."""
    return name.replace("_with_", "_\nwith_") if len(name) > 30 else name


def _style(dtype: str, what: str) -> dict[str, Any]:
    colour, marker = STYLES[dtype]
    filled = what == "value+gradient"
    return {
        "color": colour, "marker": marker, "markersize": 8 if marker == "o" else 7, "linestyle": "none",
        "markerfacecolor": colour if filled else "white", "markeredgewidth": 1.6,
    }  # fmt: skip


def _handle(dtype: str, what: str) -> Line2D:
    return Line2D([], [], label=f"{what.replace('+', ' + ')}, {dtype}", **_style(dtype, what))


def _scale(axes: Axes, cells: list[Cell]) -> None:
    ratios = [c.of_peer.ratio for c in cells]
    # Room for the peers' names on the left, and for 1 wherever the ratios are.
    low, high = min(*ratios, 0.8), max(*ratios, 1.25)
    axes.set_xscale("log")
    axes.set_xlim(low / (high / low) ** 0.14, high * (high / low) ** 0.04)
    axes.axvspan(1 - CHANGED, 1 + CHANGED, color=MUTED, alpha=0.18, linewidth=0)
    axes.axvline(1, color=INK, linewidth=1.4)
    axes.xaxis.set_major_locator(FixedLocator(np.array(TICKS).tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.set_xlabel("time over the peer's: faster to the left of 1, within 5 % in the band", size=15, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(axis="x", labelsize=14, color=MUTED, labelcolor=INK)
