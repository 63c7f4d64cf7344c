"""A model's parameters and buffers as those of a torch module, in memory shared with the worker."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bridge_client.session import ModelInfo, Session
from bridge_client.torch import modes
from bridge_client.torch.memory import DTYPES, copied_into, from_block, is_sole_owner

Owners = list[tuple[nn.Module, str]]  # each tensor's module and its name there


class _Branch(nn.Module):
    """A node of the parameters' tree.

    A call runs its hooks, of which pruning and weight_norm have theirs.
    """

    def forward(self) -> None:
        """Do nothing: the worker uses the parameters."""


def fetch(module: nn.Module, session: Session, model: ModelInfo) -> Owners:
    """Make a model's parameters and buffers a module's own. The worker computes them into blocks,
    where they stay."""
    program = session.prepare_parameters(model.name)
    blocks = session.run(program, ())
    owners: Owners = []
    for info, block, spec in zip(
        model.parameters, blocks, program.outputs, strict=True
    ):
        tensor = from_block(block, spec)
        *branches, leaf = info.path.split(".")
        owner = module
        for branch in branches:
            owner = owner._modules.setdefault(branch, _Branch())  # type: ignore[assignment]
        # Not by setattr: a model's own names, such as "forward", must not hide the class's.
        if info.trainable:
            owner._parameters[leaf] = nn.Parameter(tensor)
        else:
            owner._buffers[leaf] = tensor
        owners.append((owner, leaf))
    return owners


def tensors_of(owners: Owners, module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers as a call uses them now."""
    tensors: list[Tensor] = []
    refreshed: list[nn.Module] = []
    for owner, name in owners:
        if (tensor := owner._parameters.get(name)) is not None:
            tensors.append(tensor)
        elif (buffer := owner._buffers.get(name)) is not None:
            tensors.append(buffer)
        else:
            # A property, by torch.nn.utils.parametrize, or an attribute that hooks set before each
            # call.
            if owner is not module and owner not in refreshed:
                refreshed.append(owner)
                _run_hooks(owner)
            tensors.append(getattr(owner, name))
    return tensors


def _run_hooks(owner: nn.Module) -> None:
    """Run the hooks that set parameters before a call, such as those of pruning."""
    if isinstance(owner, _Branch):
        owner()
        return
    # The function whose parameters a method of its model shares: no call of it.
    for hook in list(owner._forward_pre_hooks.values()):
        hook(owner, ())


def keep_all_in_slab(session: Session, owners: Owners) -> None:
    """Move parameters and buffers before anybody can hold views of them, such as a state_dict."""
    if session.is_closed:  # a trained model can still be copied and cast
        return
    for owner, name in owners:
        for tensor in (owner._parameters.get(name), owner._buffers.get(name)):
            if tensor is not None and type(tensor) in modes.PLAIN:
                keep_in_slab(session, tensor)


def keep_parameters_in_slab(session: Session, own: Sequence[Tensor]) -> None:
    """Move the parameters of a call that are not in the slab."""
    for tensor in own:
        if type(tensor) is nn.Parameter:
            keep_in_slab(session, tensor)


def keep_in_slab(session: Session, tensor: Tensor) -> None:
    """Move a tensor's memory into the slab if it is elsewhere: after deepcopy, to(dtype),
    unpickling, a fork.

    Memory with other users stays where it is, and each call copies it: other processes
    (share_memory), views, and owners that write into the storage later, such as FSDP2's all-gather.
    """
    nbytes = tensor.nbytes
    pool = session.gpu_pool() if tensor.is_cuda else session.pool
    if (
        nbytes == 0
        or pool is None
        or pool.address_of(tensor.data_ptr(), nbytes) is not None
    ):
        return
    is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == nbytes
    is_shared = tensor.is_cpu and tensor.is_shared()
    if not is_whole or is_shared or tensor.dtype not in DTYPES:
        return
    if not is_sole_owner(tensor):
        return
    if torch.is_inference_mode_enabled() or tensor.is_inference():
        return
    moved = copied_into(session, tensor)
    if moved is not None:
        tensor.data = moved


def cloned(session: Session, buffer: Tensor) -> Tensor:
    """Return a copy of a buffer, in the session's memory if possible."""
    if modes.is_cloned_by_operator(buffer):
        return buffer.clone()
    is_sendable = buffer.dtype in DTYPES and buffer.layout is torch.strided
    copied = copied_into(session, buffer) if is_sendable else None
    return buffer.clone() if copied is None else copied
