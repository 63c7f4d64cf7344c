"""The models of the runtimes' contract, each made of the array functions that JAX and torch both
have."""

from collections.abc import Callable, Mapping
from typing import Any


def refusing(x: Any) -> Any:
    """Raises for all values."""
    raise LookupError(f"nothing of shape {tuple(x.shape)} here")


class Speechless(Exception):
    """Has no text."""

    def __str__(self) -> str:
        raise LookupError("what was it?")


def speechless(x: Any) -> Any:
    """Raises an exception without a text."""
    raise Speechless


def ending(x: Any) -> Any:
    """Raises SystemExit, which would end a program, or a thread silently."""
    raise SystemExit("enough")


def interrupted(x: Any) -> Any:
    """Raises KeyboardInterrupt, as Ctrl-C does."""
    raise KeyboardInterrupt


def _weighted(np: Any) -> Any:
    params = {"inner": {"b": np.asarray([1.0, 1.0])}, "w": np.asarray([2.0, 3.0])}
    return lambda params, x: params["w"] * x + params["inner"]["b"], params


class Pendulum:
    """An environment: methods, and no call of its own."""

    gravity = 2.0

    class Config:
        """Not a method."""

    @property
    def limit(self) -> float:
        return 1.0

    steps = 0

    def reset(self, x: Any) -> Any:
        """Returns the state to begin with."""
        return x * 0 + 1

    def remembering(self, x: Any) -> Any:
        """Adds to its own attribute, as code without pure functions does."""
        self.steps = self.steps + x
        return self.steps

    def step(self, state: Any, action: Any) -> Any:
        """Returns the next state and the reward."""
        return state + action, self._reward(state * action)

    @staticmethod
    def scaled(x: Any, factor: Any) -> Any:
        return x * factor

    def _reward(self, x: Any) -> Any:
        return x.sum() * self.gravity


MODELS: Mapping[str, Callable[[Any], Any]] = {
    "cubed": lambda np: lambda x: x * x * x,
    "same": lambda np: lambda x: x,
    "product": lambda np: lambda x, number: x * number,
    "transposed": lambda np: lambda x: (x.T, np.broadcast_to(x[0], (3, 4))),
    "nested": lambda np: (
        lambda tree, kind: {
            "kept": [tree["a"] * 2, None],
            "sum": tree["b"][0] + len(kind),
        }
    ),
    "refusing": lambda np: refusing,
    "speechless": lambda np: speechless,
    "ending": lambda np: ending,
    "interrupted": lambda np: interrupted,
    "dotted": lambda np: lambda x, y: np.stack([(x * y).sum(), y[0]]),
    "holomorphic": lambda np: lambda z: (z * z, np.conj(z)),
    "indexed": lambda np: lambda x, i: (x * i, i),
    "various": lambda np: lambda x, y: (x * x * y, x.argmax(), y + 0, x * 0 + 1),
    "exp": lambda np: lambda x: np.exp(x),
    "weighted": _weighted,
    "pendulum": lambda np: Pendulum(),
    "step": lambda np: Pendulum().step,
}
