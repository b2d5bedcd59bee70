"""What may be given, alike for all functions: promotion of ranks and dtypes, byte order, and the range of options."""

import fractions
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxact
from jaxact import classifiers, losses

X, Y, W = jnp.ones((4, 6)), jnp.array([0, 5, 2, 3]), jnp.ones((6, 9))
WEIGHTED: dict[str, Any] = {"class_weight": jnp.ones(6), "label_smoothing": 0.1}
ALL: dict[str, Any] = {"temperature": 0.5, "z_loss": 0.1, "logit_softcap": 3.0, **WEIGHTED}
integer_loss, dense_loss = losses.softmax_cross_entropy_with_integer_labels, losses.softmax_cross_entropy

CALLS: dict[str, Any] = {
    "softmax": lambda x: jaxact.softmax(x, where=x > 0, temperature=x[0, 0]),
    "log_softmax": lambda x: jaxact.log_softmax(x, axis=0),
    "logsumexp": lambda x: jaxact.logsumexp(x, axis=1, b=x),
    "integer labels": lambda x: integer_loss(x, Y),
    "of many classes": lambda x: integer_loss(jnp.tile(x, (1, 2**11)), Y, where=Y > 0),
    "with options": lambda x: integer_loss(x, Y, **ALL),
    "soft labels": lambda x: dense_loss(x, x / 6, **WEIGHTED),
    "soft labels with options": lambda x: dense_loss(x, x / 6, where=x > 0, **ALL),
    "binary": lambda x: losses.sigmoid_binary_cross_entropy(x, x, pos_weight=x[0]),
    "focal": lambda x: losses.sigmoid_focal_loss(x, x, 0.25, x[0, 0]),
    "head": lambda x: jaxact.linear_cross_entropy(x, W.astype(x.dtype), Y, bias=W[0]),
    "head with options": lambda x: jaxact.linear_cross_entropy(x, W.astype(x.dtype), Y, **ALL | {"class_weight": W[0]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_ranks_and_dtypes_are_promoted_explicitly(name: str) -> None:
    def total(x: Any) -> Any:
        return CALLS[name](x).sum()

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):  # 16 bits, which are widened
        # Forward over reverse has what the rule does too. Nothing need be computed.
        jax.eval_shape(lambda x: jax.jvp(jax.grad(total), (x,), (x,)), X.astype("bfloat16"))


NUMBERS = [2.0, 2, True, np.arange(3), np.array([True, False, True]), np.ones(3, "float16"), np.ones(3, "float32")]


@pytest.mark.parametrize("dtype", ["int4", "uint8", "bool"])
def test_integer_weights_and_masks_are_promoted_with_nothing(dtype: str) -> None:
    x, b = jnp.zeros((2, 3), "bfloat16"), jnp.ones((2, 3), dtype)
    with jax.numpy_dtype_promotion("strict"):
        assert jaxact.logsumexp(x, b=b).dtype == x.dtype
        assert jaxact.logsumexp(b, b=x).dtype == x.dtype
        assert jaxact.logsumexp(b, b=b).dtype == jnp.float32


@pytest.mark.parametrize("b", NUMBERS, ids=lambda b: f"{type(b).__name__}-{np.result_type(b)}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_promote_as_in_jax(dtype: str, b: Any, x64: None) -> None:
    a = np.ones(3, dtype)
    # JAX promotes where it traces.
    got = jax.eval_shape(lambda a: jaxact.logsumexp(a, b=b), a)
    assert (got.dtype, got.weak_type) == (jnp.result_type(a, b), False)
    got = jax.eval_shape(lambda a: jaxact.logsumexp(b, b=a), a)
    assert got.dtype == jnp.result_type(a, b)
    assert jaxact.logsumexp(np.arange(3), b=np.arange(3)).dtype == jnp.float64


def test_a_carry_keeps_its_dtype() -> None:
    a, mask = jnp.ones(3, "bfloat16"), jnp.array([True, False, True])
    last, _ = jax.lax.scan(lambda a, _: (jaxact.logsumexp(a, b=mask, keepdims=True) + 0 * a, None), a, None, length=2)
    np.testing.assert_allclose(np.float32(last), 1 + 2 * np.log(2), rtol=2 * 2.0**-8)  # rounded twice


def test_bytes_in_another_order_are_refused() -> None:
    # A program that has been compiled for native numbers would take their bytes as they are.
    swapped, one_hot = np.float32(X).astype(np.dtype("f4").newbyteorder()), np.float32(X)
    labels = np.arange(4, dtype=np.dtype("i4").newbyteorder())
    calls: list[tuple[str, Any]] = [
        ("x", lambda: jaxact.softmax(swapped)),
        ("x", lambda: jaxact.log_softmax(swapped)),
        ("a", lambda: jaxact.logsumexp(swapped)),
        ("b", lambda: jaxact.logsumexp(one_hot, b=swapped)),
        ("logits", lambda: integer_loss(swapped, Y)),
        ("labels", lambda: integer_loss(one_hot, labels)),
        ("labels", lambda: losses.sigmoid_binary_cross_entropy(one_hot, swapped)),
        ("labels", lambda: jaxact.linear_cross_entropy(X, W, labels)),
    ]
    native = [jaxact.softmax(one_hot), integer_loss(one_hot, np.arange(4, dtype="i4"))]
    assert np.isfinite(native[1]).all()
    for name, call in calls:
        with pytest.raises(TypeError, match=f"^{name} must have the byte order of this machine, got dtype .[if]4"):
            call()


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", 1e-46), ("temperature", 1e-38), ("temperature", 1e39), ("z_loss", 1e39), ("logit_softcap", 1e-39)],
)
def test_an_option_that_float32_does_not_hold_is_refused(option: str, value: float) -> None:
    match = rf"{option} must be .*, got {re.escape(str(value))}, which is (0.0|inf) in float32"
    calls: list[Any] = [integer_loss, lambda x, y, **given: dense_loss(x, X, **given)]
    for loss in calls:
        with pytest.raises(ValueError, match=match):
            loss(X, Y, **{option: value})
    if option == "temperature":
        with pytest.raises(ValueError, match=match):
            jaxact.softmax(X, temperature=value)
        with jax.enable_x64(True):
            assert np.isfinite(jaxact.softmax(np.ones(3), temperature=value)).all()
    of_gamma = r"gamma must be not negative and at most 1e30, got 1e\+39, which is inf in float32"
    with pytest.raises(ValueError, match=of_gamma):
        losses.sigmoid_focal_loss(X, 1, gamma=1e39)
    assert losses.sigmoid_focal_loss(2.0, 1.0, gamma=1e30) == 0


def test_a_cap_whose_inverse_is_not_a_number() -> None:
    x = jnp.array([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"logit_softcap must be positive and at most 1e37, got 1e\+38"):
        integer_loss(x, 1, logit_softcap=1e38)
    np.testing.assert_allclose(integer_loss(x, 1, logit_softcap=1e37), integer_loss(x, 1), rtol=4 * 2.0**-24)


def test_no_classes_with_weights() -> None:
    labels = jnp.array([0, 3, -1])  # none exists
    assert np.isnan(integer_loss(jnp.zeros((3, 0)), labels, class_weight=jnp.ones(0))).all()
    assert dense_loss(jnp.zeros((3, 0)), jnp.zeros((3, 0)), class_weight=jnp.ones(0)).tolist() == [0, 0, 0]


def test_functions_pickle_as_a_model_that_holds_one_may() -> None:
    for module in (jaxact, losses, classifiers):
        for f in (getattr(module, name) for name in dir(module) if not name.startswith("_")):
            if callable(f):
                assert pickle.loads(pickle.dumps(f)) is f


@pytest.mark.parametrize("f", [jaxact.softmax, jaxact.log_softmax, jaxact.logsumexp])
def test_a_mask_is_an_array(f: Any) -> None:
    for mask in ("a", [True] * 6):
        with pytest.raises(TypeError, match=r"where must be an array or a number, got (str|list)"):
            f(X, where=mask)


MASKED: dict[str, Any] = {
    "softmax": jaxact.softmax,
    "log_softmax": jaxact.log_softmax,
    "logsumexp": lambda x, where: jaxact.logsumexp(x, -1, where=where),
    "logsumexp with weights": lambda x, where: jaxact.logsumexp(x, -1, 2 * X, where=where),
    "integer labels": lambda x, where: integer_loss(x, Y, where=where),
    "binary": lambda x, where: losses.sigmoid_binary_cross_entropy(x, X, where=where),
    "focal": lambda x, where: losses.sigmoid_focal_loss(x, X, where=where),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MASKED)
def test_reverse_mode_keeps_of_a_mask_the_mask(name: str) -> None:
    def kept(where: Any) -> int:
        _, pull = jax.vjp(lambda x: MASKED[name](x, where=where), X)
        return sum(a.nbytes for a in jax.tree.leaves(pull))

    mask = jnp.arange(6)[None] != 1
    assert kept(mask) <= kept(None) + mask.nbytes


@pytest.mark.parametrize(("dtype", "label", "classes"), [("uint8", 200, 300), ("uint8", 7, 256), ("int8", 100, 150)])
def test_the_classifiers_take_narrow_labels(dtype: str, label: int, classes: int) -> None:
    loss = jax.jit(classifiers.cross_entropy)(np.zeros((1, classes), np.float32), np.array([label], dtype))
    np.testing.assert_allclose(loss, np.log(classes), rtol=4 * 2.0**-24)


@pytest.mark.long
@pytest.mark.parametrize("logits", [1, 2, 3])
def test_a_label_that_no_class_has_is_nan_in_the_gradient_too(logits: int) -> None:
    z, y = jnp.ones((2, logits)), jnp.array([1, 3])
    gradient = jax.grad(lambda z: jnp.nansum(classifiers.cross_entropy(z, y)))(z)
    assert np.isnan(classifiers.cross_entropy(z, y)).tolist() == [False, True]
    assert not np.isnan(gradient[0]).any()
    assert np.isnan(gradient[1]).all()


def test_an_option_that_no_float_holds() -> None:
    with pytest.raises(TypeError, match="temperature must be a real number, got 1000"):
        jaxact.softmax(X, temperature=10**400)


def test_features_that_float32_does_not_hold() -> None:
    x = np.array([[1.0], [2.0], [1e300]])
    with pytest.raises(ValueError, match="x must be finite, got inf in row 2, column 0"):
        classifiers.train_twins(x, np.array([0, 1, 1]), steps=1)


@pytest.mark.parametrize("dtype", [None, jnp.zeros(1), np.zeros(1)])
def test_no_dtype_to_accumulate_in(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"accum_dtype must be a float type, got (None|.*rray)"):
        jaxact.linear_cross_entropy(X, W, Y, accum_dtype=dtype)


def test_a_traced_option_that_is_complex_is_refused() -> None:
    of_smoothing = jax.jit(lambda e: losses.sigmoid_binary_cross_entropy(X, X, label_smoothing=e))
    of_gamma = jax.jit(lambda g: losses.sigmoid_focal_loss(X, X, gamma=g))
    for f, name in ((of_smoothing, "label_smoothing"), (of_gamma, "gamma")):
        with pytest.raises(TypeError, match=f"^{name} must be real, got dtype complex64"):
            f(0.2 + 1j)


def test_an_option_that_is_no_number_is_refused() -> None:
    swapped = np.float32(2).astype(np.dtype("f4").newbyteorder())
    for value in ([[1], [1, 2]], fractions.Fraction(1, 2), np.array(swapped, np.dtype("f4").newbyteorder())):
        with pytest.raises(TypeError, match=r"^temperature must "):
            jaxact.softmax(X, temperature=value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^chunk must be an int"):
        jaxact.linear_cross_entropy(X, W, Y, chunk=np.array([1, 2]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^y must be an array or a number, got list"):
        classifiers.cross_entropy(X, [0, 5, 2, 3])  # type: ignore[arg-type]


@pytest.mark.parametrize("label", [2**32 + 2, 2**31, -(2**32), np.uint64(2**63 + 2)])
def test_labels_of_numpy_that_32_bits_do_not_hold_are_out_of_range(label: Any) -> None:
    y = np.array([0, 1, 2, label], np.uint64 if isinstance(label, np.uint64) else np.int64)
    assert np.isnan(integer_loss(X, y)).tolist() == [False, False, False, True]
    assert np.isnan(jaxact.linear_cross_entropy(X, W, y, reduction="none")).tolist() == [False, False, False, True]
    assert np.isnan(integer_loss(X[0], y[3])).item()
    assert np.isnan(classifiers.cross_entropy(X, y)).tolist() == [False, False, False, True]  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [-1, 1.5, float("nan")])  # −1 switches it off in torchvision
def test_an_alpha_that_is_no_share_is_named(alpha: Any) -> None:
    with pytest.raises(ValueError, match=f"alpha must be from 0 to 1, or None to weigh both alike, got {float(alpha)}"):
        losses.sigmoid_focal_loss(X, X / 2, alpha)


KNOWN: dict[str, Any] = {
    "axis": jaxact.softmax,
    "keepdims": lambda x, value: jaxact.logsumexp(x, keepdims=value),
    "return_sign": lambda x, value: jaxact.logsumexp(x, return_sign=value),
    "ignore_index": lambda x, value: integer_loss(x, Y, ignore_index=value),
    "chunk": lambda x, value: jaxact.linear_cross_entropy(x, W, Y, chunk=value),
    "reduction": lambda x, value: jaxact.linear_cross_entropy(x, W, Y, reduction=value),
    "return_aux": lambda x, value: jaxact.linear_cross_entropy(x, W, Y, return_aux=value),
    "accum_dtype": lambda x, value: jaxact.linear_cross_entropy(x, W, Y, accum_dtype=value),
}


@pytest.mark.parametrize("name", KNOWN)
def test_an_option_that_must_be_known_is_traced(name: str) -> None:
    message = rf"^{name} must be .*, got a traced value: under jit, name it in static_argnames"
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(KNOWN[name], X, 1)


@pytest.mark.parametrize("name", ["keepdims", "return_sign", "return_aux"])
def test_a_choice_is_true_or_false(name: str) -> None:
    no_choices: list[Any] = ["no", None, 2, np.ones(2)]
    for value in no_choices:
        with pytest.raises(TypeError, match=f"^{name} must be True or False, got "):
            KNOWN[name](X, value)
    for value in (0, True, np.bool_(True)):
        KNOWN[name](X, value)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no such dtype here")
def test_a_dtype_that_jax_has_not_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^x must be an array of numbers, got dtype float128"):
        jaxact.softmax(np.ones(3, np.longdouble))


def test_an_array_of_another_library_is_refused() -> None:
    class Series:
        dtype = np.dtype("float32")

    calls: dict[str, Any] = {"x": jaxact.softmax, "where": lambda mask: jaxact.softmax(X, where=mask)}
    for name, call in calls.items():
        with pytest.raises(TypeError, match=f"^{name} must be an array of JAX or NumPy or a number, got Series"):
            call(Series())
