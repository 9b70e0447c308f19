"""Config keys of the plugin's options in a host: defaults, checks and selection.

Each option of the run, a method, the clustering or a labeler is a key of the same name.
:class:`ConfigKeys` defines the format of a host's keys; their meaning and their valid
values are the same in all hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
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
from selcon_plugin.config.files import Setting
from selcon_plugin.engine.run_options import ClusteringOptions, RunOptions
from selcon_plugin.methods import method_class, method_names, method_options
from selcon_plugin.options import Option, options_of
from selcon_plugin.renamed import (
    OPTIONS,
    VALUES,
    accept_renamed,
    is_former_default,
    notice,
)
from selcon_plugin.samplers.cluster import AUTO
from selcon_plugin.values import is_empty, listed

Node = MutableMapping[str, Any]
_OptionsOf = Callable[[str], Mapping[str, Option]]

# Meanings of keys that both hosts have.
CAMERA_PATTERN = (
    "regular expression whose first group, or whole match, is the camera in a file or "
    'folder name, or with a slash in the path below the folder; "folders" uses the first '
    'subfolder, "" does so if the subfolders look like cameras, "none" uses no cameras'
)
EMBEDDING_DIM = "dimension of the global feature; 0 uses that of the backbone"


def run_options() -> dict[str, Option]:
    """Return the options of a run that do not belong to a method."""
    return options_of(RunOptions)


def clustering_options() -> dict[str, Option]:
    """Return the options of clustering that do not belong to a labeler."""
    return options_of(ClusteringOptions)


def own_method_options(name: str) -> dict[str, Option]:
    """Return a method's options without the seed, which belongs to the whole run."""
    return {key: o for key, o in method_options(name).items() if key != "seed"}


def sampler_of(method: str, sampler: str) -> str:
    """Return the name of the batch sampler, which for "auto" is the method's own.

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
        options: Checked constructor arguments of the labeler.

    Returns:
        The labeler.

    Raises:
        ValueError: If the labeler does not support a filter.
    """  # noqa: DOC502  (raised by the functions called here)
    filters: list[LabelFilter] = []
    if clustering.reliability:
        filters.append(ReliabilityFilter())
    if clustering.drop_single_camera:
        filters.append(SingleCameraFilter())
    if clustering.outliers != "drop":
        policy: Any = clustering.outliers  # the check allows only the policies
        filters.append(OutlierPolicy(policy))
    labeler = labeler_class(clustering.labeler)(**options)
    labeler.center_cameras = clustering.center_cameras
    labeler.filters = tuple(filters)
    if clustering.reliability:
        labeler.check_reach(ReliabilityFilter().delta)
    return labeler


