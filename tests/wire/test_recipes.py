"""Recipes: names that are digests, and all the recipes that an origin needs."""

from bridge_wire import recipes
from bridge_wire.classes import Node, _Origins
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.recipes import Recipes, origin_of


def tree_of(*origins: str) -> pb.Tree:
    """The arguments of a call that returns these origins, nested in each other."""
    tree = pb.Tree(leaf=pb.Tree.Leaf())
    for origin in reversed(origins):
        record = pb.Tree.Record(name="S", fields=["x"], items=[tree], returned=origin)
        tree = pb.Tree(dataclass=record)
    return tree


def recipe(origin: str, *needed: str) -> pb.Recipe:
    call = pb.Call(model="f", arguments=tree_of(*needed))
    return pb.Recipe(origin=origin, call=call.SerializeToString())


def test_an_origin_is_a_digest_of_its_recipe() -> None:
    """Each part counts."""
    first = origin_of("m.S", b"f", b"call", 0)
    assert first.startswith("m.S#") and len(first) == 36
    others = [
        origin_of("m.S", b"g", b"call", 0),
        origin_of("m.S", b"f", b"call2", 0),
        origin_of("m.S", b"f", b"call", 1),
    ]
    assert len({first, *others}) == 4
    assert first == origin_of("m.S", b"f", b"call", 0)


def test_records_come_parents_first() -> None:
    """Depth-first, as their positions in recipes count."""
    inner = tree_of("b", "c")
    pair = pb.Tree(tuple=pb.Tree.Sequence(items=[tree_of("a"), inner]))
    mapping = pb.Tree(dict=pb.Tree.Mapping(name="M", returned="d", items=[pair]))
    plain = pb.Tree(dict=pb.Tree.Mapping(items=[mapping]))
    assert recipes.returned_in(plain) == ["d", "a", "b", "c"]


def test_all_needed_recipes_are_found_once() -> None:
    """Those of the calls in recipes too."""
    known = Recipes()
    steps = [recipe("a"), recipe("b", "a"), recipe("c", "b", "a"), recipe("d", "c")]
    known.learn(steps)
    found = known.of(["d", "b"])
    assert sorted(each.origin for each in found) == ["a", "b", "c", "d"]
    assert known.of(["d", "unknown"]) == known.of(["d"])


def test_an_origin_with_an_unknown_step_has_no_recipe() -> None:
    """It is valid in its worker process only, as is one that needs too many steps."""
    known = Recipes()
    known.learn([recipe("b", "a")])
    assert known.of(["b"]) == []
    known.learn([recipe("s0")])
    known.learn(recipe(f"s{i}", f"s{i - 1}") for i in range(1, 1100))
    assert len(known.of(["s1023"])) == 1024 and known.of(["s1024"]) == []


def test_recipes_without_a_call_are_not_kept() -> None:
    """Nor are those with a call of more than a mebibyte."""
    known = Recipes()
    long = pb.Call(model="f" * (1 << 20)).SerializeToString()
    known.learn([pb.Recipe(origin="a", call=b"\xff"), pb.Recipe(origin="b", call=long)])
    assert known.of(["a", "b"]) == []


def test_the_oldest_recipes_are_forgotten() -> None:
    """A worker that keeps inventing them takes no room without end."""
    known = Recipes()
    known.learn(recipe(str(i)) for i in range(5000))
    assert known.of(["0"]) == [] and len(known.of(["4999"])) == 1


# The origins of a worker -------------------------------------------------------------------------


class A: ...


class B: ...


def node(cls: type, static: object = None) -> Node:
    return Node(cls, (), (), static, has_static=static is not None)


def test_an_origin_is_renamed_once() -> None:
    """The first lasting name stays; trees made before it lead to it."""
    origins = _Origins()
    first = origins.name_of("dataclass", node(A, 1))
    assert origins.rename(first, "m.A#1") == "m.A#1"
    assert origins.rename(first, "m.A#2") == "m.A#1"
    assert origins.name_of("dataclass", node(A, 1)) == "m.A#1"
    assert origins.rename("m.A#1", "m.A#3") == "m.A#1"
    assert origins.class_of(first) is origins.class_of("m.A#1") is A
    assert origins.class_of("m.A#3") is None


def test_a_lasting_name_is_never_another_class() -> None:
    """Also if a recipe names one that is taken."""
    origins = _Origins()
    assert origins.rename(origins.name_of("dataclass", node(A)), "m#1") == "m#1"
    other = origins.name_of("dataclass", node(B))
    assert origins.rename(other, "m#1") == other
    assert (origins.class_of("m#1"), origins.class_of(other)) == (A, B)


def test_objects_made_anew_by_each_trace_share_a_name() -> None:
    """Nodes that differ in parts without plain values only: a function of each trace."""
    origins = _Origins()

    class Builder:
        exact = ("function",)

    first, second = (origins.name_of("dataclass", node(A, Builder())) for _ in "ab")
    assert first != second
    assert {origins.rename(each, "m.A#1") for each in (first, second)} == {"m.A#1"}


def test_a_class_may_have_several_names() -> None:
    """That of a client's recipe beside the worker's own."""
    origins = _Origins()
    first = origins.name_of("dataclass", node(A))
    origins.alias(first, "m.A#9")
    origins.alias("unknown", "m.A#8")
    assert origins.class_of("m.A#9") is A and origins.class_of("m.A#8") is None


def test_the_name_of_a_class_is_used_once() -> None:
    """A second class of the same name gets another origin, also after the first is renamed."""
    origins = _Origins()
    other = type("A", (), {"__module__": A.__module__, "__qualname__": A.__qualname__})
    first = origins.name_of("dataclass", node(A))
    origins.rename(first, "m.A#1")
    second = origins.name_of("dataclass", node(other))
    assert second != first and origins.class_of(second) is other
