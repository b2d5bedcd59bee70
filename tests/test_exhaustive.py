"""Every input of a dtype: all 65,536 of a 16-bit type always, all 2³² of float32 with `pytest --exhaustive`.

`python tests/test_exhaustive.py` prints the table of largest errors and where they are.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from jax import Array
from oracles import ulp_error

import jaxact

Function = Callable[[Any], Array]


def backward(f: Function) -> Function:
    """The derivative of `f`, element by element, by reverse mode with the cotangent 1."""
    return lambda x: jax.vjp(f, x)[1](jnp.ones_like(x))[0]


def pushforward(f: Function) -> Function:
    """The derivative of `f`, element by element, by forward mode with the tangent 1."""
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


FUNCTIONS: dict[str, Function] = {name: getattr(jaxact, name) for name in oracles.VALUE_AND_SLOPE}

# 16 bits: the float32 result is off by at most 3.5·2⁻¹³ ulp of float16 (2⁻¹⁶ of bfloat16), and rounding adds ½.
ULPS_16 = 0.51

# float32: the largest error measured, with XLA for CPU of jax 0.10 and of 0.12, and room for another compiler's exp.
ULPS_32 = {
    "sigmoid": 2.0,  # 1.65: a product and a difference, and of exp and the quotient what is left of them
    "sigmoid′": 3.0,  # 2.38: exp, and a denominator of three operations
    "softplus": 2.3,  # 1.98: the exp, a polynomial for log1p, and a sum
    "log_sigmoid": 2.3,  # as softplus
    "logit": 3.5,  # 2.00: a rounded quotient, and its logarithm in two terms
}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_input_of_16_bits(name: str, dtype: Any) -> None:
    f, (value, slope) = FUNCTIONS[name], oracles.VALUE_AND_SLOPE[name]
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    if name == "logit" and dtype is ml_dtypes.bfloat16:
        # They are subnormal in float32 too, in which we compute, and XLA for CPU reads subnormal numbers as 0.
        x = x[~subnormal(x)]
    for compute, oracle in ((f, value), (backward(f), slope), (pushforward(f), slope)):
        got = np.asarray(compute(jnp.asarray(x)))
        assert got.dtype == dtype
        error = ulp_error(got, oracle(x), dtype)
        assert error.max() <= ULPS_16, (x[np.argmax(error)], got[np.argmax(error)], error.max())


def subnormal(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of signalling nan
        magnitude = np.abs(x.astype(np.float64))
    return (magnitude > 0) & (magnitude < float(ml_dtypes.finfo(x.dtype).smallest_normal))


class Worst(NamedTuple):
    """An error in ulp and the input it belongs to. The largest of two is their `max`."""

    ulps: float
    x: float


BLOCK = 2**18  # inputs at a time: their float64 temporaries stay in the cache
BLOCKS = 2**31 // BLOCK  # of non-negative bit patterns, each visited with both signs
THREADS = 2  # NumPy and XLA release the interpreter's lock


def compiled() -> dict[str, Function]:
    """The functions of `ULPS_32` for one block, compiled ahead, as they are outside of any other program."""
    functions = FUNCTIONS | {"sigmoid′": backward(jaxact.sigmoid)}
    block = jax.ShapeDtypeStruct((BLOCK,), jnp.float32)
    return {name: jax.jit(functions[name]).lower(block).compile() for name in ULPS_32}


def float64_oracles(x: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, inputs and exact values, for the inputs x ≥ 0 and −x. One exponential and one logarithm serve all."""
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        e = np.exp(-wide)
        tail = np.log1p(e)
        yield "sigmoid", x, 1 / (1 + e)
        yield "sigmoid", -x, e / (1 + e)
        yield "sigmoid′", x, e / (1 + e) ** 2
        yield "sigmoid′", -x, e / (1 + e) ** 2
        yield "softplus", x, wide + tail
        yield "softplus", -x, tail
        yield "log_sigmoid", x, -tail
        yield "log_sigmoid", -x, -(wide + tail)
    yield "logit", x, oracles.logit(x)
    yield "logit", -x, oracles.logit(-x)


def worst_of_block(functions: dict[str, Function], index: int) -> dict[str, Worst]:
    x = np.arange(index * BLOCK, (index + 1) * BLOCK, dtype=np.uint32).view(np.float32)
    worst = dict.fromkeys(ULPS_32, Worst(0.0, 0.0))
    for name, inputs, want in float64_oracles(x):
        got = np.asarray(functions[name](inputs))
        error = ulp_error(got, want, np.float32)
        if name == "logit" and index * BLOCK < 2**23:
            # XLA for CPU reads a subnormal p as 0: logit(0) = −inf is right as well.
            error[subnormal(inputs) & (got == -np.inf)] = 0
        at = int(np.argmax(error))
        worst[name] = max(worst[name], Worst(float(error[at]), float(inputs[at])))
    return worst


def worst_of_all() -> dict[str, Worst]:
    """The largest error of every function over all 2³² inputs of float32, and the input it is at."""
    functions = compiled()
    worst = dict.fromkeys(ULPS_32, Worst(0.0, 0.0))
    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for index, block in enumerate(pool.map(lambda i: worst_of_block(functions, i), range(BLOCKS)), start=1):
            worst = {name: max(worst[name], block[name]) for name in worst}
            if index % (BLOCKS // 16) == 0:
                seconds = time.perf_counter() - start
                so_far = ", ".join(f"{name} {w.ulps:.3f}" for name, w in worst.items())
                print(f"{index / BLOCKS:4.0%} {seconds:4.0f} s  {so_far}", flush=True)
    return worst


def table(worst: dict[str, Worst]) -> str:
    rows = [f"{name:12} {w.ulps:8.4f} {ULPS_32[name]:6.1f}   {w.x!r} ({w.x.hex()})" for name, w in worst.items()]
    return "\n".join(["function      max ulp  bound   worst input", *rows])


@pytest.mark.exhaustive
def test_every_input_of_float32() -> None:
    worst = worst_of_all()
    print(table(worst))
    assert {name: w for name, w in worst.items() if w.ulps > ULPS_32[name]} == {}


if __name__ == "__main__":
    print(f"jax {jax.__version__}, every input of float32")
    result = worst_of_all()
    print(table(result))
    sys.exit(any(w.ulps > ULPS_32[name] for name, w in result.items()))
