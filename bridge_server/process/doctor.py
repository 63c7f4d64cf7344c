"""`bridge_server doctor`: checks the machine and the environment that a worker would run in.

Imports no framework.
"""

from collections.abc import Iterator, Sequence

from bridge_server.process import compiled, endpoints, malloc
from bridge_wire.commands import Parser
from bridge_wire.doctor import gpu_checks, host
from bridge_wire.doctor.checks import (
    BROKEN,
    Check,
    as_json,
    as_table,
    broken,
    ok,
    slow,
    worst,
)
from bridge_wire.errors import CallerError


def main(argv: Sequence[str]) -> int:
    """Print the checks. Return the exit status: 1 if a check is broken, else 0."""
    parser = Parser(
        "bridge_server doctor",
        description="Check the machine and the environment that a worker would run in.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(argv)
    malloc.restart_with_a_good_allocator()  # like a worker
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
    yield ok("compilation cache", compiled.described())
    try:
        yield ok(
            "endpoint", f"{endpoints.parse(None).address}, the default of --listen"
        )
    except (CallerError, OSError) as error:
        yield broken(
            "endpoint",
            str(error),
            "start workers with --listen unix:PATH in a directory of mode 0700",
        )
