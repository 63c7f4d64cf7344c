"""docs/migration.md: each new line that it shows runs, what it says is tested is, and the old
bugs are not here."""

import collections
import re
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bridge_client.inproc import to_jax, to_torch, trace_torch
from bridge_client.jax import RemoteTorchFunction
from bridge_client.jax.flax import LinenModule
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import DTypeError
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "migration.md").read_text()


def jax_power(x, y=2):
    return x**y


@pytest.fixture(scope="module", autouse=True)
def jax_is_up() -> None:
    """XLA has started its threads, so that no test is blamed for them."""
    jax.jit(jnp.sin)(1.0).block_until_ready()


# The page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named", sorted(set(re.findall(r"`((?:[\w/]+\.py::)?test_\w+)`", PAGE)))
)
def test_named_tests_exist(named: str) -> None:
    """Every test that docs/migration.md names is there."""
    file, _, name = named.rpartition("::")
    assert (
        f"def {name}("
        in (ROOT / (file or "tests/stories/test_migration.py")).read_text()
    )


def test_every_test_of_a_new_line_is_named() -> None:
    """Every test below stands for a row of the page."""
    source = Path(__file__).read_text().split("# lucidrains")[1]
    for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE):
        assert f"`{name}`" in PAGE, name


# lucidrains/jax2torch -----------------------------------------------------------------------------


def test_jax2torch() -> None:
    """`jax2torch(fn)` becomes `RemoteJaxFunction(fn)`."""
    torch_power = RemoteJaxFunction(jax_power)
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = torch_power(x)
    y.sum().backward()
    assert (y.tolist(), x.grad.tolist()) == ([4.0, 9.0], [4.0, 6.0])


def test_jax2torch_keywords() -> None:
    """Keyword arguments pass as they did; `static_argnames` makes a number part of the program."""
    for options in ({}, {"static_argnames": "y"}):
        assert RemoteJaxFunction(jax_power, **options)(
            torch.tensor([2.0]), y=3
        ).tolist() == [8.0]


def test_arrays_and_tensors() -> None:
    """`t2j`, `j2t`, `torch_to_jax` and `jax_to_torch` of an array become `to_jax` and
    `to_torch`."""
    tensor = torch.arange(4.0)
    array = to_jax(tensor)
    assert (
        array.unsafe_buffer_pointer() == tensor.data_ptr() == to_torch(array).data_ptr()
    )


def test_trees_of_arrays() -> None:
    """`tree_t2j` and `tree_j2t` become the same two functions."""
    tree = {"a": torch.ones(2), "b": (torch.zeros(1), "text")}
    back = to_torch(to_jax(tree))
    assert torch.equal(back["a"], tree["a"])
    assert back["b"][1] == "text"


# torch-jax-interop --------------------------------------------------------------------------------


def test_decorators() -> None:
    """`@jax_to_torch` becomes `@RemoteJaxFunction`, and `@torch_to_jax` `@RemoteTorchFunction`."""

    @RemoteJaxFunction
    def of_jax(x):
        return x + jnp.ones_like(x)

    @RemoteTorchFunction
    def of_torch(x):
        return x + torch.ones_like(x)

    assert of_jax(torch.arange(3)).tolist() == [1, 2, 3]
    assert of_torch(jnp.arange(3)).tolist() == [1, 2, 3]


def test_module_to_jax() -> None:
    """`torch_module_to_jax(module)` becomes a function with named parameters; no example output
    is needed for jit."""
    module = nn.Linear(3, 2)
    g = RemoteTorchFunction(module)
    loss = jax.jit(
        jax.value_and_grad(lambda params, x, y: ((g.apply(params, x) - y) ** 2).mean())
    )
    value, gradients = loss(g.params, jnp.ones((1, 3)), jnp.ones((1, 2)))
    expected = (module(torch.ones(1, 3)) - 1).square().mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        gradients["weight"], module.weight.grad, rtol=1e-5, atol=1e-6
    )


