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


def load_all_tensors(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore_prefixes: tuple[str, ...] = (),
) -> None:
    """Load weights into a network, and require every tensor that the network has.

    Args:
        model: Network to load into.
        state: Tensors by name; those that the network does not have are ignored.
        source: File that they come from, for the message.
        ignore_prefixes: Prefixes of tensors that may be missing.

    Raises:
        ValueError: If a tensor is missing or has another shape.
    """
    needed = {
        k: v for k, v in model.state_dict().items() if not k.startswith(ignore_prefixes)
    }
    fits = {k: state[k] for k in needed if k in state and state[k].shape == needed[k].shape}
    # Files have num_batches_tracked only since PyTorch 0.4.1, and only training reads it.
    lacking = [
        name
        for name in needed
        if name not in fits and not name.endswith("num_batches_tracked")
    ]
    if lacking:
        raise ValueError(
            f"{source} is of another network: {len(lacking)} of {len(needed)} tensors are "
            f"missing or have another shape, such as {lacking[0]}. Name the config, or the "
            "backbone, that the weights were trained with"
        )
    model.load_state_dict(fits, strict=False)
    check_state(model, when=f"weights from {source}")
