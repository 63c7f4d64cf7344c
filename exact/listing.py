"""Script that prints the entries of a way's databases, one per line."""

import sys

from exact.cases import Entry


def entries(way: str, dtypes: list[str]) -> list[Entry]:
    if way == "torch-client":
        from exact import jax_db

        return list(jax_db.entries())
    from exact import torch_db

    return [*torch_db.entries("op", dtypes), *torch_db.entries("module", dtypes)]


if __name__ == "__main__":
    way, dtypes, kinds = sys.argv[1:]
    for entry in entries(way, dtypes.split(",")):
        if entry.kind in kinds.split(","):
            print(entry)
