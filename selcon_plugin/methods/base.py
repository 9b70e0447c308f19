"""What a method is: banks, a loss that reads them, an update that writes them.

The way of one batch, whatever the method::

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

    The whole state is persistent buffers, so that a checkpoint of the model around it holds
    everything and a resumed run goes on exactly where it stopped. A method never sees an
    identity.

    Args:
        num_images: Training images M; a bank row for each.
        global_dim: Global feature dimension C.
        num_parts: Parts S, 0 for none.
        part_dim: Part feature dimension D.

    Attributes:
        needs_clusters: Whether :meth:`prepare` wants pseudo-labels.
        needs_cameras: Whether the cameras of images must be known; checked by
            :meth:`check_cameras`.
        uses_parts: Whether part features are used; without, the head builds none.
        default_sampler: How batches are drawn unless the user says otherwise: ``"stream"``
            for shuffled images, else a planner of :mod:`selcon_plugin.samplers.cluster`.
        collapse_remedy: What to do if all features become alike, for the warning.
        labels: Cluster of each image, int64 ``(M,)``, -1 for outliers and where the method
            has no clusters.
        instance_level: Whether the labels make every image its own class, for want of
            clusters.
        epoch: Epoch in progress, counted from 0.
        step: Updates done so far.
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
        # Plain copies of what follows from the buffers: reading a buffer on a GPU would
        # make every step wait for the device.
        self.epoch, self.step, self.prepared = 0, 0, False
        self.instance_level = False
        # What loss() handed to update() of the same step, by remember(): not state. Number
        # of images and memo of each call.
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
        """Note what follows from the labels; after they are set, and after a checkpoint."""
        # From the labels in either case, so that a resumed run sees what the unbroken one
        # saw: a labeler that makes singletons of outliers may find nothing else, too.
        every = torch.arange(self.num_images, device=self.labels.device)
        self.instance_level = torch.equal(self.labels, every)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # Called for this module before its children: what changes here they see.
        rename_tensors(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def start_epoch(self, epoch: int) -> None:
        """Tell the method which epoch begins, counted from 0."""
        self.epoch = epoch
        self._epoch.fill_(epoch)

    def _set_labels(self, pseudo_labels: PseudoLabels | None) -> PseudoLabels:
        """Keep the labels as state; part of ``prepare`` of a method that clusters."""
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
        """Hand what :meth:`loss` found to :meth:`update` of the same step.

        For methods that write what they read with: ``remember`` in ``loss``, :meth:`recall`
        in ``update``. What belongs to a step that is skipped is never recalled.

        Args:
            index: As given to :meth:`loss`.
            memo: Anything, without gradient.
        """
        self._memos.append((len(index), memo))

    def recall(self, index: Tensor) -> list[Any]:
        """Take what :meth:`loss` remembered of the batch, a memo for each call of it.

        Args:
            index: As given to :meth:`update`.

        Returns:
            The memos in the order of the calls.

        Raises:
            RuntimeError: If they are not those of as many images: ``loss`` was not called,
                or was called for a step that was not taken (see :meth:`take_memos`).
        """
        memos = self.take_memos()
        if sum(size for size, _ in memos) != len(index):
            raise RuntimeError("update() must follow loss() of the same batch")
        return [memo for _, memo in memos]

    def take_memos(self) -> list[tuple[int, Any]]:
        """Take away what was remembered since the last call.

        The engine keeps it beside the batch until the step is taken, and then gives it to
        :meth:`return_memos`. A loop of your own calls this to skip a step.

        Returns:
            Number of images and memo of each call of :meth:`loss`; empty for a method that
            remembers nothing.
        """
        taken, self._memos = self._memos, []
        return taken

    def return_memos(self, memos: Sequence[tuple[int, Any]]) -> None:
        """Give back what :meth:`take_memos` took, right before :meth:`update`.

        Args:
            memos: Those of the batch that is to be written.
        """
        self._memos = list(memos)

    def check_cameras(self, camids: Tensor | None) -> None:
        """Refuse images without camera ids if the method cannot do without.

        Args:
            camids: Camera of each image, int64 ``(M,)``, -1 where unknown; or None.

        Raises:
            ValueError: If cameras are needed and none is known.
        """
        if self.needs_cameras and (camids is None or not bool((camids >= 0).any())):
            raise ValueError(
                f"{type(self).__name__} learns from the camera of each image, and no "
                "camera is known here: give camera ids (for a folder of images "
                "--camera-pattern), or choose a method without"
            )

    def clustering_features(self) -> Tensor | None:
        """Return features ``(M, C)`` to be clustered in place of freshly extracted ones.

        None, the rule, to extract. A method that clusters its own bank returns it once it
        is prepared; its :meth:`prepare` then gets the bank as the embeddings.
        """
        return None

    def image_features(self) -> Tensor | None:
        """Return the features of all images that the method keeps, ``(M, C)``, if it does.

        They are watched for a collapse where nothing is clustered.
        """
        return None

    def make_views(self, images: Tensor) -> tuple[Tensor, ...]:
        """Make further views of a training batch, for :meth:`loss` to compare.

        Args:
            images: The augmented batch, RGB on the scale 0..255, shape ``(B, 3, H, W)``.

        Returns:
            Batches of the same shape and scale; none unless a method says otherwise.
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

        Called once before training, and again each epoch by methods that cluster.

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
        """Compute the training losses of a batch; reads the banks and never writes them.

        Called once per step, or several times where gradients are accumulated.

        Args:
            embeddings: Features of the batch, with gradient.
            index: Which training image each is, int64, shape ``(B,)``.
            camids: Camera of each image, int64, shape ``(B,)``, or None.
            *views: Features of what :meth:`make_views` made of the batch, with gradient; a
                method that makes none need not take them.

        Returns:
            Scalars by name; training minimizes their sum.
        """

    @abstractmethod
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write a batch into the banks; once, after the optimizer step.

        In a distributed run the batches of all ranks are gathered first, so that the banks
        stay identical on every rank.

        Args:
            index: As given to :meth:`loss`; the batches of several calls joined.
            embeddings: As given to :meth:`loss`; gradients are ignored.
        """

    def diagnostics(self) -> dict[str, float]:
        """Report what a user watches during training, from the last batch and the banks."""
        return {}

    def selected_positives(self) -> tuple[Tensor, Tensor] | None:
        """Return the last batch's anchors ``(B,)`` and their neighbors ``(B, K)``.

        None where the method has no per-image neighbors, or none yet. Used by diagnostics
        that know the identities; training does not look at it.
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
