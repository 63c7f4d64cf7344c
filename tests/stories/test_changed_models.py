"""A worker that was restarted with another model: a backward never uses it for the forward of
the first one."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.autograd.graph import save_on_cpu

from bridge_client import Session, spawn
from bridge_client.jax import RemoteTorchFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import ModelChanged
from tests.client.torch_client.conftest import fresh_compiler as fresh_compiler
from tests.conftest import eventually, python_of
from tests.workers import children

SERVED = {
    "jax": """
        import jax, numpy as np
        import imported

        CONSTANT = np.arange(4.0, dtype=np.float32) + {constant}

        @jax.custom_vjp
        def custom(x):
            return x * x

        custom.defvjp(lambda x: (x * x, x), lambda x, g: ({rule} * x * g,))

        def f(x):
            # {comment}
            return imported.scale(x) * CONSTANT + custom(x)

        affine = (lambda params, x: x * params["w"]), {{"w": np.full({size}, {weight}, np.float32)}}

        def longer(x):
            return x[:{size}]
        """,
    "torch": """
        import torch
        import imported

        CONSTANT = torch.arange(4.0) + {constant}

        class Custom(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, g):
                return {rule} * ctx.saved_tensors[0] * g

        def f(x):
            # {comment}
            return imported.scale(x) * CONSTANT + Custom.apply(x)

        affine = (lambda params, x: x * params["w"]), {{"w": torch.full(({size},), {weight})}}

        def longer(x):
            return x[:{size}]
        """,
}
FIRST = {
    "constant": "0.0",
    "rule": "2",
    "scale": "2",
    "weight": "2.0",
    "size": "4",
    "comment": "the first",
}


class Serving:
    """A spawned worker whose models are in files that change."""

    def __init__(self, directory: Path, framework: str, lane: str) -> None:
        self._directory = directory
        self._framework = framework
        self.write()
        before = children()
        targets = {name: f"served:{name}" for name in ("f", "affine", "longer")}
        self.session: Session = spawn(
            **{f"{framework}_model": targets},
            python=python_of(f".venv-{framework}"),
            cwd=directory,
            lane=lane,
            # Files change within a second, so that what Python has compiled would be taken for up
            # to date.
            env={
                "PYTHONDONTWRITEBYTECODE": "1",
                "PYTHONPATH": f"{directory}:{os.environ.get('PYTHONPATH', '')}",
            },
            args=["--x64"] if framework == "jax" else [],
        )
        self._before = before

    def write(self, **changes: str) -> None:
        values = FIRST | changes
        source = SERVED[self._framework].replace("\n        ", "\n")
        (self._directory / "served.py").write_text(source.format(**values))
        (self._directory / "imported.py").write_text(
            f"def scale(x):\n    return {values['scale']} * x\n"
        )

    def restart(self, **changes: str) -> None:
        """End the worker; the next call starts another one, of these files."""
        self.write(**changes)
        (pid,) = children() - self._before
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not children() - self._before or _is_zombie(pid))

    def forward(
        self, name: str, dtype: str, **options: str
    ) -> tuple[list[float], Callable[[], list[float]]]:
        """Call a model with ones; return the values, and what pulls ones back to the gradient."""
        if self._framework == "jax":
            x = torch.ones(4, dtype=getattr(torch, dtype), requires_grad=True)
            y = self.torch_function(name, **options)(x)
            return y.tolist(), lambda: torch.autograd.grad(y, x, torch.ones_like(y))[
                0
            ].tolist()
        with jax.enable_x64(True):
            f = RemoteTorchFunction(self.session, name=name)
            ones = jnp.ones(4, dtype)
            model = f if options or not f.params else lambda x: f.apply(f.params, x)
            y, pull = jax.vjp(model, ones)

        def backward() -> list[float]:
            with jax.enable_x64(True):
                return pull(jnp.ones_like(y))[0].tolist()

        return y.tolist(), backward

    def torch_function(self, name: str, **options: str) -> RemoteJaxFunction:
        return RemoteJaxFunction(self.session, name=name, **options)


def _is_zombie(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        )
    except FileNotFoundError:
        return True


@pytest.fixture
def serving(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Serving]:
    framework, lane = getattr(request, "param", ("jax", "local"))
    made = Serving(tmp_path, framework, lane)
    with made.session:
        yield made


both = pytest.mark.parametrize(
    "serving", [("jax", "local"), ("torch", "local")], indirect=True, ids="-".join
)
each = pytest.mark.parametrize(
    "serving",
    [(name, lane) for name in ("jax", "torch") for lane in ("local", "grpc")],
    indirect=True,
    ids="-".join,
)

# Which model, and how it changes.
CHANGES = {
    "code that the model imports": ("f", {"scale": "3"}),
    "a constant": ("f", {"constant": "1.0"}),
    "a rule of a custom derivative": ("f", {"rule": "4"}),
    "parameters that stay on the worker": ("affine", {"weight": "3.0"}),
}


def gradient(name: str, values: Mapping[str, str]) -> list[float]:
    """Return a model's gradient at ones."""
    if name == "affine":
        return [float(values["weight"])] * 4
    scale, constant, rule = (
        float(values[key]) for key in ("scale", "constant", "rule")
    )
    return [scale * (i + constant) + rule for i in range(4)]


