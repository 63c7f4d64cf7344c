"""What a model's code keeps in Python belongs to one call: its attributes, classes, closures,
globals and caches."""

import collections
import functools
import gc
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bridge_server.runtime import Options
from bridge_server.torch_runtime import TorchRuntime
from bridge_server.torch_runtime.python_state import PythonState
from bridge_wire.errors import CallerError
from tests.runtimes import Hosted, jvp, vjp, vmap

PRECISIONS = [np.float32, np.float64]


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    return TorchRuntime(Options())


@pytest.fixture(autouse=True)
def no_fake_tensor_is_left() -> Iterator[None]:
    """No test leaves a fake tensor: plain torch code of the process would meet it."""
    before = {id(each) for each in _fake_tensors()}  # TorchDynamo keeps some of its own
    yield
    gc.collect()
    assert not [each for each in _fake_tensors() if id(each) not in before]


def _fake_tensors() -> list[Any]:
    return [each for each in gc.get_objects() if issubclass(type(each), FakeTensor)]


class Cached(nn.Module):
    """Keeps a tensor that it makes in its first call; subclasses say which, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(1.0, 4.0))
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            self.grid = self.made(x)
        return x * self.w + self.grid

    def made(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1], dtype=x.dtype)


class CachedParameter(Cached):
    def made(self, x: Tensor) -> Tensor:
        return self.w.exp()


class CachedInput(Cached):
    def made(self, x: Tensor) -> Tensor:
        return x.sum() * torch.ones_like(x)


class InDict(CachedParameter):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"deep": [collections.OrderedDict()]}

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept["deep"][0]
        if "grid" not in kept:
            kept["grid"] = self.made(x)
        return x * self.w + kept["grid"]


class InBuffer(CachedParameter):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", self.made(x), persistent=False)
        return x * self.w + self.late


class InClass(CachedParameter):
    kept: Tensor | None = None
    is_kept = False

    def forward(self, x: Tensor) -> Tensor:
        if not InClass.is_kept:
            InClass.kept, InClass.is_kept = self.made(x), True
        return x * self.w + InClass.kept


class ConstantInClass(Cached):
    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if ConstantInClass.kept is None:
            ConstantInClass.kept = self.made(x)
        return x * self.w + ConstantInClass.kept


class ByMethodCache(CachedParameter):
    @functools.lru_cache  # noqa: B019
    def scale(self) -> Tensor:
        return self.w.exp()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w + self.scale()


class Holder:
    """An object that is no module."""

    def __init__(self) -> None:
        self.grid: Tensor | None = None


class InObject(CachedParameter):
    def __init__(self) -> None:
        super().__init__()
        self.holder = Holder()

    def forward(self, x: Tensor) -> Tensor:
        if self.holder.grid is None:
            self.holder.grid = self.made(x)
        return x * self.w + self.holder.grid


class ByHook(CachedParameter):
    """Keeps a tensor by a closure, as hooks do."""

    def __init__(self) -> None:
        super().__init__()
        kept: dict[str, Tensor] = {}
        self.keep = lambda make: kept.setdefault(
            "grid", kept["grid"] if "grid" in kept else make()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w + self.keep(lambda: self.made(x))


MODULES = [
    Cached,
    CachedParameter,
    CachedInput,
    InDict,
    InBuffer,
    InClass,
    ConstantInClass,
    ByMethodCache,
    InObject,
    ByHook,
]


def expected_of(
    kind: type[Cached], w: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return torch's own value and gradients by w, from a module that nobody has called before."""
    for cls in (InClass, ConstantInClass):
        cls.kept = None
    InClass.is_kept = False
    module = kind()
    module.w = nn.Parameter(torch.tensor(w))
    value = module(torch.tensor(x))
    (gradient,) = torch.autograd.grad(value.sum(), module.w)
    for cls in (InClass, ConstantInClass):
        cls.kept = None
    InClass.is_kept = False
    ByMethodCache.scale.cache_clear()
    return value.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", MODULES)
def test_a_call_is_a_function_of_its_parameters(
    runtime: TorchRuntime, kind: type[Cached], dtype: Any
) -> None:
    """Each call has the value of a module that was never called before, whatever came before it."""
    module = kind().to(getattr(torch, np.dtype(dtype).name))
    hosted, x = Hosted(runtime, module), np.array([0.3, 0.5, 0.7], dtype)
    program = hosted.call(x, parameters=True)
    keeping = hosted.call(x, parameters=True, keep=[0])
    gradient = hosted.call(x, parameters=True, transforms=[vjp([0])])
    for factor in (1.0, 2.0, 0.5):
        w = (factor * np.arange(1.0, 4.0)).astype(dtype)
        value, by_w = expected_of(kind, w, factor * x)
        for _ in range(2):
            np.testing.assert_allclose(
                hosted.run(program, w, factor * x)[0], value, rtol=1e-5, atol=1e-6
            )
        np.testing.assert_allclose(
            hosted.run(gradient, w, factor * x, np.ones(3, dtype))[0],
            by_w,
            rtol=1e-5,
            atol=1e-6,
        )
        (kept,), residual = hosted.run_keeping(keeping, w, factor * x)
        np.testing.assert_allclose(kept, value, rtol=1e-5, atol=1e-6)
        pulled = hosted.run(
            hosted.pullback(keeping, [0]), np.ones(3, dtype), residual=residual
        )[0]
        np.testing.assert_allclose(pulled, by_w, rtol=1e-5, atol=1e-6)
    assert module.grid is None and not hasattr(module, "late")
    assert not isinstance(InClass.kept, FakeTensor)


