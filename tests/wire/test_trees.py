"""Trees rebuild the structure that was sent, with leaves in one known order, and nothing that
was not sent."""

import builtins
import collections
import dataclasses
import enum
import functools
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_wire import trees
from bridge_wire.classes import Classes, Node, structured
from bridge_wire.errors import ProtocolError, StructureError
from bridge_wire.instances import PeerInstance
from bridge_wire.pb import bridge_pb2 as pb


class Array:
    """Stands for a tensor."""

    def __init__(self, name: object = "") -> None:
        self.name = name


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Model:
    weights: Any
    rate: Any = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Computed:
    total: Any
    half: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.half = self.total.name  # fails on anything but an Array


def is_array(value: object) -> bool:
    return isinstance(value, Array)


def send(
    value: Any, sender: Classes | None = None, receiver: Classes | None = None
) -> Any:
    """Return the value as a peer rebuilds it."""
    tree, leaves = trees.encode(value, is_array, sender or Classes())
    return trees.build(
        pb.Tree.FromString(tree.SerializeToString()), leaves, receiver or Classes()
    )


def returned(value: Any) -> Any:
    """Return the value as it comes back from a peer."""
    here, there = Classes(), Classes()
    return send(send(value, here, there), there, here)


def leaves_of(value: Any) -> list[Any]:
    return trees.encode(value, is_array, Classes())[1]


def leaf() -> pb.Tree:
    return pb.Tree(leaf=pb.Tree.Leaf())


def record(
    kind: str, name: str, fields: list[str], items: int | None = None
) -> pb.Tree:
    count = len(fields) if items is None else items
    return pb.Tree(
        **{kind: pb.Tree.Record(name=name, fields=fields, items=[leaf()] * count)}
    )


A, B, C = Array("a"), Array("b"), Array("c")

STATIC = [
    None,
    True,
    False,
    0,
    1,
    -(2**63),
    2**63 - 1,
    0.0,
    -0.0,
    1.5,
    float("inf"),
    1 + 2j,
    "",
    "text",
    "zero\0byte",
    "ünï😀",
]


@pytest.mark.parametrize("value", STATIC, ids=repr)
def test_static_value_keeps_its_value_and_type(value: Any) -> None:
    """A static value comes back equal and of the same type: True stays a bool, 1 an int, 1.0 a
    float."""
    received = send(value)
    assert (type(received), repr(received)) == (type(value), repr(value))


def test_nan_comes_back_as_nan() -> None:
    """A static NaN stays one."""
    assert math.isnan(send(float("nan")))


@pytest.mark.parametrize(
    "value",
    [
        A,
        [],
        (),
        {},
        [A, B],
        (A,),
        (A, [B, (C, None)], {"k": [A]}),
        {"b": A, "a": B},
        {1: A, 2: B},
        {True: A, False: B},
        {None: A},
        {2.5: A, 1 + 1j: B},
        {"nested": {"deeper": {"deepest": (A,)}}},
        [None, True, 3, 4.5, "s", A],
        Point(A, [B]),
        Point(Point(A, B), None),
    ],
    ids=range(16),
)
def test_container_comes_back_as_it_was(value: Any) -> None:
    """Dicts, lists, tuples, namedtuples and None, in any nesting, come back equal and of the
    same types."""
    received = returned(value)
    assert received == value
    assert type(received) is type(value)


@pytest.mark.parametrize(
    "value", [Model(A, 0.1), Frozen([A, B])], ids=["plain", "frozen with slots"]
)
def test_dataclass_comes_back_as_its_own_class(value: Any) -> None:
    """A dataclass that this process sent comes back as an instance of that very class."""
    received = returned(value)
    assert type(received) is type(value)
    assert received == value


def test_dataclass_is_rebuilt_without_its_init() -> None:
    """A field that __init__ does not take is restored too, and __post_init__ does not run again."""
    received = returned(Computed(A))
    assert (received.total, received.half) == (A, "a")


def test_leaves_come_in_depth_first_order() -> None:
    """Leaves are counted depth first, in the order of positions and fields."""
    assert leaves_of((A, [B, Point(C, A)], Model(B, C))) == [A, B, C, A, B, C]


