"""The contract of a runtime: the same facts of JAX's and of torch's, in this process, without a worker.

Every value is small, and every function has a derivative that can be written down.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_server.jax_runtime import JaxRuntime
from bridge_server.runtime import Options, Runtime
from bridge_server.torch_runtime import TorchRuntime
from bridge_wire import trees
from bridge_wire.dtypes import BY_NAME, NEEDS_X64
from bridge_wire.errors import DTypeError, ProtocolError, RemoteModelError, SpecError, TargetError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from tests.runtimes import Hosted, aligned, jvp, placed, vjp, vmap

Host = Callable[..., Hosted]


@pytest.fixture(params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    """Each of the frameworks."""
    return request.param


@pytest.fixture(scope="module")
def runtimes() -> dict[str, Runtime]:
    """One runtime of each framework; that of JAX leaves this process's x64 as it is."""
    return {"jax": JaxRuntime(Options(x64=jax.config.jax_enable_x64)), "torch": TorchRuntime(Options())}


@pytest.fixture
def host(framework: str, runtimes: dict[str, Runtime]) -> Host:
    """Hosts a model, which is made of the framework's array functions: `host(lambda np: lambda x: np.sin(x))`."""
    return lambda make: Hosted(runtimes[framework], make(jnp if framework == "jax" else torch))


def numbers(*shape: int) -> np.ndarray:
    """Return small numbers, none of them zero."""
    return (np.arange(np.prod(shape)).reshape(shape) % 7 + 1).astype(np.float32) / 4


def cubed(_: Any) -> Any:
    return lambda x: x * x * x


# Memory ------------------------------------------------------------------------------------------------------------


def test_a_view_shows_what_the_memory_holds_at_each_run(host: Host) -> None:
    """A view is no copy: a run reads what was written since."""
    hosted = host(cubed)
    array = placed(numbers(3))
    program = hosted.call(array)
    view = hosted.view(array, program.inputs[0])
    for value in (2.0, 3.0):
        array[:] = value
        outputs, _ = program.run([view], None)
        assert hosted.written(outputs[0], program.outputs[0]).tolist() == [value**3] * 3


@pytest.mark.parametrize("dtype", BY_NAME)
def test_every_type_passes_both_ways(host: Host, framework: str, dtype: str) -> None:
    """Arrays of every type come as they are and go as they came, bit by bit; JAX without x64 says what it lacks."""
    spec = Spec(BY_NAME[dtype], (5,))
    hosted = host(lambda _: lambda x: x)
    if framework == "jax" and dtype in NEEDS_X64 and not jax.config.jax_enable_x64:
        with pytest.raises(DTypeError, match="without x64"):
            hosted.call(spec)
        return
    program = hosted.call(spec)
    assert program.outputs == (spec,)
    memory = aligned(spec.nbytes)
    memory[:] = np.arange(spec.nbytes) % 2  # good booleans too
    outputs, _ = program.run([hosted.view(memory, spec)], None)
    target = aligned(spec.nbytes)
    hosted.runtime.write(outputs[0], target.ctypes.data, spec.nbytes)
    assert target.tobytes() == memory.tobytes()


@pytest.mark.parametrize("number", [3, 2.5, 1 + 2j])
def test_a_python_number_is_one_again(host: Host, number: complex) -> None:
    """A weak input arrives as a number whose type yields to the array's."""
    hosted = host(lambda _: lambda x, number: x * number)
    x = numbers(2).astype(np.complex64 if isinstance(number, complex) else np.float32)
    program = hosted.call(x, number)
    assert program.outputs[0].dtype is program.inputs[0].dtype
    assert hosted.run(program, x, number)[0].tolist() == (x * x.dtype.type(number)).tolist()


def test_scalars_and_empty_arrays_pass(host: Host) -> None:
    """Arrays of no dimension and of no element are inputs and outputs like any other."""
    hosted = host(cubed)
    for x in (np.float32(2.0), np.zeros((0, 3), np.float32)):
        assert hosted.run(hosted.call(x), x)[0].tolist() == (x**3).tolist()


def test_outputs_are_written_row_by_row_whatever_their_layout(host: Host) -> None:
    """Transposed and broadcast outputs lie dense in the client's memory."""
    hosted = host(lambda np: lambda x: (x.T, np.broadcast_to(x[0], (3, 4))))
    x = numbers(2, 4)
    transposed, broadcast = hosted.run(hosted.call(x), x)
    assert transposed.tolist() == x.T.tolist()
    assert broadcast.tolist() == np.broadcast_to(x[0], (3, 4)).tolist()


# Calls -------------------------------------------------------------------------------------------------------------


