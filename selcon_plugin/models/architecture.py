"""Architecture of a network, which its checkpoints carry, and the check when they load.

Names and shapes of tensors do not determine a network: a stride, a pooling or the
normalization of the images leave no trace in them, and a host that loads what fits leaves
the rest as it was initialized. Therefore a network describes itself. The description is in
the metadata that PyTorch keeps with a state dict, so that loading by whatever function is
checked, and as an entry of the checkpoint, for those that keep only the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from selcon_plugin.io.tensor_names import unwrapped_name

__all__ = [
    "RECORD",
    "ArchitectureMismatchError",
    "architecture_differences",
    "check_architecture",
    "describe_head",
    "layer_strides",
    "recorded_architecture",
]

# Name of the entry in a checkpoint, and in the metadata of a state dict.
RECORD = "architecture"

# Properties by key: what a reader calls it, and how to choose it in either host.
_PROPERTIES = {
    "backbone": ("backbone", "MODEL.BACKBONE; model.name"),
    "parts": ("horizontal parts", "NUM_PARTS; num_parts; none for some methods"),
    "global_dim": (
        "values of the global feature",
        "MODEL.HEADS.EMBEDDING_DIM; embedding_dim",
    ),
    "projection": ("linear layer of the global branch", "PROJECT_GLOBAL; project_global"),
    "pooling": ("pooling", "MODEL.HEADS.POOL_LAYER; pool"),
    "neck": ("normalization of the feature", "MODEL.HEADS.NORM; head"),
    "strides": ("strides", "LAST_STRIDE; last_stride"),
    "input_size": ("input size", "INPUT.SIZE_TRAIN; data.height and data.width"),
    "pixel_mean": ("mean of the pixels", "MODEL.PIXEL_MEAN; data.norm_mean"),
    "pixel_std": ("standard deviation of the pixels", "MODEL.PIXEL_STD; data.norm_std"),
    "global_weight": (
        "weight of the global feature beside the parts",
        "GLOBAL_DISTANCE_WEIGHT; global_distance_weight",
    ),
}
# Blocks have the attribute stride too, but their layers decide.
_RESIZING = (
    nn.Conv1d,
    nn.Conv2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
)
_TOLERANCE = 1e-4  # of a normalization that was rounded in a config
_SHOWN = 2


class ArchitectureMismatchError(ValueError):
    """Error for weights of another architecture; the message holds both values."""


def recorded_architecture(checkpoint: Any, state: Any = None) -> dict[str, Any]:
    """Return the architecture that a checkpoint carries.

    Args:
        checkpoint: Content of the file.
        state: State dict in it; None if the file is one.

    Returns:
        Properties by name; empty for files of other programs and of earlier versions.
    """
    entry = checkpoint.get(RECORD) if isinstance(checkpoint, Mapping) else None
    if isinstance(entry, Mapping):
        return dict(entry)
    metadata: Any = getattr(checkpoint if state is None else state, "_metadata", {})
    for found in metadata.values() if isinstance(metadata, Mapping) else ():
        if isinstance(found, Mapping) and isinstance(found.get(RECORD), Mapping):
            return dict(found[RECORD])
    return {}


def check_architecture(
    recorded: Mapping[str, Any],
    present: Mapping[str, Any],
    source: str,
    *,
    ignore: Sequence[str] = (),
) -> None:
    """Refuse weights of another architecture.

    Args:
        recorded: Architecture of the weights; empty if it is not known.
        present: Architecture of the network to load into.
        source: File of the weights, for the message.
        ignore: Properties that may differ.

    Raises:
        ArchitectureMismatchError: If a property differs that both sides know.
    """
    found = {
        key: difference
        for key, difference in architecture_differences(recorded, present).items()
        if key not in ignore
    }
    if found:
        listed = "; ".join(
            f"{_PROPERTIES[key][0]}: {difference} (set by {_PROPERTIES[key][1]})"
            for key, difference in found.items()
        )
        method = recorded.get("method")
        trained = f", trained by {method}," if method else ""
        raise ArchitectureMismatchError(
            f"the weights from {source}{trained} are of another architecture: {listed}. "
            "Build the network with the config of their training (config.yaml in its "
            "folder), or use other weights"
        )


def architecture_differences(
    recorded: Mapping[str, Any], present: Mapping[str, Any]
) -> dict[str, str]:
    """Compare two architectures.

    Args:
        recorded: Architecture of weights.
        present: Architecture of the network to load into.

    Returns:
        Both values by property, for those that both sides know and that differ.
    """
    differences = {}
    for key in _PROPERTIES:
        before, now = recorded.get(key), present.get(key)
        if before is None or now is None or _same(before, now):
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            differences[key] = _differing_layers(before, now)
        else:
            differences[key] = (
                f"{_shown(before)} in the weights, {_shown(now)} in the network"
            )
    return differences


def describe_head(head: nn.Module) -> dict[str, Any]:
    """Describe a head.

    Args:
        head: Head with the attributes of ``GlobalPartEmbedding``; another one is described
            as far as it has them.

    Returns:
        Properties by name; None for those that it does not have.
    """
    norm = getattr(head, "global_norm", None)
    projection = getattr(head, "global_projection", None)
    pool = getattr(head, "pool", None)
    return {
        "parts": getattr(head, "num_parts", None),
        "global_dim": getattr(head, "global_dim", None),
        "projection": None if projection is None else isinstance(projection, nn.Linear),
        "pooling": None if pool is None else _pooling(pool),
        "neck": None if norm is None else _normalization(norm),
    }


def layer_strides(module: nn.Module) -> dict[str, str]:
    """List the layers that change the resolution of the feature map.

    Args:
        module: The backbone.

    Returns:
        Stride, and dilation if there is one, by the name of the layer; layers of stride 1
        without dilation are left out.
    """
    found = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, _RESIZING):
            continue
        stride = _pair(getattr(layer, "stride", None))
        dilation = _pair(getattr(layer, "dilation", 1)) or (1, 1)
        if stride is None or (stride, dilation) == ((1, 1), (1, 1)):
            continue
        text = f"stride {stride[0]}x{stride[1]}"
        if dilation != (1, 1):
            text += f" dilation {dilation[0]}x{dilation[1]}"
        found[unwrapped_name(name)] = text
    return found


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return (int(value[0]), int(value[1]))
    return None


def _pooling(pool: nn.Module) -> str:
    """Return the kind of a pooling layer, without a learned exponent."""
    name = type(pool).__name__
    if "AvgMax" in name or "Clip" in name:
        return name
    if "Avg" in name:
        return "average"
    if "GeneralizedMean" in name:
        exponent = getattr(pool, "p", None)
        fixed = f" of exponent {exponent:g}" if isinstance(exponent, float) else ""
        return f"generalized mean{fixed}"
    return "maximum" if "Max" in name else name


def _normalization(norm: nn.Module) -> str:
    """Return the kind of a normalization in evaluation, where all batch norms are one."""
    name = type(norm).__name__
    if "BatchNorm" in name:
        return f"batch norm with eps {getattr(norm, 'eps', 1e-5):g}"
    return "none" if isinstance(norm, nn.Identity) else str(norm)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(before, (int, float)) and isinstance(now, (int, float)):
        return math.isclose(before, now, rel_tol=_TOLERANCE)
    return bool(before == now)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "x".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value)
    if isinstance(value, bool):
        return "present" if value else "absent"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differing_layers(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [n for n in {**before, **now} if before.get(n) != now.get(n)]
    shown = [
        f"{name} has {before.get(name, 'stride 1x1')} in the weights, "
        f"{now.get(name, 'stride 1x1')} in the network"
        for name in names[:_SHOWN]
    ]
    more = f" and {len(names) - _SHOWN} more layers" if len(names) > _SHOWN else ""
    return "; ".join(shown) + more
