"""JAX's primitive harnesses with JAX's own answers. Imports jax, never torch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.internal_test_util import test_harnesses

from exact import graphs
from exact.cases import Entry, seed_of
from exact.compare import Refusal, attempt

Leaves = list[np.ndarray]


class Unusable(Exception):
    """A harness that no torch program can call; the message has the reason."""


@functools.cache
def harnesses() -> dict[str, Any]:
    # Sorted, since some harnesses come from sets, whose order varies between processes.
    return {
        h.fullname: h
        for h in sorted(test_harnesses.all_harnesses, key=lambda h: h.fullname)
    }


def entries() -> Iterator[Entry]:
    for name, harness in harnesses().items():
        yield Entry("jax", name, np.dtype(harness.dtype).name, "harness")


@dataclass
class Case:
    """A harness's inputs and, by name of the check, JAX's answer or Refusal.

    wrt: positions of the differentiated inputs.
    outputs: positions of the differentiated results.
    """

    function: Callable[..., Any]
    inputs: Leaves
    batch: Leaves
    wrt: list[int]
    outputs: list[int]
    weights: Leaves
    tangents: Leaves
    answers: dict[str, Any]


def case_of(entry: Entry) -> Case:
    """Return a harness or a random program with JAX's own answers.

    Raises:
      Unusable: an argument is not an array.
    """
    if entry.database == "graph":
        graph = graphs.graph_of(entry)
        return _answered(
            graph.function(),
            graph.inputs(entry.seed),
            graph.inputs(entry.seed + 1),
            entry.seed,
        )
    harness = harnesses()[entry.name]
    seed = seed_of(entry.name)
    one, two = (harness.dyn_args_maker(np.random.RandomState(seed + i)) for i in (0, 1))
    if any(not isinstance(x, np.ndarray) for x in one):
        raise Unusable("an argument is no array")

    def function(*args: Any) -> Any:
        return harness.dyn_fun(*args)

    return _answered(function, list(one), list(two), seed)


def _answered(
    function: Callable[..., Any], one: Leaves, two: Leaves, seed: int
) -> Case:
    alike = all(
        a.shape == b.shape and a.dtype == b.dtype for a, b in zip(one, two, strict=True)
    )
    batch = [np.stack([a, b if alike else a]) for a, b in zip(one, two, strict=True)]
    case = Case(function, one, batch, [], [], [], [], {})
    case.answers["value"] = value = attempt(lambda: _leaves(jax.jit(function)(*one)))
    if one:
        case.answers["vmap"] = attempt(
            lambda: _leaves(jax.jit(jax.vmap(function))(*batch))
        )
    if not isinstance(value, Refusal):
        case.wrt = [
            i for i, x in enumerate(one) if jnp.issubdtype(x.dtype, jnp.inexact)
        ]
        case.outputs = [
            i for i, y in enumerate(value) if jnp.issubdtype(y.dtype, jnp.inexact)
        ]
        if case.wrt and case.outputs:
            _differentiate(case, value, np.random.RandomState(seed ^ 1))
    return case


def _differentiate(case: Case, value: Leaves, rng: np.random.RandomState) -> None:
    case.weights = weights = [_noise(rng, value[i]) for i in case.outputs]
    case.tangents = tangents = [_noise(rng, case.inputs[i]) for i in case.wrt]
    positions = tuple(range(len(case.wrt)))

    # Torch's data are data here too, since XLA folds constants with another rounding.
    def restricted(args: Sequence[Any]) -> tuple[Callable[..., Any], list[Any]]:
        """Return a function of the differentiated inputs, and these inputs.

        The function returns the inexact results and all results.
        """

        def function(*xs: Any) -> tuple[list[Any], list[Any]]:
            filled = list(args)
            for i, x in zip(case.wrt, xs, strict=True):
                filled[i] = x
            ys = jax.tree.leaves(case.function(*filled))
            return [ys[i] for i in case.outputs], ys

        return function, [args[i] for i in case.wrt]

    def forward(args: Sequence[Any]) -> Any:
        function, xs = restricted(args)
        _, pullback, ys = jax.vjp(function, *xs, has_aux=True)
        return ys, pullback

    def gradient() -> Leaves:
        # In two programs, as in training: XLA rounds some derivatives differently in one program.
        _, pullback = jax.jit(forward)(case.inputs)
        found = jax.jit(lambda pullback, cts: pullback(cts))(
            pullback, list(map(np.conj, weights))
        )
        return [np.conj(g) for g in _leaves(found)]  # torch's convention

    def jvp(args: Sequence[Any], tangents: Sequence[Any]) -> Any:
        function, xs = restricted(args)
        return jax.jvp(lambda *xs: function(*xs)[0], xs, list(tangents))[1]

    def hvp(
        args: Sequence[Any], weights: Sequence[Any], tangents: Sequence[Any]
    ) -> Any:
        function, xs = restricted(args)

        def total(*xs: Any) -> Any:
            ys, _ = function(*xs)
            return sum(
                jnp.sum(jnp.real(jnp.conj(w) * y))
                for w, y in zip(weights, ys, strict=True)
            )

        return jax.jvp(jax.grad(total, positions), xs, list(tangents))[1]

    case.answers["gradient"] = attempt(gradient)
    case.answers["jvp"] = attempt(lambda: _leaves(jax.jit(jvp)(case.inputs, tangents)))
    if all(
        jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
        for x in (case.inputs[i] for i in case.wrt)
    ):
        case.answers["hvp"] = attempt(
            lambda: _leaves(jax.jit(hvp)(case.inputs, weights, tangents))
        )


def _leaves(tree: Any) -> Leaves:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def _noise(rng: np.random.RandomState, like: np.ndarray) -> np.ndarray:
    z = rng.standard_normal(like.shape)
    if np.issubdtype(like.dtype, np.complexfloating):
        return np.asarray(z + 1j * rng.standard_normal(like.shape)).astype(like.dtype)
    return np.asarray(z).astype(like.dtype)
