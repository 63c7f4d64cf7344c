"""A program's outputs are of their declared types: values, gradients, tangents and batches, in
float32 too."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_server.runtime import Options
from bridge_server.torch_runtime import TorchRuntime
from bridge_server.torch_runtime.border import Border
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import CallerError, RemoteModelError, SpecError
from bridge_wire.specs import Spec
from tests.runtimes import Hosted, jvp, placed, vjp, vmap

PRECISIONS = [np.float32, np.float64]


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    return TorchRuntime(Options())


def numbers(dtype: Any, *shape: int) -> np.ndarray:
    """Return the same numbers each time, away from zero."""
    return (np.random.default_rng(0).random(shape) + 0.2).astype(dtype)


def derivative(
    hosted: Hosted, transforms: list[Any], x: np.ndarray, *others: np.ndarray
) -> np.ndarray:
    """Return the derivative of a function of one array; of a batch, of its rows."""
    is_mapped = [each.vmap.axes[0] >= 0 for each in transforms if each.HasField("vmap")]
    program = hosted.call(x[0] if any(is_mapped) else x, transforms=transforms)
    (made,) = hosted.run(program, x, *others)
    return made


# Scalars that meet Python numbers: torch.func.jvp returns their tangents in float64 ---------------


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "half the energy": lambda x: (x**2).sum() * 0.5,
    "shifted": lambda x: x.sum() + 1.0,
    "mean loss": lambda x: 1.0 - (x.sin().mean() / 2.0),
    "log-probability": lambda x: (
        torch.distributions.Normal(0.0, 1.0).log_prob(x).sum() - 0.5 * 3
    ),
    "power": lambda x: 2.0 ** x.sum(),
    "clamped": lambda x: torch.where(x.sum() > 0.0, x.sum() * 3.0, 0.0),
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", SCALARS)
def test_forward_mode_of_scalars(runtime: TorchRuntime, name: str, dtype: Any) -> None:
    """A scalar's tangent is its gradient times the tangent, alone, in a batch and in second
    derivatives."""
    hosted, x, v = (
        Hosted(runtime, SCALARS[name]),
        numbers(dtype, 3),
        numbers(dtype, 3)[::-1].copy(),
    )
    tolerance: dict[str, Any] = {"rtol": 1e-5 if dtype is np.float32 else 1e-12}
    inputs = torch.tensor(x, requires_grad=True)
    (gradient,) = torch.autograd.grad(SCALARS[name](inputs), inputs, create_graph=True)
    expected = (gradient.detach().numpy() * v).sum()
    tangent = derivative(hosted, [jvp([0])], x, v)
    assert tangent.dtype == dtype
    np.testing.assert_allclose(tangent, expected, **tolerance)

    rows = derivative(
        hosted, [jvp([0]), vmap([0, 0], 2)], np.stack([x, x]), np.stack([v, 2 * v])
    )
    np.testing.assert_allclose(rows, [expected, 2 * expected], **tolerance)

    of_tangent = derivative(hosted, [jvp([0]), vjp([1])], x, v, np.ones((), dtype))
    np.testing.assert_allclose(of_tangent, gradient.detach().numpy(), **tolerance)
    if gradient.requires_grad:
        (hvp,) = torch.autograd.grad(gradient, inputs, torch.tensor(v))
        pushed = derivative(hosted, [vjp([0]), jvp([0])], x, np.ones((), dtype), v)
        np.testing.assert_allclose(pushed, hvp, **tolerance)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex64])
def test_forward_mode_of_a_scalar_argument(runtime: TorchRuntime, dtype: Any) -> None:
    """The tangent has the scalar's dtype."""
    tangent = derivative(
        Hosted(runtime, lambda s: s * 2.5),
        [jvp([0])],
        np.ones((), dtype),
        np.ones((), dtype),
    )
    assert tangent.dtype == dtype and tangent == 2.5


