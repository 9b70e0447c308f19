"""Detection of non-finite values in weights, running statistics and banks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from selcon_plugin.io.tensor_names import unwrapped_name
from selcon_plugin.models.state_keys import is_method_state

# A message lists so many names; the others are counted.
_SHOWN = 5


def name_some(names: Sequence[str]) -> str:
    """List names, and count those after the first few.

    Args:
        names: The names.

    Returns:
        For instance "a, b and 3 more".

    Example:
        >>> name_some(["a", "b"])
        'a, b'
        >>> name_some(list("abcdefg"))
        'a, b, c, d, e and 2 more'
    """
    shown, rest = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def find_nonfinite_state(network: nn.Module, paths: Sequence[str]) -> list[str]:
    """Find NaN and infinite values in weights, running statistics and banks.

    Args:
        network: Any network. If all values are finite, its device is waited for once.
        paths: Path of each training image, used to name the rows of banks; may be empty.

    Returns:
        One sentence for each finding; empty if all values are finite.
    """
    tensors = {
        unwrapped_name(name): tensor
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
        if tensor.is_floating_point() and tensor.numel()
    }
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()])
    bad = [name for name, good in zip(tensors, finite.tolist(), strict=True) if not good]
    banks = [name for name in bad if is_method_state(name)]
    weights = [name for name in bad if name not in banks]
    found = [f"{name} is not finite in {_rows(tensors[name], paths)}" for name in banks]
    if weights:
        found.insert(0, f"weights are not finite: {name_some(weights)}")
    return found


def check_state(network: nn.Module, paths: Sequence[str] = (), *, when: str) -> None:
    """Refuse a network whose weights or banks are not finite.

    Args:
        network: The network.
        paths: Path of each training image.
        when: Start of the message, for instance "after epoch 3".

    Raises:
        FloatingPointError: If a value is NaN or infinite. The message names tensors and
            bank rows.
    """
    found = find_nonfinite_state(network, paths)
    if found:
        raise FloatingPointError(
            f"{when}: {'; '.join(found)}. Use an earlier checkpoint, or other weights"
        )


def broadcast_rows(rows: Tensor, tensor: Tensor) -> Tensor:
    """Reshape a mask of rows ``(B,)`` so that it broadcasts over a tensor ``(B, ...)``."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))


def finite_rows(tensor: Tensor) -> Tensor:
    """Return the mask of the rows that contain only finite values, bool ``(B,)``."""
    return tensor.isfinite().flatten(1).all(dim=1)


def _rows(tensor: Tensor, paths: Sequence[str]) -> str:
    """Name the non-finite rows of a bank, and their images if there is a row for each."""
    if tensor.dim() < 2:
        return f"{int((~tensor.isfinite()).sum())} places"
    rows: list[int] = (~finite_rows(tensor)).nonzero().squeeze(1).tolist()
    if len(tensor) != len(paths):
        return f"rows {name_some([str(row) for row in rows])}"
    return f"rows {name_some([f'{row} ({paths[row]})' for row in rows])}"