@dataclass(frozen=True)
class _Group:
    """Options of all methods, or of all labelers, in one node of a config."""

    kind: str
    chooser: str  # option that names the selected one
    names: Callable[[], Sequence[str]]
    options_of: _OptionsOf

    def defaults(self) -> dict[str, Any]:
        """Collect the defaults by option.

        Returns:
            Defaults by option; None where they differ between methods, and where an option
            accepts special values in addition to numbers, because yacs lets a key change
            its type only if its default is None.
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
        path: Full key of the node that contains them, for error messages.
        case: Converts an option's name to a key: ``str.upper`` or ``str.lower``.
        extra: Options of the run that only this host has.
    """

    path: str
    case: Callable[[str], str]
    extra: tuple[Option, ...] = ()

    @property
    def clustering_key(self) -> str:
        """Key of the clustering node, inside the node of :attr:`path`."""
        return self.case("clustering")

    @property
    def clustering_path(self) -> str:
        """Full key of the clustering node."""
        return f"{self.path}.{self.clustering_key}"

    def run_options(self) -> dict[str, Option]:
        """Return the options of the run, including those of this host."""
        return {**run_options(), **{option.name: option for option in self.extra}}

    def defaults(self) -> dict[str, Any]:
        """Return all keys with their defaults; those of clustering are in a nested dict."""
        # None for a key with special values, whose type yacs would not let change.
        run = {
            name: None if option.special_values else option.default
            for name, option in self.run_options().items()
        }
        clustering = {name: o.default for name, o in clustering_options().items()}
        return {
            **self._as_keys({**run, **_METHODS.defaults()}),
            self.clustering_key: self._as_keys({**clustering, **_LABELERS.defaults()}),
        }

    def former_keys(self) -> dict[str, None]:
        """Return the former names of keys with the value None.

        They stay in the config until it is checked, so that a script may merge files with
        former names.
        """
        return {self.case(name): None for name in OPTIONS}

    def _as_keys(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {self.case(name): value for name, value in values.items()}

    def _groups(self, node: Node) -> Iterator[tuple[Node, str, _Group]]:
        yield node, self.path, _METHODS
        yield node[self.clustering_key], self.clustering_path, _LABELERS

    def present_key(self, text: str) -> str:
        """Return a key, or the end of one, with a former name replaced by the present one.

        Args:
            text: Key, for instance ``MODEL.SELCON.MAX_BAD_SHARE`` or ``max_bad_share``.
        """
        node, dot, name = text.rpartition(".")
        present = OPTIONS.get(name.lower())
        return f"{node}{dot}{self.case(present)}" if present else text

    # --- names of earlier releases --------------------------------------------------------

    def rename_entries(self, entries: Mapping[str, Setting]) -> dict[str, Setting]:
        """Replace former names of keys in a file or a command line by the present ones.

        Args:
            entries: Settings by full key.

        Returns:
            Settings by present full key.

        Raises:
            ValueError: If they set a key by both names.
        """
        names = {
            f"{self.path}.{self.case(old)}": f"{self.path}.{self.case(new)}"
            for old, new in OPTIONS.items()
        }
        renamed = dict(entries)
        for old in [key for key in entries if key in names]:
            setting, new = renamed.pop(old), names[old]
            if setting.value is not None and is_empty(setting.value):
                continue  # as a run has written it
            if new in entries:
                raise ValueError(
                    f"{setting.place}: {old} and {new} are two names of one option: leave "
                    f"out {old}, the former one"
                )
            notice(old, new)
            renamed[new] = setting
        return renamed

    def _rename_in_node(self, node: Node) -> None:
        """Move values that a script set by former names to the present names in a node."""
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
        for key, value in accept_renamed(given, format_key=self.case, label=label).items():
            node[key] = value

    # --- the check ------------------------------------------------------------------------

    def check(self, node: Node) -> None:
        """Check every key once, and replace None by the selected method's defaults.

        Functions that read the node afterwards do not check it again.

        Args:
            node: The plugin's node, which is changed in place: values get the types of
                their options, and former names are replaced.

        Raises:
            ValueError: If a value is invalid (the message names key, value and valid
                range), or if a key was set that the selected method or labeler does not
                have.
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
            if owner[key] is None and option.special_values:
                owner[key] = option.default
            owner[key] = option.check(owner[key], label=f"{label}.{key}")

    def _refuse_others(self, owner: Node, label: str, group: _Group, chosen: str) -> None:
        """Refuse options of methods or labelers other than the selected one."""
        known = group.options_of(chosen)
        for name, default in group.defaults().items():
            key = self.case(name)
            if name in known or owner[key] == default:
                continue
            if is_former_default(name, owner[key]) or owner[key] == AUTO:
                # Nobody set it, or it leaves the choice to a labeler that makes none: a
                # config for folders serves every labeler.
                owner[key] = default
            else:
                takers = [n for n in group.names() if name in group.options_of(n)]
                chooser = f"{label}.{self.case(group.chooser)}"
                raise ValueError(
                    f"{label}.{key} is {owner[key]!r}, but {group.kind} {chosen} has no "
                    f"such option; it has {listed(self.case(other) for other in known)}. "
                    f"Remove it, or set {chooser} to {listed(takers)}"
                )

    def _fill(self, owner: Node, options: Mapping[str, Option]) -> None:
        for name, option in options.items():
            if owner[self.case(name)] is None:
                owner[self.case(name)] = option.default

    def fill_defaults(self, node: Node, settings: Mapping[str, Any]) -> None:
        """Replace None by the defaults of another config's method and labeler.

        Args:
            node: The plugin's node with the defaults, which is changed in place.
            settings: Values of the other config by full keys. Names that are not registered
                here are ignored.
        """
        self._rename_in_node(node)
        self._fill(node, self.run_options())
        for owner, label, group in self._groups(node):
            key = self.case(group.chooser)
            chosen = settings.get(f"{label}.{key}")
            name = str(chosen if chosen in group.names() else owner[key])
            self._fill(owner, group.options_of(name))

    # --- reading a checked node -----------------------------------------------------------

    def run(self, node: Node) -> RunOptions:
        """Return the options of the run.

        Args:
            node: Checked node of the plugin.

        Returns:
            The options.
        """
        return RunOptions(**{name: node[self.case(name)] for name in run_options()})

    def clustering(self, node: Node) -> ClusteringOptions:
        """Return the options of clustering.

        Args:
            node: Checked node of the plugin.

        Returns:
            The options.
        """
        own = node[self.clustering_key]
        return ClusteringOptions(
            **{name: own[self.case(name)] for name in clustering_options()}
        )

    def selected(self, node: Node, kind: str) -> dict[str, Any]:
        """Return the options of the selected method or labeler.

        Args:
            node: Checked node of the plugin.
            kind: ``"method"`` or ``"labeler"``.

        Returns:
            Constructor arguments without options that are None. A method with a seed gets
            that of the run.
        """
        owner, _, group = next(g for g in self._groups(node) if g[2].kind == kind)
        chosen = owner[self.case(group.chooser)]
        values = {name: owner[self.case(name)] for name in group.options_of(chosen)}
        values = {name: value for name, value in values.items() if value is not None}
        if kind == "method" and "seed" in method_options(chosen):
            values["seed"] = node[self.case("seed")]
        return values

    def labeler(self, node: Node, num_images: int | None = None) -> Labeler:
        """Build the labeler that a config describes.

        Args:
            node: Checked node of the plugin.
            num_images: Number of training images; None if it is not known.

        Returns:
            The labeler with its filters.

        Raises:
            ValueError: If an option counts more images than there are.
        """  # noqa: DOC502  (raised by the function called here)
        options = self.selected(node, "labeler")
        labeler = configured_labeler(self.clustering(node), options)
        if num_images is not None:
            labeler.check_counts(num_images, self.clustering_name)
        return labeler

    def clustering_name(self, option: str) -> str:
        """Return the full key of an option of the clustering."""
        return f"{self.clustering_path}.{self.case(option)}"

    # --- merging --------------------------------------------------------------------------

    def optional_keys(self) -> set[str]:
        """Return the full keys whose default is None: a later file may set them to null."""
        keys = self.defaults()
        own = {f"{self.path}.{key}" for key, value in keys.items() if value is None}
        clustering = keys[self.clustering_key]
        return own | {
            f"{self.clustering_path}.{key}"
            for key, value in clustering.items()
            if value is None
        }

    def options_by_key(self) -> dict[str, list[Option]]:
        """Return the options that each key of the plugin stands for.

        Returns:
            By full key, such as ``MODEL.SELCON.TEMPERATURE``: one option, or those of the
            methods or labelers that share the key.
        """
        found: dict[str, list[Option]] = {}
        for path, own, group in (
            (self.path, self.run_options(), _METHODS),
            (self.clustering_path, clustering_options(), _LABELERS),
        ):
            sets = [own, *(group.options_of(name) for name in reversed(group.names()))]
            for name, option in ((n, o) for options in sets for n, o in options.items()):
                found.setdefault(f"{path}.{self.case(name)}", []).append(option)
        return found


def describe_all(options: Sequence[Option]) -> str:
    """Describe the valid values of a key that several methods or labelers share."""
    special = [text for option in options for text in option.special_values]
    widest = replace(options[0], special_values=tuple(dict.fromkeys(special)))
    return widest.describe()
