"""Network that describes itself in its checkpoints, and loads only its own architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selcon_plugin.io.tensor_names import unwrapped_state
from selcon_plugin.models.architecture import (
    RECORD,
    check_architecture,
    describe_head,
    layer_strides,
    recorded_architecture,
)
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.state_keys import is_network_weight


class DescribedNetwork(nn.Module):
    """Network of a backbone and a head, whose state dict has its architecture.

    Args:
        preprocessing: Size of the images, and mean and standard deviation of their
            channels.

    Attributes:
        preprocessing: As above.
        own_properties: What a host knows about the network beyond its layers: ``host``,
            ``backbone``, ``method``. A property of :meth:`architecture` that is None here
            is not known yet: it is taken from the weights, or set by :meth:`set_input`.
        global_distance_weight: Weight of the global feature in the test feature.
    """

    backbone: nn.Module
    heads: Any
    pixel_mean: Tensor
    pixel_std: Tensor
    global_distance_weight: float

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.own_properties: dict[str, Any] = {}
        self.global_distance_weight = 0.5
        for name, values in (
            ("pixel_mean", preprocessing.pixel_mean),
            ("pixel_std", preprocessing.pixel_std),
        ):
            column = torch.tensor(values).view(1, -1, 1, 1)
            self.register_buffer(name, column, persistent=False)

    def set_input(self, preprocessing: Preprocessing, global_weight: float) -> None:
        """Set what a network built only by its name does not know.

        Args:
            preprocessing: Size of the images, and how the host's loader normalizes them.
            global_weight: Weight of the global feature in the test feature.
        """
        self.preprocessing = preprocessing
        for buffer, values in (
            (self.pixel_mean, preprocessing.pixel_mean),
            (self.pixel_std, preprocessing.pixel_std),
        ):
            new = torch.tensor(values, device=buffer.device).view_as(buffer)
            if not torch.allclose(buffer, new):  # constants may be rounded otherwise
                buffer.copy_(new)
        self.global_distance_weight = global_weight
        for name in [name for name, value in self.own_properties.items() if value is None]:
            del self.own_properties[name]

    def architecture(self) -> dict[str, Any]:
        """Describe the network, for its checkpoints.

        Returns:
            Numbers, text and containers by name; see
            :mod:`selcon_plugin.models.architecture`.
        """
        head = describe_head(self.heads)
        return {
            "network": type(self).__name__,
            **head,
            "strides": layer_strides(self.backbone),
            "input_size": list(self.preprocessing.size),
            "pixel_mean": [float(value) for value in self.preprocessing.pixel_mean],
            "pixel_std": [float(value) for value in self.preprocessing.pixel_std],
            "global_weight": float(self.global_distance_weight) if head["parts"] else None,
            **self.own_properties,
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights, all of them, into the architecture that they were trained with.

        Args:
            state_dict: Tensors by name. What wrappers of PyTorch add to names is removed.
            strict: Whether names and shapes must agree; without it, those of the method and
                the teacher may differ.
            assign: Whether the tensors themselves replace those of the network.

        Returns:
            Missing and unexpected names, as PyTorch does.

        Raises:
            ArchitectureMismatchError: If the weights carry another architecture.
            ValueError: If backbone or head would be loaded in part.
        """  # noqa: DOC502  (raised by the functions called here)
        state = unwrapped_state(state_dict)
        found = super().load_state_dict(state, strict=strict, assign=assign)
        for names, what in (
            (found.missing_keys, "are missing, or of another shape"),
            (found.unexpected_keys, "have no place in it"),
        ):
            own = [name for name in names if is_network_weight(name)]
            if own:
                raise ValueError(
                    f"the weights are of another network: {len(own)} tensors {what}, such "
                    f"as {own[0]}. Build the network with the config of their training"
                )
        return found

    def check_record(
        self, recorded: Mapping[str, Any], source: str, *, ignore: Sequence[str] = ()
    ) -> None:
        """Refuse weights of another architecture, and take over what is not known yet.

        Args:
            recorded: Architecture of the weights; empty if it is not known.
            source: File of the weights, for the message.
            ignore: Properties that may differ.

        Raises:
            ArchitectureMismatchError: If a property differs.
        """  # noqa: DOC502  (raised by the functions called here)
        check_architecture(recorded, self.architecture(), source, ignore=ignore)
        weight = recorded.get("global_weight")
        if (
            isinstance(weight, float)
            and self.own_properties.get("global_weight", weight) is None
        ):
            self.global_distance_weight = weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]][RECORD] = self.architecture()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        # It runs before that of the layers: nothing is loaded from another architecture.
        self.check_record(recorded_architecture(local_metadata), "the state dict")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
