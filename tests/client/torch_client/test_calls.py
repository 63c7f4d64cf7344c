"""What can be passed to a remote function and what comes back: structures, static values, memory
layouts."""

import collections
import dataclasses
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.client.torch_client.conftest import Remote


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Sample:
    image: Any
    label: Any
    source: str = "here"


@dataclasses.dataclass(frozen=True)
class Box:
    corner: Point
    size: Any
    area: Any = dataclasses.field(init=False, default=None)


def assert_same(seen: Any, expected: Any) -> None:
    """Compare two structures of tensors, classes included."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)
        return
    assert type(seen) is type(expected)
    if dataclasses.is_dataclass(expected):
        seen, expected = (
            {f.name: getattr(v, f.name) for f in dataclasses.fields(v)}
            for v in (seen, expected)
        )
    if isinstance(expected, dict):
        assert set(seen) == set(expected)
        for key in expected:
            assert_same(seen[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(seen) == len(expected)
        for one, other in zip(seen, expected, strict=True):
            assert_same(one, other)
    else:
        assert seen == expected


def x() -> Tensor:
    return torch.arange(6, dtype=torch.float32).reshape(2, 3)


STRUCTURES = {
    "dict": {"b": x(), "a": x() + 1},
    "dict with number keys": {2: x(), 10: x() + 1, 1: x() + 2},
    "list": [x(), x() + 1],
    "tuple": (x(), x() + 1),
    "one-tuple": (x(),),
    "None": None,
    "containers without leaves": [{}, [], (), None],
    "nested": {"a": [(x(), None), {"b": {"c": [x() + 1]}}], "d": ()},
    "namedtuple": Point(x(), x() + 1),
    "dataclass": Sample(x(), torch.tensor(3, dtype=torch.int32)),
    "dataclass of a namedtuple": {
        "boxes": [Box(Point(x(), None), x() + 1), Box(Point(x(), None), x())]
    },
    "text": {"text": "label", "x": x()},
    "an OrderedDict": dict(b=x(), a=x() + 1),
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_structure_comes_back_as_it_went(remote: Remote, structure: str) -> None:
    """What is sent comes back with its containers, its classes, its Nones and its keys."""
    value = STRUCTURES[structure]
    assert_same(remote("identity")(value), value)


def test_positional_and_keyword_arguments_arrive_where_they_belong(
    any_lane: Remote,
) -> None:
    """Positional and keyword arguments, all of them structures, arrive under their positions and
    names."""
    sent = (x(), {"w": [x() + 1]}), {"scale": x() + 2, "more": (None, x() + 3)}
    made = any_lane("echo")(*sent[0], **sent[1])
    assert_same(made, {"args": list(sent[0]), "kwargs": sent[1]})


def test_an_argument_can_be_given_by_position_or_by_keyword(remote: Remote) -> None:
    """The model's own argument names work as keywords, in any order."""
    product = remote("product")
    assert_same(product(y=x(), x=x() + 1), product(x() + 1, x()))


def test_a_mapping_keeps_its_leaves_apart(remote: Remote) -> None:
    """An OrderedDict in another order than the sorted one has each leaf under its key."""
    value = collections.OrderedDict(b=x(), a=x() + 1, c=x() + 2)
    made = remote("identity")(value)
    assert {key: made[key][0, 0].item() for key in made} == {"b": 0, "a": 1, "c": 2}


class Settings(dict[str, Any]):
    """A dict of a user's own, as libraries for settings have them."""


