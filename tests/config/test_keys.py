"""The plugin's settings as keys of some host's config, here a dict of dicts."""

import pytest

from selcon_plugin.clustering import (
    OutlierPolicy,
    ReliabilityFilter,
    SingleCameraFilter,
    build_labeler,
    labeler_names,
)
from selcon_plugin.config.keys import (
    ConfigKeys,
    clustering_options,
    configured_labeler,
    describe_all,
    own_method_options,
    run_options,
    sampler_of,
)
from selcon_plugin.engine.run_options import ClusteringOptions, RunOptions
from selcon_plugin.methods import method_class, method_names, method_options
from selcon_plugin.options import Interval, Option
from selcon_plugin.samplers.cluster import STREAM_SAMPLER, clusters_per_batch
from selcon_plugin.samplers.planners import planner_names

KEYS = ConfigKeys("here.selcon", str.upper, extra=(Option("own", 3, int, Interval(1)),))


def node_with(clustering=(), **values):
    node = KEYS.defaults()
    assert values.keys() <= node.keys()
    node["CLUSTERING"].update(clustering)
    return {**node, **values}


# --- defaults ----------------------------------------------------------------------------


def test_every_option_is_a_key():
    node = KEYS.defaults()
    clustering = node.pop("CLUSTERING")
    expected = {*run_options(), "own"}
    for name in method_names():
        expected |= own_method_options(name).keys()
    assert node.keys() == {name.upper() for name in expected}
    assert node["OWN"] == 3
    assert clustering.keys() > {name.upper() for name in clustering_options()}


def test_default_is_none_where_methods_differ():
    node = KEYS.defaults()
    for name in method_names():
        for key, option in own_method_options(name).items():
            assert node[key.upper()] in (None, option.default)
    assert node["TEMPERATURE"] is None
    assert node["CAMERA_WEIGHT"] == "none"


def test_default_is_none_where_a_word_stands_for_a_number():
    assert KEYS.defaults()["CLUSTERING"]["EPS"] is None


def test_seed_is_the_runs():
    assert "seed" in method_options("SelectiveContrastive")
    assert "seed" not in own_method_options("SelectiveContrastive")
    assert KEYS.selected(node_with(SEED=5), "method")["seed"] == 5


# --- checks ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("labeler", labeler_names())
def test_check_puts_the_defaults_of_the_chosen(method, labeler):
    node = node_with({"LABELER": labeler}, METHOD=method)
    KEYS.check(node)
    for name, option in own_method_options(method).items():
        assert node[name.upper()] == option.default
    before = {**node, "CLUSTERING": dict(node["CLUSTERING"])}
    KEYS.check(node)
    assert node == before
    KEYS.labeler(node)


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ({"OWN": 0}, r"here\.selcon\.OWN .*>= 1.*got 0"),
        ({"METHOD": "Magic"}, r"here\.selcon\.METHOD .*'ClusterContrast'.*'Magic'"),
        ({"SAMPLER": "random"}, r"SAMPLER .*'auto', 'stream', .*'pk_camera'"),
        ({"MICRO_BATCHES": 0}, r"MICRO_BATCHES .*>= 1.*got 0"),
        ({"EMA_DECAY": 1.0}, r"EMA_DECAY .*>= 0.*< 1.*got 1\.0"),
        ({"PROJECT_GLOBAL": 1}, r"PROJECT_GLOBAL .*True or False.*got 1"),
        ({"TEMPERATURE": 0.0}, r"here\.selcon\.TEMPERATURE .*> 0.*got 0\.0"),
        (
            {"METHOD": "ClusterContrast", "NUM_NEIGHBORS": 3},
            r"here\.selcon\.NUM_NEIGHBORS is 3.* ClusterContrast .*TEMPERATURE",
        ),
        (
            {"clustering": {"PERIOD": 0}},
            r"here\.selcon\.CLUSTERING\.PERIOD .*>= 1.*got 0",
        ),
        ({"clustering": {"EPS": "often"}}, r"CLUSTERING\.EPS .* or 'auto', got"),
        (
            {"clustering": {"NUM_CLUSTERS": 7}},
            r"CLUSTERING\.NUM_CLUSTERS is 7, but labeler DBSCAN has no such option",
        ),
    ],
)
def test_illegal_value_names_key_value_and_legal_range(values, fragments):
    with pytest.raises(ValueError, match=fragments):
        KEYS.check(node_with(**values))