# Tensors without memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "sign",
    [torch.sgn, torch.sign, torch.floor, lambda x: (x > 0).to(x.dtype), torch.round],
)
def test_zero_derivatives_are_zeros(
    runtime: TorchRuntime, sign: Callable[[Tensor], Tensor], dtype: Any
) -> None:
    """torch's zero tensors, which have no memory, are zeros in every derivative, alone or added
    to others."""
    x = numbers(dtype, 2)
    for model, expected in ((sign, 0.0), (lambda x: 2 * x + sign(x), 2.0)):
        hosted = Hosted(runtime, model)
        for transforms in ([vjp([0])], [jvp([0])]):
            made = derivative(hosted, transforms, x, np.ones(2, dtype))
            np.testing.assert_array_equal(made, np.full(2, expected, dtype))
        rows = derivative(
            hosted,
            [jvp([0]), vmap([0, 0], 2)],
            np.stack([x, x]),
            np.ones((2, 2), dtype),
        )
        np.testing.assert_array_equal(rows, np.full((2, 2), expected, dtype))
        second = derivative(
            hosted, [vjp([0]), jvp([0])], x, np.ones(2, dtype), np.ones(2, dtype)
        )
        np.testing.assert_array_equal(second, np.zeros(2, dtype))
        program = hosted.call(x, keep=[0])
        _, residual = hosted.run_keeping(program, x)
        pulled = hosted.run(
            hosted.pullback(program, [0]), np.ones(2, dtype), residual=residual
        )
        np.testing.assert_array_equal(pulled[0], np.full(2, expected, dtype))


