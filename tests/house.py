"""Counts over the project's own sources: tokens, words, clauses, functions, rooms and errors."""

import ast
import functools
import graphlib
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge_wire import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bridge_wire", "bridge_client", "bridge_server")
# Not rooms: the package itself, its command's start, and generated code.
_NO_ROOMS = ("__init__", "__main__", "pb")
_CLAUSE = re.compile(r"\b(?:what|who|whoever|whatever)\b", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
# Turns of phrase that point at a thing instead of naming it.
_INDIRECT = re.compile(
    r"\b(?:what|who|whoever|whatever)\b"
    r"|\bas (?:no|one) .*\b(?:has|have|do|does|is|are)\b"
    r"|\bwas to come\b|\bforetold\b|\bby another way than\b|\bnobody|\bsave where\b"
    r"|\bhas come\b|\bwent away\b|\bis none\b|\bthat is not there\b|\bof its own\b",
    re.IGNORECASE,
)


def sources(package: str) -> list[Path]:
    """Return the package's modules, without generated ones."""
    return [
        path
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.parent.name != "pb"
    ]


# Tokens and words ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Code:
    """A module's tokens, lines that hold one, and prose."""

    tokens: int
    lines: int
    prose: str


def code(source: str) -> Code:
    """Count tokens as tokenize does, without comments, layout and docstrings."""
    docstrings = {
        node.lineno: node.end_lineno or 0 for node in _docstrings(ast.parse(source))
    }
    tokens, lines, prose = 0, set[int](), list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row = token.start[0]
        if token.type == tokenize.COMMENT:
            prose.append(token.string.lstrip("# "))
        elif token.type == tokenize.STRING and docstrings.get(row) == token.end[0]:
            prose.append(token.string.strip('r"'))
        elif token.type not in _LAYOUT:
            tokens += 1
            lines.update(range(row, token.end[0] + 1))
    return Code(tokens, len(lines), "\n".join(prose))


@functools.cache
def package_code(package: str) -> Code:
    """Return the sums over a package's modules, and all of its prose."""
    modules = [code(path.read_text()) for path in sources(package)]
    return Code(
        sum(module.tokens for module in modules),
        sum(module.lines for module in modules),
        "\n".join(module.prose for module in modules),
    )


def clauses_per_1000_words(text: str) -> float:
    """Return how often a text points at things by *what* and *who*, outside of code spans."""
    plain = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return 1000 * len(_CLAUSE.findall(plain)) / max(1, len(_WORD.findall(plain)))


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield each function with the number of lines of its body, without its docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            yield f"{node.name}:{node.lineno}", lines


def _docstrings(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        is_documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if is_documented and ast.get_docstring(node) is not None:
            yield node.body[0]


# Rooms --------------------------------------------------------------------------------------------


def rooms(folder: Path) -> dict[str, set[str]]:
    """Return the modules and packages at the top of a package, each with those it imports.

    An import for annotations or within a function counts like any other.
    """
    names = [path.stem for path in folder.glob("*.py")]
    names += [path.parent.name for path in folder.glob("*/__init__.py")]
    drawn: dict[str, set[str]] = {
        name: set() for name in names if name not in _NO_ROOMS
    }
    for path in folder.rglob("*.py"):
        room = path.relative_to(folder).with_suffix("").parts[0]
        if room in drawn:
            drawn[room] |= _imported_rooms(path, folder.name) & (drawn.keys() - {room})
    return drawn


def floors(drawn: Mapping[str, set[str]]) -> int:
    """Return the number of rooms on the longest way down.

    Raises:
      graphlib.CycleError: there is a circle.
    """
    heights: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(drawn).static_order():
        heights[room] = 1 + max((heights[below] for below in drawn[room]), default=0)
    return max(heights.values())


def upward(drawn: Mapping[str, set[str]], order: list[str]) -> set[tuple[str, str]]:
    """Return the arrows to a room that stands higher in the order, which is top to bottom."""
    return {
        (room, imported)
        for room, below in drawn.items()
        for imported in below
        if order.index(imported) < order.index(room)
    }


def _imported_rooms(path: Path, package: str) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    paths = (module.split(".") for module in modules)
    return {parts[1] for parts in paths if parts[0] == package and len(parts) > 1}


# Errors -------------------------------------------------------------------------------------------

ERRORS = {
    name
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.BridgeError)
}


@dataclass(frozen=True, slots=True)
class Raised:
    """A `raise` of one of the bridge's errors, with the literal parts of its text.

    None: the text is made elsewhere, and cannot be told from the source.
    """

    place: str
    text: str | None

    def is_empty(self) -> bool:
        return self.text is not None and not self.text.strip()

    def is_indirect(self) -> bool:
        """Return whether the text points at a thing by its part in the story, not by its name."""
        return self.text is not None and bool(_INDIRECT.search(self.text))


def raised(source: str, name: str = "") -> Iterator[Raised]:
    """Yield every raise of a class of bridge_wire.errors; "{}" stands for a value."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        call = node.exc
        made = call.func if isinstance(call, ast.Call) else call
        if _last_name(made) in ERRORS:
            arguments = call.args if isinstance(call, ast.Call) else []
            text = _text_of(arguments[0]) if arguments else ""
            yield Raised(f"{name}:{node.lineno}", text)


def _last_name(node: ast.expr) -> str:
    return ast.unparse(node).rsplit(".", 1)[-1]


def _text_of(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text_of(part) or "{}" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return f"{_text_of(left) or '{}'}{_text_of(right) or '{}'}"
    return None