def test_wrapped_jax_function() -> None:
    """`WrappedJaxFunction(fn, params)` becomes `RemoteJaxFunction((fn, params))`; the parameters
    have names."""
    module = RemoteJaxFunction(
        (lambda params, x: jnp.dot(x, params["w"]), {"w": jnp.ones((2, 1))})
    )
    functional.mse_loss(module(torch.ones(2)), torch.zeros(1)).backward()
    assert list(module.state_dict()) == ["w"]
    assert module.w.grad.flatten().tolist() == [4.0, 4.0]


def test_wrapped_flax_module() -> None:
    """`WrappedJaxFunction(module.apply, params)` of a Flax module becomes
    `RemoteJaxFunction((module, variables))`."""
    dense = linen.Dense(2)
    module = RemoteJaxFunction((dense, dense.init(jax.random.key(0), jnp.ones((1, 3)))))
    functional.cross_entropy(
        module(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1])
    ).backward()
    assert {name: p.grad.shape for name, p in module.named_parameters()} == {
        "params.bias": (2,),
        "params.kernel": (3, 2),
    }


def test_scalar_functions_and_aux() -> None:
    """`WrappedJaxScalarFunction` and `has_aux=True` need nothing: any pytree may be returned."""
    loss = RemoteJaxFunction(
        (lambda w, x: (jnp.vdot(w, x), {"norm": jnp.sum(x)}), jnp.ones(3))
    )
    value, aux = loss(torch.ones(3))
    value.backward()
    assert (value.item(), aux["norm"].item(), loss.value.grad.tolist()) == (
        3.0,
        3.0,
        [1.0, 1.0, 1.0],
    )


def test_parameters_are_copies() -> None:
    """`clone_params=True` needs nothing: the parameters are the module's own."""
    params = jnp.ones(3)
    module = RemoteJaxFunction((lambda w, x: w * x, params))
    with torch.no_grad():
        module.value.zero_()
    assert params.tolist() == [1.0, 1.0, 1.0]


def test_classes_of_ones_own() -> None:
    """`jax_to_torch.register(cls)` becomes the registration of the class as a pytree."""
    Point = collections.namedtuple("Point", "x y")
    made = to_torch(Point(jnp.ones(1), jnp.zeros(1)))
    assert isinstance(made, Point)
    assert isinstance(made.x, Tensor)


# Pytorch2Jax --------------------------------------------------------------------------------------


def test_function_wrapper() -> None:
    """`py_to_jax_wrapper(fn)` becomes `RemoteTorchFunction(fn)`, which has gradients and works
    under jit."""
    f = RemoteTorchFunction(lambda x: torch.full((2, 2), 3.0) * x)
    assert jax.jit(jax.grad(lambda x: f(x).sum()))(jnp.ones((2, 2))).tolist() == [
        [3.0, 3.0],
        [3.0, 3.0],
    ]


def test_module_as_function() -> None:
    """`fn, params = convert_pytnn_to_jax(model)` becomes `g.apply` and `g.params`."""
    g = RemoteTorchFunction(nn.Linear(3, 2))
    gradient = jax.grad(lambda x: g.apply(g.params, x).sum())(jnp.ones(3))
    np.testing.assert_allclose(
        gradient, g.params["weight"].sum(0), rtol=1e-6, atol=1e-6
    )


def test_module_as_flax_layer() -> None:
    """`convert_pytnn_to_flax(model)` becomes `LinenModule(RemoteTorchFunction(model))`."""

    class Model(linen.Module):
        layer: Any

        @linen.compact
        def __call__(self, x):
            return self.layer(x) * 2

    layer = LinenModule(RemoteTorchFunction(nn.Linear(3, 2)))
    model, x = Model(layer), jnp.ones((1, 3))
    variables = model.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        model.apply(variables, x), 2 * layer.function(x), rtol=1e-6, atol=1e-6
    )


# rdyro's torch2jax --------------------------------------------------------------------------------