def test_dict_leaves_come_in_the_order_of_sorted_keys() -> None:
    """A dict's leaves are counted by sorted key, however it was filled, so equal dicts have
    equal trees."""
    assert leaves_of({"b": B, "a": A, "c": C}) == [A, B, C]
    one, _ = trees.encode({"b": B, "a": A}, is_array, Classes())
    other, _ = trees.encode({"a": A, "b": B}, is_array, Classes())
    assert one == other


def test_ordered_dict_keeps_its_own_order() -> None:
    """An OrderedDict's leaves are counted in its own order."""
    assert leaves_of(collections.OrderedDict(b=B, a=A)) == [B, A]


def test_keys_that_cannot_be_sorted_keep_the_dict_s_order() -> None:
    """Keys of several types are counted in the order in which they were inserted."""
    assert leaves_of({"x": A, 1: B, None: C}) == [A, B, C]


def test_any_mapping_is_sent_as_a_dict() -> None:
    """A mapping that is no dict comes back as a dict."""
    assert send(collections.ChainMap({"a": A}, {"b": B})) == {"a": A, "b": B}


values = st.recursive(
    st.sampled_from([A, B, C])
    | st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3), children, max_size=4)
        | st.dictionaries(st.integers(-9, 9), children, max_size=4)
        | st.builds(Point, children, children)
        | st.builds(Model, children, children)
    ),
    max_leaves=15,
)


@settings(deadline=None)
@given(values)
def test_any_structure_comes_back_equal(value: Any) -> None:
    """Whatever the nesting, what comes back equals what was sent, and has one path for each
    leaf."""
    tree, leaves = trees.encode(value, is_array, Classes())
    assert returned(value) == value
    assert len(trees.leaf_paths(tree, "x")) == len(leaves)


# Depth, and values that cannot be sent ------------------------------------------------------------


def nested(depth: int, value: Any = None) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("innermost", [A, 1j, "s"], ids=["array", "complex", "text"])
def test_deepest_tree_passes_in_a_whole_request(innermost: Any) -> None:
    """A structure of MAX_DEPTH levels still parses inside the message that carries it."""
    args, leaves = trees.encode(
        (nested(trees.MAX_DEPTH - 1, innermost),), is_array, classes := Classes()
    )
    kwargs, _ = trees.encode({}, is_array, classes)
    call = pb.Call(model="m", arguments=trees.arguments(args, kwargs))
    received = pb.PrepareRequest.FromString(
        pb.PrepareRequest(call=call).SerializeToString()
    )
    rebuilt, _ = trees.build(received.call.arguments, leaves, classes)
    assert rebuilt == (nested(trees.MAX_DEPTH - 1, innermost),)


def test_deeper_structure_is_refused_with_its_path() -> None:
    """One level more is a StructureError that names the place, and so is a structure that
    contains itself."""
    with pytest.raises(
        StructureError, match=r"x(\[0\])+ is nested more than 40 levels"
    ):
        trees.encode(nested(trees.MAX_DEPTH + 1), is_array, Classes(), root="x")
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(StructureError, match="nested"):
        trees.encode(endless, is_array, Classes())


class Colour(enum.IntEnum):
    RED = 1


class Named(str):
    pass


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"bytes", Model, Colour.RED, Named("n"), len],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_part_of_a_tree_is_refused_with_its_path(value: Any) -> None:
    """Anything but a leaf, a container or a plain static value is a StructureError naming its
    path and type."""
    with pytest.raises(StructureError, match=r"args\[0\]\['w'\]\.x"):
        trees.encode(({"w": Point(value, A)},), is_array, Classes(), root="args")


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1])
def test_integer_beyond_64_bits_is_refused(number: int) -> None:
    """A static integer that does not fit in 64 bits is a StructureError, never wrapped."""
    with pytest.raises(StructureError, match="64 bits"):
        trees.encode([number], is_array, Classes())


@pytest.mark.parametrize("key", [(1, (2,)), (b"k",), b"k", frozenset()], ids=repr)
def test_key_that_is_no_static_value_is_refused(key: Any) -> None:
    """A dict key that is no str, number, bool, None or tuple of these is a StructureError naming
    the dict."""
    with pytest.raises(StructureError, match=r"args\[0\] has the key"):
        trees.encode(({key: A},), is_array, Classes(), root="args")


@pytest.mark.parametrize("key", [(), (1, "a"), (None, 2.5, True)], ids=repr)
def test_tuples_are_keys(key: Any) -> None:
    """A dict with tuples of plain values as keys arrives as such."""
    tree, leaves = trees.encode({key: A}, is_array, Classes())
    assert trees.build(tree, leaves, Classes()) == {key: A}
    assert trees.leaf_paths(tree, "x") == [f"x[{key!r}]"]


