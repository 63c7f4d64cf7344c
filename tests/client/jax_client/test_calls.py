"""Calls: structures, dtypes, static values, memory."""

import copy
import dataclasses
import pickle
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from bridge_client import Session
from bridge_client.jax import callbacks, primitives, pytrees
from bridge_wire.errors import (
    ArgumentError,
    CallerError,
    DTypeError,
    RemoteModelError,
    SpecError,
    StructureError,
)
from tests.client.jax_client.conftest import Remote, holds_nothing

X = jnp.linspace(0.1, 1.0, 4)


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Record:
    first: Any
    rest: Any


def assert_same(seen: Any, expected: Any) -> None:
    assert jax.tree.structure(seen) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_on_every_lane(any_lane: Remote) -> None:
    """At once, jitted and differentiated, on shared memory and by value."""
    f = any_lane("sine")
    np.testing.assert_allclose(f(X), 2 * jnp.sin(X), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda x: f(x).sum()))(X), 2 * jnp.cos(X), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_structures_come_back_as_they_went(remote: Remote, wrap: Any) -> None:
    """Dicts, lists, tuples, namedtuples and dataclasses of arrays, with None where there is
    none."""
    tree = {
        "b": [X, (X + 1, None)],
        "a": Point(X[0], Record(X * 2, [])),
        "empty": jnp.zeros((0, 3)),
    }
    f = remote("echo")
    f({"record": Record(X, X)})  # has jax know the dataclass, as its user would
    assert_same(wrap(f)(tree), tree)


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "uint8",
        "int8",
        "int16",
        "float16",
        "bfloat16",
        "float32",
        "complex64",
        "float8_e4m3fn",
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_dtypes_come_back_as_they_went(remote: Remote, wrap: Any, dtype: str) -> None:
    """Each type that both frameworks have, of any shape."""
    values = [jnp.ones((2, 3), dtype), jnp.zeros((), dtype), jnp.ones((0, 2), dtype)]
    assert_same(wrap(remote("echo"))(values), values)


def test_a_dataclass_that_another_thread_registered_first() -> None:
    """Two threads that meet a dataclass at once both have jax know it, and neither fails."""
    kind = dataclasses.make_dataclass("Met", ["x"])
    for _ in range(2):
        pytrees.register_dataclass(kind, ("x",))
    assert jax.tree.leaves(kind(1)) == [1]


def test_integers_without_x64(remote: Remote) -> None:
    """Labels and indices are 64-bit ones to torch, and come back as what jax has; what does not
    fit is refused."""
    f = remote("cross_entropy")
    logits, labels = jnp.eye(4), jnp.arange(4)
    assert labels.dtype == jnp.int32
    expected = -jax.nn.log_softmax(logits)[labels, labels].mean()
    for given in (labels, np.arange(4), labels.astype(jnp.int16).astype(jnp.int32)):
        np.testing.assert_allclose(f(logits, given), expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            jax.jit(f)(logits, given), expected, rtol=1e-6, atol=1e-6
        )
    assert remote("embedded")(jnp.eye(3), labels[:3])["tokens"].dtype == jnp.int32
    with pytest.raises(
        DTypeError,
        match=r"`args\[1\]` has dtype int64 and values from 0 to 1099511627776",
    ):
        f(logits, np.array([0, 1, 2, 2**40]))
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(
            DTypeError,
            match=r"output 0 of counted has dtype int64 and values from .* int32 cannot hold",
        ):
            jax.block_until_ready(wrap(remote("counted"))(X))


def test_floats_without_x64(remote: Remote, session: Session) -> None:
    """A float64, given or returned, is never made a float32 in silence."""
    with pytest.raises(
        DTypeError, match=r"`args\[0\]` has dtype float64, but jax runs without x64"
    ):
        remote("sine")(np.ones(3))
    for wrap in (lambda f: f, jax.jit):
        with pytest.raises(
            DTypeError,
            match=r"output 0 of widened has dtype float64.*set jax_enable_x64",
        ):
            wrap(remote("widened"))(X)
    assert session.stats()["calls"] == 0
    with jax.enable_x64(True):
        assert remote("widened")(X).dtype == jnp.float64


