"""Phases of the study, in the order of execution."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from market_study import correlation, tables
from market_study.choose import Changes, climb
from market_study.protocols import Protocol, options_of, variant_name
from market_study.runs import Budget, Variant, run_variants, variants_in
from market_study.split import DATASET_FOLDER, has_official_test, make_official
from selcon_plugin.io.atomic import write_atomically

PHASES = ("choose", "report", "correlate", "tables")
_TRAINED = PHASES[:2]

_ON_MARKET = {"DATASETS.NAMES": ("Market1501",), "DATASETS.TESTS": ("Market1501",)}
_BASE, _CHOSEN = "base", "chosen"


@dataclass(frozen=True)
class Study:
    """Study of a protocol on a data set, with an output folder.

    Attributes:
        protocol: Configs and changes.
        data: Root folder of the data sets, with the official Market-1501.
        output: Output folder of the study.
        choose_seeds: Number of seeds of each run while choosing.
        report_seeds: Number of seeds of each final configuration.
        rounds: Rounds of changes.
        margin: Smallest relevant gain in validation mAP.
        budget: Time budget.
        train_subset: Training images of the report; None for all.
    """

    protocol: Protocol
    data: Path
    output: Path
    choose_seeds: int = 1
    report_seeds: int = 3
    rounds: int = 1
    margin: float = 0.5
    budget: Budget = field(default_factory=Budget)
    train_subset: Sequence[str] | None = None

    @property
    def validation_root(self) -> Path:
        """Root folder of the data set with held-out identities."""
        return self.output / "validation"

    def choose(self) -> None:
        """Train every method, then try the changes, all on held-out identities."""
        for method in self.protocol.configs:
            self._measure(method, [{}])
        for method in self.protocol.groups:
            chosen = self._chosen(method)
            print(f"Chosen for {method}: {variant_name(chosen)}", flush=True)

    def _chosen(self, method: str) -> Changes:
        return climb(
            lambda tried: self._measure(method, tried),
            self.protocol.groups.get(method, {}),
            rounds=self.rounds,
            margin=self.margin,
        )

    def _measure(self, method: str, tried: Sequence[Changes]) -> list[float | None]:
        """Return the mean validation mAP over the seeds for each of several changes."""
        variants = [
            self._variant(
                "choose",
                method,
                changes,
                data=self.validation_root,
                eval_period=self.protocol.eval_period,
            )
            for changes in tried
        ]
        run_variants(variants, self.choose_seeds, self.budget)
        return [_mean_map(variant) for variant in variants]

    def _variant(
        self,
        phase: str,
        method: str,
        changes: Changes,
        *,
        data: Path,
        eval_period: int,
        name: str = "",
    ) -> Variant:
        name = name or variant_name(changes)
        return Variant(
            method=method,
            name=name,
            config=self.protocol.configs[method],
            options={
                **_ON_MARKET,
                "TEST.EVAL_PERIOD": eval_period,
                **self.protocol.base(method),
                **options_of(self.protocol.groups.get(method, {}), changes),
            },
            data=data,
            folder=self.output / phase / method / name,
        )

    def report(self) -> None:
        """Train each final configuration and evaluate it once on the official test set.

        Training uses all training images, or the requested subset.

        Raises:
            FileNotFoundError: If the official test images are missing.
        """
        if not has_official_test(self.data):
            raise FileNotFoundError(
                f"{self.data / DATASET_FOLDER} has no query and bounding_box_test: only "
                "the report needs the official test images"
            )
        data = self.data
        if self.train_subset is not None:
            data = self.output / "official"
            make_official(self.data, data, self.train_subset)
        finals = [(method, _BASE, Changes()) for method in self.protocol.configs]
        for method in self.protocol.groups:
            changes = self._chosen(method)
            if changes:
                finals.append((method, _CHOSEN, changes))
        for seeds in range(1, self.report_seeds + 1):  # first results of all methods early
            for method, name, changes in finals:
                # A period of 0 evaluates only at the end.
                final = self._variant(
                    "report", method, changes, data=data, eval_period=0, name=name
                )
                run_variants([final], seeds, self.budget)

    def failed(self) -> list[str]:
        """Return the names of started variants without a finished run."""
        started = [v for phase in _TRAINED for v in variants_in(self.output / phase)]
        return [f"{v.method} {v.name}" for v in started if not v.results()]

    def correlate(self) -> None:
        """Correlate label-free metrics with validation mAP."""
        runs = [
            correlation.read_run(variant.folder / f"seed{seed}", results)
            for variant in variants_in(self.output / "choose")
            for seed, results in variant.results().items()
        ]
        rows = correlation.correlate(runs)
        table = correlation.table(rows, len(runs))
        write_atomically(table, self.output / "correlation.md")
        print(f"Written: {self.output / 'correlation.md'}")

    def tables(self) -> None:
        """Write all results into one page."""
        found = {phase: variants_in(self.output / phase) for phase in _TRAINED}
        correlated = self.output / "correlation.md"
        page = tables.page(
            self.protocol.name,
            found["choose"],
            found["report"],
            correlated.read_text() if correlated.is_file() else "",
        )
        write_atomically(page, self.output / "tables.md")
        print(f"Written: {self.output / 'tables.md'}")


def _mean_map(variant: Variant) -> float | None:
    values = [
        metrics["mAP"]
        for results in variant.results().values()
        for metrics in results["metrics"].values()
    ]
    return statistics.fmean(values) if values else None
