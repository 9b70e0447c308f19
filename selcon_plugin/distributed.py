"""What several training processes share; all of it does nothing in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes, 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 without an initialised process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def gather_batch(tensor: Tensor) -> Tensor:
    """Join the batches of all ranks in the order in which the sampler dealt them out.

    The hosts' samplers deal a stream of images to the ranks in turn: rank r of W gets
    images r, r + W, r + 2W, ... Interleaving the gathered batches therefore restores the
    batch that one process would have had, and order-dependent writes give the same banks.

    Args:
        tensor: This rank's part, shape ``(b, ...)``; b may differ between ranks by what a
            last partial batch leaves over.

    Returns:
        Shape ``(sum of b, ...)``, the same on every rank.
    """
    size = world_size()
    if size == 1:
        return tensor
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(tensor)], device=tensor.device))
    lengths = [int(count) for count in counts]
    longest = max(lengths)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    interleaved = torch.stack(parts, dim=1).flatten(0, 1)  # position-major
    if min(lengths) == longest:
        return interleaved
    position = torch.arange(longest, device=tensor.device)[:, None]
    present = position < torch.tensor(lengths, device=tensor.device)[None, :]
    return interleaved[present.flatten()]
