"""The effect of a run: it may fail.

jax calls compiled code without effects directly, with no Python in between, and an error then
becomes a ValueError that is only text. Code with an effect is called from Python, where errors have
types (bridge_client.jax.errors). That costs 45 us per call of the compiled code (measured 2026-11,
2 cores), however many runs the code contains.

Apart from that a run is pure: jax may leave it out, repeat it, and move it. So this effect is
registered as harmless in each of jax's lists of forbidden effects.
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
        """The effect: a run may raise."""

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
