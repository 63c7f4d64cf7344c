"""Torch models in a worker without jax, called from here and compared with themselves called
here."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError, SpecError, StructureError
from tests.conftest import eventually
from tests.server.torch_server import models
from tests.server.torch_server.conftest import Remote
from tests.workers import Worker, serving, slabs_mapped


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the same numbers each time, away from zero."""
    return (
        torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
        + 0.2
    )


def assert_same(seen: object, expected: object) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)


def summed(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sum()


# The worker ---------------------------------------------------------------------------------------


def test_the_worker_says_what_it_is(session: Session) -> None:
    """It has 64-bit types, and its models have docstrings, arguments and parameters with torch's
    names."""
    assert (session.framework, session.x64) == ("torch", True)
    model = session.models["tied"]
    assert model.arguments == ("x",)
    assert [info.path for info in model.parameters] == ["scale", "encoder.weight"]
    assert session.models["sine"].doc == "Twice the sine."


def test_variables_factories_and_warm_ups(tmp_path: Path) -> None:
    """What the command line takes for JAX models it takes for torch models."""
    env = {
        "BRIDGE_TORCH_MODEL": "made=tests.server.torch_server.models:square_factory",
        "BRIDGE_FACTORY": "1",
    }
    with serving(
        tmp_path,
        "--listen",
        f"unix:{tmp_path}/w.sock",
        "--warmup=float64[3]",
        venv=".venv-torch",
        env=env,
    ) as worker:
        assert worker.ready_line["models"] == "made"
        assert "warming up float64[3]" in worker.stderr
        with connect(worker.address) as session:
            assert_same(RemoteJaxFunction(session)(rand(3)), rand(3) ** 2)


# Derivatives --------------------------------------------------------------------------------------

TRANSFORMS: dict[
    str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], object]]
] = {
    "forward": lambda f: f,
    "grad": lambda f: grad(summed(f)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "vmap": lambda f: vmap(f, in_dims=1, out_dims=1),
    "hessian": lambda f: hessian(summed(f)),
    "vmap of grad": lambda f: lambda x: vmap(grad(summed(f)))(torch.stack([x, 2 * x])),
    "hessian of vmap": lambda f: (
        lambda x: hessian(summed(vmap(f)))(torch.stack([x, 2 * x]))
    ),
    "third derivative": lambda f: jacfwd(jacrev(grad(summed(f)))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_torchs(remote: Remote, transform: str) -> None:
    """Each derivative and batch of a remote function is that of the same function here."""
    x = rand(3, 2) if transform == "vmap" else rand(3)
    made = TRANSFORMS[transform]
    assert_same(made(remote("smooth"))(x), made(models.smooth)(x))


def test_complex_functions_have_torchs_gradients(remote: Remote) -> None:
    """Gradients of complex functions keep torch's convention on their way to the worker and
    back."""
    z, w = (
        torch.complex(rand(3), k * rand(3).flip(0)).requires_grad_() for k in (1, 2)
    )
    f = remote("complex_power")
    assert_same(f(z, w), models.complex_power(z, w))
    seen = torch.autograd.grad(f(z, w).abs().sum(), (z, w))
    assert_same(
        seen, torch.autograd.grad(models.complex_power(z, w).abs().sum(), (z, w))
    )


def test_structures_pass_both_ways(remote: Remote) -> None:
    """Dicts, lists, numbers and None go to the worker and come back."""
    tree = {"x": rand(2, 3), "weights": [rand(3, 3).requires_grad_(), "unused"]}
    seen, expected = (
        remote("structured")(tree, scale=2.0),
        models.structured(tree, scale=2.0),
    )
    assert_same(seen["hidden"], expected["hidden"])
    assert_same(seen["aux"], expected["aux"])
    (mine,), (theirs,) = (
        torch.autograd.grad(y["aux"][0], tree["weights"][:1]) for y in (seen, expected)
    )
    assert_same(mine, theirs)


@pytest.mark.parametrize("transform", ["grad", "jacfwd", "vmap", "hessian"])
def test_old_style_functions_are_transformed_too(
    remote: Remote, transform: str
) -> None:
    """What torch.func cannot trace here it need not: the worker differentiates and batches it by
    autograd alone."""
    x = rand(3, 2) if transform == "vmap" else rand(3)
    made = TRANSFORMS[transform]
    assert_same(made(remote("old_style"))(x), made(lambda x: x.sin() ** 3)(x))


# Modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet", (2, 3, 8, 8)), ("vit", (2, 3, 8, 8)), ("tied", (3, 4))],
)
def test_modules_train_as_they_do_here(
    remote: Remote, name: str, shape: tuple[int, ...]
) -> None:
    """The remote twin of a module has its parameters by name, and the same gradients."""
    twin, f = copy.deepcopy(getattr(models, name)), remote(name)
    x, target = rand(*shape), None
    for module in (twin, f):
        y = module(x)
        target = rand(*y.shape)
        ((y - target) ** 2).sum().backward()
    expected = {
        path: each.grad for path, each in twin.named_parameters() if each.requires_grad
    }
    seen = {path: each.grad for path, each in f.named_parameters()}
    assert seen.keys() == expected.keys()
    assert_same(seen, expected)


def test_statistics_are_written_back(remote: Remote) -> None:
    """In training mode a mutable function's buffers follow the batches as the module's would."""
    twin, f = copy.deepcopy(models.normed), remote("normed", mutable=True)
    for scale in (1.0, 2.0):
        assert_same(f(scale * rand(6, 3)), twin(scale * rand(6, 3)))
    assert_same(dict(f.named_buffers()), dict(twin.named_buffers()))


def test_dropout_follows_this_sides_generator(remote: Remote) -> None:
    """With `rngs` the seed set here decides what is dropped there, and the gradient is that of
    the same mask."""
    f, x = remote("dropped", rngs="dropout"), rand(8, 4).requires_grad_()
    torch.manual_seed(3)
    first, second = f(x), f(x)
    torch.manual_seed(3)
    assert_same(f(x), first)
    assert (first != second).any()
    (seen,) = torch.autograd.grad(first.sum(), x)
    assert_same(seen, (2.0 * (first != 0).double()) @ models.dropped[0].weight)


# Code that is no function -------------------------------------------------------------------------


def test_in_place_code_leaves_the_callers_tensors_alone(
    remote: Remote, session: Session
) -> None:
    """A model that writes into its input does not write into the caller's tensor, not even one
    in shared memory."""
    f, g = remote("in_place"), remote("sine")
    x = g(rand(4))  # an output of the session, so that it is passed without a copy
    before, copied = x.clone(), session.stats()["bytes_copied"]
    f(x)
    assert session.stats()["bytes_copied"] - copied == x.nbytes  # of the output alone
    assert_same(x, before)


def test_outputs_that_cannot_be_returned_are_named(remote: Remote) -> None:
    """A shape that changes, and a number that follows from values, are errors that name the
    model."""
    growing = remote("growing")
    with pytest.raises(SpecError, match=r"the result\['found'\] of model 'growing'"):
        growing(rand(3))
    with pytest.raises(StructureError, match=r"'summed'.*return them as tensors"):
        remote("summed")(rand(3))


def test_numbers_of_a_result_are_static(remote: Remote) -> None:
    """A number that follows from shapes is part of the result's structure."""
    assert remote("numeral")(rand(3))["count"] == 3


@pytest.fixture(scope="module")
def frugal_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """A worker that keeps no residual of more than a byte."""
    hosted = [
        f"--torch-model=tests.server.torch_server.models:{name}"
        for name in ("smooth", "recurrent", "in_place")
    ]
    args = ["--listen", "127.0.0.1:0", "--residual-bytes", "1"]
    with serving(
        tmp_path_factory.mktemp("frugal"), *args, *hosted, venv=".venv-torch"
    ) as worker:
        yield worker


def test_an_evicted_residual_is_recomputed(frugal_worker: Worker) -> None:
    """Past the byte budget the oldest graph is dropped, and its backward runs the VJP on the
    inputs."""
    with connect(frugal_worker.address) as session:
        f, x = RemoteJaxFunction(session, name="smooth"), rand(3).requires_grad_()
        (seen,) = torch.autograd.grad(f(x).sum(), x)
        assert session.stats()["residuals"] == 0
    (expected,) = torch.autograd.grad(models.smooth(x).sum(), x)
    assert_same(seen, expected)


def test_a_session_that_ended_leaves_nothing_mapped(frugal_worker: Worker) -> None:
    """Neither graphs nor modules nor transforms hold a client's memory when it has gone."""
    with connect(frugal_worker.address) as session:
        for name in ("smooth", "in_place"):
            f, x = RemoteJaxFunction(session, name=name), rand(3).requires_grad_()
            f(x).sum().backward()
            jacfwd(f)(x.detach())
            vmap(f)(rand(2, 3))
        RemoteJaxFunction(session, name="recurrent")(rand(1, 2, 3))[0].sum().backward()
        assert slabs_mapped(frugal_worker.pid) > 0
    assert eventually(lambda: slabs_mapped(frugal_worker.pid) == 0)


def test_sessions_and_threads_run_side_by_side(torch_worker: Session) -> None:
    """Threads on two sessions train one hosted module, each with its own weights, and get their
    own gradients."""
    start = threading.Barrier(4)

    def train(session: Session, thread: int) -> bool:
        f, twin = RemoteJaxFunction(session, name="tied"), copy.deepcopy(models.tied)
        state = {"encoder.weight": (thread + 1) * twin.encoder.weight.detach()}
        start.wait()
        for i in range(20):
            x = (i + 1) * rand(3, 4)
            weight = state["encoder.weight"].clone().requires_grad_()
            (seen,) = torch.autograd.grad(
                functional_call(f, {"encoder.weight": weight}, (x,)).sum(), weight
            )
            mine = {"encoder.weight": weight, "decoder.weight": weight}
            (expected,) = torch.autograd.grad(
                functional_call(twin, mine, (x,)).sum(), weight
            )
            if not torch.allclose(seen, expected, rtol=1e-10, atol=1e-10):
                return False
        return True

    with (
        connect(torch_worker.address) as first,
        connect(torch_worker.address) as second,
        ThreadPoolExecutor(4) as pool,
    ):
        sessions = [first, second] * 2
        assert all(pool.map(train, sessions, range(4)))


def test_an_exception_of_the_model_is_its_own(remote: Remote) -> None:
    """What a model raises on its values arrives with its traceback, which begins in the model."""
    with pytest.raises(RemoteModelError, match="not to my taste") as caught:
        remote("failing")(rand(2))
    assert "in failing" in caught.value.remote_traceback.splitlines()[1]


def test_types_of_every_kind_pass(remote: Remote) -> None:
    """Integers stay integers, and every float keeps its width."""
    f = remote("square")
    for dtype in (
        torch.int64,
        torch.uint8,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.complex64,
    ):
        x = torch.tensor([1, 2, 3], dtype=dtype)
        assert_same(f(x), x * x)
