"""Evaluators of FastReID that record ranked results, optionally with a camera term."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastreid.config import CfgNode
from fastreid.evaluation import ReidEvaluator, rank
from fastreid.utils import comm
from torch import Tensor

from selcon_plugin.engine.evaluation_scope import EvaluationScope
from selcon_plugin.engine.progress import ProgressLoader
from selcon_plugin.fastreid_ext.host_values import with_fitting_neighbors
from selcon_plugin.features import BadFeaturesError, check_features
from selcon_plugin.runs.ranked import rank_queries, write_ranked

logger = logging.getLogger(__name__)

_NUM_RANKS = 50  # that FastReID computes
_RANKS = (1, 5, 10)  # that it reports
_NO_TEST_SET = (
    "Name another one in DATASETS.TESTS, or set DATASETS.TESTS to () to train without a "
    "test set"
)


def append_camera_term(
    features: Tensor, camids: Tensor, is_query: Tensor, *, penalty: float, num_cameras: int
) -> Tensor:
    """Extend unit features so that their cosine ranks by distance plus camera term.

    A query gets ``+a`` and a gallery image ``-a`` in the component of its camera, with
    ``a² = λ_c / 2``: the product of a pair from the same camera falls by λ_c / 2, its
    distance ``2 - 2 cos`` rises by λ_c, and all vectors have the same length.

    Args:
        features: Unit features, shape ``(B, C)``.
        camids: Camera of each image, 0 or more, shape ``(B,)``.
        is_query: Whether each image is a query, shape ``(B,)``.
        penalty: λ_c.
        num_cameras: Number of camera components; larger than every camera id.

    Returns:
        Extended features, shape ``(B, C + num_cameras)``.
    """
    size = (penalty / 2.0) ** 0.5
    sign = torch.where(is_query, size, -size).to(features)
    cameras = F.one_hot(camids, num_cameras).to(features)
    return torch.cat([F.normalize(features, dim=1), sign[:, None] * cameras], dim=1)


def scope_of(
    name: str, query: Sequence[tuple[Any, ...]], gallery: Sequence[tuple[Any, ...]]
) -> EvaluationScope:
    """Measure which queries of a test set count, and how far the ranks go.

    Args:
        name: Name of the test set.
        query: Path, identity and camera of each query.
        gallery: Path, identity and camera of each gallery image.

    Returns:
        The scope.

    Raises:
        ValueError: If no query has a match.
    """  # noqa: DOC502  (raised by the functions called here)
    return EvaluationScope.of(
        name, {"query": query, "gallery": gallery}, remedy=_NO_TEST_SET
    )


def _with_distractors(
    distance: Any, query_pids: Any, gallery_pids: Any, query_camids: Any, camids: Any
) -> tuple[Any, ...]:
    """Add gallery images of nobody, farther than all others, which change no metric.

    FastReID computes 50 ranks, and fails or miscounts where a query has fewer images.

    Args:
        distance: Distances, shape ``(Q, G)``.
        query_pids: Identities of the queries.
        gallery_pids: Identities of the gallery images.
        query_camids: Cameras of the queries.
        camids: Cameras of the gallery images.

    Returns:
        The same, with 50 more gallery images.
    """
    nobody = min(query_pids.min(), gallery_pids.min()) - 1
    more = (0, _NUM_RANKS)
    return (
        np.pad(distance, ((0, 0), more), constant_values=distance.max() + 1),
        query_pids,
        np.pad(gallery_pids, more, constant_values=nobody),
        query_camids,
        np.pad(camids, more),
    )


class RecordingEvaluator(ReidEvaluator):
    """FastReID's evaluator, which also writes some ranked results into ``OUTPUT_DIR``.

    Args:
        cfg: Complete config.
        num_query: Number of queries, which are first in the loader.
        output_dir: Output folder, as in FastReID.
        items: Path, identity and camera of queries and gallery images.
        name: Name of the test set.
    """

    def __init__(
        self,
        cfg: CfgNode,
        num_query: int,
        output_dir: str | None = None,
        *,
        items: Sequence[tuple[Any, ...]],
        name: str,
    ) -> None:
        super().__init__(cfg, num_query, output_dir)
        self._items = items
        self._name = name
        self._scope = scope_of(name, items[:num_query], items[num_query:])

    def process(self, inputs: dict[str, Any], outputs: Tensor) -> None:
        """Check and keep a batch of features.

        Args:
            inputs: Batch of the loader.
            outputs: Features, one row per image.

        Raises:
            BadFeaturesError: If they are not finite, or not one row per image.
        """  # noqa: DOC502  (raised by the functions called here)
        check_features(
            outputs,
            source=f"evaluation on {self._name}",
            rows=len(inputs["targets"]),
            unit=False,
        )
        super().process(inputs, outputs)

    def evaluate(self) -> Any:
        """Evaluate as FastReID does, and record ranked results.

        Returns:
            FastReID's results.

        Raises:
            BadFeaturesError: If there is not one feature per image of the test set.
        """  # noqa: DOC502  (raised by the function inside)
        # The distances, re-ranked or not, are passed to this function and stored nowhere.
        evaluate_rank = rank.evaluate_rank

        def recorded(distance: Any, *labels: Any, **kwargs: Any) -> Any:
            expected = (self._num_query, len(self._items) - self._num_query)
            if tuple(distance.shape) != expected:
                raise BadFeaturesError(
                    f"{self._name}: there are features of {tuple(distance.shape)} queries "
                    f"and gallery images, but the test set has {expected}"
                )
            self._record(distance)
            if self._scope.num_images < _NUM_RANKS:
                return evaluate_rank(*_with_distractors(distance, *labels), **kwargs)
            return evaluate_rank(distance, *labels, **kwargs)

        rank.evaluate_rank = recorded
        try:
            results = super().evaluate()
        finally:
            rank.evaluate_rank = evaluate_rank
        return self._within_scope(results)

    def _within_scope(self, results: Any) -> Any:
        """Remove the ranks that a small gallery does not have; log the omitted queries."""
        if not results:  # not on the main process
            return results
        self._scope.report()
        beyond = [n for n in _RANKS if n > self._scope.num_images]
        for number in beyond:
            del results[f"Rank-{number}"]
        if beyond:
            logger.info(
                "Rank %s of %s is not reported: a query is compared with %d gallery images "
                "only",
                ", ".join(map(str, beyond)),
                self._name,
                self._scope.num_images,
            )
        return results

    def _record(self, distance: Any) -> None:
        """Write some ranked results; the evaluation continues if that fails."""
        query, gallery = self._items[: self._num_query], self._items[self._num_query :]
        try:
            queries = rank_queries(distance, query, gallery)
            write_ranked(self.cfg.OUTPUT_DIR, self._name, queries)
        except Exception as error:
            logger.warning("The ranked results could not be written: %s", error)


class CameraTermEvaluator(RecordingEvaluator):
    """FastReID's evaluator on features extended by the camera term.

    It uses the camera ids of query and gallery at test time, so that its metrics are not
    comparable with the usual protocol; the log warns of this.

    Args:
        cfg: Complete config.
        num_query: Number of queries, which are first in the loader.
        output_dir: Output folder, as in FastReID.
        num_cameras: Number of cameras; larger than every camera id.
        items: Path, identity and camera of queries and gallery images.
        name: Name of the test set.
    """

    def __init__(
        self,
        cfg: CfgNode,
        num_query: int,
        output_dir: str | None = None,
        *,
        num_cameras: int,
        items: Sequence[tuple[Any, ...]],
        name: str,
    ) -> None:
        super().__init__(cfg, num_query, output_dir, items=items, name=name)
        self._penalty: float = cfg.MODEL.SELCON.SAME_CAMERA_PENALTY
        self._num_cameras = num_cameras
        # FastReID's InferenceSampler gives each rank a contiguous range of images.
        self._first = comm.get_rank() * ((len(items) - 1) // comm.get_world_size() + 1)
        self._seen = 0
        logger.warning(
            "TEST_CAMERA_TERM is on: %g is added to the distance of images from the same "
            "camera at test time; state this next to the metrics",
            self._penalty,
        )

    def reset(self) -> None:
        """Start a new evaluation."""
        super().reset()
        self._seen = 0

    def process(self, inputs: dict[str, Any], outputs: Tensor) -> None:
        """Process a batch of features in the loader's order."""
        position = self._first + self._seen + torch.arange(len(outputs))
        self._seen += len(outputs)
        extended = append_camera_term(
            outputs.float().cpu(),
            inputs["camids"].cpu(),
            position < self._num_query,
            penalty=self._penalty,
            num_cameras=self._num_cameras,
        )
        super().process(inputs, extended)


