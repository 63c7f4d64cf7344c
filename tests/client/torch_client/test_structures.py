"""What real programs pass around beside arrays: keys, mappings, modules, constants."""

import enum
import io
import pickle
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optree
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from bridge_client import Session, connect, spawn
from bridge_client.inproc import host
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import BridgeError, SpecError, StructureError
from bridge_wire.keys import Key
from tests.client.torch_client import class_models
from tests.client.torch_client.conftest import Remote
from tests.conftest import ROOT, python_of

_NAMES = [
    *("keyed", "drawn", "keys", "normal", "frozen", "is_frozen", "network"),
    *("applied", "split", "merged", "mixed", "unmixed", "weighed", "by_pair"),
    *("partial", "of_partial"),
    "deep",
    "through",
]


@pytest.fixture(scope="module", params=["worker", "in process"])
def served(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A session with the models: in a worker, and in this process."""
    if request.param == "in process":
        models: Session = host(
            jax_model={name: getattr(class_models, name) for name in _NAMES}
        )
    else:
        targets = {
            name: f"tests.client.torch_client.class_models:{name}" for name in _NAMES
        }
        models = spawn(jax_model=targets, python=python_of(".venv-jax"), cwd=ROOT)
    with models as session:
        yield session


@pytest.fixture
def remote(served: Session) -> Iterator[Remote]:
    """Makes functions of a session of this test's own."""
    if served.lane == "inproc":
        yield lambda name, **options: RemoteJaxFunction(served, name=name, **options)
        return
    with connect(served.address) as session:
        yield lambda name, **options: RemoteJaxFunction(session, name=name, **options)


X = torch.arange(2.0)


def tensor_of(array: Any) -> torch.Tensor:
    return torch.tensor(jax.device_get(array).tolist())


def test_keys_are_values(remote: Remote) -> None:
    """A typed key comes as the words that it has in JAX, goes back as a key, and a loop draws the
    numbers that it draws in JAX."""
    state, expected = remote("keyed")(X), class_models.keyed(X.numpy())
    assert isinstance(state["key"], Key)
    assert state["key"].implementation == "threefry2x32" and state["key"].shape == ()
    for _ in range(3):
        state, expected = remote("drawn")(state), class_models.drawn(expected)
        torch.testing.assert_close(state["x"], tensor_of(expected["x"]))
        words = jax.random.key_data(expected["key"]).tolist()
        assert state["key"].data.tolist() == words


def test_arrays_of_keys_are_mapped(remote: Remote) -> None:
    """Keys of another implementation, split into an array of them, one for each row of a vmap."""
    keys = remote("keys", static_argnames="n")(4)
    assert (keys.shape, keys.implementation) == ((4,), "rbg")
    drawn = torch.vmap(remote("normal"))(keys)
    one_by_one = [class_models.normal(key) for key in class_models.keys(4)]
    expected = torch.stack([tensor_of(row) for row in one_by_one])
    # With rbg, a batch draws other numbers than its rows: as in JAX.
    batched = tensor_of(jax.vmap(class_models.normal)(class_models.keys(4)))
    torch.testing.assert_close(drawn, batched)
    first = remote("normal")(optree.tree_map(lambda words: words[0], keys))
    torch.testing.assert_close(first, expected[0])


def test_keys_made_here_are_keys_there(remote: Remote) -> None:
    """A Key of the caller's is used as such; words that are none are refused by name."""
    key = Key(torch.tensor([0, 7], dtype=torch.uint32), "threefry2x32")
    expected = tensor_of(class_models.normal(jax.random.key(7)))
    torch.testing.assert_close(remote("normal")(key), expected)
    file = io.BytesIO()
    torch.save(key, file)
    file.seek(0)
    assert torch.load(file, weights_only=True).data.tolist() == [0, 7]
    assert pickle.loads(pickle.dumps(key)).data.tolist() == [0, 7]
    assert default_collate([key, key]).shape == (2,)
    for words, name in (
        ([0, 7, 1], "threefry2x32"),
        ([0, 7], "no such"),
        ([0, 7], "rbg"),
    ):
        wrong = Key(torch.tensor(words, dtype=torch.uint32), name)
        with pytest.raises(SpecError, match=f"random key of implementation '{name}'"):
            remote("normal")(wrong)


def test_mappings_keep_their_class(remote: Remote) -> None:
    """A FrozenDict is a mapping here, with its items as attributes too, and a FrozenDict there."""
    made = remote("frozen")(X)
    assert type(made).__name__ == "FrozenDict" and made["a"]["b"] is made.a.b
    torch.testing.assert_close(remote("is_frozen")(made), 2 * X)
    changed = made.replace(c=X)
    torch.testing.assert_close(remote("is_frozen")(changed), X)
    assert remote("is_frozen")(dict(made)).sum() == 0  # a plain dict is one
    made["more"] = X
    with pytest.raises(StructureError, match=r"has the keys .*'more'.* but had"):
        remote("is_frozen")(made)
    with pytest.raises(AttributeError, match="no item 'missing'"):
        _ = changed.missing


def test_a_module_is_made_on_the_worker_and_trained_here(remote: Remote) -> None:
    """An equinox module that a function returns: its weights are tensors, its functions and
    static fields come back, and gradients reach the weights."""
    network = remote("network")()
    weights = optree.tree_map(lambda w: w.clone().requires_grad_(), network)
    y = remote("applied")(weights, X)
    torch.testing.assert_close(y, tensor_of(class_models.network()(X.numpy())))
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in optree.tree_leaves(weights))
    assert (network.in_size, network.activation.name) == (2, "relu")


