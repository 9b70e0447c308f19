"""Neighborhood sizes that a labeler leaves open, by the number of images per person."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from selcon_plugin.clustering.auto_threshold import check_hint, estimate_images_per_person
from selcon_plugin.clustering.neighborhood import NeighborhoodSizes

# Name of the measurement that a labeler reports.
MEASURED = "images_per_person"


class AutoSizes:
    """Sizes some of which are "auto": they follow the number of images per person.

    Args:
        hint: The number of images per person, or "auto" to estimate it.
        given: Value of each attribute of :class:`NeighborhoodSizes` that the labeler has,
            or "auto".

    Raises:
        ValueError: If a hint is given and no size is "auto".
    """

    def __init__(self, hint: float | str, given: Mapping[str, int | str]) -> None:
        check_hint(hint, given)
        self._hint = hint
        self._fixed: dict[str, Any] = {
            n: size for n, size in given.items() if size != "auto"
        }
        self._is_open = len(self._fixed) < len(given)

    def choose(self, features: Tensor) -> tuple[NeighborhoodSizes, dict[str, float]]:
        """Choose the sizes for images.

        Args:
            features: Unit vectors ``(M, C)``, on any device.

        Returns:
            The sizes, and the number of images per person as a measurement, if it was used.
        """
        measured: dict[str, float] = {}
        if self._is_open:
            hint = self._hint
            measured[MEASURED] = (
                estimate_images_per_person(features) if isinstance(hint, str) else hint
            )
        return self.chosen(measured), measured

    def chosen(self, measured: Mapping[str, float]) -> NeighborhoodSizes:
        """Return the sizes that a clustering has used.

        Args:
            measured: Measurements of that clustering.
        """
        sizes = NeighborhoodSizes()
        if self._is_open:
            sizes = NeighborhoodSizes.for_people(measured[MEASURED])
        return replace(sizes, **self._fixed)
