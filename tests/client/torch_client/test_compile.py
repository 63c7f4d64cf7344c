"""torch.compile, torch.export and the operator that both of them see."""

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bridge_client import Session
from bridge_client.torch import RemoteJaxFunction, graphs
from bridge_wire.errors import RemoteModelError
from tests.client.torch_client.conftest import Remote


@pytest.fixture
def nothing_is_held(x64_session: Session) -> Iterator[None]:
    """After each test, and without what was compiled in it, there are no residuals and no leased
    blocks."""
    yield
    gc.collect()
    stats = x64_session.stats()
    assert (stats["residuals"], stats["blocks"]) == (0, 0)


pytestmark = pytest.mark.usefixtures("nothing_is_held", "fresh_compiler")


class Sandwich(nn.Module):
    """A remote function, or a remote model with parameters, between local layers."""

    def __init__(self, remote: RemoteJaxFunction) -> None:
        super().__init__()
        self.before = nn.Linear(3, 3, dtype=torch.float64)
        self.remote = remote

    def forward(self, x: Tensor) -> Tensor:
        return self.remote(self.before(x)).tanh().sum()


def gradients(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor
) -> list[Tensor]:
    """Return the value, and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()])]


def assert_same(seen: Any, expected: Any) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-10)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "reduce-overhead"}, {"backend": "aot_eager"}], ids=str
)
@pytest.mark.parametrize("name", ["sine", "affine"])
def test_compiled_is_as_eager(
    x64_session: Session, x64_remote: Remote, name: str, options: dict[str, str]
) -> None:
    """Compiled in one graph, a model has the values and gradients that it has without, and
    leaves nothing behind."""
    module = Sandwich(x64_remote(name).double())
    compiled = torch.compile(module, fullgraph=True, **options)
    x = rand(4, 3)
    module(x)  # so the parameters have moved to the session's memory
    before = x64_session.stats()
    for _ in range(2):
        assert_same(gradients(compiled, module, x), gradients(module, module, x))
    after = x64_session.stats()
    assert not counters["graph_break"]
    assert (after["residuals"], after["blocks"]) == (
        before["residuals"],
        before["blocks"],
    )


def test_the_second_call_compiles_nothing(
    x64_session: Session, x64_remote: Remote
) -> None:
    """A model is one graph, compiled once; each call then runs the forward and the backward pass
    on the worker once."""
    module = Sandwich(x64_remote("affine").double())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    gradients(compiled, module, rand(4, 3))
    assert counter.frame_count == 1
    calls = x64_session.stats()["calls"]
    for _ in range(3):
        gradients(compiled, module, rand(4, 3))
    assert counter.frame_count == 1 and counters["stats"]["unique_graphs"] == 1
    assert x64_session.stats()["calls"] == calls + 6


def test_there_is_no_graph_break(x64_remote: Remote) -> None:
    """Dynamo sees a remote call within a function as part of one graph."""
    sine = x64_remote("sine")
    explained = torch._dynamo.explain(lambda x: sine(x * 2).cos().sum())(rand(3))
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), (
        explained.break_reasons
    )


def test_a_compiled_forward_keeps_one_residual_until_backward(
    x64_session: Session, x64_remote: Remote
) -> None:
    """The residual of a compiled forward pass goes with its backward pass, or with the output
    that nobody keeps."""
    sine = x64_remote("sine")
    compiled = torch.compile(
        lambda x: sine(x).sum(), fullgraph=True, backend="aot_eager"
    )
    y = compiled(rand(3).requires_grad_())
    assert x64_session.stats()["residuals"] == 1
    y.backward()
    assert x64_session.stats()["residuals"] == 0
    y = compiled(rand(3).requires_grad_())
    assert x64_session.stats()["residuals"] == 1
    del y
    assert x64_session.stats()["residuals"] == 0


@pytest.mark.parametrize(
    ("name", "dynamic", "shapes"),
    [
        ("sine", None, [[(n,)] for n in (3, 5, 7, 5)]),
        ("affine", True, [[(n, 3)] for n in (4, 5, 7)]),
        ("product", True, [[(n, 2), (n, 2)] for n in (3, 5, 7)]),
        ("halved", True, [[(n, 2)] for n in (4, 5, 7)]),
    ],
)
def test_dynamic_shapes(
    x64_remote: Remote, name: str, dynamic: bool | None, shapes: list[Any]
) -> None:
    """What was compiled for one size serves the others, as soon as torch has seen that it
    changes."""
    remote = x64_remote(name).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *xs: remote(*xs).tanh(), fullgraph=True, dynamic=dynamic, backend=counter
    )
    for sizes in shapes:
        xs = [rand(*size).requires_grad_() for size in sizes]
        made, expected = compiled(*xs), remote(*xs).tanh()
        assert_same(
            [made, *torch.autograd.grad(made.sum(), xs)],
            [expected, *torch.autograd.grad(expected.sum(), xs)],
        )
    assert counter.frame_count <= 2


def test_sizes_that_a_model_looks_at(x64_remote: Remote) -> None:
    """A model whose code depends on a size is compiled anew for each, as one of torch would be."""
    remote = x64_remote("long_or_short")
    compiled = torch.compile(remote, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 5, 7):
        x = rand(size)
        assert_same([compiled(x)], [remote(x)])


def test_graphs_of_different_programs_differ(x64_remote: Remote) -> None:
    """What names a program in a graph follows from its call and its outputs' types, since torch
    finds compiled code of other processes again on disk by its graph; and no two programs here have
    the same name.
    """

    def number_of(name: str) -> int:
        graph = make_fx(x64_remote(name))(rand(3)).graph
        [node] = [
            node
            for node in graph.nodes
            if node.target is torch.ops.torch_jax_bridge.run.default
        ]
        return node.args[1]

    sine, again, outer = number_of("sine"), number_of("sine"), number_of("outer")
    programs = [graphs.pinned(number) for number in (sine, again, outer)]
    texts = list(map(graphs.described, programs))
    assert texts[0] == texts[1] != texts[2]
    assert sine < again < sine + 1000, "the same, and then the next that is free"
    assert texts[2].endswith(b"float64[3,3]")


def test_a_vmap_with_symbolic_sizes(x64_remote: Remote) -> None:
    """Batches and derivatives of torch.func within compiled code are compiled anew for each
    size."""
    sine = x64_remote("sine")
    run = torch.func.vmap(torch.func.grad(lambda x: sine(x).sum()))
    compiled = torch.compile(
        lambda x: run(x), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in (3, 5):
        x = rand(size, 2)
        assert_same([compiled(x)], [2 * x.cos()])


@pytest.mark.parametrize("strict", [True, False])
def test_exported_for_all_sizes(x64_remote: Remote, strict: bool) -> None:
    """An exported module takes all sizes that it was exported for, and is differentiable."""
    module, dim = Sandwich(x64_remote("sine")), torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        module, (rand(4, 3),), dynamic_shapes={"x": {0: dim}}, strict=strict
    )
    for size in (2, 7, 64):
        x = rand(size, 3)
        assert_same(
            gradients(exported.module(), module, x), gradients(module, module, x)
        )


def test_structures_numbers_and_static_arguments(x64_remote: Remote) -> None:
    """Dicts, Python numbers and strings pass through compiled calls as through others."""
    case = x64_remote("gradient_case")

    def run(x: Tensor) -> Tensor:
        made = case("pytree", {"inner": (x, x.T), "list": [x[0]]}, 2.0)
        return made["out"].sum() + made["sum"][1][0].sum()

    x, compiled = rand(2, 3), torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, nn.Module(), x), gradients(run, nn.Module(), x))


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Sample:
    image: Any
    size: Any = field(init=False, default=None)
    kind: ClassVar[str] = "sample"


class Settings(dict[str, Any]):
    pass


def test_structures_that_torchs_tracer_refuses(x64_remote: Remote) -> None:
    """None, texts, namedtuples, dataclasses and dicts of one's own are in compiled calls what
    they are in others."""
    echo, x = x64_remote("echo"), rand(3)

    def run(x: Tensor) -> Any:
        settings = Settings(
            b=x * 2, a=None, samples=OrderedDict(second=Sample(x), first=Sample(None))
        )
        return echo(
            settings,
            None,
            [Pair(None, x), "text", x.shape],
            mask=None,
            pair=Pair(x, Sample(Pair("x", x))),
        )

    made, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    assert leaves_of(made) == leaves_of(expected)


def test_a_dataclass_of_the_model_in_compiled_code(x64_remote: Remote) -> None:
    """A result of a class that only the worker knows has the fields that it has in other calls."""
    report, x = x64_remote("report"), rand(3)
    made = torch.compile(lambda x: report(x), fullgraph=True, backend="aot_eager")(x)
    assert leaves_of(made) == leaves_of(report(x))


def leaves_of(tree: Any) -> list[Any]:
    """Return the values in a structure, with the classes around them."""
    if is_dataclass(tree):
        return [type(tree).__name__, *leaves_of(vars(tree))]
    if isinstance(tree, dict):
        return [
            type(tree).__name__,
            *(leaf for key in tree for leaf in (key, *leaves_of(tree[key]))),
        ]
    if isinstance(tree, list | tuple):
        return [
            type(tree).__name__,
            *(leaf for item in tree for leaf in leaves_of(item)),
        ]
    return [tree.tolist() if isinstance(tree, Tensor) else tree]


@pytest.mark.parametrize("first", [2, 0.5], ids=["int", "float"])
def test_numbers_that_change(x64_remote: Remote, first: float) -> None:
    """A Python number is data in compiled calls, too: after it has changed once, further values
    compile nothing."""
    case, x = x64_remote("gradient_case"), rand(2, 3)

    def run(x: Tensor, n: float) -> Tensor:
        return case("pytree", {"inner": (x, x.T), "list": [x[0]]}, n)["out"].sum() * n

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for n in (first, first + 1, first + 2, first + 3):
        made, expected = (
            gradients(partial(f, n=n), nn.Module(), x) for f in (compiled, run)
        )
        assert_same(made, expected)
    assert counter.frame_count == 2


def test_static_numbers_that_change(x64_remote: Remote) -> None:
    """A static number, as a size, is part of the program: another value compiles anew."""
    power, x = x64_remote("power", static_argnames="exponent"), rand(3)
    compiled = torch.compile(
        lambda x, n: power(x, exponent=n), fullgraph=True, backend="aot_eager"
    )
    for n in (1, 2, 3):
        assert_same([compiled(x, n)], [x**n])


@pytest.mark.filterwarnings("ignore:Dynamo")
def test_compiled_autograd(x64_remote: Remote) -> None:
    """A backward pass that torch compiles as it runs calls the function's as any other does."""
    sine, x = x64_remote("sine"), rand(3).requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        (sine(x) * x).sum().backward()
    assert_same(x.grad, 2 * x.sin() + 2 * x * x.cos())