def evaluator_of(
    cfg: CfgNode, name: str, loader: Any, num_query: int, output_dir: str | None
) -> tuple[Any, ReidEvaluator]:
    """Build FastReID's evaluator, with the camera term if the config enables it.

    Args:
        cfg: Complete config.
        name: Name of the test set.
        loader: Its loader, over queries and then the gallery.
        num_query: Number of queries.
        output_dir: Output folder, as in FastReID.

    Returns:
        The loader with its progress, and the evaluator.
    """
    record = {"items": loader.dataset.img_items, "name": name}
    num_cameras = max(loader.dataset.cams) + 1
    cfg = with_fitting_neighbors(cfg, name, len(loader.dataset))
    loader = ProgressLoader(loader, f"Evaluation on {name}")
    if not cfg.MODEL.SELCON.TEST_CAMERA_TERM:
        return loader, RecordingEvaluator(cfg, num_query, output_dir, **record)
    return loader, CameraTermEvaluator(
        cfg, num_query, output_dir, num_cameras=num_cameras, **record
    )


def has_own_evaluator(trainer: Any, base: Any) -> bool:
    """Return whether a trainer of a script evaluates in another way than its base class.

    Args:
        trainer: Class of the trainer.
        base: The plugin's trainer.
    """
    names = ("build_evaluator", "build_test_loader")
    return any(
        getattr(trainer, name).__func__ is not getattr(base, name).__func__
        for name in names
    )