def test_structures_pass_both_ways(host: Host) -> None:
    """Dicts, lists and None among the arguments are there for the model, and its result's structure is told."""
    hosted = host(lambda np: lambda tree, kind: {"kept": [tree["a"] * 2, None], "sum": tree["b"][0] + len(kind)})
    mapping = pb.Tree.Mapping(
        keys=[pb.Value(text="a"), pb.Value(text="b")],
        items=[
            pb.Tree(leaf=pb.Tree.Leaf()),
            pb.Tree(list=pb.Tree.Sequence(items=[pb.Tree(leaf=pb.Tree.Leaf()), pb.Tree(value=pb.Value(none=True))])),
        ],
    )
    items = [pb.Tree(dict=mapping), pb.Tree(value=pb.Value(text="four"))]
    x, y = numbers(2), numbers(3)
    program = hosted.call(x, y, tree=pb.Tree(tuple=pb.Tree.Sequence(items=items)))
    assert trees.leaf_paths(program.result, "result") == ["result['kept'][0]", "result['sum']"]
    doubled, total = hosted.run(program, x, y)
    assert (doubled.tolist(), total.tolist()) == ((x * 2).tolist(), (y + 4).tolist())


def test_an_exception_of_the_model_is_its_own(host: Host, framework: str) -> None:
    """What a model raises comes with its type, its text, the call, and a traceback that begins in the model."""

    def refusing(x: Any) -> Any:
        raise LookupError(f"nothing of shape {tuple(x.shape)} here")

    with pytest.raises(RemoteModelError, match=r"nothing of shape \(2,\) here") as caught:
        host(lambda _: refusing).call(numbers(2))
    assert caught.value.remote_type == "builtins.LookupError"
    assert "float32[2]" in str(caught.value)
    first, second = caught.value.remote_traceback.splitlines()[:2]
    assert first.startswith("Traceback")
    assert __file__ in second
    assert "in refusing" in second


def test_what_is_no_model_is_refused(host: Host) -> None:
    """A target that cannot be called is a TargetError that says what it is."""
    with pytest.raises(TargetError, match=r"'model' is a builtins\.str"):
        host(lambda _: "a text")


# Derivatives -------------------------------------------------------------------------------------------------------

# What of x**3, for the input x and ones for every tangent and cotangent.
_DERIVED = {
    "vjp": ([vjp([0])], lambda x: 3 * x**2),
    "jvp": ([jvp([0])], lambda x: 3 * x**2),
    "vjp of vjp": ([vjp([0]), vjp([0])], lambda x: 6 * x),
    "jvp of vjp": ([vjp([0]), jvp([0])], lambda x: 6 * x),
    "vjp of jvp": ([jvp([0]), vjp([0])], lambda x: 6 * x),
    "jvp of jvp": ([jvp([0]), jvp([0])], lambda x: 6 * x),
    "vjp of vjp of vjp": ([vjp([0]), vjp([0]), vjp([0])], lambda x: 6 + 0 * x),
    "jvp of vjp of jvp": ([jvp([0]), vjp([0]), jvp([0])], lambda x: 6 + 0 * x),
}


@pytest.mark.parametrize("name", _DERIVED)
def test_derivatives_are_those_of_the_formula(host: Host, name: str) -> None:
    """Derivatives of derivatives are programs like any other, in both modes."""
    transforms, expected = _DERIVED[name]
    hosted = host(cubed)
    x = numbers(3)
    program = hosted.call(x, transforms=transforms)
    ones = [np.ones_like(x)] * (len(program.inputs) - 1)
    assert program.outputs == (program.inputs[0],)
    np.testing.assert_allclose(hosted.run(program, x, *ones)[0], expected(x), rtol=1e-5)


def test_batches_are_rows(host: Host) -> None:
    """vmap takes the axis that it is told of each input, and leaves the others to every row."""
    hosted = host(lambda np: lambda x, y: np.stack([(x * y).sum(), y[0]]))
    x, y = numbers(2, 3), numbers(2)
    program = hosted.call(y, y, transforms=[vmap([1, -1], 3)])
    seen = hosted.run(program, x, y)[0]
    np.testing.assert_allclose(seen, [[(row * y).sum(), y[0]] for row in x.T], rtol=1e-6)


@pytest.mark.parametrize("order", ["vmap of vjp", "vjp of vmap", "vmap of vmap of vjp"])
def test_derivatives_and_batches_compose(host: Host, order: str) -> None:
    """Batches of derivatives and derivatives of batches are the same here, row by row."""
    hosted = host(cubed)
    transforms = {
        "vmap of vjp": [vjp([0]), vmap([0, 0], 4)],
        "vjp of vmap": [vmap([0], 4), vjp([0])],
        "vmap of vmap of vjp": [vjp([0]), vmap([0, 0], 2), vmap([0, 0], 4)],
    }[order]
    x = numbers(4, 2, 3) if order.count("vmap") == 2 else numbers(4, 3)
    program = hosted.call(numbers(3), transforms=transforms)
    np.testing.assert_allclose(hosted.run(program, x, np.ones_like(x))[0], 3 * x**2, rtol=1e-6)