def test_a_call_that_cannot_be_compiled_is_named(
    x64_remote: Remote, caplog: pytest.LogCaptureFixture
) -> None:
    """When a traced call fails, the log says which signature: Dynamo's error does not. Without
    fullgraph, the model's error is raised.
    """
    matmul, x = x64_remote("matmul"), rand(2, 3)
    with pytest.raises(Unsupported):
        torch.compile(matmul, fullgraph=True, backend="aot_eager")(x, x)
    logged = [
        record.message
        for record in caplog.records
        if record.name == "bridge_client.torch.compiled"
    ]
    assert (
        "'matmul' called with (args[0]: float64[2,3], args[1]: float64[2,3])"
        in logged[0]
    )
    with pytest.raises(RemoteModelError, match=r"args\[0\]: float64\[2,3\]"):
        torch.compile(matmul, backend="aot_eager")(x, x)


def test_training_compiled(x64_remote: Remote) -> None:
    """The parameters of a compiled module are read anew at each step: it trains as the module
    does."""

    def losses(compile: bool) -> list[float]:
        module = x64_remote("affine").double()
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        run = (
            torch.compile(module, fullgraph=True, backend="aot_eager")
            if compile
            else module
        )
        made = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (run(torch.ones(2, 3, dtype=torch.float64)) ** 2).mean()
            loss.backward()
            optimizer.step()
            made.append(loss.item())
        return made

    compiled = losses(compile=True)
    assert compiled == pytest.approx(losses(compile=False), rel=1e-12)
    assert compiled[-1] < compiled[0]


