"""What jax is told of a run: that it may fail, and nothing else.

jax calls compiled code that it takes for pure without any Python in between, and an error then
comes out as a ValueError of mere text. Code with an effect is called from Python, where errors have
types (bridge_client.jax.errors). That costs 45 us per call of the compiled code (measured 2026-11,
2 cores), however many runs are in it.

In every other way a run is pure: it may be left out, repeated, and moved. So each of jax's lists of
what an effect forbids gets to know this one as harmless.
"""

from typing import Any

MAY_FAIL: frozenset[Any] = frozenset()

try:
    from jax._src import effects
    from jax._src.interpreters.partial_eval import dceable_effects
except ImportError:  # then errors are texts, and calls faster
    pass
else:

    class MayFail(effects.Effect):
        """A run may raise."""

        def __str__(self) -> str:
            return "MayFail"

    for harmless in (
        effects.lowerable_effects,
        effects.control_flow_allowed_effects,
        effects.custom_derivatives_allowed_effects,
        effects.remat_allowed_effects,
        dceable_effects,
    ):
        harmless.add_type(MayFail)
    MAY_FAIL = frozenset([MayFail()])
