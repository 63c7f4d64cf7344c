"""How long the worker keeps what a backward pass needs, and what torch's own tools for saved
tensors do to that."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from bridge_client import Session, connect
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import RemoteModelError
from tests.client.torch_client.conftest import Remote


def leaf(*shape: int) -> Tensor:
    return torch.rand(*shape or (3,)).requires_grad_()


def kept(session: Session) -> int:
    """Return how many residuals the worker keeps for the session.

    Without a collection: references must suffice.
    """
    stats = session.stats()
    assert (stats["residuals"] == 0) == (stats["residual_bytes"] == 0)
    return stats["residuals"]


def test_a_residual_lives_from_forward_to_backward(
    session: Session, remote: Remote
) -> None:
    """One forward keeps one residual; a backward that retains keeps it; the last one releases
    it."""
    y = remote("sine")(leaf()).sum()
    assert kept(session) == 1
    y.backward(retain_graph=True)
    assert kept(session) == 1
    y.backward()
    assert kept(session) == 0


def test_a_dropped_graph_releases_its_residual(
    session: Session, remote: Remote
) -> None:
    """An output that nobody keeps takes its residual along, without a backward pass."""
    sine = remote("sine")
    outputs = [sine(leaf()) for _ in range(5)]
    assert kept(session) == 5
    del outputs[:2]
    assert kept(session) == 3
    outputs = [y.detach() for y in outputs]
    assert kept(session) == 0


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)]
)
def test_without_grad_nothing_is_kept(
    session: Session, remote: Remote, mode: Callable[[], Any]
) -> None:
    """Under no_grad and inference_mode no residual is made, not even for inputs that require a
    gradient."""
    x = leaf()
    with mode():
        y = remote("sine")(x)
        assert kept(session) == 0 and not y.requires_grad
    torch.testing.assert_close(y, 2 * x.detach().sin())


def test_inputs_without_grad_keep_nothing(session: Session, remote: Remote) -> None:
    """A call of tensors that require no gradient keeps nothing, though grad mode is on."""
    y = remote("sine")(torch.rand(3))
    assert kept(session) == 0 and not y.requires_grad


def test_inference_tensors_are_inputs(remote: Remote) -> None:
    """A tensor made in inference mode can be passed on in it and, where it needs no gradient,
    outside of it."""
    with torch.inference_mode():
        y = remote("sine")(torch.rand(3))
        z = remote("sine")(y)
    torch.testing.assert_close(remote("sine")(z), 2 * z.clone().sin())


def test_blocks_return_with_their_tensors(session: Session, remote: Remote) -> None:
    """After outputs, gradients and graph are gone, no block is leased and no residual kept."""
    x = leaf(100)
    y = remote("sine")(x)
    y.sum().backward()
    assert session.stats()["blocks"] > 0
    del x, y
    stats = session.stats()
    assert (stats["blocks"], stats["residuals"], stats["residual_bytes"]) == (0, 0, 0)


def test_a_failed_forward_keeps_nothing(session: Session, remote: Remote) -> None:
    """A model that raises at run time under grad leaves neither a residual nor a block; the next
    call works."""
    model = remote("raises_below_zero")
    for value in (-1.0, 1.0, -1.0):
        x = torch.full((3,), value).requires_grad_()
        if value < 0:
            with pytest.raises(RemoteModelError):
                model(x)
        else:
            assert model(x).tolist() == [2, 2, 2]
    del x
    assert kept(session) == 0 and session.stats()["blocks"] == 0


def test_a_failed_backward_keeps_nothing(session: Session, remote: Remote) -> None:
    """A VJP that raises on the worker raises here; once the graph is gone nothing is left."""
    x = leaf()
    y = remote("raises_below_zero")(x)
    with pytest.raises(RemoteModelError, match="dislikes negative numbers"):
        (-y).sum().backward()
    del x, y
    assert kept(session) == 0 and session.stats()["blocks"] == 0


def test_a_hook_that_raises_leaves_nothing(session: Session, remote: Remote) -> None:
    """An exception of the user's own hook in the middle of backward leaves nothing behind
    either."""

    def refuse(gradient: Tensor) -> None:
        raise LookupError("no")

    sine, x = remote("sine"), leaf()
    inner = sine(x)
    inner.register_hook(refuse)
    y = sine(inner).sum()
    with pytest.raises(LookupError):
        y.backward()
    del inner, y, x
    assert kept(session) == 0


def test_hooks_see_and_change_gradients(remote: Remote) -> None:
    """Hooks on inputs, outputs and leaves see the gradients, and what they return is used."""
    seen: dict[str, Tensor] = {}
    x = leaf()
    x.register_post_accumulate_grad_hook(
        lambda x: seen.update(accumulated=x.grad.clone())
    )
    inner = x * 1
    inner.register_hook(lambda gradient: seen.update(inner=gradient))
    y = remote("sine")(inner)
    y.register_hook(lambda gradient: gradient * 3)
    y.sum().backward()
    torch.testing.assert_close(seen["inner"], 6 * x.detach().cos())
    torch.testing.assert_close(seen["accumulated"], x.grad)


def test_module_hooks_run(remote: Remote) -> None:
    """It is an nn.Module: forward and backward hooks are called with its inputs and outputs."""
    calls = []
    sine = remote("sine")
    sine.register_forward_hook(lambda module, args, output: calls.append("forward"))
    sine.register_full_backward_hook(
        lambda module, inputs, outputs: calls.append("backward")
    )
    sine(leaf()).sum().backward()
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes(any_lane: Remote, use_reentrant: bool) -> None:
    """Under torch.utils.checkpoint in both modes the gradient is the same."""
    sine, x = any_lane("sine"), leaf()
    y = checkpoint(lambda x: sine(sine(x) * 2), x, use_reentrant=use_reentrant)
    y.sum().backward()
    other = x.detach().clone().requires_grad_()
    (2 * (4 * other.sin()).sin()).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_no_residual(
    session: Session, remote: Remote, use_reentrant: bool
) -> None:
    """Between forward and backward a checkpointed call keeps nothing on the worker, and
    afterwards neither."""
    sine = remote("sine")
    y = checkpoint(lambda x: sine(sine(x)), leaf(), use_reentrant=use_reentrant)
    assert kept(session) == 0
    y.sum().backward()
    del y
    assert kept(session) == 0


def saved_in_numpy() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda x: x.detach().numpy().copy(), torch.from_numpy)


@pytest.mark.parametrize("context", [save_on_cpu, saved_in_numpy])
def test_hooks_for_saved_tensors_change_nothing(
    session: Session, remote: Remote, context: Callable[[], saved_tensors_hooks]
) -> None:
    """Where saved tensors are packed and unpacked, even several times, gradients are the same
    and nothing is left."""
    sine, x = remote("sine"), leaf(2, 3)
    with context():
        y = sine(x.mT).sum()
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(x.grad, 4 * x.detach().cos())
    del y
    assert kept(session) == 0


def test_outputs_outlive_their_session(jax_worker: Session, lane: str) -> None:
    """Tensors made by a session stay valid, and can be written to, after it has been closed."""
    with connect(jax_worker.address, lane=lane) as session:
        x = leaf(1000)
        y = RemoteJaxFunction(session, name="sine")(x)
        y.sum().backward()
    gc.collect()
    torch.testing.assert_close(y.detach(), 2 * x.detach().sin())
    torch.testing.assert_close(x.grad, 2 * x.detach().cos())
    y.detach().mul_(2)
    torch.testing.assert_close(y.detach(), 4 * x.detach().sin())