class Text(enum.StrEnum):
    RED = "red"


def test_numbers_and_texts_of_subclasses_are_plain_as_keys() -> None:
    """A StrEnum is its text, and an IntEnum its number."""
    number = enum.IntEnum("Number", ["ONE"]).ONE
    tree, leaves = trees.encode({Text.RED: A, number: B}, is_array, Classes())
    received = trees.build(tree, leaves, Classes())
    assert {(type(key), key) for key in received} == {(str, "red"), (int, 1)}


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}], ids=["value", "key"])
def test_text_that_utf_8_cannot_carry_is_refused(value: Any) -> None:
    """A string with a lone surrogate, which no message can carry, is a StructureError."""
    with pytest.raises(StructureError):
        trees.encode([value], is_array, Classes(), root="args")


# Paths --------------------------------------------------------------------------------------------


def test_leaves_have_the_paths_that_python_would_write() -> None:
    """The path of a leaf is the expression that reaches it."""
    tree, _ = trees.encode(
        (A, {"w": [B], 3: None}, Point(None, C)), is_array, Classes()
    )
    assert trees.leaf_paths(tree, "args") == ["args[0]", "args[1]['w'][0]", "args[2].y"]


def test_arguments_have_the_paths_of_args_and_kwargs() -> None:
    """The leaves of a call are named from `args` and `kwargs`."""
    args, _ = trees.encode((A,), is_array, Classes())
    kwargs, _ = trees.encode({"scale": B, "on": True}, is_array, Classes())
    assert trees.argument_paths(trees.arguments(args, kwargs)) == [
        "args[0]",
        "kwargs['scale']",
    ]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_flat_tree_is_a_tuple_of_leaves(count: int) -> None:
    """`flat` is the tree of a tuple of that many arrays."""
    arrays = tuple(Array() for _ in range(count))
    assert trees.build(trees.flat(count), arrays, Classes()) == arrays


EMPTY_TUPLE, EMPTY_DICT = (
    pb.Tree(tuple=pb.Tree.Sequence()),
    pb.Tree(dict=pb.Tree.Mapping()),
)


@pytest.mark.parametrize(
    "tree",
    [
        pb.Tree(),
        leaf(),
        EMPTY_TUPLE,
        pb.Tree(list=pb.Tree.Sequence(items=[EMPTY_TUPLE, EMPTY_DICT])),
        pb.Tree(tuple=pb.Tree.Sequence(items=[EMPTY_DICT, EMPTY_TUPLE])),
        pb.Tree(tuple=pb.Tree.Sequence(items=[EMPTY_TUPLE, EMPTY_DICT, EMPTY_DICT])),
        pb.Tree(tuple=pb.Tree.Sequence(items=[EMPTY_TUPLE, pb.Tree()])),
    ],
    ids=["nothing", "leaf", "empty", "list", "swapped", "three", "no kind"],
)
def test_arguments_that_are_no_args_and_kwargs_are_refused(tree: pb.Tree) -> None:
    """A call's arguments must be a tuple of a tuple and a dict; anything else is a
    ProtocolError."""
    with pytest.raises(ProtocolError, match="tuple of a tuple and a dict"):
        trees.argument_paths(tree)


# Malformed trees ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "word"), [(0, "more"), (1, "more"), (3, "fewer"), (9, "fewer")]
)
def test_wrong_number_of_leaves_is_refused(count: int, word: str) -> None:
    """A tree of two leaves that comes with any other number of arrays is a ProtocolError."""
    with pytest.raises(ProtocolError, match=f"{word} leaves"):
        trees.build(trees.flat(2), [A] * count, Classes())


