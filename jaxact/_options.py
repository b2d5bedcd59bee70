"""The options that the losses of a softmax share: what they do to logits, and what they make of a row's losses."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxact._canonical import (
    as_float,
    canonical_scalar,
    canonical_smoothing,
    canonical_temperature,
    divisor,
    does_nothing,
    optional_array,
    widen,
)
from jaxact._classes import Classes
from jaxact._elementary import FAR, polynomial
from jaxact._limits import finite
from jaxact._sigmoid import sigmoid, sigmoid_slope


class Losses(NamedTuple):
    """Per row, without the axis of classes."""

    nll: Array  # −log p_y
    lse: Array  # log Σ e^z
    uniform: Array  # the mean over the classes c of −w_c log p_c; 0 where no weights w are given


class Adjustment(NamedTuple):
    """What is done to logits first: −offset, cap·tanh(x/cap) and /temperature. None leaves a step out."""

    cap: Array | None = None
    temperature: Array | None = None
    offset: Array | None = None  # of each row

    @property
    def is_identity(self) -> bool:
        return self.cap is None and self.temperature is None

    @property
    def shift(self) -> Array | float:
        """By how much the offset, which is there without a cap, has moved the adjusted logits."""
        return 0.0 if self.offset is None or self.temperature is None else self.offset / self.temperature

    def __call__(self, x: Array) -> Array:
        z = widen(x)
        if self.offset is not None:
            z = z - jnp.expand_dims(self.offset, range(self.offset.ndim, z.ndim))
        if self.cap is not None:
            # What does not exist is not capped, and +inf is the cap itself: 0 times infinity would reach derivatives.
            exists, top = z != -jnp.inf, z == jnp.inf
            z = jnp.where(top, self.cap, _capped(jnp.where(exists & ~top, z, 0), self.cap))
            z = jnp.where(exists, z, -jnp.inf)
        return z if self.temperature is None else _quotient(z, self.temperature)


@jax.custom_jvp
def _quotient(z: Array, t: Array) -> Array:
    return z / t


@_quotient.defjvp
def _quotient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # Written down for what is infinite, or becomes so, and has no derivative in t; and not by a choice in the quotient
    # itself, for which XLA for CPU would not vectorise the sums of what is made of it.
    (z, t), (z_dot, t_dot) = primals, tangents
    quotient = _quotient(z, t)
    return quotient, z_dot / t - jnp.where(jnp.isinf(quotient / t), 0, quotient) * (t_dot / t)


@jax.custom_jvp
def _capped(x: Array, cap: Array) -> Array:
    return cap * jnp.tanh(x / cap)


@_capped.defjvp
def _capped_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, cap), (x_dot, cap_dot) = primals, tangents
    u = x / cap
    u = jnp.where(jnp.abs(u) > FAR, FAR * jnp.sign(x), u)  # it may be infinite, and is multiplied by 0
    # sech² u is not 1 − tanh², of which nothing is left where tanh rounds to 1, but 4 σ′(2u). And of tanh u, as
    # σ(2u) − σ(−2u), it is the derivative to the last digit, which second derivatives of the cap cancel.
    of_x = 4 * sigmoid_slope(2 * u)
    # tanh u − u sech² u is sech² u (sinh 2u − 2u)/2, of which the series has what the difference cancels.
    near = jnp.abs(u) < 0.5
    v = jnp.where(near, 2 * u, 0)
    of_cap = jnp.where(near, of_x * v**3 * polynomial(_SINH, v * v) / 2, sigmoid(2 * u) - sigmoid(-2 * u) - u * of_x)
    return _capped(x, cap), of_x * x_dot + of_cap * cap_dot


_SINH = tuple(1 / math.factorial(k) for k in range(3, 20, 2))  # (sinh v − v)/v³ in powers of v², |v| ≤ 1


class Options(NamedTuple):
    """What makes a loss of log-probabilities, by the names of the public arguments. None leaves an option out."""

    temperature: Any
    label_smoothing: Any
    z_loss: Any
    logit_softcap: Any
    class_weight: Any

    def checked(self) -> "Options":
        """None for what does nothing; what is no array, or known to be out of range, raises."""
        z_loss, cap = None if does_nothing(self.z_loss, 0) else self.z_loss, self.logit_softcap
        if z_loss is not None:
            canonical_scalar("z_loss", z_loss, lambda z: 0 <= z < math.inf, "finite and not negative")
        if cap is not None:  # its inverse must be a normal number too
            canonical_scalar("logit_softcap", cap, lambda c: 0 < c <= 1e37, "positive and at most 1e37")
        return self._replace(
            temperature=canonical_temperature(self.temperature),
            label_smoothing=canonical_smoothing(self.label_smoothing),
            z_loss=z_loss,
            class_weight=optional_array("class_weight", self.class_weight),
        )

    def in_dtype(self, dtype: Any) -> "Options":
        """The scalars in the dtype of the losses."""
        return self._replace(
            **{
                name: as_float(name, value).astype(dtype)
                for name, value in self._asdict().items()
                if name != "class_weight" and value is not None
            }
        )

    def adjustment(self, x: Array) -> Adjustment:
        return Adjustment(self.logit_softcap, divisor(self.temperature, x))

    def adjustment_about_maximum(self, x: Array, live: Array | None, classes: Classes) -> Adjustment:
        """The same, but about the maximum of each row where logits are divided.

        A quotient by the temperature is rounded, and of logits with a large offset in common little would be left. A
        cap, where there is one, bounds them.
        """
        adjust = self.adjustment(x)
        if adjust.temperature is None or adjust.cap is not None:
            return adjust
        peak = finite(classes.max(lax.stop_gradient(widen(x))))[..., 0]
        return adjust._replace(offset=peak if live is None else jnp.where(live, peak, 0))

    def weights(self, classes: int, dtype: Any) -> Array | None:
        """A factor for each class."""
        if self.class_weight is None:
            return None
        weights = as_float("class_weight", self.class_weight)
        if weights.shape != (classes,):
            raise ValueError(f"class_weight must have shape ({classes},), got {weights.shape}.")
        return weights.astype(dtype)

    def smoothing_weights(self, weights: Array | None, dtype: Any) -> Array | None:
        """The weights by which smoothing spreads a label, where it does."""
        if self.label_smoothing is None:
            return None
        return jnp.ones((), dtype) if weights is None else weights

    def combine(self, losses: Losses, label_weight: Array | None) -> Array:
        """The loss of each row."""
        nll, lse, uniform = losses
        loss = nll if label_weight is None else times(label_weight, nll)
        if self.label_smoothing is not None:
            loss = times(1 - self.label_smoothing, loss) + times(self.label_smoothing, uniform)
        return loss if self.z_loss is None else loss + times(self.z_loss, square_of(lse))


def times(factor: Array, loss: Array) -> Array:
    """The product. A factor of 0 leaves out even an infinite loss, of which none has a derivative in its factor."""
    infinite = jnp.isinf(loss)
    # Apart, since forward mode would multiply the derivative of 0 by infinity.
    constant = lax.stop_gradient(factor) * jnp.where(infinite & (factor == 0), 0, loss)
    return jnp.where(infinite, constant, factor * jnp.where(infinite, 0, loss))


def square_of(lse: Array) -> Array:
    """lse², 0 where no class is left; an infinite one is a constant."""
    return jnp.square(jnp.where(jnp.isinf(lse), 0, lse)) + jnp.where(lse == jnp.inf, jnp.inf, 0)
