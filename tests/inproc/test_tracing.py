"""trace_torch: torch code as pure JAX functions."""

import collections
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridge_client.inproc import to_jax, to_torch, trace_torch
from bridge_wire.errors import CallerError, DTypeError, StructureError
from tests.inproc.networks import ResNet, Tied, Transformer, ViT, made
from tests.workers import run_program

WIDE = torch.zeros(3, dtype=torch.float64)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def assert_same(seen: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(to_torch(seen), expected, rtol=tolerance, atol=tolerance)


def reference(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return torch's own value of the loss below, and its gradients by name."""
    loss = network(x).square().sum()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return loss.detach(), dict(
        zip(dict(network.named_parameters()), gradients, strict=True)
    )


def loss_of(h: Callable[..., jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda params, x: (h(params, x) ** 2).sum()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", [ResNet, ViT, Transformer])
def test_networks_agree_with_torch(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """The value and the gradients of a network traced into JAX are torch's own."""
    network, x = made(kind, dtype)
    with jax.enable_x64(dtype is torch.float64):
        h = trace_torch(network)
        value, gradients = jax.jit(jax.value_and_grad(loss_of(h)))(h.params, to_jax(x))
    expected_value, expected = reference(network, x)
    scale = max(1.0, max(g.abs().max().item() for g in expected.values()))
    assert_same(
        value, expected_value, TOLERANCE[dtype] * max(1.0, expected_value.item())
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(
            to_torch(gradients[name]) / scale,
            gradient / scale,
            rtol=0,
            atol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("kind", [ViT, Transformer])
def test_second_derivatives_agree_with_torch(kind: type[nn.Module]) -> None:
    """The Hessian of a smooth network, times a vector, is torch's own."""
    network, x = made(kind)
    with jax.enable_x64(True):
        h = trace_torch(network)
        f = functools.partial(loss_of(h), h.params)
        seen = jax.jit(lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1])(to_jax(x))
    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the one with second derivatives
        (gradient,) = torch.autograd.grad(
            network(x).square().sum(), x, create_graph=True
        )
    (expected,) = torch.autograd.grad((gradient * x.detach()).sum(), x)
    assert_same(seen, expected, 1e-8)


def test_functions_go_through_every_transform() -> None:
    """A torch function is a JAX function: under jit, grad, jvp, hessian, vmap of grad, and scan."""
    f = trace_torch(lambda x: (x.sin() * x).sum())
    x = jnp.arange(3.0)
    g = lambda x: (jnp.sin(x) * x).sum()  # noqa: E731
    for transform in (
        jax.jit,
        jax.grad,
        jax.hessian,
        lambda f: jax.jit(jax.grad(f)),
        jax.jacfwd,
    ):
        np.testing.assert_allclose(
            transform(f)(x), transform(g)(x), rtol=1e-6, atol=1e-6
        )
    batch = jnp.ones((4, 3))
    np.testing.assert_allclose(
        jax.vmap(jax.grad(f))(batch), jax.vmap(jax.grad(g))(batch), rtol=1e-6, atol=1e-6
    )
    scanned = jax.lax.scan(lambda c, x: (c + f(x), None), 0.0, batch)[0]
    np.testing.assert_allclose(scanned, 4 * g(batch[0]), rtol=1e-6, atol=1e-6)


def test_in_place_code_changes_nothing_outside() -> None:
    """Code that writes into its inputs, slices and fresh tensors computes the same, and leaves
    the arrays alone."""

    def f(x: Tensor) -> Tensor:
        y = torch.zeros(3)
        x.add_(1)
        y[0] = x[0]
        y[1:] += x[1:] * 2
        y.clamp_(max=3.5)
        return y * torch.tensor([1.0, 2.0, 3.0])

    x = jnp.asarray([0.0, 0.5, 1.0])
    assert_same(trace_torch(f)(x), f(torch.tensor([0.0, 0.5, 1.0])))
    assert x.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(
        jax.jit(jax.jacrev(trace_torch(f)))(x), np.diag([1.0, 4.0, 0.0])
    )


_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda y: y,
    "select": lambda y: y[1],
    "slice": lambda y: y[1:2],
    "steps": lambda y: y[:, ::2],
    "transpose": lambda y: y.t(),
    "permute": lambda y: y.permute(1, 0)[1:],
    "view": lambda y: y.view(-1),
    "reshape": lambda y: y.reshape(8, 2)[3],
    "diagonal": lambda y: y.diagonal(1),
    "unbind": lambda y: y.unbind(1)[1],
    "split": lambda y: y.split([1, 3])[1],
    "chunk": lambda y: y.chunk(2)[0],
    "squeeze": lambda y: y[:1].squeeze(0),
    "unsqueeze_": lambda y: y.view(16).unsqueeze_(0),
    "unfold": lambda y: y.unfold(0, 2, 2),
    "as_strided": lambda y: y[1:].as_strided((2, 3), (4, 1)),
    "movedim": lambda y: y.movedim(0, 1).narrow(0, 1, 2),
    "detach": lambda y: y.detach(),
    "data": lambda y: y.data[1],
    "copy by index": lambda y: y[[0, 2]],
    "copy by contiguous": lambda y: y.t().contiguous(),
}


def _write_in_many_ways(v: Tensor, x: Tensor) -> None:
    v[:1].zero_()
    v.add_(x[0, 0], alpha=2)
    v.mul_(x[1, 1])
    v.sin_()
    v.clamp_(-0.9, 0.9)
    v.masked_fill_(v > 0.7, 0.5)
    v.index_put_((torch.tensor([0]),), x[2, 2])
    v.index_add_(0, torch.tensor([0]), torch.ones_like(v[:1]) * x[0, 0])
    v.lerp_(x[0, 0].expand_as(v), 0.3)
    v[-1] = x[3, 3]
    v.select(0, 0).copy_(x[0, 1])
    v[:1].fill_(x[1, 0])


# torch reads none of several views that an operator has made at once after a write into one.
_OF_SEVERAL = ("unbind", "split", "chunk")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("name", "is_recorded"),
    [(name, True) for name in _VIEWS if name not in _OF_SEVERAL]
    + [(name, False) for name in _VIEWS],
)
def test_writes_into_views_are_torchs(
    name: str, is_recorded: bool, dtype: torch.dtype
) -> None:
    """In-place operators on each kind of view give torch's values and derivatives, of the view
    and of its base."""

    def f(x: Tensor) -> Tensor:
        y = x.sin() + 0.1
        view = _VIEWS[name](y)
        with torch.set_grad_enabled(is_recorded):
            view.mul_(x[1, 1]) if name in _OF_SEVERAL else _write_in_many_ways(view, x)
        weights = torch.arange(1.0, 17.0, dtype=y.dtype).view(4, 4)
        return (y * weights).sum() + (0 if name in _OF_SEVERAL else (view * view).sum())

    values = torch.linspace(-1, 2, 16, dtype=dtype).view(4, 4)
    leaf = values.clone().requires_grad_()
    expected = f(leaf)
    (gradient,) = torch.autograd.grad(expected, leaf)
    with jax.enable_x64(dtype is torch.float64):
        x = to_jax(values)
        seen, pull = jax.vjp(jax.jit(trace_torch(f)), x)
        _, slope = jax.jvp(jax.jit(trace_torch(f)), (x,), (jnp.ones_like(x),))
        assert_same(
            [seen, *pull(jnp.ones_like(seen)), slope],
            [expected.detach(), gradient, gradient.sum()],
            TOLERANCE[dtype],
        )


@pytest.mark.parametrize("write", [torch.sin, torch.cumsum], ids=["sin", "cumsum"])
def test_results_go_into_out(write: Callable[..., Tensor]) -> None:
    """The out= form of an operator writes into the tensor, a part of it, or one without
    elements."""

    def f(x: Tensor) -> Tensor:
        more = (0,) if write is torch.cumsum else ()
        y, empty = torch.zeros(2, 3), torch.empty(0)
        write(x, *more, out=y[1])
        write(x, *more, out=empty)
        return torch.cat([y.view(-1), empty])

    x = torch.linspace(0, 1, 3)
    assert_same(jax.jit(trace_torch(f))(to_jax(x)), f(x), 1e-6)


def test_statistics_written_by_an_operator() -> None:
    """An operator that returns new tensors and writes others as well does both."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        mean, var = torch.zeros(3), torch.ones(3)
        y, *_ = torch.ops.aten._native_batch_norm_legit(
            x, None, None, mean, var, True, 0.1, 1e-5
        )
        return y, mean, var

    x = torch.randn(4, 3)
    for seen, expected in zip(trace_torch(f)(to_jax(x)), f(x), strict=True):
        assert_same(seen, expected, 1e-5)


def test_expanded_tensors_are_not_written() -> None:
    """A write into elements that share memory is refused, as by torch."""
    with pytest.raises(CallerError, match=r"\.clone\(\)"):
        trace_torch(lambda x: x.expand(4, 3).add_(1))(jnp.ones(3))


def test_positions_may_be_traced() -> None:
    """Elements at traced positions are read and written, with derivatives."""

    def f(x: Tensor, i: Tensor) -> Tensor:
        y = x * 2
        y[i] = y[i + 1] * 3
        y[[0]] += 1
        return y

    x = jnp.asarray([1.0, 2.0, 4.0])
    h = trace_torch(f)
    assert jax.jit(h)(x, 1).tolist() == [3, 24, 8]
    assert jax.jit(jax.grad(lambda x: h(x, 1).sum()))(x).tolist() == [2, 0, 8]
    with pytest.raises(CallerError, match="slice whose bounds are traced"):
        jax.jit(trace_torch(lambda x, i: x[i:]))(x, 1)


class _Holding(nn.Module):
    """Reads its parameter and its buffer by other references, keeps what it computes, and
    counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 4.0))
        self.register_buffer("scale", torch.ones(3))
        self.in_a_list = [self.weight]
        self.view = self.weight[1:]
        self.in_a_tuple = (self.scale,)
        self.grid: Tensor | None = None
        self.squares: list[Tensor] = []
        self.seen: dict[str, Tensor] = {}
        self.calls = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = torch.arange(3.0)
        if not self.squares:
            self.squares.append(self.in_a_list[0] * self.weight)
        self.seen["x"] = x
        self.calls += 1
        return (self.squares[0] * x + self.grid).sum() * self.in_a_tuple[
            0
        ].sum() + self.view.square().sum()


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_a_module_is_a_function_of_its_parameters_alone(
    wrap: Callable[..., Any],
) -> None:
    """A parameter is replaced and differentiated by each reference to it, and a call leaves no
    attribute changed."""
    module, x = _Holding(), torch.tensor([1.0, 2.0, 3.0])
    h = trace_torch(module)
    for scale in (1, 2):
        twin = _Holding()
        with torch.no_grad():
            twin.weight.mul_(scale)
        expected = twin(x)
        (gradient,) = torch.autograd.grad(expected, twin.weight)
        params = {"weight": h.params["weight"] * scale}
        value, gradients = wrap(jax.value_and_grad(h))(params, to_jax(x))
        assert_same([value, gradients["weight"]], [expected.detach(), gradient], 1e-6)
        assert (module.grid, module.squares, module.seen, module.calls.item()) == (
            None,
            [],
            {},
            0,
        )
    doubled = h(h.params, to_jax(x), buffers={"scale": 2 * h.buffers["scale"]})
    assert doubled - h(h.params, to_jax(x)) == 3 * 39


class _Keeping:
    kept: Tensor | None = None


@functools.lru_cache
def _cached(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32)


def _keep_in_a_class(x: Tensor) -> Tensor:
    _Keeping.kept = x * 2 if _Keeping.kept is None else _Keeping.kept
    return x * _Keeping.kept


@pytest.mark.parametrize(
    ("f", "where"),
    [
        (_keep_in_a_class, "class _Keeping, as 'kept'"),
        (lambda x: x * _cached(3), "cache of _cached"),
    ],
    ids=["class", "cache"],
)
def test_tensors_that_outlive_a_trace_are_refused(
    f: Callable[[Tensor], Tensor], where: str
) -> None:
    """A traced tensor that the code keeps elsewhere is named, and refused if it is used later."""
    try:
        with pytest.raises(CallerError, match=where):
            jax.jit(trace_torch(f))(jnp.ones(3))
        with pytest.raises(CallerError, match="an earlier call"):
            trace_torch(f)(jnp.ones(3))
    finally:
        _Keeping.kept = None
        _cached.cache_clear()


def test_constants_take_no_traced_values() -> None:
    """A tensor that the code holds is not written with traced values, and keeps its value after
    the call."""
    held = torch.zeros(3)
    with pytest.raises(CallerError, match="as a constant"):
        trace_torch(lambda x: held.add_(x))(jnp.ones(3))
    assert trace_torch(lambda x: x + held.add_(1))(jnp.ones(3)).tolist() == [2, 2, 2]
    assert held.tolist() == [0, 0, 0]


def test_writes_into_views_that_nothing_else_shows() -> None:
    """They are followed: into slices, rows and reshaped tensors, parts of a chunk, and copies of
    transposed ones."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        rows = torch.zeros(3, 4)
        for i in range(3):
            rows[i].copy_(x[i])
        flat = (x * 2).view(-1)
        flat.add_(1)
        first, second = x.clone().chunk(2)
        first.mul_(3)
        turned = x.t().contiguous()
        turned.sub_(1)
        other = x.t().reshape(-1)
        other.sub_(1)
        as_ints = x.type_as(torch.ones(1, dtype=torch.int32))
        return rows, flat, first + second, turned, other, x + 0.5, as_ints

    x = np.linspace(0, 3, 16, dtype=np.float32).reshape(4, 4)
    for seen, expected in zip(
        jax.jit(trace_torch(f))(jnp.asarray(x)), f(torch.tensor(x)), strict=True
    ):
        assert_same(seen, expected, 1e-6)


def test_tensors_of_traced_values() -> None:
    """torch.tensor of traced values has the dtype that torch finds in them."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.tensor([x[0], 2.5]),
            torch.tensor(x.argmax()),
            torch.as_tensor(x.int()),
        )

    made = trace_torch(f)(jnp.asarray([1.0, 3.0]))
    assert [str(each.dtype) for each in made] == ["float32", "int32", "int32"]
    assert [each.tolist() for each in made] == [[1.0, 2.5], 1, [1, 3]]


def test_no_gradient_goes_through_no_grad() -> None:
    """What is computed under no_grad, or detached, is a constant in every mode, as in torch."""

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x**2
            with torch.enable_grad():
                cube = x**3
        return (scale * x + cube + x.detach() * x).sum()

    x = jnp.asarray([1.0, 2.0])
    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.jit(jax.jacrev(f))):
        np.testing.assert_allclose(
            derivative(trace_torch(f))(x), x**2 + 3 * x**2 + x, rtol=1e-6, atol=1e-6
        )