def _border(dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> Border:
    return Border([Spec(BY_NAME[dtype], shape)], "the model")


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def _left_by_vmap() -> Tensor:
    left: list[Tensor] = []

    def row(x: Tensor) -> Tensor:
        left.append(x)
        return x

    torch.func.vmap(row)(torch.ones(2, 3))
    return left[0]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "fake": (_fake, "FakeTensor"),
    "functorch": (_left_by_vmap, "a torch.func transform that has ended"),
    "meta": (lambda: torch.ones(3, device="meta"), "on meta"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "expected float32",
    ),
    "shape": (lambda: torch.ones(4), r"float32\[4\], expected float32\[3\]"),
    "integer": (lambda: torch.ones(3, dtype=torch.int64), "int64"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "complex64"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "qint8",
    ),
    "no tensor": (lambda: 1.0, "builtins.float"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_outputs_that_cannot_be_read_are_refused(kind: str) -> None:
    """An output without memory, or of a type that torch would not cast, is refused by name and
    never read."""
    make, text = REFUSED[kind]
    with pytest.raises(SpecError, match=f"output 0 of the model is .*{text}"):
        _border().checked([make()])


@pytest.mark.filterwarnings("ignore")
def test_outputs_that_can_be_made_dense() -> None:
    """Zero, sparse and subclassed tensors, and other float types, become strided tensors of the
    declared type."""
    ones = torch.ones(3)
    subclass = type("Ours", (Tensor,), {})
    for given, expected in (
        (ones, ones),
        (ones.double(), ones),
        (ones.bfloat16(), ones),
        (ones.to_sparse(), ones),
        (ones.as_subclass(subclass), ones),
        (torch._efficientzerotensor(3), torch.zeros(3)),
    ):
        (made,) = _border().checked([given])
        assert (
            type(made) is Tensor
            and made.layout is torch.strided
            and not made._is_zerotensor()
        )
        torch.testing.assert_close(made, expected)
    (complex_,) = _border("complex64").checked([ones])
    assert complex_.dtype is torch.complex64


def test_sparse_gradients_of_parameters_are_dense(runtime: TorchRuntime) -> None:
    """Gradients that torch keeps sparse arrive as what they stand for, through residuals and
    programs."""

    def picked(table: dict[str, Tensor], i: Tensor) -> Tensor:
        return nn.functional.embedding(i, table["w"], sparse=True)

    hosted = Hosted(runtime, (picked, {"w": torch.ones(4, 2)}))
    table, i, ct = (
        numbers(np.float32, 4, 2),
        np.array([1, 1, 3]),
        np.ones((3, 2), np.float32),
    )
    program = hosted.call(i, parameters=True, transforms=[vjp([0])])
    expected = np.array([[0, 0], [2, 2], [0, 0], [1, 1]], np.float32)
    np.testing.assert_array_equal(hosted.run(program, table, i, ct)[0], expected)


def test_a_forward_that_writes_only_now_and_then_is_found_out(
    runtime: TorchRuntime,
) -> None:
    """A run that keeps its graph is held to what the trace saw of its writes, as a plain one is."""
    moods = iter([False, True, True])

    def moody(x: Tensor) -> Tensor:
        return x.mul_(2) if next(moods) else x * 2

    hosted, x = (
        Hosted(runtime, lambda x: moody(x.detach()) + x),
        placed(numbers(np.float64, 2)),
    )
    program = hosted.call(x, keep=[0])
    view = hosted.view(x, program.inputs[0])
    with pytest.raises(CallerError, match="wrote into its arguments"):
        program.run([view], None)


def test_rows_lie_where_single_calls_do(runtime: TorchRuntime) -> None:
    """A batch that runs row by row gives operators that count from the memory's beginning what a
    single call gives."""
    hosted = Hosted(
        runtime, lambda x: torch.as_strided_scatter(x, 2 * x[:2], (2,), (2,), 0)
    )
    x = numbers(np.float64, 3, 4)
    single = [hosted.run(hosted.call(row), row)[0] for row in x]
    rows = hosted.run(hosted.call(x[0], transforms=[vmap([0], 3)]), x)[0]
    np.testing.assert_array_equal(rows, np.stack(single))


# Forward mode that would be silently zero ---------------------------------------------------------


class UnderNoGrad(torch.autograd.Function):
    """A sine whose backward cannot be differentiated, and does not say so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        with torch.no_grad():
            return ct * ctx.saved_tensors[0].cos()


class WithContext(torch.autograd.Function):
    """The same, in the form that torch.func can look into."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        with torch.no_grad():
            return ct * ctx.saved_tensors[0].cos()


class Stopping(torch.autograd.Function):
    """An identity whose second input has a gradient that is zero by intent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple[Tensor, Tensor]:
        return ct * 1, torch.zeros_like(ct)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("function", [UnderNoGrad, WithContext])
def test_derivatives_of_backwards_that_have_none(
    runtime: TorchRuntime, function: Any, dtype: Any
) -> None:
    """First reverse-mode derivatives are right; every other one is refused, whatever the
    cotangent."""
    hosted, x = Hosted(runtime, lambda x: function.apply(x)), numbers(dtype, 2)
    ones, zeros = np.ones(2, dtype), np.zeros(2, dtype)
    np.testing.assert_allclose(
        derivative(hosted, [vjp([0])], x, ones), np.cos(x), rtol=1e-6, atol=1e-6
    )
    for transforms, arrays in (
        ([jvp([0])], (x, ones)),
        ([vjp([0]), jvp([0])], (x, ones, ones)),
        ([vjp([0]), jvp([1])], (x, zeros, ones)),
        ([vjp([0]), vjp([1])], (x, zeros, ones)),
        (
            [vjp([0]), jvp([0]), vmap([-1, -1, 0], 2)],
            (x, ones, np.stack([ones, zeros])),
        ),
    ):
        with pytest.raises(
            RemoteModelError,
            match="NotImplementedError: a second derivative, or a forward-mode one",
        ):
            derivative(hosted, transforms, *arrays)


def test_gradients_that_are_zero_by_intent(runtime: TorchRuntime) -> None:
    """A backward that returns zeros whatever its cotangent can be differentiated."""
    hosted, x = (
        Hosted(runtime, lambda x: Stopping.apply(x, x * 3)),
        numbers(np.float64, 2),
    )
    np.testing.assert_array_equal(
        derivative(hosted, [jvp([0])], x, np.ones(2)), np.ones(2)
    )


# One key, one mask --------------------------------------------------------------------------------


def _dropped_attention(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        x, x.transpose(-1, -2).sin().mT, x, dropout_p=0.5
    )


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: nn.functional.dropout(x.sin().T, 0.5),
    "expanded": lambda x: nn.functional.dropout(x.sin()[:, :1].expand(-1, 4), 0.5),
    "sliced": lambda x: nn.functional.dropout(x.sin()[:, ::2], 0.5),
    "alpha": lambda x: nn.functional.alpha_dropout(x.sin().T, 0.5, training=True),
    "noise": lambda x: x.T * torch.randn_like(x.T),
    "uniform in place": lambda x: x.T * torch.empty_like(x.T).uniform_(),
    "rrelu": lambda x: nn.functional.rrelu(-x.T, training=True),
    "attention": _dropped_attention,
}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", DRAWS)
def test_a_key_drops_the_same_in_every_layout(
    runtime: TorchRuntime, name: str, dtype: Any
) -> None:
    """The value, the gradient, the tangent and each row of a batch have one mask."""
    hosted = Hosted(runtime, DRAWS[name])
    key, x = np.array([3, 4], np.uint32), numbers(dtype, 4, 4)
    how: dict[str, Any] = {"rngs": ["dropout"]}
    value = hosted.run(hosted.call(x, **how), key, x)[0]
    rows = hosted.run(
        hosted.call(x, transforms=[vmap([-1, 0], 2)], **how), key, np.stack([x, x])
    )[0]
    np.testing.assert_allclose(rows, np.stack([value, value]), rtol=1e-5, atol=1e-6)

    ct, v = numbers(dtype, *value.shape), numbers(dtype, 4, 4)
    gradient = hosted.run(hosted.call(x, transforms=[vjp([1])], **how), key, x, ct)[0]
    tangent = hosted.run(hosted.call(x, transforms=[jvp([1])], **how), key, x, v)[0]
    np.testing.assert_allclose((gradient * v).sum(), (ct * tangent).sum(), rtol=1e-4)
    program = hosted.call(x, keep=[1], **how)
    (kept,), residual = hosted.run_keeping(program, key, x)
    np.testing.assert_array_equal(kept, value)
    pulled = hosted.run(hosted.pullback(program, [1]), ct, residual=residual)[0]
    np.testing.assert_allclose(pulled, gradient, rtol=1e-6, atol=1e-6)


def test_an_encoder_layer_drops_the_same_in_forward_mode(runtime: TorchRuntime) -> None:
    """The tangent of a transformer's layer in training is that of its value: a finite difference
    agrees."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True).double().train()
    hosted, key, x = (
        Hosted(runtime, layer),
        np.array([0, 1], np.uint32),
        numbers(np.float64, 2, 5, 8),
    )
    v, step = np.sin(np.arange(80.0)).reshape(x.shape), 1e-6
    value = functools.partial(hosted.run, hosted.call(x, rngs=["dropout"]), key)
    difference = (value(x + step * v)[0] - value(x - step * v)[0]) / (2 * step)
    tangent = hosted.run(
        hosted.call(x, rngs=["dropout"], transforms=[jvp([1])]), key, x, v
    )[0]
    np.testing.assert_allclose(tangent, difference, atol=1e-6)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_padding_mask_gives_the_values_that_derivatives_see(
    runtime: TorchRuntime, dtype: Any
) -> None:
    """An encoder in eval mode returns the same for padded positions in a plain run and in one
    that keeps its graph."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = (
            nn.TransformerEncoder(layer, 2)
            .to(getattr(torch, np.dtype(dtype).name))
            .eval()
        )
    hosted = Hosted(runtime, lambda x, mask: encoder(x, src_key_padding_mask=mask))
    x, mask = (
        numbers(dtype, 2, 5, 8),
        np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], bool),
    )
    plain = hosted.run(hosted.call(x, mask), x, mask)[0]
    kept = hosted.run(hosted.call(x, mask, keep=[0]), x, mask)[0]
    np.testing.assert_array_equal(plain, kept)


def test_only_layers_with_a_fast_path_cost_a_switch(runtime: TorchRuntime) -> None:
    """A model is asked for such layers wherever its code reaches them: in itself, in a closure,
    in a list."""
    layer, x = nn.MultiheadAttention(8, 2).eval(), numbers(np.float32, 3, 8)
    layers = {"held": [layer]}
    for model, expected in (
        (lambda x: 2 * x, False),
        (nn.Linear(8, 8), False),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16).eval()), True),
        (lambda x: layer(x, x, x)[0], True),
        (lambda x: layers["held"][0](x, x, x)[0], True),
    ):
        assert Hosted(runtime, model).call(x)._options.has_fast_path is expected
