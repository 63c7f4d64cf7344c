"""A new user's mistakes, and the sentence of each error that names the remedy."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge_client import Session, cli, connect, spawn
from bridge_client.jax import RemoteTorchFunction
from bridge_client.numpy import RemoteFunction
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import BridgeError
from tests.conftest import ROOT, python_of
from tests.workers import serving

_NAMES = ["damped", "product", "repeat", "noisy", "branch", "rounded"]
_MODEL = """
import jax
import jax.numpy as jnp

def damped(t, amplitude=1.0, rate=0.5):
    return amplitude * jnp.exp(-rate * t)

def product(a, b):
    return a @ b

def repeat(x, n):
    return jnp.tile(x, n)

def noisy(x, key):
    return x + jax.random.normal(key, x.shape)

def branch(x):
    return x if x > 0 else -x

def rounded(x):
    return jnp.round(x).astype(int)

weights = 3
"""
_BROKEN = "import no_such_package\n"
_TORCH_MODEL = "def squared(x):\n    return x * x\n"
_X = torch.ones(3)


@dataclass
class Places:
    """The user's folder, a worker of JAX models, one of a torch model, and one with a token."""

    folder: Path
    address: str
    torch_address: str
    guarded: str
    session: Session

    def function(self, name: str, **options: object) -> RemoteJaxFunction:
        return RemoteJaxFunction(self.session, name=name, **options)

    def spawned(
        self, target: object, venv: str = ".venv-jax", **how: object
    ) -> Session:
        return spawn(target, python=python_of(venv), cwd=self.folder, **how)


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Path, str, str, str]]:
    with tempfile.TemporaryDirectory(prefix="bridge-", dir="/tmp") as name:
        folder = Path(name)
        (folder / "model.py").write_text(_MODEL)
        (folder / "broken.py").write_text(_BROKEN)
        (folder / "squares.py").write_text(_TORCH_MODEL)
        (folder / "token").write_text("a token of at least thirty-two characters")
        (folder / "token").chmod(0o600)
        env = {"PYTHONPATH": f"{folder}:{ROOT}"}
        hosted = [f"--jax-model=model:{name}" for name in _NAMES]
        addresses = [f"unix:{folder}/{name}.sock" for name in ("jax", "torch")]
        one, other = (("--listen", address) for address in addresses)
        guard = ("--port", "0", "--token-file", f"{folder}/token")
        torch_model = "--torch-model=squares:squared"
        with (
            serving(folder / "a", *hosted, *one, env=env),
            serving(folder / "b", torch_model, *other, venv=".venv-torch", env=env),
            serving(folder / "c", hosted[0], *guard, env=env) as guarded,
        ):
            yield folder, addresses[0], addresses[1], guarded.address


@pytest.fixture
def places(workers: tuple[Path, str, str, str]) -> Iterator[Places]:
    with connect(workers[1]) as session:
        yield Places(*workers, session)


def _closed(at: Places) -> object:
    with connect(at.address) as session:
        function = RemoteJaxFunction(session, name="damped")
    return function(_X)


def _changed_output(at: Places) -> object:
    x = torch.ones(3, requires_grad=True)
    return at.function("damped")(x).exp().add_(1).sum().backward()


def _no_derivative(at: Places) -> object:
    x = torch.ones(3, requires_grad=True)
    return at.function("rounded")(x).sum().backward()


def _wrong_keyword_in_jax(at: Places) -> object:
    with connect(at.torch_address) as session:
        return RemoteTorchFunction(session)(jnp.ones(3), y=2)


