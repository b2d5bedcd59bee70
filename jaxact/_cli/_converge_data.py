"""The data of `converge`: the Wisconsin breast cancer set, or a CSV file of the user's, standardised."""

import csv
import dataclasses
import reprlib
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Data:
    """Standardised features in float64, shape (examples, features), and labels 0 and 1."""

    name: str
    features: list[str]
    classes: list[str]  # what labels 0 and 1 stand for
    x: np.ndarray
    y: np.ndarray


def breast_cancer() -> Data:
    """The 569 cases that scikit-learn ships."""
    from sklearn.datasets import load_breast_cancer

    data: Any = load_breast_cancer()
    names, classes = data.feature_names.tolist(), data.target_names.tolist()
    return Data("Wisconsin breast cancer", names, classes, _standardised(data.data), data.target)


def read_csv(path: Path, label: str) -> Data:
    """Every column but `label` is a feature; the two values of `label`, in sorted order, are classes 0 and 1."""
    header, rows = _cells(path)
    if label not in header:
        raise ArgumentError(None, f"{path} has no column {label!r}; its columns are {_listed(header)}.")
    if len(header) < 2:
        raise ArgumentError(None, f"{path} has no feature: its only column is the label {label!r}.")
    at, labels, features = header.index(label), [], []
    for place, row in rows:
        labels.append(row.pop(at))
        if labels[-1].lower() in ("", "nan"):
            raise ArgumentError(None, f"{place}, column {label!r}: the label is {labels[-1] or 'blank'}.")
        features.append(
            [_number(cell, place, name) for cell, name in zip(row, header[:at] + header[at + 1 :], strict=True)]
        )
    classes = sorted(set(labels))
    if len(classes) != 2:
        found = f"only {classes[0]!r}" if len(classes) == 1 else f"{len(classes)} values: {_listed(classes)}"
        raise ArgumentError(None, f"column {label!r} of {path} must hold two distinct values, it holds {found}.")
    y = np.array([classes.index(value) for value in labels])
    return Data(path.name, header[:at] + header[at + 1 :], classes, _standardised(np.array(features)), y)


def _cells(path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The header, and each row with the place it stands at, as error messages name it. Blank lines do not count."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True, skipinitialspace=True)
            stripped = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
            lines = [(line, row) for line, row in stripped if row not in ([], [""])]
    except OSError as error:
        raise ArgumentError(None, f"cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ArgumentError(None, f"cannot read {path}: it is not UTF-8 text.") from None
    except csv.Error as error:
        raise ArgumentError(None, f"cannot read {path} as CSV, line {reader.line_num}: {error}.") from None
    if not lines:
        raise ArgumentError(None, f"{path} is empty.")
    header = lines[0][1]
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ArgumentError(None, f"{path} has two columns called {twice[0]!r}.")
    if len(lines) == 1:
        raise ArgumentError(None, f"{path} has no rows below its header.")
    rows = [(f"{path}, row {i} (line {line})", row) for i, (line, row) in enumerate(lines[1:], 1)]
    for place, row in rows:
        if len(row) != len(header):
            raise ArgumentError(None, f"{place}: the number of cells is {len(row)}, the header's is {len(header)}.")
    return header, rows


def _number(cell: str, place: str, column: str) -> float:
    try:
        number = float("" if "_" in cell else cell)  # float would read 1_000
    except ValueError:
        found = f"{reprlib.repr(cell)} is not a number" if cell else "the cell is blank"
        raise ArgumentError(None, f"{place}, column {column!r}: {found}.") from None
    if not np.isfinite(number):
        raise ArgumentError(None, f"{place}, column {column!r}: {cell!r} is not a finite number.")
    return number


def _listed(names: list[str]) -> str:
    return ", ".join(map(reprlib.repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _standardised(x: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 in every column; 0 in columns that are constant."""
    # Scaling by a power of two is exact, and keeps the sums in the mean and the variance from overflowing.
    x = np.ldexp(x, -np.frexp(np.abs(x).max(axis=0))[1])
    constant = x.max(axis=0) == x.min(axis=0)
    return np.where(constant, 0.0, (x - x.mean(axis=0)) / np.where(constant, 1.0, x.std(axis=0)))
