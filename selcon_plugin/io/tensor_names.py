"""Names of tensors in a file, without what wrappers of PyTorch add to them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

__all__ = ["unwrapped_name", "unwrapped_state"]

_PARALLEL_PREFIX = "module."
# Names that PyTorch's wrappers insert at any level: of a compiled module, of a sharded one,
# of one with activation checkpoints.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped_name(name: str) -> str:
    """Return a tensor's name without what wrappers of PyTorch add to it.

    This is the only place that removes them, so that weights load the same everywhere.

    Args:
        name: Name in a file. Data parallelism puts ``module.`` before it, once for each
            time that the model was wrapped; ``torch.compile`` inserts ``_orig_mod.``.

    Returns:
        The name in the model itself.

    Example:
        >>> unwrapped_name("module._orig_mod.module.backbone._orig_mod.conv1.weight")
        'backbone.conv1.weight'
    """
    parts = name.split(".")
    if not _WRAPPERS.isdisjoint(parts):
        name = ".".join(part for part in parts if part not in _WRAPPERS)
    while name.startswith(_PARALLEL_PREFIX):
        name = name.removeprefix(_PARALLEL_PREFIX)
    return name


def unwrapped_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the names of the model itself.

    Args:
        state: Tensors by name, as in a file.

    Returns:
        The same tensors in the same order; PyTorch's metadata of the modules are kept.

    Raises:
        ValueError: If two names differ only in what wrappers add.
    """
    plain: OrderedDict[str, Any] = OrderedDict(
        (unwrapped_name(name), tensor) for name, tensor in state.items()
    )
    if len(plain) < len(state):
        (double, _), *_ = Counter(map(unwrapped_name, state)).most_common(1)
        names = [name for name in state if unwrapped_name(name) == double]
        raise ValueError(
            f"the weights contain {' and '.join(names)}, which name the same tensor: "
            "remove all but one of them"
        )
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        # The model itself, whose name is empty, follows its wrappers and replaces them.
        plain._metadata = {  # type: ignore[attr-defined]
            unwrapped_name(f"{name}.").removesuffix("."): entry
            for name, entry in metadata.items()
        }
    return plain
