"""`verify`: is every derivative rule of jaxact right, and is yours?"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import operator
import re
import signal
import sys
import time
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxact._cli._arguments import make_directory, positive, require, whole, writing
from jaxact._cli._record import cores, versions, write_json
from jaxact._cli._words import in_columns

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from jaxact._cli._verify_subjects import Subject
    from jaxact.verify import Report

SUMMARY = "Verify the derivative rules of jaxact, or of a function of yours, against an exact oracle."
NAMES = (
    "sigmoid", "log_sigmoid", "softplus", "logit", "softmax", "log_softmax", "logsumexp", "weighted_logsumexp",
    "softmax_with_temperature", "masked_softmax", "softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy",
    "sigmoid_binary_cross_entropy", "sigmoid_focal_loss", "linear_cross_entropy",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "order": 1,
    "seed": 0,
    "scale": 1.0,
}  # of the options for a function of the user's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    order, seed = functools.partial(whole, 1, 4), functools.partial(whole, 0, 2**32 - 1)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all); or module:function, yours")
    add("--exhaustive", action="store_true", default=None, help="values at all 2³² float32 inputs too: minutes")
    add("--out", type=Path, metavar="DIR", help="for the results, of jaxact's functions alone (default: verify)")
    yours = parser.add_argument_group("for module:function, at normal random numbers")
    add = yours.add_argument
    add("--shape", type=_shape, action="append", metavar="N,N", help="such as 8,128; repeat for further arguments")
    add("--dtype", choices=DTYPES, help=f"default: {DEFAULTS['dtype']}")
    add("--order", type=order, metavar="N", help=f"of derivatives, up to it (default: {DEFAULTS['order']})")
    add("--seed", type=seed, metavar="N", help=f"default: {DEFAULTS['seed']}")
    add("--scale", type=positive, metavar="FACTOR", help=f"of the random numbers (default: {DEFAULTS['scale']:g})")


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*|", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between, such as 8,128, got {text!r}")
    return tuple(map(int, text.split(","))) if text else ()


def run(arguments: argparse.Namespace) -> int:
    """0 if all is verified, 1 if not."""
    own = [name for name in arguments.names if ":" in name]
    if own:
        return _run_own(arguments, own[0])
    for option in ("shape", *DEFAULTS):
        if getattr(arguments, option) is not None:
            raise ArgumentError(None, f"--{option} needs module:function.")
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        choices = ", ".join(NAMES)
        raise ArgumentError(None, f"there is no function {unknown[0]!r} to verify: choose from {choices}.")
    require("demo,verify", "mpmath", "rich", "matplotlib")
    out = arguments.out or Path("verify")
    make_directory(out)
    from rich.console import Console

    from jaxact._cli._verify_subjects import SUBJECTS

    console = Console(highlight=False, markup=False, emoji=False)
    subjects = {name: SUBJECTS[name] for name in NAMES if name in arguments.names or not arguments.names}
    if sys.stdout.isatty():
        reports, rows = _live(subjects, console)
    else:
        reports, rows = [], []
        console.print(in_columns(COLUMNS, WIDTHS), soft_wrap=True)
        for found, row in _verified(subjects):
            reports += found
            rows.append(row)
            console.print(in_columns(row, WIDTHS), soft_wrap=True)
        console.print(f"{LEGEND}.", soft_wrap=True)
    if arguments.exhaustive:
        reports += _exhaustively(subjects, console)
    written = _write(reports, rows, [name for name, s in subjects.items() if s.elementwise], out)
    for report in reports:
        if not report.ok:
            console.print(f"{report}", soft_wrap=True)
    count = {v: sum(r.verdict == v for r in reports) for v in ("verified", "refuted", "inconclusive")}
    numbers = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
    console.print(f"{len(reports)} checks: {numbers}; written to {out}: {', '.join(written)}.", soft_wrap=True)
    return int(count["verified"] < len(reports))


def _run_own(arguments: argparse.Namespace, name: str) -> int:
    """A function of the user's, at random numbers."""
    if len(arguments.names) > 1:
        raise ArgumentError(None, f"{name!r} must be the only NAME.")
    for option in ("exhaustive", "out"):
        if getattr(arguments, option) is not None:
            raise ArgumentError(None, f"--{option} is for jaxact's functions, not for module:function.")
    require("demo,verify", "mpmath")
    f = _imported(name)
    if not arguments.shape:
        raise ArgumentError(None, "module:function needs --shape.")
    from jaxact import verify
    from jaxact._cli._verify_subjects import DTYPES as TYPES

    given = {option: getattr(arguments, option) for option in DEFAULTS}
    options = DEFAULTS | {option: value for option, value in given.items() if value is not None}
    dtype, scale = TYPES[options["dtype"]], options["scale"]
    with _running(f"cannot verify {name}"), np.errstate(over="ignore"):
        rng = np.random.default_rng(options["seed"])
        args = [np.asarray(scale * rng.normal(size=shape)).astype(dtype) for shape in arguments.shape]
    if not all(np.isfinite(x).all() for x in args):
        raise ArgumentError(None, f"--scale {scale} is out of the range of {options['dtype']}.")
    with _running(f"cannot verify {name}"):
        report = verify.rule(f, *args, order=options["order"], seed=options["seed"])
    if "args" in report.witness:
        made = f"[({scale!r} * rng.normal(size=shape)).astype(jnp.{options['dtype']}) for shape in {arguments.shape}]"
        lines = ["import numpy as np", f"rng = np.random.default_rng({options['seed']})", f"args = {made}"]
        imports, *rest = report.witness.splitlines()
        report = dataclasses.replace(report, witness="\n".join([imports, *lines, *rest]))
    print(report)
    return int(not report.ok)


