"""Calls on NumPy arrays: values, structures, dtypes, memory and errors."""

import dataclasses
import gc
from typing import Any

import numpy as np
import pytest

from bridge_client import Session
from bridge_client.numpy import RemoteFunction, empty
from bridge_wire.errors import (
    ArgumentError,
    CallerError,
    DTypeError,
    RemoteModelError,
    SpecError,
    StructureError,
    UnknownModel,
)
from tests.conftest import eventually
from tests.workers import run_program


def test_values_are_those_of_numpy(either: Session) -> None:
    """A call returns what NumPy's formula does, from a worker of either framework."""
    f = RemoteFunction(either, name="damped")
    x, w = np.linspace(-1, 1, 12).reshape(3, 4), np.arange(4.0)
    result = f(x, w)
    np.testing.assert_allclose(result["y"], np.exp(-x) * w, rtol=1e-14)
    assert result["count"] == (x > 0).sum()
    assert type(result["y"]) is np.ndarray and result["y"].dtype == np.float64


def test_client_needs_neither_framework() -> None:
    """Where neither torch nor jax is installed, calls and derivatives work, with a model from a
    file."""
    done = run_program(
        """
        import sys
        import numpy as np
        from bridge_client import spawn
        from bridge_client.numpy import RemoteFunction
        target = "tests/client/numpy_client/models.py:rosenbrock"
        with spawn(target, python=".venv-jax/bin/python", args=["--x64"]) as session:
            f = RemoteFunction(session)
            x = np.array([0.5, -0.25, 2.0])
            value, gradient = f.value_and_grad(x)
            step = 1e-6 * np.eye(3)
            difference = [(f(x + h) - f(x - h)) / 2e-6 for h in step]
            np.testing.assert_allclose(gradient, difference, rtol=1e-6)
            expected = 100 * ((x[1:] - x[:-1] ** 2) ** 2).sum() + ((1 - x[:-1]) ** 2).sum()
            np.testing.assert_allclose(value, expected, rtol=1e-14)
        print(sorted({"torch", "jax"} & set(sys.modules)))
        """,
        venv=".venv-wire",
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.arange(24.0).reshape(4, 6)[::-1, ::2], id="strided"),
        pytest.param(np.arange(6.0).reshape(2, 3).T, id="transposed"),
        pytest.param(np.broadcast_to(np.arange(3.0), (2, 3)), id="broadcast"),
        pytest.param(np.zeros((0, 3)), id="empty"),
        pytest.param(np.float64(2.5), id="scalar"),
        pytest.param(np.array(2.5), id="0-d"),
        pytest.param(np.arange(3.0).astype(">f8"), id="big-endian"),
        pytest.param(np.arange(1_000_000.0), id="large"),
    ],
)
def test_every_layout_is_read(worker: Session, array: Any) -> None:
    """Strided, transposed, empty, scalar and foreign-endian inputs have their values there."""
    result = RemoteFunction(worker, name="tripled")(array)
    assert result.shape == np.shape(array) and result.dtype == np.float64
    np.testing.assert_array_equal(result, 3 * np.asarray(array))


@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
        *("uint64", "float16", "float32", "float64", "complex64", "complex128"),
    ],
)
def test_dtypes_come_back(worker: Session, dtype: str) -> None:
    """An array of each dtype that NumPy has comes back as it was."""
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    result = RemoteFunction(worker, name="echo")(array)["args"][0]
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array)


