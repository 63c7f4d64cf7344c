"""Child process that runs cases and may crash: entries on stdin, results as JSON lines on stdout.

Each output line is {"at": [sample, check]} before a step, {"case": ..., "checks": ...} after a
sample, or {"done": entry}.
"""

import argparse
import functools
import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from exact.cases import Entry, chosen_samples, parse_entry

Say = Callable[[dict[str, Any]], None]
# Each case compiles up to ten programs, and both sides of a comparison are compiled alike, so XLA's
# quick ways suffice.
_QUICK_COMPILATION = "--xla_cpu_use_fusion_emitters=false"


def main() -> None:
    parser = argparse.ArgumentParser("exact.child")
    parser.add_argument("--way", required=True)
    parser.add_argument("--x64", action="store_true")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--checks", default="")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the databases' own prints go to stderr

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_X64"] = str(int(options.x64))
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK_COMPILATION}"
    warnings.simplefilter("ignore")
    runner = _jax_runner() if options.way == "torch-client" else _torch_runner(options)
    say({"ready": True})
    for line in sys.stdin:
        text, skip = line.rsplit(" ", 1)
        runner(parse_entry(text), int(skip), say)
        say({"done": text})


def _torch_runner(options: Any) -> Callable[[Entry, int, Say], None]:
    import jax
    import torch

    from exact import subjects, ways
    from exact.torch_checks import CHECKS, Checks
    from exact.torch_reference import quiet

    torch.set_num_threads(1)
    way = ways.open_way(options.way, _module_names(options), x64=options.x64)
    wanted = options.checks.split(",") if options.checks else CHECKS
    counter = iter(range(1 << 60))

    def run(entry: Entry, skip: int, say: Say) -> None:
        say({"at": [0, "samples"]})
        count = subjects.count(entry)
        for position, index in enumerate(
            chosen_samples(count, options.samples, entry.seed)
        ):
            if position < skip:
                continue
            say({"at": [position, "reference"], "index": index})
            begun = time.monotonic()
            with quiet():
                record = _checked(
                    functools.partial(Checks, entry, index, way), wanted, position, say
                )
            say(
                {
                    "case": f"{entry}/{index}",
                    **record,
                    "seconds": round(time.monotonic() - begun, 2),
                }
            )
        if next(counter) % 50 == 49:
            jax.clear_caches()
            gc.collect()

    return run


def _checked(
    make: Callable[[], Any], wanted: Any, position: int, say: Say
) -> dict[str, Any]:
    from exact.torch_db import Unusable

    try:
        checks = make()
    except Unusable as error:
        return {"unusable": str(error)}
    except Exception as error:
        return {
            "unusable": f"torch cannot make the sample: {type(error).__name__}: {str(error)[:150]}"
        }
    verdicts: dict[str, list[str]] = {}
    for name, check in checks.run():
        if name in wanted:
            say({"at": [position, name], "so far": verdicts})
            verdict = check()
            verdicts[name] = [verdict.status, verdict.detail]
    return {
        "checks": verdicts,
        "random": checks.is_random,
        "undefined": checks.is_undefined,
    }


def _module_names(options: Any) -> list[str]:
    from exact import subjects, torch_db, ways

    if options.way != "worker":
        return []

    def names() -> Iterator[str]:
        dtypes = ["float64", "complex128"] if options.x64 else ["float32", "complex64"]
        for entry in torch_db.entries("module", dtypes):
            try:
                for index in chosen_samples(
                    len(torch_db.samples(entry)), options.samples, entry.seed
                ):
                    # Fails for a lazy module, which has no parameters yet.
                    torch_db.as_function(subjects.subject(entry, index).target)
                    yield ways.module_name(entry, index)
            except Exception:
                continue

    return list(names())


def _jax_runner() -> Callable[[Entry, int, Say], None]:
    from exact import jax_checks

    return jax_checks.run


if __name__ == "__main__":
    main()
