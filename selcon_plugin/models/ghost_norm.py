"""Ghost batch normalization: the statistics of small batches inside a large one.

Published results of cluster methods were trained on several GPUs under ``nn.DataParallel``,
where every GPU normalizes its own share of the batch: 16 to 64 images. The same batch on
one GPU gives other statistics and, as users of those methods report, a far worse model.
Cutting the batch into groups inside each layer normalizes on a single device as the
published run did. (There the running statistics came from the first GPU's share alone; here
every group counts.)

Hoffer et al., "Train longer, generalize better: closing the generalization gap in large
batch training of neural networks", 2017. https://arxiv.org/abs/1705.08741
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_GHOST_CLASSES: dict[type[nn.Module], type[_GhostBatchNorm]] = {}


class _GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Stands before a batch norm class and hands it the batch in groups."""

    plain_class: ClassVar[type[nn.Module]]
    group_size: int

    def forward(self, input: Tensor) -> Tensor:
        num_groups = len(input) // self.group_size if self.training else 1
        if num_groups < 2:
            return super().forward(input)
        shortest, num_longer = divmod(len(input), num_groups)
        sizes = [shortest + (group < num_longer) for group in range(num_groups)]
        normalize = super().forward
        # One split and one join: the backward pass, too, copies the batch once.
        return torch.cat([normalize(group) for group in input.split_with_sizes(sizes)])

    def extra_repr(self) -> str:
        described = super().extra_repr()  # type: ignore[no-untyped-call, unused-ignore]
        return f"{described}, group_size={self.group_size}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time and cannot be found by its name.
        return _empty_layer, (self.plain_class,), self.__dict__


def _ghost_class(plain_class: type[nn.Module]) -> type[_GhostBatchNorm]:
    """Make the grouped form of a batch norm class, once; all else it does stays."""
    if plain_class not in _GHOST_CLASSES:
        _GHOST_CLASSES[plain_class] = type(
            f"Ghost{plain_class.__name__}",
            (_GhostBatchNorm, plain_class),
            {"plain_class": plain_class},
        )
    return _GHOST_CLASSES[plain_class]


def _empty_layer(plain_class: type[nn.Module]) -> nn.Module:
    ghost_class = _ghost_class(plain_class)
    return ghost_class.__new__(ghost_class)


def convert_ghost_batch_norm(module: nn.Module, group_size: int) -> int:
    """Let every batch norm layer normalize groups of the batch, each on its own.

    In training mode a layer cuts its batch into contiguous groups, as ``nn.DataParallel``
    cuts it, and normalizes each with its own statistics; the running statistics are updated
    group after group. Outputs, gradients and running statistics are those of the layer
    called on the groups one after the other. In evaluation mode nothing changes. Weights,
    buffers and the keys of the state dict stay as they are.

    A batch that is no multiple of ``group_size`` is cut into groups of at least that size,
    as equal as possible; a smaller batch is one group. The images must lie along the first
    dimension of the layer's input.

    Converted are the layers of every class derived from ``nn.BatchNorm1d``, ``2d`` and
    ``3d``, whatever else the class does (FastReID's frozen shift, timm's activation).
    ``nn.SyncBatchNorm``, frozen batch norm and layers already converted are left alone.

    FastReID's ``GhostBN`` is another thing: it takes a number of groups where this takes
    their size, and that number is 1, no groups at all, for every layer that a config
    builds; its groups are interleaved (every n-th image) rather than contiguous; its
    running statistics move once per batch, by the mean over the groups; the batch must be
    a multiple; and only networks built through FastReID's ``get_norm`` have it. With its
    one group such a layer is an ordinary batch norm, and is converted.

    Args:
        module: Network or layer, changed in place.
        group_size: Images per group, at least 2.

    Returns:
        Number of layers changed.

    Raises:
        ValueError: If ``group_size`` is below 2.

    Example:
        >>> layer = nn.BatchNorm1d(1, affine=False)
        >>> convert_ghost_batch_norm(layer, 2)
        1
        >>> layer(torch.tensor([[0.0], [2.0], [10.0], [30.0]])).flatten().round()
        tensor([-1.,  1., -1.,  1.])
    """
    if group_size < 2:
        raise ValueError(
            f"group_size must be 2 or more, got {group_size}: one image has no batch "
            "statistics; published settings are 16, 32 and 64"
        )
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, _BATCH_NORMS) and not isinstance(layer, _GhostBatchNorm)
    ]
    for layer in layers:
        layer.__class__ = _ghost_class(type(layer))  # type: ignore[assignment]
        layer.group_size = group_size  # type: ignore[assignment]
    return len(layers)
