"""Behaviour of torch code alone: the torch runtime in this process, without a worker."""

import contextlib
import copy
import dataclasses
import functools
import gc
import logging
import math
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from bridge_server.runtime import Options
from bridge_server.torch_runtime import TorchRuntime, tracing
from bridge_wire import trees
from bridge_wire.errors import (
    CallerError,
    ProtocolError,
    RemoteModelError,
    SpecError,
    StructureError,
    TargetError,
)
from bridge_wire.pb import bridge_pb2 as pb
from tests.runtimes import Hosted, jvp, placed, spec_of, vjp, vmap
from tests.server.torch_server import models

_STREAMS = ["dropout"]


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    return TorchRuntime(Options())


@pytest.fixture
def hosted(runtime: TorchRuntime, request: pytest.FixtureRequest) -> Hosted:
    """The model of tests/server/torch_server/models.py that the test names."""
    return Hosted(runtime, getattr(models, request.param), request.param)


def serving(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("hosted", [name], indirect=True)


def rand(*shape: int) -> np.ndarray:
    """Return the same numbers each time, away from zero."""
    return np.random.default_rng(0).random(shape) + 0.2


def values_of(module: nn.Module) -> list[np.ndarray]:
    """Return copies of a module's tensors, in the order of its parameters on the wire."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [each.detach().numpy().copy() for each in named.values()]


def assert_same(seen: Any, expected: Any, tolerance: float = 1e-10) -> None:
    expected = [
        each.detach().numpy() if isinstance(each, Tensor) else each for each in expected
    ]
    assert len(seen) == len(expected)
    for mine, theirs in zip(seen, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


# Modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hosted", "x"),
    [
        pytest.param("resnet", rand(2, 3, 8, 8), id="resnet"),
        pytest.param("vit", rand(2, 3, 8, 8), id="vit"),
        pytest.param("tied", rand(5, 4), id="tied"),
        pytest.param("recurrent", rand(2, 5, 3), id="recurrent"),
    ],
    indirect=["hosted"],
)
def test_gradients_of_modules_are_torchs(hosted: Hosted, x: np.ndarray) -> None:
    """A module's outputs, and their cotangents for the input and every weight, are torch's own."""
    module = getattr(models, hosted.model.name)
    state = values_of(module)
    count = len(state)
    wrt = [
        i for i, parameter in enumerate(hosted.model.parameters) if parameter.trainable
    ] + [count]
    program = hosted.call(x, parameters=True, keep=wrt)
    outputs, residual = hosted.run_keeping(program, *state, x)
    cotangents = [np.cos(y) for y in outputs]
    seen = hosted.run(
        hosted.pullback(program, wrt, range(len(outputs))),
        *cotangents,
        residual=residual,
    )

    inputs = [
        torch.tensor(each, requires_grad=i in wrt) for i, each in enumerate([*state, x])
    ]
    named = dict(zip((p.path for p in hosted.model.parameters), inputs, strict=False))
    expected = torch.utils._pytree.tree_leaves(
        functional_call(module, named, (inputs[-1],))
    )
    gradients = torch.autograd.grad(
        expected, [inputs[i] for i in wrt], [torch.tensor(ct) for ct in cotangents]
    )
    assert_same(outputs, expected)
    assert_same(seen, gradients)
    again = hosted.run(
        hosted.call(x, parameters=True, transforms=[vjp(wrt, range(len(outputs)))]),
        *state,
        x,
        *cotangents,
    )
    assert_same(again, gradients)


@serving("tied")
def test_tied_weights_are_one_parameter(hosted: Hosted) -> None:
    """A weight at two places is named once, and a parameter that is not trained is no trainable
    one."""
    assert [(p.path, p.trainable) for p in hosted.model.parameters] == [
        ("scale", False),
        ("encoder.weight", True),
    ]
    x, state = rand(1, 4), values_of(models.tied)
    changed = [state[0], 2 * state[1]]
    expected = np.tanh(x @ changed[1].T) @ changed[1].T * 2
    assert_same(hosted.run(hosted.call(x, parameters=True), *changed, x), [expected])


def test_attention_in_eval_mode_has_forward_derivatives(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's fused encoder layer has none: the layer is then computed as in training, and the
    switches put back."""
    module = copy.deepcopy(models.vit).eval()
    hosted, x = Hosted(runtime, module), rand(1, 3, 4, 4)
    with caplog.at_level(logging.WARNING, "bridge_server"):
        pushed = hosted.run(hosted.call(x, transforms=[jvp([0])]), x, np.ones_like(x))[
            0
        ]
    assert not caplog.text
    (gradient,) = hosted.run(hosted.call(x, transforms=[vjp([0])]), x, np.ones((1, 3)))
    np.testing.assert_allclose(pushed.sum(), gradient.sum(), rtol=1e-10)
    assert (
        torch.backends.mha.get_fastpath_enabled()
        and torch.backends.cuda.flash_sdp_enabled()
    )


@serving("vit")
def test_second_derivatives_of_modules(hosted: Hosted) -> None:
    """The derivative of a gradient along a direction is torch's, in both modes."""
    x, state = rand(1, 3, 4, 4), values_of(models.vit)
    count = len(state)
    ct, direction = rand(1, 3), np.cos(rand(*x.shape))
    gradient = [vjp([count])]
    module = models.vit

    def energy(x: Tensor) -> Tensor:
        return (module(x) * torch.tensor(ct)).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        _, expected = torch.autograd.functional.hvp(
            energy, torch.tensor(x), torch.tensor(direction)
        )
    forward = hosted.call(x, parameters=True, transforms=[*gradient, jvp([count])])
    assert_same(hosted.run(forward, *state, x, ct, direction), [expected])
    reverse = hosted.call(x, parameters=True, transforms=[*gradient, vjp([count])])
    assert_same(hosted.run(reverse, *state, x, ct, direction), [expected])


@serving("normed")
def test_changed_buffers_are_outputs(hosted: Hosted) -> None:
    """A mutable call returns the new statistics; nothing that it was given, and nothing here, is
    changed."""
    x, state = rand(6, 3), values_of(models.normed)
    inputs = [placed(each) for each in (*state, x)]
    program = hosted.call(x, parameters=True, mutable=True, keep=[0, 1])
    views = [hosted.view(each, spec_of(each)) for each in inputs]
    made, _ = program.run(views, None)
    outputs = [
        hosted.written(y, spec) for y, spec in zip(made, program.outputs, strict=True)
    ]

    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    twin.load_state_dict(
        {
            p.path: torch.tensor(each)
            for p, each in zip(hosted.model.parameters, state, strict=True)
        }
    )
    expected = twin(torch.tensor(x))
    assert_same(outputs, [expected, *twin.buffers()])
    for mine, theirs in zip(inputs, (*state, x), strict=True):
        assert (mine == theirs).all()
    assert_same(values_of(models.normed), state)


@serving("normed")
def test_buffers_of_other_calls_are_dropped(hosted: Hosted) -> None:
    """Without `mutable`, and without parameters, the statistics do not change."""
    x, before = rand(6, 3), values_of(models.normed)
    first = hosted.run(hosted.call(x), x)
    hosted.run(hosted.call(x, parameters=True), *before, x)
    assert_same(hosted.run(hosted.call(x), x), first)
    assert_same(values_of(models.normed), before)


def test_no_gradient_goes_through_buffers(runtime: TorchRuntime) -> None:
    """The new value of a buffer is a constant to every derivative, also where the module
    computes it from weights."""

    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(()).double())

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.5 * self.mean + 0.5 * x.mean()
            return x * 2

    hosted, x = Hosted(runtime, Averaging()), rand(3)
    state = np.array(1.0)
    program = hosted.call(x, parameters=True, mutable=True, keep=[1])
    outputs, residual = hosted.run_keeping(program, state, x)
    assert_same(outputs, [2 * x, 0.5 + 0.5 * x.mean()])
    made = hosted.run(
        hosted.pullback(program, [1], [0, 1]),
        np.ones(3),
        np.array(7.0),
        residual=residual,
    )
    assert_same(made, [np.full(3, 2.0)])
    pushed = hosted.call(
        x, parameters=True, mutable=True, transforms=[jvp([1], [0, 1])]
    )
    assert_same(
        hosted.run(pushed, state, x, np.ones(3)), [np.full(3, 2.0), np.array(0.0)]
    )


