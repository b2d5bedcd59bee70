"""The JSON files: plain values, the versions of the packages, and the cores."""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Arrays and NumPy numbers as lists and Python numbers, in dicts and lists too; None for inf and nan."""
    match value:
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case float() if not math.isfinite(value):
            return None
    return value


def write_json(path: Path, value: Any) -> None:
    """In it null stands for inf and nan too."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    # The name of a file need not be UTF-8.
    path.write_text(text + "\n", encoding="utf-8", errors="replace")


def versions(*others: str) -> dict[str, str | None]:
    """Those of Python, of what every command uses, and of other packages."""
    packages = ("jaxact", "jax", "jaxlib", "numpy", *others)
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    """The installed version; None where a package is used from its folder, without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
