"""The stub files of `bridge_client stubs`: types of a worker's models."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge_client import cli
from bridge_client.commands import stubs
from bridge_client.session import ModelInfo, ParameterInfo
from bridge_wire import specs
from bridge_wire.errors import CallerError
from tests.conftest import ROOT
from tests.workers import Worker, models, serving

_HOSTILE = '"""\nimport os; os.system("evil")\n\\"""\x00\u202e\r\ud800"'
_USE = """\
from typing import TYPE_CHECKING, cast

from bridge_client.torch import RemoteJaxFunction

if TYPE_CHECKING:
    from served import Documented, Square

square = cast("Square", RemoteJaxFunction("unix:w", name="square"))
scaled = cast("Documented", RemoteJaxFunction("unix:w", name="documented"))
square(1)
list(square.parameters())
scaled(1, scale=3, mode="b")
square(1, 2)
scaled(1, sclae=3)
"""


def model(name: str = "net", **more: object) -> ModelInfo:
    known: dict[str, object] = {"doc": "", "arguments": (), "parameters": ()}
    return ModelInfo(name, **{**known, **more})


def with_methods(**signatures: str) -> ModelInfo:
    arguments = tuple(("x",) for _ in signatures)
    methods = {
        "__call__" if name == "call" else name: s for name, s in signatures.items()
    }
    return model(
        methods=tuple(methods),
        method_arguments=arguments,
        method_signatures=tuple(methods.values()),
    )


def source(*of: ModelInfo, client: str = "torch") -> str:
    return stubs.source({each.name: each for each in of}, "jax", client).decode()


def classes(text: str) -> dict[str, ast.ClassDef]:
    """Return the classes of a stub file; it has nothing else but its docstring and imports."""
    compile(text, "stub", "exec", dont_inherit=True)
    doc, *others = ast.parse(text).body
    assert isinstance(doc, ast.Expr)
    found = [node for node in others if isinstance(node, ast.ClassDef)]
    imports = [node for node in others if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imports] == ["typing", "bridge_client.torch"]
    assert len(found) + len(imports) == len(others)
    return {node.name: node for node in found}


def parameters(text: str, name: str = "Net") -> str:
    """Return the parameters of a class's `__call__`."""
    for node in classes(text)[name].body:
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            return ast.unparse(node.args).replace(": Any", "")
    raise AssertionError(f"{name} cannot be called")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("worker")
    address = f"unix:{folder}/w.sock"
    with serving(folder, *models("square", "documented"), "--listen", address) as made:
        yield made


def test_type_checker_knows_the_models_arguments(
    worker: Worker, tmp_path: Path
) -> None:
    """mypy accepts the stub file and right calls, and refuses a wrong keyword."""
    assert cli.main(["stubs", worker.address, "-o", f"{tmp_path}/served.pyi"]) == 0
    (tmp_path / "use.py").write_text(_USE)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "use.py", "served.pyi"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT), "MYPY_CACHE_DIR": str(tmp_path / "c")},
        capture_output=True,
        text=True,
    )
    told = [
        line for line in done.stdout.splitlines() if line.startswith(("use", "served"))
    ]
    assert [line.partition(": ")[0] for line in told if "error" in line] == [
        "use.py:13",
        "use.py:14",
    ], done.stdout
    assert (
        'Unexpected keyword argument "sclae" for "__call__" of "Documented"' in told[1]
    )


def test_worker_is_printed_without_a_file(
    worker: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without -o the stub file goes to stdout, each time the same."""
    texts = []
    for _ in range(2):
        assert cli.main(["stubs", worker.address]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    found = classes(texts[0])
    assert [*found] == ["Documented", "Square"]
    assert ast.get_docstring(found["Documented"]) == (
        "Scale an array.\n\nThe rest is for --json."
    )
    assert parameters(texts[0], "Documented") == "self, x, scale=2.0, *, mode='a'"


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("(x, n=1, /, *rest, flag=True, **others)", None),
        ("(x=-1.5, y=(1, [2, {'a': None}]), z='\\'\"\\n')", None),
        ("(self, _self)", "(__self, self, _self)"),
        ("(x=open('f'), y=1e999)", "(self, x=..., y=1e309)"),
        ("(x: evil() = 1) -> evil()", "(self, x=1)"),
        ("(x): evil(); y = lambda", "(self, x)"),
        ("(x, x)", "(self, *args, **kwargs)"),
        ("(__private)", "(self, *args, **kwargs)"),
        ("(x): ...\nimport evil\ndef g()", "(self, x)"),
        ("(x=f'{evil()}')", "(self, x=...)"),
        ("[T](x)", "(self, x)"),
        ("(", "(self, *args, **kwargs)"),
        (f"(x={'(' * 9000})", "(self, *args, **kwargs)"),
        (f"(x={'-' * 9000}1)", "(self, *args, **kwargs)"),
        (f"(x={'1,' * 9000})", "(self, *args, **kwargs)"),
        ("", "(self, *args, **kwargs)"),
    ],
)
def test_only_names_and_literals_of_a_signature_are_written(
    signature: str, expected: str | None
) -> None:
    """No expression of a worker becomes code of the file."""
    if signature.startswith("[") and sys.version_info < (3, 12):
        expected = "(self, *args, **kwargs)"
    expected = expected or f"(self, {signature[1:]}"
    text = source(with_methods(call=signature))
    assert f"({parameters(text)})" == expected
    assert "evil" not in text


@pytest.mark.parametrize("arguments", [("x", "y"), ("x=evil()", "y")])
def test_arguments_without_a_signature_are_optional(arguments: tuple[str, ...]) -> None:
    """Where a worker knows only names, calls may pass others."""
    text = source(model(arguments=arguments))
    assert "evil" not in text
    known = "x=..., y=..., " if arguments == ("x", "y") else ""
    assert parameters(text) == f"self, {known}*args, **kwargs"


@pytest.mark.parametrize(
    "doc",
    [
        _HOSTILE,
        'ends in a "quote"',
        "ends in \\",
        '"""',
        '\\"""',
        "two\n\n  lines\n",
        "a\x0c\x1c\u2028\x85b",
        "${x} {y} %s",
    ],
)
def test_docstring_of_a_worker_stays_a_docstring(doc: str) -> None:
    """Quotes, backslashes, control characters and surrogates are escaped."""
    text = source(model(doc=doc))
    text.encode()
    (found,) = classes(text).values()
    assert ast.get_docstring(found) == stubs.inspect.cleandoc(doc)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_odd_names_become_identifiers() -> None:
    """Names that are no identifiers, keywords and equal names have classes of their own."""
    odd = [
        "none",
        "None",
        "my-model",
        "my_model",
        "2d",
        "class",
        "any",
        "模型",
        _HOSTILE,
        "+",
    ]
    text = source(*(model(name) for name in odd))
    assert sorted(classes(text)) == [
        *("Any2", "Class", "ImportOsOsSystemEvil", "Model", "Model2d", "ModelNone"),
        *("ModelNone2", "MyModel", "MyModel2", "模型"),
    ]


