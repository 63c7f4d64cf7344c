"""The contract of a runtime: the same facts of JAX's and of torch's, on every lane.

So by two clients, torch's and JAX's, on three lanes each; no framework is used on the client's
side. Every value is small, and every function has a derivative that can be written down.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client import Session, connect
from bridge_client.inproc import host
from bridge_server.jax_runtime import JaxRuntime
from bridge_server.runtime import Options, Runtime
from bridge_server.torch_runtime import TorchRuntime
from bridge_wire import trees
from bridge_wire.dtypes import BY_NAME, NEEDS_X64
from bridge_wire.errors import (
    CallerError,
    DTypeError,
    ProtocolError,
    RemoteModelError,
    SpecError,
    TargetError,
)
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.specs import Spec
from tests.contract import models
from tests.runtimes import Hosted, Served, aligned, jvp, placed, vjp, vmap

Serve = Callable[[str], Served]
_ARRAYS = {"jax": jnp, "torch": torch}


@pytest.fixture(params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    """Each of the frameworks."""
    return request.param


@pytest.fixture(params=["inproc", "local", "grpc"])
def lane(request: pytest.FixtureRequest) -> str:
    """Each of the lanes."""
    return request.param


@pytest.fixture(scope="module")
def of_this_process() -> Iterator[dict[str, Session]]:
    """A session with the models of each framework in this process, which compiles them once for
    all tests."""
    made = {
        name: {each: make(arrays) for each, make in models.MODELS.items()}
        for name, arrays in _ARRAYS.items()
    }
    with (
        host(jax_model=made["jax"]) as jax_session,
        host(torch_model=made["torch"]) as torch_session,
    ):
        yield {"jax": jax_session, "torch": torch_session}


@pytest.fixture
def session(
    framework: str,
    lane: str,
    jax_worker: Session,
    torch_worker: Session,
    of_this_process: dict[str, Session],
) -> Iterator[Session]:
    """A session with the models of each framework on each lane."""
    if lane == "inproc":
        yield of_this_process[framework]
        return
    with connect(
        {"jax": jax_worker, "torch": torch_worker}[framework].address, lane=lane
    ) as session:
        yield session


@pytest.fixture
def serve(session: Session) -> Serve:
    """Gives the models of that session by name."""
    return lambda name: Served(
        session, name if session.lane == "inproc" else f"contract.{name}"
    )


@pytest.fixture(scope="module")
def runtimes() -> dict[str, Runtime]:
    """One runtime of each framework; that of JAX leaves this process's x64 as it is."""
    return {
        "jax": JaxRuntime(Options(x64=jax.config.jax_enable_x64)),
        "torch": TorchRuntime(Options()),
    }


def numbers(*shape: int) -> np.ndarray:
    """Return small numbers, none of them zero."""
    return (np.arange(np.prod(shape)).reshape(shape) % 7 + 1).astype(np.float32) / 4


# Memory -------------------------------------------------------------------------------------------


def test_a_view_shows_what_the_memory_holds_at_each_run(
    framework: str, runtimes: dict[str, Runtime]
) -> None:
    """A view is no copy: a run reads what was written since."""
    hosted = Hosted(runtimes[framework], lambda x: x * x * x)
    array = placed(numbers(3))
    program = hosted.call(array)
    view = hosted.view(array, program.inputs[0])
    for value in (2.0, 3.0):
        array[:] = value
        outputs, _ = program.run([view], None)
        assert hosted.written(outputs[0], program.outputs[0]).tolist() == [value**3] * 3


@pytest.mark.parametrize("dtype", BY_NAME)
def test_every_type_passes_both_ways(serve: Serve, framework: str, dtype: str) -> None:
    """Arrays of every type come as they are and go as they came, bit by bit; JAX without x64
    says what it lacks."""
    spec = Spec(BY_NAME[dtype], (5,))
    served = serve("same")
    if framework == "jax" and dtype in NEEDS_X64 and not served.session.x64:
        with pytest.raises(DTypeError, match="without x64"):
            served.call(spec)
        return
    program = served.call(spec)
    assert program.outputs == (spec,)
    memory = aligned(spec.nbytes)
    memory[:] = np.arange(spec.nbytes) % 2  # good booleans too
    assert served.run(program, memory)[0].tobytes() == memory.tobytes()