def test_compiled_code_casts_under_autocast(x64_remote: Remote) -> None:
    """A function with cast_inputs= casts in compiled code where autocast is on, and only there."""
    model = x64_remote("affine", cast_inputs=torch.bfloat16)
    compiled, x = (
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        rand(4, 3).float(),
    )
    with torch.autocast("cpu"):
        assert torch.equal(compiled(x), model(x))
    assert compiled(x).dtype is torch.float32


def test_compiled_code_looks_for_no_derivatives(x64_remote: Remote) -> None:
    """Graphs of torch.compile name operators that have none, since they are derived; what is
    exported may yet be."""
    sine, x = x64_remote("sine"), rand(3).requires_grad_()
    named: list[Any] = []

    def noting(graph: GraphModule, _: Any) -> Any:
        named.extend(
            node.target
            for node in graph.graph.nodes
            if "torch_jax_bridge" in str(node.target)
        )
        return make_boxed_func(graph.forward)

    y = torch.compile(sine, fullgraph=True, backend=aot_autograd(fw_compiler=noting))(x)
    assert_same(torch.autograd.grad(y.sum(), x)[0], 2 * x.detach().cos())
    derived = torch.ops.torch_jax_bridge_derived
    assert named == [derived.run.default, derived.pull_back.default]
    exported = torch.export.export(sine, (rand(3),)).graph
    assert torch.ops.torch_jax_bridge.run.default in {
        node.target for node in exported.nodes
    }


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_traced_by_make_fx(x64_remote: Remote, mode: str) -> None:
    """make_fx records the operator, and of torch.func.grad the operators that it comes down to."""
    sine = x64_remote("sine")
    x = rand(3)
    traced = make_fx(torch.func.grad(lambda x: sine(x).sum()), tracing_mode=mode)(
        rand(3)
    )
    assert torch.ops.torch_jax_bridge.run.default in {
        node.target for node in traced.graph.nodes
    }
    assert_same(traced(x), 2 * x.cos())


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_traced_by_jit(x64_remote: Remote) -> None:
    """torch.jit.trace records the operator, not the result as a constant; its gradients are
    right."""
    sine = x64_remote("sine")
    traced = torch.jit.trace(lambda x: sine(x) + 1, rand(3))
    x = rand(3).requires_grad_()
    traced(x).sum().backward()
    assert_same(traced(x), 2 * x.sin() + 1)
    assert_same(x.grad, 2 * x.cos())


