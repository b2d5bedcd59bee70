"""What came of `converge`: its numbers, their verdict, the table and the JSON."""

import argparse
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxact._cli._converge_data import Data
from jaxact._cli._record import versions
from jaxact.classifiers import Fit, Twins

if TYPE_CHECKING:
    from rich.table import Table

OURS, PEER = "jaxact", "jax.nn + optax"


@dataclasses.dataclass(frozen=True)
class Decision:
    """What jaxact's two classifiers make of each example."""

    logit: np.ndarray  # of the sigmoid model
    sigmoid: np.ndarray  # the probability of class 1, by either model
    softmax: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The same experiment with either implementation, and jaxact's decisions at the end."""

    data: Data
    settings: argparse.Namespace
    weight_decay: float  # of the softmax model; the sigmoid has half, at twice the rate
    twins: dict[str, Twins]
    decision: Decision

    @functools.cached_property
    def numbers(self) -> dict[str, dict[str, Any]]:
        return {name: _numbers(twins) for name, twins in self.twins.items()}

    @functools.cached_property
    def verdict(self) -> str:
        """How the two classifiers compare, to follow "the two classifiers are"."""
        ours, steps = self.numbers[OURS], self.settings.steps
        same, relative = ours["steps_with_the_same_bits"], ours["largest_gap"]["relative"]
        finite = np.isfinite(self.twins[OURS].sigmoid.loss) & np.isfinite(self.twins[OURS].softmax.loss)
        if not finite.all():
            step = np.argmin(finite) + 1
            return f"not comparable: from step {step} on a loss is not finite, so lower the learning rate"
        if same == steps:
            agree = f"{'the loss agrees' if steps == 1 else f'all {steps} losses agree'} bit for bit"
            same_model = ours["weight_gap"] == 0
            return f"the same model: {agree}" if same_model else f"not the same model: {agree}, the weights do not"
        if self.settings.unmatched:
            apart = f"at the same rate the losses are up to {100 * relative:.3g}% apart"
            return f"out of step: the sigmoid needs twice the learning rate; {apart}"
        return f"not the same bit for bit: {same} of {steps} losses agree, the largest relative gap is {relative:.2g}"


def same_bits(twins: Twins) -> np.ndarray:
    """At which steps the two losses are the same floating-point number, and a number."""
    bits = f"u{twins.sigmoid.loss.itemsize}"
    return (twins.sigmoid.loss.view(bits) == twins.softmax.loss.view(bits)) & np.isfinite(twins.softmax.loss)


def _numbers(twins: Twins) -> dict[str, Any]:
    with np.errstate(all="ignore"):  # of a training that diverged
        gaps = {"absolute": twins.gap, "ulp": twins.gap_in_ulp, "relative": twins.relative_gap}
        return {
            "sigmoid": _fit(twins.sigmoid),
            "softmax": _fit(twins.softmax),
            "largest_gap": {unit: gap.max() for unit, gap in gaps.items()},
            "steps_with_the_same_bits": int(same_bits(twins).sum()),
            "weight_gap": twins.weight_gap,
            "smallest_softmax_loss": twins.softmax.loss.min(),
        }


def _fit(fit: Fit) -> dict[str, Any]:
    return {
        "accuracy": fit.accuracy,
        "weights": np.asarray(fit.params.weights),
        "bias": np.asarray(fit.params.bias),
        "loss": fit.loss,
    }


def table(outcome: Outcome) -> "Table":
    """One column for each implementation."""
    from rich.table import Table

    rows = {
        "sigmoid: loss at the last step": lambda n: str(n["sigmoid"]["loss"][-1]),
        "softmax: loss at the last step": lambda n: str(n["softmax"]["loss"][-1]),
        "sigmoid: accuracy": lambda n: f"{n['sigmoid']['accuracy']:.2%}",
        "softmax: accuracy": lambda n: f"{n['softmax']['accuracy']:.2%}",
        "largest gap between the losses": lambda n: f"{n['largest_gap']['absolute']:.3g}",
        "largest gap, in ulp": lambda n: f"{n['largest_gap']['ulp']:.4g}",
        "largest gap, relative": lambda n: f"{n['largest_gap']['relative']:.3g}",
        "steps with the same bits": lambda n: f"{n['steps_with_the_same_bits']} of {outcome.settings.steps}",
        "max |w - (w1 - w0)| at the end": lambda n: f"{n['weight_gap']:.3g}",
        "smallest softmax loss": lambda n: str(n["smallest_softmax_loss"]),
    }
    result = Table("", *outcome.numbers)
    for column in result.columns[1:]:
        column.justify, column.no_wrap = "right", True  # what is short of room is the names: the last digits count
    for name, number in rows.items():
        result.add_row(name, *map(number, outcome.numbers.values()))
    return result


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Every number. A float is the exact value of the one computed."""
    data, settings = outcome.data, vars(outcome.settings)
    keys = ("optimizer", "learning_rate", "steps", "float64", "unmatched", "seed", "label")
    return {
        "verdict": f"The two classifiers are {outcome.verdict}.",
        "settings": {key: settings[key] for key in keys}
        | {"csv": settings["csv"] and str(settings["csv"]), "weight_decay": outcome.weight_decay},
        "data": {
            "name": data.name,
            "examples": len(data.y),
            "features": data.features,
            "classes": data.classes,
            "labels": data.y,
        },
        "versions": versions("optax"),
        "backend": jax.default_backend(),
        "results": outcome.numbers,
        "decision": dataclasses.asdict(outcome.decision),
    }
