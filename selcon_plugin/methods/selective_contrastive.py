"""Selective Contrastive Learning (SCL): every image its own class, plus its neighbors.

START HERE to see one training step. There are no clusters and no identities: an image's
positives are its own row and its K nearest rows, and its negatives are the next N rows.
They are ranked on every batch against current banks of global and part features; the loss
compares features with the mixture bank.

Pang et al., "Fully Unsupervised Person Re-identification via Selective Contrastive
Learning", 2020. https://arxiv.org/abs/2010.07608
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from selcon_plugin.clustering import PseudoLabels, nearest_by_distance
from selcon_plugin.distance import fused_distance
from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import SelectiveContrastiveLoss
from selcon_plugin.losses.camera_weights import CAMERA_WEIGHTS, CameraWeighting
from selcon_plugin.memory.tri_bank import TriBankMemory
from selcon_plugin.methods.base import Method, register_method
from selcon_plugin.options import Choice, Interval, options_of
from selcon_plugin.selection import (
    Selection,
    draw_random_negatives,
    prefer_listed,
    select_among,
    select_neighbors,
    select_within_clusters,
    step_generator,
)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_UNKNOWN_CAMERA = -1
NEGATIVE_CAMERAS = ("all", "own", "unbiased")
# Stored Jaccard neighbors per requested positive: the camera term reorders them.
_LISTED_PER_NEIGHBOR = 4


@register_method("SelectiveContrastive")
class SelectiveContrastive(Method):
    """Selective Contrastive Learning.

    The method differs from the released code where that code differs from the paper's
    equations: the gradient is the true gradient of the loss, because the mixture bank is
    written after the step and not during the backward pass; and warm-up negatives never
    include the own row.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Parts S, 0 for none.
        part_dim: Part feature dimension D.
        selection: Ranking of the candidates. ``"distance"``: the fused distance on every
            batch, as in the paper. ``"jaccard"``: the Jaccard distance of the last
            clustering, then the fused distance. ``"cluster"``: the fused distance, with
            positives only from the own cluster and negatives from outside it. The last two
            need clusters.
        num_neighbors: K, neighbors that are positives.
        num_negatives: N, the next nearest rows, which are negatives.
        self_weight: λ_t, weight of the image's own row. Small values lead to a collapse.
        neighbor_scale: α, factor on the weight shared by the neighbors.
        part_loss_weight: λ_p, weight of the parts' loss; the global loss has 1 - λ_p.
        global_distance_weight: λ_g, weight of the global distance in the ranking.
        same_camera_penalty: λ_c, added to the distance of images from one camera.
        negative_cameras: Cameras whose images may be negatives: ``"all"``; ``"own"``, only
            that of the image, so that discriminating cameras does not lower the loss; or
            ``"unbiased"``, all, but against positives of the own camera only those of the
            own camera. Images of unknown camera have negatives from all. This does not
            apply during warm-up.
        temperature: τ, by which similarities are divided.
        bank_momentum: Weight of the old row when a bank is written.
        mixture_update: Mixture rows that an image writes: those of all its ``"positives"``
            or only its own, ``"self"``.
        normalize_parts: Whether the concatenated parts are scaled to unit length before
            loss and mixture bank. In the released code their norm is √S.
        warmup_epochs: Epochs at the start, in which the only positive is the image itself
            and negatives are random.
        camera_weight: Weight of a sample by the cameras that see its cluster, as in
            :class:`ClusterMethod`; needs clusters.
        focal_gamma: Exponent of the focal factor: images that already match their positives
            count less; 0 for none.
        bank_dtype: Type of the banks; half precision halves their memory.
        seed: Seed of the warm-up's random negatives.

    Raises:
        ValueError: If ``camera_weight`` is set without clusters.
    """

    collapse_remedy = (
        "raise self_weight (0.5 is the default; a small weight lets neighbors pull each "
        "other together) or lower the learning rate"
    )

    _bank_camids: Tensor
    _listed_index: Tensor
    _listed_distance: Tensor

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        selection: Annotated[str, Choice(("distance", "jaccard", "cluster"))] = "distance",
        num_neighbors: Annotated[int, Interval(0)] = 7,
        num_negatives: Annotated[int, Interval(1)] = 500,
        self_weight: Annotated[float, Interval(0, 1, above=True)] = 0.5,
        neighbor_scale: Annotated[float, Interval(0)] = 1.75,
        part_loss_weight: Annotated[float, Interval(0, 1)] = 0.5,
        global_distance_weight: Annotated[float, Interval(0, 1)] = 0.5,
        same_camera_penalty: Annotated[float, Interval(0)] = 0.05,
        negative_cameras: Annotated[str, Choice(NEGATIVE_CAMERAS)] = "all",
        temperature: Annotated[float, Interval(0, above=True)] = 0.1,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.5,
        mixture_update: Annotated[str, Choice(("positives", "self"))] = "positives",
        normalize_parts: bool = False,
        warmup_epochs: Annotated[int, Interval(0)] = 3,
        camera_weight: Annotated[str, Choice(CAMERA_WEIGHTS)] = "none",
        focal_gamma: Annotated[float, Interval(0)] = 0.0,
        bank_dtype: Annotated[str, Choice(tuple(_DTYPES))] = "float32",
        seed: Annotated[int, Interval(0)] = 0,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim)
        self.needs_clusters = selection != "distance"
        if camera_weight != "none" and not self.needs_clusters:
            raise ValueError(
                f"camera_weight {camera_weight!r} needs clusters: set selection to "
                "'jaccard' or 'cluster'"
            )
        self.selection = selection
        self.num_neighbors = num_neighbors
        self.num_negatives = num_negatives
        self._counts = self._fitting_counts()
        self.part_loss_weight = part_loss_weight
        self.global_distance_weight = global_distance_weight
        self.same_camera_penalty = same_camera_penalty
        self.negative_cameras = negative_cameras
        self.warmup_epochs = warmup_epochs
        self.seed = seed
        self.criterion = SelectiveContrastiveLoss(
            num_neighbors, self_weight, neighbor_scale, temperature, focal_gamma
        )
        self.memory = TriBankMemory(
            num_images,
            global_dim,
            num_parts,
            part_dim,
            momentum=bank_momentum,
            mixture_update=mixture_update,  # type: ignore[arg-type]
            normalize_parts=normalize_parts,
            dtype=_DTYPES[bank_dtype],
        )
        unknown = torch.full((num_images,), _UNKNOWN_CAMERA, dtype=torch.int64)
        self.register_buffer("_bank_camids", unknown)
        self.camera_weighting = CameraWeighting(num_images, camera_weight)
        if selection == "jaccard":
            listed = max(1, _LISTED_PER_NEIGHBOR * num_neighbors)
            self.register_buffer(
                "_listed_index", torch.zeros(num_images, listed, dtype=torch.int64)
            )
            self.register_buffer("_listed_distance", torch.ones(num_images, listed))
        # The selection of the last batch is for diagnostics, and not part of the state.
        self._last: Selection | None = None

    def prepare(
        self,
        embeddings: Embeddings,
        camids: Tensor | None,
        pseudo_labels: PseudoLabels | None = None,
    ) -> None:
        """Fill the ranking banks, store cameras and clusters, zero the mixture bank once.

        If a run clusters again, its mixture bank is kept, because it was learned.
        """
        mixture_bank = self.memory.mixture_bank.clone() if self.prepared else None
        self.memory.initialize(*embeddings)
        if mixture_bank is not None:
            self.memory.mixture_bank.copy_(mixture_bank)
        self._bank_camids.fill_(_UNKNOWN_CAMERA)
        if camids is not None:
            self._bank_camids.copy_(camids)
        if self.needs_clusters:
            self._note_clusters(self._set_labels(pseudo_labels), camids)
        self._finish_prepare()

    def _note_clusters(self, pseudo_labels: PseudoLabels, camids: Tensor | None) -> None:
        self.camera_weighting.prepare(self.labels, camids)
        if self.selection == "jaccard":
            index, distance = nearest_by_distance(
                pseudo_labels, self._listed_index.shape[1]
            )
            self._listed_index.copy_(index)
            self._listed_distance.copy_(distance)

    def loss(
        self,
        embeddings: Embeddings,
        index: Tensor,
        camids: Tensor | None,
        *views: Embeddings,
    ) -> dict[str, Tensor]:
        """Select positives and negatives, then contrast both branches with the bank."""
        chosen = self._last = self.select(embeddings, index, camids)
        self.remember(index, chosen)
        global_features, part_features = embeddings
        branches = global_features
        if part_features is not None:
            # Both branches of an image have the same candidates: the bank is read once.
            parts = self.memory.concatenate_parts(part_features)
            branches = torch.stack([global_features, parts], dim=1)
        loss = self.criterion(
            branches,
            self.memory.mixture_bank,
            chosen.positive_index,
            chosen.negative_index,
            positive_mask=chosen.positive_mask,
            negative_mask=chosen.negative_mask,
            **self._ignored_pairs(chosen, camids),
            sample_weight=self.camera_weighting(index, self.labels[index], camids),
        )
        if part_features is None:
            return {"loss_global": loss}
        loss_global, loss_part = loss.unbind()
        return {
            "loss_global": (1.0 - self.part_loss_weight) * loss_global,
            "loss_part": self.part_loss_weight * loss_part,
        }

    @torch.no_grad()
    def select(
        self, embeddings: Embeddings, index: Tensor, camids: Tensor | None
    ) -> Selection:
        """Select the bank rows of positives and negatives for a batch.

        Args:
            embeddings: Features of the batch.
            index: Own row of each image, shape ``(B,)``.
            camids: Camera of each image, shape ``(B,)``, or None.

        Returns:
            ``positive_index (B, 1 + K)`` and ``negative_index (B, N)``; during warm-up
            ``(B, 1)`` and ``(B, N + K)``.
        """
        if self.epoch < self.warmup_epochs:
            negative_index = draw_random_negatives(
                index,
                num_images=self.num_images,
                num_negatives=self.num_negatives + self.num_neighbors,
                generator=step_generator(self.seed, self.step),
            )
            return Selection(index[:, None], negative_index)
        distance = fused_distance(
            embeddings.global_features,
            embeddings.part_features,
            camids,
            self.memory.global_bank,
            self.memory.part_bank,
            None if camids is None else self._bank_camids,
            global_distance_weight=self.global_distance_weight,
            same_camera_penalty=self.same_camera_penalty,
        )
        counts = self._counts
        allowed = self._allowed_negatives(camids)
        # If no clusters were found, the images' own neighbors are used instead.
        if self.selection == "cluster" and not self.instance_level:
            return select_within_clusters(
                distance, index, self.labels, allowed_negatives=allowed, **counts
            )
        ranked = self._rank_by_jaccard(distance, index, camids)
        chosen = Selection(*select_neighbors(ranked, index, **counts))
        if allowed is None:
            return chosen
        return select_among(
            ranked, chosen.positive_index, allowed, num_negatives=self.num_negatives
        )

    def _fitting_counts(self) -> dict[str, int]:
        """Return K and N; the defaults are bounded by the number of images, silently."""
        options, others = options_of(type(self)), self.num_images - 1
        counts: dict[str, int] = {}
        for name in ("num_neighbors", "num_negatives"):
            value = getattr(self, name)
            is_default = name in options and value == options[name].default
            counts[name] = min(value, others) if is_default else value
            others -= min(counts[name], others)
        return counts

    def _rank_by_jaccard(
        self, distance: Tensor, index: Tensor, camids: Tensor | None
    ) -> Tensor:
        """Rank the neighbors of the last clustering first if the option asks for it."""
        if self.selection != "jaccard":
            return distance
        listed = self._listed_index[index]
        listed_distance = self._listed_distance[index]
        if camids is not None:
            same = (self._bank_camids[listed] == camids[:, None]) & (listed >= 0)
            listed_distance = listed_distance + self.same_camera_penalty * same
        return prefer_listed(distance, listed, listed_distance)

    def _allowed_negatives(self, camids: Tensor | None) -> Tensor | None:
        """Return which rows may be negatives of each image, ``(B, M)``; None for all."""
        if self.negative_cameras != "own" or camids is None:
            return None
        own = camids[:, None]
        return (self._bank_camids == own) | (own < 0)

    def _ignored_pairs(self, chosen: Selection, camids: Tensor | None) -> dict[str, Tensor]:
        """Return the masks of camera-confounded pairs, as arguments of the loss."""
        unbiased = self.negative_cameras == "unbiased" and self.epoch >= self.warmup_epochs
        if not unbiased or camids is None:
            return {}
        own = camids[:, None]
        return {
            "ignored_positive": (self._bank_camids[chosen.positive_index] == own)
            & (own >= 0),
            "ignored_negative": self._bank_camids[chosen.negative_index] != own,
        }

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write the batch of all ranks into the three banks.

        Raises:
            RuntimeError: If no loss was computed for this batch.
        """  # noqa: DOC502  (raised by the functions called here)
        selections: list[Selection] = self.recall(index)
        part_features = embeddings.part_features
        positive_index = torch.cat([chosen.positive_index for chosen in selections])
        masks = [c.positive_mask for c in selections if c.positive_mask is not None]
        self.memory.update(
            gather_batch(index),
            gather_batch(embeddings.global_features.detach().float()),
            None if part_features is None else gather_batch(part_features.detach().float()),
            gather_batch(positive_index),
            gather_batch(torch.cat(masks)) if masks else None,
        )
        self._finish_update()

    def image_features(self) -> Tensor:
        """Return the global bank."""
        return self.memory.global_bank

    def selected_positives(self) -> tuple[Tensor, Tensor] | None:
        """Return the last batch's anchors and neighbors; None during warm-up."""
        if self._last is None or self._last.positive_index.shape[1] < 2:
            return None
        anchors = self._last.positive_index[:, 0]
        neighbors = self._last.positive_index[:, 1:]
        if self._last.positive_mask is None:
            return anchors, neighbors
        # Rows differ in length: each neighbor is returned with its anchor.
        present = self._last.positive_mask[:, 1:]
        return anchors[:, None].expand_as(neighbors)[present], neighbors[present][:, None]

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Measure how similar the last batch's rows are to their own and neighbors' rows.

        Returns:
            ``bank_agreement``: mean cosine between global and mixture row of the last
            batch's images. ``neighbor_similarity``: mean cosine between their global rows
            and their neighbors'. ``same_camera_neighbors``: fraction of neighbors from the
            own camera, where cameras are known.
        """
        if self._last is None:
            return {}
        index = self._last.positive_index[:, 0]
        own = self.memory.global_bank[index].float()  # (B, C)
        mixture = self.memory.mixture_bank[index].float()
        report = {"bank_agreement": (own * mixture).sum(dim=1).mean().item()}
        selected = self.selected_positives()
        if selected is None or not len(selected[0]):
            return report
        anchors, neighbors = selected
        own = self.memory.global_bank[anchors].float()
        rows = self.memory.global_bank[neighbors].float()  # (B, K, C)
        report["neighbor_similarity"] = (rows @ own[:, :, None]).mean().item()
        camids = self._bank_camids
        if (camids >= 0).any():
            same = camids[neighbors] == camids[anchors][:, None]
            report["same_camera_neighbors"] = same.float().mean().item()
        return report