class _StraightThrough(torch.autograd.Function):
    """Rounds; its derivative is a number that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.slope = slope
        return x.round()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple[Tensor, None]:
        return ctx.slope * ct, None


class _Parts(torch.autograd.Function):
    """Several results, one an integer; draws; its derivative is ten times the right one."""

    @staticmethod
    def forward(x: Tensor, power: int = 3) -> tuple[Tensor, ...]:
        return x**power, x.argmax(), torch.rand_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        x, ctx.power = inputs
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(outputs[1])

    @staticmethod
    def backward(ctx: Any, ct: Tensor, *others: Any) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 10 * ctx.power * x**2 * ct, None


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_backward_passes_of_functions_are_theirs(wrap: Callable[..., Any]) -> None:
    """An autograd.Function has the derivative that it defines, also a second time, in batches,
    and where it draws."""
    x = jnp.asarray([0.3, 1.7])
    rounded = trace_torch(lambda x: _StraightThrough.apply(x * 2, 5.0).sum())
    value, gradient = wrap(jax.value_and_grad(rounded))(x)
    assert (value, gradient.tolist()) == (4.0, [10.0, 10.0])
    assert wrap(jax.vmap(jax.grad(rounded)))(x[:, None]).tolist() == [[10.0], [10.0]]

    f, key = trace_torch(lambda x: _Parts.apply(x)), jax.random.key(0)
    cubed, index, drawn = wrap(lambda x: f(x, rng=key))(x)
    np.testing.assert_allclose(cubed, x**3, rtol=1e-6, atol=1e-6)
    assert index == 1
    assert ((drawn > 0) & (drawn < 1)).all()
    slope = jax.grad(lambda x: f(x, rng=key)[0].sum())
    np.testing.assert_allclose(wrap(slope)(x), 30 * x**2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        wrap(jax.grad(lambda x: slope(x).sum()))(x), 60 * x, rtol=1e-6, atol=1e-6
    )
    leaf = torch.tensor([0.3], requires_grad=True)
    _StraightThrough.apply(leaf, 2.0).backward()
    # Torch's own are what they were.
    assert leaf.grad is not None and leaf.grad.item() == 2.0


_ON_BORDERS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "abs": (torch.abs, [0, -1, 2, 0]),
    "atan2": (lambda x: torch.atan2(x, -x), [0, 1, -2, 0]),
    "cdist": (lambda x: torch.cdist(x.view(2, 2), x.view(2, 2)), [0, 1, 2, 3]),
    "clamp": (lambda x: x.clamp(0, 1) + x.clamp(min=2), [0, 1, 2, -1]),
    "leaky_relu": (functional.leaky_relu, [0, -1, 1, 0]),
    "max": (
        lambda x: x.view(2, 2).max(1).values + x.view(2, 2).min(0, keepdim=True)[0],
        [1, 1, 0, 0],
    ),
    "norm": (
        lambda x: x.norm() + torch.linalg.vector_norm(x.view(2, 2), ord=3, dim=1).sum(),
        [0, 0, 0, 0],
    ),
    "normalize": (lambda x: functional.normalize(x.view(2, 2)), [3, 4, 0, 0]),
    "relu6": (functional.relu6, [0, 6, 1, 7]),
    "sinc": (torch.sinc, [0, 1, 0.5, 0]),
    "softplus": (functional.softplus, [0, 100, 1000, -1000]),
}


@pytest.mark.parametrize("name", _ON_BORDERS)
def test_derivatives_on_borders_are_torchs(name: str) -> None:
    """At zero, at the ends of a clamp, among equal maxima, and far out, where JAX's would be
    others, or none."""
    f, values = _ON_BORDERS[name]
    leaf = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    expected = f(leaf)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    h = trace_torch(f)
    x = jnp.asarray(values, jnp.float32)
    assert_same(jax.jit(h)(x), expected.detach(), 1e-6)
    assert_same(jax.jit(jax.grad(lambda x: h(x).sum()))(x), gradient, 1e-5)


def _of_eigenvectors(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a, UPLO="U")
    return (vectors * values.exp()) @ vectors.mT


def _of_least_squares(a: Tensor) -> Tensor:
    return _all_of(torch.linalg.lstsq(a[:, :2], a[:, 1:], driver="gels")[:2])


def _all_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in tensors])


_MATRIX = torch.tensor([[4.0, 1.0, 0.5], [0.2, 5.0, 2.0], [-1.0, 0.3, 6.0]])
_AS_TORCH: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "adaptive_max_pool": (
        lambda x: functional.adaptive_max_pool2d(x, (2, 3)),
        torch.randn(1, 2, 5, 7),
    ),
    "cholesky": (torch.linalg.cholesky, _MATRIX),
    "cholesky upper": (lambda x: torch.linalg.cholesky(x, upper=True), _MATRIX),
    "det": (torch.linalg.det, _MATRIX),
    "det of nothing": (torch.linalg.det, torch.zeros(0, 0)),
    "digamma": (torch.digamma, torch.tensor([-1.3, -0.2, 0.4, 3.0])),
    "eigh": (_of_eigenvectors, _MATRIX),
    "eigvalsh": (torch.linalg.eigvalsh, _MATRIX),
    "embedding_bag": (
        lambda w: functional.embedding_bag(
            torch.tensor([0, 2, 2, 1]), w, torch.tensor([0, 1]), padding_idx=1
        ),
        torch.randn(3, 4),
    ),
    "log_ndtr": (torch.special.log_ndtr, torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0])),
    "lstsq": (
        lambda x: torch.linalg.lstsq(x[:2], x[:2, :2], driver="gels").solution,
        _MATRIX,
    ),
    "lstsq with residuals": (_of_least_squares, _MATRIX),
    "native_batch_norm": (
        lambda x: _all_of(
            torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
        ),
        _MATRIX,
    ),
    "native_layer_norm": (
        lambda x: _all_of(torch.native_layer_norm(x, [3], None, None, 1e-5)),
        _MATRIX,
    ),
    "max_unpool": (
        lambda x: functional.max_unpool1d(x, torch.tensor([[[0, 3]]]), 2),
        torch.tensor([[[1.0, 2.0]]]),
    ),
    "pinv": (torch.linalg.pinv, _MATRIX[:, :2]),
    "pinv of a hermitian": (lambda x: torch.linalg.pinv(x, hermitian=True), _MATRIX),
    "polygamma": (lambda x: torch.polygamma(2, x), torch.tensor([-0.4, 0.6, 2.0])),
    "safe_softmax": (
        lambda x: torch.ops.aten._safe_softmax(
            x.masked_fill(torch.eye(2)[[0, 0]] > 0, -torch.inf).T, 1
        ),
        torch.randn(2, 2),
    ),
    "slogdet": (lambda x: torch.linalg.slogdet(x)[1], _MATRIX),
    "solve": (lambda x: torch.linalg.solve(x, x[0]), _MATRIX),
    "solve from the right": (
        lambda x: torch.linalg.solve(x, x[:2], left=False),
        _MATRIX,
    ),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", _AS_TORCH)
def test_operators_are_torchs(name: str, dtype: torch.dtype) -> None:
    """Operators that JAX defines otherwise have torch's value and gradient, at once and under
    jit."""
    f, values = _AS_TORCH[name]
    leaf = values.to(dtype).requires_grad_()
    expected = f(leaf)
    weights = torch.arange(1.0, expected.numel() + 1, dtype=dtype).view(expected.shape)
    (gradient,) = torch.autograd.grad(expected, leaf, weights)
    with jax.enable_x64(dtype is torch.float64):
        for h in (trace_torch(f), jax.jit(trace_torch(f))):
            seen, pull = jax.vjp(h, to_jax(leaf.detach()))
            assert_same(
                [seen, *pull(to_jax(weights))],
                [expected.detach(), gradient],
                10 * TOLERANCE[dtype],
            )


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda x: x.normal_(3, 2), 3),
        (lambda x: x.uniform_(2, 4), 3),
        (lambda x: x.exponential_(0.5), 2),
        (lambda x: x.geometric_(0.25), 4),
        (lambda x: x.log_normal_(0, 0.1), 1.005),
        (lambda x: x.bernoulli_(0.25), 0.25),
        (lambda x: x.random_(0, 11), 5),
        (lambda x: torch.normal(x, 1.0), 0),
    ],
)
def test_distributions_follow_the_key(
    draw: Callable[[Tensor], Tensor], mean: float
) -> None:
    """What is drawn in place has the distribution, differs from key to key, and has no
    derivative."""
    h, x = trace_torch(lambda x: draw(x * 1)), jnp.zeros(20_000)
    first, second = (h(x, rng=jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_allclose(first.mean(), mean, atol=0.15)
    assert not jax.grad(lambda x: h(x, rng=jax.random.key(0)).sum())(x).any()
    with pytest.raises(CallerError, match="rng="):
        h(x)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["at once", "jit"])
def test_results_of_classes(wrap: Callable[..., Any]) -> None:
    """What torch.max returns stays what it is; a class that jax does not know is named."""
    x = jnp.arange(6.0).reshape(2, 3)
    found = wrap(trace_torch(lambda x: torch.max(x, 1)))(x)
    assert isinstance(found, torch.return_types.max)
    np.testing.assert_array_equal(found.values, [2, 5])

    @dataclasses.dataclass
    class Output:
        y: Any

    class Mapped(collections.OrderedDict[str, Any]):
        """As transformers' ModelOutput."""

        def __init__(self, y: Any) -> None:
            super().__init__(y=y)
            self.y = y

    for cls in (Output, Mapped):
        for make in (cls, lambda y, cls=cls: [cls([y])]):
            with pytest.raises(CallerError, match=f"returns a .*{cls.__name__}, which"):
                wrap(trace_torch(lambda x, make=make: make(x * 2)))(x)

    jax.tree_util.register_dataclass(Output, ["y"], [])
    found = wrap(trace_torch(lambda x: Output(x * 2)))(x)
    np.testing.assert_array_equal(found.y, 2 * x)