@pytest.mark.parametrize("number", [3, 2.5, 1 + 2j])
def test_a_python_number_is_one_again(serve: Serve, number: complex) -> None:
    """A weak input arrives as a number whose type yields to the array's."""
    served = serve("product")
    x = numbers(2).astype(np.complex64 if isinstance(number, complex) else np.float32)
    program = served.call(x, number)
    assert program.outputs[0].dtype is program.inputs[0].dtype
    assert (
        served.run(program, x, number)[0].tolist()
        == (x * x.dtype.type(number)).tolist()
    )


def test_scalars_and_empty_arrays_pass(serve: Serve) -> None:
    """Arrays of no dimension and of no element are inputs and outputs like any other."""
    served = serve("cubed")
    for x in (np.float32(2.0), np.zeros((0, 3), np.float32)):
        assert served.run(served.call(x), x)[0].tolist() == (x**3).tolist()


def test_outputs_are_written_row_by_row_whatever_their_layout(serve: Serve) -> None:
    """Transposed and broadcast outputs lie dense in the client's memory."""
    served = serve("transposed")
    x = numbers(2, 4)
    transposed, broadcast = served.run(served.call(x), x)
    assert transposed.tolist() == x.T.tolist()
    assert broadcast.tolist() == np.broadcast_to(x[0], (3, 4)).tolist()


# Calls --------------------------------------------------------------------------------------------


def test_structures_pass_both_ways(serve: Serve) -> None:
    """Dicts, lists and None among the arguments are there for the model, and its result's
    structure is told."""
    served = serve("nested")
    mapping = pb.Tree.Mapping(
        keys=[pb.Value(text="a"), pb.Value(text="b")],
        items=[
            pb.Tree(leaf=pb.Tree.Leaf()),
            pb.Tree(
                list=pb.Tree.Sequence(
                    items=[
                        pb.Tree(leaf=pb.Tree.Leaf()),
                        pb.Tree(value=pb.Value(none=True)),
                    ]
                )
            ),
        ],
    )
    items = [pb.Tree(dict=mapping), pb.Tree(value=pb.Value(text="four"))]
    x, y = numbers(2), numbers(3)
    program = served.call(x, y, tree=pb.Tree(tuple=pb.Tree.Sequence(items=items)))
    assert trees.leaf_paths(program.result.tree, "result") == [
        "result['kept'][0]",
        "result['sum']",
    ]
    doubled, total = served.run(program, x, y)
    assert (doubled.tolist(), total.tolist()) == ((x * 2).tolist(), (y + 4).tolist())


def test_an_exception_of_the_model_is_its_own(serve: Serve) -> None:
    """What a model raises comes with its type, its text, the call, and a traceback that begins
    in the model."""
    with pytest.raises(
        RemoteModelError, match=r"nothing of shape \(2,\) here"
    ) as caught:
        serve("refusing").call(numbers(2))
    assert caught.value.remote_type == "builtins.LookupError"
    assert "float32[2]" in str(caught.value)
    first, second = caught.value.remote_traceback.splitlines()[:2]
    assert first.startswith("Traceback")
    assert models.__file__ in second
    assert "in refusing" in second


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ending", "SystemExit"),
        ("interrupted", "KeyboardInterrupt"),
        ("speechless", "Speechless"),
    ],
)
def test_whatever_a_model_raises_is_its_own(
    serve: Serve, lane: str, name: str, kind: str
) -> None:
    """Neither what ends threads without a word nor what has no text leaves a caller without an
    answer."""
    is_ctrl_c = name == "interrupted" and lane == "inproc"
    with pytest.raises(KeyboardInterrupt if is_ctrl_c else RemoteModelError) as caught:
        serve(name).call(numbers(2))
    assert is_ctrl_c or caught.value.remote_type.endswith(kind)


