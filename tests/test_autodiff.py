"""The engine against JAX, the gradient check against known rights and wrongs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import broadcastable_shapes

from llm_from_scratch.autodiff import Tensor, Value, check_gradients, graph_order, unbroadcast

FORMULAS = {
    "sums": lambda a, b, m: 2.0 - a + b - 3.0 + (1.0 + a) * 2.0,
    "quotients": lambda a, b, m: a / (b * b + 1.0) + 2.0 / (a * a + 1.0) - b / 3.0,
    "used twice": lambda a, b, m: a * a * b + a**3.0,
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("engine", [Value, Tensor])
def test_scalar_rules(name, engine):
    f = FORMULAS[name]
    a, b = engine(0.7), engine(-1.2)
    out = f(a, b, None)
    out.backward()
    with jax.enable_x64(True):
        value, wanted = jax.value_and_grad(lambda a, b: f(a, b, None), (0, 1))(0.7, -1.2)
    np.testing.assert_allclose(out.data, value, rtol=1e-12)
    np.testing.assert_allclose([a.grad, b.grad], wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["exp", "log", "tanh"])
def test_functions(name):
    x = Value(0.6)
    getattr(x, name)().backward()
    with jax.enable_x64(True):
        assert x.grad == pytest.approx(float(jax.grad(getattr(jnp, name))(0.6)), rel=1e-12)


def test_backward_again_starts_at_zero():
    x = Value(3.0)
    y = x * x
    y.backward()
    y.backward()
    assert x.grad == 6.0
    (x + x).backward()
    assert x.grad == 2.0


def test_a_long_chain_needs_no_stack():
    x = y = Value(1.0)
    for _ in range(20_000):
        y = y + 1.0
    y.backward()
    assert x.grad == 1.0


def test_a_diamond_waits_for_all_its_uses():
    """x reaches the end by paths of different length; 2**10 of them."""
    x = y = Value(1.0)
    for _ in range(10):
        y = y + (y * 1.0 + 0.0)
    order = graph_order(y)
    assert len(order) == len(set(map(id, order))) and order[-1] is y
    place = {id(node): i for i, node in enumerate(order)}
    assert all(place[id(p)] < place[id(node)] for node in order for p in node.parents)
    y.backward()
    assert x.grad == 1024.0


@settings(deadline=None)
@given(st.data())
def test_unbroadcast(data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    other = data.draw(broadcastable_shapes(shape, max_dims=3, max_side=3))
    a, b = Tensor(np.ones(shape)), Tensor(np.full(other, 2.0))
    out = a * b
    out.sum().backward()
    assert a.grad.shape == shape and np.shape(b.grad) == other
    assert np.all(a.grad == 2.0 * out.data.size / a.data.size)
    assert np.all(b.grad == out.data.size / b.data.size)
    assert unbroadcast(np.ones(out.data.shape), shape).shape == shape


def test_arrays_against_jax():
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 4)), rng.normal(size=(4, 2)), rng.normal(size=(1, 2))

    def ours(a, b, c):
        h = (a @ b + c).tanh()[np.array([0, 2, 2])]
        p = h.exp() / h.exp().sum(1)
        return (p.log().sum(0) * c).sum() + (b.T @ a.T).sum()

    def theirs(a, b, c):
        h = jnp.tanh(a @ b + c)[np.array([0, 2, 2])]
        return jnp.sum(jax.nn.log_softmax(h).sum(0, keepdims=True) * c) + (b.T @ a.T).sum()

    tensors = [Tensor(a) for a in arrays]
    out = ours(*tensors)
    out.backward()
    with jax.enable_x64(True):
        value, wanted = jax.value_and_grad(theirs, (0, 1, 2))(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(out.data, value, rtol=1e-12)
    for tensor, grad in zip(tensors, wanted, strict=True):
        assert tensor.grad.shape == tensor.data.shape
        np.testing.assert_allclose(tensor.grad, grad, rtol=1e-10, atol=1e-12)


def test_numpy_on_the_left():
    x = Tensor([1.0, 2.0])
    out = np.array([3.0, 4.0]) * x
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert x.grad.tolist() == [3.0, 4.0]


# the check


@jax.custom_vjp
def square(x):
    return x * x


square.defvjp(lambda x: (x * x, x), lambda x, g: (x * g,))


def test_a_module_passes():
    model = eqx.nn.MLP(3, 2, 8, 2, activation=jnp.tanh, key=jax.random.key(0))
    x = jnp.array([0.1, -0.5, 2.0])
    assert check_gradients(lambda m, x: jnp.sum(m(x) ** 2), model, x) < 1e-4


def test_integers_and_strings_are_no_leaves():
    tree = {"w": jnp.ones((2, 2)), "ids": jnp.arange(2), "n": 3}
    assert check_gradients(lambda t: jnp.sum(t["w"][t["ids"]] ** 2) * t["n"], tree) < 1e-5


def test_the_leaf_and_the_index_are_named():
    tree = {"right": jnp.ones(3), "wrong": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
    with pytest.raises(AssertionError, match=r"args\[1\]\['wrong'\]\[0, 1\] is 2, .* 4:"):
        check_gradients(lambda s, t: s * jnp.sum(square(t["wrong"])) + t["right"].sum(), 1.0, tree)


def test_one_wrong_entry_of_many_is_found():
    """No chosen entry need hit it: the random direction moves all of them."""
    x = jnp.linspace(1.0, 2.0, 400)
    grad = np.array(2 * x)
    grad[123] += 1.0
    with pytest.raises(AssertionError, match=r"args\[0\] along random signs|\[123\]"):
        check_gradients(lambda x: jnp.sum(x**2), x, grads=(grad,))


def test_zero_gradients_and_nan():
    assert check_gradients(lambda x, y: jnp.sum(x), jnp.ones(2), jnp.ones(2)) < 1e-6
    with pytest.raises(AssertionError, match="nan"):
        check_gradients(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0).sum() + x.sum(), jnp.zeros(2))


def test_random_draws_are_refused():
    def noisy(x):
        return jnp.sum(x * jax.random.normal(jax.random.key(0), (2,)))

    with pytest.raises(ValueError, match="in float64"):
        check_gradients(noisy, jnp.ones(2))


def test_rounding_inside_is_allowed():
    """A softmax in fp32, as the models of the course have it, does not spoil the check."""

    def loss(x):
        p = jax.nn.log_softmax(x.astype(jnp.float32))
        return -p[0]

    assert check_gradients(loss, jnp.array([0.3, -1.0, 2.0])) < 1e-3


def test_against_check_grads():
    """What JAX's own check accepts or refuses, ours does too."""
    from jax.test_util import check_grads

    x = jnp.array([0.5, 1.5])
    for f, good in ((lambda x: jnp.sum(x * x), True), (lambda x: jnp.sum(square(x)), False)):
        for check in (check_gradients, lambda f, x: check_grads(f, (x,), 1, ["rev"])):
            if good:
                check(f, x)
            else:
                with pytest.raises(AssertionError):
                    check(f, x)


def test_check_of_gradients_of_the_wrong_shape_and_one_wrong_entry_of_many():
    x = np.linspace(-1, 1, 12).reshape(4, 3)
    slope = 1 - np.tanh(x) ** 2  # not summed over the rows that the bias was added to
    with pytest.raises(AssertionError, match=r"args\[0\] has shape \(4, 3\), not \(3,\)"):
        check_gradients(lambda b: jnp.sum(jnp.tanh(x + b[None])), np.zeros(3), grads=(slope,))
    ones = np.ones((512, 512))
    wrong = ones.copy()
    wrong[300, 7] = 0.0
    with pytest.raises(AssertionError, match="along random signs"):
        check_gradients(lambda w: jnp.sum(w), ones, grads=(wrong,))
    with pytest.raises(ValueError, match="no floating-point leaf"):
        check_gradients(lambda i: jnp.sum(i), jnp.arange(3))


def test_engine_names_what_it_can_not_do():
    with pytest.raises(ValueError, match="two matrices"):
        Tensor(np.ones((2, 2, 2))) @ Tensor(np.ones((2, 2)))
    with pytest.raises(ValueError, match="one number"):
        (Tensor(np.ones(3)) * 2.0).backward()
