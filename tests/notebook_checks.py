"""What is wrong with a notebook as it is committed, and where two runs of it differ. Notebooks are plain JSON here, so
that this needs nothing installed."""

import itertools
import re
from typing import Any

Notebook = dict[str, Any]

PRIVATE = re.compile(r"/(?:home|tmp|root|Users|usr|opt|var|work)/|[A-Z]:\\|site-packages|\bat 0x[0-9a-f]{6,}")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


def faults(notebook: Notebook) -> list[str]:
    """Why a notebook should not be committed as it is; empty if it may."""
    found = []
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if cells[0]["cell_type"] != "markdown" or "?" not in text(cells[0]["source"]):
        found.append("the first cell asks no question")
    last = text(cells[-1]["source"]).rstrip("*\n")
    if cells[-1]["cell_type"] != "markdown" or "answer" not in last.lower() or not last.endswith("."):
        found.append("the last cell gives no answer")
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        found.append("the code cells have not all been run once, from top to bottom")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if extra := set(notebook["metadata"]) - {"kernelspec", "language_info"}:
        found.append(f"the metadata has {', '.join(sorted(extra))}")
    for cell in cells:
        where = f"cell {cell.get('id')}"
        if set(cell["metadata"]) - {"tags"}:
            found.append(f"{where} has metadata beside its tags")
        if "interactive" in tags(cell) and cell["outputs"]:
            found.append(f"{where} is interactive and has outputs")
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr" or output["output_type"] == "error":
                found.append(f"{where} has a warning or an error among its outputs")
            if private := PRIVATE.search(words(output)):
                found.append(f"{where} prints {private[0]!r}, which is of one machine or one run")
    return found


def differences(committed: Notebook, fresh: Notebook) -> list[str]:
    """Where the outputs of two runs differ: text, the numbers in it, and that there is an image where there was one."""
    found = []
    for old, new in zip(committed["cells"], fresh["cells"], strict=True):
        if old["cell_type"] != "code" or {"timing", "interactive"} & tags(old):
            continue
        before, after = ([(kinds(output), words(output)) for output in cell["outputs"]] for cell in (old, new))
        if [kind for kind, _ in before] != [kind for kind, _ in after]:
            found.append(f"cell {old.get('id')} gives {after}\nand not\n{before}")
        for (kind, said), (_, says) in zip(before, after, strict=False):
            # Beside an image there may be words for those who cannot see it.
            if kind != ["image"] and not same(said, says):
                found.append(f"cell {old.get('id')} prints\n{says}\nand not\n{said}")
    return found


def same(committed: str, fresh: str) -> bool:
    """Whether two texts are equal but for their spacing and the last printed digit of numbers that are not integers.

    Such a number may be off by one unit of that digit: on another machine sums are taken in another order, which moves
    a number by much less than that, but perhaps across the middle between two roundings. Of two units the smaller
    holds, since NumPy prints no trailing zeros.
    """
    old, new = NUMBER.findall(committed), NUMBER.findall(fresh)
    if NUMBER.sub("#", committed).split() != NUMBER.sub("#", fresh).split():
        return False
    # A half more, since neither the numbers nor the unit are exact in binary.
    return all(abs(float(a) - float(b)) <= 1.5 * min(unit(a), unit(b)) for a, b in itertools.zip_longest(old, new))


def unit(number: str) -> float:
    """Of the last printed digit; 0 for an integer, which is to be equal."""
    mantissa, _, exponent = number.partition("e")
    _, point, digits = mantissa.partition(".")
    return 10.0 ** (int(exponent or 0) - len(digits)) if point or exponent else 0.0


def text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def tags(cell: dict[str, Any]) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def kinds(output: dict[str, Any]) -> list[str]:
    data = output.get("data", {})
    return ["image"] if "image/png" in data else sorted(data) or [output["output_type"]]


def words(output: dict[str, Any]) -> str:
    """What an output says: its text without its images."""
    data = output.get("data", {})
    shown = [text(value) for kind, value in sorted(data.items()) if kind.startswith("text/")]
    return "\n".join([*shown, text(output.get("text", "")), *output.get("traceback", [])])
