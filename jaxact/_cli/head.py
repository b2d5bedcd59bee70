"""`head`: a small language model with the usual last layer, and with `linear_cross_entropy`."""

import argparse
import contextlib
import functools
import re
import sys
import time
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxact._cli._arguments import check_learning_rate, make_directory, positive, require, whole, writing
from jaxact._cli._record import versions, write_json
from jaxact._cli._words import plural

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

    from jaxact._cli._head_model import Cost, Outcome, Trainer

SUMMARY = "Train a next-word model with a dense head and with linear_cross_entropy; compare losses, memory and time."
REPEATS, SECONDS = (5, 25), 4.0  # of each timed step: at least and at most, and about how long in all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    number, seed = functools.partial(whole, 1, 10**6), functools.partial(whole, 0, 2**32 - 1)
    add, sizes = parser.add_argument, [2000, 8000, 32000, 128000]
    help_ = "vocabularies to measure; the smallest is trained (default: 2000,8000,32000,128000)"
    add("--vocab", type=_sizes, default=sizes, metavar="V,V", help=help_)
    add("--steps", type=number, default=150, metavar="N", help="default: %(default)s")
    add("--batch", type=number, default=2048, metavar="TOKENS", help="of one step (default: %(default)s)")
    add("--features", type=number, default=32, metavar="D", help="of the head's input (default: %(default)s)")
    add("--learning-rate", type=positive, default=1e-2, metavar="RATE", help="default: %(default)s")
    add("--seed", type=seed, default=0, metavar="N", help="default: %(default)s")
    add("--devices", type=_devices, default=1, metavar="N", help="also train on N devices, on CPU simulated ones")
    add("--out", type=Path, default=Path("head"), metavar="DIR", help="for the results (default: %(default)s)")


def _sizes(text: str) -> list[int]:
    sizes = sorted({int(size) for size in text.split(",")}) if re.fullmatch(r"[0-9]{1,8}(,[0-9]{1,8})*", text) else []
    if not sizes or sizes[0] < 2:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 2 to 99999999, such as 2000,8000, got {text!r}")
    return sizes


