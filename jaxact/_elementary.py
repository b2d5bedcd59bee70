"""Elementary functions of float32 by polynomials: faster than XLA's, and as accurate as sigmoid and its kin need."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._error_free import two_product, two_sum

FAR = 1024.0  # beyond, e^−|x| is 0 in every dtype

# (eʳ − 1 − r)/r² for |r| ≤ log(2)/2 by Remez' algorithm: with it eʳ is within 0.10 u, but for rounding.
_EXP = (0.50000001, 0.16666519, 0.041666206, 0.0083688894, 0.001395049)
# log(2) in two parts, of which the first has 9 bits: small integers times it are exact.
_LOG2 = (0.693359375, -2.1219444e-4)

# (log1p(e) − e)/e² on [0, 1]: with it log1p is within 0.09 u, but for rounding. By Remez' algorithm, each coefficient
# fitted anew after those before it were rounded to float32: rounded at the end they leave 0.7 u, of one sign near 1.
_LOG1P = (
    -0.49999934, 0.3333055, -0.2495894, 0.19697012, -0.15359624, 0.10687181, -0.057725783, 0.020235533, -0.0033250337,
)  # fmt: skip
# The same where 1 + e is between √½ and √2: within 0.70 u.
_LOG1P_CENTRED = (
    -0.49999983, 0.33333934, -0.25002585, 0.19963459, -0.16551735, 0.14883841, -0.14427334, 0.089795866,
)  # fmt: skip


def exponent_and_rest(x: Array) -> tuple[Array, Array]:
    """k and p with eˣ = 2ᵏ(1 + p), |p| < ½, of float32 between −88 and 88. To add 1 would round p."""
    k, r = _reduced(x)
    return k, r + r * r * polynomial(_EXP, r)


def _reduced(x: Array) -> tuple[Array, Array]:
    """k and r with x = k·log 2 + r, |r| ≤ log(2)/2."""
    k = jnp.round(x * (1 / math.log(2)))
    return k, (x - k * _LOG2[0]) - k * _LOG2[1]


def exp_and_rest(x: Array) -> tuple[Array, Array]:
    """e = eˣ of x ≤ 0 as `exp` rounds it, and r, with e + er nearer to it; 0 but in float32. Not differentiable."""
    if x.dtype != jnp.float32:
        return jnp.exp(x), jnp.zeros_like(x)
    k, p = exponent_and_rest(jnp.maximum(x, -88.0))
    unit = 1 + p
    # The maximum changes no value and keeps XLA from folding the difference to 0. `unit` is near enough to 1 not to
    # divide by it.
    return two_to(k) * unit, p - (jnp.maximum(unit, 0.5) - 1)


def exp_of_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """s and p with e^{a + b} = s(1 + p), of a ≤ 87 and a small b; s is 0 where that is not a normal number."""
    if a.dtype != jnp.float32:
        return jnp.exp(a), b
    k, p = exponent_and_rest(jnp.maximum(a, -88.0))
    return two_to(k), p + b * (1 + p)


@jax.custom_jvp
def exp(x: Array) -> Array:
    """eˣ of x ≤ 88; 0 where that is not a normal number. Not for what is only summed: XLA's sums take their own in."""
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    k, r = _reduced(jnp.maximum(x, -88.0))
    return two_to(k) * polynomial((1.0, 1.0, *_EXP), r)


@jax.custom_jvp
def exp_over(x: Array, n: Array) -> Array:
    """eˣ/2ⁿ of float32, with whole n, where that is at most 2¹²⁷; 0 where it is not a normal number.

    Up to |x| = 2⁸ it rounds as `exp` does: to take n off the exponent rounds nothing, as x − n·log 2 would.
    """
    k, r = _reduced(jnp.maximum(x, -(2.0**13)))  # so far k times the first part of log 2 is exact
    return two_to(k, n) * polynomial((1.0, 1.0, *_EXP), r)


# Not the polynomial's derivative: that is off by several u more, and by up to half where the result is nearly 0.
exp.defjvps(lambda x_dot, y, _: x_dot * y)
exp_over.defjvps(lambda x_dot, y, *_: x_dot * y, None)