def test_methods_have_classes_and_overloads() -> None:
    """`method` returns the class of the method that it names."""
    net = with_methods(call="(x)", encode="(x, *, depth)", **{"it's": "(y=1)"})
    found = classes(source(net))
    assert [*found] == ["NetEncode", "NetItS", "Net"]
    overloads = [each for each in found["Net"].body if "overload" in ast.unparse(each)]
    assert [ast.unparse(each).splitlines()[1] for each in overloads] == [
        "def method(self, name: Literal['encode']) -> NetEncode:",
        'def method(self, name: Literal["it\'s"]) -> NetItS:',
        "def method(self, name: str) -> RemoteJaxFunction:",
    ]
    with pytest.raises(AssertionError):
        parameters(source(with_methods(encode="(x)")))


def test_parameters_and_warm_types_are_told() -> None:
    """A class's docstring lists the model's parameters and types, up to a number."""
    spec = specs.parse("float32[3]")[0]
    many = tuple(ParameterInfo(f"w{i}", spec, i != 1) for i in range(30))
    (net,) = classes(source(model(parameters=many, signatures=((spec,),)))).values()
    doc = ast.get_docstring(net) or ""
    assert doc.startswith("The model 'net'.\n\nparameter w0: float32[3]\nbuffer w1: ")
    assert doc.endswith("and 10 more\ncompiled for (float32[3])")


def test_client_of_the_same_framework_is_refused() -> None:
    """The client named is one that runs models of the worker's framework."""
    with pytest.raises(CallerError, match=r"--client jax runs .* torch or numpy"):
        stubs.source({}, "jax", "jax")
    assert "RemoteTorchFunction" in stubs.source({}, "torch").decode()
    numpy = stubs.source({"net": with_methods(encode="(x)")}, "torch", "numpy").decode()
    assert "RemoteFunction" in numpy and "@overload" not in numpy


def test_file_of_another_author_is_kept(tmp_path: Path) -> None:
    """Own files are replaced; changed ones, those of others, links and folders are not."""
    path = tmp_path / "model.pyi"
    first, second = (stubs.source({name: model(name)}, "jax") for name in "ab")
    stubs.write(first, path, is_forced=False)
    path.chmod(0o600)
    stubs.write(second, path, is_forced=False)
    assert path.read_bytes() == second
    for changed in (second + b"# mine\n", b"x: int\n", b"", second[:-1]):
        path.write_bytes(changed)
        with pytest.raises(CallerError, match="--force"):
            stubs.write(first, path, is_forced=False)
        assert path.read_bytes() == changed
    stubs.write(first, path, is_forced=True)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["model.pyi"]


def test_file_is_written_through_a_link_and_as_a_whole(tmp_path: Path) -> None:
    """A link keeps its place; a file that cannot be written leaves nothing behind."""
    text = stubs.source({}, "jax")
    (tmp_path / "link.pyi").symlink_to(tmp_path / "model.pyi")
    stubs.write(text, tmp_path / "link.pyi", is_forced=False)
    assert (tmp_path / "model.pyi").read_bytes() == text
    assert (tmp_path / "link.pyi").is_symlink()
    for name, said in (
        ("model.py", r"expected a stub file, such as .*model\.pyi"),
        ("no/model.pyi", "cannot write .*No such file"),
    ):
        with pytest.raises(CallerError, match=said):
            stubs.write(text, tmp_path / name, is_forced=True)
    (tmp_path / "folder.pyi").mkdir()
    with pytest.raises(CallerError, match="cannot write"):
        stubs.write(text, tmp_path / "folder.pyi", is_forced=True)
    assert len(os.listdir(tmp_path)) == 3