def test_checks_of_distributions_are_named() -> None:
    """They look at values; without them, densities and gradients are torch's."""
    normal, x = torch.distributions.Normal, jnp.arange(3.0)
    with pytest.raises(CallerError, match="pass validate_args=False"):
        trace_torch(lambda x: normal(x, 1.0 + x).log_prob(x))(x)
    h = trace_torch(lambda x: normal(x, 1 + x, validate_args=False).log_prob(2 * x))
    t = torch.arange(3.0, requires_grad=True)
    expected = normal(t, 1 + t).log_prob(2 * t)
    np.testing.assert_allclose(jax.jit(h)(x), expected.detach(), rtol=1e-6)
    expected.sum().backward()
    gradient = jax.jit(jax.grad(lambda x: h(x).sum()))(x)
    np.testing.assert_allclose(gradient, t.grad, rtol=1e-6, atol=1e-6)


def test_operators_without_a_lowering_are_named() -> None:
    """An operator that JAX lacks, or that fails in JAX, is a CallerError with its name."""
    for f in (
        lambda x: torch.geqrf(x),
        lambda x: torch.histogram(x, 3),
        lambda x: x.resize_(3),
    ):
        with pytest.raises(CallerError, match=r"geqrf|histogram|resize"):
            trace_torch(f)(jnp.ones((2, 2)))
    with pytest.raises(CallerError, match="nonzero"):
        jax.jit(trace_torch(lambda x: x.nonzero()))(jnp.ones(3))


