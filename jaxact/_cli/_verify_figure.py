"""The figure of `verify`: the error in ulp of each elementwise function and of its derivative, on one slide."""

from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from jaxact._cli._figures import BLACK, DOTS, GREEN, INK, MUTED, finish, slide
from jaxact._cli._verify_references import Function
from jaxact._cli._verify_subjects import SUBJECTS, rounded
from jaxact.verify._values import ulp_errors

POINTS, BINS = 6000, 60
FLOOR = 0.01  # ulp: what is less is drawn here


class Errors(NamedTuple):
    """Errors in ulp at x; nan where the exact result is not a normal number."""

    x: np.ndarray
    ours: np.ndarray
    theirs: np.ndarray


def draw(names: list[str]) -> Figure:
    """16:9, 1920 × 1080 pixels, of elementwise functions."""
    errors = [[_errors(name, derivative) for name in names] for derivative in (False, True)]
    every = [
        (name, kind, e) for kind, row in zip(("", "′"), errors, strict=True) for name, e in zip(names, row, strict=True)
    ]
    name, kind, worst = max(every, key=lambda entry: np.nanmax(entry[2].theirs))
    ours = max(np.nanmax(e.ours) for _, _, e in every)
    title = f"Errors of up to {_short(ours)} ulp with jaxact, of {_short(np.nanmax(worst.theirs))} with jax.nn"
    at = worst.x[np.nanargmax(worst.theirs)]
    detail = f"Worst: {name}{kind} of jax.nn, at {at:.3g}. From 2²³ ulp on, 8.4 million, no bit of a float32 is right"
    note = (
        f"float32, {jax.default_backend()}, jax {jax.__version__}; {POINTS} inputs, compared with float64. "
        "Dots: errors, drawn at 0.01 if less; lines and numbers: the largest.\n"
        "1 ulp: the spacing of float32 at the exact result, where that is a normal number."
        + (" logit: jax.scipy.special." if "logit" in names else "")
    )
    figure = slide(title, detail, note)
    place = {"left": 0.075, "right": 0.985, "bottom": 0.165, "top": 0.745}
    panels = figure.subplots(2, len(names), sharey=True, squeeze=False, gridspec_kw=place)
    figure.subplots_adjust(wspace=0.1, hspace=0.5)
    for row, kind in enumerate(("value", "derivative")):
        for axes, name, found in zip(panels[row], names, errors[row], strict=True):
            _panel(axes, found)
            text = name if row == 0 else f"{name}′"
            _heading(axes, text, found)
        panels[row, 0].set_ylabel(f"error of the {kind} (ulp)", size=15, color=INK)
    for axes, name in zip(panels[1], names, strict=True):
        axes.set_xlabel("p" if name == "logit" else "x", size=15, color=INK)
    return figure


def _errors(name: str, derivative: bool) -> Errors:
    subject = SUBJECTS[name]
    parts = subject.elementwise
    assert parts is not None
    low, high = parts.inside
    # Not on a grid, whose numbers may be short.
    x = rounded(np.sort(np.random.default_rng(0).uniform(low, high, POINTS)), "float32")
    want = (parts.slope if derivative else parts.value)(x)
    return Errors(x, *(_ulps(_computed(f, x, derivative), want) for f in (subject.f, parts.peer)))


def _computed(f: Function, x: np.ndarray, derivative: bool) -> np.ndarray:
    @jax.jit
    def compute(x: Any) -> Any:
        return jax.vjp(f, x)[1](jax.numpy.ones_like(x))[0] if derivative else f(x)

    return np.asarray(compute(x)).astype(np.float64)


def _ulps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    error, region = ulp_errors(got, want, np.float32)
    return np.where(region == 0, error, np.nan)


def _panel(axes: Axes, found: Errors) -> None:
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=0)
    x = found.x
    edges = np.linspace(x[0], x[-1], BINS + 1)
    place = np.clip(np.digitize(x, edges) - 1, 0, BINS - 1)
    middle = (edges[1:] + edges[:-1]) / 2
    for error, colour, width in ((found.theirs, GREEN, 4.5), (found.ours, BLACK, 2.0)):
        drawn = np.maximum(error, FLOOR)
        largest = np.full(BINS, -np.inf)
        np.fmax.at(largest, place, drawn)
        axes.plot(x[::4], drawn[::4], color=colour, alpha=0.25, markersize=2.5, **DOTS)
        axes.plot(middle, np.where(largest < 0, np.nan, largest), color=colour, linewidth=width)
    axes.set(yscale="log", ylim=(FLOOR / 2, 1e8), xlim=(round(x[0]), round(x[-1])))
    axes.yaxis.set_major_locator(FixedLocator([1e-2, 1, 1e2, 1e4, 1e6]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator([-50, 0, 50] if x[-1] > 1 else [0.25, 0.5, 0.75]))
    finish(axes)


def _heading(axes: Axes, name: str, found: Errors) -> None:
    """The name, and the largest error of either, which is what the panel is about."""
    axes.text(0, 1.17, name, transform=axes.transAxes, size=17, weight="bold", color=INK)
    for at, who, error, colour in ((0, "jaxact", found.ours, BLACK), (0.45, "jax.nn", found.theirs, GREEN)):
        text = f"{who} {_short(np.nanmax(error))}"
        axes.text(at, 1.04, text, transform=axes.transAxes, size=14, weight="bold", color=colour)


def _short(ulps: float) -> str:
    for size, word in ((1e6, " million"), (1e3, " thousand")):
        if ulps >= size:
            return f"{ulps / size:.3g}{word}"
    return f"{ulps:.1f}" if ulps < 100 else f"{ulps:.0f}"
