"""What the JSON files record: plain values, and the versions of the packages."""

import importlib.metadata
import math
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Arrays and NumPy numbers as lists and Python numbers, in dicts and lists too; None for inf and nan."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list():
            return [plain(item) for item in value]
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case float() if not math.isfinite(value):
            return None
    return value


def version(package: str) -> str | None:
    """The installed version; None where a package is used from its folder, without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
