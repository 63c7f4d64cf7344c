"""Instances of the model's classes come back to it exactly, with their static parts, or are
refused."""

import collections
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError, StructureError
from tests.client.torch_client import class_models
from tests.client.torch_client.conftest import Remote
from tests.conftest import ROOT, python_of

_NAMES = [
    "make",
    "energy",
    "class_of",
    "step",
    "pair",
    "doubled",
    "twin",
    "train_state",
    "trained",
]
_TARGETS = {name: f"tests.client.torch_client.class_models:{name}" for name in _NAMES}
STATIC = ["registered", "struct", "module", "node"]


@pytest.fixture(scope="module", params=["worker", "worker with x64", "in process"])
def served(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with the models: in a worker, in one with 64-bit types, and in this process."""
    if request.param == "in process":
        models: Session = host(
            jax_model={name: getattr(class_models, name) for name in _NAMES}
        )
    else:
        args = ("--x64",) if "x64" in request.param else ()
        models = spawn(
            jax_model=_TARGETS, python=python_of(".venv-jax"), cwd=ROOT, args=args
        )
    with models as session:
        yield session


@pytest.fixture
def session(served: Session) -> Iterator[Session]:
    """A session of this test's own with the worker, or that with the models of this process."""
    if served.lane == "inproc":
        yield served
        return
    with connect(served.address) as session:
        yield session


@pytest.fixture
def remote(session: Session) -> Remote:
    """Makes functions of that session."""
    return lambda name, **options: RemoteJaxFunction(session, name=name, **options)


@pytest.fixture
def x(session: Session) -> Tensor:
    return torch.arange(3, dtype=torch.float64 if session.x64 else torch.float32)


@pytest.mark.parametrize("kind", STATIC)
def test_static_parts_come_back_to_the_model(
    remote: Remote, x: Tensor, kind: str
) -> None:
    """A static field travels with its instance: of each instance its own, also after fields were
    replaced."""
    make, energy = remote("make", static_argnames="n"), remote("energy")
    states = {n: make(x, kind, n) for n in (5, 2, 0)}
    for n, state in states.items():
        torch.testing.assert_close(energy(state), n * (x**2).sum())
    if dataclasses.is_dataclass(states[5]):
        name = dataclasses.fields(states[5])[0].name
        changed = dataclasses.replace(states[5], **{name: x + 1})
        torch.testing.assert_close(energy(changed), 5 * ((x + 1) ** 2).sum())


@pytest.mark.parametrize("kind", STATIC)
def test_derivatives_go_through_states(remote: Remote, x: Tensor, kind: str) -> None:
    """A gradient goes through an instance with static parts, by way of two programs."""
    make, energy = remote("make", static_argnames="n"), remote("energy")
    x.requires_grad_()
    energy(make(x, kind, 3)).backward()
    torch.testing.assert_close(x.grad, 6 * x.detach())


@pytest.mark.parametrize("kind", STATIC)
def test_a_loop_over_a_state_prepares_nothing_anew(
    remote: Remote, x: Tensor, kind: str
) -> None:
    """A step whose result is the state's own class and static parts is one program, and one
    class."""
    step, state = remote("step"), remote("make", static_argnames="n")(x, kind, 4)
    classes = {type(state := step(state)) for _ in range(4)}
    assert len(classes) == 1
    assert len(step._calls) == 1
    torch.testing.assert_close(remote("energy")(state), 4 * ((16 * x) ** 2).sum())


def test_arrays_as_static_parts_are_told_apart(remote: Remote, x: Tensor) -> None:
    """Although they cannot be compared as a whole: each instance gets its own back, also after
    another call has made an equal one."""
    make, energy = remote("make", static_argnames="n"), remote("energy")
    for n in (5, 2, 5):
        for part in (x, x[:2]):
            state = make(part, "incomparable", n)
            torch.testing.assert_close(energy(state), n * (part**2).sum())


def test_classes_of_one_name_are_told_apart(remote: Remote, x: Tensor) -> None:
    """Two classes of the same name and fields, in two modules, are each itself in the model,
    whichever came last."""
    make, twin, class_of, energy = (
        remote("make", static_argnames="n"),
        remote("twin"),
        remote("class_of"),
        remote("energy"),
    )
    first, second, third = make(x, "registered", 7), twin(x), make(x, "registered", 7)
    assert [int(class_of(state)) for state in (first, second, third)] == [1, 2, 1]
    torch.testing.assert_close(energy(second), -7 * x.sum())
    torch.testing.assert_close(energy(third), 7 * (x**2).sum())


def test_classes_of_the_caller_are_none_of_the_model(remote: Remote, x: Tensor) -> None:
    """A class of the caller's with the name and the fields of one of the model's is another one
    there, also after the model has returned its own.
    """

    @dataclasses.dataclass
    class Registered:
        x: Tensor
        n: Tensor

    mine, class_of = Registered(x, torch.ones(())), remote("class_of")
    assert int(class_of(mine)) == 0
    remote("make", static_argnames="n")(x, "registered", 7)
    assert int(class_of(mine)) == 0
    assert type(remote("step")(mine)) is Registered


def test_a_namedtuple_keeps_its_methods(remote: Remote, x: Tensor) -> None:
    """A namedtuple of the model's is an instance of its class there; one of the caller's with
    that name is not."""
    torch.testing.assert_close(remote("doubled")(remote("pair")(x)), 4 * x)
    other = collections.namedtuple("Pair", ["x", "y"])  # type: ignore[name-match]
    with pytest.raises(RemoteModelError, match=r"AttributeError"):
        remote("doubled")(other(x, x))


def test_a_train_state_trains(remote: Remote, x: Tensor) -> None:
    """flax's TrainState, with an optimizer and a function as static parts, takes its steps on
    the worker."""
    state, trained = remote("train_state")(x), remote("trained")
    for _ in range(3):
        state = trained(state, torch.ones_like(x))
    torch.testing.assert_close(state.params["w"], x - 0.5 * (1 + 1.5 + 1.75))
    assert int(state.step) == 3


def test_attributes_that_are_no_fields_are_not_lost_in_silence(
    remote: Remote, x: Tensor
) -> None:
    """An instance of the caller's with more attributes than fields can be read by the model, and
    does not come back."""

    @dataclasses.dataclass
    class Mine:
        x: Tensor

    mine = Mine(x)
    assert type(remote("step")(mine)) is Mine
    mine.more = 1
    with pytest.raises(StructureError, match=r"Mine.*\['more'\] are no fields"):
        remote("step")(mine)
