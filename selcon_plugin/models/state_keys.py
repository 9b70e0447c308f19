"""Names in the state dict of a network in training, and the network's own weights in it.

Beside backbone and head it holds the method with its banks and, if there is one, the
teacher.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from selcon_plugin.io.tensor_names import unwrapped_name, unwrapped_state

METHOD_PREFIX = "method."
TEACHER_PREFIX = "teacher."
# Prefixes of the modules that a run adds to the network.
RUN_PREFIXES = (METHOD_PREFIX, TEACHER_PREFIX)
# The teacher's copies of backbone and head.
_TEACHER_WEIGHTS = f"{TEACHER_PREFIX}module."


def is_method_state(name: str) -> bool:
    """Return whether a tensor is a bank, the labels or a counter of the method."""
    return unwrapped_name(name).startswith(METHOD_PREFIX)


def is_network_weight(name: str) -> bool:
    """Return whether a network cannot be evaluated without a tensor."""
    plain = unwrapped_name(name)
    # Files have num_batches_tracked only since PyTorch 0.4.1, and only training reads it.
    return not plain.startswith(RUN_PREFIXES) and not plain.endswith("num_batches_tracked")


def without_method(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of network and teacher, without banks and labels.

    Args:
        state: Tensors by name.

    Returns:
        The others under the names that they have, with PyTorch's metadata.
    """
    kept = OrderedDict((k, v) for k, v in state.items() if not is_method_state(k))
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:  # the architecture is in it
        kept._metadata = metadata  # type: ignore[attr-defined]
    return kept


def network_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a trained network is evaluated with.

    Args:
        state: State of a network in training, or of any other network.

    Returns:
        Tensors of backbone and head: the teacher's where it has one, otherwise the
        student's. The names have no prefix of data parallelism or of the teacher.

    Example:
        >>> state = {"module.heads.w": 1, "module.teacher.module.heads.w": 2, "method.b": 3}
        >>> network_weights(state)
        {'heads.w': 2}
    """
    plain = unwrapped_state(state)
    student = {k: v for k, v in plain.items() if not k.startswith(RUN_PREFIXES)}
    teacher = {
        name.removeprefix(_TEACHER_WEIGHTS): tensor
        for name, tensor in plain.items()
        if name.startswith(_TEACHER_WEIGHTS)
    }
    return student | teacher
