"""The public methods of an object, and bound methods: no framework is imported."""

import functools
import json
from dataclasses import dataclass
from typing import Any

import pytest

from bridge_server.runtime import Method
from bridge_server.signatures import bound_method, methods_of


class Base:
    """Stands for a framework's base class."""

    def apply(self, x: Any) -> Any:
        return x

    def train(self) -> None: ...


class Own(Base):
    """A user's class with every kind of attribute."""

    constant = 3

    class Nested:
        pass

    def encode(self, x: Any, *, scale: float = 1.0) -> Any:
        return x * scale

    def train(self) -> None: ...

    def _private(self) -> None: ...

    def __len__(self) -> int:
        return 1

    @property
    def size(self) -> int:
        raise RuntimeError("never read")

    @functools.cached_property
    def cached(self) -> int:
        raise RuntimeError("never read")

    @staticmethod
    def static(x: Any) -> Any:
        return x

    @classmethod
    def made(cls, x: Any) -> Any:
        return x


def test_public_methods_are_those_of_the_users_classes() -> None:
    """Functions of a class without an underscore are methods, and names of the base are not."""
    own = Own()
    own.handler = print
    assert methods_of(own, Base) == {
        "encode": Method("encode", ("x",), "(x, *, scale=1.0)"),
        "made": Method("made", ("x",), "(x)"),
        "static": Method("static", ("x",), "(x)"),
    }


def test_methods_of_installed_classes_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of Python, an installed package or a framework adds no methods, wherever its file
    is; the user's subclass does."""

    class Decoder(json.JSONDecoder):
        def encode(self, x: Any) -> Any:
            return x

    assert list(methods_of(Decoder())) == ["encode"]
    assert not methods_of(json.JSONDecoder())
    for module in ("json", "pytest", "torch.nn.mine", "flax.mine", "no_such_module"):
        monkeypatch.setattr(Decoder, "__module__", module)
        assert not methods_of(Decoder())


def test_methods_of_a_notebook_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class of `__main__` is the user's, also where no file defines it."""
    monkeypatch.setattr(Own, "__module__", "__main__")
    assert "encode" in methods_of(Own())


def test_fields_are_no_methods() -> None:
    """A function as the default of a dataclass's field is data."""

    @dataclass
    class Layer:
        activation: Any = lambda x: x

        def __call__(self, x: Any) -> Any:
            return self.activation(x)

    assert methods_of(Layer()) == {"__call__": Method("", ("x",), "(x)")}


def test_bound_methods_have_their_object() -> None:
    """A method of Python, and a partial of one, are found with their object and name; methods of
    the base class and other callables are not."""
    own = Own()
    assert bound_method(own.encode, [Base]) == (own, "encode")
    assert bound_method(functools.partial(Own.encode, own), [Base]) == (own, "encode")
    others = [
        own.apply,
        own.train,
        Own.made,
        functools.partial(Own.encode, own, scale=2.0),
        functools.partial(len, own),
        own,
        print,
        3,
    ]
    assert not [each for each in others if bound_method(each, [Base, ()]) is not None]
    assert bound_method(json.JSONDecoder().decode, [Base]) is None
