"""Sources of models: written to a private file for a worker, and taken from functions.

A source travels as text, never pickled. Runs no source.
"""

import ast
import builtins
import contextlib
import inspect
import io
import os
import shutil
import symtable
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from bridge_wire.errors import CallerError

_MOST_NAMED = 40  # characters of a model's name in its file's
_HINT = "; or pass spawn(source=...) the text of a module"


class SourceFile:
    """A model's source in a directory of mode 0700, for as long as its worker is wanted."""

    def __init__(self, source: str, name: str) -> None:
        """Write the source.

        Raises:
          CallerError: the source is no text, or the name no identifier.
        """
        if not isinstance(source, str) or not isinstance(name, str):
            raise CallerError(
                f"source= is a {type(source).__qualname__}; expected the text of a module, and the"
                " name of its model in name="
            )
        if not name.isidentifier():
            raise CallerError(
                f"name={name!r}; expected the name of a function or model in source="
            )
        # As it is: lone surrogates of a notebook's cell are an error of the worker's.
        encoded = source.encode("utf-8", "surrogatepass")
        _refuse_other_encodings(encoded)
        self._owner = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="bridge-source-")
        # No name of a package, since the worker has this directory first on its path.
        path = os.path.join(self._folder, f"bridge_source_{name[:_MOST_NAMED]}.py")
        self.target = f"{path}:{name}"
        try:
            with open(path, "wb") as file:
                file.write(encoded)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the file. Idempotent; does nothing in a forked child."""
        if os.getpid() == self._owner:
            shutil.rmtree(self._folder, ignore_errors=True)


def _refuse_other_encodings(encoded: bytes) -> None:
    try:
        declared, _ = tokenize.detect_encoding(io.BytesIO(encoded).readline)
    except SyntaxError:  # no UTF-8, or no encoding: the worker's import says which
        return
    if declared not in ("utf-8", "utf-8-sig"):
        raise CallerError(
            f"source= declares the encoding {declared}, but is a text already; leave the"
            " declaration out"
        )


def source_of(function: Callable[..., Any]) -> str:
    """Return the source of a module with this function only, on the lines of its own file.

    Raises:
      CallerError: the function uses names from outside, has another decorator, a default that is no
        literal, or no source.
    """
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, FunctionType) or not function.__name__.isidentifier():
        raise CallerError(
            f"{name} is a {type(function).__qualname__}; expected a function with a name"
        )
    try:
        # Of the code: that of the function follows __wrapped__ to another one.
        lines, first = inspect.getsourcelines(function.__code__)
    except (OSError, TypeError) as error:
        raise CallerError(
            f"the source of {name} cannot be read ({error}); define it in a file or a"
            f" notebook's cell{_HINT}"
        ) from error
    is_indented = lines[0][:1].isspace()
    # Not dedented, since that changes the texts of several lines in the function.
    wrapper = ["if True:\n"] if is_indented else []
    try:
        tree = ast.parse("".join([*wrapper, *lines]))
        (statement,) = tree.body
    except (SyntaxError, ValueError) as error:
        raise CallerError(
            f"the source of {name} is not one whole function ({error}){_HINT}"
        ) from error
    definition = statement.body[0] if isinstance(statement, ast.If) else statement
    if not isinstance(definition, ast.FunctionDef):
        raise CallerError(f"{name} is not defined by `def`{_HINT}")
    if definition.name != function.__name__:
        raise CallerError(
            f"{name} is defined as {definition.name}; expected a function under its own name, not"
            " renamed or wrapped by another decorator"
        )
    _check(definition, function)
    begin = definition.lineno - 1 - len(wrapper)
    head = ["from __future__ import annotations\n"]
    blank = ["\n"] * (first + begin - 2 - len(wrapper))
    return "".join([*head, *blank, *wrapper, *lines[begin:]])


def _check(definition: ast.FunctionDef, function: FunctionType) -> None:
    """Raise CallerError unless a function's definition stands alone."""
    name = function.__qualname__
    if free := function.__code__.co_freevars:
        raise CallerError(
            f"{name} closes over {', '.join(free)}, which a worker does not have; pass them as"
            " arguments, or define them in the function"
        )
    if len(definition.decorator_list) > 1:
        others = ", ".join(f"@{ast.unparse(x)}" for x in definition.decorator_list)
        raise CallerError(
            f"{name} has several decorators, {others}; expected only the one of remote: apply the"
            " others in the function"
        )
    for default in _defaults(definition.args):
        with contextlib.suppress(ValueError):
            ast.literal_eval(default)
            continue
        raise CallerError(
            f"{name} has the default {ast.unparse(default)}; expected a literal, such as 1.0 or"
            " None"
        )
    here = {*dir(builtins), definition.name}
    shadowed = {x for x in function.__globals__ if not x.startswith("__")}
    shadowed.discard(definition.name)
    if names := sorted({*_globals_of(definition)} - (here - shadowed)):
        raise CallerError(
            f"{name} uses {', '.join(names)} of its module, which a worker does not have; import or"
            " define them in the function"
        )


def _defaults(arguments: ast.arguments) -> list[ast.expr]:
    of_keywords = [each for each in arguments.kw_defaults if each is not None]
    return [*arguments.defaults, *of_keywords]


class _WithoutAnnotations(ast.NodeTransformer):
    """Removes annotations, which the worker does not evaluate, and decorators."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node


def _globals_of(definition: ast.FunctionDef) -> Iterator[str]:
    """Yield the names that a function looks up in its module."""
    copied = ast.parse(ast.unparse(definition)).body[0]
    assert isinstance(copied, ast.FunctionDef)
    copied.decorator_list = []
    stripped = ast.fix_missing_locations(_WithoutAnnotations().visit(copied))
    pending = symtable.symtable(
        ast.unparse(stripped), "<remote>", "exec"
    ).get_children()
    while pending:
        table = pending.pop()
        pending += table.get_children()
        for symbol in table.get_symbols():
            if symbol.is_global():
                yield symbol.get_name()