@pytest.mark.parametrize("labeler", ["DBSCAN", "KMeans"])
def test_a_former_default_in_a_written_config_is_no_setting_of_another_labeler(labeler):
    """Version 0.1 wrote NUM_CLUSTERS 750 also into the configs of DBSCAN."""
    node = node_with({"NUM_CLUSTERS": 750, "LABELER": labeler})
    KEYS.check(node)
    expected = 750 if labeler == "KMeans" else None
    assert node["CLUSTERING"]["NUM_CLUSTERS"] == expected


def test_whole_numbers_become_numbers():
    node = node_with(TEMPERATURE=1, OUTLIER_RATIO=0)
    KEYS.check(node)
    assert isinstance(KEYS.selected(node, "method")["temperature"], float)
    assert isinstance(KEYS.run(node).outlier_ratio, float)


def test_read_options_are_those_of_the_node():
    node = node_with({"PERIOD": 3, "LABELER": "KMeans"}, NUM_PARTS=2, SEED=4)
    KEYS.check(node)
    assert KEYS.run(node) == RunOptions(num_parts=2, seed=4)
    assert KEYS.clustering(node) == ClusteringOptions(labeler="KMeans", period=3)


def test_selected_options_leave_out_what_was_not_set():
    node = node_with({"EPS": "auto", "K1": 20}, TEMPERATURE=0.2)
    options = KEYS.selected(node, "method")
    assert options["temperature"] == 0.2
    labeler = KEYS.selected(node, "labeler")
    assert (labeler["eps"], labeler["k1"]) == ("auto", 20)
    assert None not in [*options.values(), *labeler.values()]


# --- merging -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "fragments"),
    [
        ("here.selcon.TEMPERATURE", "a number > 0"),
        ("here.selcon.OWN", "a whole number >= 1"),
        ("here.selcon.CLUSTERING.K1", "a whole number >= 1 or 'auto'"),
        ("here.selcon.CLUSTERING.PERIOD", "a whole number >= 1"),
    ],
)
def test_valid_values_are_described(key, fragments):
    assert describe_all(KEYS.options_by_key()[key]) == fragments


# --- what follows from settings ----------------------------------------------------------


@pytest.mark.parametrize("method", method_names())
def test_sampler_is_the_methods_own_unless_named(method):
    assert sampler_of(method, "auto") == method_class(method).default_sampler
    assert sampler_of(method, "auto") in (STREAM_SAMPLER, *planner_names())
    assert sampler_of(method, "group") == "group"


@pytest.mark.parametrize(
    ("sampler", "clusters"),
    [("pk", 4), ("pk_camera", 4), ("proxy", 4), ("group", 2), ("stream", 2)],
)
def test_clusters_that_a_batch_needs(sampler, clusters):
    assert clusters_per_batch(sampler, batch_size=16, num_instances=4) == clusters


def test_filters_follow_the_labeler_in_order():
    assert list(configured_labeler(ClusteringOptions(), {}).filters) == []
    all_on = ClusteringOptions(
        reliability=True, drop_single_camera=True, outliers="singleton"
    )
    labeler = configured_labeler(all_on, {"eps": 0.4})
    assert [type(one) for one in labeler.filters] == [
        ReliabilityFilter,
        SingleCameraFilter,
        OutlierPolicy,
    ]
    assert type(labeler) is type(build_labeler("DBSCAN"))
    assert labeler.eps == 0.4
    assert not labeler.center_cameras
    centered = ClusteringOptions(center_cameras=True)
    assert configured_labeler(centered, {}).center_cameras
