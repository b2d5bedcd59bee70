"""The options that the losses of a softmax share: what they do to logits, and what they make of a row's losses."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxact._canonical import as_float, canonical_scalar, canonical_temperature, compute_dtype, divisor, widen


class Losses(NamedTuple):
    """Per row, without the axis of classes."""

    nll: Array  # −log p_y
    lse: Array  # log Σ e^z
    uniform: Array  # the mean over the classes c of −w_c log p_c; 0 where no weights w are given


class Adjustment(NamedTuple):
    """What is done to logits first: cap·tanh(x/cap), then division by the temperature. None leaves a step out."""

    cap: Array | None
    temperature: Array | None

    def __call__(self, x: Array) -> Array:
        z = widen(x)
        if self.cap is None and self.temperature is None:
            return z
        # A class that does not exist is neither capped nor scaled; not even 0 times its logit reaches a derivative.
        exists = z != -jnp.inf
        z = jnp.where(exists, z, 0)
        if self.cap is not None:
            z = self.cap * jnp.tanh(z / self.cap)
        if self.temperature is not None:
            z = z / self.temperature
        return jnp.where(exists, z, -jnp.inf)


class Options(NamedTuple):
    """What makes a loss of log-probabilities, by the names of the public arguments. None leaves an option out."""

    temperature: Any
    label_smoothing: Any
    z_loss: Any
    logit_softcap: Any
    class_weight: Any

    @classmethod
    def checked(cls, **given: Any) -> "Options":
        """What is out of range raises where its value is known."""
        check, cap = canonical_scalar, given["logit_softcap"]
        fraction = (lambda e: 0 <= e <= 1, "in [0, 1]")
        coefficient = (lambda z: 0 <= z < math.inf, "finite and not negative")
        positive = (lambda c: 0 < c < math.inf, "positive and finite")
        return cls(
            canonical_temperature(given["temperature"]),
            check("label_smoothing", given["label_smoothing"], *fraction, nothing=0),
            check("z_loss", given["z_loss"], *coefficient, nothing=0),
            None if cap is None else check("logit_softcap", cap, *positive),
            given["class_weight"],
        )

    def adjustment(self, x: Array) -> Adjustment:
        cap = self.logit_softcap
        dtype = compute_dtype(x.dtype)
        return Adjustment(None if cap is None else jnp.asarray(cap, dtype), divisor(self.temperature, x))

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

    def combine(self, losses: "Losses", label_weight: Array | None) -> Array:
        """The loss of each row."""
        nll, _, uniform = losses
        factor = None if self.label_smoothing is None else 1 - jnp.asarray(self.label_smoothing, nll.dtype)
        if label_weight is not None:
            factor = label_weight if factor is None else factor * label_weight
        # A factor of 0 leaves out even an infinite loss.
        loss = nll if factor is None else factor * jnp.where((factor == 0) & jnp.isinf(nll), 0, nll)
        if self.label_smoothing is not None:
            loss = loss + self.label_smoothing * uniform
        return loss if self.z_loss is None else loss + self.z_loss * square_of(losses.lse)


def square_of(lse: Array) -> Array:
    """lse², 0 where no class is left; an infinite one is a constant."""
    finite = jnp.isfinite(lse) | jnp.isnan(lse)
    return jnp.square(jnp.where(finite, lse, 0)) + jnp.where(lse == jnp.inf, jnp.inf, 0)
