"""The functions whose gradients are compared with jax.vjp: run by the worker, and by the tests
themselves.

No torch.
"""

import jax
import jax.numpy as jnp
from jax import lax


def gradient_case(name, *args):
    """Call the case of that name."""
    return CASES[name](*args)


def pytree(tree, scale):
    inner, (bias, *_) = tree["inner"], tree["list"]
    return {
        "out": jnp.tanh(inner[0] @ inner[1]) * scale,
        "sum": (bias.sum(), [bias * inner[0].mean()]),
    }


def several_outputs(x):
    return x.sum(), x * 2, (x**2).mean(axis=0)


def mixed_outputs(x):
    """Floats among integers and booleans."""
    return x.argmax(), jnp.exp(x), x > 0, x.size


def embedding(table, rows):
    return table[rows] * 2


def empty(x, y):
    return jnp.concatenate([x, y]) * 3, x.sum(), jnp.sin(x)


def convolution(images, kernels, bias):
    made = lax.conv_general_dilated(
        images, kernels, (2, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    return made + bias[:, None, None]


def scanned(weights, xs):
    """A small recurrent network."""

    def step(hidden, x):
        hidden = jnp.tanh(weights @ hidden + x)
        return hidden, hidden.sum()

    return lax.scan(step, jnp.zeros_like(xs[0]), xs)


def looped(x):
    return lax.fori_loop(0, 4, lambda i, value: jnp.sin(value) + x * i, x)


@jax.custom_vjp
def _square_root(x):
    """By Newton's method, until it converges: jax cannot differentiate that loop in reverse."""

    def is_off(state):
        return (jnp.abs(state[0] - state[1]) > 1e-14 * state[0]).any() & (
            state[2] < 100
        )

    def improve(state):
        guess = state[0]
        return (guess + x / guess) / 2, guess, state[2] + 1

    return lax.while_loop(is_off, improve, (x + 1, x, 0))[0]


def _square_root_forward(x):
    root = _square_root(x)
    return root, root


_square_root.defvjp(
    _square_root_forward, lambda root, cotangent: (cotangent / (2 * root),)
)


def while_loop(x):
    return _square_root(x)


def conditional(x, flag):
    return lax.cond(flag, jnp.sin, lambda x: x**2, x) + lax.switch(
        2, [jnp.cos, jnp.exp, jnp.tanh], x
    )


def sort(x):
    return jnp.sort(x, axis=-1) * jnp.arange(1.0, 1 + x.shape[-1], dtype=x.dtype)


def gather(x, rows, columns):
    return x[rows, columns] ** 2


def scatter(x, rows, updates):
    return x.at[rows].add(updates).at[0].multiply(2.0)


@jax.custom_vjp
def _log1p_exp(x):
    return jnp.log1p(jnp.exp(x))


_log1p_exp.defvjp(
    lambda x: (_log1p_exp(x), x), lambda x, cotangent: (cotangent * jax.nn.sigmoid(x),)
)


def custom_vjp(x):
    return _log1p_exp(x) * x


def norms(x):
    return (
        jnp.linalg.norm(x),
        jnp.linalg.norm(x, axis=1),
        jnp.linalg.norm(x, ord=1, axis=0),
    )


def cross_entropy(logits, labels):
    rows = jnp.arange(len(labels))
    return -jax.nn.log_softmax(logits)[rows, labels].mean(), jax.nn.softmax(logits)


def linear_systems(a, b):
    positive = a @ a.T + len(a) * jnp.eye(len(a), dtype=a.dtype)
    return (
        jnp.linalg.cholesky(positive),
        jnp.linalg.solve(positive, b),
        jnp.linalg.slogdet(positive)[1],
    )


def triangular(a, b):
    return jax.scipy.linalg.solve_triangular(
        jnp.tril(a) + 3 * jnp.eye(len(a), dtype=a.dtype), b, lower=True
    )


def spectrum(a):
    return jnp.linalg.eigvalsh(a + a.T)


def attention(queries, keys, values, mask):
    scores = jnp.einsum("hqd,hkd->hqk", queries, keys) / queries.shape[-1] ** 0.5
    return jnp.einsum(
        "hqk,hkd->hqd", jax.nn.softmax(jnp.where(mask, scores, -1e9)), values
    )


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-3) * scale + bias
    )


