"""Autograd's rules: who gets a gradient, what is computed for it, and how often one can go
backward."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.client.torch_client.conftest import Remote

SPENT = "Trying to backward through the graph a second time"
CHANGED = "modified by an inplace operation"


def leaf(*shape: int) -> Tensor:
    return torch.rand(*shape or (3,)).requires_grad_()


@pytest.fixture
def counts(remote: Remote) -> Callable[[str], int]:
    """Tells how often the worker has computed the VJP of what the models of functions.py count
    under a key."""
    tally = remote("tally")
    return lambda key: int(tally(key, torch.zeros(())))


# Who gets a gradient ------------------------------------------------------------------------------


def test_each_float_leaf_that_requires_a_gradient_gets_one(any_lane: Remote) -> None:
    """Float leaves that ask for a gradient get one of their dtype and shape, wherever they are;
    the others get none."""
    asked = {
        "list": [leaf(2, 3), leaf(0)],
        "half": torch.rand(3, dtype=torch.float16).requires_grad_(),
        "scalar": leaf(1),
    }
    others = {
        "silent": torch.rand(2),
        "int": torch.arange(3),
        "bool": torch.tensor(True),
        "number": 2.5,
    }
    made = any_lane("echo")(asked, more=others)
    outputs = [
        *made["args"][0]["list"],
        made["args"][0]["half"],
        made["args"][0]["scalar"],
    ]
    sum((y.float() * 3).sum() for y in outputs).backward()
    for x in (*asked["list"], asked["half"], asked["scalar"]):
        assert x.grad is not None
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape) and x.grad.eq(3).all()
    assert others["silent"].grad is None and others["int"].grad is None


def test_outputs_require_gradients_where_they_can_have_them(remote: Remote) -> None:
    """Float outputs require a gradient when an input does; integers and booleans never do."""
    f = remote("gradient_case")
    position, values, positive, size = f("mixed outputs", leaf())
    assert values.requires_grad and not any(
        y.requires_grad for y in (position, positive, size)
    )
    assert not any(y.requires_grad for y in f("mixed outputs", torch.rand(3)))


def test_an_input_that_the_model_ignores_gets_zeros(remote: Remote) -> None:
    """The gradient of an input without influence is zero, as in JAX."""
    x, y = leaf(), leaf(2)
    remote("gradient_case")("unused input", x, y).sum().backward()
    assert x.grad.eq(2).all() and y.grad.eq(0).all()


@pytest.mark.parametrize("asked", ["x", "y"])
def test_a_gradient_nobody_asks_for_is_not_computed(
    remote: Remote, counts: Callable[[str], int], asked: str
) -> None:
    """Only the VJP of the input that requires a gradient runs on the worker."""
    before = {key: counts(key) for key in "xy"}
    inputs = {key: torch.rand(3, requires_grad=key == asked) for key in "xy"}
    remote("counted_inputs")(**inputs).sum().backward()
    assert {key: counts(key) - before[key] for key in "xy"} == {
        "x": 0,
        "y": 0,
        asked: 1,
    }


def test_grad_of_a_subset_computes_that_subset(
    remote: Remote, counts: Callable[[str], int]
) -> None:
    """torch.autograd.grad and backward(inputs=) of some inputs leave out the work for the
    others."""
    x, y = leaf(), leaf()
    before = counts("x")
    out = remote("counted_inputs")(x, y).sum()
    (only,) = torch.autograd.grad(out, [y], retain_graph=True)
    torch.testing.assert_close(only, -y.detach().sin())
    out.backward(inputs=[y])
    assert counts("x") == before and x.grad is None
    torch.testing.assert_close(y.grad, only)


def test_grad_of_an_inner_tensor_computes_that_one(
    remote: Remote, counts: Callable[[str], int]
) -> None:
    """The same where the inputs of the remote function are no leaves."""
    x, y = leaf(), leaf()
    inner = x * 2
    before = counts("y")
    out = remote("counted_inputs")(inner, y * 2).sum()
    (gradient,) = torch.autograd.grad(out, inner, retain_graph=True)
    torch.testing.assert_close(gradient, 2 * inner.detach().cos())
    torch.testing.assert_close(torch.autograd.grad(out, x)[0], 2 * gradient)
    assert counts("y") == before


def test_an_output_that_does_not_matter_costs_nothing(
    remote: Remote, counts: Callable[[str], int]
) -> None:
    """The VJP of an output that no loss depends on does not run; that of the other one does."""
    x = leaf()
    before = [counts(key) for key in ("first", "second")]
    first, _ = remote("counted_outputs")(x)
    first.sum().backward()
    assert [counts(key) for key in ("first", "second")] == [before[0] + 1, before[1]]
    torch.testing.assert_close(x.grad, x.detach().cos() * x.detach().sin().cos())


# Several passes -----------------------------------------------------------------------------------


def test_several_losses_share_one_forward(any_lane: Remote) -> None:
    """Losses of different outputs go backward one after the other, and their gradients add up."""
    x = leaf()
    sine, square = any_lane("sine_and_square")(x)
    sine.sum().backward(retain_graph=True)
    torch.testing.assert_close(x.grad, x.detach().cos())
    (square.sum() * 2).backward(retain_graph=True)
    torch.testing.assert_close(x.grad, x.detach().cos() + 4 * x.detach())
    (sine * square).sum().backward()
    expected = torch.autograd.functional.jacobian(
        lambda x: (x.sin() + 2 * x**2 + x.sin() * x**2).sum(), x.detach()
    )
    torch.testing.assert_close(x.grad, expected)


def test_a_second_backward_needs_retain_graph(any_lane: Remote) -> None:
    """Without retain_graph, torch's own error is raised; with it, each pass gives the same
    gradient."""
    x = leaf()
    y = any_lane("sine")(x).sum()
    gradients = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(3)]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
    y.backward()
    with pytest.raises(RuntimeError, match=SPENT):
        y.backward()


def test_gradients_accumulate(remote: Remote) -> None:
    """`grad` is added to over several forward and backward passes."""
    x, sine = leaf(), remote("sine")
    for _ in range(4):
        sine(x).sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach().cos())


def test_calls_chain(remote: Remote) -> None:
    """Remote functions, torch functions and views between them are one graph."""
    x, sine, product = leaf(2, 3), remote("sine"), remote("product")
    product(sine(x.mT).relu()[1:], sine(x.mT)[:2] + 1).sum().backward()
    other = x.detach().clone().requires_grad_()
    ((2 * other.mT.sin()).relu()[1:] * (2 * other.mT.sin()[:2] + 1)).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_second_derivatives_with_create_graph(x64_remote: Remote) -> None:
    """Gradients made with create_graph can be differentiated again: gradgradcheck passes."""
    f = x64_remote("gradient_case")
    inputs = [torch.rand(2, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradgradcheck(lambda *xs: f("sine", *xs), inputs)
    (gradient,) = torch.autograd.grad(
        f("sine", *inputs).sum(), inputs[:1], create_graph=True
    )
    gradient.sum().backward()
    torch.testing.assert_close(
        inputs[0].grad, -(inputs[0].sin() * inputs[1].exp()).detach()
    )


# In place -----------------------------------------------------------------------------------------


def test_an_input_changed_before_backward_is_torchs_error(any_lane: Remote) -> None:
    """An in-place change of an input between forward and backward raises what torch raises for
    its own functions."""
    x = leaf()
    inner = x * 1
    y = any_lane("sine")(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


def test_an_input_changed_in_the_slab_is_torchs_error(remote: Remote) -> None:
    """The same for an input that lies in the session's memory and was not copied."""
    sine = remote("sine")
    inner = sine(leaf())
    y = sine(inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


def test_an_output_can_be_changed_in_place(remote: Remote) -> None:
    """`y += 1`, relu_ and the like work on an output of any rank, and are differentiated."""
    for shape in ((3,), (2, 3), ()):
        x = torch.rand(shape).requires_grad_()
        y = remote("sine")(x)
        y += 1
        y.mul_(3)
        torch.relu_(y).sum().backward()
        torch.testing.assert_close(x.grad, 6 * x.detach().cos())


def test_each_of_several_outputs_can_be_changed_in_place(remote: Remote) -> None:
    """The same for a function with several outputs."""
    x = leaf(2, 3)
    sine, square = remote("sine_and_square")(x)
    sine.mul_(2)
    square.add_(sine)
    square.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() + 2 * x.detach().cos())