def test_a_batch_of_nothing_has_no_rows(host: Host) -> None:
    """A batch of size 0 has outputs of size 0."""
    hosted = host(cubed)
    program = hosted.call(numbers(3), transforms=[vmap([0], 0)])
    assert hosted.run(program, numbers(0, 3))[0].shape == (0, 3)


def test_complex_derivatives_are_linear(host: Host) -> None:
    """Cotangents of complex numbers are in the convention of jax.vjp: holomorphic functions multiply, not conjugate."""
    hosted = host(lambda np: lambda z: (z * z, np.conj(z)))
    z = (numbers(2) + 1j * numbers(2)[::-1]).astype(np.complex64)
    ct = np.array([1 + 2j, 3 - 1j], np.complex64)
    for transforms in ([vjp([0])], [vmap([0], 1), vjp([0])], [vjp([0]), vmap([0, 0], 1)]):
        batch = (lambda x: x[None]) if len(transforms) == 2 else (lambda x: x)
        program = hosted.call(z, transforms=transforms)
        np.testing.assert_allclose(hosted.run(program, batch(z), batch(ct))[0], batch(ct * 2 * z), rtol=1e-6)
    program = hosted.call(z, keep=[0])
    _, residual = hosted.run_keeping(program, z)
    pullback = hosted.pullback(program, [0], [1])
    np.testing.assert_allclose(hosted.run(pullback, ct, residual=residual)[0], ct.conj(), rtol=1e-6)
    pushed = hosted.run(hosted.call(z, transforms=[jvp([0], [0, 1])]), z, ct)
    np.testing.assert_allclose(pushed, [2 * z * ct, ct.conj()], rtol=1e-6)


def test_only_floats_have_derivatives(host: Host) -> None:
    """Integers, numbers and what is not there have no derivative, and a batch has an axis for each input."""
    hosted = host(lambda np: lambda x, i: (x * i, i))
    x, i = numbers(2), np.ones(2, np.int32)
    for transform in (vjp([1]), vjp([0], [1]), jvp([1])):
        with pytest.raises(SpecError, match="only floats have derivatives"):
            hosted.call(x, i, transforms=[transform])
    for transform in (vjp([2]), vjp([0], [2]), vjp([0, 0]), vmap([0], 2), vmap([0, 2], 2), pb.Transform()):
        with pytest.raises(ProtocolError):
            hosted.call(x, i, transforms=[transform])


# Residuals ---------------------------------------------------------------------------------------------------------


def test_a_residual_is_pulled_back_as_often_as_one_likes(host: Host) -> None:
    """A kept run gives the outputs, and its pullbacks the cotangents of what they are asked for, for any outputs."""
    hosted = host(lambda np: lambda x, y: (x * x * y, x.argmax(), y + 0, x * 0 + 1))
    x, y = numbers(3), numbers(3)[::-1].copy()
    program = hosted.call(x, y, keep=[0, 1])
    outputs, residual = hosted.run_keeping(program, x, y)
    np.testing.assert_allclose(outputs[0], x * x * y)
    assert program.residual_nbytes is not None
    ct = numbers(3)
    for _ in range(2):
        both = hosted.run(hosted.pullback(program, [0, 1]), ct, residual=residual)
        np.testing.assert_allclose(both, [ct * 2 * x * y, ct * x * x])
    np.testing.assert_allclose(hosted.run(hosted.pullback(program, [1]), ct, residual=residual)[0], ct * x * x)
    together = hosted.run(hosted.pullback(program, [1], [0, 2]), ct, 2 * ct, residual=residual)
    np.testing.assert_allclose(together[0], ct * x * x + 2 * ct)
    unrelated = hosted.run(hosted.pullback(program, [0], [2]), ct, residual=residual)
    assert unrelated[0].tolist() == [0.0] * 3


def test_a_residual_holds_for_the_values_of_its_own_run(host: Host) -> None:
    """Runs in between change nothing for the pullback of an earlier one."""
    hosted = host(lambda np: lambda x: np.exp(x))
    program = hosted.call(numbers(2), keep=[0])
    pullback = hosted.pullback(program, [0])
    kept = [(x, hosted.run_keeping(program, x)[1]) for x in (numbers(2), 2 * numbers(2))]
    for x, residual in kept:
        np.testing.assert_allclose(hosted.run(pullback, np.ones_like(x), residual=residual)[0], np.exp(x), rtol=1e-6)


