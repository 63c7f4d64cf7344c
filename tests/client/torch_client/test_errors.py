"""What is refused, and how the error says so: before any data moves, naming the leaf; and the
model's own errors."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bridge_client import Session
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import (
    ArgumentError,
    BridgeError,
    CallerError,
    DTypeError,
    RemoteModelError,
    SessionClosed,
    SpecError,
    StructureError,
    UnknownModel,
)
from tests.client.torch_client.conftest import Remote


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(2, 3, dtype=dtype)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8)


def _endless() -> list[Any]:
    made: list[Any] = [x()]
    made.append(made)
    return made


# How a call is wrong: the model, its arguments, the error, and what its text must contain.
WRONG: dict[str, tuple[str, Callable[[], tuple[Any, ...]], type[BridgeError], str]] = {
    "a shape": (
        "matmul",
        lambda: (x(), x()),
        RemoteModelError,
        r"args\[0\]: float32\[2,3\], args\[1\]: float32\[2,3\]",
    ),
    "a shape in a dict": (
        "weighted",
        lambda: ({"x": x()}, {"w": x()}),
        RemoteModelError,
        r"args\[1\]\['w'\]: float32\[2,3\]",
    ),
    "a missing key": (
        "weighted",
        lambda: ({"x": x()}, {"v": x().T}),
        RemoteModelError,
        "KeyError",
    ),
    "a missing argument": (
        "matmul",
        lambda: (x(),),
        ArgumentError,
        r"'matmul': missing a required argument: 'y'; its arguments are \(x, y\)",
    ),
    "too many arguments": (
        "sine",
        lambda: (x(), x()),
        ArgumentError,
        r"'sine': too many positional arguments; its arguments are \(x\)",
    ),
    "float64": (
        "sine",
        lambda: (x(torch.float64),),
        DTypeError,
        r"`args\[0\]`.*float64.*--x64",
    ),
    "float64 in a dict": (
        "identity",
        lambda: ({"a": [x(torch.float64)]},),
        DTypeError,
        r"`args\[0\]\['a'\]\[0\]`.*--x64",
    ),
    "complex128": (
        "identity",
        lambda: (x(torch.complex128),),
        DTypeError,
        r"`args\[0\]`.*complex128.*--x64",
    ),
    "a large int64": (
        "identity",
        lambda: ([torch.tensor([1, 2**31])],),
        DTypeError,
        r"`args\[0\]\[0\]`.*2147483648.*--x64",
    ),
    "a small int64": (
        "identity",
        lambda: (torch.tensor([-(2**31) - 1]),),
        DTypeError,
        r"`args\[0\]`.*-2147483649.*--x64",
    ),
    "a large uint64": (
        "identity",
        lambda: (torch.tensor([2**63 + 5], dtype=torch.uint64),),
        DTypeError,
        r"`args\[0\]`.*--x64",
    ),
    "a number beyond int64": (
        "product",
        lambda: (x(), 2**63),
        DTypeError,
        r"`args\[1\]`.*64 bits",
    ),
    "a number beyond int32": (
        "product",
        lambda: (x(), 2**31),
        DTypeError,
        r"`args\[1\]`.*2147483648.*--x64",
    ),
    "an object": (
        "identity",
        lambda: ({"w": object()},),
        StructureError,
        r"args\[0\]\['w'\].*object",
    ),
    "a set": (
        "identity",
        lambda: ([1.0, {1, 2}],),
        StructureError,
        r"args\[0\]\[1\].*set",
    ),
    "bytes": ("identity", lambda: (b"abc",), StructureError, r"args\[0\].*bytes"),
    "a module": (
        "identity",
        lambda: (torch.nn.Linear(2, 2),),
        StructureError,
        r"args\[0\].*Linear",
    ),
    "a sparse tensor": (
        "identity",
        lambda: ({"s": x().to_sparse()},),
        StructureError,
        r"`args\[0\]\['s'\]`.*sparse.*to_dense",
    ),
    "a CSR tensor": (
        "identity",
        lambda: (x().to_sparse_csr(),),
        StructureError,
        r"`args\[0\]`.*sparse_csr",
    ),
    "a meta tensor": (
        "identity",
        lambda: (x().to("meta"),),
        SpecError,
        r"`args\[0\]` is on meta",
    ),
    "a quantized tensor": (
        "identity",
        lambda: ([quantized()],),
        DTypeError,
        r"`args\[0\]\[0\]`.*qint8",
    ),
    "a key": ("identity", lambda: ({b"a": x()},), StructureError, r"args\[0\].*key"),
    "keys without an order": (
        "identity",
        lambda: ({"a": x(), 1: x()},),
        StructureError,
        "sorted",
    ),
    "a list that contains itself": (
        "identity",
        lambda: (_endless(),),
        StructureError,
        "contain themselves",
    ),
    "a masked array": (
        "identity",
        lambda: (np.ma.array([1.0], mask=[True]),),
        StructureError,
        r"`args\[0\]`.*mask.*filled",
    ),
    "too many dimensions": (
        "identity",
        lambda: (torch.ones([1] * 65),),
        SpecError,
        r"`args\[0\]`.*65 dimensions",
    ),
    "a nested tensor": (
        "identity",
        lambda: (
            torch.nested.nested_tensor([x()[0], x()[0, :1]], layout=torch.jagged),
        ),
        StructureError,
        "nested tensor.*to_padded_tensor",
    ),
    "a text of objects": (
        "identity",
        lambda: (["fine", ("also", complex)],),
        StructureError,
        r"args\[0\]\[1\]\[1\]",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(deprecated|beta state)")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_is_refused_before_data_moves(
    session: Session, remote: Remote, wrong: str
) -> None:
    """The error has the right type and names the leaf; nothing was run, copied or kept; and the
    next call works."""
    model, args, kind, text = WRONG[wrong]
    f = remote(model)
    before = session.stats()
    for _ in range(2):
        with pytest.raises(kind, match=f"(?s){text}"):
            f(*args())
    assert {**session.stats(), "slab_bytes": 0} == {**before, "slab_bytes": 0}
    assert remote("sine")(x()).shape == (2, 3)


@pytest.mark.parametrize(
    "value",
    [np.ones(2), torch.ones(2), torch.float32, slice(1, 2)],
    ids=lambda v: type(v).__name__,
)
def test_what_cannot_be_static_is_named(remote: Remote, value: Any) -> None:
    """Also what has no hash, and what could be data."""
    with pytest.raises(
        StructureError,
        match=r"`kwargs\['y'\]\[0\]` is a .*, and static; expected a number",
    ):
        remote("product", static_argnames="y")(x(), y=[value])


@pytest.mark.parametrize(
    "foreign", [lambda x: x.to("meta"), torch.Tensor.to_sparse, torch.Tensor.to_mkldnn]
)
def test_a_tensor_without_readable_memory_is_refused_at_each_call(
    remote: Remote, foreign: Any
) -> None:
    """Also after a call of the same shape and dtype, whose program is known."""
    f = remote("sine")
    f(x())
    for given in (foreign(x()), foreign(x()).requires_grad_()):
        with pytest.raises((SpecError, StructureError), match=r"`args\[0\]` is"):
            f(given)


@pytest.mark.parametrize(
    "wrong", ["float64", "a large int64", "a shape in a dict", "an object"]
)
def test_a_wrong_call_is_refused_on_every_lane(any_lane: Remote, wrong: str) -> None:
    """The errors do not depend on the lane."""
    model, args, kind, text = WRONG[wrong]
    with pytest.raises(kind, match=f"(?s){text}"):
        any_lane(model)(*args())


def test_a_wrong_call_under_grad_is_refused_alike(
    session: Session, remote: Remote
) -> None:
    """A call that would be differentiated is checked as early, and keeps nothing."""
    before = session.stats()
    with pytest.raises(DTypeError, match=r"`args\[0\]`.*--x64"):
        remote("sine")(x(torch.float64).requires_grad_())
    with pytest.raises(DTypeError, match=r"`args\[1\]`.*--x64"):
        remote("product")(x().requires_grad_(), torch.tensor(2**40))
    after = session.stats()
    assert {**after, "slab_bytes": 0} == {**before, "slab_bytes": 0}


def test_an_int64_in_range_is_narrowed(remote: Remote) -> None:
    """Values that fit in int32 pass, to the last one; the result has the model's dtype."""
    values = torch.tensor([-(2**31), 0, 2**31 - 1])
    made = remote("identity")(values)
    assert made.dtype is torch.int32 and made.tolist() == values.tolist()


