"""What has changed since another run of `bench`, which wrote a `bench.json`."""

import dataclasses
import json
import math
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from jaxact._cli._bench_measure import LARGE, Ratio
from jaxact._cli._bench_report import CHANGED, Outcome, shape_text, with_spread


@dataclasses.dataclass(frozen=True)
class Old:
    """What `bench.json` says of another run."""

    ratios: dict[tuple[Any, ...], Ratio]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    scale: float


def read(path: Path) -> Old:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ratios = {_key(c): Ratio(float(c["of_peer"]["ratio"]), float(c["of_peer"]["spread"])) for c in found["cells"]}
        if not all(0 < number < math.inf for r in ratios.values() for number in (r.ratio, r.spread + 1)):
            raise ValueError("a ratio is not positive")
        return Old(
            ratios, dict(found["versions"]), dict(found["hardware"]), float(found.get("scale", 1.0))
        )  # once it was always 1
    except OSError as error:
        raise ArgumentError(None, f"cannot read {path}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ArgumentError(None, f"{path} is not a bench.json that `jaxact bench` has written.") from None


def _key(c: dict[str, Any]) -> tuple[Any, ...]:
    return c["function"], c["peer"], c["dtype"], tuple(c["shape"]), c["mode"], c["what"]


COMPARED = ("old", "new", "new/old", "dtype", "shape", "mode", "what", "function")


def changes(old: Old, outcome: Outcome) -> tuple[list[tuple[str, ...]], list[str]]:
    """The cells whose ratio to the peer has changed by more than both spreads, and notes."""
    found, common = [], 0
    for c in outcome.cells:
        before = old.ratios.get(_key(c._asdict()))
        if before is None:
            continue
        common += 1
        of = c.of_peer.ratio / before.ratio
        if abs(math.log(of)) > math.log1p(max(CHANGED, before.spread, c.of_peer.spread)):
            texts = (with_spread(before), with_spread(c.of_peer), f"{of:.2f}")
            found.append(
                (c.bytes < LARGE, -abs(math.log(of)), (*texts, c.dtype, shape_text(c), c.mode, c.what, c.function))
            )
    found.sort()  # calls of microseconds vary from process to process by more than within one, and come last
    notes = [f"{len(found)} of {common} cells of both runs have changed by more than both spreads and 5 %"]
    for name, was, now in (
        ("versions", old.versions, outcome.versions),
        ("hardware", old.hardware, outcome.hardware),
        ("logits", {"scale": old.scale}, {"scale": outcome.scale}),
    ):
        differing = [
            f"{k} {was.get(k)} → {now.get(k)}" for k in dict.fromkeys((*was, *now)) if was.get(k) != now.get(k)
        ]
        if differing:
            notes.append(f"Other {name}: {', '.join(differing)}")
    return [texts for _, _, texts in found], notes
