"""Instances of a peer's classes: fields, static parts, comparison, changes, pickles."""

import copy
import dataclasses
import enum
import pickle
from typing import Any

import pytest

from bridge_wire import trees
from bridge_wire.classes import (
    Classes,
    Node,
    constant,
    expand_dataclass,
    made_here,
    peers,
    recipes,
    structured,
)
from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.instances import PeerMapping, parts_of, static_parts
from bridge_wire.keys import Key
from bridge_wire.pb import bridge_pb2 as pb


class Array:
    """Stands for a framework's array: it has a shape, and compares element by element."""

    def __init__(self, *values: float) -> None:
        self.values = values
        self.shape = (len(values),)

    def __repr__(self) -> str:
        return f"Array{self.values}"

    def __eq__(self, other: object) -> Any:
        assert isinstance(other, Array)
        return Same(a == b for a, b in zip(self.values, other.values, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Same(list[bool]):
    def all(self) -> bool:
        return all(self)


def is_array(value: Any) -> bool:
    return isinstance(value, Array)


@dataclasses.dataclass
class State:
    """A worker's class: one array, and static parts."""

    x: Any
    n: int = 5
    name: str = "s"
    huge: int = 2**70  # fits in no message
    function: Any = len


class Frozen(dict[str, Any]):
    """A worker's mapping."""


class Mode(enum.Enum):
    TRAIN = "train"


def expand(value: Any) -> Node | Key | None:
    """Take values apart as a worker's framework does."""
    if isinstance(value, State):
        return structured(
            State,
            ("x",),
            [value.x],
            structure=value.n,
            static=(value.n,),
            unflatten=unmade,
        )
    if isinstance(value, Frozen):
        keys = tuple(sorted(value))
        return structured(
            Frozen,
            keys,
            [value[key] for key in keys],
            structure=keys,
            static=keys,
            unflatten=unfrozen,
        )
    if isinstance(value, Mode):
        return constant(value)
    return expand_dataclass(value)


def unmade(n: int, items: Any) -> State:
    (x,) = items
    return State(x, n)


def unfrozen(keys: Any, items: Any) -> Frozen:
    return Frozen(zip(keys, items, strict=True))


def received(value: Any) -> Any:
    """The value as the client has it."""
    tree, leaves = trees.encode(value, is_array, Classes(), expand=expand)
    return trees.build(tree, leaves, peers)


def sent_back(value: Any) -> Any:
    """The client's value as the worker has it."""
    tree, leaves = trees.encode(value, is_array, peers)
    return trees.build(tree, leaves, Classes())


A, B = Array(1.0, 2.0), Array(3.0, 4.0)


def test_fields_and_plain_static_parts_are_attributes() -> None:
    """Parts that have no plain value, or one that fits in no message, are left out."""
    state = received(State(A))
    assert (state.x is A, state.n, state.name) == (True, 5, "s")
    assert repr(state) == f"State(x={A!r}, n=5, name='s')"
    assert not hasattr(state, "huge") and not hasattr(state, "function")


def test_instances_compare_by_value() -> None:
    """Arrays by their shapes and elements, containers by their items; other classes differ."""
    assert received(State(A)) == received(State(Array(1.0, 2.0)))
    assert received(State(A)) != received(State(B))
    assert received(State(A)) != received(State(Array(1.0)))
    assert received(State(A)) != received(State(A, 6))
    assert received(State(A)) != "a text"
    for one, other, are_equal in (
        ([A, (B,)], [Array(1.0, 2.0), (B,)], True),
        ([A], [A, B], False),
        ({"a": A}, {"a": Array(1.0, 2.0)}, True),
        ({"a": A}, {"b": A}, False),
        (A, None, False),
    ):
        assert (received(State(one)) == received(State(other))) is are_equal


def test_a_changed_copy_keeps_its_class() -> None:
    """`replace` changes fields, and no static part."""
    state = received(State(A))
    changed = state.replace(x=B)
    assert type(changed) is type(state) and changed.x is B and state.x is A
    assert dataclasses.replace(state, x=B) == changed
    assert sent_back(changed).x is B
    with pytest.raises(TypeError, match="unexpected keyword argument 'n'"):
        state.replace(n=6)


def test_mappings_have_items_and_attributes() -> None:
    """They come back as the worker's class, with the keys that it had."""
    made = received(Frozen(a=A, b={"c": B}))
    assert isinstance(made, PeerMapping) and made.a is made["a"] is A
    assert repr(made).startswith("Frozen({'a': ")
    back = sent_back(made.replace(a=B))
    assert type(back) is Frozen and back == {"a": B, "b": {"c": B}}
    with pytest.raises(AttributeError, match="'Frozen' has no item 'missing'"):
        _ = made.missing


def test_changed_keys_are_refused() -> None:
    """Keys added to a mapping, or taken from it, are a StructureError, also for a framework that
    takes it apart."""
    more, fewer = received(Frozen(a=A)), received(Frozen(a=A, b=B))
    more["b"] = B
    del fewer["b"]
    for made in (more, fewer):
        with pytest.raises(
            StructureError, match=r"a Frozen of the worker has the keys"
        ):
            sent_back(made)
        with pytest.raises(StructureError, match=r"keep its keys, or pass a dict"):
            parts_of(type(made)._bridge_fields, type(made))(made)
    assert sent_back(dict(more)) == {"a": A, "b": B}


def test_items_are_set_as_attributes() -> None:
    """As of a ModelOutput; a name that is no item is an AttributeError."""
    made = received(Frozen(a=A))
    made.a = B
    assert made["a"] is B and sent_back(made)["a"] is B
    with pytest.raises(AttributeError, match="no item 'b'"):
        made.b = A


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: Any


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: (1, (x,)), Settings])
def test_static_parts_that_are_equal_are_told_apart(wrap: Any) -> None:
    """1, 1.0 and True inside of containers, too."""
    for number in (1, 1.0, True, -1.0):
        back = sent_back(received(State(A, wrap(number))))
        assert repr(back.n) == repr(wrap(number))


