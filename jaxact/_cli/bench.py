"""`bench`: how fast is jaxact, beside what users have now and beside the limit?"""

import argparse
import dataclasses
import functools
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxact._cli._arguments import make_directory, positive, require
from jaxact._cli._words import in_columns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from jaxact._cli._bench_measure import Cell
    from jaxact._cli._bench_report import Outcome
    from jaxact._cli._bench_subjects import Shape, Subject

SUMMARY = "Measure time and memory of jaxact's functions beside jax.nn's and optax's, and beside the limit."
NAMES = (
    "sigmoid", "log_sigmoid", "softplus", "logit", "softmax", "log_softmax", "logsumexp",
    "softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy", "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss", "linear_cross_entropy",
)  # fmt: skip
SECONDS = {"quick": 0.1, "full": 0.3}  # of a comparison: the slowest take longer
IMPORTS = {"quick": 3, "full": 9}
WIDTHS = (-8, -14, 12, 5, 12, 5, 11, 11, 11, 9)  # of the columns: 118 with the spaces between
NARROW = (0, 1, 2, 4, 6, 9)  # the columns that a narrow terminal shows: 78
CHANGE_WIDTHS = (12, 12, 7, -8, -14, -5, -14, -1)  # what is as long as it likes comes last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    add(
        "--quick",
        action="store_true",
        help="fewer shapes, of 16 bits the largest alone, and less time each: 3 minutes instead of 15",
    )
    add(
        "--scale",
        type=positive,
        default=1.0,
        metavar="S",
        help="standard deviation of the logits; from 8 on most rows have a class that dominates, as in a trained model "
        "(default: %(default)s)",
    )
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="for the results (default: %(default)s)")
    add("--compare", type=Path, metavar="OLD.json", help="say what has changed since the run that wrote it")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes. What can be wrong is checked before the measuring."""
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        choices = ", ".join(NAMES)
        raise ArgumentError(None, f"there is no function {unknown[0]!r} to measure: choose from {choices}.")
    if arguments.scale > 1e37:  # a tenth of what float32 holds, for logits beyond it
        raise ArgumentError(None, f"--scale {arguments.scale} is out of the range of float32.")
    require("demo", "optax", "rich", "matplotlib")
    from jaxact._cli import _bench_compare as compare, _bench_report as report

    old = compare.read(arguments.compare) if arguments.compare else None
    make_directory(arguments.out)
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    names = [name for name in NAMES if name in arguments.names or not arguments.names]
    outcome = _measured(names, "quick" if arguments.quick else "full", arguments.scale, console)
    for line in (report.LEGEND, "", *report.summary(outcome)):
        console.print(f"{line}." if line else "", soft_wrap=True)
    sections: list[str] = []
    if old:
        rows, notes = compare.changes(old, outcome)
        for texts in (compare.COMPARED, *rows) if rows else ():
            console.print(in_columns(texts, CHANGE_WIDTHS), soft_wrap=True)
        for note in notes:
            console.print(f"{note}.", soft_wrap=True)
        lines = report.table(compare.COMPARED, rows) if rows else []
        sections = [f"## Since {arguments.compare.name}", "", *lines, "", *(f"{note}." for note in notes), ""]
    written = report.write(outcome, sections, arguments.out)
    console.print(f"Written to {arguments.out}: {', '.join(written)}.", soft_wrap=True)
    return 0


Task = tuple[str, "Subject", str, "Shape"]


def _tasks(names: list[str], extent: str, scale: float) -> list[Task]:
    from jaxact._cli._bench_subjects import DTYPES, SUBJECTS, beside_tokamax

    others = beside_tokamax()
    subjects = [(name, of[name]) for name in names for of in (SUBJECTS, others) if name in of]

    def scaled(s: "Subject") -> "Subject":
        return dataclasses.replace(s, arguments=functools.partial(s.arguments, scale=scale))

    return [
        (name, scaled(s), dtype, shape)
        for name, s in subjects
        for shape in getattr(s.shapes, extent)
        for dtype in DTYPES
        if dtype == "float32" or extent == "full" or shape == s.shapes.quick[-1]
    ]


def _measured(names: list[str], extent: str, scale: float, console: "Console") -> "Outcome":
    """Prints each row of the table when it is measured."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from jaxact._cli._bench_measure import importing, speedup
    from jaxact._cli._bench_report import Outcome
    from jaxact._cli._bench_subjects import SUBJECTS
    from jaxact._cli._record import cores

    jax.config.update("jax_enable_compilation_cache", False)  # programs found on disk are not compiled
    tasks = _tasks(names, extent, scale)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn seldom, for it takes time from what is measured.
    options: dict[str, Any] = {"refresh_per_second": 1, "transient": True, "disable": not sys.stdout.isatty()}
    with Progress(*columns, console=console, **options) as bar:
        doing = bar.add_task("", total=len(tasks) + 1 + len(names))
        cells: list[Cell] = []
        for found in _rows(tasks, SECONDS[extent], bar, doing, console):
            cells += found
        bar.update(doing, description="import")
        imported = importing(IMPORTS[extent])
        bar.advance(doing)
        bar.update(doing, description="cores")
        faster: dict[str, float] = {}
        for name in names:
            if (times := speedup(name, SUBJECTS[name].shapes.quick[-1], SECONDS[extent])) is not None:
                faster[name] = times
            bar.advance(doing)
    return Outcome(extent == "quick", scale, cells, imported, cores(), faster)


def _rows(tasks: list[Task], seconds: float, bar: "Progress", doing: Any, console: "Console") -> Iterator[list["Cell"]]:
    from jaxact._cli._bench_measure import cells
    from jaxact._cli._bench_report import COLUMNS, row

    # To a file or a pipe it is as wide as it is.
    narrow = console.is_terminal and console.width < len(in_columns(COLUMNS, WIDTHS))

    def line(texts: tuple[str, ...]) -> str:
        shown = NARROW if narrow else range(len(texts))
        return in_columns(tuple(texts[i] for i in shown), tuple(WIDTHS[i] for i in shown))

    if narrow:
        left_out = ", ".join(dict.fromkeys(name for i, name in enumerate(COLUMNS) if i not in NARROW))
        console.print(f"The terminal is narrow: {left_out} are in the files alone.", soft_wrap=True)
    console.print(line(COLUMNS), soft_wrap=True)
    heading = ""
    for name, subject, dtype, shape in tasks:
        bar.update(doing, description=name)
        found = cells(name, subject, dtype, shape, seconds)
        if heading != (heading := f"{name}, beside {subject.peer_name}"):
            console.print(heading, style="bold", soft_wrap=True)
        console.print(line(row(found)), soft_wrap=True)
        bar.advance(doing)
        yield found
