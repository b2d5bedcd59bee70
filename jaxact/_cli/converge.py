"""`converge`: a sigmoid and a two-class softmax classifier, trained side by side: jaxact, then jax.nn with optax."""

import argparse
import functools
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxact import classifiers
from jaxact._cli._arguments import check_learning_rate, make_directory, positive, require, whole, writing
from jaxact._cli._converge_data import Data, breast_cancer, read_csv
from jaxact._cli._converge_report import OURS, PEER, Decision, Outcome, as_json, table
from jaxact._cli._record import write_json
from jaxact._cli._words import plural
from jaxact.classifiers import Params, Twins

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY = "Train a sigmoid and a two-class softmax classifier side by side and compare their losses bit for bit."

# The name in optax, its options, and the decoupled weight decay of the softmax model.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "sgd": ("sgd", {}, 0.0),
    "momentum": ("sgd", {"momentum": 0.9}, 0.0),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}, 0.0),
    "adam": ("adam", {}, 0.0),
    "rmsprop": ("rmsprop", {}, 0.0),
    "adagrad": ("adagrad", {}, 0.0),
    "adamw": ("adam", {}, 1e-2),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps, seed = functools.partial(whole, 1, 10**6), functools.partial(whole, 0, 2**32 - 1)
    add = parser.add_argument
    add("--csv", type=Path, metavar="FILE", help="your data, with a header (default: Wisconsin breast cancer)")
    add("--label", metavar="COLUMN", help="the column of FILE with the class; every other column is a feature")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="default: %(default)s; adamw: with weight decay 0.01")
    add("--learning-rate", type=positive, default=0.1, metavar="RATE", help="default: %(default)s; sigmoid: twice")
    add("--steps", type=steps, default=5000, metavar="N", help="default: %(default)s")
    add("--float64", action="store_true", help="compute in float64 instead of float32")
    add("--unmatched", action="store_true", help="give both the same learning rate, to see the sigmoid fall behind")
    add("--seed", type=seed, default=0, metavar="N", help="default: %(default)s")
    add("--out", type=Path, default=Path("converge"), metavar="DIR", help="for the results (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Reads, trains, prints and draws. What can be wrong is checked before the training."""
    if (arguments.csv is None) != (arguments.label is None):
        given, missing = ("--csv", "--label") if arguments.label is None else ("--label", "--csv")
        raise ArgumentError(None, f"{given} needs {missing}.")
    dtype = np.float64 if arguments.float64 else np.float32
    check_learning_rate(arguments.learning_rate, dtype)
    require("demo", "optax", "matplotlib", "rich", *(["sklearn"] if arguments.csv is None else []))
    data = breast_cancer() if arguments.csv is None else read_csv(arguments.csv, arguments.label)
    make_directory(arguments.out)
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        f"{data.name}: {len(data.y)} examples, {len(data.features)} {plural('feature', len(data.features))}; "
        f"class 0 is {data.classes[0]!r}, class 1 is {data.classes[1]!r}.",
        soft_wrap=True,
    )
    with jax.enable_x64(arguments.float64):
        outcome = _experiment(data, dtype, arguments, console)
    console.print(table(outcome))
    console.print(f"The two classifiers are {outcome.verdict}.", soft_wrap=True)
    written = _write(outcome, arguments.out)
    console.print(f"Written to {arguments.out}: {', '.join(written)}.", soft_wrap=True)
    return 0


def peer_loss(params: Params, x: Array, y: Array) -> Array:
    """The same loss with an ordinary matrix product and optax."""
    import optax

    z = x @ params.weights.T + params.bias
    if z.shape[1] == 1:
        return optax.sigmoid_binary_cross_entropy(z[:, 0], y.astype(z.dtype)).mean()
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def _experiment(data: Data, dtype: Any, settings: argparse.Namespace, console: "Console") -> Outcome:
    """Both pairs of twins, from one starting point."""
    import optax
    from rich.progress import Progress

    optimizer, options, weight_decay = OPTIMIZERS[settings.optimizer]
    train = functools.partial(
        classifiers.train_twins,
        data.x.astype(dtype),
        data.y,
        optimizer=functools.partial(getattr(optax, optimizer), **options),
        learning_rate=settings.learning_rate,
        weight_decay=weight_decay,
        steps=settings.steps,
        key=jax.random.key(settings.seed),
        matched=not settings.unmatched,
    )
    if not sys.stdout.isatty():
        steps = f"{settings.steps} {plural('step', settings.steps)}"
        console.print(f"Training 2 x 2 classifiers for {steps}, {settings.optimizer}.", soft_wrap=True)
    losses: dict[str, dict[str, Any]] = {OURS: {}, PEER: {"loss": peer_loss}}
    twins: dict[str, Twins] = {}
    with Progress(console=console, transient=True, disable=not sys.stdout.isatty()) as bar:
        for name, loss in losses.items():
            task = bar.add_task(name, total=2 * settings.steps)

            def show(done: int, task: Any = task) -> None:
                bar.update(task, completed=done)

            twins[name] = train(**loss, progress=show)
    return Outcome(data, settings, weight_decay, twins, _decision(twins[OURS], jnp.asarray(train.args[0])))


def _decision(twins: Twins, x: Array) -> Decision:
    one, two = twins.sigmoid.params, twins.softmax.params
    return Decision(
        logit=np.asarray(classifiers.logits(one, x)[:, 0]),
        sigmoid=np.asarray(classifiers.probabilities(one, x)),
        softmax=np.asarray(classifiers.probabilities(two, x)[:, 1]),
    )


def _write(outcome: Outcome, directory: Path) -> list[str]:
    """The figure and the numbers; returns the names of the files."""
    from jaxact._cli._converge_figure import draw

    figure, names = draw(outcome), ["converge.png", "converge.svg", "converge.json"]
    with writing(directory):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # names in a script that the font does not have
            for name in names[:2]:
                figure.savefig(directory / name)
        write_json(directory / names[2], as_json(outcome))
    return names
