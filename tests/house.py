"""Counts over the project's own sources: tokens, words, clauses, sizes of functions."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("bridge_wire", "bridge_client", "bridge_server")
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


def sources(package: str) -> list[Path]:
    """Return the package's modules, without generated ones."""
    return [path for path in sorted((ROOT / package).rglob("*.py")) if path.parent.name != "pb"]


@dataclass(frozen=True, slots=True)
class Code:
    """Tokens, lines that hold one, and the texts of a module."""

    tokens: int
    lines: int
    prose: str


def code(source: str) -> Code:
    """Count tokens as tokenize does, without comments, layout and docstrings."""
    docstrings = {node.lineno: node.end_lineno or 0 for node in _docstrings(ast.parse(source))}
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


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        is_documented = isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        )
        if is_documented and ast.get_docstring(node) is not None:
            yield node.body[0]
