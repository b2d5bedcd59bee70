"""What commands check before they start: numbers on the command line, packages, the directory for the results."""

import argparse
import contextlib
import importlib
import math
import tempfile
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def positive(text: str) -> float:
    """A finite number above 0, as argparse's `type`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def whole(least: int, most: int, text: str) -> int:
    """A whole number in the range, as argparse's `type` once `least` and `most` are bound."""
    if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
    return int(text)


def check_learning_rate(rate: float, dtype: Any) -> None:
    """The rate, and twice the rate, must be normal numbers of the dtype."""
    if not float(np.finfo(dtype).tiny) <= rate <= float(np.finfo(dtype).max) / 2:
        raise ArgumentError(None, f"--learning-rate {rate} is out of the range of {dtype.__name__}.")


def require(extras: str, *packages: str) -> None:
    """Imports the packages; of the first that cannot be imported, says with which extras of jaxact it comes."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            reason = str(error).removesuffix(".")
            raise ArgumentError(None, f"cannot import {package} ({reason}): pip install 'jaxact[{extras}]'.") from None


def make_directory(path: Path) -> None:
    """Makes the directory, with its parents, unless it exists; a file must be possible in it."""
    if path.exists() and not path.is_dir():
        raise ArgumentError(None, f"cannot write to {path}: it is not a directory.")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What cannot be written is a mistake on the command line."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(None, f"cannot write to {error.filename or path}: {error.strerror}.") from None
