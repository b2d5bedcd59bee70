"""Flags and the strict configuration.

`pytest` runs with JAX as a user finds it. `pytest --strict-jax` runs the same tests with strict dtype promotion and
the tracer-leak check. `pytest --exhaustive` adds the tests that take long.
"""

from collections.abc import Iterator

import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the tests that take long too")
    parser.addoption("--strict-jax", action="store_true", help="strict dtype promotion and the tracer-leak check")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--strict-jax"):
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_check_tracer_leaks", True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--exhaustive"):
        skip = pytest.mark.skip(reason="takes long; run with --exhaustive")
        for item in items:
            if "exhaustive" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for one test."""
    with jax.enable_x64(True):
        yield