@pytest.mark.parametrize(
    "tree",
    [
        pb.Tree(),
        pb.Tree(list=pb.Tree.Sequence(items=[pb.Tree()])),
        pb.Tree(value=pb.Value()),
        pb.Tree(dict=pb.Tree.Mapping(keys=[pb.Value(text="a")], items=[])),
        pb.Tree(dict=pb.Tree.Mapping(keys=[], items=[leaf()])),
        pb.Tree(
            dict=pb.Tree.Mapping(keys=[pb.Value(text="a")] * 2, items=[leaf()] * 2)
        ),
        pb.Tree(
            dict=pb.Tree.Mapping(
                keys=[pb.Value(integer=1), pb.Value(boolean=True)], items=[leaf()] * 2
            )
        ),
        pb.Tree(dict=pb.Tree.Mapping(keys=[pb.Value()], items=[leaf()])),
        record("namedtuple", "P", ["x"], 2),
        record("dataclass", "P", ["x", "y"], 1),
    ],
    ids=range(10),
)
def test_malformed_tree_is_refused(tree: pb.Tree) -> None:
    """Nodes and values of no kind, and keys or fields that do not match their items, are
    ProtocolErrors."""
    with pytest.raises(ProtocolError):
        trees.build(tree, [A] * 2, Classes())


UNSAFE = [
    "",
    "1x",
    "a b",
    "a.b",
    "a,b",
    "class",
    "None",
    "x=1",
    "x:int",
    "x\n",
    "__import__('os')",
    "a;b",
    "é\u0301-",
]


@pytest.mark.parametrize("kind", ["namedtuple", "dataclass"])
@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_name_that_is_no_identifier_is_refused(kind: str, name: str) -> None:
    """A class or field name that is no identifier never reaches Python's class machinery."""
    with pytest.raises(ProtocolError):
        trees.build(record(kind, name, ["x"]), [A], Classes())
    with pytest.raises(ProtocolError):
        trees.build(record(kind, "P", ["x", name]), [A, B], Classes())


@pytest.mark.parametrize("kind", ["namedtuple", "dataclass"])
@pytest.mark.parametrize(
    "fields",
    [
        ["x", "x"],
        ["\ufb01", "fi"],
        ["__class__"],
        ["__dict__"],
        ["__init__"],
        ["__slots__"],
        ["__setattr__"],
    ],
    ids=ascii,
)
def test_fields_that_no_class_can_have_are_refused(
    kind: str, fields: list[str]
) -> None:
    """Field names that are equal, also after Python's own normalization, or Python's own, are a
    ProtocolError."""
    with pytest.raises(ProtocolError):
        trees.build(record(kind, "P", fields), [A] * len(fields), Classes())


def test_namedtuple_fields_may_not_begin_with_an_underscore() -> None:
    """Names that would hide a namedtuple's own methods are a ProtocolError."""
    with pytest.raises(ProtocolError):
        trees.build(record("namedtuple", "P", ["_replace"]), [A], Classes())


# Classes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["namedtuple", "dataclass"])
def test_class_unknown_here_is_made_once(kind: str) -> None:
    """A class never seen here is made from its name and fields, and is the same one each time
    they come."""
    first = trees.build(record(kind, "Thing", ["x", "y"]), [A, B], classes := Classes())
    second = trees.build(record(kind, "Thing", ["x", "y"]), [B, C], classes)
    assert type(first) is type(second)
    assert (type(first).__name__, first.x, first.y) == ("Thing", A, B)


def test_made_class_is_told_apart_by_kind_name_and_fields() -> None:
    """Another kind, name or order of fields is another class."""
    classes = Classes()
    made = [
        type(trees.build(record(kind, name, fields), [A, B], classes))
        for kind in ("namedtuple", "dataclass")
        for name in ("P", "Q")
        for fields in (["x", "y"], ["y", "x"])
    ]
    assert len(set(made)) == 8


def test_registries_do_not_share_classes() -> None:
    """Classes that one registry has learnt or made are unknown to another."""
    sender, receiver = Classes(), Classes()
    received = send(Point(A, B), sender, receiver)
    assert type(received) is not Point
    assert received == Point(A, B)
    assert type(send(Point(A, B), sender, receiver)) is type(received)


def test_class_that_was_sent_comes_back_from_the_peer() -> None:
    """A class that goes to the peer, is remade there and comes back is the sender's own class
    again."""
    here, there = Classes(), Classes()
    at_the_peer = send(Model(A, Point(B, C)), here, there)
    returned = send(at_the_peer, there, here)
    assert returned == Model(A, Point(B, C))
    assert type(returned) is Model and type(returned.rate) is Point


@pytest.mark.parametrize("make", [collections.namedtuple, dataclasses.make_dataclass])
def test_classes_of_one_name_are_told_apart(make: Callable[..., Any]) -> None:
    """Of several classes with the same module, name and fields, as in a notebook, each comes
    back as itself."""
    classes = [make("Redefined", ["x", "y"]) for _ in range(3)]
    here, there = Classes(), Classes()
    at_the_peer = [send(cls(A, B), here, there) for cls in classes]
    assert len(set(map(type, at_the_peer))) == 3
    assert [type(send(value, there, here)) for value in at_the_peer] == classes


