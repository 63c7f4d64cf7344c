"""The checks see planted faults."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exact.cases import Entry
from exact.torch_checks import Checks
from exact.torch_reference import Reference
from exact.ways import InProcess

SIN = Entry("op", "sin", "float32", "plain")


class Planted(InProcess):
    """Calls in this process, and spoils the results."""

    def __init__(self, spoil: Callable[[Any], Any]) -> None:
        self._spoil = spoil

    def function(self, *args: Any) -> Any:
        whole = super().function(*args)
        return lambda *values: list(map(self._spoil, whole(*values)))


def statuses(way: InProcess, entry: Entry = SIN) -> dict[str, str]:
    return {name: check().status for name, check in Checks(entry, 0, way).run()}


def doubled_derivative(y: Any) -> Any:
    return 2 * y - jax.lax.stop_gradient(y)


def raises(y: Any) -> Any:
    raise IndexError("planted")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda y: y, {}),
        (lambda y: y + 1e-3, {"value": "wrong", "vmap": "wrong", "again": "wrong"}),
        (jax.lax.stop_gradient, {"gradient": "wrong", "jvp": "wrong", "hvp": "wrong"}),
        (doubled_derivative, {"gradient": "wrong", "jvp": "wrong", "hvp": "wrong"}),
        (
            raises,
            dict.fromkeys(
                ("value", "vmap", "gradient", "jvp", "hvp", "again"), "untyped"
            ),
        ),
    ],
    ids=["nothing", "value", "no derivative", "other derivative", "exception"],
)
def test_planted_faults_are_seen(
    spoil: Callable[[Any], Any], expected: dict[str, str]
) -> None:
    """A spoilt value, derivative or error is a fault in the checks that concern it, and in no
    other."""
    right = dict.fromkeys(("value", "vmap", "gradient", "jvp", "hvp", "again"), "right")
    assert statuses(Planted(spoil)) == right | expected


def test_a_fake_tensor_mode_that_is_left_is_seen() -> None:
    """With a mode still active after the call, torch's own state is broken, and the check says
    so."""
    mode = FakeTensorMode()
    checks = dict(Checks(SIN, 0, InProcess()).run())
    with mode:
        assert checks["again"]().status == "fake"


def test_a_fake_tensor_that_torch_returns_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cache of the operator that holds a fake tensor is seen in torch's own next call."""
    checks = Checks(SIN, 0, InProcess())
    again = dict(checks.run())["again"]
    with FakeTensorMode():
        cached = torch.zeros(2)
    monkeypatch.setattr(checks.reference, "_function", lambda *_: cached)
    assert again().status == "fake"


def test_the_reference_draws_as_the_bridge_does() -> None:
    """With a key, numbers are drawn in row-major order, whatever the layout of the result."""
    x = torch.ones(3, 4)
    key = (7, 11)
    transposed = Reference(lambda x: torch.rand_like(x.T), [x], [0], key)
    row_major = Reference(lambda x: torch.rand_like(x.T.contiguous()), [x], [0], key)
    np.testing.assert_array_equal(transposed.value()[0], row_major.value()[0])
