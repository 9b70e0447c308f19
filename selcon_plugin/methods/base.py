"""Base class of methods: banks, a loss that reads them, an update that writes them.

Every method handles a batch in these steps::

    losses = method.loss(embeddings, index, camids)   # READS the banks
    sum(losses.values()).backward()
    optimizer.step()
    method.update(index, embeddings)                  # WRITES the banks, once
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from selcon_plugin.clustering import OUTLIER, PseudoLabels
from selcon_plugin.features import Embeddings
from selcon_plugin.options import Option, check_options, options_of
from selcon_plugin.registry import Registry
from selcon_plugin.renamed import accept_renamed, rename_tensors

_METHODS: Registry[type[Method]] = Registry("method")
MethodClass = TypeVar("MethodClass", bound="type[Method]")


class Method(nn.Module, ABC):
    """Base of all methods.

    The whole state is in persistent buffers, so that a checkpoint of the model that
    contains the method is complete, and a resumed run continues bit-identically. A method
    never receives ground-truth identities.

    Args:
        num_images: Training images M; a bank row for each.
        global_dim: Global feature dimension C.
        num_parts: Parts S, 0 for none.
        part_dim: Part feature dimension D.

    Attributes:
        needs_clusters: Whether :meth:`prepare` requires pseudo-labels.
        needs_cameras: Whether the cameras of images must be known; checked by
            :meth:`check_cameras`.
        uses_parts: Whether part features are used; otherwise the head has no part branch.
        default_sampler: Sampling of batches unless the user sets another: ``"stream"`` for
            shuffled images, or a planner of :mod:`selcon_plugin.samplers.cluster`.
        collapse_remedy: Remedy in the warning that all features have become similar.
        labels: Cluster of each image, int64 ``(M,)``, -1 for outliers and where the method
            has no clusters.
        instance_level: Whether every image is its own class, because there are no clusters.
        epoch: Epoch in progress, counted from 0.
        step: Number of updates so far.
        prepared: Whether the banks have been filled.
    """

    needs_clusters: bool = False
    needs_cameras: ClassVar[bool] = False
    uses_parts: ClassVar[bool] = True
    default_sampler: ClassVar[str] = "stream"
    collapse_remedy: ClassVar[str] = "lower the learning rate"

    labels: Tensor
    _epoch: Tensor
    _step: Tensor
    _prepared: Tensor

    def __init__(
        self, num_images: int, global_dim: int, num_parts: int = 0, part_dim: int = 0
    ) -> None:
        super().__init__()
        if num_images < 1:
            raise ValueError(f"num_images must be 1 or more, got {num_images}")
        self.num_images = num_images
        self.global_dim = global_dim
        self.num_parts = num_parts
        self.part_dim = part_dim
        unlabeled = torch.full((num_images,), OUTLIER, dtype=torch.int64)
        self.register_buffer("labels", unlabeled)
        self.register_buffer("_epoch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_prepared", torch.zeros((), dtype=torch.bool))
        # These are plain copies of values in the buffers: reading a buffer on a GPU would
        # make every step wait for the device.
        self.epoch, self.step, self.prepared = 0, 0, False
        self.instance_level = False
        # Values that loss() passes to update() of the same step by remember(): number of
        # images and memo of each call. They are not part of the state.
        self._memos: list[tuple[int, Any]] = []
        self.register_load_state_dict_post_hook(self._read_counters)  # type: ignore[no-untyped-call, unused-ignore]

    @staticmethod
    def _read_counters(module: nn.Module, _incompatible: Any) -> None:
        assert isinstance(module, Method)
        module.epoch = int(module._epoch)
        module.step = int(module._step)
        module.prepared = bool(module._prepared)
        module._read_labels()

    def _read_labels(self) -> None:
        """Update the attributes that follow from the labels, also after a checkpoint."""
        # In both cases they are derived from the labels, so that a resumed run has the same
        # values as an uninterrupted one: a labeler that makes singletons of outliers may
        # also find nothing else.
        every = torch.arange(self.num_images, device=self.labels.device)
        self.instance_level = torch.equal(self.labels, every)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # Called for this module before its children: what changes here they see.
        rename_tensors(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch that starts, counted from 0."""
        self.epoch = epoch
        self._epoch.fill_(epoch)

    def _set_labels(self, pseudo_labels: PseudoLabels | None) -> PseudoLabels:
        """Store the labels; ``prepare`` of a method that clusters calls this."""
        if pseudo_labels is None or pseudo_labels.num_images != self.num_images:
            given = pseudo_labels
            raise ValueError(
                f"{type(self).__name__} needs pseudo-labels of its {self.num_images} "
                f"images, got {'none' if given is None else f'those of {given.num_images}'}"
            )
        self.labels.copy_(pseudo_labels.labels)
        self._read_labels()
        return pseudo_labels

    def _finish_prepare(self) -> None:
        self.prepared = True
        self._prepared.fill_(True)

    def _finish_update(self) -> None:
        self.step += 1
        self._step.fill_(self.step)

    def remember(self, index: Tensor, memo: Any) -> None:
        """Pass a value from :meth:`loss` to :meth:`update` of the same step.

        This is for methods whose write depends on the loss: they call ``remember`` in
        ``loss`` and :meth:`recall` in ``update``. The values of a skipped step are never
        recalled.

        Args:
            index: As passed to :meth:`loss`.
            memo: Any value without gradient.
        """
        self._memos.append((len(index), memo))

    def recall(self, index: Tensor) -> list[Any]:
        """Remove and return the values that :meth:`loss` remembered, one for each call.

        Args:
            index: As passed to :meth:`update`.

        Returns:
            The memos in the order of the calls.

        Raises:
            RuntimeError: If the number of their images differs from the batch's: ``loss``
                was not called, or was called for a step that was not taken (see
                :meth:`take_memos`).
        """
        memos = self.take_memos()
        if sum(size for size, _ in memos) != len(index):
            raise RuntimeError("update() must follow loss() of the same batch")
        return [memo for _, memo in memos]

    def take_memos(self) -> list[tuple[int, Any]]:
        """Remove and return everything that was remembered since the last call.

        The engine keeps it with the batch until the step is taken, and then passes it to
        :meth:`return_memos`. A custom training loop calls this to skip a step.

        Returns:
            Number of images and memo of each call of :meth:`loss`; empty for a method that
            remembers nothing.
        """
        taken, self._memos = self._memos, []
        return taken

    def return_memos(self, memos: Sequence[tuple[int, Any]]) -> None:
        """Restore the result of :meth:`take_memos`, right before :meth:`update`.

        Args:
            memos: Memos of the batch that is to be written.
        """
        self._memos = list(memos)

    def check_cameras(self, camids: Tensor | None) -> None:
        """Refuse images without camera ids if the method requires them.

        Args:
            camids: Camera of each image, int64 ``(M,)``, -1 where unknown; or None.

        Raises:
            ValueError: If cameras are needed and none is known.
        """
        if self.needs_cameras and (camids is None or not bool((camids >= 0).any())):
            raise ValueError(
                f"{type(self).__name__} learns from the camera of each image, and no "
                "camera is known here: provide camera ids (for a folder of images "
                "--camera-pattern), or choose a method that needs none"
            )

    def clustering_features(self) -> Tensor | None:
        """Return features ``(M, C)`` to be clustered instead of newly extracted ones.

        Most methods return None, so that features are extracted. A method that clusters its
        own bank returns it once it is prepared; its :meth:`prepare` then gets the bank as
        the embeddings.
        """
        return None

    def image_features(self) -> Tensor | None:
        """Return the method's stored features of all images, ``(M, C)``, or None.

        They are monitored for a collapse if nothing is clustered.
        """
        return None

    def make_views(self, images: Tensor) -> tuple[Tensor, ...]:
        """Create further views of a training batch for :meth:`loss`.

        Args:
            images: The augmented batch, RGB on the scale 0..255, shape ``(B, 3, H, W)``.

        Returns:
            Batches of the same shape and scale; empty unless a method overrides this.
        """
        return ()

    @abstractmethod
    def prepare(
        self,
        embeddings: Embeddings,
        camids: Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Fill or rebuild the banks from the features of all training images.

        It is called once before training, and for methods that cluster in each epoch.

        Args:
            embeddings: Features of images 0..M-1 in order, ``(M, C)`` and ``(M, S, D)``.
            camids: Camera of each image, int64 ``(M,)``, -1 where unknown; None if no
                camera is known.
            pseudo_labels: Clusters of the images for methods with ``needs_clusters``.
        """

    @abstractmethod
    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Compute the training losses of a batch; only read the banks.

        It is called once per step, or several times if gradients are accumulated.

        Args:
            embeddings: Features of the batch, with gradient.
            index: Index of each training image, int64, shape ``(B,)``.
            camids: Camera of each image, int64, shape ``(B,)``, or None.
            *views: Features of the views of :meth:`make_views`, with gradient; a method
                without views need not accept them.

        Returns:
            Scalars by name; training minimizes their sum.
        """

    @abstractmethod
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write a batch into the banks; called once, after the optimizer step.

        In a distributed run the batches of all ranks are gathered first, so that the banks
        stay identical on every rank.

        Args:
            index: As passed to :meth:`loss`; the batches of several calls are concatenated.
            embeddings: As passed to :meth:`loss`; gradients are ignored.
        """

    def diagnostics(self) -> dict[str, float]:
        """Return metrics for the log, computed from the last batch and the banks."""
        return {}

    def selected_positives(self) -> tuple[Tensor, Tensor] | None:
        """Return the last batch's anchors ``(B,)`` and their neighbors ``(B, K)``.

        The result is None if the method has no neighbors per image, or none yet. It is used
        by diagnostics that know the identities, but not by training.
        """
        return None


def register_method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Class decorator: make a method available to :func:`build_method` under ``name``."""
    return _METHODS.register(name)


def method_names() -> list[str]:
    """Return the names of all registered methods."""
    return _METHODS.names()


def method_class(name: str) -> type[Method]:
    """Return the class registered under ``name``."""
    return _METHODS[name]


def method_options(name: str) -> dict[str, Option]:
    """Return the options of the method registered under ``name``."""
    return options_of(method_class(name))


def build_method(
    name: str,
    num_images: int,
    global_dim: int,
    num_parts: int = 0,
    part_dim: int = 0,
    **options: Any,
) -> Method:
    """Build a method by name, with its options checked.

    Args:
        name: Registered name, for instance ``"SelectiveContrastive"``.
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Parts S, 0 for none.
        part_dim: Part feature dimension D.
        **options: The method's keyword options; those left out keep their defaults.

    Returns:
        The method, its banks still empty.

    Example:
        >>> method = build_method("SelectiveContrastive", 100, 64, 4, 16, temperature=0.2)
        >>> method.prepared
        False
    """
    cls = method_class(name)
    checked = check_options(options_of(cls), accept_renamed(options), owner=name)
    return cls(num_images, global_dim, num_parts, part_dim, **checked)