def test_an_int64_is_checked_at_each_call(remote: Remote) -> None:
    """The range is checked for the values of each call, and not for the first one of a signature
    only."""
    identity = remote("identity")
    for _ in range(2):
        assert identity(torch.tensor([5])).item() == 5
        with pytest.raises(DTypeError, match="--x64"):
            identity(torch.tensor([2**31]))


def test_64_bits_pass_where_the_worker_has_them(x64_remote: Remote) -> None:
    """With --x64 nothing is narrowed."""
    identity = x64_remote("identity")
    for value in (
        torch.tensor([2**62, -(2**63)]),
        torch.tensor([2**64 - 1], dtype=torch.uint64),
        torch.tensor([1 / 3], dtype=torch.float64),
        torch.tensor([1j / 3], dtype=torch.complex128),
    ):
        made = identity(value)
        assert made.dtype is value.dtype and made.tolist() == value.tolist()


# Models and options -------------------------------------------------------------------------------


def test_an_unknown_model_is_named(session: Session) -> None:
    """The error says which models there are."""
    with pytest.raises(UnknownModel, match=r"'sin'.*'sine'"):
        RemoteJaxFunction(session, name="sin")


def test_several_models_need_a_name(session: Session) -> None:
    """Without name= a worker with several models is ambiguous."""
    with pytest.raises(UnknownModel, match="name="):
        RemoteJaxFunction(session)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parameters": "server"}, "'client' or 'worker'"),
        ({"target": 5}, "int"),
        ({"target": "nonsense"}, "nonsense"),
        ({"timeout_s": 0}, "positive number of seconds"),
        ({"timeout_s": "5"}, "positive number of seconds"),
    ],
)
def test_a_wrong_option_is_explained(
    session: Session, options: dict[str, Any], text: str
) -> None:
    """A wrong value for an option is a CallerError that says what was expected."""
    with pytest.raises(CallerError, match=text):
        RemoteJaxFunction(**{"target": session, "name": "sine"} | options)