def test_an_operator_composed_of_itself_has_a_lowering() -> None:
    """spherical_bessel_j0 equals torch's, also at zero and in the series near zero."""
    x = torch.tensor([0.0, 0.3, -0.49, 0.5, 2.0, -7.0, torch.inf])
    seen = jax.jit(trace_torch(torch.special.spherical_bessel_j0))(to_jax(x))
    assert_same(seen, torch.special.spherical_bessel_j0(x), 1e-6)


def test_scalars_are_the_ends_of_linspace() -> None:
    """linspace and logspace take traced scalars, whatever device the code names."""

    def f(x: Tensor) -> Tensor:
        linear = torch.linspace(x[0], 3, 5, device="cpu")
        return linear + torch.logspace(x[0], x[1], 5, 2.0)

    x = torch.tensor([0.5, 2.0])
    assert_same(jax.jit(trace_torch(f))(to_jax(x)), f(x), 1e-5)


@pytest.mark.parametrize("spaced", [torch.linspace, torch.logspace])
def test_integers_between_traced_ends_are_refused(
    spaced: Callable[..., Tensor],
) -> None:
    """torch truncates float64 numbers: in float32, -7 to 5 in 4 steps would contain -2, not -3."""
    with pytest.raises(CallerError, match=r"traced ends in torch\.int32"):
        trace_torch(lambda x: spaced(x[0], x[1], 4, dtype=torch.int32))(
            jnp.asarray([-7.0, 5.0])
        )