def test_numbers_and_static_values(remote: Remote) -> None:
    """Numbers are data, unless they are named; strings, bools and None are not."""
    f, tokens = remote("embedded"), jnp.array([0, 2])
    made = jax.jit(lambda t: f(jnp.eye(3), t, 2.0, squared=True, shift=None))(tokens)
    np.testing.assert_array_equal(made["rows"], 4 * jnp.eye(3)[tokens])
    assert made["is_first"].tolist() == [True, False]
    assert f(jnp.eye(3), tokens, 2)["rows"].dtype == jnp.float32
    programs = len(f._calls)
    f(jnp.eye(3), tokens, 3)
    assert len(f._calls) == programs
    times = remote("repeated", static_argnames="times")
    assert [len(times(X, n)) for n in (1, 3)] == [1, 3]
    assert len(jax.jit(times, static_argnums=1)(X, 2)) == 2


def test_a_traced_value_where_one_is_needed(remote: Remote) -> None:
    """A tracer for a static argument is told by the argument's path what to do."""
    f = remote("repeated", static_argnames="times")
    with pytest.raises(
        StructureError,
        match=r"`args\[1\]` is static, but is traced here.*static_argnums",
    ):
        jax.jit(f)(X, 2)
    with pytest.raises(
        StructureError, match=r"`kwargs\['times'\]` is static, but is an array"
    ):
        f(X, times=jnp.arange(3))


def test_copies_and_pickles_call_the_same_model(remote: Remote) -> None:
    """A copy has the parameters of the original, and a pickled function makes a session of its
    own."""
    f = remote("single")
    f.params = {name: 2 * value for name, value in f.params.items()}
    x = jnp.ones((1, 4))
    for made in (copy.copy(f), copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        np.testing.assert_array_equal(made(x), f(x))
        if made.session is not f.session:
            made.session.close()


def _endless() -> list[Any]:
    made: list[Any] = [X]
    made.append(made)
    return made


class Foreign:
    """An array of a library whose types NumPy does not know."""

    dtype = "theirs.float32"

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("no such type")


def test_bad_arguments_are_named(remote: Remote, session: Session) -> None:
    """What cannot be sent is refused by its path, also while tracing, before anything is sent."""
    f = remote("echo")
    with pytest.raises(
        StructureError,
        match=r"`args\[0\]\['w'\]\[1\]` is a builtins.object; expected an array",
    ):
        f({"w": [X, object()]})
    with pytest.raises(
        StructureError, match=r"`args\[0\]` is a Foreign that jax cannot read"
    ):
        f(Foreign())
    with pytest.raises(
        StructureError, match=r"`args\[0\]` .*; a key is passed as rng="
    ):
        jax.jit(f)(jax.random.key(0))
    with pytest.raises(
        DTypeError,
        match=r"`args\[0\]` is the integer 4294967296, which does not fit in 32 bits",
    ):
        f(2**32)
    with pytest.raises(
        RemoteModelError, match=r"args\[0\]: float32\[4\], args\[1\]: float32\[3,3\]"
    ) as raised:
        jax.eval_shape(remote("affine"), X, jnp.eye(3))
    assert raised.value.remote_type == "builtins.RuntimeError"
    assert session.stats()["calls"] == 0
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n"), jnp.float32)
    with pytest.raises(SpecError, match=r"`args\[0\]` has the symbolic shape \(n,\)"):
        jax.eval_shape(f, symbolic)
    with pytest.raises(
        CallerError, match="only one of in_specs and out_specs is given"
    ):
        remote("echo", in_specs=jax.sharding.PartitionSpec())
    with pytest.raises(CallerError, match="static_argnames=3; expected a name"):
        remote("echo", static_argnames=3)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (
            lambda: {1: X, "a": X},
            "jax cannot take the arguments apart: '<' not supported",
        ),
        (_endless, "jax cannot take the arguments apart: maximum recursion depth"),
        (
            lambda: np.array([object()]),
            r"`args\[0\]` is a ndarray that jax cannot read: it has dtype object",
        ),
        (
            lambda: np.ma.array([1.0], mask=[True]),
            r"`args\[0\]` .* its mask would be lost; fill it",
        ),
        (lambda: jnp.zeros([1] * 65), r"`args\[0\]`: .* 65 dimensions; at most 64"),
    ],
    ids=["unsorted keys", "endless", "objects", "masked", "rank"],
)
def test_what_is_no_argument_is_told(remote: Remote, argument: Any, text: str) -> None:
    """Structures that jax cannot take apart, and arrays that are none, are StructureErrors, or
    SpecErrors, too."""
    with pytest.raises((StructureError, SpecError), match=text):
        remote("echo")(argument())


