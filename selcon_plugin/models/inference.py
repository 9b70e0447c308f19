"""Inference with a trained network: images in, feature vectors out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from selcon_plugin.models.finite import check_state
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.state_keys import is_network_weight


class InferenceNetwork(nn.Module):
    """Network that maps normalized images to unit vectors, always in evaluation mode.

    Args:
        network: Maps images ``(B, 3, h, w)`` to vectors ``(B, D)``.
        preprocessing: Preprocessing of the images.
        method: Name of the method that trained the network; empty if it is not known.
        host: ``"fastreid"`` or ``"torchreid"``.

    Raises:
        ValueError: If the network does not return one finite vector per image.

    Attributes:
        dim: Length D of a vector.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        *,
        method: str = "",
        host: str,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocessing = preprocessing
        self.method = method
        self.host = host
        self.eval().requires_grad_(False)
        vectors = self._vectors(torch.zeros(1, 3, *preprocessing.size, device=self.device))
        if vectors.ndim != 2 or not bool(torch.isfinite(vectors).all()):
            raise ValueError(
                f"the {host} network returns no finite vector for an image of "
                f"{preprocessing.size[0]}x{preprocessing.size[1]}: got shape "
                f"{tuple(vectors.shape)}. Check weights and config"
            )
        self.dim = int(vectors.shape[1])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def _vectors(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.network(images)
        # FastReID's own heads keep the axes of the pooled map.
        return vectors.float().flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the features of a batch.

        Args:
            images: Images as :meth:`Preprocessing.normalize` returns them.

        Returns:
            Unit vectors in float32, shape ``(B, D)``.
        """
        return F.normalize(self._vectors(images), dim=1)

    @torch.inference_mode()
    def embed_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute the features of resized images.

        Args:
            pixels: Shape ``(B, height, width, 3)``, RGB.

        Returns:
            Unit vectors, shape ``(B, D)``.
        """
        on_device = torch.from_numpy(pixels).to(self.device)
        features: NDArray[np.float32] = (
            self(self.preprocessing.normalize(on_device)).cpu().numpy()
        )
        return features


# Last layers of classifying networks, in the hosts' models, torchvision's and timm's.
_CLASSIFIERS = ("classifier", "fc.weight", "fc.bias", "last_linear.", "head.fc.", "pixel_")


def load_all_tensors(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore_prefixes: tuple[str, ...] = (),
) -> None:
    """Load weights into a network: all that the network has, and all that the file has.

    Args:
        model: Network to load into.
        state: Tensors by name; a classifier that the network does not have is left out.
        source: File that they come from, for the message.
        ignore_prefixes: Prefixes of tensors that either side may lack.

    Raises:
        ValueError: If a tensor is missing, has another shape, or has no place in the
            network.
    """
    lacking, left, needed = _compare(model, state, ignore_prefixes)
    if lacking:
        raise ValueError(
            f"{source} is of another network: {len(lacking)} of {needed} tensors are "
            f"missing or have another shape, such as {lacking[0]}. Name the config, or the "
            "backbone, that the weights were trained with"
        )
    if left:
        raise ValueError(
            f"{source} is of another network: {len(left)} of its {len(state)} tensors have "
            f"no place in the network, such as {left[0]}. Name the config, or the "
            "backbone, that the weights were trained with"
        )
    own = model.state_dict()
    fits = {k: state[k] for k in own if k in state and state[k].shape == own[k].shape}
    fits = {k: v for k, v in fits.items() if not k.startswith(ignore_prefixes)}
    nn.Module.load_state_dict(model, {**own, **fits})
    check_state(model, when=f"weights from {source}")


def fits_exactly(
    model: nn.Module, state: Mapping[str, Tensor], ignore_prefixes: tuple[str, ...] = ()
) -> bool:
    """Return whether :func:`load_all_tensors` would load weights into a network.

    Args:
        model: Network, which may be on the device ``meta``.
        state: Tensors by name.
        ignore_prefixes: Prefixes of tensors that either side may lack.
    """
    lacking, left, _ = _compare(model, state, ignore_prefixes)
    return not lacking and not left


def _compare(
    model: nn.Module, state: Mapping[str, Tensor], ignore_prefixes: tuple[str, ...]
) -> tuple[list[str], list[str], int]:
    """Return the names that only network or only weights have, and how many it needs."""
    needed = {
        k: v for k, v in model.state_dict().items() if not k.startswith(ignore_prefixes)
    }
    lacking = [
        name
        for name, tensor in needed.items()
        if is_network_weight(name)
        and (name not in state or state[name].shape != tensor.shape)
    ]
    ignored = (*ignore_prefixes, *_CLASSIFIERS)
    left = [
        name
        for name in state
        if name not in needed and not name.startswith(ignored) and is_network_weight(name)
    ]
    return lacking, left, len(needed)