def _imported(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    if not all(map(str.isidentifier, (*module.split("."), *path.split(".")))):
        raise ArgumentError(None, f"{name!r} is not module:function, such as package.module:f.")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with _running(f"cannot import {module}"):
        found = importlib.import_module(module)
    try:
        f = operator.attrgetter(path)(found)
    except AttributeError:
        raise ArgumentError(None, f"{module} has no {path!r}.") from None
    if not callable(f):
        raise ArgumentError(None, f"{name} is not callable: it is of type {type(f).__name__}.")
    return f


@contextlib.contextmanager
def _running(failure: str) -> Iterator[None]:
    """An error of the user's code, or its `sys.exit`, is a mistake on the command line, told in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        text = (str(error).strip() or "no message").splitlines()[0].removesuffix(".")
        raise ArgumentError(None, f"{failure}: {type(error).__name__}: {text}.") from None


Row = tuple[str, ...]
COLUMNS = ("function", "dtype", "verdict", "modes", "worst u", "max ulp", "mutants", "s", "oracle")
WIDTHS = (-max(map(len, NAMES)), -8, -12, -7, 7, 7, 7, 5, -1)  # for a file or a pipe: the last is as long as it likes
LEGEND = "worst u: the largest error of a product, in u·Σ|J||g|; max ulp: of the values at every input of the dtype"


def _verified(subjects: dict[str, "Subject"]) -> Iterator[tuple[list["Report"], Row]]:
    """Reports on one function in one dtype, and their row in the table."""
    tasks = [(name, dtype) for name in subjects for dtype in DTYPES]
    with _processes(len(tasks)) as pool:
        try:
            yield from pool.map(_verify, *zip(*tasks, strict=True))
        except KeyboardInterrupt:  # what has begun may take long
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _processes(most: int) -> Executor:
    """Most of the time goes to tracing and compiling, of which a process does one at a time."""
    count = min(cores(), 8, most)
    # A fork of a process whose JAX runs threads may hang. An interruption is for the parent to report.
    context, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(count, context, signal.signal, ignore)


def _verify(name: str, dtype: str) -> tuple[list["Report"], Row]:
    from jaxact._cli._verify_subjects import SUBJECTS

    start = time.perf_counter()
    rule = SUBJECTS[name].rule(dtype)
    every = SUBJECTS[name].every_value(dtype) if dtype in ("bfloat16", "float16") else None
    return [rule, *([every] if every is not None else [])], _row(name, dtype, rule, every, time.perf_counter() - start)


def _row(name: str, dtype: str, rule: "Report", every: "Report | None", seconds: float) -> Row:
    verdicts = [rule.verdict, *([every.verdict] if every is not None else [])]
    verdict = next(v for v in ("refuted", "inconclusive", "verified") if v in verdicts)
    modes = rule.facts.get("modes", [])
    errors = [check.worst for check in rule.checks if check.worst is not None]
    return (
        name,
        dtype,
        verdict,
        "both" if len(modes) == 2 else " ".join(modes) or "–",
        f"{max(errors):.2f}" if errors else "–",
        f"{every.facts['max ulp']:.3f}" if every is not None else "–",
        rule.facts.get("power", "–").partition(" mutants")[0].replace(" of ", "/"),
        f"{seconds:.1f}",
        rule.facts.get("oracle", "–"),
    )


def _table(rows: list[Row], width: int) -> "Table":
    """Without the oracle where the terminal is narrow; where it is narrower still, with verdicts and errors alone."""
    from rich import box
    from rich.table import Table

    narrow = ("modes", "mutants", "s") if width < 80 else ()
    shown = [i for i, name in enumerate(COLUMNS) if not (name in narrow or (name == "oracle" and width < 120))]
    table = Table(*(COLUMNS[i] for i in shown), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in table.columns:
        column.no_wrap = True
        column.justify = "right" if column.header in ("worst u", "max ulp", "mutants", "s") else "left"
    name = table.columns[0]  # what is short of room is the name, which is folded
    name.no_wrap, name.overflow, name.min_width, name.max_width = False, "fold", 14, max(14, width - 66)
    for row in rows:
        table.add_row(*(row[i] for i in shown), style={"refuted": "red", "inconclusive": "yellow"}.get(row[2]))
    return table


def _live(subjects: dict[str, "Subject"], console: "Console") -> tuple[list["Report"], list[Row]]:
    """The table while it grows: the last rows that the terminal has room for, and all of them at the end."""
    from rich.live import Live

    reports: list[Report] = []
    rows: list[Row] = []
    todo = [(name, dtype, "…", *[""] * (len(COLUMNS) - 3)) for name in subjects for dtype in DTYPES]
    with Live(_table(todo[:1], console.width), console=console) as live:
        for found, row in _verified(subjects):
            reports += found
            rows.append(row)
            growing = [*rows, *todo[len(rows) : len(rows) + 1]]
            live.update(_table(growing[-max(1, console.height - 6) :], console.width))
        live.update(_table(rows, console.width))
    console.print(f"{LEGEND}.", soft_wrap=True)
    return reports, rows


def _exhaustively(subjects: dict[str, "Subject"], console: "Console") -> list["Report"]:
    """The values at every float32. The bar goes to stderr."""
    reports = []
    for subject in subjects.values():
        if subject.elementwise is None:
            continue
        console.print(f"{subject.f.__name__}, every float32:", soft_wrap=True)
        report = subject.every_value("float32", progress=sys.stderr.isatty())
        assert report is not None
        reports.append(report)
        console.print(f"  {report.verdict}: {report.checks[0].detail}", soft_wrap=True)
    return reports


def _write(reports: list["Report"], rows: list[Row], drawn: list[str], directory: Path) -> list[str]:
    """The numbers, the text and, of what is elementwise, the figure; returns the names of the files."""
    from jaxact._cli._verify_figure import draw

    names = ["verify.json", "verify.md", *(["verify.png"] if drawn else [])]
    with writing(directory):
        write_json(
            directory / names[0],
            {"versions": versions(), "reports": [dataclasses.asdict(report) for report in reports]},
        )
        (directory / names[1]).write_text(_markdown(reports, rows), encoding="utf-8")
        if drawn:
            draw(drawn).savefig(directory / names[2])
    return names


def _markdown(reports: list["Report"], rows: list[Row]) -> str:
    shown = [i for i, column in enumerate(COLUMNS) if column != "s"]  # which changes from run to run
    cells = [[row[i].replace("|", "\\|") for i in shown] for row in (COLUMNS, *rows)]
    cells.insert(1, ["---"] * len(shown))
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if version)
    lines = ["# The derivative rules of jaxact", "", f"{known}.", ""]
    lines += [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([*lines, "", f"{LEGEND}.", "", *(report.to_markdown() for report in reports)])