def test_named_tuples_of_torch_pass_jit() -> None:
    """The results of max, sort and eigh keep their names under jit."""
    made = jax.jit(trace_torch(lambda x: x.max(0)))(jnp.asarray([1.0, 3.0, 2.0]))
    assert (float(made.values), int(made.indices)) == (3.0, 1)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_checkpoints_have_gradients(is_reentrant: bool) -> None:
    """What torch.utils.checkpoint wraps has its derivative when traced."""
    checkpoint = functools.partial(
        torch.utils.checkpoint.checkpoint, torch.sin, use_reentrant=is_reentrant
    )
    np.testing.assert_allclose(
        jax.grad(lambda x: trace_torch(checkpoint)(x).sum())(jnp.ones(2)),
        jnp.cos(jnp.ones(2)),
    )


def test_structures_numbers_and_keywords_pass() -> None:
    """Pytrees, integers, bools, numbers, strings and keyword arguments arrive as torch's."""

    def f(batch: dict[str, Any], *, scale: float, mode: str) -> dict[str, Any]:
        picked = batch["x"][batch["i"]].where(batch["m"], torch.zeros(()))
        return {"y": (picked * scale, [picked.argmax()]), "mode": mode}

    batch = {
        "x": jnp.arange(5.0),
        "i": jnp.asarray([3, 1]),
        "m": np.asarray([True, False]),
    }
    made = trace_torch(f)(batch, scale=2.0, mode="fast")
    assert (made["y"][0].tolist(), int(made["y"][1][0]), made["mode"]) == (
        [6.0, 0.0],
        0,
        "fast",
    )