def test_a_class_of_the_peer_is_none_of_this_process() -> None:
    """A class that the peer calls as one of this process is another one."""
    returned(Model(A))
    assert type(send(Model(A, B))) is not Model


def test_attributes_that_are_no_fields_are_not_lost_in_silence() -> None:
    """An instance with attributes besides its fields is sent, and refused when it comes back;
    caches do not count."""
    model = Model(A)
    model.more = B
    at_the_peer = send(model)
    assert at_the_peer.weights is A
    with pytest.raises(
        StructureError, match=r"Model.*\['more'\] are no fields.*dict or tuple"
    ):
        send(at_the_peer)
    cached = Cached(A)
    assert cached.name == "a"
    assert type(returned(cached)) is Cached


def test_attributes_of_a_namedtuple_are_not_lost_in_silence() -> None:
    """Likewise for a subclass of a namedtuple."""
    point = Marked(A, B)
    assert type(returned(point)) is Marked
    point.mark = 1
    with pytest.raises(StructureError, match=r"\['mark'\]"):
        returned(point)


def test_a_class_that_was_never_sent_is_refused() -> None:
    """An origin that this process does not know, as after a restart, is a StructureError that
    says what to do."""
    tree = record("dataclass", "Model", ["weights", "rate"])
    tree.dataclass.returned = "other.Model"
    with pytest.raises(
        StructureError,
        match=r"'other.Model' is not known here.*call the function that returns it again",
    ):
        trees.build(tree, [A, B], Classes())


def test_a_returned_class_has_the_fields_and_kind_that_were_sent() -> None:
    """A peer that returns an origin with another kind, or with other fields, is refused."""
    tree, _ = trees.encode(Model(A, B), is_array, Classes())
    for kind, fields in (
        ("dataclass", ["rate", "weights"]),
        ("namedtuple", ["weights", "rate"]),
    ):
        changed = record(kind, "Model", fields)
        getattr(changed, kind).returned = tree.dataclass.origin
        with pytest.raises(ProtocolError, match="other fields"):
            trees.build(changed, [A, B], Classes())


def test_a_record_of_an_older_peer_is_not_guessed() -> None:
    """A record without origin makes a class, but where this process has sent such a class it is
    refused."""
    plain = record("dataclass", "Fresh", ["x"])
    assert type(trees.build(plain, [A], Classes())).__name__ == "Fresh"
    fresh = dataclasses.make_dataclass("Fresh", ["x"])
    send(fresh(A))
    with pytest.raises(StructureError, match=r"without the origin.*same version"):
        trees.build(plain, [A], Classes())


def test_an_origin_has_a_bounded_length() -> None:
    """A peer that names an origin by too many characters is refused."""
    tree = record("dataclass", "D", ["x"])
    tree.dataclass.origin = "o" * 1001
    with pytest.raises(ProtocolError, match="1001 characters"):
        trees.build(tree, [A], Classes())


@dataclasses.dataclass
class Cached:
    array: Any

    @functools.cached_property
    def name(self) -> Any:
        return self.array.name


class Marked(Point):
    pass


def expand_static(value: Any) -> Node | None:
    """Take a Static apart as a framework does: its number is a static part."""
    if not isinstance(value, Static):
        return None
    return structured(
        Static,
        ("x",),
        [value.x],
        structure=value.number,
        static=(value.number,),
        unflatten=unflattened,
    )


def unflattened(number: Any, items: Any) -> "Static":
    return Static(items[0], number)


@dataclasses.dataclass
class Static:
    x: Any
    number: Any


@pytest.mark.parametrize("number", [0, False, 0.0, -0.0, 1, True, 1.0], ids=repr)
def test_static_parts_come_back(number: Any) -> None:
    """An instance comes back with its very static parts, also where they equal those of another
    instance."""
    for other in (0, False, 0.0, -0.0, 1, True, 1.0):
        trees.encode(Static(A, other), is_array, Classes(), expand=expand_static)
    tree, leaves = trees.encode(
        Static(A, number), is_array, Classes(), expand=expand_static
    )
    back = send(trees.build(tree, leaves, Classes()))
    assert (type(back), type(back.number), repr(back.number)) == (
        Static,
        type(number),
        repr(number),
    )


