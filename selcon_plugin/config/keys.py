"""The plugin's settings as keys of a host's config: defaults, checks, what is selected.

An option of the run, of a method, of the clustering or of a labeler is a key by its name.
How a host spells keys is in :class:`ConfigKeys`; what the keys mean and which values are
legal is the same in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from selcon_plugin.clustering import (
    Labeler,
    LabelFilter,
    OutlierPolicy,
    ReliabilityFilter,
    SingleCameraFilter,
    build_labeler,
    labeler_names,
    labeler_options,
)
from selcon_plugin.config.option_meanings import MEANINGS
from selcon_plugin.engine.best_weights import KEEP_BEST_BY, NEVER
from selcon_plugin.methods import method_class, method_names, method_options
from selcon_plugin.models.wave_block import WaveBlockKind
from selcon_plugin.options import Choice, Interval, Option
from selcon_plugin.samplers.cluster import AUTO, STREAM_SAMPLER
from selcon_plugin.samplers.planners import planner_names

Node = MutableMapping[str, Any]
_OptionsOf = Callable[[str], Mapping[str, Option]]


def run_options() -> dict[str, Option]:
    """Return the options of a run that belong to no method."""
    samplers = (AUTO, STREAM_SAMPLER, *planner_names())
    options = (
        # Read anew each time: a script may register a method of its own after the import.
        Option("method", "SelectiveContrastive", str, Choice(tuple(method_names()))),
        Option("num_parts", 8, int, Interval(0)),
        Option("project_global", True, bool, None),
        Option("diagnostics_period", 20, int, Interval(0)),
        Option("keep_checkpoints", 0, int, Interval(0)),
        Option("keep_best_by", NEVER, str, Choice(KEEP_BEST_BY)),
        Option("sampler", AUTO, str, Choice(samplers)),
        Option("outlier_ratio", 0.0, float, Interval(0, 1, below=True)),
        Option("iters_per_epoch", 0, int, Interval(0)),
        Option("micro_batches", 1, int, Interval(1)),
        Option("ghost_batch_size", 0, int, Interval(0)),
        Option("extra_images", "", str, None),
        Option("max_unreadable_ratio", 0.05, float, Interval(0, 1, below=True)),
        Option("wave_block", "none", str, Choice(("none", *get_args(WaveBlockKind)))),
        Option("ema_decay", 0.0, float, Interval(0, 1, below=True)),
        Option("on_nonfinite", "skip", str, Choice(("skip", "stop"))),
        Option("max_nonfinite_steps", 10, int, Interval(1)),
        Option("report_images", True, bool, None),
        Option("tensorboard_pictures", False, bool, None),
        Option("seed", 0, int, Interval(0)),
    )
    return _described(options)


def _described(options: Sequence[Option]) -> dict[str, Option]:
    return {
        option.name: replace(option, meaning=MEANINGS.get(option.name, ""))
        for option in options
    }


def clustering_options() -> dict[str, Option]:
    """Return the options of clustering that do not belong to a labeler."""
    options = (
        Option("labeler", "DBSCAN", str, Choice(tuple(labeler_names()))),
        Option("period", 1, int, Interval(1)),
        Option("features", "global", str, Choice(("global", "fused"))),
        Option("center_cameras", False, bool, None),
        Option("reliability", False, bool, None),
        Option("drop_single_camera", False, bool, None),
        Option("outliers", "drop", str, Choice(("drop", "singleton", "nearest"))),
    )
    return _described(options)


def own_method_options(name: str) -> dict[str, Option]:
    """Return a method's options without the seed, which is the whole run's."""
    return {key: o for key, o in method_options(name).items() if key != "seed"}


def sampler_of(method: str, sampler: str) -> str:
    """Return the sampler that draws the batches: the method's own for "auto".

    Args:
        method: Registered name.
        sampler: Value of the option.

    Returns:
        ``STREAM_SAMPLER`` or the name of a planner.
    """
    return method_class(method).default_sampler if sampler == AUTO else sampler


def configured_labeler(
    clustering: Mapping[str, Any], options: Mapping[str, Any]
) -> Labeler:
    """Build a labeler with its filters.

    Args:
        clustering: Values of :func:`clustering_options`.
        options: Constructor arguments of the labeler.

    Returns:
        The labeler.
    """
    filters: list[LabelFilter] = []
    if clustering["reliability"]:
        filters.append(ReliabilityFilter())
    if clustering["drop_single_camera"]:
        filters.append(SingleCameraFilter())
    if clustering["outliers"] != "drop":
        filters.append(OutlierPolicy(clustering["outliers"]))
    labeler = build_labeler(
        clustering["labeler"],
        center_cameras=clustering["center_cameras"],
        filters=filters,
        **options,
    )
    if clustering["reliability"]:
        labeler.check_reach(ReliabilityFilter().delta)
    return labeler


@dataclass(frozen=True)
class _Group:
    """The options of all methods, or of all labelers, in one node of a config."""

    kind: str
    chooser: str  # option that names the one chosen
    names: Callable[[], Sequence[str]]
    options_of: _OptionsOf

    def defaults(self) -> dict[str, Any]:
        """Collect the defaults by option.

        Returns:
            None where they differ between methods, and where a word is legal besides a
            number: yacs lets a key change its type only if its default is None.
        """
        defaults: dict[str, Any] = {}
        for name in self.names():
            for key, option in self.options_of(name).items():
                same = key not in defaults or defaults[key] == option.default
                defaults[key] = option.default if same and not option.words else None
        return defaults


_METHODS = _Group("method", "method", method_names, own_method_options)
_LABELERS = _Group("labeler", "labeler", labeler_names, labeler_options)


@dataclass(frozen=True)
class ConfigKeys:
    """The plugin's keys in the config of a host.

    Attributes:
        path: Full key of the node that holds them, for error messages.
        case: Spells an option's name as a key: ``str.upper`` or ``str.lower``.
        extra: Options of the run that this host alone has.
    """

    path: str
    case: Callable[[str], str]
    extra: tuple[Option, ...] = ()

    @property
    def clustering_key(self) -> str:
        """Key of the node of clustering, inside that of :attr:`path`."""
        return self.case("clustering")

    def run_options(self) -> dict[str, Option]:
        """Return the options of the run, those of this host included."""
        return {**run_options(), **{option.name: option for option in self.extra}}

    def defaults(self) -> dict[str, Any]:
        """Return all keys with their defaults, those of clustering in a dict of its own."""
        run = {name: option.default for name, option in self.run_options().items()}
        clustering = {name: o.default for name, o in clustering_options().items()}
        return {
            **self._spelled({**run, **_METHODS.defaults()}),
            self.clustering_key: self._spelled({**clustering, **_LABELERS.defaults()}),
        }

    def _spelled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self.case(name): value for name, value in values.items()}

    def _groups(self, node: Node) -> Iterator[tuple[Node, str, _Group]]:
        yield node, self.path, _METHODS
        yield node[self.clustering_key], f"{self.path}.{self.clustering_key}", _LABELERS

    def check(self, node: Node) -> None:
        """Check every key, and put the chosen method's and labeler's defaults for None.

        Args:
            node: The plugin's node; changed in place.

        Raises:
            ValueError: If a value is illegal (names key, value and legal range), or if a
                key was set that the chosen method or labeler does not have.
        """  # noqa: DOC502  (raised by what this calls)
        self.run_values(node)
        self.clustering_values(node)
        for owner, _, group in self._groups(node):
            self.selected(node, group.kind)
            chosen = owner[self.case(group.chooser)]
            for name, option in group.options_of(chosen).items():
                if owner[self.case(name)] is None:
                    owner[self.case(name)] = option.default

    def fill_defaults(self, node: Node, settings: Mapping[str, Any]) -> None:
        """Put, for None, the defaults of the method and the labeler of another config.

        Args:
            node: The plugin's node, with the defaults; changed in place.
            settings: The other config, by full keys. What is not registered here is left.
        """
        chosen = []
        for owner, label, group in self._groups(node):
            key = self.case(group.chooser)
            chosen.append((owner, key, owner[key]))
            if settings.get(f"{label}.{key}") in group.names():
                owner[key] = settings[f"{label}.{key}"]
        self.check(node)
        for owner, key, default in chosen:
            owner[key] = default

    def run_values(self, node: Node) -> dict[str, Any]:
        """Return the values of the run's options, checked.

        Args:
            node: The plugin's node.

        Returns:
            Values by option.
        """
        return self._checked(node, self.path, self.run_options())

    def clustering_values(self, node: Node) -> dict[str, Any]:
        """Return the values of the options of clustering, checked.

        Args:
            node: The plugin's node.

        Returns:
            Values by option.
        """
        label = f"{self.path}.{self.clustering_key}"
        return self._checked(node[self.clustering_key], label, clustering_options())

    def _checked(
        self, node: Node, label: str, options: Mapping[str, Option]
    ) -> dict[str, Any]:
        return {
            name: option.check(node[self.case(name)], label=f"{label}.{self.case(name)}")
            for name, option in options.items()
        }

    def selected(self, node: Node, kind: str) -> dict[str, Any]:
        """Return the options of the chosen method or labeler, checked.

        Args:
            node: The plugin's node.
            kind: ``"method"`` or ``"labeler"``.

        Returns:
            Constructor arguments; options left at None are absent. A method with a seed
            gets the run's.

        Raises:
            ValueError: If a value is illegal, or a key was set that the chosen one does not
                have.
        """
        owner, label, group = next(g for g in self._groups(node) if g[2].kind == kind)
        name = owner[self.case(group.chooser)]
        known = group.options_of(name)
        values = {}
        for option_name, default in group.defaults().items():
            key = self.case(option_name)
            value = owner[key]
            if option_name in known:
                if value is not None:
                    option = known[option_name]
                    values[option_name] = option.check(value, label=f"{label}.{key}")
            elif value != default:
                raise ValueError(
                    f"{label}.{key} is {value!r}, but {kind} {name} has no such option; it "
                    f"has {', '.join(self.case(other) for other in known)}"
                )
        if kind == "method" and "seed" in method_options(name):
            values["seed"] = node[self.case("seed")]
        return values

    def labeler(self, node: Node) -> Labeler:
        """Build the labeler that a config describes.

        Args:
            node: The plugin's node.

        Returns:
            The labeler with its filters.
        """
        return configured_labeler(
            self.clustering_values(node), self.selected(node, "labeler")
        )

    @contextlib.contextmanager
    def allow_type_change(self, node: Node) -> Iterator[None]:
        """Let a merge change the type of the keys that take several, such as eps: auto.

        yacs compares a value with the one that stands there: after a file's 0.5 the word
        "auto" would be refused.

        Args:
            node: The plugin's node, merged into inside the ``with`` block.

        Yields:
            Nothing.
        """
        free = [
            (owner, self.case(name))
            for owner, _, group in self._groups(node)
            for name, default in group.defaults().items()
            if default is None
        ]
        before = [owner[key] for owner, key in free]
        for owner, key in free:
            owner[key] = None
        try:
            yield
        finally:
            for (owner, key), value in zip(free, before, strict=True):
                if owner[key] is None:
                    owner[key] = value

    def describe(self, key: str) -> str:
        """Say in words what is legal for a key; ``""`` for keys that are not the plugin's.

        Args:
            key: Full key, for instance ``MODEL.SELCON.TEMPERATURE``.

        Returns:
            For instance "a number > 0".
        """
        path, _, name = key.rpartition(".")
        if path == self.path:
            known, group = self.run_options(), _METHODS
        elif path == f"{self.path}.{self.clustering_key}":
            known, group = clustering_options(), _LABELERS
        else:
            return ""
        for owner in group.names():
            known.update(group.options_of(owner))
        spelled = {self.case(option): known[option] for option in known}
        return spelled[name].describe() if name in spelled else ""