def test_tensors_in_closures_are_constants() -> None:
    """A tensor that the code holds, as an attribute or in a closure, is a constant; it is not
    changed."""
    weight = torch.arange(3.0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor([2.0, 2.0, 2.0])

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + weight

    h = trace_torch(Scaled())
    assert (h.params, h.buffers) == ({}, {})
    assert h({}, jnp.ones(3)).tolist() == [2.0, 3.0, 4.0]


def test_devices_are_jaxs() -> None:
    """Code that moves tensors, or makes them beside others, runs wherever JAX does."""

    def f(x: Tensor) -> Tensor:
        return (
            x.to("cpu").cpu().to(x.device, torch.float32)
            + torch.arange(3, device=x.device)
            + x.new_zeros(3)
        )

    assert jax.jit(trace_torch(f))(jnp.zeros(3)).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_modules_agree_with_torch(kind: type[nn.Module]) -> None:
    """LSTM and GRU, whose results are tuples, agree with torch."""
    module, x = kind(3, 4, batch_first=True), torch.randn(2, 5, 3)
    h = trace_torch(module)
    seen, expected = jax.jit(h)(h.params, to_jax(x)), module(x)
    assert_same(
        jax.tree.leaves(seen), [y.detach() for y in jax.tree.leaves(expected)], 1e-4
    )


def test_threads_trace_at_once() -> None:
    """Several threads may trace at the same time, each with its own key."""
    f = trace_torch(lambda x: functional.dropout(x.sin()).sum())
    keys = jax.random.split(jax.random.key(0), 8)
    expected = [float(f(jnp.ones(64), rng=key)) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda key: float(f(jnp.ones(64), rng=key)), keys))
            == expected
        )