@serving("normed")
def test_statistics_of_a_batch_of_calls(hosted: Hosted) -> None:
    """Each row of a batch of mutable calls has statistics of its own."""
    x, state = rand(2, 6, 3), values_of(models.normed)
    axes = [-1] * len(state) + [0]
    batched = hosted.call(
        x[0], parameters=True, mutable=True, transforms=[vmap(axes, 2)]
    )
    single = hosted.call(x[0], parameters=True, mutable=True)
    rows = [hosted.run(single, *state, row) for row in x]
    assert_same(
        hosted.run(batched, *state, x),
        [np.stack(each) for each in zip(*rows, strict=True)],
    )


def test_a_module_is_served_in_the_mode_it_has(runtime: TorchRuntime) -> None:
    """A module in eval mode when it is loaded stays in it."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9)).double().eval()
    hosted = Hosted(runtime, module)
    module.train()
    x = rand(2, 3)
    assert_same(hosted.run(hosted.call(x), x), [module[0](torch.tensor(x))])


def test_lazy_modules_and_unknown_parameters_are_refused(runtime: TorchRuntime) -> None:
    """A module without values yet, and a pair that names other parameters, are TargetErrors."""
    with pytest.raises(TargetError, match=r"'weight' of 'model' has no values yet"):
        Hosted(runtime, nn.LazyLinear(3))
    with pytest.raises(TargetError, match="no parameter 'wieght'"):
        Hosted(runtime, (nn.Linear(2, 2), {"wieght": torch.zeros(2, 2)}))
    with pytest.raises(TargetError, match=r"'w' of 'model' is a float"):
        Hosted(runtime, (lambda params, x: x, {"w": 1.0}))


def test_a_module_with_other_values(runtime: TorchRuntime) -> None:
    """A pair of a module and some of its parameters is that module with these."""
    module = nn.Linear(2, 2, bias=False).double()
    hosted = Hosted(runtime, (module, {"weight": torch.eye(2).double()}))
    x = rand(3, 2)
    assert_same(hosted.run(hosted.call(x), x), [x])


def test_a_module_that_cannot_be_copied_is_served(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """Its calls are made on itself, one at a time, and leave it as it is."""
    module = nn.Linear(2, 2, bias=False).double()
    module.lock = threading.Lock()  # type: ignore[assignment]
    weight = module.weight
    with caplog.at_level(logging.WARNING, "bridge_server"):
        hosted = Hosted(runtime, module)
    assert "Linear cannot be copied, so it serves one call at a time" in caplog.text
    x = rand(3, 2)
    assert_same(hosted.run(hosted.call(x, parameters=True), 2 * np.eye(2), x), [2 * x])
    assert_same(hosted.run(hosted.call(x), x), [module(torch.tensor(x))])
    assert module.weight is weight


class Closing(nn.Module):
    """Uses a weight by a closure over itself, which a copy does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False).double()
        self.code = lambda x: self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(x)