def _devices(text: str) -> int:
    if text not in [str(2**power) for power in range(9)]:
        raise argparse.ArgumentTypeError(f"must be a power of two from 1 to 256, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Trains, measures, prints and draws. What can be wrong is checked before the training."""
    check_learning_rate(arguments.learning_rate, np.float32)
    require("head", "flax", "optax", "matplotlib", "rich")
    _start_devices(arguments.devices)
    from jaxact._cli._head_model import FUSED, Cost, Outcome, language_reference, mesh_of, numbered, relative_gap, room

    mesh = mesh_of(arguments.devices) if arguments.devices > 1 else None
    if mesh:
        split = {"--batch": (arguments.batch, "tokens"), "the smallest --vocab": (arguments.vocab[0], "classes")}
        for option, (size, axis) in split.items():
            if size % mesh.shape[axis]:
                parts = f"the parts into which {arguments.devices} devices split it"
                raise ArgumentError(None, f"{option} {size} must be a multiple of {mesh.shape[axis]}, {parts}.")
    # Two models, each with two matrices of this size and their two moments, in float32.
    if 48 * arguments.vocab[-1] * arguments.features > room():
        raise ArgumentError(None, "the parameters need more memory than there is: lower --vocab or --features.")
    words = language_reference()
    make_directory(arguments.out)
    from rich.console import Console
    from rich.progress import Progress

    console = Console(highlight=False, markup=False, emoji=False)
    distinct, smallest = len(set(words)), arguments.vocab[0]
    console.print(
        f"Python's language reference: {len(words)} words, {distinct} distinct. "
        "In a larger vocabulary the other classes are unused, which costs the same memory and time.",
        soft_wrap=True,
    )
    if not sys.stdout.isatty():
        steps = f"{arguments.steps} {plural('step', arguments.steps)}"
        console.print(f"Training 2 models on {smallest} classes for {steps}, adamw.", soft_wrap=True)
    numbers = numbered(words, smallest)
    with Progress(console=console, transient=True, disable=not sys.stdout.isatty()) as bar:
        losses, trainers = _trained(arguments, numbers, bar)
        sharded = None
        if mesh:
            spread, over = _trained(arguments, numbers, bar, mesh)
            sharded = Cost(over[FUSED].memory, np.zeros(0), spread[FUSED])
        costs = _measured(arguments, words, bar, trainers)
    outcome = Outcome(arguments, len(words), distinct, losses, costs, sharded)
    console.print(_table(outcome))
    console.print(f"The two heads {outcome.verdict}.", soft_wrap=True)
    if mesh and sharded:
        gap, each = relative_gap(sharded.losses, losses[FUSED]), _mebibytes(sharded)
        console.print(
            f"On {arguments.devices} devices, {mesh.shape['tokens']} for tokens × {mesh.shape['classes']} for classes, "
            f"the losses agree with one device's to {gap:.1e}, and a step takes {each} MiB on each instead of "
            f"{_mebibytes(costs[smallest][FUSED])}.",
            soft_wrap=True,
        )
    console.print(f"Written to {arguments.out}: {', '.join(_write(outcome, arguments.out))}.", soft_wrap=True)
    return 0


def _start_devices(number: int) -> None:
    """Their number is fixed once JAX has started."""
    if number > 1:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", number)
    if jax.device_count() < number:
        raise ArgumentError(None, f"--devices {number}: JAX has started with {jax.device_count()}.")


def _trained(
    settings: Any, numbers: np.ndarray, bar: "Progress", mesh: Any = None
) -> tuple[dict[str, np.ndarray], dict[str, "Trainer"]]:
    """The losses with either head from one starting point, or with the fused one on a mesh."""
    from jaxact._cli._head_model import FUSED, HEADS, Trainer, batches, room

    losses, trainers = {}, {}
    for name in [FUSED] if mesh else HEADS:
        task = bar.add_task(f"{name}, {mesh.size} devices" if mesh else name, total=settings.steps)
        trainer = trainers[name] = Trainer(name, settings.vocab[0], settings, mesh)
        if (trainer.memory or 0) > room():
            raise ArgumentError(None, f"a step with the {name} head needs more memory than there is: lower --batch.")
        batch, found = batches(numbers, settings.batch, settings.seed), []
        for _ in range(settings.steps):
            found.append(trainer(*next(batch)))
            bar.advance(task)
        losses[name] = np.array(found)
    return losses, trainers


def _measured(
    settings: Any, words: list[str], bar: "Progress", trainers: dict[str, "Trainer"]
) -> dict[int, dict[str, "Cost"]]:
    """Memory and time of one step in each vocabulary, the two heads in turns. `trainers` are those of the smallest."""
    from jaxact._cli._head_model import HEADS, Cost, Trainer, batches, numbered, room

    costs = {}
    task = bar.add_task("memory and time", total=len(settings.vocab))
    for vocabulary in settings.vocab:
        if vocabulary > settings.vocab[0]:
            trainers = {name: Trainer(name, vocabulary, settings) for name in HEADS}
        # Of a step that does not fit, the memory is known all the same.
        fit = {name: trainer for name, trainer in trainers.items() if (trainer.memory or 0) <= room()}
        seconds: dict[str, list[float]] = {name: [] for name in HEADS}
        losses: dict[str, list[float]] = {name: [] for name in HEADS}
        begin, batch = time.perf_counter(), batches(numbered(words, vocabulary), settings.batch, settings.seed)
        while fit and (n := max(map(len, losses.values()))) <= REPEATS[1]:
            if n > REPEATS[0] and time.perf_counter() - begin > SECONDS:
                break
            tokens = next(batch)
            for name, trainer in fit.items():
                start = time.perf_counter()
                losses[name].append(trainer(*tokens))
                seconds[name].append(time.perf_counter() - start)
        # The first step of each warms up.
        costs[vocabulary] = {
            name: Cost(trainers[name].memory, np.array(seconds[name][1:]), np.array(losses[name])) for name in HEADS
        }
        bar.advance(task)
    return costs


def _table(outcome: "Outcome") -> "Table":
    """One row for each vocabulary."""
    from rich import box
    from rich.table import Table

    from jaxact._cli._head_model import DENSE, FUSED, ratio, relative_gap

    columns = ("vocabulary", "dense MiB", "fused MiB", "ratio", "dense ms", "fused ms", "loss gap")
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, title="One training step", title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for vocabulary, costs in outcome.costs.items():
        dense, fused = costs[DENSE], costs[FUSED]
        both = min(len(dense.losses), len(fused.losses))
        gap = f"{relative_gap(dense.losses[:both], fused.losses[:both]):.1e}" if both else "–"
        known = _mebibytes(dense), _mebibytes(fused), f"{ratio(costs):.1f}"
        table.add_row(str(vocabulary), *known, milliseconds(dense), milliseconds(fused), gap)
    return table


def _mebibytes(cost: "Cost") -> str:
    return "–" if cost.memory is None else f"{cost.memory / 2**20:.1f}"


def milliseconds(cost: "Cost") -> str:
    """The median; a dash if the step did not fit in memory."""
    return f"{1000 * np.median(cost.seconds):.0f}" if len(cost.seconds) else "–"


def _write(outcome: "Outcome", directory: Path) -> list[str]:
    """The figure and the numbers; returns the names of the files."""
    from jaxact._cli._head_figure import draw

    figure, names = draw(outcome), ["head.png", "head.svg", "head.json"]
    with writing(directory):
        for name in names[:2]:
            figure.savefig(directory / name)
        write_json(directory / names[2], _as_json(outcome))
    return names


def _as_json(outcome: "Outcome") -> dict[str, Any]:
    """Every number; None stands for what was not measured."""
    settings = outcome.settings
    keys = ("vocab", "steps", "batch", "features", "learning_rate", "seed", "devices")
    costs = {str(size): {n: cost._asdict() for n, cost in of.items()} for size, of in outcome.costs.items()}
    return {
        "verdict": f"The two heads {outcome.verdict}.",
        "settings": {key: getattr(settings, key) for key in keys},
        "text": {"words": outcome.words, "distinct": outcome.distinct},
        "versions": versions("flax", "optax"),
        "backend": jax.default_backend(),
        "losses": outcome.losses,
        "largest_relative_gap": outcome.gap,
        "steps": costs,
        "sharded": outcome.sharded and outcome.sharded._asdict(),
    }