def test_bfloat16_is_that_of_ml_dtypes(worker: Session) -> None:
    """An array of ml_dtypes' bfloat16 travels as such."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([1.5, -2.0]).astype(ml_dtypes.bfloat16)
    result = RemoteFunction(worker, name="tripled")(array)
    assert result.dtype == ml_dtypes.bfloat16
    assert result.astype(float).tolist() == [4.5, -6.0]


def test_bfloat16_without_ml_dtypes_is_refused() -> None:
    """Where ml_dtypes is not installed, bfloat16 is refused by name."""
    done = run_program(
        """
        import sys
        sys.modules["ml_dtypes"] = None
        from bridge_client.numpy.memory import dtype_of
        from bridge_wire.dtypes import BY_NAME
        from bridge_wire.errors import DTypeError
        try:
            dtype_of(BY_NAME["bfloat16"])
        except DTypeError as error:
            print(error)
        """,
        venv=".venv-wire",
    )
    assert "NumPy has no dtype bfloat16; install ml_dtypes" in done.stdout, done.stderr


def test_structures_come_back(worker: Session) -> None:
    """Dicts, lists, tuples, dataclasses, numbers and texts reach the model as such."""

    @dataclasses.dataclass
    class Pair:
        left: Any
        right: Any

    f = RemoteFunction(worker, name="echo")
    x = np.arange(3.0)
    arguments = {"b": [x, 2], "a": (x, None, "text", True), "pair": Pair(x, 1.5)}
    result = f(arguments, key=x)
    first = result["args"][0]
    assert list(first) == ["a", "b", "pair"]
    np.testing.assert_array_equal(first["a"][0], x)
    assert first["a"][1:] == (None, "text", True)
    assert first["b"][1] == 2 and first["pair"].right == 1.5
    np.testing.assert_array_equal(result["kwargs"]["key"], x)


def test_states_are_passed_back(worker: Session) -> None:
    """A worker's dataclass can be read here, and returns to the worker as its own class, in a
    loop."""
    start, step = (RemoteFunction(worker, name=name) for name in ("started", "stepped"))
    state = start(np.ones(4))
    for _ in range(3):
        state = step(state, 0.5)
    assert state.state.steps == 3
    np.testing.assert_array_equal(state.state.position, np.full(4, 0.125))
    np.testing.assert_allclose(state.energy, 4 * 0.125**2)


def test_static_arguments(worker: Session) -> None:
    """A number of a static argument is Python's own on the worker."""
    f = RemoteFunction(worker, name="power", static_argnames="exponent")
    np.testing.assert_array_equal(f(np.array([2.0]), 3), [16.0])
    np.testing.assert_array_equal(f(np.array([2.0]), exponent=2), [4.0])
    with pytest.raises(StructureError, match="static"):
        f(np.array([2.0]), np.array(3))


# Parameters ---------------------------------------------------------------------------------------


def test_parameters_stay_on_the_worker(worker: Session) -> None:
    """Without an option a model computes with its own parameters."""
    f = RemoteFunction(worker, name="affine")
    x = np.ones((4, 3), np.float32)
    np.testing.assert_allclose(f(x), np.full((4, 2), 2.5))


def test_parameters_are_the_first_argument(worker: Session) -> None:
    """With parameters="client" each call takes a dict of them, and has their gradients."""
    f = RemoteFunction(worker, name="affine_loss", parameters="client")
    parameters = f.parameters()
    assert {name: value.shape for name, value in parameters.items()} == {
        "bias": (2,),
        "weight": (3, 2),
    }
    parameters["bias"] += 1
    x = np.ones((4, 3), parameters["weight"].dtype)
    value, gradient = f.value_and_grad(parameters, x)
    np.testing.assert_allclose(value, 8 * 3.5**2)
    np.testing.assert_allclose(gradient["bias"], [28, 28])
    np.testing.assert_allclose(gradient["weight"], np.full((3, 2), 28))


def test_wrong_parameters_are_refused(worker: Session) -> None:
    """A dict with other names than the model's parameters, or no dict, is an error."""
    f = RemoteFunction(worker, name="affine", parameters="client")
    x = np.ones((4, 3), np.float32)
    with pytest.raises(StructureError, match=r"expected a dict of the parameters"):
        f({"weight": np.ones((3, 2))}, x)
    with pytest.raises(StructureError, match="first argument has ndarray"):
        f(x, x)
    with pytest.raises(CallerError, match="first argument is missing"):
        f()
    with pytest.raises(CallerError, match="has no parameters"):
        RemoteFunction(worker, name="tripled", parameters="client")


# Memory -------------------------------------------------------------------------------------------


def test_results_are_writable_and_give_their_memory_back(worker: Session) -> None:
    """A result's memory is leased as long as the result or a view of it lives."""
    f = RemoteFunction(worker, name="tripled")
    f(np.ones(1000))
    gc.collect()
    before = worker.stats()["blocks"]
    result = f(np.ones(1000))
    view = result[10:20]
    result += 1
    assert worker.stats()["blocks"] == before + 1
    del result
    gc.collect()
    assert worker.stats()["blocks"] == before + 1
    np.testing.assert_array_equal(view, np.full(10, 4.0))
    del view
    assert eventually(lambda: worker.stats()["blocks"] == before)


def test_results_and_empty_arrays_are_passed_without_a_copy(worker: Session) -> None:
    """An array in shared memory costs no copy: of a call only the result's bytes are copied."""
    f = RemoteFunction(worker, name="tripled")
    array = empty(worker, (100, 10))
    array[:] = 1
    f(array)
    before = worker.stats()["bytes_copied"]
    result = f(array)
    again = f(result)
    copied = worker.stats()["bytes_copied"] - before
    assert copied == result.nbytes + again.nbytes
    np.testing.assert_array_equal(again, np.full((100, 10), 9.0))