def test_static_parts_have_origins_that_cannot_be_guessed() -> None:
    """The origin of a class with static parts tells nothing of them; equal instances have the
    same one."""
    first, second, other = (
        trees.encode(Static(A, n), is_array, Classes(), expand=expand_static)[
            0
        ].dataclass.origin
        for n in (5, 5, 6)
    )
    assert first == second != other
    assert len(first.rpartition("#")[2]) == 32


def test_static_parts_without_hash_are_refused_when_they_come_back() -> None:
    """Static parts that cannot be compared are sent once; an instance that comes back is
    refused."""
    tree, leaves = trees.encode(
        Static(A, []), is_array, Classes(), expand=expand_static
    )
    with pytest.raises(
        StructureError, match=r"Static.*static parts cannot be compared"
    ):
        send(trees.build(tree, leaves, Classes()))


@pytest.mark.parametrize("name", ["Popen", "SystemExit", "Point", "dict"])
def test_peer_s_names_reach_no_class_of_this_process(name: str) -> None:
    """A name that comes from the peer is never looked up: neither in builtins, nor in modules
    that are loaded."""
    modules = set(sys.modules)
    made = type(trees.build(record("dataclass", name, ["args"]), [A], Classes()))
    assert made not in (getattr(builtins, name, None), globals().get(name))
    assert made.__mro__ == (made, PeerInstance, object)
    assert set(sys.modules) == modules


def test_made_dataclasses_are_adopted_once() -> None:
    """The framework is told of each dataclass that is made, once; not of namedtuples, nor of
    classes learnt."""
    adopted: list[tuple[type, tuple[str, ...]]] = []
    classes = Classes(lambda cls, fields: adopted.append((cls, fields)))
    for _ in range(2):
        made = trees.build(record("dataclass", "Adopted", ["x"]), [A], classes)
        trees.build(record("namedtuple", "N", ["x"]), [A], classes)
        send(made, classes)
    assert adopted == [(type(made), ("x",))]


def test_oldest_classes_are_forgotten() -> None:
    """A peer that keeps inventing classes takes no room from the others: the oldest are
    forgotten, and made anew."""
    classes = Classes()
    first = type(trees.build(record("namedtuple", "N0", []), [], classes))
    for i in range(2000):
        last = type(trees.build(record("namedtuple", f"N{i}", []), [], classes))
    assert type(trees.build(record("namedtuple", "N1999", []), [], classes)) is last
    again = type(trees.build(record("namedtuple", "N0", []), [], classes))
    assert again is not first and again.__name__ == "N0"


def test_class_s_own_expansion_is_used() -> None:
    """`expand` defines the parts of an instance, for types that are no dataclasses."""

    def expand(value: Any) -> Node | None:
        if not isinstance(value, range):
            return None
        return Node(
            range,
            ("start", "stop"),
            [value.start, value.stop],
            lambda items: range(*items),
        )

    tree, leaves = trees.encode(
        {"r": range(2, 5)}, is_array, classes := Classes(), expand=expand
    )
    received = trees.build(tree, leaves, classes)
    assert isinstance(received, Mapping)
    assert (received["r"].start, received["r"].stop) == (2, 5)
    assert send(received) == {"r": range(2, 5)}


def test_trees_differ_by_more_than_origins() -> None:
    """Without origins, trees of two processes are equal only if containers, classes' names and
    static values are."""
    leaf = pb.Tree(leaf=pb.Tree.Leaf())

    def record(name: str, origin: str, item: pb.Tree = leaf) -> pb.Tree:
        inner = pb.Tree(
            dataclass=pb.Tree.Record(
                name=name, fields=["x"], items=[item], origin=origin
            )
        )
        return pb.Tree(list=pb.Tree.Sequence(items=[inner]))

    plain = trees.without_origins(record("State", "one"))
    assert plain == trees.without_origins(record("State", "two"))
    assert plain != trees.without_origins(record("Other", "one"))
    assert plain != trees.without_origins(
        record("State", "one", pb.Tree(value=pb.Value(integer=1)))
    )
    sequence = pb.Tree.Sequence(items=[leaf])
    assert trees.without_origins(pb.Tree(list=sequence)) != trees.without_origins(
        pb.Tree(tuple=sequence)
    )