def test_traces_side_by_side_leave_torch_as_it_was() -> None:
    """What tracing switches off for the whole process is on again after the last of several
    traces."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        begun.set()
        assert go_on.wait(30)
        return x * 2

    with ThreadPoolExecutor(1) as pool:

        def quick(x: Tensor) -> Tensor:
            running.append(pool.submit(trace_torch(slow), jnp.ones(2)))
            assert begun.wait(30)
            return x + 1

        running: list[Any] = []
        assert trace_torch(quick)(jnp.ones(2)).tolist() == [2, 2]
        go_on.set()
        assert running[0].result().tolist() == [2, 2]
    assert (
        torch.backends.mha.get_fastpath_enabled()
        and torch.backends.cuda.flash_sdp_enabled()
    )


def test_tied_weights_stay_tied() -> None:
    """A parameter with two names is one array, whose gradient is the sum of both uses."""
    network = Tied().double()
    tokens = torch.tensor([[1, 2, 3]])
    with jax.enable_x64(True):
        h = trace_torch(network)
        assert list(h.params) == ["embedding.weight"]
        gradient = jax.grad(loss_of(h))(h.params, to_jax(tokens))["embedding.weight"]
    assert_same(gradient, reference(network, tokens)[1]["embedding.weight"])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (4, 3)),
        (nn.BatchNorm2d(3, momentum=0.3), (4, 3, 2, 2)),
        (nn.BatchNorm1d(3, affine=False), (4, 3, 5)),
        (nn.InstanceNorm1d(3, track_running_stats=True, affine=True), (4, 3, 5)),
        (nn.InstanceNorm2d(3), (4, 3, 2, 2)),
    ],
    ids=lambda value: (
        type(value).__name__ if isinstance(value, nn.Module) else str(value)
    ),
)
def test_statistics_are_written_back(norm: nn.Module, shape: tuple[int, ...]) -> None:
    """In train mode the statistics after a call are torch's own, and come back as new buffers."""
    norm, x = (
        copy.deepcopy(norm).double(),
        torch.randn(shape, dtype=torch.float64) * 2 + 1,
    )
    with jax.enable_x64(True):
        h = trace_torch(norm)
        before = {name: np.asarray(buffer) for name, buffer in h.buffers.items()}
        call = jax.jit(lambda buffers, x: h(h.params, x, buffers=buffers, mutable=True))
        _, once = call(h.buffers, to_jax(x))
        seen, twice = call(once, to_jax(x))
    norm(x)
    assert_same(seen, norm(x))
    for name, buffer in norm.named_buffers():
        assert_same(twice[name], buffer)
        np.testing.assert_array_equal(h.buffers[name], before[name])
    with jax.enable_x64(True):
        assert_same(trace_torch(norm.eval())(h.params, to_jax(x)), norm(x))


def test_batch_norm_refuses_one_value_per_channel() -> None:
    """What torch refuses in train mode is refused here as well."""
    with pytest.raises(ValueError, match="more than 1 value"):
        trace_torch(nn.BatchNorm1d(3))({}, jnp.ones((1, 3)))


def test_random_numbers_follow_the_key() -> None:
    """Dropout draws from `rng`: the same key draws the same, another one differently, also under
    jit and vmap."""
    h = trace_torch(nn.Dropout(0.5).train())
    x, key, other = jnp.ones(64), jax.random.key(0), jax.random.PRNGKey(1)
    first = h({}, x, rng=key)
    assert set(np.asarray(first).tolist()) == {0.0, 2.0}
    np.testing.assert_array_equal(first, jax.jit(lambda key: h({}, x, rng=key))(key))
    assert not np.array_equal(first, h({}, x, rng=other))
    drawn = jax.vmap(lambda key: h({}, x, rng=key))(jax.random.split(key, 4))
    assert len({row.tobytes() for row in np.asarray(drawn)}) == 4


@pytest.mark.parametrize(
    "draw", [torch.rand_like, torch.randn_like, functional.dropout, torch.bernoulli]
)
def test_random_numbers_need_a_key(draw: Callable[[Tensor], Tensor]) -> None:
    """Without `rng`, code that draws random numbers says so, instead of drawing the same ones
    for ever."""
    with pytest.raises(CallerError, match="rng="):
        jax.jit(trace_torch(draw))(jnp.full(3, 0.5))
    assert trace_torch(draw)(jnp.full(3, 0.5), rng=jax.random.key(0)).shape == (3,)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: x + torch.zeros(3, dtype=torch.float64),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: x.to(torch.complex128),
        lambda x: x * WIDE,
    ],
    ids=["double", "to", "zeros", "sum", "complex", "constant"],
)
def test_64_bits_are_not_narrowed_in_silence(f: Callable[[Tensor], Tensor]) -> None:
    """Code that computes in 64-bit floats is refused while JAX runs without x64, and runs with
    it."""
    with pytest.raises(DTypeError, match="jax_enable_x64"):
        trace_torch(f)(jnp.ones(3))
    with jax.enable_x64(True):
        assert trace_torch(f)(jnp.ones(3)).dtype in (jnp.float64, jnp.complex128)