def test_any_keyword_and_byte_order(remote: Remote) -> None:
    """A model's argument may be called self, and an array may have come from another machine."""
    assert_same(remote("echo")(np.arange(3, dtype=">i4")), jnp.arange(3))
    with pytest.raises(
        ArgumentError, match=r"got an unexpected keyword argument 'self'"
    ):
        remote("echo")(self=X)


def test_a_result_may_die_while_an_exception_is_raised(any_lane: Remote) -> None:
    """A result that goes as an exception leaves its expression disturbs neither the exception
    nor the process."""
    f = any_lane("sine")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            [f(X), jax.vjp(f, X), 1 / 0]
    assert holds_nothing(f.session)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_debug_nans(remote: Remote, wrap: Any) -> None:
    """Under jax.debug_nans and jax.debug_infs, a result or a gradient that is none is jax's
    error, by its name."""
    f = remote("sine")
    for call in (f, jax.grad(lambda x: f(x).sum())):
        with (
            jax.debug_nans(True),
            pytest.raises(
                FloatingPointError, match=r"invalid value \(nan\) .* of .*sine"
            ),
        ):
            wrap(call)(jnp.array([1.0, jnp.inf]))
        with jax.debug_nans(True):
            assert np.isfinite(wrap(call)(jnp.ones(2))).all()
    with (
        jax.debug_infs(True),
        pytest.raises(
            FloatingPointError, match=r"\(inf\) encountered in output 0 of square"
        ),
    ):
        wrap(remote("square"))(jnp.array([1.0, 1e30]))


def test_arrays_over_blocks_are_not_copied(remote: Remote, session: Session) -> None:
    """A result at once is an array over its block; given to the next call, it is passed as it
    lies."""
    f = remote("sine")
    made = f(jnp.ones(1000))
    assert (
        session.pool.address_of(made.unsafe_buffer_pointer(), made.nbytes) is not None
    )
    before = session.stats()["bytes_copied"]
    again = f(made)
    assert session.stats()["bytes_copied"] - before == again.nbytes
    before = session.stats()["bytes_copied"]
    jax.block_until_ready(jax.jit(f)(made))
    assert session.stats()["bytes_copied"] - before == again.nbytes
    # What a residual may alias is not copied either: it keeps the block.
    before = session.stats()["bytes_copied"]
    kept = jax.jit(lambda x: jax.vjp(f, x))(made)
    assert session.stats()["bytes_copied"] - before == again.nbytes
    del made
    np.testing.assert_allclose(
        kept[1](jnp.ones(1000))[0],
        2 * jnp.cos(2 * jnp.sin(jnp.ones(1000))),
        rtol=1e-5,
        atol=1e-6,
    )
    del again, kept
    assert holds_nothing(session)


def test_layouts_other_than_row_major(remote: Remote) -> None:
    """An array that jax has imported column by column is read as what it is."""
    columns = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    for imported in (
        jax.dlpack.from_dlpack(columns),
        jnp.asarray(columns).T.T,
        columns,
        columns[::-1, ::2],
    ):
        np.testing.assert_array_equal(remote("echo")(imported), np.asarray(imported))
        np.testing.assert_array_equal(
            jax.jit(remote("echo"))(imported), np.asarray(imported)
        )


def test_without_buffer_callback(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no callback on buffers, pure_callback does the same."""
    f = remote("embedded")
    monkeypatch.setattr(callbacks, "buffer_callback", None)
    loss = lambda table: f(table, jnp.array([0, 2]))["rows"][0].sum()  # noqa: E731
    primitives.lower_as(callbacks.call_back_on_arrays, "cpu")
    try:
        value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.eye(3) + 1)
    finally:
        primitives.lower_as(callbacks.call_back_on_buffers, "cpu")
    assert value == 4.0
    np.testing.assert_array_equal(gradient, [[1, 1, 1], [0, 0, 0], [0, 0, 0]])


def test_jit_from_many_threads(remote: Remote, session: Session) -> None:
    """Calls of several threads run side by side, each with its own result."""
    f = jax.jit(jax.grad(lambda x: (remote("sine")(x) ** 2).sum()))
    futures = [session.submit(lambda i=i: np.asarray(f(X + i))) for i in range(24)]
    for i, future in enumerate(futures):
        np.testing.assert_allclose(
            future.result(30), 8 * jnp.sin(X + i) * jnp.cos(X + i), rtol=1e-4, atol=1e-5
        )
