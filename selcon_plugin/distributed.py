"""Collective operations of training processes; without effect in a single process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

_Result = TypeVar("_Result")


def world_size() -> int:
    """Return the number of processes, 1 without an initialized process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 without an initialized process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather_batch(tensor: Tensor) -> Tensor:
    """Concatenate the batches of all ranks in order of rank.

    The samplers split a batch into contiguous slices, so the result is the batch of a
    single-process run, and order-dependent writes give the same banks.

    Args:
        tensor: Part of this rank, shape ``(b, ...)``; b may differ between ranks.

    Returns:
        Shape ``(sum of b, ...)``, the same on every rank.
    """
    size = world_size()
    if size == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    lengths = [int(count) for count in counts]
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])


@torch.no_grad()
def share_buffers(*modules: nn.Module | None) -> None:
    """Broadcast the buffers of rank 0, such as running statistics, to all ranks.

    Args:
        *modules: The same modules on every rank; None is skipped.
    """
    if world_size() == 1:
        return
    for module in modules:
        for buffer in () if module is None else module.buffers():
            dist.broadcast(buffer, src=0)


def broadcast_tensor(
    tensor: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Broadcast a vector of rank 0 to all ranks.

    Args:
        tensor: Vector on rank 0, of any length; None on other ranks.
        dtype: Data type of the vector, given on every rank.
        device: Device of the process group's tensors.

    Returns:
        The vector, on the CPU of every rank.
    """
    length = torch.tensor([0 if tensor is None else len(tensor)], device=device)
    dist.broadcast(length, src=0)
    if tensor is None:
        vector = torch.empty(int(length), dtype=dtype, device=device)
    else:
        vector = tensor.to(device, dtype)
    dist.broadcast(vector, src=0)
    return vector.cpu()


def group_device() -> torch.device:
    """Return the device of the process group's tensors; the CPU without a group."""
    if world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def on_any_rank(mask: Tensor) -> Tensor:
    """Compute the elementwise logical or of a mask over all ranks.

    Args:
        mask: Bool tensor of the same shape on every rank, on the CPU.

    Returns:
        Bool tensor, the same on every rank, on the CPU.
    """
    if world_size() == 1:
        return mask
    shared = mask.to(group_device(), torch.uint8)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.bool().cpu()


def on_main_process(function: Callable[[], _Result]) -> _Result | None:
    """Call a function on the main process; all processes wait, and all get its error.

    Args:
        function: The function.

    Returns:
        Its result on the main process, None on all others.

    Raises:
        ValueError: If it failed on the main process, with the same message.
            ``OSError`` if it failed for a reason of the file system.
    """  # noqa: DOC502  (raised with the type of the original error)
    if world_size() == 1:
        return function()
    result, error = None, None
    if rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    failure = None if error is None else (isinstance(error, OSError), str(error))
    shared = gather_values(failure)[0]
    if error is not None:
        raise error
    if shared is not None:
        from_system, message = shared
        raise OSError(message) if from_system else ValueError(message)
    return result


def gather_values(value: Any) -> list[Any]:
    """Return a value of each process, in order of rank, on every process.

    The processes exchange JSON, not pickles, which could run code.

    Args:
        value: Value of this process: numbers, text, lists and mappings with text as keys.
            Anything else arrives as its text.

    Returns:
        The values as JSON returns them: a tuple is a list.
    """
    if world_size() == 1:
        return [value]
    text = json.dumps(value, default=str).encode()
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(group_device())
    length = torch.tensor([len(own)], device=own.device)
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    content = gather_batch(own).cpu().numpy().tobytes()
    values, start = [], 0
    for count in map(int, lengths):
        values.append(json.loads(content[start : start + count]))
        start += count
    return values