class Listing(nn.Module):
    """Uses a weight that it has in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2).double())
        self.weights = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weights[0]


def test_a_module_that_closes_over_itself_gets_the_callers_weights(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """Copies that would still use the original's weights are given up, for the original and one
    call at a time."""
    hosted, x = Hosted(runtime, Closing()), rand(3, 2)
    with caplog.at_level(logging.WARNING, "bridge_server"):
        program = hosted.call(x, parameters=True, keep=[0])
    assert "copies of Closing use its own tensors" in caplog.text
    outputs, residual = hosted.run_keeping(program, 2 * np.eye(2), x)
    assert_same(outputs, [2 * x])
    made = hosted.run(hosted.pullback(program, [0]), np.ones((3, 2)), residual=residual)
    assert_same(made, [np.stack([x.sum(0)] * 2)])


def test_a_weight_that_cannot_be_replaced_is_refused(runtime: TorchRuntime) -> None:
    """A module that uses a weight past its registration would get no gradient of it; with its
    own weights it works."""
    hosted, x = Hosted(runtime, Listing()), rand(2)
    with pytest.raises(CallerError, match="'weight' through an unregistered reference"):
        hosted.call(x, parameters=True)
    assert_same(hosted.run(hosted.call(x), x), [x])


def test_a_module_keeps_nothing_of_its_caller(runtime: TorchRuntime) -> None:
    """After a call no module holds the caller's weights: not even an LSTM, which has a list of
    its own."""
    hosted = Hosted(runtime, models.recurrent)
    x, state = rand(1, 2, 3), values_of(models.recurrent)
    program = hosted.call(x, parameters=True)
    views = [hosted.view(placed(each), spec_of(each)) for each in (*state, x)]
    weights = [weakref.ref(view) for view in views]
    program.run(views, None)
    del views
    gc.collect()
    assert [ref() for ref in weights] == [None] * len(weights)


# Randomness ---------------------------------------------------------------------------------------


def key(number: int) -> np.ndarray:
    return np.array([number, 7], np.uint32)


@serving("dropped")
def test_a_key_decides_what_is_dropped(hosted: Hosted) -> None:
    """The same key drops the same in each run and in each derivative, another key something
    else."""
    x, state = rand(8, 4), values_of(models.dropped)
    program = hosted.call(x, parameters=True, rngs=_STREAMS)
    first, again, other = (hosted.run(program, *state, key(n), x)[0] for n in (1, 1, 2))
    assert_same([first], [again])
    assert (first != other).any()

    weight = models.dropped[0].weight.detach().numpy()
    mask = (first != 0) * 2.0
    ct = rand(8, 4)
    pulled = (ct * mask) @ weight
    inputs = (*state, key(1), x)
    wrt = [len(state) + 1]
    kept = hosted.call(x, parameters=True, rngs=_STREAMS, keep=wrt)
    _, residual = hosted.run_keeping(kept, *inputs)
    assert_same(hosted.run(hosted.pullback(kept, wrt), ct, residual=residual), [pulled])
    recomputed = hosted.call(x, parameters=True, rngs=_STREAMS, transforms=[vjp(wrt)])
    assert_same(hosted.run(recomputed, *inputs, ct), [pulled])
    pushed = hosted.call(x, parameters=True, rngs=_STREAMS, transforms=[jvp(wrt)])
    assert_same(hosted.run(pushed, *inputs, ct), [ct @ weight.T * mask])


def test_derivatives_of_what_draws_without_a_key_are_told(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """A derivative that draws anew is not that of the value: the log says so.

    One that goes by the residual is.
    """
    hosted, x = Hosted(runtime, nn.Dropout(0.5)), rand(4)
    hosted.call(x, keep=[0])
    hosted.call(x, transforms=[vmap([0], 2)])
    assert not caplog.messages
    hosted.call(x, transforms=[jvp([1])], rngs=["default"])
    assert not caplog.messages
    for transform in (jvp([0]), vjp([0])):
        hosted.call(x, transforms=[transform])
    assert len(caplog.messages) == 1
    assert "float64[4]) draws random numbers without a key" in caplog.text


def test_attention_without_dropout_draws_nothing(runtime: TorchRuntime) -> None:
    """It need not wait for others that draw, and its derivatives need no key."""
    hosted, x = (
        Hosted(runtime, torch.nn.functional.scaled_dot_product_attention),
        rand(1, 2, 4),
    )
    assert not hosted.call(x, x, x).draws
    dropping = Hosted(
        runtime,
        lambda x: torch.nn.functional.scaled_dot_product_attention(
            x, x, x, dropout_p=0.5
        ),
    )
    assert dropping.call(x).draws


@serving("dropped")
def test_keys_in_batches(hosted: Hosted) -> None:
    """A batch drops what its rows would: the same in each for one key, and each its own for keys
    of their own."""
    x, state = rand(3, 4), values_of(models.dropped)
    single = hosted.call(x[0], parameters=True, rngs=_STREAMS)
    for keys, axis in ((key(1), -1), (np.stack([key(n) for n in range(3)]), 0)):
        axes = [-1] * len(state) + [axis, 0]
        batched = hosted.call(
            x[0], parameters=True, rngs=_STREAMS, transforms=[vmap(axes, 3)]
        )
        rows = [
            hosted.run(single, *state, keys if axis < 0 else keys[i], row)[0]
            for i, row in enumerate(x)
        ]
        assert_same(hosted.run(batched, *state, keys, x), [np.stack(rows)])


@serving("dropped")
def test_keys_leave_torchs_own_stream_alone(hosted: Hosted) -> None:
    """A call with a key draws nothing from the global generator; one without draws from there."""
    x, state = rand(8, 4), values_of(models.dropped)
    seeded = hosted.call(x, parameters=True, rngs=_STREAMS)
    free = hosted.call(x)
    torch.manual_seed(0)
    expected = [hosted.run(free, x)[0] for _ in range(2)]
    torch.manual_seed(0)
    first = hosted.run(free, x)[0]
    hosted.run(seeded, *state, key(1), x)
    assert_same([first, hosted.run(free, x)[0]], expected)
    assert (expected[0] != expected[1]).any()


def test_a_slow_trace_holds_up_nobody(runtime: TorchRuntime) -> None:
    """While one call is traced, others are traced and draw."""
    traced, go_on = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        traced.set()
        assert go_on.wait(30)
        return x * 2

    with ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(Hosted(runtime, slow).call, rand(2))
        assert traced.wait(30)
        dropped, x = Hosted(runtime, models.dropped), rand(8, 4)
        dropped.run(dropped.call(x), x)
        go_on.set()
        preparing.result(30)


@serving("dropped")
def test_keys_hold_while_others_draw(hosted: Hosted) -> None:
    """Calls without a key in other threads do not change the elements that a key drops."""
    x, state = rand(64, 4), values_of(models.dropped)
    seeded, free = hosted.call(x, parameters=True, rngs=_STREAMS), hosted.call(x)
    expected = hosted.run(seeded, *state, key(1), x)
    start = threading.Barrier(3)

    def draw(_: int) -> None:
        start.wait()
        for _ in range(100):
            hosted.run(free, x)

    with ThreadPoolExecutor(2) as pool:
        drawing = pool.map(draw, range(2))
        start.wait()
        for _ in range(100):
            assert_same(hosted.run(seeded, *state, key(1), x), expected)
        list(drawing)


# Code that is no function -------------------------------------------------------------------------


@contextlib.contextmanager
def untouched(*arrays: np.ndarray) -> Iterator[None]:
    before = [each.copy() for each in arrays]
    yield
    for mine, theirs in zip(arrays, before, strict=True):
        assert (mine == theirs).all()


def run_on(hosted: Hosted, program: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    """Run on the arrays themselves."""
    outputs, _ = program.run(
        [hosted.view(each, spec_of(each)) for each in arrays], None
    )
    return [
        hosted.written(y, spec)
        for y, spec in zip(outputs, program.outputs, strict=True)
    ]


@serving("in_place")
def test_in_place_code_never_writes_into_the_callers_memory(hosted: Hosted) -> None:
    """A model that writes into its input gets a copy, in a forward and in every derivative."""
    x, one = placed(rand(4)), placed(np.ones(4))
    inner = np.array([1.0, *(2 * x[1:] + 1)])
    slope = np.array([0.0, *np.cos(inner[1:])])
    with untouched(x, one):
        assert_same(run_on(hosted, hosted.call(x), x), [np.sin(inner)])
        for transform in (vjp([0]), jvp([0])):
            assert_same(
                run_on(hosted, hosted.call(x, transforms=[transform]), x, one), [slope]
            )
        batched = hosted.call(x, transforms=[vmap([0], 2)])
        rows = placed(np.stack([x, x]))
        with untouched(rows):
            assert_same(run_on(hosted, batched, rows), [np.stack([np.sin(inner)] * 2)])
        program = hosted.call(x, keep=[0])
        _, residual = program.run([hosted.view(x, spec_of(x))], None)
        assert_same(
            hosted.run(hosted.pullback(program, [0]), one, residual=residual), [slope]
        )


@serving("by_value")
def test_a_model_that_looks_at_values_is_run_on_zeros_first(
    runtime: TorchRuntime, hosted: Hosted, caplog: pytest.LogCaptureFixture
) -> None:
    """A log line says so; later calls take the branch of their own values, and change no input."""
    x = placed(rand(3))
    with caplog.at_level(logging.WARNING, "bridge_server"):
        program = hosted.call(x)
    assert (
        "model 'by_value' called with (args[0]: float64[3]) was run once on zeros"
        in caplog.text
    )
    with untouched(x):
        assert_same(run_on(hosted, program, x), [3 * x + 1])
    x *= -1
    assert_same(run_on(hosted, program, x), [x + 1])
    x *= -1
    vjp_program = hosted.call(x, transforms=[vjp([0])])
    assert_same(run_on(hosted, vjp_program, x, placed(np.ones(3))), [np.full(3, 3.0)])
    batched = hosted.call(x, transforms=[vmap([0], 2)])
    rows = placed(np.stack([x, -x]))
    assert_same(run_on(hosted, batched, rows), [np.stack([3 * x + 1, -x + 1])])


def test_a_model_that_refuses_zeros_is_run_on_other_values(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """Distributions look at their parameters, and have no density at a scale of zero, or none of
    ones everywhere."""
    # TorchDynamo switches the validation off for a whole process, once anything was compiled there.
    normal = functools.partial(torch.distributions.Normal, validate_args=True)
    multivariate = functools.partial(
        torch.distributions.MultivariateNormal, validate_args=True
    )
    scaled = Hosted(runtime, lambda x, s: normal(x, s).log_prob(x))
    correlated = Hosted(runtime, lambda x, c: multivariate(x, c).log_prob(x))
    x = placed(np.full(3, 2.0))
    with caplog.at_level(logging.WARNING, "bridge_server"):
        programs = [scaled.call(x, x), correlated.call(x, placed(np.eye(3)))]
    assert "was run once on ones" in caplog.text
    assert "was run once on identity matrices" in caplog.text
    density = -math.log(2 * math.pi) / 2
    assert_same(run_on(scaled, programs[0], x, x), [np.full(3, density - math.log(2))])
    assert_same(
        run_on(correlated, programs[1], x, placed(np.eye(3))), [np.asarray(3 * density)]
    )


def test_a_model_is_run_on_increasing_numbers_last(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """Boxes and lengths are found; the values go as far as their types do."""
    seen: list[Any] = []

    def boxes(corners: Tensor, lengths: Tensor, flags: Tensor) -> Tensor:
        if (
            not (corners[:, 2:] > corners[:, :2]).all()
            or not lengths.unique().numel() > 1
        ):
            raise ValueError("no boxes")
        seen.extend([corners.tolist(), lengths.tolist(), flags.tolist()])
        return corners.sum() + lengths.sum()

    lengths = placed(np.full(130, 5, np.int8))
    with caplog.at_level(logging.WARNING, "bridge_server"):
        Hosted(runtime, boxes).call(
            placed(rand(2, 4)), lengths, placed(np.ones(2, bool))
        )
    assert "was run once on the numbers 1, 2, 3, ..." in caplog.text
    assert seen[0] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert seen[1] == [*range(1, 128), 127, 127, 127]
    assert seen[2] == [True, True]


def test_an_example_of_another_size_is_refused(runtime: TorchRuntime) -> None:
    """The bytes of an example are those of the inputs' types."""
    hosted = Hosted(runtime, torch.sin)
    call = hosted.described(placed(rand(3)))
    call.examples.append(bytes(8))
    with pytest.raises(ProtocolError, match=r"have \[8\] bytes; expected \[24\]"):
        hosted.prepared(call)


