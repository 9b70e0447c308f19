"""Ghost batch normalization: batch statistics of small groups within a large batch.

The published results of cluster methods were trained on several GPUs under
``nn.DataParallel``, where every GPU normalizes its own part of the batch: 16 to 64 images.
The same batch on one GPU gives other statistics and, as users of those methods report, a
much worse model. Splitting the batch into groups within each layer makes a single device
normalize as the published runs did. (There the running statistics came only from the first
GPU's part; here every group contributes.)

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
    """Mixin that passes the batch to a batch-norm class in groups."""

    plain_class: ClassVar[type[nn.Module]]
    group_size: int

    def forward(self, input: Tensor) -> Tensor:
        num_groups = len(input) // self.group_size if self.training else 1
        if num_groups < 2:
            return super().forward(input)
        shortest, num_longer = divmod(len(input), num_groups)
        sizes = [shortest + (group < num_longer) for group in range(num_groups)]
        normalize = super().forward
        # One split and one concatenation: the backward pass, too, copies the batch once.
        return torch.cat([normalize(group) for group in input.split_with_sizes(sizes)])

    def extra_repr(self) -> str:
        described = super().extra_repr()  # type: ignore[no-untyped-call, unused-ignore]
        return f"{described}, group_size={self.group_size}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is created at run time, so that pickle cannot find it by its name.
        return _empty_layer, (self.plain_class,), self.__dict__


def _ghost_class(plain_class: type[nn.Module]) -> type[_GhostBatchNorm]:
    """Return the grouped subclass of a batch-norm class, created on the first call."""
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
    """Make every batch-norm layer normalize groups of the batch separately.

    In training mode a layer splits its batch into contiguous groups, as ``nn.DataParallel``
    does, and normalizes each with its own statistics; the running statistics are updated
    group by group. Outputs, gradients and running statistics are those of the layer called
    on the groups one after the other. In evaluation mode nothing changes. Weights, buffers
    and the keys of the state dict stay as they are.

    A batch that is not a multiple of ``group_size`` is split into groups of at least that
    size, as equal as possible; a smaller batch is one group. The images must lie along the
    first dimension of the layer's input.

    The function converts the layers of every class derived from ``nn.BatchNorm1d``, ``2d``
    and ``3d``, whatever else the class does (FastReID's frozen shift, timm's activation).
    ``nn.SyncBatchNorm``, frozen batch norm and converted layers are not changed.

    FastReID's ``GhostBN`` differs in five ways. It takes the number of groups instead of
    their size, and that number is 1, hence no groups at all, for every layer that a config
    builds. Its groups are interleaved (every n-th image) and not contiguous. Its running
    statistics move once per batch, by the mean over the groups. The batch must be a
    multiple of the number. And only networks built through FastReID's ``get_norm`` have it.
    With its one group such a layer is an ordinary batch norm, and is converted.

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
            "statistics. Published settings are 16, 32 and 64"
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