def test_torch2jax() -> None:
    """`torch2jax(fn, *examples, output_shapes=)` and `wrap_torch_fn` become
    `RemoteTorchFunction(fn)`; any shape."""
    f = RemoteTorchFunction(lambda a, b: {"sum": a + b, "norm": torch.norm(a)})
    for size in (3, 5):
        made = jax.jit(f)(jnp.ones(size), jnp.ones(size))
        np.testing.assert_allclose(made["norm"], size**0.5, rtol=1e-6, atol=1e-6)


def test_torch2jax_with_vjp() -> None:
    """`torch2jax_with_vjp(fn, *examples, depth=2)` becomes the same; any depth, and jax.hessian
    works."""
    f = RemoteTorchFunction(nn.MSELoss())
    x, y = jnp.arange(3.0), jnp.ones(3)
    np.testing.assert_allclose(
        jax.jit(jax.grad(f, argnums=(0, 1)))(x, y)[1],
        2 * (y - x) / 3,
        rtol=1e-6,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        jax.hessian(f)(x, y), jnp.eye(3) * 2 / 3, rtol=1e-6, atol=1e-6
    )


def test_arguments_without_gradients() -> None:
    """`nondiff_argnums=` and `nondiff_mask=` need nothing: integers have none, and `argnums`
    says which are wanted."""
    f = RemoteTorchFunction(functional.cross_entropy)
    logits, labels = jnp.zeros((2, 3)), jnp.asarray([0, 2])
    np.testing.assert_allclose(
        jax.grad(f)(logits, labels).sum(1), jnp.zeros(2), atol=1e-6
    )


