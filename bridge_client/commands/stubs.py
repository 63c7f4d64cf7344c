"""The command `bridge_client stubs`: a worker's models as types for editors and type checkers.

A worker's description is data: only identifiers, literals and quoted strings of it reach the file.
"""

import ast
import hashlib
import inspect
import keyword
import os
import re
import secrets
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from bridge_client.commands.notebook import CLASSES, COUNTERPART
from bridge_client.session import ModelInfo
from bridge_wire.errors import CallerError

CLIENTS = tuple(CLASSES)
_MARK = b"# Written by `bridge_client stubs`; SHA-256 of the lines below: "
_SUFFIX = ".pyi"
_INDENT = "    "
_LONGEST_NAME = 80
_LONGEST_DOC = 10_000
_LONGEST_SIGNATURE = 1 << 14
_MOST_PARAMETERS = 20
_CALL = "__call__"
_ANY = ast.Name("Any")
_OPEN = "*args, **kwargs"
_HEADER = '''\
"""Types of a worker's models; at run time each is a {base}.

    model = cast("{example}", {base}(session, name="..."))
"""

from typing import Any, Literal, overload

from bridge_client.{client} import {base}
'''


def source(
    models: Mapping[str, ModelInfo], framework: str, client: str | None = None
) -> bytes:
    """Return a stub file with a class for each model, for a client of models of `framework`.

    The same models give the same bytes.

    Raises:
      CallerError: the client does not run models of this framework.
    """
    client = client or COUNTERPART[framework]
    if client == framework:
        raise CallerError(
            f"--client {client} runs models of {COUNTERPART[client]}, and the worker's are of"
            f" {framework}; expected {COUNTERPART[client]} or numpy"
        )
    base = CLASSES[client]
    taken = {"Any", "Literal", "overload", base}
    names = {name: _class_name(name, taken) for name in sorted(models)}
    header = _HEADER.format(
        base=base, client=client, example=next(iter(names.values()), "Model")
    )
    parts = [header]
    for name, class_name in names.items():
        parts += _classes(models[name], class_name, base, taken, client != "numpy")
    body = "\n\n".join(parts).encode()
    return _marked(body)


