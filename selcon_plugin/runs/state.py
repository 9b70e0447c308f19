"""Metadata and settings of a run that a resumed run must match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selcon_plugin.runs.settings import differing_settings, fixed_settings, shown_settings

_SETTINGS = "settings"


class RunState:
    """Metadata of a run that define the order of its images and its random streams.

    All randomness of a run is a function of its seed and the iteration (sampler position,
    the augmentation of each sample, warm-up negatives, per-epoch seeds of every rank), so
    a seed, a batch size and a list of images are the complete state. Resuming with
    different values would silently mix two runs, so it is refused.

    Args:
        settings: All settings of the run by full keys; see
            :func:`~selcon_plugin.runs.settings.differing_settings`.
        **metadata: Values that must not change when a run is resumed.
    """

    def __init__(
        self,
        settings: Mapping[str, Any] | None = None,
        **metadata: str | int,
    ) -> None:
        self.settings = fixed_settings(settings or {})
        self.metadata = metadata

    def state_dict(self) -> dict[str, Any]:
        """Return the metadata and the settings."""
        state: dict[str, Any] = dict(self.metadata)
        if self.settings:
            state[_SETTINGS] = self.settings
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare metadata and settings of a checkpoint with those of this run.

        Args:
            state: Result of :meth:`state_dict` when the checkpoint was written.

        Raises:
            ValueError: If a value differs; the message holds its name and both values.
        """
        differing = {
            name: (state[name], value)
            for name, value in self.metadata.items()
            if name in state and state[name] != value
        }
        differing |= differing_settings(state.get(_SETTINGS) or {}, self.settings)
        if differing:
            raise ValueError(
                f"cannot resume: {shown_settings(differing, 'was', 'and is')}. Resume with "
                "the settings and images of the interrupted run, or start a new run in "
                "another folder with the old checkpoint as its weights"
            )
