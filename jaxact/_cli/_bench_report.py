"""What `bench` says of its cells: the rows, the summary and the files."""

import dataclasses
import math
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxact._cli._arguments import writing
from jaxact._cli._bench_measure import LARGE, UNCERTAIN, Cell, Ratio
from jaxact._cli._record import cores, versions, write_json

COLUMNS = ("dtype", "shape", "value", "limit", "value+grad", "limit", "eager", "temp MiB", "kept MiB", "compile")
LEGEND = (
    "value, value+grad, eager (value/value+grad) and compile: our time over the peer's, ± half the distance between "
    "the quartiles; limit: our time over a copy of the same bytes, or the matrix products of the head; "
    "temp and kept: temporary memory and what reverse mode keeps, ours/peer's; "
    f"~ a spread above {UNCERTAIN:.0%}, from which a ratio means little"
)
CHANGED = 0.05  # of a ratio, at least, beside both spreads


@dataclasses.dataclass
class Outcome:
    """All that was measured, and where."""

    quick: bool
    scale: float  # of the logits
    cells: list[Cell]
    importing: tuple[float, float]  # seconds of import jax, and of import jaxact after it
    cores: int
    speedup: dict[str, float]  # from one core to all; empty where threads cannot be kept to one
    versions: dict[str, str | None] = dataclasses.field(default_factory=lambda: versions("optax"))
    hardware: dict[str, Any] = dataclasses.field(default_factory=lambda: _hardware())

    @property
    def large(self) -> list[Cell]:
        return [c for c in self.cells if c.mode == "jit" and c.bytes >= LARGE and c.peer != "tokamax"]

    def mean(self, what: str) -> float:
        """The geometric mean of the ratios to the peers; nan if there are none."""
        logs = [math.log(c.of_peer.ratio) for c in self.large if c.what == what]
        return math.exp(sum(logs) / len(logs)) if logs else math.nan


def _hardware() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        memory = None
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": cores(),
        "memory": memory,
        "device": ", ".join(dict.fromkeys((jax.default_backend(), jax.devices()[0].device_kind))),
    }


# The table


def row(cells: list[Cell]) -> tuple[str, ...]:
    """Of one function at one shape, in one dtype."""
    by = {(c.mode, c.what): c for c in cells}
    value, gradient = by["jit", "value"], by["jit", "value+gradient"]
    eager = [c.of_peer for c in cells if c.mode == "eager"]
    return (
        value.dtype,
        shape_text(value),
        with_spread(value.of_peer),
        _bare(value.of_limit),
        with_spread(gradient.of_peer),
        _bare(gradient.of_limit),
        "/".join(map(_bare, eager)) or "–",
        _mebibytes(gradient.temporary),
        _mebibytes(gradient.kept),
        "/".join(f"{compiling(c):.1f}" for c in (value, gradient)),
    )


def shape_text(cell: Cell) -> str:
    return "×".join(map(str, cell.shape)) or "scalar"


def compiling(cell: Cell) -> float:
    ours, peer = cell.compiling or (math.nan, math.nan)
    return ours / peer


def with_spread(r: Ratio) -> str:
    digits = 2 if r.ratio < 9.995 else 1
    return f"{r.ratio:.{digits}f} ±{r.ratio * r.spread:.{digits}f}{_mark(r)}"


def _bare(r: Ratio | None) -> str:
    return "–" if r is None else f"{r.ratio:.{2 if r.ratio < 9.995 else 1 if r.ratio < 99.95 else 0}f}{_mark(r)}"


def _mark(r: Ratio) -> str:
    return "" if r.certain else "~"


