"""Instances of a worker's classes outlive the worker, and the client that was given them."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, default_collate

from bridge_client import Session, connect, spawn
from bridge_client.torch import RemoteJaxFunction
from bridge_wire import recipes
from bridge_wire.classes import made_here, peers
from bridge_wire.classes import recipes as known_recipes
from bridge_wire.errors import ModelChanged, ProtocolError, StructureError
from bridge_wire.pb import bridge_pb2 as pb
from tests.conftest import ROOT, python_of

_MODULE = "tests.client.torch_client.class_models"
_NAMES = ("make", "energy", "step", "twin", "class_of", "train_state", "trained")
_TARGETS = {name: f"{_MODULE}:{name}" for name in _NAMES}
_OTHER = {**_TARGETS, "make": f"{_MODULE}:make_twice"}
KINDS = ["registered", "struct", "module", "node"]


def worker(targets: dict[str, str] = _TARGETS) -> Session:
    return spawn(jax_model=targets, python=python_of(".venv-jax"), cwd=ROOT)


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    """The addresses of two workers with the same models."""
    with worker() as one, worker() as other:
        yield [one.address, other.address]


@pytest.fixture
def first(addresses: list[str]) -> Iterator[Session]:
    """A session of this test's own with the first worker."""
    with connect(addresses[0]) as session:
        yield session


@pytest.fixture
def second(addresses: list[str]) -> Iterator[Session]:
    """A session of this test's own with the second one."""
    with connect(addresses[1]) as session:
        yield session


@pytest.fixture
def x() -> Tensor:
    return torch.arange(3.0)


def function(session: Session, name: str) -> RemoteJaxFunction:
    static = ("n",) if name == "make" else ()
    return RemoteJaxFunction(session, name=name, static_argnames=static)