@each
def test_a_backward_on_another_model_is_an_error(serving: Serving) -> None:
    """Whatever decides a result changes: the backward raises ModelChanged, and later calls use
    the new model."""
    values = dict(FIRST)
    for name, changes in CHANGES.values():
        options = {"parameters": "worker"} if name == "affine" else {}
        pending = [
            serving.forward(name, dtype, **options)[1]
            for dtype in ("float32", "float64")
        ]
        values |= changes
        serving.restart(**values)
        for backward in pending:
            with pytest.raises(
                ModelChanged,
                match=rf"another model '{name}' than in this call's forward",
            ):
                backward()
        for dtype in ("float32", "float64"):
            assert serving.forward(name, dtype, **options)[1]() == gradient(
                name, values
            )
        # And stays one, also when the new model is known.
        with pytest.raises(ModelChanged):
            pending[0]()


@both
def test_the_same_model_goes_on_without_a_word(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a comment has changed, or parameters that the client passes itself, a backward is
    that of its forward."""
    (_, of_f), (_, of_affine) = (
        serving.forward("f", "float32"),
        serving.forward("affine", "float32"),
    )
    expected = of_f(), of_affine()
    (_, of_f), (_, of_affine) = (
        serving.forward("f", "float32"),
        serving.forward("affine", "float32"),
    )
    serving.restart(comment="the second", weight="5.0")
    assert (of_f(), of_affine()) == expected
    assert not caplog.records


def test_a_plain_call_on_another_model_warns_once(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls without a backward go on with the new model, and the log says so once."""
    f, x = serving.torch_function("f"), torch.ones(4)
    assert f(x).tolist() == [1, 3, 5, 7]
    serving.restart(scale="3")
    with caplog.at_level(logging.WARNING, "bridge_client"):
        assert f(x).tolist() == [1, 4, 7, 10]
        serving.restart(scale="4")
        assert f(x).tolist() == [1, 5, 9, 13]
        assert torch.autograd.grad(f(x.requires_grad_()).sum(), x)[0].tolist() == [
            2,
            6,
            10,
            14,
        ]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "model 'f' has changed with the worker's restart"
    )


def test_other_types_are_an_error(serving: Serving) -> None:
    """A call whose parameters or outputs have other shapes since the restart raises
    ModelChanged, again and again."""
    longer, affine, x = (
        serving.torch_function("longer"),
        serving.torch_function("affine"),
        torch.ones(4),
    )
    longer(x), affine(x)
    serving.restart(size="2")
    for _ in range(2):
        with pytest.raises(
            ModelChanged,
            match=r"returned float32\[4\] before .* and now returns float32\[2\]",
        ):
            longer(x)
        with pytest.raises(ModelChanged, match=r"`w` has shape \[4\]"):
            affine(x)
    assert serving.torch_function("longer")(x).shape == (2,)


def _create_graph(f: RemoteJaxFunction, x: torch.Tensor) -> Callable[[], object]:
    y = f(x)
    return lambda: torch.autograd.grad(y.sum(), x, create_graph=True)


def _functional(f: RemoteJaxFunction, x: torch.Tensor) -> Callable[[], object]:
    y, pull = torch.func.vjp(f, x.detach())
    return lambda: pull(torch.ones_like(y))


def _saved_elsewhere(f: RemoteJaxFunction, x: torch.Tensor) -> Callable[[], object]:
    with save_on_cpu():
        y = f(x)
    return lambda: torch.autograd.grad(y.sum(), x)


def _nested(f: RemoteJaxFunction, x: torch.Tensor) -> Callable[[], object]:
    (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return lambda: torch.autograd.grad(gradient.sum(), x)


def _compiled(f: RemoteJaxFunction, x: torch.Tensor) -> Callable[[], object]:
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    return lambda: torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize(
    "way", [_create_graph, _functional, _saved_elsewhere, _nested, _compiled]
)
def test_no_kind_of_backward_uses_another_model(
    serving: Serving,
    fresh_compiler: None,
    way: Callable[[RemoteJaxFunction, torch.Tensor], Callable[[], object]],
) -> None:
    """Backward passes that keep no residual, or lose its handle, raise ModelChanged as well; on
    the same model not."""
    f, x = serving.torch_function("f"), torch.ones(4, requires_grad=True)
    backward = way(f, x)
    serving.restart()
    backward()
    backward = way(f, x)
    serving.restart(scale="3")
    with pytest.raises(ModelChanged):
        backward()


def test_a_residual_that_was_evicted_is_recomputed_by_one_preparation(
    tmp_path: Path,
) -> None:
    """On the worker that ran the forward, the model is known to be the same: only the VJP is
    prepared."""
    with spawn(
        "tests.models:square",
        python=python_of(".venv-jax"),
        args=["--residual-bytes", "1"],
    ) as session:
        f, x = RemoteJaxFunction(session), torch.ones(4, requires_grad=True)
        for _ in range(2):
            y = f(x)
            link = session._link
            prepared: list[str] = []
            prepare = link.prepare
            link.prepare = lambda request, *rest, p=prepare, seen=prepared: (
                seen.append(request),
                p(request, *rest),
            )[1]
            torch.testing.assert_close(
                torch.autograd.grad(y.sum(), x)[0], 2 * x.detach()
            )
            link.prepare = prepare
        assert prepared == []


def test_numbers_of_residuals_are_never_used_twice() -> None:
    """An id tells which model made the residual, and differs from all others of the session, as
    an int64."""
    from bridge_client.programs import model_tag, residual_id, tag_of

    for fingerprint in (b"", bytes(8), b"\xff" * 8, np.random.default_rng(0).bytes(8)):
        ids = [residual_id(count, fingerprint) for count in (1, 2, 2**40 - 1)]
        assert {tag_of(id) for id in ids} == {model_tag(fingerprint)}
        assert len(set(ids)) == 3 and all(0 < id < 2**63 for id in ids)
    assert model_tag(b"") == 0 and model_tag(bytes(8)) != 0