def test_a_closed_session_says_so(remote: Remote, session: Session) -> None:
    """A call of a session that was closed is SessionClosed."""
    sine = remote("sine")
    sine(x())
    session.close()
    with pytest.raises(SessionClosed):
        sine(x())


# The model's own errors ---------------------------------------------------------------------------


def test_a_model_that_raises_while_traced_shows_its_traceback(any_lane: Remote) -> None:
    """The remote type, message and traceback arrive as text; the traceback begins in the model's
    file."""
    with pytest.raises(RemoteModelError, match="dislikes every input") as raised:
        any_lane("raises_at_trace")(x())
    error = raised.value
    assert error.remote_type == "builtins.ValueError"
    assert (
        "functions.py" in error.remote_traceback
        and "raise ValueError" in error.remote_traceback
    )
    assert "raises_at_trace" in str(error) and error.remote_traceback in str(error)


def test_an_error_names_static_values_too(any_lane: Remote) -> None:
    """The signature in a model's error has what was static in the call: it may be the reason."""
    with pytest.raises(RemoteModelError, match="KeyError") as raised:
        any_lane("branch")(torch.ones(3), True, mode="sideways" + "!" * 1000)
    assert (
        "'branch' called with (args[0]: float32[3], args[1]=True, kwargs['mode']='sideways!"
        in str(raised.value)
    )
    assert "!" * 40 not in str(raised.value).splitlines()[1]


def test_a_model_that_raises_while_it_runs_shows_its_traceback(
    any_lane: Remote,
) -> None:
    """An exception in a callback of compiled code arrives with the model's own message and
    traceback."""
    model = any_lane("raises_below_zero")
    with pytest.raises(RemoteModelError, match="dislikes negative numbers") as raised:
        model(-x())
    assert raised.value.remote_type
    assert (
        "ArithmeticError" in raised.value.remote_traceback
        and "_refuse_negative" in raised.value.remote_traceback
    )
    assert model(x()).eq(2).all()


def test_a_model_that_raises_in_the_vjp_shows_its_traceback(any_lane: Remote) -> None:
    """So does one in a backward pass, which can be tried again with another cotangent."""
    v = x().requires_grad_()
    y = any_lane("raises_below_zero")(v)
    with pytest.raises(RemoteModelError, match="dislikes negative numbers"):
        y.backward(-x(), retain_graph=True)
    y.backward(x())
    assert v.grad is not None and v.grad.eq(2).all()


FAILING: dict[str, Callable[[Remote], Any]] = {
    "traced": lambda remote: remote("raises_at_trace")(x()),
    "traced under grad": lambda remote: remote("raises_at_trace")(x().requires_grad_()),
    "run": lambda remote: remote("raises_below_zero")(-x()),
    "run under grad": lambda remote: remote("raises_below_zero")(
        (-x()).requires_grad_()
    ),
    "backward": lambda remote: remote("raises_below_zero")(
        x().requires_grad_()
    ).backward(-x()),
    "narrowed": lambda remote: remote("identity")([x(), torch.tensor([2**40])]),
    "packed": lambda remote: remote("identity")([x(), 2**70]),
}


@pytest.mark.parametrize("failing", FAILING)
def test_errors_leave_nothing_behind(
    session: Session, remote: Remote, failing: str
) -> None:
    """After errors no block is leased and no residual kept, however often they happen; and the
    next call works."""
    for _ in range(3):
        with pytest.raises(BridgeError):
            FAILING[failing](remote)
        assert remote("sine")(x()).shape == (2, 3)
    gc.collect()
    stats = session.stats()
    assert (stats["blocks"], stats["residuals"], stats["residual_bytes"]) == (0, 0, 0)