# Each mistake, and texts of its error: its cause, and its remedy.
MISTAKES: dict[str, tuple[Callable[[Places], object], str, str]] = {
    "a wrong path": (
        lambda at: connect(f"unix:{at.folder}/nowhere.sock"),
        "there is no such socket",
        "start the worker, or give the address of its ready line",
    ),
    "no worker at the port": (
        lambda at: connect("localhost:1"),
        "nothing listens there",
        "start the worker",
    ),
    "a URL": (
        lambda at: connect("http://localhost:5000"),
        "is a URL",
        "such as 'localhost:5000'",
    ),
    "no port": (
        lambda at: connect("localhost"),
        "address='localhost'",
        "expected 'unix:PATH' or 'HOST:PORT' with a port",
    ),
    "TLS to a worker without it": (
        lambda at: connect(at.guarded, tls=True),
        "the TLS handshake failed",
        "the worker may have no TLS",
    ),
    "no token": (
        lambda at: connect(at.guarded),
        "the call carries no token",
        "pass token= or token_file=",
    ),
    "a wrong token": (
        lambda at: connect(at.guarded, token="guessed"),
        "the token is unknown to the worker",
        "pass another token= or token_file=",
    ),
    "no such token file": (
        lambda at: connect(at.guarded, token_file="nowhere"),
        "cannot read the token file nowhere",
        "No such file",
    ),
    "a misspelt model": (
        lambda at: at.function("dampd"),
        "the worker hosts no model 'dampd'",
        "did you mean 'damped'?",
    ),
    "no name for one of several": (
        lambda at: RemoteJaxFunction(at.session),
        "the worker hosts ['branch', 'damped'",
        "pick one with name=",
    ),
    "a method that does not exist": (
        lambda at: at.function("damped").method("encode"),
        "no public method 'encode'",
        "it has ['__call__']",
    ),
    "a missing argument": (
        lambda at: at.function("product")(_X),
        "missing a required argument: 'b'",
        "its arguments are (a, b)",
    ),
    "a misspelt keyword": (
        lambda at: at.function("damped")(_X, rte=2.0),
        "unexpected keyword argument 'rte'",
        "did you mean 'rate'?; its arguments are (t, amplitude=1.0, rate=0.5)",
    ),
    "a keyword of no argument in JAX": (
        _wrong_keyword_in_jax,
        "unexpected keyword argument 'y'",
        "its arguments are (x)",
    ),
    "too many arguments": (
        lambda at: at.function("damped")(_X, 1.0, 2.0, 3.0),
        "too many positional arguments",
        "its arguments are (t, amplitude=1.0, rate=0.5)",
    ),
    "a random key that is not named": (
        lambda at: at.function("noisy")(_X),
        "missing a required argument: 'key'",
        "a random key is named in rngs=, as in rngs='key'",
    ),
    "wrong shapes": (
        lambda at: at.function("product")(torch.ones(2, 3), torch.ones(2, 3)),
        "got (3,) and (2,)",
        "called with (args[0]: float32[2,3], args[1]: float32[2,3])",
    ),
    "a large integer without x64": (
        lambda at: at.function("damped")(torch.tensor([2**40])),
        "JAX runs without x64 there and holds int32 only",
        "start the worker with --x64",
    ),
    "float64 in NumPy without x64": (
        lambda at: RemoteFunction(at.session, name="damped")(np.ones(3)),
        "input `args[0]` has dtype float64",
        "cast it to a 32-bit type or start the worker with --x64",
    ),
    "a shape that is traced": (
        lambda at: at.function("repeat")(_X, 3),
        "the model needs the value of `n`",
        "pass static_argnames='n'",
    ),
    "Python's if on an array": (
        lambda at: at.function("branch")(torch.tensor(1.0)),
        "reads the values of arrays, which they do not have",
        "use jax.numpy, jnp.where, jax.lax.cond",
    ),
    "an object": (
        lambda at: at.function("damped")(object()),
        "`args[0]` is a builtins.object",
        "expected a tensor, a number, bool, str or None, or a dict",
    ),
    "a sparse tensor": (
        lambda at: at.function("damped")(torch.eye(3).to_sparse()),
        "input `args[0]` is torch.sparse_coo",
        "make it dense with .to_dense()",
    ),
    "a closed session": (_closed, "the session is closed", "open a new session"),
    "a time limit of no time": (
        lambda at: at.function("damped", timeout_s=0),
        "timeout_s=0",
        "expected a positive number of seconds, or None to wait",
    ),
    "a GPU that is required": (
        lambda at: connect(at.address, require="cuda_ipc"),
        "the models of this worker run on no GPU",
        "start the worker on a GPU, or drop require",
    ),
    "a function that is spawned": (
        lambda at: at.spawned(lambda x: x),
        "cannot be sent to another process",
        "expected its place, such as 'model.py:function'",
    ),
    "a misspelt file": (
        lambda at: at.spawned("modle.py:damped"),
        "there is no file 'modle.py'",
        "did you mean 'model.py'?",
    ),
    "a misspelt module": (
        lambda at: at.spawned("modle:damped"),
        "there is no module 'modle'",
        "did you mean 'model'",
    ),
    "a misspelt attribute": (
        lambda at: at.spawned("model.py:dampd"),
        "'model.py' has no attribute 'dampd'",
        "did you mean 'damped'?",
    ),
    "a module that cannot be imported": (
        lambda at: at.spawned("broken.py:f"),
        "importing 'broken.py' failed: No module named 'no_such_package'",
        'broken.py", line 1',
    ),
    "no attribute": (
        lambda at: at.spawned("model.py"),
        "the target 'model.py' is not of the form",
        "such as model.py:function",
    ),
    "a target that is no model": (
        lambda at: at.spawned("model.py:weights"),
        "'weights' is a builtins.int",
        "expected a function",
    ),
    "an environment without the framework": (
        lambda at: at.spawned("model.py:damped", ".venv-torch"),
        "needs jax in the worker's environment",
        "python= or requirements= of spawn",
    ),
    "an interpreter that does not exist": (
        lambda at: spawn("model.py:damped", python="/no/such/python"),
        "the worker cannot be started",
        "/no/such/python: No such file or directory",
    ),
    "a folder that does not exist": (
        lambda at: spawn("model.py:damped", python=python_of(".venv-jax"), cwd="/no"),
        "cwd='/no' is not a directory",
        "expected the one from which the worker imports its models",
    ),
    "a misspelt flag of the worker": (
        lambda at: at.spawned("model.py:damped", args=["--x46"]),
        "unrecognized arguments: --x46",
        "did you mean '--x64'?",
    ),
}
# The frameworks' own errors, as for a function in this process.
OF_FRAMEWORKS: dict[str, tuple[Callable[[Places], object], type[Exception], str]] = {
    "backward through integers": (
        _no_derivative,
        RuntimeError,
        "does not require grad",
    ),
    "an output that is changed in place": (
        _changed_output,
        RuntimeError,
        "modified by an inplace operation",
    ),
    "a gradient with respect to integers": (
        lambda at: jax.grad(lambda x: RemoteTorchFunction(at.torch_address)(x).sum())(
            jnp.arange(3)
        ),
        TypeError,
        "requires real- or complex-valued inputs",
    ),
}