@dataclasses.dataclass
class ModelOutput(collections.OrderedDict[str, Any]):
    """A dataclass that is a dict of its fields, as transformers' models return them."""

    logits: Any
    loss: Any = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (ModelOutput(x()), {"logits": x()}),
        (Settings(b=x(), a=x() + 1), {"a": x() + 1, "b": x()}),
        (collections.UserDict(w=[x()]), {"w": [x()]}),
        (types.MappingProxyType({"w": Settings(v=x())}), {"w": {"v": x()}}),
        (collections.UserDict(), {}),
        (torch.Size([2]), (torch.tensor(2, dtype=torch.int32),)),
        (torch.max(x(), 0), (x()[1], torch.ones(3, dtype=torch.int32))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_counts_as_a_dict_or_tuple_travels_as_one(
    remote: Remote, value: Any, plain: Any
) -> None:
    """So a tensor's shape, or a mapping of another library, can be passed as it is."""
    for _ in range(2):
        assert_same(remote("identity")(value), plain)


def test_two_instances_of_a_signature_differ_in_data_only(remote: Remote) -> None:
    """A second call of a known signature returns its own values, and the classes again."""
    identity = remote("identity")
    for shift in range(3):
        value = {"p": Point(x() + shift, [x() - shift]), "s": Sample(x() * shift, x())}
        assert_same(identity(value), value)


# Outputs ------------------------------------------------------------------------------------------


def test_a_namedtuple_of_the_model_has_its_name_and_fields(remote: Remote) -> None:
    """A namedtuple that only the worker knows comes back as one of that name, with those fields."""
    made = remote("moments")(x())
    assert (type(made).__name__, made._fields) == ("Moments", ("mean", "variance"))
    mean, variance = made
    assert (mean.item(), variance.item()) == pytest.approx((2.5, 17.5 / 6))


def test_a_dataclass_of_the_model_has_its_name_and_fields(remote: Remote) -> None:
    """A dataclass that only the worker knows comes back with everything that is nested in it."""
    made = remote("report")(x())
    assert dataclasses.is_dataclass(made) and type(made).__name__ == "Report"
    assert made.total.item() == 15 and made.moments.mean.item() == 2.5
    assert_same(
        made.extra,
        {"none": None, "pair": (x(), [x() * 2]), "empty": {}, "text": "fine"},
    )


def test_a_custom_node_comes_back_with_its_fields(remote: Remote) -> None:
    """A pytree node that the model's author registered comes back as a class with its name and
    fields."""
    made = remote("interval")(x())
    assert (type(made).__name__, made.low.item(), made.high.item()) == (
        "Interval",
        0,
        5,
    )


def test_a_frozen_dict_comes_back_as_a_mapping(remote: Remote) -> None:
    """flax's FrozenDict is a dict of that name here."""
    made = remote("frozen")(x())
    assert isinstance(made, dict) and type(made).__name__ == "FrozenDict"
    assert_same({"a": made["a"], "b": dict(made["b"])}, {"a": x(), "b": {"c": x() * 2}})


@pytest.mark.parametrize("maker", ["moments", "report"])
def test_a_class_of_the_model_round_trips(remote: Remote, maker: str) -> None:
    """What the model returned can be passed on, and is an instance of the model's own class
    there."""
    made = remote(maker)(x() + 1)
    expected = (x() + 1).var(correction=0).sqrt() / (x() + 1).mean()
    torch.testing.assert_close(remote("spread")(made), expected)


def test_numbers_that_the_model_returns_become_tensors(remote: Remote) -> None:
    """A Python number in the result, as any leaf there, is a 0-d tensor."""
    _, number = remote("program_number")(x(), 1.0)
    assert (
        isinstance(number, Tensor)
        and number.shape == ()
        and not number.is_floating_point()
    )


# Static values and numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [(2.0, 3.5), (2, 3), (-1, 2**31 - 1), (0.5, float("nan"))]
)
def test_numbers_are_data(remote: Remote, values: tuple[float, float]) -> None:
    """One program serves all values of a Python number."""
    model = remote("program_number")
    (first, number), (second, again) = (model(x(), value) for value in values)
    assert_same([first, second], [x() * values[0], x() * values[1]])
    assert number == again


def test_a_number_takes_the_type_of_the_other_operand(remote: Remote) -> None:
    """A Python float does not widen a bfloat16, nor an int a uint8: as in JAX and torch."""
    product = remote("product")
    assert product(x().bfloat16(), 1.5).dtype is torch.bfloat16
    assert product(x().to(torch.uint8), 3).dtype is torch.uint8
    assert product(x(), 2j).dtype is torch.complex64


def test_a_complex_number_is_data(remote: Remote) -> None:
    """A Python complex number arrives as it is."""
    assert_same(remote("product")(x(), 1 + 2j), x() * (1 + 2j))


def test_a_static_number_makes_a_program_per_value(remote: Remote) -> None:
    """What static_argnames names is part of the program, by position and by keyword alike."""
    model = remote("program_number", static_argnames=("scale",))
    numbers = [
        model(x(), 11.5)[1],
        model(x(), 12.5)[1],
        model(x(), 11.5)[1],
        model(x(), scale=13.5)[1],
    ]
    assert numbers[0] == numbers[2] and len({int(number) for number in numbers}) == 3


def test_a_call_under_grad_makes_one_program(remote: Remote) -> None:
    """The forward pass that keeps a residual; the one that keeps none is made when it is first
    run."""
    model = remote("program_number")
    recorded = model(torch.rand(5, 7).requires_grad_(), 1.0)[1]
    # The program, and the trace of its fingerprint.
    assert model(torch.rand(5, 7), 1.0)[1] == recorded + 2