def test_functions_that_torch_func_refuses() -> None:
    """`use_torch_vjp=False` needs nothing: where torch.func cannot look, torch.autograd serves."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            return cotangent * 2

    assert jax.grad(RemoteTorchFunction(Doubled.apply))(3.0) == 2.0


def test_dtypes_by_name() -> None:
    """`dtype_t2j` and `dtype_j2t` become the name, which is the same in both."""
    for dtype in (torch.bfloat16, torch.float8_e5m2, torch.complex64, torch.bool):
        assert getattr(torch, str(to_jax(torch.zeros(1, dtype=dtype)).dtype)) is dtype


def test_batches_are_one_call() -> None:
    """`vmap_method=` needs nothing: a vmap is one batched call, not a loop."""
    f = RemoteTorchFunction(lambda x: x.sin().sum())
    f_batched = jax.vmap(f)
    f_batched(jnp.ones((8, 3)))
    before = f.session.stats()["calls"]
    f_batched(jnp.ones((8, 3)))
    assert f.session.stats()["calls"] == before + 1


def test_nothing_is_compiled_for_the_bridge() -> None:
    """`compile_and_import_module` needs nothing: the packages hold no compiled code, and no code
    to compile."""
    packages = ("bridge_wire", "bridge_client", "bridge_server")
    kinds = {
        path.suffix
        for package in packages
        for path in (ROOT / package).rglob("*")
        if path.is_file()
    }
    assert not kinds & {".so", ".c", ".cc", ".cpp", ".cu", ".pyx"}


# samuela's torch2jax ------------------------------------------------------------------------------


def test_t2j_function() -> None:
    """`t2j(fn)` becomes `trace_torch(fn)`: a JAX graph, also of in-place code."""

    def f(x: Tensor) -> Tensor:
        x.add_(1)
        x.mul_(2)
        return x

    traced = trace_torch(f)
    assert int(traced(jnp.asarray(3))) == 8
    assert jax.vmap(traced)(jnp.asarray([1, 2, 3])).tolist() == [4, 6, 8]
    assert jax.grad(traced)(2.0) == 2.0
    assert "callback" not in str(jax.make_jaxpr(traced)(2.0))


def test_t2j_module() -> None:
    """`t2j(module)(x, state_dict=params)` becomes `h = trace_torch(module)` and `h(params, x)`."""
    module = nn.Linear(3, 2)
    h = trace_torch(module)
    params = to_jax(module.state_dict())
    np.testing.assert_allclose(
        jax.jit(h)(params, jnp.ones(3)),
        module(torch.ones(3)).detach(),
        rtol=1e-6,
        atol=1e-6,
    )


def test_t2j_rng() -> None:
    """`rng=` is the same."""
    draw: Any = trace_torch(lambda: torch.randn(3))
    assert not np.array_equal(
        draw(rng=jax.random.PRNGKey(123)), draw(rng=jax.random.PRNGKey(456))
    )


def test_t2j_return_state_dict() -> None:
    """`return_state_dict=True` becomes `mutable=True`, and what comes back are the buffers."""
    h = trace_torch(nn.BatchNorm1d(2))
    y, buffers = h(h.params, jnp.ones((4, 2)), buffers=h.buffers, mutable=True)
    assert y.shape == (4, 2)
    assert buffers["running_mean"].tolist() == pytest.approx([0.1, 0.1])


def test_operators_that_nobody_wrote() -> None:
    """`implements` and `auto_implements` need nothing: what cannot be traced runs in torch, with
    gradients."""
    f = RemoteTorchFunction(lambda x: torch.linalg.eigvalsh(x).sum())
    np.testing.assert_allclose(
        jax.jit(jax.grad(f))(jnp.eye(2) * 2), jnp.eye(2), atol=1e-6
    )


# Their bugs ---------------------------------------------------------------------------------------


def test_tensors_in_dicts_get_gradients() -> None:
    """Not here (jax2torch): tensors inside dicts get no gradients, in silence."""
    w = torch.ones(3, requires_grad=True)
    RemoteJaxFunction(lambda tree: tree["w"].sum() * 2)({"w": w}).backward()
    assert w.grad.tolist() == [2.0, 2.0, 2.0]


def test_tuples_and_scaled_losses_work() -> None:
    """Not here (torch-jax-interop): tuples crash, and `(loss / n).backward()` fails."""
    x = torch.ones(2, requires_grad=True)
    first, second = RemoteJaxFunction(lambda x: (x.sum(), (x * 2).sum()))(x)
    ((first + second) / 3).backward()
    assert x.grad.tolist() == [1.0, 1.0]


def test_several_inputs_under_jit_and_grad() -> None:
    """Not here (torch-jax-interop): one input only under jit and grad."""
    f = RemoteTorchFunction(lambda x, y, z: (x * y * z).sum())
    made = jax.jit(jax.grad(f, argnums=(0, 1, 2)))(
        jnp.asarray(2.0), jnp.asarray(3.0), jnp.asarray(4.0)
    )
    assert [float(g) for g in made] == [12.0, 8.0, 6.0]


def test_a_gradient_runs_the_forward_once() -> None:
    """Not here (torch-jax-interop, Pytorch2Jax, rdyro's torch2jax): the forward pass is computed
    again in backward."""
    runs: list[int] = []

    def counted(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin()

    gradient = jax.jit(jax.grad(RemoteTorchFunction(counted)))
    gradient(1.0)
    runs.clear()
    gradient(2.0)
    assert len(runs) == 1


def test_forward_mode() -> None:
    """Not here (rdyro's torch2jax): no forward mode."""
    f = RemoteTorchFunction(torch.sin)
    np.testing.assert_allclose(
        jax.jvp(f, (1.0,), (2.0,))[1], 2 * np.cos(1.0), rtol=1e-6, atol=1e-6
    )


def test_keywords_softmax_and_cross_entropy_are_traced() -> None:
    """Not here (samuela's torch2jax): no keyword arguments, no softmax, no cross_entropy, one
    output."""
    f = trace_torch(
        lambda x, *, labels: (functional.cross_entropy(x, labels), x.softmax(-1))
    )
    loss, probabilities = f(jnp.zeros((2, 4)), labels=jnp.asarray([1, 3]))
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        probabilities, jnp.full((2, 4), 0.25), rtol=1e-6, atol=1e-6
    )


def test_64_bits_are_refused_and_not_narrowed() -> None:
    """Not here (all of them but rdyro's): 64-bit tensors become 32-bit ones in silence."""
    wide = torch.zeros(2, dtype=torch.float64)
    for call in (to_jax, RemoteJaxFunction(lambda x: x), trace_torch(lambda x: x)):
        with pytest.raises(DTypeError, match="x64"):
            call(wide)
