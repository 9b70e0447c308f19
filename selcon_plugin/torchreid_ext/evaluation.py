"""torchreid's evaluation, which also supports small galleries and records its results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.engine.evaluation_scope import EvaluationScope
from selcon_plugin.engine.progress import ProgressLoader
from selcon_plugin.engine.stopping import ignore_stop_signals
from selcon_plugin.features import check_features
from selcon_plugin.runs.metrics import append_metrics
from selcon_plugin.runs.ranked import rank_queries, write_ranked
from selcon_plugin.torchreid_ext.data import check_test_sets
from selcon_plugin.torchreid_ext.datasets import plain_name

logger = logging.getLogger(__name__)

_NO_TEST_SET = (
    "Name another one in data.targets, or set data.targets to [] (in a script targets=[]) "
    "to train without a test set"
)
_RANKS = (1, 5, 10, 20)  # torchreid's default
_RECORDED_RANKS = (1, 5, 10)
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
        self._scopes = {
            name: EvaluationScope.of(
                name, datamanager.test_dataset[name], remedy=_NO_TEST_SET
            )
            for name in self.test_loader
        }
        for loaders in self.test_loader.values():
            for loader in loaders.values():
                loader.worker_init_fn = ignore_stop_signals
        self.results: dict[str, dict[str, float]] = {}
        self._save_dir = ""
        self._step = 0  # optimizer steps done; 0 for an evaluation without a run
        self._unevaluated = False  # whether the evaluation of the trained epoch is due

    def _before_evaluation(self) -> None:
        """Prepare the network for evaluation; the base class does nothing."""

    def check_test_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Report ranks that a small gallery does not have, before the evaluation.

        Args:
            arguments: Arguments of torchreid's ``test``.
        """
        ranks = arguments.get("ranks", _RANKS)
        level = logging.INFO if tuple(ranks) == _RANKS else logging.WARNING
        for scope in self._scopes.values():
            by_person = bool(arguments.get("use_metric_cuhk03", False))
            last = scope.last_rank(by_person)
            beyond = [rank for rank in ranks if rank > last]
            if beyond:
                logger.log(
                    level,
                    "Rank %s of %s is not reported: a query is compared with only %d %s",
                    ", ".join(map(str, beyond)),
                    plain_name(scope.name),
                    last,
                    "persons" if by_person else "gallery images",
                )

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
        self._unevaluated = False
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
        test_set, scope = (
            self.datamanager.test_dataset[dataset_name],
            self._scopes[dataset_name],
        )
        last = scope.last_rank(kwargs.get("use_metric_cuhk03", False))
        ranks = [rank for rank in ranks if rank <= last]
        scope.report()
        for side in ("query", "gallery"):
            name = f"Evaluation on {dataset_name}, {side}"
            kwargs[f"{side}_loader"] = ProgressLoader(kwargs[f"{side}_loader"], name)

        def record(distance: Any) -> None:
            if self._step:
                queries = rank_queries(distance, test_set["query"], test_set["gallery"])
                write_ranked(self._save_dir, dataset_name, queries)

        with _ranks_up_to(last, record) as curve:
            rank1, mean_ap = super()._evaluate(
                dataset_name=dataset_name, ranks=ranks, **kwargs
            )
        found = {"mAP": 100.0 * float(mean_ap)}
        found |= {
            f"Rank-{rank}": 100.0 * float(curve[rank - 1])
            for rank in _RECORDED_RANKS
            if rank <= len(curve)
        }
        self.results[dataset_name] = found
        if self._step:
            prefix = f"{dataset_name}/" if len(self.test_loader) > 1 else ""
            named = {f"{prefix}{metric}": value for metric, value in found.items()}
            append_metrics(self._save_dir, self._step - 1, named)
        return rank1, mean_ap


@contextlib.contextmanager
def _ranks_up_to(last: int, record: Callable[[Any], None]) -> Iterator[list[float]]:
    """Restrict torchreid's metrics to the ranks that every query has.

    Args:
        last: The last such rank.
        record: Called with the distances; the evaluation continues if it fails.

    Yields:
        List that the evaluation fills with the accuracy of each rank, 0 to 1.
    """
    metrics = import_torchreid().metrics
    evaluate = metrics.evaluate_rank
    curve: list[float] = []

    def bounded(*args: Any, max_rank: int = 50, **kwargs: Any) -> Any:
        try:
            record(args[0])
        except Exception as error:
            logger.warning("The ranked results could not be written: %s", error)
        found = evaluate(*args, max_rank=max(1, min(max_rank, last)), **kwargs)
        curve[:] = found[0].tolist()
        return found

    metrics.evaluate_rank = bounded
    try:
        yield curve
    finally:
        metrics.evaluate_rank = evaluate
