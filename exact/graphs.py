"""Random small programs as Python source, determined by a seed and a number.

Imports no framework; a loaded program does.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exact import grammar
from exact.cases import Entry
from exact.grammar import Rule, Shape

_INPUTS: Sequence[Sequence[Shape]] = [
    ((3, 4), (4,)),
    ((4, 4), (4, 4)),
    ((5,), ()),
    ((3, 3), (1, 3)),
    ((2, 3, 2), (2,)),
]
_HEADERS = {
    "torch": "import torch\nimport torch.nn.functional as F\n",
    "jax": "import jax\nimport jax.numpy as jnp\n",
}
_RULES = {"torch": grammar.TORCH, "jax": grammar.JAX}
_MAX_SIZE = 200


@dataclass(frozen=True)
class Graph:
    """A program, whose source defines `f`, a function of arrays with these shapes."""

    source: str
    shapes: Sequence[Shape]
    needs_key: bool

    def function(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {}
        exec(compile(self.source, "<graph>", "exec"), scope)
        return scope["f"]

    def inputs(self, seed: int) -> list[np.ndarray]:
        rng = np.random.RandomState(seed % 2**32)
        return [
            np.asarray(rng.standard_normal(shape), np.float32) for shape in self.shapes
        ]


def entry(framework: str, seed: int, number: int) -> Entry:
    return Entry("graph", f"{seed}.{number}", "float32", framework)


def graph_of(entry: Entry) -> Graph:
    return graph(entry.kind, *map(int, entry.name.split(".")))


@functools.lru_cache(maxsize=8)
def graph(framework: str, seed: int, number: int) -> Graph:
    """Return a program of three to ten statements."""
    rng = random.Random(f"{framework}/{seed}/{number}")
    shapes: dict[str, Shape] = dict(zip("xy", rng.choice(_INPUTS), strict=True))
    inputs = list(shapes.values())
    lines: list[str] = []
    needs_key = False
    for count in range(rng.randint(3, 10)):
        name = f"v{count}"
        rule, operands, shape = _step(rng, _RULES[framework], shapes)
        text = rule.text.format(out=name, **dict(zip("ab", operands, strict=False)))
        lines += text.split("\n")
        shapes[name] = shape
        needs_key |= rule.needs_key
    results = _results(rng, [name for name in shapes if name.startswith("v")])
    body = "".join(f"    {line}\n" for line in [*lines, f"return {results}"])
    return Graph(f"{_HEADERS[framework]}\n\ndef f(x, y):\n{body}", inputs, needs_key)


def _step(
    rng: random.Random, rules: Sequence[Rule], shapes: dict[str, Shape]
) -> tuple[Rule, tuple[str, ...], Shape]:
    """Sample a rule and matching operands, with a preference for recent values."""
    names = list(shapes)
    while True:
        rule = rng.choice(rules)
        operands = tuple(
            rng.choice(names[-2:] if rng.random() < 0.8 else names)
            for _ in range(rule.arity)
        )
        shape = rule.shape(*(shapes[name] for name in operands))
        if shape is not None and grammar.flat(shape)[0] <= _MAX_SIZE:
            return rule, operands, shape


def _results(rng: random.Random, names: Sequence[str]) -> str:
    last, other = names[-1], rng.choice(names)
    return rng.choice([last, f"({last}, {other})", f"{{'a': {last}, 'b': [{other}]}}"])