def fourier(x):
    return jnp.abs(jnp.fft.rfft(x)) ** 2


def kinks(x):
    return (
        jax.nn.relu(x),
        jnp.maximum(x, 0.5),
        jnp.where(x > 0, x, 2 * x),
        jnp.clip(x, -1, 1).max(),
    )


def inner_gradient(x, y):
    """A model that differentiates on its own."""
    return (
        jax.grad(lambda x: (jnp.sin(x) * y).sum())(x) + jax.vmap(jnp.cumsum)(x[None])[0]
    )


def to_complex(x, y):
    z = lax.complex(x, y)
    return z * z, jnp.abs(z + 2)


def complex_products(z, w):
    return z * jnp.conj(w) + jnp.exp(z), jnp.real(z * w), jnp.abs(w) ** 2


def complex_matmul(z, x):
    return (z @ x).sum(axis=0), jnp.angle(z + 3)


CASES = {
    "sine": lambda x, y: jnp.sin(x) * jnp.exp(y),
    "broadcast": lambda x, y, z: x * y + z,
    "pytree": pytree,
    "several outputs": several_outputs,
    "mixed outputs": mixed_outputs,
    "embedding": embedding,
    "scalar": lambda x, y: x**3 / y,
    "empty": empty,
    "matmul": lambda x, y: x @ y,
    "convolution": convolution,
    "scan": scanned,
    "fori_loop": looped,
    "while_loop": while_loop,
    "cond": conditional,
    "sort": sort,
    "gather": gather,
    "scatter": scatter,
    "custom_vjp": custom_vjp,
    "norm": norms,
    "cross entropy": cross_entropy,
    "cholesky and solve": linear_systems,
    "triangular solve": triangular,
    "eigenvalues": spectrum,
    "attention": attention,
    "layer norm": layer_norm,
    "fft": fourier,
    "kinks": kinks,
    "inner gradient": inner_gradient,
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.cos(x)))(x),
    "unused input": lambda x, y: x * 2,
    "identity": lambda x: x,
    "cumulative": lambda x: (jnp.cumsum(x, 0), jnp.cumprod(x, 1), jax.nn.logsumexp(x)),
    "to complex": to_complex,
    "complex products": complex_products,
    "complex matmul": complex_matmul,
}


def scalar_case(name, x):
    """Call the scalar function of that name, of a vector of three."""
    return SCALARS[name](x)


@jax.custom_jvp
def _softplus(x):
    return jnp.log1p(jnp.exp(x))


_softplus.defjvp(
    lambda primals, tangents: (
        _softplus(*primals),
        jax.nn.sigmoid(primals[0]) * tangents[0],
    )
)


# Each can be differentiated three times in either mode, and no third derivative is zero everywhere.
# Cheap to compile: of each, the worker compiles some twenty programs.
SCALARS = {
    "elementwise": lambda x: (jnp.sin(x) * jnp.exp(x)).sum(),
    "quadratic form": lambda x: x @ jnp.outer(x, x) @ x,
    "scan": lambda x: lax.scan(lambda carry, y: (jnp.sin(carry) * y, None), 1.0, x)[0],
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, y: y * x + i, x).sum(),
    "cond": lambda x: lax.cond(
        x[0] > 0, lambda x: jnp.sin(x) @ x, lambda x: (x**3).sum(), x
    ),
    "gather": lambda x: (x[jnp.array([2, 0, 1])] * x**2).sum(),
    "cumulative": lambda x: jnp.cumprod(x).sum(),
    "reciprocal": lambda x: 1 / (1 + x @ x),
    "custom_jvp": lambda x: (_softplus(x) * x).sum(),
    "checkpoint": lambda x: jax.checkpoint(lambda x: jnp.cos(x) @ jnp.roll(x, 1))(x),
}