def test_outputs_have_memory_of_their_own(remote: Remote) -> None:
    """Even the identity returns a copy: changing it changes neither its input nor a later
    result."""
    identity, x = remote("identity"), torch.rand(4, 3)
    kept = x.clone()
    first = identity(x)
    second = identity({"a": first, "b": first})
    assert len({t.data_ptr() for t in (x, first, second["a"], second["b"])}) == 4
    first.zero_()
    second["a"].fill_(7)
    assert (
        torch.equal(x, kept)
        and torch.equal(second["b"], kept)
        and torch.equal(identity(x), kept)
    )


def test_a_sparse_cotangent(remote: Remote) -> None:
    """An output that was an embedding's table has a sparse gradient, which the function takes."""
    rows = torch.tensor([0, 2, 2])
    grads = []
    for f in (remote("sine"), lambda x: x.sin() * 2):
        x = torch.linspace(0.1, 1.0, 12).reshape(4, 3).requires_grad_()
        torch.nn.functional.embedding(rows, f(x), sparse=True).sum().backward()
        grads.append(x.grad.to_dense())
    torch.testing.assert_close(*grads)


def test_a_gradient_can_be_changed_in_place(remote: Remote) -> None:
    """Gradients are memory of their own too: clipping one changes no other, nor what the worker
    keeps."""
    identity, x, y = remote("identity"), leaf(), leaf()
    out = identity([x, y])
    loss = (out[0] + out[1]).sum()
    loss.backward(retain_graph=True)
    x.grad.mul_(100)
    assert y.grad.eq(1).all()
    loss.backward()
    assert y.grad.eq(2).all() and x.grad.eq(101).all()


# Threads ------------------------------------------------------------------------------------------


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(i)` in threads of their own at once; raise what the first that failed raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def guarded(i: int) -> None:
        try:
            start.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_backward_runs_in_another_thread(any_lane: Remote) -> None:
    """A graph made in one thread goes backward in another one."""
    x = leaf()
    y = any_lane("sine")(x).sum()
    run_in_threads(1, lambda _: y.backward())
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())


def test_several_threads_call_at_once(any_lane: Remote) -> None:
    """Forward and backward of several threads through one function do not mix up."""
    sine = any_lane("sine")

    def work(i: int) -> None:
        for n in range(20):
            x = torch.full((50 + i, 1 + n % 2), float(i + n), requires_grad=True)
            y = sine(x)
            y.sum().backward()
            torch.testing.assert_close(y.detach(), 2 * x.detach().sin())
            torch.testing.assert_close(x.grad, 2 * x.detach().cos())

    run_in_threads(6, work)
    assert sine.session.stats()["residuals"] == 0