def test_there_are_enough_mistakes() -> None:
    """A new user makes at least 25."""
    assert len(MISTAKES) >= 25


@pytest.mark.parametrize("mistake", MISTAKES)
def test_error_names_the_cause_and_the_remedy(places: Places, mistake: str) -> None:
    """The text of the error, up to a remote traceback, says both."""
    make, cause, remedy = MISTAKES[mistake]
    with pytest.raises(BridgeError) as raised:
        make(places)
    text = str(raised.value).partition("\n\nRemote traceback")[0]
    assert cause in text
    assert remedy in text
    assert "_InactiveRpcError" not in text and "Failed to" not in text


@pytest.mark.parametrize("mistake", OF_FRAMEWORKS)
def test_error_of_a_framework_stays_its_own(places: Places, mistake: str) -> None:
    """Mistakes that the frameworks find have their errors here too."""
    make, kind, said = OF_FRAMEWORKS[mistake]
    with pytest.raises(kind, match=said) as raised:
        make(places)
    assert not isinstance(raised.value, BridgeError)


def test_arrays_of_other_libraries_are_no_mistake(places: Places) -> None:
    """Each client takes arrays of the other libraries."""
    function = places.function("damped")
    expected = function(_X).tolist()
    for x in (np.ones(3, np.float32), jnp.ones(3)):
        assert function(x).tolist() == expected
        assert RemoteFunction(places.session, name="damped")(x).tolist() == expected
    squared = RemoteTorchFunction(places.torch_address)
    assert squared(torch.full((2,), 3.0)).tolist() == [9.0, 9.0]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["describe"], "give --token-file"),
        (["describe", "--token", "x"], "give another --token-file"),
    ],
)
def test_commands_name_their_own_flags(
    places: Places, words: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedies of the commands are flags, not arguments of Python."""
    assert cli.main([words[0], places.guarded, *words[1:]]) == 1
    text = capsys.readouterr().err
    assert remedy in text
    assert "token=" not in text
    assert text.count("\n") == 1
