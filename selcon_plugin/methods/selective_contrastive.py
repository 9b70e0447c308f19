"""Selective Contrastive Learning (SCL): every image its own class, plus its neighbours.

START HERE to see one training step. No clusters and no identities: an image's positives are
its own row and its K nearest rows, its negatives the next N rows, ranked on every batch
against live banks of global and part features; the loss compares with the mixture bank.

Pang et al., "Fully Unsupervised Person Re-identification via Selective Contrastive
Learning", 2020. https://arxiv.org/abs/2010.07608
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from selcon_plugin.distance import fused_distance
from selcon_plugin.distributed import gather_batch
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import SelectiveContrastiveLoss
from selcon_plugin.memory import TriBankMemory
from selcon_plugin.methods.base import Method, register_method
from selcon_plugin.options import Choice, Interval
from selcon_plugin.selection import draw_random_negatives, select_neighbors

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_UNKNOWN_CAMERA = -1


@register_method("SelectiveContrastive")
class SelectiveContrastive(Method):
    """Selective Contrastive Learning.

    Differs from the released code where that code differs from its own equations: the
    gradient is the true gradient of the loss, since the mixture bank is written after the
    step and not during the backward pass; warm-up negatives never include the own row.

    Args:
        num_images: Training images M.
        global_dim: Global feature dimension C.
        num_parts: Parts S, 0 for none.
        part_dim: Part feature dimension D.
        num_neighbors: K, neighbours that count as positives.
        num_negatives: N, the next nearest rows, which count as negatives.
        self_weight: λ_t, weight of the image's own row. Small values collapse.
        neighbor_scale: α, factor on the weight shared by the neighbours.
        part_loss_weight: λ_p, weight of the parts' loss; the global loss gets 1 - λ_p.
        global_distance_weight: λ_g, weight of the global distance in the ranking.
        same_camera_penalty: λ_c, added to the distance of images from one camera.
        temperature: τ, divides the similarities.
        bank_momentum: Weight of the old row when a bank is written.
        mixture_update: Whose mixture rows an image writes: all its ``"positives"`` or
            ``"self"``.
        normalize_parts: Whether the concatenated parts are scaled to unit length before
            loss and mixture bank. The released code leaves their norm at √S.
        warmup_epochs: Epochs at the start whose only positive is the image itself and whose
            negatives are random.
        bank_dtype: Type of the banks; half precision halves their memory.
        seed: Seed of the warm-up's random negatives.
    """

    _bank_camids: Tensor

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        num_neighbors: Annotated[int, Interval(0)] = 7,
        num_negatives: Annotated[int, Interval(1)] = 500,
        self_weight: Annotated[float, Interval(0, 1, above=True)] = 0.5,
        neighbor_scale: Annotated[float, Interval(0)] = 1.75,
        part_loss_weight: Annotated[float, Interval(0, 1)] = 0.5,
        global_distance_weight: Annotated[float, Interval(0, 1)] = 0.5,
        same_camera_penalty: Annotated[float, Interval(0)] = 0.05,
        temperature: Annotated[float, Interval(0, above=True)] = 0.1,
        bank_momentum: Annotated[float, Interval(0, 1)] = 0.5,
        mixture_update: Annotated[str, Choice(("positives", "self"))] = "positives",
        normalize_parts: bool = False,
        warmup_epochs: Annotated[int, Interval(0)] = 3,
        bank_dtype: Annotated[str, Choice(tuple(_DTYPES))] = "float32",
        seed: Annotated[int, Interval(0)] = 0,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim)
        self.num_neighbors = num_neighbors
        self.num_negatives = num_negatives
        self.part_loss_weight = part_loss_weight
        self.global_distance_weight = global_distance_weight
        self.same_camera_penalty = same_camera_penalty
        self.warmup_epochs = warmup_epochs
        self.seed = seed
        self.criterion = SelectiveContrastiveLoss(
            num_neighbors, self_weight, neighbor_scale, temperature
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
        # Chosen by loss(), written by update() of the same batch: not state.
        self._positive_index: Tensor | None = None

    def prepare(
        self, embeddings: Embeddings, camids: Tensor | None, pseudo_labels: Any = None
    ) -> None:
        """Fill the ranking banks, empty the mixture bank and note the cameras."""
        self.memory.initialize(*embeddings)
        self._bank_camids.fill_(_UNKNOWN_CAMERA)
        if camids is not None:
            self._bank_camids.copy_(camids)
        self._finish_prepare()

    def loss(
        self, embeddings: Embeddings, index: Tensor, camids: Tensor | None
    ) -> dict[str, Tensor]:
        """Choose positives and negatives, then contrast both views with the bank."""
        positive_index, negative_index = self.select(embeddings, index, camids)
        self._positive_index = positive_index
        global_features, part_features = embeddings
        candidates = (self.memory.mixture_bank, positive_index, negative_index)
        if part_features is None:
            return {"loss_global": self.criterion(global_features, *candidates)}
        # Both views of an image share its candidates: the bank is read once for both.
        views = torch.stack(
            [global_features, self.memory.concatenate_parts(part_features)], dim=1
        )
        loss_global, loss_part = self.criterion(views, *candidates).unbind()
        return {
            "loss_global": (1.0 - self.part_loss_weight) * loss_global,
            "loss_part": self.part_loss_weight * loss_part,
        }

    @torch.no_grad()
    def select(
        self, embeddings: Embeddings, index: Tensor, camids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose the bank rows of positives and negatives for a batch.

        Args:
            embeddings: Features of the batch.
            index: Own row of each image, shape ``(B,)``.
            camids: Camera of each image, shape ``(B,)``, or None.

        Returns:
            ``positive_index (B, 1 + K)`` and ``negative_index (B, N)``; during warm-up
            ``(B, 1)`` and ``(B, N + K)``.
        """
        if self.epoch < self.warmup_epochs:
            # A generator seeded by the step and not by a running stream: a resumed run, and
            # every rank of a distributed one, draws what the unbroken single run would.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            negative_index = draw_random_negatives(
                index,
                num_images=self.num_images,
                num_negatives=self.num_negatives + self.num_neighbors,
                generator=generator,
            )
            return index[:, None], negative_index
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
        return select_neighbors(
            distance,
            index,
            num_neighbors=self.num_neighbors,
            num_negatives=self.num_negatives,
        )

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Embeddings) -> None:
        """Write the batch of all ranks into the three banks.

        Raises:
            RuntimeError: If no loss was computed for this batch.
        """
        if self._positive_index is None or len(self._positive_index) != len(index):
            raise RuntimeError("update() must follow loss() of the same batch")
        part_features = embeddings.part_features
        self.memory.update(
            gather_batch(index),
            gather_batch(embeddings.global_features.detach().float()),
            None if part_features is None else gather_batch(part_features.detach().float()),
            gather_batch(self._positive_index),
        )
        self._finish_update()

    def selected_positives(self) -> tuple[Tensor, Tensor] | None:
        """Return the last batch's anchors and neighbours; None during warm-up."""
        positives = self._positive_index
        if positives is None or positives.shape[1] < 2:
            return None
        return positives[:, 0], positives[:, 1:]

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Report how close the last batch's rows are to their own and neighbours' rows.

        Returns:
            ``bank_agreement``: mean cosine between global and mixture row of the last
            batch's images. ``neighbor_similarity``: mean cosine between their global rows
            and their neighbours'. ``same_camera_neighbors``: share of neighbours from the
            own camera, where cameras are known.
        """
        if self._positive_index is None:
            return {}
        positives = self._positive_index
        own = self.memory.global_bank[positives[:, 0]].float()  # (B, C)
        mixture = self.memory.mixture_bank[positives[:, 0]].float()
        report = {"bank_agreement": (own * mixture).sum(dim=1).mean().item()}
        selected = self.selected_positives()
        if selected is None:
            return report
        anchors, neighbors = selected
        rows = self.memory.global_bank[neighbors].float()  # (B, K, C)
        report["neighbor_similarity"] = (rows @ own[:, :, None]).mean().item()
        camids = self._bank_camids
        if (camids >= 0).any():
            same = camids[neighbors] == camids[anchors][:, None]
            report["same_camera_neighbors"] = same.float().mean().item()
        return report
