"""The figure of `head`: the losses of both heads, and the memory of a step against the vocabulary, on one slide."""

from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from jaxact._chunks import CHUNK_BYTES
from jaxact._cli._figures import BLUE, INK, ORANGE, PALE, finish, heading, log_steps, point_out, slide
from jaxact._cli._head_model import DENSE, FUSED, Outcome, ratio
from jaxact._cli._words import plural

DASHED: dict[str, Any] = {"color": ORANGE, "linewidth": 2.2, "linestyle": (0, (4, 2.5))}
NAMES = {DENSE: "dense head", FUSED: "linear_cross_entropy"}


def draw(outcome: Outcome) -> Figure:
    """16:9, 1920 × 1080 pixels."""
    figure = slide(*_message(outcome), _settings(outcome))
    layout = {"left": 0.075, "right": 0.985, "bottom": 0.185, "top": 0.755, "wspace": 0.24}
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15), gridspec_kw=layout)
    _losses(left, outcome)
    _memory(right, outcome)
    for axes in (left, right):
        finish(axes)
    return figure


def _message(outcome: Outcome) -> tuple[str, str]:
    """The title, and the line below it."""
    largest = max(outcome.costs)
    costs = outcome.costs[largest]
    if not np.isfinite([*outcome.losses.values()]).all():
        return "The two heads are not comparable", "A loss is not finite, so lower the learning rate"
    steps = len(outcome.losses[FUSED])
    gap = f"{'The loss agrees' if steps == 1 else f'All {steps} losses agree'} to {_power(outcome.gap)}"
    if not ratio(costs) > 1.1:
        return "linear_cross_entropy trains like the dense head", gap
    memory = " instead of ".join(_bytes(costs[name].memory or 0) for name in (FUSED, DENSE))
    title = f"linear_cross_entropy: the same training, {_times(ratio(costs))} times less memory"
    return title, f"{gap}. With {largest:,} classes a step needs {memory}"


def _settings(outcome: Outcome) -> str:
    settings, largest = outcome.settings, max(outcome.costs)
    seconds = [cost.seconds for cost in outcome.costs[largest].values()]
    times = [f"{np.median(s):.2g} s" if len(s) else "not run, for lack of memory" for s in seconds]
    return (
        f"Next word after 8, in Python's language reference ({outcome.distinct:,} distinct words; further classes are "
        f"unused). {settings.batch:,} {plural('token', settings.batch)} a step, "
        f"{settings.features} {plural('feature', settings.features)}, adamw, float32.\n"
        f"Memory: temporary arrays of one compiled step. Time of a step with {largest:,} classes: "
        f"{times[0]} (dense), {times[1]} (linear_cross_entropy). jax {jax.__version__}, {jax.default_backend()}."
    )


def _losses(axes: Axes, outcome: Outcome) -> None:
    heading(axes, f"Two trainings, one loss curve ({outcome.settings.vocab[0]:,} classes)")
    dense, fused = outcome.losses[DENSE], outcome.losses[FUSED]
    log_steps(axes, len(dense))
    axes.margins(y=0.12)  # room for the labels
    steps = np.arange(1, len(dense) + 1)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, dense, **PALE, marker=marker, markersize=9)
    axes.plot(steps, fused, **DASHED, marker=marker)
    axes.set_ylabel("mean cross-entropy (nats per word)")
    early, late = (int(len(steps) ** power) - 1 for power in (0.37, 0.72))
    point_out(axes, NAMES[FUSED], ORANGE, (steps[early], fused[early]), (40, 26))
    point_out(axes, NAMES[DENSE], BLUE, (steps[late], dense[late]), (-50 if late else 40, -45))


def _memory(axes: Axes, outcome: Outcome) -> None:
    sizes = np.array(list(outcome.costs))
    chunked = 4 * outcome.settings.batch * sizes.max() > CHUNK_BYTES
    heading(axes, "Memory of a training step" + (": a chunk of logits, not all" if chunked else ""))
    memory = {name: np.array([c[name].memory or np.nan for c in outcome.costs.values()]) / 2**20 for name in NAMES}
    dense, fused = memory.values()
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.plot(sizes, dense, **PALE)
    axes.plot(sizes, dense, "o", color=BLUE, markersize=11)
    axes.plot(sizes, fused, **DASHED, marker="o", markersize=6)
    axes.set(xlabel="V, the number of classes", ylabel="temporary memory", xlim=(sizes[0] / 1.3, sizes[-1] * 1.9))
    axes.margins(y=0.08)
    if (known := fused[np.isfinite(fused)]).size:
        axes.set_ylim(bottom=np.min(known) / 2)  # room for the label
    axes.xaxis.set_major_locator(FixedLocator(sizes.tolist(), nbins=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value * 2**20)))
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    middle, chunk = len(sizes) // 2, _bytes(CHUNK_BYTES)
    if middle == len(sizes) - 1 and np.isfinite(dense[middle]):
        bottom, top = axes.get_ylim()[0], dense[middle]  # the label is at the highest point: room for it too
        axes.set_ylim(bottom * (bottom / top) ** 0.08, top * (top / bottom) ** 0.3)
    whole = f"{NAMES[DENSE]}\n{outcome.settings.batch:,} × V logits at once"
    point_out(axes, whole, BLUE, (sizes[middle], dense[middle]), (-40 if middle else 35, 40))
    part = NAMES[FUSED] + (f"\n{chunk} of logits at a time" if chunked else "")
    point_out(axes, part, ORANGE, (sizes[max(middle - 1, 0)], fused[max(middle - 1, 0)]), (35, -60 if chunked else -40))
    if ratio(outcome.costs[int(sizes[-1])]) > 1.1:
        arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 8, "shrinkB": 8}
        axes.annotate("", (sizes[-1], fused[-1]), (sizes[-1], dense[-1]), arrowprops=arrow)
        text, at = f"{_times(dense[-1] / fused[-1])}×", (sizes[-1], np.sqrt(dense[-1] * fused[-1]))
        axes.annotate(text, at, (10, 0), textcoords="offset points", size=20, weight="bold", color=INK, va="center")


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def _bytes(number: float) -> str:
    """In MiB, or GiB from one."""
    mebibytes = number / 2**20
    return f"{mebibytes:.3g} MiB" if mebibytes < 1000 else f"{mebibytes / 1024:.2g} GiB"


def _power(number: float) -> str:
    """One digit, as in 2·10⁻⁷."""
    digit, _, exponent = f"{number:.0e}".partition("e")
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"a relative {digit}·10{superscript}" if number else "the last bit"