def test_arrays_as_static_parts_are_not_compared() -> None:
    """Also one of a single element, which compares like a number."""

    class One(int):
        def __array__(self) -> None: ...

    with pytest.raises(StructureError, match="static parts cannot be compared"):
        sent_back(received(State(A, One(1))))


def test_a_representation_is_not_asked_for() -> None:
    """A class's own repr may compute, and may differ in each process."""

    class Named:
        def __repr__(self) -> str:
            raise AssertionError

        __str__ = __repr__

    assert list(static_parts(Named(), ())) == []
    assert list(static_parts((1, 2), ())) == []


@pytest.mark.parametrize("key", [Key([1], "fry"), Key(A, 5), Key(None, "fry")])
def test_keys_that_are_none_are_refused(key: Key) -> None:
    """Words that are no array, and an implementation that is no text."""
    with pytest.raises(StructureError, match=r"args\[0\] is a key of"):
        trees.encode((key,), is_array, Classes(), root="args")


def test_constants_show_their_names() -> None:
    """An object without parts comes back as itself."""
    made = received({"mode": Mode.TRAIN})
    assert (made["mode"].name, made["mode"].value) == ("TRAIN", "train")
    assert sent_back(made) == {"mode": Mode.TRAIN}


def test_keys_are_one_leaf() -> None:
    """The array of their words, and the implementation beside it."""
    tree, leaves = trees.encode({"key": Key(A, "fry")}, is_array, Classes())
    assert (leaves, trees.leaf_paths(tree, "x")) == ([A], ["x['key']"])
    made = trees.build(tree, leaves, Classes(key=lambda data, name: (name, data)))
    assert made == {"key": ("fry", A)}
    assert trees.count_nodes(tree, 9) == 2
    assert Key(A, "fry").shape == ()


@pytest.mark.parametrize(
    "value", [State(A), Frozen(a=A), {"s": State(A)}], ids=["state", "mapping", "dict"]
)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_instances_are_pickled_without_code(value: Any, way: str) -> None:
    """A copy is of the same class, and comes back as the original would."""
    made = received(value)
    if way == "pickle":
        text = pickle.dumps(made)
        assert b"State." not in text
        again = pickle.loads(text)
    else:
        again = copy.deepcopy(made)
    assert type(again) is type(made) and again == made
    assert type(sent_back(again)) is type(value)


def test_a_pickle_carries_its_recipe() -> None:
    """So that another process can have the instance made again."""
    state = received(State(A))
    recipe = pb.Recipe(origin=made_here[type(state)], call=b"", fingerprint=b"f")
    recipes.learn([recipe])
    text = pickle.dumps(state)
    recipes._known.pop(recipe.origin)
    pickle.loads(text)
    assert recipes.of([recipe.origin]) == [recipe]


def test_frameworks_adopt_what_was_made_before_them() -> None:
    """A framework that is imported later registers all classes, but no namedtuples."""
    classes, adopted = Classes(), []
    record = pb.Tree.Record(name="P", origin="m.P")
    for tree in (pb.Tree(dataclass=record), pb.Tree(namedtuple=record)):
        trees.build(tree, [], classes)
    classes.adopt_by(lambda cls, fields: adopted.append(cls.__name__))
    named = pb.Tree.Mapping(name="M", origin="m.M")
    trees.build(pb.Tree(dict=named), [], classes)
    assert adopted == ["P", "M"]


@pytest.mark.parametrize("name", ["a b", "__init__", "class", "x" * 256])
def test_static_parts_have_plain_names(name: str) -> None:
    """A name that no attribute can have is a ProtocolError."""
    record = pb.Tree.Record(name="P", origin="m.P1")
    record.statics.add(name=name, value=pb.Value(integer=1))
    with pytest.raises(ProtocolError, match="no plain identifier"):
        trees.build(pb.Tree(dataclass=record), [], Classes())