@pytest.mark.parametrize("kind", MODULES)
def test_derivatives_of_models_that_keep_tensors(
    runtime: TorchRuntime, kind: type[Cached]
) -> None:
    """Batches and tangents leave no wrapper behind: a plain call afterwards is right."""
    hosted, x = Hosted(runtime, kind().double()), np.array([0.3, 0.5, 0.7])
    w = np.arange(1.0, 4.0)
    value, _ = expected_of(kind, w, x)
    rows = hosted.run(
        hosted.call(x, parameters=True, transforms=[vmap([-1, 0], 2)]),
        w,
        np.stack([x, x]),
    )[0]
    np.testing.assert_allclose(rows, np.stack([value, value]))
    hosted.run(hosted.call(x, parameters=True, transforms=[jvp([0])]), w, x, w)
    np.testing.assert_allclose(
        hosted.run(hosted.call(x, parameters=True), w, x)[0], value
    )
    np.testing.assert_allclose(hosted.run(hosted.call(x), x)[0], value)


class Counting(nn.Module):
    """Counts its calls and keeps a running sum, neither of them a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[Tensor] = []
        self.sum = torch.zeros(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.sum += x
        return x * self.calls + len(self.seen) + self.sum


def test_calls_do_not_count(runtime: TorchRuntime) -> None:
    """Numbers, lists and plain tensors of a module are the same before each call."""
    module, x = Counting(), np.ones(2)
    hosted = Hosted(runtime, module)
    for _ in range(3):
        np.testing.assert_array_equal(hosted.run(hosted.call(x), x)[0], [3, 3])
    assert module.calls == 0 and not module.seen and not module.sum.any()


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.arange(float(size))


@functools.lru_cache
def kept_globally(key: str) -> dict[str, Tensor]:
    return {}


GLOBAL: Tensor | None = None


def by_global(params: dict[str, Tensor], x: Tensor) -> Tensor:
    global GLOBAL
    if GLOBAL is None:
        GLOBAL = params["w"].sin()
    return x * GLOBAL


def by_default(
    params: dict[str, Tensor],
    x: Tensor,
    kept: dict[str, Tensor] = {},  # noqa: B006
) -> Tensor:
    if "w" not in kept:
        kept["w"] = params["w"].sin()
    return x * kept["w"]


def by_cache(params: dict[str, Tensor], x: Tensor) -> Tensor:
    kept = kept_globally("w")
    if "w" not in kept:
        kept["w"] = params["w"].sin()
    return x * kept["w"]


def by_attribute(params: dict[str, Tensor], x: Tensor) -> Tensor:
    if not hasattr(by_attribute, "kept"):
        by_attribute.kept = params["w"].sin()
    return x * by_attribute.kept


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("function", [by_global, by_default, by_cache, by_attribute])
def test_functions_that_keep_tensors(
    runtime: TorchRuntime, function: Any, dtype: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A function that reads what it kept of other parameters gets it made anew each time, and
    that is told."""
    w = torch.ones(2, dtype=getattr(torch, np.dtype(dtype).name))
    hosted, x = Hosted(runtime, (function, {"w": w})), np.ones(2, dtype)
    program = hosted.call(x, parameters=True)
    for factor in (1, 2, 3):
        seen = hosted.run(program, factor * np.ones(2, dtype), x)[0]
        np.testing.assert_allclose(
            seen, np.sin(factor * np.ones(2)), rtol=1e-6, atol=1e-6
        )
    assert (
        GLOBAL is None and not kept_globally("w") and not hasattr(by_attribute, "kept")
    )
    assert "reads them in later calls" in caplog.text


KEPT: list[Tensor] = []


def by_list(x: Tensor) -> Tensor:
    """Keeps its first argument, and looks at it in later calls."""
    if KEPT:
        return x * float(KEPT[0].sum())
    KEPT.append(x * 3)
    return x * 2


def test_a_function_that_looks_at_what_it_kept(runtime: TorchRuntime) -> None:
    """It cannot be traced a second time without values; each call still begins anew."""
    hosted = Hosted(runtime, by_list)
    program = hosted.call(np.ones(2))
    for factor in (1.0, 5.0, 7.0):
        (seen,) = hosted.run(program, factor * np.ones(2))
        assert seen.tolist() == [2 * factor] * 2
    assert not KEPT


