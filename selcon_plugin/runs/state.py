"""What a run is besides its weights."""

from __future__ import annotations


class RunState:
    """What a run is besides its weights: the order of its images and its random streams.

    All randomness of a run follows from its seed and the iteration (sampler position, the
    augmentation of each sample, warm-up negatives, per-epoch seeds of every rank), so that
    a seed, a batch size and a list of images are the whole state. Resuming with another one
    would silently mix two runs: it is refused.

    Args:
        facts: What must not change between the parts of a run.
    """

    def __init__(self, **facts: str | int) -> None:
        self.facts = facts

    def state_dict(self) -> dict[str, str | int]:
        """Return the facts."""
        return dict(self.facts)

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Compare a checkpoint's facts with this run's.

        Args:
            state: What :meth:`state_dict` returned when the checkpoint was written.

        Raises:
            ValueError: If a fact differs; names it with both values.
        """
        differing = [
            f"{name} was {state[name]!r} and is {value!r}"
            for name, value in self.facts.items()
            if name in state and state[name] != value
        ]
        if differing:
            raise ValueError(
                f"cannot resume: {'; '.join(differing)}. Resume with the settings and "
                "images of the interrupted run, or begin a new one in another folder, with "
                "the old checkpoint as its weights"
            )