def test_an_nnx_module_goes_in_two_parts(remote: Remote) -> None:
    """The graph, which holds no array, and the state of a flax.nnx module."""
    graph, state = remote("split")()
    y = remote("merged")(graph, state, X)
    module = class_models.Linear(class_models.nnx.Rngs(0))
    torch.testing.assert_close(y, tensor_of(module(X.numpy())))
    kernel = state.linear.kernel.value
    assert kernel.shape == (2, 3)


def test_constants_come_back(remote: Remote) -> None:
    """Enumerations, dtypes, texts and None in a result: readable here, themselves there."""
    made = remote("mixed")(X)
    assert (made["text"], made["none"], made["mode"].value) == ("a", None, "train")
    assert made["dtype"].name == "float32"
    torch.testing.assert_close(remote("unmixed")(made), X)


def test_an_implementation_is_no_code(remote: Remote) -> None:
    """A name that comes with a key is looked up among JAX's implementations only."""
    for name in ("__class__", "os", "", "threefry2x32 "):
        with pytest.raises(BridgeError):
            remote("normal")(Key(torch.zeros(2, dtype=torch.uint32), name))


class How(enum.StrEnum):
    SCALED = "scaled"


class Number(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize("by", [np.float64(2), Number.TWO, 2.0], ids=repr)
@pytest.mark.parametrize("how", [How.SCALED, np.str_("scaled"), "scaled"], ids=repr)
def test_subclasses_of_numbers_and_texts_are_these(
    remote: Remote, by: Any, how: Any
) -> None:
    """A float64 of NumPy is the Python float that it is, and widens nothing. Enumerations of
    numbers and texts are these."""
    y = remote("weighed")(X, by, how)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, 2 * X / 6)


def test_tuples_are_keys_of_dicts(remote: Remote) -> None:
    """In both directions."""
    doubled = remote("by_pair")({(0, 1): X, (0, "a"): X})
    assert list(doubled) == [(0, 1), (0, "a")]
    torch.testing.assert_close(doubled[0, "a"], 2 * X)


COMPILED = {
    "keys": lambda remote: lambda x: remote("drawn")(remote("keyed")(x))["x"],
    "mapping": lambda remote: lambda x: remote("is_frozen")(remote("frozen")(x)),
    "module": lambda remote: lambda x: remote("applied")(remote("network")(), x),
    "nnx module": lambda remote: lambda x: remote("merged")(*remote("split")(), x),
    "constants": lambda remote: lambda x: remote("unmixed")(remote("mixed")(x)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_passes_structures_on(
    remote: Remote, fresh_compiler: None, name: str
) -> None:
    """Without a graph break, also as inputs and outputs of the compiled function."""
    functions = {each: remote(each) for each in _NAMES}
    code = COMPILED[name](functions.__getitem__)
    compiled = torch.compile(code, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), code(X))
    if name == "mapping":
        frozen = torch.compile(
            lambda value: value.replace(c=2 * value.c), fullgraph=True, backend="eager"
        )(functions["frozen"](X))
        torch.testing.assert_close(functions["is_frozen"](frozen), 4 * X)
        use = torch.compile(
            lambda value: functions["is_frozen"](value), fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(use(frozen), 4 * X)


def test_transforms_see_the_arrays_of_a_state_only(remote: Remote) -> None:
    """None and text in a field are part of the structure: torch.vmap refuses such leaves."""
    rows = torch.stack([X, X + 1])
    states = torch.vmap(remote("partial"))(rows)
    assert (states.info, states.text) == (None, "a")
    torch.testing.assert_close(torch.vmap(remote("of_partial"))(states), rows)
    leaves, structure = pytree.tree_flatten(states)
    assert len(leaves) == 1 and pytree.tree_unflatten(leaves, structure) == states
    dims = pytree.tree_unflatten([None], structure)
    assert pytree.tree_leaves(dims, is_leaf=lambda leaf: leaf is None) == [None]
    f = torch.vmap(lambda state, x: remote("of_partial")(state) + x, in_dims=(None, 0))
    torch.testing.assert_close(f(remote("partial")(X), rows), X + rows)


def test_a_module_of_many_classes_comes_back(remote: Remote) -> None:
    """Each layer has static parts of its own."""
    y = remote("through")(remote("deep")(), torch.ones(1))
    assert y.shape == (71,)
