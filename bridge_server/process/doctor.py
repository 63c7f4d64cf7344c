"""`bridge_server doctor`: looks at the host and the environment in which a worker would run.

Imports no framework.
"""

import argparse
from collections.abc import Iterator, Sequence

from bridge_server.process import endpoints, malloc
from bridge_wire.doctor import gpu_checks, host
from bridge_wire.doctor.checks import BROKEN, Check, as_json, as_table, broken, ok, slow, worst
from bridge_wire.errors import CallerError


def main(argv: Sequence[str]) -> int:
    """Print the checks. Returns the exit status: 0; 1 where something is broken."""
    parser = argparse.ArgumentParser(
        "bridge_server doctor",
        description="Look at the host and the environment in which a worker would run.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(argv)
    malloc.restart_with_a_good_allocator()  # as a worker does
    checks = [*host.checks(), *gpu_checks.checks(), *_checks()]
    print(as_json(checks) if options.json else as_table(checks))
    return 1 if worst(checks) == BROKEN else 0


def _checks() -> Iterator[Check]:
    if host.installed("jax") or host.installed("torch"):
        yield ok("models", "can be served")
    else:
        yield broken(
            "models",
            "neither jax nor torch is installed",
            "install torch-jax-bridge[jax] or [torch] here",
        )
    allocator = malloc.chosen()
    if allocator == "system":
        yield slow(
            "allocator",
            "the system's",
            "unset BRIDGE_ALLOCATOR on glibc; elsewhere preload jemalloc",
        )
    else:
        yield ok("allocator", allocator)
    try:
        yield ok("endpoint", f"{endpoints.parse(None).address}, unless told by --listen")
    except (CallerError, OSError) as error:
        yield broken(
            "endpoint",
            str(error),
            "start workers with --listen unix:PATH in a directory of mode 0700",
        )
