"""How good the chosen neighbours are. The only core module that knows identities.

Nothing here is used for training.
"""

from __future__ import annotations

from torch import Tensor


def neighbor_precision(anchors: Tensor, neighbors: Tensor, true_pids: Tensor) -> float:
    """Share of neighbours that show the same identity as their anchor.

    Args:
        anchors: Image index of each anchor, shape ``(B,)``.
        neighbors: Image indices of its neighbours, shape ``(B, K)``, K at least 1.
        true_pids: Identity of every image, shape ``(M,)``; -1 where unknown, which counts
            as no match.

    Returns:
        Share in [0, 1].

    Example:
        >>> import torch
        >>> pids = torch.tensor([5, 5, 6])
        >>> neighbor_precision(torch.tensor([0]), torch.tensor([[1, 2]]), pids)
        0.5
    """
    anchor_pids = true_pids[anchors][:, None]
    matches = (true_pids[neighbors] == anchor_pids) & (anchor_pids >= 0)
    return matches.float().mean().item()