def test_a_pullback_takes_only_what_was_kept(host: Host) -> None:
    """A pullback to an input that was not kept, or from an integer, is refused."""
    hosted = host(lambda np: lambda x, y: (x * y, x.argmax()))
    program = hosted.call(numbers(2), numbers(2), keep=[0])
    for wrt, outputs in (([1], [0]), ([0], [1])):
        with pytest.raises(ProtocolError, match="keeps what is needed"):
            hosted.pullback(program, wrt, outputs)
    assert hosted.call(numbers(2), numbers(2)).residual_nbytes is None


def test_a_transformed_call_can_keep_too(host: Host) -> None:
    """What is kept of a batch pulls back to the whole batch."""
    hosted = host(cubed)
    x = numbers(4, 3)
    program = hosted.call(numbers(3), transforms=[vmap([0], 4)], keep=[0])
    outputs, residual = hosted.run_keeping(program, x)
    np.testing.assert_allclose(outputs[0], x**3)
    made = hosted.run(hosted.pullback(program, [0]), np.ones_like(x), residual=residual)
    np.testing.assert_allclose(made[0], 3 * x**2)


# Parameters --------------------------------------------------------------------------------------------------------


def weighted(np: Any) -> Any:
    asarray = np.asarray
    params = {"inner": {"b": asarray([1.0, 1.0])}, "w": asarray([2.0, 3.0])}
    return lambda params, x: params["w"] * x + params["inner"]["b"], params


def test_parameters_are_named_by_path(host: Host) -> None:
    """The parameters of a pair have paths, and a program of their own."""
    hosted = host(weighted)
    assert [(p.path, p.trainable) for p in hosted.model.parameters] == [("inner.b", True), ("w", True)]
    program = hosted.runtime.prepare_parameters(hosted.model)
    assert [values.tolist() for values in hosted.run(program)] == [[1.0, 1.0], [2.0, 3.0]]
    assert hosted.model.arguments == ("x",)


def test_the_callers_parameters_or_the_workers_own(host: Host) -> None:
    """A call is made with the parameters that it brings, and otherwise with the worker's."""
    hosted = host(weighted)
    x = np.array([1.0, 2.0], np.float32)
    assert hosted.run(hosted.call(x), x)[0].tolist() == [3.0, 7.0]
    w, b = np.array([5.0, 5.0], np.float32), np.zeros(2, np.float32)
    assert hosted.run(hosted.call(x, parameters=True), b, w, x)[0].tolist() == [5.0, 10.0]
    program = hosted.call(x, parameters=True, keep=[0, 1])
    _, residual = hosted.run_keeping(program, b, w, x)
    made = hosted.run(hosted.pullback(program, [0, 1]), np.ones_like(x), residual=residual)
    assert [each.tolist() for each in made] == [[1.0, 1.0], [1.0, 2.0]]
    assert hosted.run(hosted.call(x), x)[0].tolist() == [3.0, 7.0]


# Threads -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize("transforms", [[jvp([0])], [vjp([0]), vmap([0, 0], 2)], [jvp([0]), vmap([0, 0], 2)]])
def test_threads_transform_at_once(host: Host, pool: ThreadPoolExecutor, transforms: list[pb.Transform]) -> None:
    """Derivatives and batches in several threads do not disturb each other."""
    hosted = host(cubed)
    program = hosted.call(numbers(3), transforms=transforms)
    start = threading.Barrier(4)

    def work(thread: int) -> bool:
        start.wait()
        for i in range(25):
            x = np.full((2, 3) if len(transforms) == 2 else 3, 1 + thread + i / 32, np.float32)
            if not np.allclose(hosted.run(program, x, np.ones_like(x))[0], 3 * x**2, rtol=1e-5):
                return False
        return True

    assert all(pool.map(work, range(4)))


def test_threads_have_their_own_results(host: Host, pool: ThreadPoolExecutor) -> None:
    """One program, and one model with parameters of each caller's own, serve several threads at once."""
    hosted = host(weighted)
    program = hosted.call(numbers(2), parameters=True, keep=[1])
    pullback = hosted.pullback(program, [1])
    start = threading.Barrier(4)

    def work(thread: int) -> bool:
        start.wait()
        for i in range(50):
            value = np.full(2, 100 * thread + i, np.float32)
            (y,), residual = hosted.run_keeping(program, value, value, value)
            (made,) = hosted.run(pullback, np.ones_like(value), residual=residual)
            if y.tolist() != (value * value + value).tolist() or made.tolist() != value.tolist():
                return False
        return True

    assert all(pool.map(work, range(4)))
