"""RemoteJaxFunction with a JAX model of the same process: what is shared, what is copied, what
follows JAX's settings.

What holds of every session is in tests/contract/test_session_contract.py.
"""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import (
    CallerError,
    DTypeError,
    RemoteModelError,
    TargetError,
    UnknownModel,
)
from tests.client.torch_client.functions import affine
from tests.conftest import eventually
from tests.workers import run_program

CALLS = 3


def sine(x):
    """Twice the sine."""
    return jnp.sin(x) * 2


def test_gradients_are_those_of_torch() -> None:
    """A JAX function in this process has the value and the gradient of the same function in
    torch."""
    x = torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(RemoteJaxFunction(sine)(x).square().sum(), x)
    (expected,) = torch.autograd.grad((x.sin() * 2).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_there_is_neither_a_worker_nor_a_thread() -> None:
    """The session of a function says where it runs; nothing is started for it, and what is kept
    goes with the graph."""
    threads = threading.active_count()
    f = RemoteJaxFunction(sine)
    assert (f.session.lane, f.session.memory, f.session.framework) == (
        "inproc",
        "dlpack",
        "jax",
    )
    x = torch.randn(64, requires_grad=True)
    y = f(x)
    assert f.session.stats()["residuals"] == 1
    y.backward(torch.ones(64))
    del y
    stats = f.session.stats()
    assert (
        stats["residuals"],
        stats["residual_bytes"],
        stats["calls"],
        stats["fallbacks"],
    ) == (
        0,
        0,
        2,
        0,
    )
    # What would have told of a slow compilation is on its way out.
    assert eventually(lambda: threading.active_count() == threads)


def test_nothing_is_copied() -> None:
    """Aligned row-major tensors are read where they lie, and outputs and gradients lie where XLA
    made them."""
    f = RemoteJaxFunction(sine)
    x, cotangent = torch.randn(1024, requires_grad=True), torch.ones(1024)
    for _ in range(CALLS):
        f(x).backward(cotangent)
    assert f.session.stats()["bytes_copied"] == 0
    f(x.detach()[1:])
    assert f.session.stats()["bytes_copied"] == 1023 * 4


@pytest.mark.parametrize("parameters", ["client", "worker"])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_outputs_share_memory_with_nothing(parameters: str, is_recorded: bool) -> None:
    """Changing an output in place changes no input, no parameter, no other output and no
    residual."""
    weight = np.ones((64,), np.float32)
    constant = jnp.ones(64)

    def model(params, x):
        return x, x, params, constant, jnp.exp(x)

    f = RemoteJaxFunction((model, weight), parameters=parameters)
    x = torch.zeros(64, requires_grad=is_recorded)
    outputs = f(x)
    gradient_of = outputs[4].sum()
    with torch.no_grad():
        for output in outputs:
            output.fill_(7.0)
    assert all(float(y.detach().sum()) == 64 * 7.0 for y in outputs)
    assert float(x.detach().sum()) == 0.0
    if is_recorded:
        assert torch.autograd.grad(gradient_of, x)[0].eq(1.0).all()
    assert [float(y.detach()[0]) for y in f(x)] == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_inputs_are_read_anew() -> None:
    """A tensor that was changed in place between two calls is read as it is now."""
    f = RemoteJaxFunction(sine)
    x = torch.zeros(64)
    assert float(f(x).sum()) == 0.0
    x.fill_(np.pi / 2)
    torch.testing.assert_close(f(x), torch.full((64,), 2.0))


def test_views_go_before_their_memory() -> None:
    """JAX keeps no array over a tensor's memory when that has died; and arrays that somebody
    deletes are made anew."""
    f = RemoteJaxFunction(sine)
    x = torch.zeros(64)
    f(x)
    for array in _arrays_over(x):
        array.delete()
    assert float(f(x).sum()) == 0.0
    views = list(map(weakref.ref, _arrays_over(x)))
    assert views
    del x, array
    gc.collect()
    assert not any(view() for view in views)


def _arrays_over(tensor: torch.Tensor) -> list[jax.Array]:
    return [
        array
        for array in jax.live_arrays()
        if array.is_fully_addressable
        and array.unsafe_buffer_pointer() == tensor.data_ptr()
    ]


def test_parameters_are_trained_in_place() -> None:
    """A model's parameters are nn.Parameters of their own, read where they lie; the model's stay
    as they were."""
    f = RemoteJaxFunction(affine)
    assert {name for name, _ in f.named_parameters()} == {"weight", "bias"}
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    x, before = torch.randn(8, 3), f.session.stats()["bytes_copied"]
    losses = []
    for _ in range(CALLS):
        loss = f(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert f.session.stats()["bytes_copied"] == before
    np.testing.assert_array_equal(
        RemoteJaxFunction(affine).bias.detach().numpy(), affine[1]["bias"]
    )


def test_every_transform_is_there() -> None:
    """hessian, vmap of grad, jvp and double backward are those of JAX, in this process too."""
    f = RemoteJaxFunction(lambda x: jnp.sin(x).sum())
    x = torch.randn(3)
    torch.testing.assert_close(torch.func.hessian(f)(x), torch.diag(-x.sin()))
    batch = torch.randn(5, 3)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(batch), batch.cos())
    torch.testing.assert_close(torch.func.jvp(f, (x,), (x,))[1], (x.cos() * x).sum())
    with jax.enable_x64(True):
        assert torch.autograd.gradgradcheck(f, x.double().requires_grad_())


def test_residuals_are_not_recomputed() -> None:
    """A forward and a backward pass run the model once."""
    runs: list[int] = []

    def counted(x):
        return jax.pure_callback(lambda v: (runs.append(1), np.asarray(v))[1], x, x)

    @jax.custom_vjp
    def model(x):
        return counted(x) * 2

    model.defvjp(lambda x: (model(x), None), lambda _, cotangent: (cotangent * 2,))
    x = torch.ones(2, requires_grad=True)
    y = RemoteJaxFunction(model)(x)
    y.sum().backward()
    assert (len(runs), x.grad.tolist()) == (1, [2.0, 2.0])


def test_x64_follows_jax_at_each_call() -> None:
    """The same function takes 64-bit tensors while JAX has them, and refuses them with the
    remedy while it has not."""
    f = RemoteJaxFunction(sine)
    x = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(DTypeError, match="jax_enable_x64"):
        f(x)
    with jax.enable_x64(True):
        assert f(x).dtype == torch.float64
        assert f(torch.zeros(3)).dtype == torch.float32
    assert f(torch.zeros(3)).dtype == torch.float32
    with pytest.raises(DTypeError):
        f(x)


def test_numbers_take_the_types_of_the_setting() -> None:
    """A Python number's type is that of x64 at the call, for one and the same signature."""
    f = RemoteJaxFunction(lambda scale: jnp.asarray(scale) * 2)
    assert f(0.5).dtype == torch.float32
    with jax.enable_x64(True):
        assert f(0.5).dtype == torch.float64
    assert f(0.5).dtype == torch.float32


def test_a_backward_under_another_setting_is_recomputed() -> None:
    """A residual that was kept with x64 serves no backward pass without it: that runs the inputs
    once more."""
    f = RemoteJaxFunction(sine)
    x = torch.zeros(3, requires_grad=True)
    with jax.enable_x64(True):
        y = f(x)
    y.sum().backward()
    assert x.grad.tolist() == [2.0] * 3


def test_settings_of_jax_stay_as_they_were() -> None:
    """Calling a function in process changes none of JAX's settings."""
    before = dict(jax.config.values)
    x = torch.zeros(3, requires_grad=True)
    RemoteJaxFunction(sine)(x).sum().backward()
    assert dict(jax.config.values) == before


def _refusing(x):
    raise ValueError("not today")


def _failing(x):
    def refuse(value):
        raise ArithmeticError("not that one")

    return jax.pure_callback(refuse, x, x)


@pytest.mark.parametrize(
    ("model", "kind"), [(_refusing, "ValueError"), (_failing, "XlaRuntimeError")]
)
def test_errors_are_the_same_as_a_workers(
    model: Callable[..., Any], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What a model raises, while it is traced or while it runs, is a RemoteModelError; the
    function serves on."""
    caplog.set_level("CRITICAL", "jax._src.callback")
    f = RemoteJaxFunction(model)
    for _ in range(2):
        with pytest.raises(RemoteModelError, match="not t") as caught:
            f(torch.ones(2))
        assert caught.value.remote_traceback


def test_what_is_no_model_is_refused() -> None:
    """A target that is neither an address, a session nor a model raises TargetError; several
    need a name."""
    with pytest.raises(TargetError, match="expected a function"):
        RemoteJaxFunction(3)
    with pytest.raises(CallerError, match="as it is"):
        RemoteJaxFunction(nn.Linear(2, 2))
    with pytest.raises(UnknownModel, match="name="):
        RemoteJaxFunction(host(jax_model={"a": sine, "b": sine}))


def test_time_limits_are_refused() -> None:
    """A call in this process cannot be given up, so asking for a time limit is an error and not
    ignored."""
    with pytest.raises(CallerError, match="timeout_s"):
        RemoteJaxFunction(sine, timeout_s=1.0)(torch.ones(2))


def test_copies_call_the_same_model_and_pickles_are_refused() -> None:
    """A deep copy has parameters of its own and calls the same model; a pickle is refused with
    the remedy."""
    f = RemoteJaxFunction(affine)
    copied = copy.deepcopy(f)
    x = torch.ones(2, 3)
    torch.testing.assert_close(copied(x), f(x))
    assert copied.weight is not f.weight
    with pytest.raises(CallerError, match="state_dict"):
        pickle.dumps(f)


def test_submitted_calls_work() -> None:
    """A call may be submitted, and its result waited for."""
    f = RemoteJaxFunction(sine)
    assert float(f.submit(torch.zeros(2)).result().sum()) == 0.0
    f.session.close()


def test_compiled_modules_contain_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes a module that calls a JAX function of this process, without a graph
    break."""
    # Else a thread stays behind.
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    f = RemoteJaxFunction(sine)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x * 2) + 1

    model = Model()
    x = torch.randn(4, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x),
        torch.autograd.grad(model(x).sum(), x),
    )
    torch._dynamo.reset()


def test_without_jax_the_error_says_what_is_missing() -> None:
    """In an environment without jax, a function as the target raises CallerError that names the
    remedy."""
    program = """
        from bridge_client.torch import RemoteJaxFunction
        from bridge_wire.errors import CallerError
        try:
            RemoteJaxFunction(abs)
        except CallerError as error:
            print(error)
    """
    assert "install jax" in run_program(program, venv=".venv-torch").stdout
