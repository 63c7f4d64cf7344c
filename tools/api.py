#!/usr/bin/env python3
"""Generator of docs/api.txt, the public names and signatures; --check compares the file only.

It reads the sources and imports none of them. Lines that are removed or changed break programs of
users, and belong into CHANGELOG.md.

    tools/api.py [--check]
"""

import argparse
import ast
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = ROOT / "docs" / "api.txt"
PACKAGES = (
    "bridge_client",
    "bridge_client.inproc",
    "bridge_client.jax",
    "bridge_client.numpy",
    "bridge_client.torch",
)
# Modules whose public classes are all public.
MODULES = ("bridge_wire.errors",)
# Classes of results, which users do not import.
RESULTS = (("bridge_client.remote.session", "RemoteSession"),)
# Types of the project's own modules: their functions are not for users.
_INTERNAL = re.compile(
    r"\b(?:pb\.|(?:Program|Placed|Block|Pool|GpuPool|Terms|WorkerSource|Run)\b)"
)
_SPECIAL = ("__init__", "__call__", "__enter__", "__exit__")

Definition = ast.ClassDef | ast.FunctionDef


def dump(root: Path = ROOT) -> str:
    """Return the public names and signatures of the sources in a folder, one a line."""
    lines: list[str] = []
    for package in PACKAGES:
        for name in _exported(_parsed(root, package)):
            node = _definition(root, package, name)
            lines += _lines(f"{package}.{name}", node)
    for module in MODULES:
        for each in _parsed(root, module).body:
            if isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
                lines += _lines(f"{module}.{each.name}", each)
    for module, name in RESULTS:
        lines += _lines(f"{module}.{name}", _definition(root, module, name))
    return "".join(f"{line}\n" for line in lines)


def breaks(before: str, after: str) -> list[str]:
    """Return the lines of a dump that a later dump lacks."""
    return [line for line in before.splitlines() if line not in after.splitlines()]


def _parsed(root: Path, module: str) -> ast.Module:
    path = root.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_bytes())


def _exported(tree: ast.Module) -> list[str]:
    """Return the names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    raise ValueError("a public package has no __all__")


def _definition(root: Path, module: str, name: str) -> Definition | None:
    """Return the definition of a name, also if the module imports it; None for a value."""
    for node in _parsed(root, module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module:
            for each in node.names:
                if (each.asname or each.name) == name:
                    return _definition(root, node.module, each.name)
    return None


def _lines(name: str, node: Definition | None) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef):
        yield f"{name}{_signature(node)}"
    elif node is None:
        yield name
    else:
        yield f"class {name}({', '.join(map(ast.unparse, node.bases))})"
        for member in sorted(_members(node)):
            if not _INTERNAL.search(member):
                yield f"{name}.{member}"


def _members(node: ast.ClassDef) -> Iterator[str]:
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and _is_public(each.name):
            decorators = [ast.unparse(line) for line in each.decorator_list]
            is_property = any("property" in line for line in decorators)
            if is_property:
                yield f"{each.name}: {ast.unparse(each.returns or ast.Name('Any'))}"
            elif not any(line.endswith(".setter") for line in decorators):
                yield f"{each.name}{_signature(each)}"
        elif isinstance(each, ast.AnnAssign) and _is_public(ast.unparse(each.target)):
            yield f"{ast.unparse(each.target)}: {ast.unparse(each.annotation)}"


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name in _SPECIAL


def _signature(node: ast.FunctionDef) -> str:
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){result}"


def main() -> int:
    """Write the file, or compare it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/api.txt.")
    parser.add_argument("--check", action="store_true", help="compare the file only")
    is_check = parser.parse_args().check
    before = SNAPSHOT.read_text() if SNAPSHOT.exists() else ""
    after = dump()
    if not is_check:
        SNAPSHOT.write_text(after)
    elif before != after:
        for line in difflib.unified_diff(
            before.splitlines(), after.splitlines(), "docs/api.txt", "sources", n=0
        ):
            print(line)
        broken = breaks(before, after)
        print(
            f"tools/api.py: the public names differ from docs/api.txt, and {len(broken)} lines of"
            " it are gone; run `tools/api.py`, and tell users of changes in CHANGELOG.md",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
