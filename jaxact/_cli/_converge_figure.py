"""The figure of `converge`: the losses, the gap between them, and the two decision functions, on one slide."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from jaxact._cli._converge_report import OURS, PEER, Outcome, same_bits
from jaxact._cli._figures import (
    BAND,
    BLACK,
    BLUE,
    DOTS,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALE,
    finish,
    heading,
    log_steps,
    point_out,
    slide,
)
from jaxact._cli._words import drawable, plural
from jaxact.classifiers import Twins

SIGMOID, SOFTMAX = BLUE, ORANGE
COLOURS = {PEER: GREEN, OURS: BLACK}


def draw(outcome: Outcome) -> Figure:
    """16:9, 1920 × 1080 pixels."""
    title, _, detail = f"Sigmoid and two-class softmax are {outcome.verdict}".partition(": ")
    figure = slide(title, detail[:1].upper() + detail[1:], _settings(outcome))
    panels = figure.subplots(
        1, 3, width_ratios=(1, 1.1, 1.1), gridspec_kw={"left": 0.075, "right": 0.985, "bottom": 0.18, "top": 0.755}
    )
    figure.subplots_adjust(wspace=0.28)
    _losses(panels[0], outcome.twins[OURS])
    _gaps(panels[1], outcome)
    _decisions(panels[2], outcome)
    for axes in panels:
        finish(axes)
    return figure


def _settings(outcome: Outcome) -> str:
    data, settings, rate = outcome.data, outcome.settings, outcome.settings.learning_rate
    decay = f" (weight decay {outcome.weight_decay:g} for the softmax)" if outcome.weight_decay else ""
    return (
        f"{_shortened(data.name, 60)}: {len(data.y)} examples, "
        f"{len(data.features)} {plural('feature', len(data.features))}, standardised.\n"
        f"Full-batch {settings.optimizer}{decay}, {settings.steps} {plural('step', settings.steps)}, "
        f"learning rate {rate if settings.unmatched else 2 * rate:g} for the sigmoid and {rate:g} for the softmax, "
        f"{'float64' if settings.float64 else 'float32'}."
    )


def _losses(axes: Axes, twins: Twins) -> None:
    heading(axes, "Loss, trained with jaxact")
    log_steps(axes, len(twins.sigmoid.loss))
    axes.margins(y=0.12)  # room for the labels
    steps = np.arange(1, len(twins.sigmoid.loss) + 1)
    marker = "o" if len(steps) == 1 else None
    axes.plot(steps, twins.sigmoid.loss, **PALE, marker=marker, markersize=9)
    axes.plot(steps, twins.softmax.loss, color=SOFTMAX, linewidth=2.2, linestyle=(0, (4, 2.5)), marker=marker)
    axes.set(yscale="log", ylabel="mean cross-entropy (nats per example)")
    low, high = axes.get_ylim()
    if high / low < 1000:  # few enough decades to have marks between them
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 5 else range(1, 10)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    early, late = (int(len(steps) ** power) - 1 for power in (0.15, 0.5))
    point_out(axes, "sigmoid", SIGMOID, (steps[early], twins.sigmoid.loss[early]), (45, 22))
    side = -1 if late else 1  # of few steps, it is at the left edge
    point_out(axes, "softmax", SOFTMAX, (steps[late], twins.softmax.loss[late]), (40 * side, -34))


def _gaps(axes: Axes, outcome: Outcome) -> None:
    """Drawn in log₁₀ on a linear axis, so that zeros have a place of their own below the smallest power of ten."""
    heading(axes, "Relative gap between the losses")
    with np.errstate(all="ignore"):
        logs = {name: np.log10(outcome.twins[name].relative_gap) for name in COLOURS}
    finite = np.concatenate([log[np.isfinite(log)] for log in logs.values()])
    low, high = (float(np.floor(finite.min())), float(finite.max())) if finite.size else (-8.0, -6.0)
    high = min(max(high, low + 2), 0.0)  # none is above 1
    low = min(low, high - 2)
    band = 0.45 * (high - low)
    log_steps(axes, outcome.settings.steps)
    axes.axhspan(low - band, low, color=BAND, linewidth=0)
    axes.text(1, low - 0.06 * band, "exactly 0: the same bits", size=13, color=MUTED, va="top")
    for (name, log), size, level in zip(logs.items(), (5, 2), (0.88, 0.5), strict=True):
        steps, colour = np.arange(1, len(log) + 1), COLOURS[name]
        axes.plot(steps, np.where(np.isfinite(log), log, np.nan), color=colour, markersize=size, **DOTS)
        zero = steps[same_bits(outcome.twins[name])]
        axes.plot(zero, np.full(len(zero), low - level * band), color=colour, markersize=5, **DOTS)
        text = f"{name}: {len(zero)} of {len(log)} {plural('step', len(log))}"
        axes.text(1, low - (level - 0.06) * band, text, size=14, weight="bold", color=colour, va="bottom")
    decades = np.arange(low, high + 1e-9, max(1, (high - low) // 5))
    zeros = [low - level * band for level in (0.88, 0.5)]
    axes.set_yticks([*zeros, *decades], ["0", "0", *(f"$10^{{{decade:.0f}}}$" for decade in decades)])
    axes.set(ylabel="|sigmoid − softmax| / the larger", ylim=(low - band, high + 0.05 * (high - low)))


def _decisions(axes: Axes, outcome: Outcome) -> None:
    """Where the probability varies; how many examples lie beyond is said at the edges."""
    heading(axes, "The two decision functions")
    data, decision = outcome.data, outcome.decision
    z = decision.logit
    reach = min(10.0, 1.1 * float(np.max(np.abs(z), where=np.isfinite(z), initial=0.1)))
    grid = np.linspace(-reach, reach, 1001)
    axes.plot(grid, 1 / (1 + np.exp(-grid)), **PALE)
    axes.plot(z, decision.softmax, color=SOFTMAX, markersize=4.5, **DOTS)
    for label, level, side, align in ((0, -0.1, 1, "right"), (1, 1.1, -1, "left")):
        true = z[data.y == label]
        axes.plot(true, np.full(len(true), level), "|", color=INK, alpha=0.5, markersize=13, rasterized=True)
        name, height = f"class {label}: {_shortened(data.classes[label], 24)}", level + 0.11 * (2 * label - 1)
        axes.text(side * 0.97 * reach, height, name, ha=align, va="center", size=14, color=INK, parse_math=False)
    axes.set(xlim=(-reach, reach), ylim=(-0.28, 1.28))
    axes.set(xlabel="decision value z of the sigmoid model", ylabel="probability of class 1")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    point_out(axes, "sigmoid\nσ(z)", SIGMOID, (0.12 * reach, 1 / (1 + np.exp(-0.12 * reach))), (30, -22))
    point_out(axes, "softmax\nof (z₀, z₁)", SOFTMAX, (-0.12 * reach, 1 / (1 + np.exp(0.12 * reach))), (-30, 22))
    for side, align in ((-1, "left"), (1, "right")):
        beyond = int((side * z > reach).sum())
        if beyond:
            text, height = (f"{beyond} more →", 0.93) if side > 0 else (f"← {beyond} more", 0.07)
            axes.text(side * 0.97 * reach, height, text, ha=align, va="center", size=13, color=MUTED)


def _shortened(name: str, width: int) -> str:
    text = drawable(name)
    return text if len(text) <= width else text[: width - 1] + "…"
