"""The plugin's settings as keys of a host's config: defaults, checks, what is selected.

An option of the run, of a method, of the clustering or of a labeler is a key by its name.
How a host spells keys is in :class:`ConfigKeys`; what the keys mean and which values are
legal is the same in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from selcon_plugin.clustering import (
    Labeler,
    LabelFilter,
    OutlierPolicy,
    ReliabilityFilter,
    SingleCameraFilter,
    labeler_class,
    labeler_names,
    labeler_options,
)
from selcon_plugin.engine.run_options import ClusteringOptions, RunOptions
from selcon_plugin.methods import method_class, method_names, method_options
from selcon_plugin.options import Option, options_of
from selcon_plugin.renamed import OPTIONS, VALUES, accept_renamed
from selcon_plugin.samplers.cluster import AUTO

Node = MutableMapping[str, Any]
_OptionsOf = Callable[[str], Mapping[str, Option]]

# What keys of both hosts mean.
CAMERA_PATTERN = (
    "regular expression whose first group, or match, is the camera in a path below the "
    'folder; "" first sub-folder, "none" no cameras'
)
EMBEDDING_DIM = "length of the global feature; 0 is as wide as the backbone"


def run_options() -> dict[str, Option]:
    """Return the options of a run that belong to no method."""
    return options_of(RunOptions)


def clustering_options() -> dict[str, Option]:
    """Return the options of clustering that do not belong to a labeler."""
    return options_of(ClusteringOptions)


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
    clustering: ClusteringOptions, options: Mapping[str, Any]
) -> Labeler:
    """Build a labeler with its filters.

    Args:
        clustering: Options of the clustering.
        options: Constructor arguments of the labeler; checked.

    Returns:
        The labeler.

    Raises:
        ValueError: If a filter needs what the labeler does not have.
    """  # noqa: DOC502  (raised by the functions called here)
    filters: list[LabelFilter] = []
    if clustering.reliability:
        filters.append(ReliabilityFilter())
    if clustering.drop_single_camera:
        filters.append(SingleCameraFilter())
    if clustering.outliers != "drop":
        policy: Any = clustering.outliers  # its check leaves the policies only
        filters.append(OutlierPolicy(policy))
    labeler = labeler_class(clustering.labeler)(**options)
    labeler.center_cameras = clustering.center_cameras
    labeler.filters = tuple(filters)
    if clustering.reliability:
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
                defaults[key] = (
                    option.default if same and not option.special_values else None
                )
        return defaults


_METHODS = _Group("method", "method", method_names, own_method_options)
_LABELERS = _Group("labeler", "labeler", labeler_names, labeler_options)


@dataclass(frozen=True)
class ConfigKeys:
    """The plugin's keys in the config of a host.

    Attributes:
        path: Full key of the node that holds them, for error messages.
        case: Spells an option's name as a key: ``str.upper`` or ``str.lower``.
        extra: Options of the run that only this host has.
    """

    path: str
    case: Callable[[str], str]
    extra: tuple[Option, ...] = ()

    @property
    def clustering_key(self) -> str:
        """Key of the node of clustering, inside that of :attr:`path`."""
        return self.case("clustering")

    @property
    def clustering_path(self) -> str:
        """Full key of the node of clustering."""
        return f"{self.path}.{self.clustering_key}"

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

    def former_keys(self) -> dict[str, None]:
        """Return the former names of keys, unset.

        They stand in the config until it is checked, so that a script may merge files that
        have them.
        """
        return {self.case(name): None for name in OPTIONS}

    def _spelled(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self.case(name): value for name, value in values.items()}

    def _groups(self, node: Node) -> Iterator[tuple[Node, str, _Group]]:
        yield node, self.path, _METHODS
        yield node[self.clustering_key], self.clustering_path, _LABELERS

    def present_key(self, text: str) -> str:
        """Return a key, or the end of one, with its present name for a former one.

        Args:
            text: For instance ``MODEL.SELCON.MAX_BAD_SHARE`` or ``max_bad_share``.
        """
        node, dot, name = text.rpartition(".")
        present = OPTIONS.get(name.lower())
        return f"{node}{dot}{self.case(present)}" if present else text

    # --- names of earlier releases --------------------------------------------------------

    def rename_in_tree(self, content: dict[str, Any]) -> None:
        """Put what a config file sets by former names under the present ones.

        Args:
            content: The file's content; changed in place.

        Raises:
            ValueError: If it sets both names of a key.
        """  # noqa: DOC502  (raised by the functions called here)
        owner, nodes = content, self.path.split(".")
        for name in nodes[:-1]:
            if not isinstance(owner.get(name), dict):
                return
            owner = owner[name]
        if isinstance(owner.get(nodes[-1]), dict):
            owner[nodes[-1]] = accept_renamed(
                owner[nodes[-1]], spell=self.case, label=lambda key: f"{self.path}.{key}"
            )

    def rename_in_words(self, words: Sequence[Any]) -> list[Any]:
        """Put what a command line sets by former names under the present ones.

        Args:
            words: ``KEY VALUE`` pairs.

        Returns:
            Pairs; of a key that comes several times, the last.

        Raises:
            ValueError: If it sets both names of a key.
        """  # noqa: DOC502  (raised by the functions called here)
        given = dict(zip(words[::2], words[1::2], strict=True))
        renamed = accept_renamed(given, spell=lambda name: f"{self.path}.{self.case(name)}")
        return [word for pair in renamed.items() for word in pair]

    def _rename_in_node(self, node: Node) -> None:
        """Take the former names out of a node, and what a script set by them over."""
        former = {key: node.pop(key, None) for key in self.former_keys()}
        given = {key: value for key, value in former.items() if value is not None}
        # A present key with its default counts as not set.
        defaults = self.defaults() if given else {}
        given |= {
            key: node[key]
            for key in map(self.case, {*OPTIONS.values(), *VALUES})
            if key in node and (not defaults or node[key] != defaults[key])
        }
        label = f"{self.path}.{{}}".format
        for key, value in accept_renamed(given, spell=self.case, label=label).items():
            node[key] = value

    # --- the check ------------------------------------------------------------------------

    def check(self, node: Node) -> None:
        """Check every key once; put the chosen method's and labeler's defaults for None.

        What reads the node afterwards trusts it.

        Args:
            node: The plugin's node; changed in place: values are in their options' types,
                and those of former names under the present ones.

        Raises:
            ValueError: If a value is illegal (names key, value and legal range), or if a
                key was set that the chosen method or labeler does not have.
        """  # noqa: DOC502  (raised by the functions called here)
        self._rename_in_node(node)
        self._check_each(node, self.path, self.run_options())
        clustering = node[self.clustering_key]
        self._check_each(clustering, self.clustering_path, clustering_options())
        for owner, label, group in self._groups(node):
            chosen = owner[self.case(group.chooser)]
            self._refuse_others(owner, label, group, chosen)
            known = group.options_of(chosen)
            given = {n: o for n, o in known.items() if owner[self.case(n)] is not None}
            self._check_each(owner, label, given)
            self._fill(owner, known)

    def _check_each(self, owner: Node, label: str, options: Mapping[str, Option]) -> None:
        for name, option in options.items():
            key = self.case(name)
            owner[key] = option.check(owner[key], label=f"{label}.{key}")

    def _refuse_others(self, owner: Node, label: str, group: _Group, chosen: str) -> None:
        """Refuse options of methods, or labelers, other than the chosen one."""
        known = group.options_of(chosen)
        for name, default in group.defaults().items():
            key = self.case(name)
            if name not in known and owner[key] != default:
                raise ValueError(
                    f"{label}.{key} is {owner[key]!r}, but {group.kind} {chosen} has no "
                    f"such option; it has {', '.join(self.case(other) for other in known)}"
                )

    def _fill(self, owner: Node, options: Mapping[str, Option]) -> None:
        for name, option in options.items():
            if owner[self.case(name)] is None:
                owner[self.case(name)] = option.default

    def fill_defaults(self, node: Node, settings: Mapping[str, Any]) -> None:
        """Put, for None, the defaults of the method and the labeler of another config.

        Args:
            node: The plugin's node, with the defaults; changed in place.
            settings: The other config, by full keys. What is not registered here is left.
        """
        self._rename_in_node(node)
        for owner, label, group in self._groups(node):
            key = self.case(group.chooser)
            chosen = settings.get(f"{label}.{key}")
            name = str(chosen if chosen in group.names() else owner[key])
            self._fill(owner, group.options_of(name))

    # --- reading a checked node -----------------------------------------------------------

    def run(self, node: Node) -> RunOptions:
        """Return the options of the run.

        Args:
            node: The plugin's node, checked.

        Returns:
            The options.
        """
        return RunOptions(**{name: node[self.case(name)] for name in run_options()})

    def clustering(self, node: Node) -> ClusteringOptions:
        """Return the options of clustering.

        Args:
            node: The plugin's node, checked.

        Returns:
            The options.
        """
        own = node[self.clustering_key]
        return ClusteringOptions(
            **{name: own[self.case(name)] for name in clustering_options()}
        )

    def selected(self, node: Node, kind: str) -> dict[str, Any]:
        """Return the options of the chosen method or labeler.

        Args:
            node: The plugin's node, checked.
            kind: ``"method"`` or ``"labeler"``.

        Returns:
            Constructor arguments; options left at None are absent. A method with a seed
            gets the run's.
        """
        owner, _, group = next(g for g in self._groups(node) if g[2].kind == kind)
        chosen = owner[self.case(group.chooser)]
        values = {name: owner[self.case(name)] for name in group.options_of(chosen)}
        values = {name: value for name, value in values.items() if value is not None}
        if kind == "method" and "seed" in method_options(chosen):
            values["seed"] = node[self.case("seed")]
        return values

    def labeler(self, node: Node) -> Labeler:
        """Build the labeler that a config describes.

        Args:
            node: The plugin's node, checked.

        Returns:
            The labeler with its filters.
        """
        return configured_labeler(self.clustering(node), self.selected(node, "labeler"))

    # --- merging --------------------------------------------------------------------------

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
        elif path == self.clustering_path:
            known, group = clustering_options(), _LABELERS
        else:
            return ""
        for owner in group.names():
            known.update(group.options_of(owner))
        spelled = {self.case(option): known[option] for option in known}
        return spelled[name].describe() if name in spelled else ""