def test_types_that_jax_lacks_are_refused() -> None:
    """Code that computes in a type without a counterpart in JAX is refused by the type's name."""
    with pytest.raises(DTypeError, match="complex32"):
        trace_torch(lambda x: x.to(torch.complex32))(jnp.ones(3))


def test_64_bit_modules_need_x64() -> None:
    """A module in float64 is refused while JAX runs without x64, and an int64 array that does
    not fit likewise."""
    with pytest.raises(DTypeError, match="jax_enable_x64"):
        trace_torch(nn.Linear(2, 2).double())
    for f in (lambda x: x, lambda x: torch.tensor([2**31])):
        with pytest.raises(DTypeError, match="2147483648"):
            trace_torch(f)(np.asarray([2**31]))


def test_what_cannot_be_traced_is_refused() -> None:
    """Other names than the module's, and what is no torch code, are refused by name."""
    h = trace_torch(nn.Linear(2, 2))
    with pytest.raises(CallerError, match=r"weigth.*'weight'"):
        h({"weigth": jnp.ones((2, 2))}, jnp.ones(2))
    with pytest.raises(StructureError, match="Module"):
        trace_torch(3)


def test_the_arrays_are_copies() -> None:
    """Training the module in torch does not change the arrays that were made of it."""
    module = nn.Linear(2, 2)
    h = trace_torch(module)
    before = np.array(h.params["weight"])
    with torch.no_grad():
        module.weight.zero_()
    np.testing.assert_array_equal(h.params["weight"], before)


class _Counted(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x) * 2

    def encode(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.linear(x).tanh()

    @staticmethod
    def doubled(x: Tensor) -> Tensor:
        return x * 2


def test_methods_are_functions_of_the_same_parameters() -> None:
    """A method of a module has its parameters and buffers, whether named or bound."""
    module, x = _Counted(), torch.randn(4, 3)
    expected = copy.deepcopy(module).encode(x).detach()
    h = trace_torch(module)
    for encode in (h.method("encode"), trace_torch(module.encode)):
        y, buffers = encode(h.params, to_jax(x), buffers=h.buffers, mutable=True)
        assert_same(y, expected, 1e-5)
        assert encode.params.keys() == h.params.keys() and buffers["count"] == 1
    for whole in (h.method("forward"), trace_torch(module.__call__)):
        assert_same(whole(h.params, to_jax(x)), 2 * expected, 1e-5)
    assert_same(h.method("doubled")(h.params, to_jax(x)), 2 * x, 1e-5)
    assert_same(h(h.params, to_jax(x)), 2 * expected, 1e-5)
    with pytest.raises(CallerError, match="no method 'linear'"):
        h.method("linear")


def test_training_with_optax_equals_torch() -> None:
    """100 steps of Adam on a traced network, with its statistics, end where torch's end."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
    ).double()
    x = torch.randn(16, 3, dtype=torch.float64)
    y = x.square().sum(1, keepdim=True)
    with jax.enable_x64(True):
        h = trace_torch(network)
        optimizer = optax.adam(1e-2)

        def loss(params: Any, buffers: Any) -> tuple[jax.Array, Any]:
            seen, buffers = h(params, to_jax(x), buffers=buffers, mutable=True)
            return ((seen - to_jax(y)) ** 2).mean(), buffers

        @jax.jit
        def step(params: Any, buffers: Any, state: Any) -> Any:
            gradients, buffers = jax.grad(loss, has_aux=True)(params, buffers)
            updates, state = optimizer.update(gradients, state)
            return optax.apply_updates(params, updates), buffers, state

        trained = h.params, h.buffers, optimizer.init(h.params)
        for _ in range(100):
            trained = step(*trained)
    reference_optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(100):
        reference_optimizer.zero_grad()
        ((network(x) - y) ** 2).mean().backward()
        reference_optimizer.step()
    state = network.state_dict()
    for name, array in {**trained[0], **trained[1]}.items():
        assert_same(array, state[name], 1e-8)


def test_torchax_comes_only_when_something_is_traced() -> None:
    """Importing bridge_client.inproc loads no torchax, and torch.compile works before and after
    a trace."""
    program = """
        import os, sys, jax.numpy as jnp, torch
        from bridge_client.inproc import to_jax, trace_torch
        print("torchax" in sys.modules)
        f = lambda x: torch.sin(x) * 2
        print(torch.compile(f, backend="aot_eager")(torch.zeros(2)).tolist())
        variables, fast = dict(os.environ), torch.backends.mha.get_fastpath_enabled()
        print(trace_torch(f)(jnp.zeros(2)).tolist(), "torchax" in sys.modules)
        torch._dynamo.reset()
        print(torch.compile(f, backend="aot_eager")(torch.zeros(2)).tolist())
        print(dict(os.environ) == variables, torch.backends.mha.get_fastpath_enabled() == fast)
    """
    ran = run_program(program)
    expected = ["False", "[0.0, 0.0]", "[0.0, 0.0] True", "[0.0, 0.0]", "True True"]
    assert ran.stdout.splitlines() == expected, ran.stderr
