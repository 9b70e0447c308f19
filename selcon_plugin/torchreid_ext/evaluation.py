"""torchreid's evaluation, which also supports small galleries and records its results."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.progress import ProgressLoader
from selcon_plugin.engine.stopping import ignore_stop_signals
from selcon_plugin.features import check_features
from selcon_plugin.runs.metrics import append_metrics
from selcon_plugin.runs.ranked import rank_queries, write_ranked
from selcon_plugin.torchreid_ext.data import check_test_sets

logger = logging.getLogger(__name__)

_Engine: Any = import_torchreid().engine.Engine


class EvaluationEngine(_Engine):
    """torchreid's engine with evaluation of small galleries and recorded results.

    Args:
        datamanager: Data manager of torchreid.
        use_gpu: Whether to use a GPU, as in torchreid.

    Attributes:
        results: Metrics of the last evaluation in percent, by test set and name.
        test_loader: Loaders of the test sets that have queries, by name.

    Raises:
        ValueError: If a test set cannot be evaluated.
    """

    def __init__(self, datamanager: Any, use_gpu: bool) -> None:
        super().__init__(datamanager, use_gpu)
        self.test_loader: dict[str, Any] = {
            name: loaders
            for name, loaders in datamanager.test_loader.items()
            if len(loaders["query"].dataset)
        }
        check_test_sets(self.test_loader)
        for loaders in self.test_loader.values():
            for loader in loaders.values():
                loader.worker_init_fn = ignore_stop_signals
        self.results: dict[str, dict[str, float]] = {}
        self._save_dir = ""
        self._step = 0  # optimizer steps done; 0 for an evaluation without a run

    def _before_evaluation(self) -> None:
        """Prepare the network for evaluation; the base class does nothing."""

    def test(self, *args: Any, **kwargs: Any) -> float:
        """Evaluate on the test sets, as torchreid's ``test``.

        Args:
            *args: As in torchreid.
            **kwargs: As in torchreid.

        Returns:
            Rank-1 of the last test set, 0 to 1; 0 where there is none.
        """
        if not self.test_loader:
            logger.info("There is no test set: nothing is evaluated")
            return 0.0
        self._before_evaluation()
        rank1: float = super().test(*args, **kwargs)
        return rank1

    def extract_features(self, input: Tensor) -> Tensor:
        """Compute and check the features of a batch of the test set.

        Args:
            input: Images, shape ``(B, 3, h, w)``.

        Returns:
            Features, shape ``(B, D)``.

        Raises:
            BadFeaturesError: If they are not finite, or not one row per image.
        """  # noqa: DOC502  (raised by the functions called here)
        features: Tensor = super().extract_features(input)
        check_features(features, source="evaluation", rows=len(input), unit=False)
        return features

    def _evaluate(
        self, dataset_name: str = "", ranks: Sequence[int] = (1,), **kwargs: Any
    ) -> tuple[float, float]:
        # torchreid fails on ranks beyond the remaining images of a small gallery.
        test_set = self.datamanager.test_dataset[dataset_name]
        smallest = _smallest_gallery(test_set)
        ranks = [rank for rank in ranks if rank <= smallest]
        for side in ("query", "gallery"):
            name = f"Evaluation on {dataset_name}, {side}"
            kwargs[f"{side}_loader"] = ProgressLoader(kwargs[f"{side}_loader"], name)

        def record(distance: Any) -> None:
            if self._step:
                queries = rank_queries(distance, test_set["query"], test_set["gallery"])
                write_ranked(self._save_dir, dataset_name, queries)

        with _ranks_up_to(smallest, record):
            rank1, mean_ap = super()._evaluate(
                dataset_name=dataset_name, ranks=ranks, **kwargs
            )
        found = {"mAP": 100.0 * float(mean_ap), "Rank-1": 100.0 * float(rank1)}
        self.results[dataset_name] = found
        if self._step:
            prefix = f"{dataset_name}/" if len(self.test_loader) > 1 else ""
            named = {f"{prefix}{metric}": value for metric, value in found.items()}
            append_metrics(self._save_dir, self._step - 1, named)
        return rank1, mean_ap


def _smallest_gallery(test_set: Mapping[str, Any]) -> int:
    """Return the smallest number of gallery images per query.

    A query is not compared with the images of its own identity and camera.
    """
    seen = Counter((pid, camid) for _, pid, camid, *_ in test_set["gallery"])
    own = max(seen[pid, camid] for _, pid, camid, *_ in test_set["query"])
    return len(test_set["gallery"]) - own


@contextlib.contextmanager
def _ranks_up_to(last: int, record: Callable[[Any], None]) -> Iterator[None]:
    """Restrict torchreid's metrics to the ranks that every query has.

    Args:
        last: The last such rank.
        record: Called with the distances; the evaluation continues if it fails.
    """
    metrics = import_torchreid().metrics
    evaluate = metrics.evaluate_rank

    def bounded(*args: Any, max_rank: int = 50, **kwargs: Any) -> Any:
        try:
            record(args[0])
        except Exception as error:
            logger.warning("The ranked results could not be written: %s", error)
        return evaluate(*args, max_rank=max(1, min(max_rank, last)), **kwargs)

    metrics.evaluate_rank = bounded
    try:
        yield
    finally:
        metrics.evaluate_rank = evaluate