def test_a_graph_recorded_under_grad_is_differentiable(x64_remote: Remote) -> None:
    """What make_fx recorded of inputs that require a gradient has the gradients of what it
    recorded."""
    sine = x64_remote("sine")
    x = rand(3).requires_grad_()
    traced = make_fx(lambda x: sine(x))(x)
    assert_same(torch.autograd.grad(traced(x).sum(), x)[0], 2 * x.detach().cos())


def test_a_recorded_gradient_is_differentiable(x64_remote: Remote) -> None:
    """What make_fx recorded of a backward pass has the second derivatives of what it recorded."""
    product = x64_remote("product")

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad((product(x, x * 2.0) * x.detach()).sum(), x)[0]

    x = rand(3).requires_grad_()
    traced = make_fx(gradient)(x)
    assert torch.ops.torch_jax_bridge.pull_back.default in {
        node.target for node in traced.graph.nodes
    }
    assert_same(traced(x), 4 * x.detach() ** 2)
    assert_same(torch.autograd.grad(traced(x).sum(), x)[0], 4 * x.detach())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["sine", "affine"])
def test_exported(x64_remote: Remote, name: str, strict: bool) -> None:
    """torch.export makes a program of a module with a remote call, whose values are the
    module's."""
    module = Sandwich(x64_remote(name).double())
    exported = torch.export.export(module, (rand(4, 3),), strict=strict)
    x = rand(4, 3)
    assert_same(exported.module()(x), module(x))
    # Of any module torch keeps those after a strict export (2.13).
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_operator_is_registered_soundly(
    x64_remote: Remote, requires_grad: bool
) -> None:
    """torch.library.opcheck finds nothing wrong with the operators: schema, autograd, fake
    tensors, AOT dispatch."""
    product = x64_remote("product")
    # The program's number is what make_fx writes into the graph.
    graph = make_fx(lambda x, y: product(x, y))(rand(3), rand(3)).graph
    args = [rand(3).requires_grad_(requires_grad), rand(3)]
    (node,) = (
        node
        for node in graph.nodes
        if node.target is torch.ops.torch_jax_bridge.run.default
    )
    made = torch.library.opcheck(
        torch.ops.torch_jax_bridge.run.default, (args, node.args[1])
    )
    assert set(made.values()) == {"SUCCESS"}, made
    # Of no handle that is known: it is computed from the inputs.
    pulled = (
        torch.zeros(1, dtype=torch.int64),
        [*args, rand(3)],
        node.args[1],
        [0],
        [0],
        [0],
    )
    made = torch.library.opcheck(torch.ops.torch_jax_bridge.pull_back.default, pulled)
    assert set(made.values()) == {"SUCCESS"}, made


def test_a_batched_module_is_compiled_cold(remote: Remote) -> None:
    """torch.vmap of a function with parameters, which no call has prepared: torch asks it for a
    name."""
    f = remote("perceptron")
    x = torch.ones(4, 2, 3)
    compiled = torch.compile(torch.vmap(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.vmap(f)(x))
    assert f.__name__ == "perceptron"