def write(text: bytes, path: Path, is_forced: bool) -> None:
    """Write a stub file at once, in place of one that this command wrote or, if forced, of any.

    Raises:
      CallerError: the file has another suffix or another author, or cannot be written.
    """
    if path.suffix != _SUFFIX:
        raise CallerError(
            f"-o {path}: expected a stub file, such as {path.with_suffix(_SUFFIX)}"
        )
    path = Path(os.path.realpath(path))
    try:
        if not is_forced and path.exists() and not _is_ours(path.read_bytes()):
            raise CallerError(
                f"{path} was written or changed by another program; choose another file, or replace"
                " it with --force"
            )
        _replace(path, text)
    except OSError as error:
        raise CallerError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, text: bytes) -> None:
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with new.open("xb") as file:
            file.write(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _marked(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest().encode()
    return _MARK + digest + b"\n" + body


def _is_ours(text: bytes) -> bool:
    return text == _marked(text.partition(b"\n")[2])


def _classes(
    model: ModelInfo, name: str, base: str, taken: set[str], has_methods: bool
) -> Iterator[str]:
    """Yield the classes of a model's methods, and then that of the model."""
    methods = [each for each in model.methods if each != _CALL]
    overloads = []
    for method in sorted(methods):
        other = _class_name(f"{model.name} {method}", taken)
        doc = f"The method {method!r} of the model {model.name!r}."
        yield _class(other, base, doc, [_call(model, method, doc)])
        overloads.append(_overload(f"Literal[{method!r}]", other))
    members = []
    if not model.methods or _CALL in model.methods:
        members.append(_call(model, _CALL, model.doc))
    if overloads and has_methods:
        members += [*overloads, _overload("str", base)]
    yield _class(name, base, _doc_of(model), members)


def _class(name: str, base: str, doc: str, members: list[str]) -> str:
    body = "\n\n".join([_quoted(doc), *members])
    return f"class {name}({base}):\n{textwrap.indent(body, _INDENT, _is_code)}\n"


def _call(model: ModelInfo, method: str, doc: str) -> str:
    header = f"def __call__({_parameters(model, method)}) -> Any:"
    body = _quoted(doc) if doc else "..."
    return f"{header}\n{textwrap.indent(body, _INDENT, _is_code)}"


def _overload(name: str, result: str) -> str:
    return f"@overload\ndef method(self, name: {name}) -> {result}: ..."


def _is_code(line: str) -> bool:
    return bool(line.strip())


def _doc_of(model: ModelInfo) -> str:
    lines = [
        f"{'parameter' if each.trainable else 'buffer'} {each.path}: {each.spec}"
        for each in model.parameters[:_MOST_PARAMETERS]
    ]
    hidden = len(model.parameters) - len(lines)
    lines += [f"and {hidden} more"] if hidden else []
    for arrays in model.signatures:
        lines.append(f"compiled for ({', '.join(map(str, arrays))})")
    about = inspect.cleandoc(model.doc) or f"The model {model.name!r}."
    return "\n\n".join(filter(None, [about, "\n".join(lines)]))


# Names, parameters and texts of a worker ----------------------------------------------------------


def _class_name(text: str, taken: set[str]) -> str:
    """Return a new identifier that resembles a text, in the form of a class's name."""
    plain = unicodedata.normalize("NFKC", text[:_LONGEST_NAME])
    words = re.split(r"[\W_]+", plain)
    name = "".join(word[:1].upper() + word[1:] for word in words)
    if not name.isidentifier() or keyword.iskeyword(name):
        name = f"Model{name}" if f"Model{name}".isidentifier() else "Model"
    name = unicodedata.normalize("NFKC", name)
    chosen, count = name, 1
    while chosen in taken:
        count += 1
        chosen = f"{name}{count}"
    taken.add(chosen)
    return chosen


def _parameters(model: ModelInfo, method: str) -> str:
    """Return the parameters of a call as code, with `self` first."""
    signature = model.signature_of(method)
    if not signature:
        # The names are those of the function within a decorator, which may take others.
        optional = (f"{name}=..." for name in model.arguments_of(method))
        signature = f"({', '.join([*optional, _OPEN])})"
    arguments = _parsed(signature) or _parsed(f"({_OPEN})")
    assert arguments is not None
    first = arguments.posonlyargs or arguments.args
    first.insert(0, ast.arg(_self_beside(arguments)))
    return ast.unparse(arguments)


def _parsed(signature: str) -> ast.arguments | None:
    """Return the parameters of a signature, of type Any and with literal defaults.

    None: it is none, or one that a method cannot have.
    """
    if len(signature) > _LONGEST_SIGNATURE:
        return None
    try:
        function = ast.parse(f"def f{signature}: ...").body[0]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    found = function.args
    names = [each.arg for each in _each(found)]
    # Python renames private names in a class.
    if len(set(names)) < len(names) or any(name.startswith("__") for name in names):
        return None
    for each in _each(found):
        each.annotation = _ANY
    found.defaults = [_literal(node) for node in found.defaults]
    found.kw_defaults = [node and _literal(node) for node in found.kw_defaults]
    return found


def _each(arguments: ast.arguments) -> list[ast.arg]:
    plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*plain, *filter(None, (arguments.vararg, arguments.kwarg))]


def _literal(node: ast.expr) -> ast.expr:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        return ast.Constant(...)
    return node


def _self_beside(arguments: ast.arguments) -> str:
    names = {each.arg for each in _each(arguments)}
    name = "self"
    while name in names:
        name = f"_{name}"
    return name


def _quoted(text: str) -> str:
    """Return a text as a docstring that evaluates to it, on as many lines."""
    text = inspect.cleandoc(text[:_LONGEST_DOC])
    quote = r"\"" if '"""' in text or text.endswith('"') else '"'
    escaped = "\n".join(_escaped(line, quote) for line in text.split("\n"))
    end = "\n" if "\n" in escaped else ""
    return f'"""{escaped}{end}"""'


def _escaped(line: str, quote: str) -> str:
    special = {"\\": r"\\", '"': quote}
    return "".join(
        special.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in line
    )