def _mebibytes(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return "–"
    return "/".join("0" if n == 0 else f"{n / 2**20:.{1 if n < 99.95 * 2**20 else 0}f}" for n in pair)


# The summary


def summary(outcome: Outcome) -> list[str]:
    """Sentences, without their full stops."""
    large = outcome.large
    lines = []
    if large:
        value, gradient = outcome.mean("value"), outcome.mean("value+gradient")
        lines.append(
            f"Value and gradient take {gradient:.2f} of the peers' time, the value {value:.2f}: geometric means of "
            f"{len(large) // 2} cells of 64 KiB or more each, under jit"
        )
        slow = sorted((c for c in large if c.of_peer.ratio > 1 + CHANGED), key=lambda c: -c.of_peer.ratio)
        worst = "; ".join(f"{_name(c)} {with_spread(c.of_peer)}" for c in slow[:5])
        which = "" if not slow else ": " if len(slow) <= 5 else ", most of all "
        unsure = sum(not c.of_peer.certain for c in slow)
        count = f"{len(slow)} of {len(large)} cells" + (f", {unsure} of them uncertain (~)" if unsure else "")
        lines.append(f"Slower by more than 5 %: {count}{which}{worst}")
        limits = {what: [c.of_limit.ratio for c in large if c.what == what and c.of_limit] for what in _WHATS}
        texts = [f"{what} {np.median(of):.1f}, at most {max(of):.1f}" for what, of in limits.items() if of]
        lines.append(f"Over the limit (medians): {'; '.join(texts)}")
    lines += _costs(outcome)
    jax_alone, more = outcome.importing
    lines.append(f"import jaxact adds {1e3 * more:.0f} ms to the {1e3 * jax_alone:.0f} ms of import jax")
    lines.append(_scaling(outcome))
    return lines


_WHATS = ("value", "value+gradient")


def _name(c: Cell) -> str:
    return f"{c.function} {c.dtype} {shape_text(c)} {c.what}"


def _costs(outcome: Outcome) -> list[str]:
    """Of eager calls, of compiling, and in memory."""
    lines = []
    eager = [c for c in outcome.cells if c.mode == "eager"]
    if eager:
        ratios = [c.of_peer.ratio for c in eager]
        most = max(eager, key=lambda c: c.of_peer.ratio)
        lines.append(f"Eager: {np.median(ratios):.2f} of the peers' time (median), at most "
                     f"{with_spread(most.of_peer)}, {_name(most)}")  # fmt: skip
    jit = [c for c in outcome.cells if c.compiling]
    most = max(jit, key=compiling)
    lines.append(f"Compiling: {np.median([*map(compiling, jit)]):.1f} of the peers' time (median), at most "
                 f"{compiling(most):.1f}, {_name(most)}")  # fmt: skip
    more = sorted((c for c in jit if c.kept and c.kept[0] > c.kept[1] and c.peer != "tokamax"), key=_keeping)
    worst = {c.function: f"{c.function} {_keeping(c):.4g} times ({c.dtype} {shape_text(c)})" for c in more}
    lines.append(f"Kept for the backward pass, more than by the peer: {'; '.join(worst.values()) or 'by none'}")
    return lines


def _keeping(c: Cell) -> float:
    ours, peer = c.kept or (math.nan, math.nan)
    return ours / max(peer, 1)


def _scaling(outcome: Outcome) -> str:
    if outcome.cores == 1:
        return "Cores: there is only one"
    if not outcome.speedup:
        return "Cores: this system cannot keep threads to one, so that the speed-up is not measured"
    texts = ", ".join(f"{name} {of:.2f}" for name, of in outcome.speedup.items())
    return f"Speed-up of value and gradient from 1 to {outcome.cores} cores: {texts}"


# The files


def write(outcome: Outcome, sections: list[str], directory: Path) -> list[str]:
    """The numbers, the text and the figure; returns the names of the files."""
    from jaxact._cli._bench_figure import draw

    names = ["bench.json", "bench.md", "bench.png"]
    with writing(directory):
        write_json(directory / names[0], as_json(outcome))
        text = "\n".join([*_markdown(outcome), *sections])
        # The name of the file compared with need not be UTF-8.
        (directory / names[1]).write_text(text, encoding="utf-8", errors="replace")
        draw(outcome).savefig(directory / names[2])
    return names


def as_json(outcome: Outcome) -> dict[str, Any]:
    def of(c: Cell) -> dict[str, Any]:
        ratios = {"of_peer": c.of_peer._asdict(), "of_limit": c.of_limit and c.of_limit._asdict()}
        return c._asdict() | ratios

    fields = {f.name: getattr(outcome, f.name) for f in dataclasses.fields(outcome)}
    jax_alone, more = outcome.importing
    means = {what: outcome.mean(what) for what in _WHATS}
    rest = {"importing": {"jax": jax_alone, "jaxact": more}, "geometric_means": means}
    return fields | rest | {"cells": [of(c) for c in outcome.cells]}


def _markdown(outcome: Outcome) -> list[str]:
    known = ", ".join(f"{name} {version}" for name, version in outcome.versions.items() if version)
    hardware = outcome.hardware
    memory = f", {hardware['memory'] / 2**30:.0f} GiB" if hardware["memory"] else ""
    where = f"{known}; {hardware['cpu']}, {hardware['cores']} cores{memory}; {hardware['device']}"
    logits = f"logits of standard deviation {outcome.scale:g}"
    rows = [(cells[0].function, cells[0].peer, *row(cells)) for cells in grouped(outcome.cells)]
    lines = ["# Speed and memory of jaxact, beside its peers", "", f"{where}; {logits}.", ""]
    lines += [*(f"- {line}." for line in summary(outcome)), ""]
    return [*lines, *table(("function", "peer", *COLUMNS), rows), "", f"{LEGEND}.", ""]


def grouped(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells of each row."""
    rows: dict[tuple[Any, ...], list[Cell]] = {}
    for c in cells:
        rows.setdefault((c.function, c.peer, c.shape, c.dtype), []).append(c)
    return list(rows.values())


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """In Markdown."""
    head = tuple(columns)
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