def saved(state: Any) -> Any:
    """The state as torch.load gives it back, which runs no code of the file."""
    file = io.BytesIO()
    torch.save({"state": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["state"]


COPIES = {
    "as it is": lambda state: state,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "torch.save": saved,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", COPIES)
def test_a_state_is_rebuilt_by_another_worker(
    first: Session, second: Session, x: Tensor, kind: str, way: str
) -> None:
    """A worker that has never made the state traces the call that did, and rebuilds it with its
    static part."""
    made = function(first, "make")(x, kind, 5)
    state = COPIES[way](made)
    assert type(state) is type(made) and state == made
    for session in (second, first):
        energy = function(session, "energy")(state)
        torch.testing.assert_close(energy, 5 * (x**2).sum())


def test_a_state_survives_its_workers_restart(x: Tensor) -> None:
    """A loop over a state goes on with the worker's successor, in the same class."""
    with worker() as session:
        step, energy = function(session, "step"), function(session, "energy")
        state = function(session, "make")(x, "registered", 5)
        before = type(state)
        state = step(state)
        session._host._process.kill()
        session._host._process.wait()
        state = step(state)
        assert type(state) is before
        torch.testing.assert_close(energy(state), 5 * ((4 * x) ** 2).sum())
        assert type(function(session, "make")(x, "registered", 5)) is before


def test_a_loop_keeps_the_name_that_its_state_had(first: Session, x: Tensor) -> None:
    """Also on a worker where another call has made an equal instance first."""
    state = function(first, "make")(x, "registered", 31)
    with worker() as other:
        equal = function(other, "make")(x[:2], "registered", 31)
        stepped = function(other, "step")(state)
        assert type(stepped) is type(state) is not type(equal)
        torch.testing.assert_close(stepped.x, 2 * x)
        assert type(function(other, "step")(equal)) is type(equal)


def test_states_of_a_training_survive(x: Tensor) -> None:
    """flax's TrainState: its optimizer and its function, which each trace makes anew, are rebuilt
    by the successor."""
    with worker() as session:
        trained = function(session, "trained")
        state = trained(function(session, "train_state")(x), torch.ones_like(x))
        session._host._process.kill()
        session._host._process.wait()
        for _ in range(2):
            state = trained(state, torch.ones_like(x))
        torch.testing.assert_close(state.params["w"], x - 0.5 * (1 + 1.5 + 1.75))


def test_a_state_of_another_revision_is_refused(first: Session, x: Tensor) -> None:
    """A worker whose function makes other states does not take the old ones."""
    state = function(first, "make")(x, "registered", 5)
    with (
        worker(_OTHER) as other,
        pytest.raises(ModelChanged, match="call 'make' again"),
    ):
        function(other, "energy")(state)


def test_a_state_of_a_model_that_is_gone_is_refused(first: Session, x: Tensor) -> None:
    """A worker without the model that made the state says so."""
    state = function(first, "make")(x, "registered", 5)
    rest = {"energy": _TARGETS["energy"]}
    with worker(rest) as other, pytest.raises(ModelChanged, match=r"no model.*'make'"):
        function(other, "energy")(state)


def test_classes_of_one_name_stay_apart_in_another_worker(
    first: Session, second: Session, x: Tensor
) -> None:
    """Whichever class the other worker makes first, each state is of its own."""
    one, two = function(first, "make")(x, "registered", 7), function(first, "twin")(x)
    class_of = function(second, "class_of")
    assert [int(class_of(state)) for state in (two, one, two)] == [2, 1, 2]


def test_functions_of_a_process_share_classes(first: Session, x: Tensor) -> None:
    """Two functions, two sessions: one class for one identity."""
    with connect(first.address) as other:
        states = [function(s, "make")(x, "struct", 3) for s in (first, other)]
    assert type(states[0]) is type(states[1])
    assert type(function(first, "make")(x, "struct", 4)) is not type(states[0])


def test_a_pickled_state_is_used_by_a_new_process(
    first: Session, second: Session, x: Tensor, tmp_path: Path
) -> None:
    """A file with a state is enough for a process that has never called the worker."""
    file = tmp_path / "state"
    file.write_bytes(pickle.dumps(function(first, "make")(x, "module", 5)))
    program = (
        "import pickle, sys; from bridge_client.torch import RemoteJaxFunction;"
        "state = pickle.load(open(sys.argv[1], 'rb')); print(state);"
        "print(float(RemoteJaxFunction(sys.argv[2], name='energy')(state)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file), second.address],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown, energy = done.stdout.splitlines()
    assert (shown, energy) == ("Module(x=tensor([0., 1., 2.]), n=5)", "25.0")


class _States(torch.utils.data.Dataset[Any]):
    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> Any:
        return self.states[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_states_go_through_a_data_loader(
    first: Session, x: Tensor, workers: int
) -> None:
    """Also through forked workers: they are collated field by field."""
    make = function(first, "make")
    states = _States([make(x + i, "struct", 5) for i in range(4)])
    batches = list(DataLoader(states, batch_size=2, num_workers=workers))
    assert [type(batch) for batch in batches] == [type(states[0])] * 2
    torch.testing.assert_close(batches[1].x, torch.stack([x + 2, x + 3]))
    energy = torch.vmap(function(first, "energy"))(batches[1])
    expected = torch.stack([5 * (row**2).sum() for row in (x + 2, x + 3)])
    torch.testing.assert_close(energy, expected)


def test_states_are_nodes_everywhere(first: Session, x: Tensor) -> None:
    """optree, torch's own pytrees and torch.func see the fields, and keep the static part."""
    make, energy = function(first, "make"), function(first, "energy")
    state = make(x, "registered", 5)
    for mapped in (optree.tree_map, pytree.tree_map):
        doubled = mapped(lambda leaf: 2 * leaf, state)
        torch.testing.assert_close(energy(doubled), 20 * (x**2).sum())
    states = torch.vmap(lambda row: make(row, "registered", 5))(torch.stack([x, x + 1]))
    torch.testing.assert_close(torch.vmap(energy)(states)[0], 5 * (x**2).sum())
    gradient = torch.func.grad(lambda state: energy(state))(state)
    torch.testing.assert_close(gradient.x, 10 * x)
    _, aux = torch.func.grad(
        lambda x: (x.sum(), make(x, "registered", 5)), has_aux=True
    )(x)
    torch.testing.assert_close(energy(aux), 5 * (x**2).sum())


def test_a_state_shows_its_parts(first: Session, x: Tensor) -> None:
    """Fields and plain static parts are attributes, and stand in its repr. `replace` gives
    another state."""
    state = function(first, "make")(x, "registered", 5)
    assert (repr(state), state.n) == ("Registered(x=tensor([0., 1., 2.]), n=5)", 5)
    changed = state.replace(x=x + 1)
    assert changed != state and changed == state.replace(x=x + 1)
    assert state.replace(x=x[:2]) != state
    energy = function(first, "energy")(changed)
    torch.testing.assert_close(energy, 5 * ((x + 1) ** 2).sum())
    with pytest.raises(TypeError, match="unexpected keyword argument 'n'"):
        state.replace(n=6)


def _recipe_of(state: Any) -> pb.Recipe:
    (recipe,) = known_recipes.of([made_here[type(state)]])
    return recipe


def _other_call(recipe: pb.Recipe) -> None:
    call = pb.Call.FromString(recipe.call)
    call.arguments.tuple.items[0].tuple.items[2].value.integer = 6
    recipe.call = call.SerializeToString(deterministic=True)


def _with_transforms(recipe: pb.Recipe) -> None:
    call = pb.Call.FromString(recipe.call)
    call.transforms.add(vmap=pb.Transform.Vmap(axes=[0], size=2))
    recipe.call = call.SerializeToString(deterministic=True)


FORGED = {
    "another call": _other_call,
    "a call with transforms": _with_transforms,
    "no call": lambda recipe: recipe.MergeFrom(pb.Recipe(call=b"\xff")),
    "another record": lambda recipe: recipe.MergeFrom(pb.Recipe(record=7)),
    "another fingerprint": lambda recipe: recipe.MergeFrom(
        pb.Recipe(fingerprint=b"12345678")
    ),
}


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("is_named", [False, True], ids=["old name", "its own name"])
def test_forged_recipes_are_refused(
    first: Session, x: Tensor, forged: str, is_named: bool
) -> None:
    """A client that invents an identity is given no class of the worker's: neither by another
    recipe's name, nor by a recipe that the model does not follow."""
    recipe = pb.Recipe()
    recipe.CopyFrom(_recipe_of(function(first, "make")(x, "registered", 5)))
    FORGED[forged](recipe)
    name = recipe.origin.partition("#")[0]
    if is_named:
        recipe.origin = recipes.origin_of(
            name, recipe.fingerprint, recipe.call, recipe.record
        )
    else:
        recipe.origin = f"{name}#{'0' * 32}"
    known_recipes.learn([recipe])
    cls = peers.find("dataclass", "Registered", ("x",), recipe.origin)
    with (
        worker() as other,
        pytest.raises((ProtocolError, ModelChanged, StructureError)),
    ):
        function(other, "energy")(cls(x))


def test_another_class_name_is_refused(first: Session, x: Tensor) -> None:
    """An origin whose name is not that of the class which its recipe makes."""
    recipe = pb.Recipe()
    recipe.CopyFrom(_recipe_of(function(first, "make")(x, "registered", 5)))
    recipe.origin = recipes.origin_of(
        "os.Popen", recipe.fingerprint, recipe.call, recipe.record
    )
    known_recipes.learn([recipe])
    cls = peers.find("dataclass", "Registered", ("x",), recipe.origin)
    with worker() as other, pytest.raises(ProtocolError, match=r"is no 'os\.Popen'"):
        function(other, "energy")(cls(x))


def test_collation_of_different_states_is_refused(first: Session, x: Tensor) -> None:
    """States with other static parts do not become one."""
    make = function(first, "make")
    with pytest.raises(StructureError, match="different"):
        default_collate([make(x, "struct", 5), make(x, "struct", 6)])