def test_many_calls_leave_nothing(worker: Session) -> None:
    """A thousand calls with derivatives leave neither blocks nor residuals."""
    f = RemoteFunction(worker, name="rosenbrock")
    x = np.linspace(-1, 1, 50)
    f.value_and_grad(x)
    gc.collect()
    before = worker.stats()
    for _ in range(1000):
        f.value_and_grad(x)
        result, pull = f.vjp(x)
        pull(1.0)
    del result, pull
    gc.collect()
    f(x)
    after = worker.stats()
    for name in ("blocks", "residuals", "slab_bytes"):
        assert after[name] == before[name], name


# Errors -------------------------------------------------------------------------------------------


def test_unknown_targets_are_refused(worker: Session) -> None:
    """A target that is no worker, an unknown model, and wrong options are told apart."""
    with pytest.raises(CallerError, match=r"target is a function; expected a worker's"):
        RemoteFunction(lambda x: x)
    with pytest.raises(UnknownModel, match="pick one with name="):
        RemoteFunction(worker)
    with pytest.raises(CallerError, match="parameters='here'"):
        RemoteFunction(worker, name="affine", parameters="here")


def test_arguments_are_checked_by_the_signature(worker: Session) -> None:
    """A missing and an unexpected argument are an ArgumentError with the signature."""
    f = RemoteFunction(worker, name="damped")
    with pytest.raises(ArgumentError, match=r"missing a required argument: 'w'"):
        f(np.ones(2))
    with pytest.raises(ArgumentError, match="its arguments are"):
        f(np.ones(2), np.ones(2), v=1)


def test_64_bits_are_never_narrowed_silently(narrow: Session) -> None:
    """Without x64, float64 is refused, and int64 is narrowed only where its values fit."""
    f = RemoteFunction(narrow, name="tripled")
    with pytest.raises(DTypeError, match=r"`args\[0\]` has dtype float64.*--x64"):
        f(np.ones(2))
    assert f(np.array([5])).dtype == np.int32
    with pytest.raises(DTypeError, match="values from 5 to 1099511627776"):
        f(np.array([5, 2**40]))


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (np.array(["a"]), DTypeError, r"`args\[0\]` has dtype <U1"),
        (np.array([None]), DTypeError, "has dtype object"),
        (np.array(["2020"], "datetime64[D]"), DTypeError, "datetime64"),
        (np.ma.masked_array([1.0], [True]), StructureError, "mask would be lost"),
        ({1, 2}, StructureError, r"args\[0\] is a builtins.set"),
        (2**70, DTypeError, "does not fit in 64 bits"),
    ],
)
def test_unsendable_arguments_are_named(
    worker: Session, value: Any, error: type[Exception], said: str
) -> None:
    """A value that cannot be sent is refused with its path, before anything is sent."""
    with pytest.raises(error, match=said):
        RemoteFunction(worker, name="tripled")(value)


def test_subclasses_with_more_parts_are_refused(worker: Session) -> None:
    """A library's subclass of ndarray, such as one with units, is not sent without its unit."""

    class Quantity(np.ndarray):
        pass

    with pytest.raises(StructureError, match=r"Quantity.*np.asarray"):
        RemoteFunction(worker, name="tripled")(np.ones(2).view(Quantity))


def test_model_errors_carry_the_remote_traceback(worker: Session) -> None:
    """An exception of the model is a RemoteModelError."""
    with pytest.raises(RemoteModelError, match="is no Report"):
        RemoteFunction(worker, name="stepped")(np.ones(2), 0.1)


def test_shapes_of_a_batch_are_checked(worker: Session) -> None:
    """Batch axes that are missing, differ, or map over nothing are refused."""
    f = RemoteFunction(worker, name="damped").vmap()
    with pytest.raises(SpecError, match="no batch axis 0"):
        f(np.ones(3), np.array(1.0))
    with pytest.raises(SpecError, match=r"3 of `args\[0\]`, 4 of `args\[1\]`"):
        f(np.ones(3), np.ones(4))
    with pytest.raises(CallerError, match="already"):
        f.vmap()
    with pytest.raises(CallerError, match="2 positional"):
        RemoteFunction(worker, name="damped").vmap((0,))(np.ones(3), np.ones(3))
