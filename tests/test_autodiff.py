"""The engine against JAX on random programs, and the gradient check against planted faults."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from llm_from_scratch.autodiff import (
    Tensor,
    check_gradients,
    exp,
    gradients,
    log,
    tanh,
    topological,
    total,
    unbroadcast,
)

shapes = st.sampled_from([(), (1,), (3,), (1, 3), (4, 1), (4, 3), (2, 4, 3), (2, 1, 1)])


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape) for shape in shapes]


def same_gradients(ours, theirs, values):
    """The engine's gradients of a scalar of some arrays are those of jax.grad, in fp64."""
    leaves = [Tensor(value) for value in values]
    result = ours(*leaves)
    gradients(result)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wanted = jax.value_and_grad(theirs, argnums=tuple(range(len(values))))(*values)
        np.testing.assert_allclose(result.data, wanted[0], rtol=1e-12)
        for leaf, grad in zip(leaves, wanted[1], strict=True):
            assert leaf.grad.shape == leaf.data.shape
            np.testing.assert_allclose(leaf.grad, grad, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(shapes, shapes, st.integers(0, 99))
def test_broadcasting_as_jax_does(one, other, seed):
    """Sums, differences and products of arrays of any two shapes that NumPy would broadcast."""
    same_gradients(
        lambda a, b: total((a + b) * (a - 2.0 * b) + (1.0 - a) * b),
        lambda a, b: jnp.sum((a + b) * (a - 2.0 * b) + (1.0 - a) * b),
        arrays(one, other, seed=seed),
    )


def test_a_small_network_as_jax_does():
    same_gradients(
        lambda x, w, b, v: total(log(total(exp(tanh(x @ w + b) @ v), axis=1))),
        lambda x, w, b, v: jax.nn.logsumexp(jnp.tanh(x @ w + b) @ v, axis=1).sum(),
        arrays((5, 4), (4, 3), (3,), (3, 6)),
    )


def test_an_entry_taken_twice_gets_both_gradients():
    rows = np.array([0, 2, 2, 1])
    same_gradients(
        lambda table: total(tanh(table[rows]) * tanh(table[rows, None, :][:, 0])),
        lambda table: jnp.sum(jnp.tanh(table[rows]) ** 2),
        arrays((3, 5)),
    )


def test_constants_on_either_side():
    x = Tensor([1.0, 2.0])
    result = total(np.array([3.0, 4.0]) * x + np.ones(2) - 1.0)
    gradients(result)
    np.testing.assert_array_equal(x.grad, [3.0, 4.0])


def test_a_second_pass_starts_anew():
    x = Tensor(2.0)
    y = x * x
    for _ in range(2):
        gradients(y)
        assert x.grad == 4.0


def test_topological_order_of_a_diamond_and_of_a_long_chain():
    x = Tensor(1.0)
    left, right = x + 1.0, x * 2.0
    order = topological(left * right + x)
    at = {id(node): i for i, node in enumerate(order)}
    assert len(at) == len(order)  # each node once
    assert all(at[id(p)] < at[id(node)] for node in order for p, *_ in node.parents)
    y = x
    for _ in range(20_000):  # recursion would overflow
        y = y + x
    gradients(y)
    assert x.grad == 20_001


def test_unbroadcast():
    grad = np.arange(24.0).reshape(2, 3, 4)
    assert unbroadcast(grad, ()) == grad.sum()
    np.testing.assert_array_equal(unbroadcast(grad, (3, 1)), grad.sum((0, 2)).reshape(3, 1))
    np.testing.assert_array_equal(unbroadcast(grad, (2, 3, 4)), grad)


def test_a_gradient_is_of_a_scalar():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        gradients(Tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        check_gradients(jnp.tanh, jnp.ones(3))


def test_check_passes_on_a_module_with_integers_and_functions():
    network = eqx.nn.MLP(3, "scalar", 8, 2, key=jax.random.key(0))
    ids = jnp.array([2, 0, 1])
    assert check_gradients(lambda n, x, i: n(x[i]), network, jnp.ones(3), ids) < 1e-6


def test_check_uses_fp64_whatever_the_arguments_are():
    """In fp32 the differences of this function would be off in the third digit."""
    assert check_gradients(lambda x: jnp.sum(jnp.exp(x)), jnp.linspace(-3, 3, 7)) < 1e-8
    assert check_gradients(lambda x: x**2 + 1e6, 3.0) < 1e-6  # a large value hides small slopes
    assert jnp.ones(1).dtype == jnp.float32  # and the setting is as before


@jax.custom_vjp
def slipped(x):
    return jnp.sum(jnp.sin(x))


slipped.defvjp(
    lambda x: (slipped(x), x), lambda x, g: (g * jnp.cos(x).at[1, 2].multiply(1.001),)
)  # one entry of twelve, off by a thousandth


def test_check_names_argument_leaf_index_and_both_numbers():
    tree = {"good": jnp.ones(2), "bad": jnp.full((3, 4), 0.5)}
    f = lambda unused, t: jnp.sum(t["good"]) + slipped(t["bad"])  # noqa: E731
    with pytest.raises(AssertionError, match=r"argument 1\['bad'\], index \(1, 2\)") as caught:
        check_gradients(f, 1.0, tree)
    assert "0.87846" in str(caught.value) and "0.877583" in str(caught.value)
    with jax.enable_x64(True), pytest.raises(AssertionError):
        check_grads(slipped, (jnp.full((3, 4), 0.5),), order=1, modes=["rev"], rtol=1e-6)


def test_check_finds_nan_and_a_gradient_that_is_missing():
    nan = lambda x: jnp.where(x > 0, jnp.sqrt(x), x)  # noqa: E731
    with pytest.raises(AssertionError, match="nan"):
        check_gradients(nan, -1.0)
    with pytest.raises(AssertionError, match="grad says 0"):
        check_gradients(lambda x: jax.lax.stop_gradient(x) * 2.0, 1.0)


def test_a_gradient_of_zero_is_no_error():
    assert check_gradients(lambda x: 0.0 * jnp.sum(x) + 5.0, jnp.ones(4)) < 1e-6


def test_of_a_large_leaf_only_some_entries_are_moved():
    calls = []

    def f(x):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sum(x**2)

    check_gradients(f, jnp.ones((100, 100)), entries=5)
    jax.effects_barrier()
    assert len(calls) == 1 + 2 * 5


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match="no float"):
        check_gradients(lambda i: jnp.sum(i), jnp.arange(3))
