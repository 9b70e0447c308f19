"""Metadata of a run that a resumed run must match."""

from __future__ import annotations


class RunState:
    """Metadata of a run that define the order of its images and its random streams.

    All randomness of a run is a function of its seed and the iteration (sampler position,
    the augmentation of each sample, warm-up negatives, per-epoch seeds of every rank), so
    a seed, a batch size and a list of images are the complete state. Resuming with
    different values would silently mix two runs, so it is refused.

    Args:
        metadata: Values that must not change when a run is resumed.
    """

    def __init__(self, **metadata: str | int) -> None:
        self.metadata = metadata

    def state_dict(self) -> dict[str, str | int]:
        """Return the metadata."""
        return dict(self.metadata)

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Compare the metadata of a checkpoint with those of this run.

        Args:
            state: Result of :meth:`state_dict` when the checkpoint was written.

        Raises:
            ValueError: If a value differs; the message holds its name and both values.
        """
        differing = [
            f"{name} was {state[name]!r} and is {value!r}"
            for name, value in self.metadata.items()
            if name in state and state[name] != value
        ]
        if differing:
            raise ValueError(
                f"cannot resume: {'; '.join(differing)}. Resume with the settings and "
                "images of the interrupted run, or start a new run in another folder with "
                "the old checkpoint as its weights"
            )