def test_what_is_no_model_is_refused(
    framework: str, runtimes: dict[str, Runtime]
) -> None:
    """A target that cannot be called is a TargetError that says what it is."""
    with pytest.raises(TargetError, match=r"'model' is a builtins\.str"):
        Hosted(runtimes[framework], "a text")


# Derivatives --------------------------------------------------------------------------------------

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
def test_derivatives_are_those_of_the_formula(serve: Serve, name: str) -> None:
    """Derivatives of derivatives are programs like any other, in both modes."""
    transforms, expected = _DERIVED[name]
    served = serve("cubed")
    x = numbers(3)
    program = served.call(x, transforms=transforms)
    ones = [np.ones_like(x)] * (len(program.inputs) - 1)
    assert program.outputs == (program.inputs[0],)
    np.testing.assert_allclose(
        served.run(program, x, *ones)[0], expected(x), rtol=1e-5, atol=1e-6
    )


def test_batches_are_rows(serve: Serve) -> None:
    """vmap takes the axis that it is told of each input, and leaves the others to every row."""
    served = serve("dotted")
    x, y = numbers(2, 3), numbers(2)
    program = served.call(y, y, transforms=[vmap([1, -1], 3)])
    seen = served.run(program, x, y)[0]
    np.testing.assert_allclose(
        seen, [[(row * y).sum(), y[0]] for row in x.T], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("order", ["vmap of vjp", "vjp of vmap", "vmap of vmap of vjp"])
def test_derivatives_and_batches_compose(serve: Serve, order: str) -> None:
    """Batches of derivatives and derivatives of batches are the same here, row by row."""
    served = serve("cubed")
    transforms = {
        "vmap of vjp": [vjp([0]), vmap([0, 0], 4)],
        "vjp of vmap": [vmap([0], 4), vjp([0])],
        "vmap of vmap of vjp": [vjp([0]), vmap([0, 0], 2), vmap([0, 0], 4)],
    }[order]
    x = numbers(4, 2, 3) if order.count("vmap") == 2 else numbers(4, 3)
    program = served.call(numbers(3), transforms=transforms)
    np.testing.assert_allclose(
        served.run(program, x, np.ones_like(x))[0], 3 * x**2, rtol=1e-6, atol=1e-6
    )


def test_a_batch_of_nothing_has_no_rows(serve: Serve) -> None:
    """A batch of size 0 has outputs of size 0."""
    served = serve("cubed")
    program = served.call(numbers(3), transforms=[vmap([0], 0)])
    assert served.run(program, numbers(0, 3))[0].shape == (0, 3)


def test_complex_derivatives_are_linear(serve: Serve) -> None:
    """Cotangents of complex numbers are in the convention of jax.vjp: holomorphic functions
    multiply, not conjugate."""
    served = serve("holomorphic")
    z = (numbers(2) + 1j * numbers(2)[::-1]).astype(np.complex64)
    ct = np.array([1 + 2j, 3 - 1j], np.complex64)
    for transforms in (
        [vjp([0])],
        [vmap([0], 1), vjp([0])],
        [vjp([0]), vmap([0, 0], 1)],
    ):
        batch = (lambda x: x[None]) if len(transforms) == 2 else (lambda x: x)
        program = served.call(z, transforms=transforms)
        np.testing.assert_allclose(
            served.run(program, batch(z), batch(ct))[0],
            batch(ct * 2 * z),
            rtol=1e-6,
            atol=1e-6,
        )
    program = served.call(z, keep=[0])
    _, residual = served.run_keeping(program, z)
    pullback = served.pullback(program, [0], [1])
    np.testing.assert_allclose(
        served.run(pullback, ct, residual=residual)[0], ct.conj(), rtol=1e-6, atol=1e-6
    )
    pushed = served.run(served.call(z, transforms=[jvp([0], [0, 1])]), z, ct)
    np.testing.assert_allclose(pushed, [2 * z * ct, ct.conj()], rtol=1e-6, atol=1e-6)


def test_only_floats_have_derivatives(serve: Serve) -> None:
    """Integers, numbers and what is not there have no derivative, and a batch has an axis for
    each input."""
    served = serve("indexed")
    x, i = numbers(2), np.ones(2, np.int32)
    for transform in (vjp([1]), vjp([0], [1]), jvp([1])):
        with pytest.raises(SpecError, match="only floats have derivatives"):
            served.call(x, i, transforms=[transform])
    for transform in (
        vjp([2]),
        vjp([0], [2]),
        vjp([0, 0]),
        vmap([0], 2),
        vmap([0, 2], 2),
        pb.Transform(),
    ):
        with pytest.raises(ProtocolError):
            served.call(x, i, transforms=[transform])


# Residuals ----------------------------------------------------------------------------------------


def test_a_residual_is_pulled_back_as_often_as_one_likes(serve: Serve) -> None:
    """A kept run gives the outputs, and its pullbacks the cotangents of what they are asked for,
    for any outputs."""
    served = serve("various")
    x, y = numbers(3), numbers(3)[::-1].copy()
    program = served.call(x, y, keep=[0, 1])
    outputs, residual = served.run_keeping(program, x, y)
    np.testing.assert_allclose(outputs[0], x * x * y)
    ct = numbers(3)
    for _ in range(2):
        both = served.run(served.pullback(program, [0, 1]), ct, residual=residual)
        np.testing.assert_allclose(both, [ct * 2 * x * y, ct * x * x])
    np.testing.assert_allclose(
        served.run(served.pullback(program, [1]), ct, residual=residual)[0], ct * x * x
    )
    together = served.run(
        served.pullback(program, [1], [0, 2]), ct, 2 * ct, residual=residual
    )
    np.testing.assert_allclose(together[0], ct * x * x + 2 * ct)
    unrelated = served.run(served.pullback(program, [0], [2]), ct, residual=residual)
    assert unrelated[0].tolist() == [0.0] * 3


def test_a_residual_holds_for_the_values_of_its_own_run(serve: Serve) -> None:
    """Runs in between change nothing for the pullback of an earlier one."""
    served = serve("exp")
    program = served.call(numbers(2), keep=[0])
    pullback = served.pullback(program, [0])
    kept = [
        (x, served.run_keeping(program, x)[1]) for x in (numbers(2), 2 * numbers(2))
    ]
    for x, residual in kept:
        np.testing.assert_allclose(
            served.run(pullback, np.ones_like(x), residual=residual)[0],
            np.exp(x),
            rtol=1e-6,
            atol=1e-6,
        )


def test_a_pullback_takes_only_what_was_kept(serve: Serve) -> None:
    """A pullback to an input that was not kept, or from an integer, is refused."""
    served = serve("various")
    program = served.call(numbers(2), numbers(2), keep=[0])
    for wrt, outputs in (([1], [0]), ([0], [1])):
        with pytest.raises(ProtocolError, match="residuals serve"):
            served.pullback(program, wrt, outputs)


def test_a_transformed_call_can_keep_too(serve: Serve) -> None:
    """What is kept of a batch pulls back to the whole batch."""
    served = serve("cubed")
    x = numbers(4, 3)
    program = served.call(numbers(3), transforms=[vmap([0], 4)], keep=[0])
    outputs, residual = served.run_keeping(program, x)
    np.testing.assert_allclose(outputs[0], x**3)
    made = served.run(served.pullback(program, [0]), np.ones_like(x), residual=residual)
    np.testing.assert_allclose(made[0], 3 * x**2)


# Parameters ---------------------------------------------------------------------------------------


def test_parameters_are_named_by_path(serve: Serve) -> None:
    """The parameters of a pair have paths, and a program of their own."""
    served = serve("weighted")
    assert [(p.path, p.trainable) for p in served.model.parameters] == [
        ("inner.b", True),
        ("w", True),
    ]
    program = served.parameters()
    assert [values.tolist() for values in served.run(program)] == [
        [1.0, 1.0],
        [2.0, 3.0],
    ]
    assert served.model.arguments == ("x",)


def test_the_callers_parameters_or_the_workers_own(serve: Serve) -> None:
    """A call is made with the parameters that it brings, and otherwise with the worker's."""
    served = serve("weighted")
    x = np.array([1.0, 2.0], np.float32)
    assert served.run(served.call(x), x)[0].tolist() == [3.0, 7.0]
    w, b = np.array([5.0, 5.0], np.float32), np.zeros(2, np.float32)
    assert served.run(served.call(x, parameters=True), b, w, x)[0].tolist() == [
        5.0,
        10.0,
    ]
    program = served.call(x, parameters=True, keep=[0, 1])
    _, residual = served.run_keeping(program, b, w, x)
    made = served.run(
        served.pullback(program, [0, 1]), np.ones_like(x), residual=residual
    )
    assert [each.tolist() for each in made] == [[1.0, 1.0], [1.0, 2.0]]
    assert served.run(served.call(x), x)[0].tolist() == [3.0, 7.0]


# Methods ------------------------------------------------------------------------------------------


def test_public_methods_are_listed_with_their_arguments(serve: Serve) -> None:
    """An object's methods are those of its class without an underscore; properties and nested
    classes are none."""
    model = serve("pendulum").model
    assert model.methods == ("remembering", "reset", "scaled", "step")
    assert model.arguments_of("step") == ("state", "action")
    assert model.arguments_of("scaled") == ("x", "factor")
    assert model.parameters == () and model.arguments == ()
    assert serve("cubed").model.methods == ("__call__",)


def test_a_method_is_called_by_its_name(serve: Serve) -> None:
    """Each method of an object has a value, derivatives, residuals and batches of its own."""
    served = serve("pendulum")
    state, action = numbers(3), numbers(3) + 1
    assert (
        served.run(served.call(state, method="reset"), state)[0].tolist() == [1.0] * 3
    )
    program = served.call(state, action, method="step", keep=[0])
    (after, reward), residual = served.run_keeping(program, state, action)
    np.testing.assert_allclose(after, state + action)
    np.testing.assert_allclose(reward, 2 * (state * action).sum(), rtol=1e-6)
    pullback = served.pullback(program, [0], [1])
    (made,) = served.run(pullback, np.float32(1), residual=residual)
    np.testing.assert_allclose(made, 2 * action)


@pytest.mark.parametrize("transform", [vjp([1], [1]), jvp([1], [1])])
def test_a_method_is_transformed(serve: Serve, transform: pb.Transform) -> None:
    """Derivatives and batches are those of the method."""
    served = serve("pendulum")
    state, action = numbers(2, 3), numbers(2, 3) + 1
    transforms = [transform, vmap([0, 0, 0], 2)]
    program = served.call(state[0], action[0], method="step", transforms=transforms)
    if transform.HasField("vjp"):
        (made,) = served.run(program, state, action, np.ones(2, np.float32))
        np.testing.assert_allclose(made, 2 * state)
    else:
        (made,) = served.run(program, state, action, np.ones_like(action))
        np.testing.assert_allclose(made, 2 * state.sum(1))


@pytest.mark.parametrize(
    "name",
    [
        "_reward",
        "__init__",
        "__class__",
        "__getattribute__",
        "limit",
        "gravity",
        "Config",
        "step.__globals__",
        "steps",
        "step ",
        "x" * 10_000,
    ],
)
def test_other_attributes_are_refused_on_the_worker(serve: Serve, name: str) -> None:
    """A call that names anything but a public method is a CallerError that lists the methods,
    whatever the client checks."""
    served = serve("pendulum")
    listed = r"\['remembering', 'reset', 'scaled', 'step'\]"
    with pytest.raises(CallerError, match=listed) as raised:
        served.call(numbers(3), method=name)
    assert len(str(raised.value)) < 400
    with pytest.raises(CallerError, match=listed):
        served.model.arguments_of(name)


def test_an_object_that_cannot_be_called_names_its_methods(serve: Serve) -> None:
    """A call of an object without `__call__`, or of a function's method, is a CallerError."""
    for method in ("", "__call__"):
        with pytest.raises(CallerError, match=r"itself cannot be called.*'step'"):
            serve("pendulum").call(numbers(3), method=method)
    with pytest.raises(CallerError, match=r"no public method 'step'.*\['__call__'\]"):
        serve("cubed").call(numbers(3), method="step")
    served = serve("cubed")
    called = served.call(numbers(2), method="__call__")
    assert served.run(called, numbers(2))[0].tolist() == (numbers(2) ** 3).tolist()


def test_a_method_leaves_its_object_as_it_was(serve: Serve) -> None:
    """Attributes that a call sets are dropped, for the same and for other signatures."""
    served = serve("pendulum")
    for x in (numbers(3), numbers(3) + 1, numbers(2, 2)):
        program = served.call(x, method="remembering", keep=[0])
        (seen,), _ = served.run_keeping(program, x)
        assert seen.tolist() == x.tolist()


def test_a_bound_method_is_a_model(serve: Serve) -> None:
    """A bound method as the target is that method, and gives access to no other."""
    served = serve("step")
    x = numbers(3)
    assert served.model.methods == ("__call__",)
    after, _ = served.run(served.call(x, x), x, x)
    np.testing.assert_allclose(after, 2 * x)


def test_methods_have_fingerprints_of_their_own(
    framework: str, runtimes: dict[str, Runtime]
) -> None:
    """Two methods with the same signature are not one model after a restart."""
    hosted = Hosted(runtimes[framework], models.Pendulum())
    x = numbers(3)
    prints = {
        hosted.runtime.fingerprint(hosted.model, hosted.described(x, x, method=method))
        for method in ("step", "scaled")
    }
    assert len(prints) == 2


# Threads ------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.mark.parametrize(
    "transforms", [[jvp([0])], [vjp([0]), vmap([0, 0], 2)], [jvp([0]), vmap([0, 0], 2)]]
)
def test_threads_transform_at_once(
    serve: Serve, pool: ThreadPoolExecutor, transforms: list[pb.Transform]
) -> None:
    """Derivatives and batches in several threads do not disturb each other."""
    served = serve("cubed")
    program = served.call(numbers(3), transforms=transforms)
    start = threading.Barrier(4)

    def work(thread: int) -> bool:
        start.wait()
        for i in range(25):
            x = np.full(
                (2, 3) if len(transforms) == 2 else 3, 1 + thread + i / 32, np.float32
            )
            if not np.allclose(
                served.run(program, x, np.ones_like(x))[0],
                3 * x**2,
                rtol=1e-5,
                atol=1e-6,
            ):
                return False
        return True

    assert all(pool.map(work, range(4)))


def test_threads_have_their_own_results(serve: Serve, pool: ThreadPoolExecutor) -> None:
    """One program, and one model with parameters of each caller's own, serve several threads at
    once."""
    served = serve("weighted")
    program = served.call(numbers(2), parameters=True, keep=[1])
    pullback = served.pullback(program, [1])
    start = threading.Barrier(4)

    def work(thread: int) -> bool:
        start.wait()
        for i in range(50):
            value = np.full(2, 100 * thread + i, np.float32)
            (y,), residual = served.run_keeping(program, value, value, value)
            (made,) = served.run(pullback, np.ones_like(value), residual=residual)
            if (
                y.tolist() != (value * value + value).tolist()
                or made.tolist() != value.tolist()
            ):
                return False
        return True

    assert all(pool.map(work, range(4)))