@pytest.mark.parametrize("static_argnames", ["exponent", ["exponent"]])
def test_python_can_count_with_a_static_number(
    remote: Remote, static_argnames: Any
) -> None:
    """A static number is a Python number in the model, given by position or by keyword."""
    power = remote("power", static_argnames=static_argnames)
    assert_same(
        [power(x(), 3), power(x(), exponent=2), power(x(), 0)],
        [x() ** 3, x() ** 2, x() ** 0],
    )


def test_bools_and_texts_and_none_are_static(remote: Remote) -> None:
    """Python branches on a bool, a str or None in the model."""
    branch = remote("branch")
    assert_same(branch(x(), True), x() * 2)
    assert_same(branch(x(), False), x())
    assert_same(branch(x(), True, mode="negate"), -x() * 2)
    assert_same(branch(x(), True, "shift"), x() * 2 + 1)
    assert_same(branch(x(), flag=True, mode=None), x() * 2)


def test_one_and_true_are_different_signatures(remote: Remote) -> None:
    """True is static and 1 is data, though they are equal in Python; neither is taken for the
    other."""
    model = remote("program_number", static_argnames="scale")
    numbers = [int(model(x(), scale)[1]) for scale in (1, True, 1.0)]
    assert len(set(numbers)) == 3


def test_a_static_minus_zero_is_not_zero(remote: Remote) -> None:
    """-0.0 and 0.0 are equal in Python, but make different programs."""
    product = remote("product", static_argnames="y")
    assert [str((product(torch.ones(()), zero)).item()) for zero in (0.0, -0.0)] == [
        "0.0",
        "-0.0",
    ]


def test_a_static_structure_is_what_its_values_are(remote: Remote) -> None:
    """A shape or a dataclass can be static; those whose values are equal in Python, but differ,
    are not the same."""

    @dataclasses.dataclass(frozen=True)
    class New:
        number: Any

    echo = remote("echo", static_argnames="static")
    assert [int(size) for size in echo(static=x().shape)["kwargs"]["static"]] == [2, 3]
    for number in (1, True, 1.0, 0.0, -0.0):
        made = echo(static=New(number))["kwargs"]["static"]
        assert type(made) is New and str(made.number.item()) == str(number)


class Labelled(Tensor):
    """A tensor class of a user's own, as torchvision and fastai have them."""


@pytest.mark.parametrize("make", [Labelled, nn.Buffer, nn.Parameter])
def test_a_tensor_of_a_subclass_is_a_tensor(
    any_lane: Remote, make: Callable[[Tensor], Tensor]
) -> None:
    """What has memory like any tensor is passed like one, and gets its gradient."""
    x = make(torch.rand(3)).requires_grad_()
    y = any_lane("sine")(x)
    torch.testing.assert_close(y.detach(), 2 * x.detach().as_subclass(Tensor).sin())
    y.sum().backward()
    torch.testing.assert_close(
        x.grad.as_subclass(Tensor), 2 * x.detach().as_subclass(Tensor).cos()
    )


def test_many_small_arrays_at_once(any_lane: Remote) -> None:
    """They share memory of the session, and are apart in all that a user sees: values, types,
    writes in place, gradients, and the end of each."""
    f = any_lane("echo")
    generator = torch.Generator().manual_seed(0)
    tree = {
        str(i): torch.rand(i % 40, generator=generator).to(
            torch.float16 if i % 3 else torch.float32
        )
        for i in range(200)
    }
    tree |= {f"large {i}": torch.rand(1000) for i in range(3)}
    tree |= {f"integers {i}": torch.arange(i, dtype=torch.int32) for i in range(3)}
    for _ in range(2):
        made = f(tree)["args"][0]
        assert_same(made, tree)
        for x in made.values():
            x.mul_(2)
        for name, x in made.items():
            assert_same(x, 2 * tree[name])
        again = f(made)["args"][0]  # from the session's memory
        assert_same(again, made)
        kept = made["5"]
        del made, again, x
        assert_same(kept, 2 * tree["5"])
        assert f.session.stats()["blocks"] <= 2


def test_gradients_of_many_small_arrays(any_lane: Remote) -> None:
    """Only some of them are asked for."""
    tree = [torch.full((3,), float(i), requires_grad=i % 2 == 0) for i in range(100)]
    y = any_lane("echo")(tree, 2.5)["args"][0]
    wanted = [x for x in tree[:50] if x.requires_grad]
    total = sum((i * x).sum() for i, x in enumerate(y))
    gradients = torch.autograd.grad(total, wanted)
    for i, gradient in zip(range(0, 50, 2), gradients, strict=True):
        assert gradient.tolist() == [i] * 3
    y = any_lane("echo")(tree, 2.5)["args"][0]
    sum((i * x).sum() for i, x in enumerate(y)).backward()
    for i, x in enumerate(tree):
        assert (x.grad is None) if i % 2 else x.grad.tolist() == [i] * 3
