"""The JAX side of the Lotka-Volterra example: a diffrax solver, served with `--x64`."""

from typing import Any

import diffrax
import jax.numpy as jnp
from jax import Array


def populations(rates: Array, start: Array, years: Array) -> Array:
    """Return the hares and lynxes in each year, as an array of shape (years, 2).

    `rates` are alpha, beta, gamma and delta; `start` holds both populations in the first year.
    """

    def change(_: Any, population: Array, rates: Array) -> Array:
        hares, lynxes = population
        alpha, beta, gamma, delta = rates
        return jnp.stack(
            [(alpha - beta * lynxes) * hares, (delta * hares - gamma) * lynxes]
        )

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(change),
        diffrax.Tsit5(),
        t0=years[0],
        t1=years[-1],
        dt0=None,
        y0=start,
        args=rates,
        saveat=diffrax.SaveAt(ts=years),
        stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-8),
    )
    return solution.ys