def test_tables_stay_cached(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of constants that a cache keeps is real, computed once, and worth no word."""
    table.cache_clear()
    hosted, x = Hosted(runtime, lambda x: x + table(3)), np.ones(3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(hosted.run(hosted.call(x), x)[0], [1, 2, 3])
    assert table.cache_info().misses == 1 and not caplog.records
    assert type(table(3)) is Tensor and table(3).tolist() == [0, 1, 2]


@functools.lru_cache
def projection(size: int) -> Tensor:
    return torch.randn(2, size) @ torch.randn(size, size)


def test_a_random_table_is_drawn_once(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """A random table that a cache keeps is the same in each call, and its draw leaves torch's
    own stream alone."""
    projection.cache_clear()
    hosted, x = Hosted(runtime, lambda x: projection(3) @ x), np.ones(3, np.float32)
    torch.manual_seed(0)
    program = hosted.call(x)
    assert torch.equal(
        torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0))
    )
    first, second = (hosted.run(program, x)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    torch.manual_seed(0)
    expected = torch.randn(2, 3) @ torch.randn(3, 3) @ torch.ones(3)
    np.testing.assert_allclose(first, expected, rtol=1e-5, atol=1e-6)
    assert not caplog.records


def test_a_module_imported_within_a_call(
    runtime: TorchRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that a module makes when it is imported are real, though a trace imported it."""
    (tmp_path / "late_tables.py").write_text(
        "import torch\nTABLE = torch.arange(3.0)\nSCALE = TABLE.sum() / 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def importing(x: Tensor) -> Tensor:
        late = importlib.import_module("late_tables")
        return x * late.SCALE + late.TABLE

    hosted, x = Hosted(runtime, importing), np.ones(3, np.float32)
    np.testing.assert_array_equal(hosted.run(hosted.call(x), x)[0], [1, 2, 3])
    assert type(sys.modules.pop("late_tables").TABLE) is Tensor


def test_a_log_of_what_was_seen_is_left_alone(
    runtime: TorchRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """A list that a model appends to and never reads gets the tensors of real calls, and none of
    the trace."""
    seen: list[Tensor] = []

    def logged(x: Tensor) -> Tensor:
        seen.append(x)
        return x * 2

    hosted, x = Hosted(runtime, logged), np.ones(2)
    program = hosted.call(x)
    assert not seen
    for _ in range(2):
        hosted.run(program, x)
    assert [type(each) for each in seen] == [Tensor, Tensor] and not caplog.records


def test_a_trace_that_fails_leaves_nothing(runtime: TorchRuntime) -> None:
    """What a call kept before it looked at a value is taken away before it is run on values."""
    kept: dict[str, Tensor] = {}

    def looking(x: Tensor) -> Tensor:
        if "x" not in kept:
            kept["x"] = x * 2
        return kept["x"] if x.sum() > 0 else x

    hosted = Hosted(runtime, looking)
    for factor in (1.0, 3.0):
        x = factor * np.ones(2)
        np.testing.assert_array_equal(hosted.run(hosted.call(x), x)[0], 2 * x)


HIDDEN = torch.zeros(2, dtype=torch.float64)


class Slotted:
    """An object without a `__dict__`, which no snapshot sees."""

    __slots__ = ("kept",)


def test_state_that_cannot_be_put_back_is_refused(runtime: TorchRuntime) -> None:
    """A model that keeps its arguments where the bridge cannot reach is refused by name, and
    nothing has changed."""
    slotted = Slotted()

    def writing(x: Tensor) -> Tensor:
        HIDDEN.add_(x)
        return HIDDEN * 1

    def keeping(x: Tensor) -> Tensor:
        slotted.kept = x * 2
        return slotted.kept

    for function in (writing, keeping):
        with pytest.raises(
            CallerError, match=r"float64\[2\].* made of its arguments or parameters"
        ):
            Hosted(runtime, function).call(np.ones(2))
    assert not HIDDEN.any()
    with pytest.raises(RuntimeError, match="clear the cache"):
        slotted.kept + 1
    del slotted.kept


def test_snapshots_put_back_what_has_changed() -> None:
    """Every kind of container is as it was, including attributes that are new or gone."""

    class Box:
        shared: Any = 1

    box, names = Box(), {"a", "b"}
    box.items, box.names, box.table = [1, [2]], names, {"k": {"l": 1}}

    def code() -> Any:
        return box, Box

    state = PythonState(code, follows_code=True)
    box.items[1].append(3)
    box.names.clear()
    box.table["k"]["l"] = 2
    box.new = Box.other = 1
    Box.shared = 2
    state.restore()
    assert (
        box.items == [1, [2]] and names == {"a", "b"} and box.table == {"k": {"l": 1}}
    )
    assert not hasattr(box, "new") and Box.shared == 1
