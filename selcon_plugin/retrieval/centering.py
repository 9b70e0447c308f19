"""Features of an index, centered per camera."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selcon_plugin.clustering.camera_centering import MIN_IMAGES_PER_CAMERA, camera_shifts
from selcon_plugin.retrieval.rows import Snapshot

_ROWS_AT_ONCE = 16_384


class CenteredFeatures:
    """Features ``(N, D)`` of an index, centered per camera when they are read.

    The offset of :func:`selcon_plugin.clustering.camera_centering.center_cameras`, computed
    from the images that are not removed, is added to each row, and the result is
    normalized.

    Args:
        state: The index.

    Raises:
        ValueError: If fewer than two cameras have 100 images.
    """

    def __init__(self, state: Snapshot) -> None:
        self._features = state.features
        self.shape = state.features.shape
        self._number: dict[str | None, int] = {}
        for name in state.camera_names:
            self._number[name] = len(self._number)
        # Images of unknown camera have the last number, whose offset is 0.
        self._camera_of = self._numbers(state.cameras)
        sums, counts = self._sums(np.flatnonzero(state.live))
        means = sums / np.maximum(counts, 1)[:, None]
        ids = torch.arange(len(counts))
        ids[-1] = -1
        shifts = camera_shifts(ids, torch.from_numpy(counts), torch.from_numpy(means))
        self._shifts: NDArray[np.float32] = shifts.numpy().astype(np.float32)
        if (counts[:-1] >= MIN_IMAGES_PER_CAMERA).sum() < 2:
            images = [f"{name} {counts[number]}" for name, number in self._number.items()]
            raise ValueError(
                "centering needs at least two cameras with at least "
                f"{MIN_IMAGES_PER_CAMERA} images, and the index has "
                f"{', '.join(images[:20]) or 'no known camera'}: search without centering"
            )

    def _numbers(self, cameras: Sequence[str | None] | NDArray[Any]) -> NDArray[np.int64]:
        unknown = len(self._number)
        numbers = [self._number.get(name or "", unknown) for name in cameras]
        return np.array(numbers, dtype=np.int64)

    def _sums(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return the sum of the features of each camera, and its number of images."""
        kinds = len(self._number) + 1
        sums = np.zeros((kinds, self.shape[1]))
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE]
            is_of = np.arange(kinds)[:, None] == self._camera_of[block]
            sums += is_of.astype(np.float32) @ self._features[block].astype(np.float32)
        return sums, np.bincount(self._camera_of[rows], minlength=kinds)

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """Return centered rows, by slice or by numbers in ascending order."""
        features = self._features[rows].astype(np.float32)
        return _unit(features + self._shifts[self._camera_of[rows]])

    def center(
        self, queries: NDArray[np.float32], cameras: Sequence[str | None]
    ) -> NDArray[np.float32]:
        """Center the features of queries with the offsets of the index.

        Args:
            queries: Unit vectors ``(Q, D)``.
            cameras: Camera of each query; None where unknown: its feature stays as it is.

        Returns:
            Unit vectors ``(Q, D)``.
        """
        return _unit(queries + self._shifts[self._numbers(cameras)])


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    result: NDArray[np.float32] = rows / np.maximum(lengths, np.float32(1e-12))
    return result