def log1p_of_fraction(e: Array) -> Array:
    """log(1 + e) of e in [0, 1]: a third of the time of `log1p`, and more accurate.

    What is added to e is at most 0.31, so that its rounding counts for less than half.
    """
    if e.dtype != jnp.float32:
        return jnp.log1p(e)
    return e + e * e * polynomial(_LOG1P, e)


def log1p_and_rest(e: Array, rest: Array) -> tuple[Array, Array]:
    """log(1 + e + e·rest) of e in [0, 1] and a small rest: a number near it, and what is left, to 0.2 u of 1."""
    of_rest = rest * e * (0.94 - 0.47 * e)  # over 1 + e, to 6 %: so little is enough
    if e.dtype != jnp.float32:
        return jnp.log1p(e), of_rest
    # Of e − e²/2 + e²(P(e) + ½) only the last term is rounded, which is at most 0.2.
    square, of_square = two_product(e, e)
    first, *others = _LOG1P
    two, of_two = two_sum(e, -square / 2)
    total, of_total = two_sum(two, square * polynomial((first + 0.5, *others), e))
    return total, (of_two + of_total) + (of_rest - of_square / 2)


def log1p_of_positive(z: Array) -> Array:
    """log(1 + z) of 0 ≤ z ≤ 2¹²⁶, or of infinity."""
    if z.dtype != jnp.float32:
        return jnp.log1p(z)
    # To take e of z, and not of 1 + z, keeps what that addition loses. At infinity e and the sum are −inf; hence the
    # absolute value.
    exponent, power = _centred(1 + z)
    return jnp.abs(_log_centred(exponent, z * power + (power - 1)))


def log(a: Array) -> Array:
    """log a of normal numbers 0 < a ≤ 2¹²⁶."""
    if a.dtype != jnp.float32:
        return jnp.log(a)
    exponent, power = _centred(a)
    return _log_centred(exponent, a * power - 1)


def _centred(a: Array) -> tuple[Array, Array]:
    """2²³k and 2⁻ᵏ with 2⁻ᵏa between √½ and √2, from its bits."""
    steps = lax.bitcast_convert_type(a, jnp.int32) - 0x3F3504F3  # the bits of √½
    exponent = steps & -0x800000
    power = lax.bitcast_convert_type(0x3F800000 - exponent, jnp.float32)  # from those of 1
    return _typed_as(a, exponent), _typed_as(a, power)


def _log_centred(exponent: Array, e: Array) -> Array:
    """log(2ᵏ(1 + e))."""
    return exponent * (math.log(2) / 2**23) + (e + e * e * polynomial(_LOG1P_CENTRED, e))


def two_to(k: Array, n: Array | None = None) -> Array:
    """2ᵏ of whole numbers from −126 to 127 in float32; 0 for −127. With `n`, 2ᵏ⁻ⁿ, and 0 for any less."""
    # The last bits of this sum are the exponent's. (A conversion to integers takes longer: it would mind nan.)
    zero = 1.5 * 2**23
    # (Its limit is a constant, which takes XLA less time than one for each row would.)
    exponent = k.astype(jnp.float32) + (zero + 127) if n is None else jnp.maximum(k + (zero + 127 - n), zero)
    power = lax.bitcast_convert_type(
        lax.shift_left(lax.bitcast_convert_type(exponent, jnp.int32), jnp.int32(23)), jnp.float32
    )
    return _typed_as(k, power)


def _typed_as(x: Array, y: Array) -> Array:
    """`y` in the type of `x`, which is a weak one where `x` comes of a Python number."""
    # `full_like` keeps that, of a single number.
    return jnp.vectorize(lax.full_like)(x, y) if jax.typeof(x).weak_type else y.astype(x.dtype)


def polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    """By Horner's scheme; the coefficient of the lowest power comes first."""
    return functools.reduce(lambda sum, c: sum * x + c, reversed(coefficients[:-1]), jnp.full_like(x, coefficients[-1]))