def test_a_loop_without_an_end_on_zeros_is_left(
    runtime: TorchRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that doubles its input until it is large is run on ones; one that goes on for good
    is an error."""
    monkeypatch.setattr(tracing, "_MOST_OPERATORS", (100, 1000))

    def doubled(x: Tensor, most: float) -> Tensor:
        while x.abs().sum() < most:
            try:
                x = x * 2
            except Exception:
                x = x * 0
        return x

    hosted, x = Hosted(runtime, doubled), placed(np.ones(2))
    program = hosted.call(x, 20.0)
    assert_same(
        run_on(hosted, program, x, placed(np.asarray(20.0))), [np.full(2, 16.0)]
    )
    with pytest.raises(
        CallerError,
        match=r"did not end within 1000 operators on zeros or on ones or on identity",
    ):
        Hosted(
            runtime,
            lambda x: doubled(x, math.inf) if x.sum() < 1 else doubled(x * 0, 1.0),
        ).call(x)


def test_a_model_that_writes_now_and_then_is_found_out(runtime: TorchRuntime) -> None:
    """A write that no trace can foresee is an error at once, and the model gets copies after it."""
    moods = iter([False, False, True, True])

    def moody(x: Tensor) -> Tensor:
        return x.mul_(2) if next(moods) else x * 2

    hosted, x = Hosted(runtime, moody), placed(rand(2))
    program = hosted.call(x)
    assert_same(run_on(hosted, program, x), [2 * x])
    with pytest.raises(CallerError, match="wrote into its arguments"):
        run_on(hosted, program, x)
    with untouched(x):
        assert_same(run_on(hosted, program, x), [2 * x])


@serving("growing")
def test_an_output_that_changes_its_shape_is_named(hosted: Hosted) -> None:
    """A model whose output has another shape than it had is refused by name and leaf."""
    program = hosted.call(rand(3))
    with pytest.raises(
        SpecError,
        match=r"the result\['found'\] of model 'growing' is now float64\[3\].*float64\[0\]",
    ):
        hosted.run(program, rand(3))


def test_an_output_that_changes_its_structure_is_refused(runtime: TorchRuntime) -> None:
    """A model that returns its tensors in other containers than at first is told so."""
    answers: list[Any] = []

    def changing(x: Tensor) -> Any:
        return answers[-1](x)

    hosted, x = Hosted(runtime, changing), rand(2)
    shapes = [
        lambda x: {"a": x, "b": [x, (x, None)]},
        lambda x: {"a": x, "c": [x, (x, None)]},
        lambda x: {"a": x, "b": [x, (x, x)]},
        lambda x: {"a": x, "b": (x, (x, None))},
        lambda x: {"a": x, "b": [x]},
        lambda x: {"a": None, "b": [x, (x, None)]},
        lambda x: x,
    ]
    answers.append(shapes[0])
    program = hosted.call(x)
    assert_same(hosted.run(program, x), [x, x, x])
    for other in shapes[1:]:
        answers.append(other)
        with pytest.raises(
            StructureError, match=r"another structure.*the result\['b'\]\[1\]\[0\]"
        ):
            hosted.run(program, x)


def test_records_are_results_too(runtime: TorchRuntime) -> None:
    """Dataclasses and namedtuples of a model, and those that torch returns, consist of their
    fields."""

    @dataclasses.dataclass
    class Output:
        logits: Tensor
        loss: Tensor | None = None

    def recording(x: Tensor) -> Any:
        return Output(x * 2), Pair(x, x.max(0))

    hosted, x = Hosted(runtime, recording), rand(2)
    program = hosted.call(x)
    leaves = ["[0].logits", "[1].first", "[1].second[0]", "[1].second[1]"]
    assert trees.leaf_paths(program.result, "") == leaves
    assert_same(hosted.run(program, x), [2 * x, x, x.max(), x.argmax()])


class Pair(NamedTuple):
    first: Any
    second: Any


def test_outputs_die_with_the_call(runtime: TorchRuntime) -> None:
    """Nothing holds outputs until the garbage collector comes."""
    hosted, x = Hosted(runtime, lambda x: {"y": x + 1, "z": [x + 2]}), placed(rand(2))
    for program in (
        hosted.call(x),
        hosted.call(x, transforms=[vjp([0])]),
        hosted.call(x, keep=[0]),
    ):
        views = [hosted.view(placed(rand(2)), spec) for spec in program.inputs]
        gc.disable()
        try:
            outputs, kept = program.run(views, None)
            outputs = [weakref.ref(y) for y in outputs]
            del kept
            assert [ref() for ref in outputs] == [None] * len(outputs)
        finally:
            gc.enable()


def test_an_output_that_is_no_tensor_is_named(runtime: TorchRuntime) -> None:
    """A model that returns an object, or nothing, is told which leaf that is."""
    with pytest.raises(
        StructureError,
        match=r"the result\['count'\] of model 'model' is a builtins\.object",
    ):
        Hosted(runtime, lambda x: {"count": object(), "x": x}).call(rand(3))
    with pytest.raises(
        StructureError, match=r"the result of model 'model' holds no tensor"
    ):
        Hosted(runtime, lambda x: None).call(rand(3))


class Checkpointed(nn.Module):
    """Recomputes its activations in the backward pass."""

    def __init__(self, *uncopyable: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.uncopyable = uncopyable

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)


def test_what_is_computed_again_is_so_with_the_callers_weights(
    runtime: TorchRuntime,
) -> None:
    """A backward pass that calls parts of the module again finds the weights of its own forward,
    whatever was called since, also within one program; modules that serve such calls go with their
    graphs.
    """
    module = Checkpointed()
    hosted, x, (weight, bias) = Hosted(runtime, module), rand(4, 3), values_of(module)
    leaves = [
        torch.tensor(each, requires_grad=True) for each in (2 * weight, 2 * bias, x)
    ]
    expected = torch.autograd.grad(
        torch.tanh(nn.functional.linear(leaves[2], *leaves[:2])).sum(), leaves
    )
    ones = np.ones((4, 2))

    program = hosted.call(x, parameters=True, keep=[0, 1, 2])
    kept = [hosted.run_keeping(program, k * weight, k * bias, x)[1] for k in (2, 3, 1)]
    assert_same(
        hosted.run(hosted.pullback(program, [0, 1, 2]), ones, residual=kept[0]),
        expected,
    )
    at_once = hosted.call(x, parameters=True, transforms=[vjp([2])])
    assert_same(hosted.run(at_once, 2 * weight, 2 * bias, x, ones), expected[2:])

    alone = Hosted(runtime, Checkpointed(lock := threading.Lock()))
    assert not lock.locked()
    with pytest.raises(
        CallerError,
        match="Checkpointed runs parts of itself again in its backward pass",
    ):
        alone.run_keeping(alone.call(x, parameters=True, keep=[2]), weight, bias, x)
    assert_same(
        alone.run(alone.call(x, parameters=True), weight, bias, x),
        [np.tanh(x @ weight.T + bias)],
    )


def test_a_batch_of_what_is_computed_again(runtime: TorchRuntime) -> None:
    """Its rows are computed one by one, since no batch can be taken up later."""
    module = Checkpointed()
    hosted, x, (weight, bias) = (
        Hosted(runtime, module),
        rand(2, 4, 3),
        values_of(module),
    )
    program = hosted.call(
        x[0], parameters=True, transforms=[vmap([-1, -1, 0], 2)], keep=[2]
    )
    made, kept = hosted.run_keeping(program, weight, bias, x)
    expected = np.tanh(x @ weight.T + bias)
    assert_same(made, [expected])
    gradient = hosted.run(
        hosted.pullback(program, [2]), np.ones_like(expected), residual=kept
    )
    assert_same(gradient, [(1 - expected**2) @ weight])


def test_sparse_gradients_are_made_dense(runtime: TorchRuntime) -> None:
    """The gradient of an `nn.Embedding(sparse=True)` is sent as any other."""
    embedding = nn.Embedding(3, 2, sparse=True, dtype=torch.float64)
    hosted, rows = Hosted(runtime, embedding), np.array([1, 1, 2])
    program = hosted.call(rows, parameters=True, keep=[0])
    kept = hosted.run_keeping(program, values_of(embedding)[0], rows)[1]
    made = hosted.run(hosted.pullback(program, [0]), np.ones((3, 2)), residual=kept)
    assert_same(made, [np.array([[0.0, 0.0], [2.0, 2.0], [1.0, 1.0]])])


def test_an_output_without_values_is_named(runtime: TorchRuntime) -> None:
    """A tensor on the device meta has nothing to send."""
    with pytest.raises(
        SpecError, match=r"the result\['y'\] of model 'model' is on meta"
    ):
        Hosted(runtime, lambda x: {"y": x.to("meta")}).call(rand(3))


@serving("forces")
def test_models_that_differentiate_inside(hosted: Hosted) -> None:
    """autograd.grad works in a model, though nobody asked for a gradient; and its derivative
    does."""
    x = rand(3)
    assert_same(hosted.run(hosted.call(x), x), [4 * x**3])
    program = hosted.call(x, keep=[0])
    _, residual = hosted.run_keeping(program, x)
    made = hosted.run(hosted.pullback(program, [0]), np.ones(3), residual=residual)
    assert_same(made, [12 * x**2])


_OLD = {
    "vjp": ([vjp([0])], lambda f, x: f(x)[1]),
    "jvp": ([jvp([0])], lambda f, x: f(x)[1]),
    "jvp of vjp": ([vjp([0]), jvp([0])], lambda f, x: f(x)[2]),
    "vjp of jvp": ([jvp([0]), vjp([0])], lambda f, x: f(x)[2]),
    "vmap of vjp": ([vjp([0]), vmap([0, 0], 3)], lambda f, x: f(x)[1]),
    "vjp of vmap": ([vmap([0], 3), vjp([0])], lambda f, x: f(x)[1]),
}


@serving("old_style")
@pytest.mark.parametrize("name", _OLD)
def test_functions_that_torch_func_cannot_trace(hosted: Hosted, name: str) -> None:
    """An autograd.Function without setup_context has every derivative and batch all the same."""
    transforms, expected = _OLD[name]

    def derivatives(x: np.ndarray) -> tuple[np.ndarray, ...]:
        s, c = np.sin(x), np.cos(x)
        return s**3, 3 * s**2 * c, 6 * s * c**2 - 3 * s**3

    x = rand(3, 2) if "vmap" in name else rand(2)
    program = hosted.call(rand(2), transforms=transforms)
    ones = [np.ones_like(x)] * (len(program.inputs) - 1)
    assert_same(hosted.run(program, x, *ones), [expected(derivatives, x)])


def test_a_backward_that_cannot_be_differentiated_says_so(
    runtime: TorchRuntime,
) -> None:
    """A second derivative of an autograd.Function with a once_differentiable backward is the
    model's error."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, ct: Tensor) -> Tensor:
            return ct * 2 * ctx.saved_tensors[0]

    hosted, x = Hosted(runtime, Once.apply), rand(2)
    assert_same(hosted.run(hosted.call(x, transforms=[vjp([0])]), x, x), [2 * x * x])
    with pytest.raises(RemoteModelError, match="once_differentiable"):
        hosted.run(hosted.call(x, transforms=[vjp([0]), vjp([0])]), x, x, x)


@pytest.mark.parametrize(
    "transforms",
    [
        [jvp([0])],
        [vjp([0])],
        [jvp([0]), jvp([0])],
        [vjp([0]), jvp([0])],
        [jvp([0]), vjp([0])],
        [vjp([0]), vjp([0])],
    ],
    ids=["jvp", "vjp", "jvp of jvp", "jvp of vjp", "vjp of jvp", "vjp of vjp"],
)
def test_no_grad_stops_both_modes(
    runtime: TorchRuntime, transforms: list[pb.Transform]
) -> None:
    """What is computed under no_grad is a constant for each derivative, and what enable_grad
    takes back is not."""

    def partly(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x**3
            with torch.enable_grad():
                square = x**2
        return scale * x + square

    hosted, x = Hosted(runtime, partly), rand(3)
    program = hosted.call(x, transforms=transforms)
    ones = [np.ones(3)] * (len(program.inputs) - 1)
    assert_same(
        hosted.run(program, x, *ones),
        [x**3 + 2 * x if len(transforms) == 1 else np.full(3, 2.0)],
    )


def test_second_forward_mode_derivatives_of_functions_with_a_rule_of_their_own(
    runtime: TorchRuntime,
) -> None:
    """They are not zero, as in torch, also in a batch."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, ct: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * ct

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * tangent

        @staticmethod
        def vmap(info: Any, dims: Any, x: Tensor) -> Any:
            return Cube.apply(x), dims[0]

    hosted, x, one = Hosted(runtime, lambda x: Cube.apply(x)), rand(3), np.ones(3)
    twice = [jvp([0]), jvp([0])]
    assert_same(hosted.run(hosted.call(x, transforms=twice), x, one, one), [6 * x])
    assert_same(
        hosted.run(
            hosted.call(x[0], transforms=[*twice, vmap([0, 0, 0], 3)]), x, one, one
        ),
        [6 * x],
    )
    assert_same(
        hosted.run(hosted.call(x, transforms=[*twice, jvp([0])]), x, one, one, one),
        [np.full(3, 6.0)],
    )


# Residuals ----------------------------------------------------------------------------------------


def test_a_forward_under_grad_is_run_once(runtime: TorchRuntime) -> None:
    """Pullbacks, however many, run nothing of the forward again."""
    runs = []

    def counted(x: Tensor) -> Tensor:
        runs.append(x)
        return x.exp()

    hosted, x = Hosted(runtime, counted), rand(2)
    program = hosted.call(x, keep=[0])
    runs.clear()
    _, residual = hosted.run_keeping(program, x)
    for _ in range(3):
        assert_same(
            hosted.run(hosted.pullback(program, [0]), np.ones(2), residual=residual),
            [np.exp(x)],
        )
    assert len(runs) == 1


def test_only_what_is_asked_for_is_differentiated(runtime: TorchRuntime) -> None:
    """A pullback to one input does no work for the others, and a plain call records nothing."""
    asked = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            asked.append(ctx.needs_input_grad)
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, ct: Tensor) -> tuple[Tensor | None, Tensor | None]:
            x, y = ctx.saved_tensors
            asked.append(ctx.needs_input_grad)
            return ct * y, ct * x

    hosted, x = Hosted(runtime, Product.apply), rand(2)
    plain, keeping = hosted.call(x, x), hosted.call(x, x, keep=[1])
    asked.clear()
    hosted.run(plain, x, x)
    _, residual = hosted.run_keeping(keeping, x, x)
    hosted.run(hosted.pullback(keeping, [1]), x, residual=residual)
    assert asked == [(False, False), (False, True), (False, True)]


def test_residual_bytes_are_those_of_saved_tensors(runtime: TorchRuntime) -> None:
    """A residual counts what backward formulas have saved, and not the inputs, which are the
    client's."""
    x = rand(128)
    for f, expected in (
        (lambda x: x * x, 0),
        (torch.exp, 1024),
        (lambda x: x.exp().exp(), 2048),
    ):
        hosted = Hosted(runtime, f)
        program = hosted.call(x, keep=[0])
        hosted.run_keeping(program, x)
        assert program.residual_nbytes == expected


def test_a_forward_mode_derivative_can_be_kept(runtime: TorchRuntime) -> None:
    """A residual may hold zeros of forward mode, which have no memory."""
    x = rand(3)
    hosted = Hosted(runtime, lambda x: torch.tanh(x * x.sin()) * x.sum())
    program = hosted.call(x, transforms=[vjp([0]), jvp([0])], keep=[0])
    ones = np.ones_like(x)
    residual = hosted.run_keeping(program, x, ones, ones)[1]
    assert program.residual_nbytes
    again = hosted.call(x, transforms=[vjp([0]), jvp([0]), vjp([0])])
    pulled = hosted.run(hosted.pullback(program, [0]), ones, residual=residual)
    np.testing.assert_allclose(pulled[0], hosted.run(again, x, ones, ones, ones)[0])


def test_only_outputs_of_their_own_memory_are_exclusive(runtime: TorchRuntime) -> None:
    """What nobody else holds may be handed over; inputs, views, weights and what a graph or a
    model keeps may not."""
    kept: list[Tensor] = []

    def various(params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        kept[:] = [x * 2]
        twice, fresh = x * 3, x + 1
        return (
            fresh,
            x,
            x[1:],
            params["w"],
            kept[0],
            twice,
            twice,
            (x * 5)[:1],
            fresh.exp(),
            (x * 4).expand(2, 4),
        )

    hosted, x = Hosted(runtime, (various, {"w": torch.ones(4).double()})), rand(4)
    views = [hosted.view(placed(each), spec_of(each)) for each in (x,)]
    outputs, _ = hosted.call(x).run(views, None)
    seen = [pointer is not None for pointer in runtime.exclusive(outputs, views, None)]
    assert seen == [True, False, False, False, False, False, False, False, True, False]
    outputs, residual = hosted.call(x, keep=[0]).run(views, None)
    assert runtime.exclusive(outputs, views, residual)[-2] is None  # the graph needs it
    assert runtime.exclusive(outputs, views, residual)[0] == outputs[0].data_ptr()


# Structures ---------------------------------------------------------------------------------------


@serving("structured")
def test_a_model_may_change_the_containers_it_gets(hosted: Hosted) -> None:
    """Each call builds its arguments anew."""

    def popping(tree: dict[str, Tensor]) -> Tensor:
        return tree.pop("x") * 2

    leaf = pb.Tree(leaf=pb.Tree.Leaf())
    mapping = pb.Tree(dict=pb.Tree.Mapping(keys=[pb.Value(text="x")], items=[leaf]))
    popped, x = Hosted(hosted.runtime, popping), rand(2)
    program = popped.call(x, tree=pb.Tree(tuple=pb.Tree.Sequence(items=[mapping])))
    for _ in range(2):
        assert_same(popped.run(program, x), [2 * x])


def test_a_model_may_mark_its_inputs(runtime: TorchRuntime) -> None:
    """A model's changes to its tensor arguments as objects do not outlive the call."""

    def marking(x: Tensor) -> Tensor:
        assert not hasattr(x, "seen")
        x.seen = True
        return x.requires_grad_() * 2

    hosted, x = Hosted(runtime, marking), placed(rand(2))
    program = hosted.call(x)
    view = hosted.view(x, spec_of(x))
    for _ in range(2):
        outputs, _ = program.run([view], None)
        assert_same([outputs[0].detach().numpy()], [2 * x])
    assert not view.requires_grad
