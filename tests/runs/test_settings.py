"""A run resumes with its own settings: every other key is named, with both values."""

import pytest

from selcon_plugin.runs.settings import differing_settings, plain_settings, shown_settings
from selcon_plugin.runs.state import RunState

SETTINGS = {
    "SOLVER.BASE_LR": 0.00035,
    "SOLVER.MAX_EPOCH": 20,
    "INPUT.SIZE_TRAIN": [256, 128],
    "MODEL.SELCON.TEMPERATURE": 0.05,
    "MODEL.SELCON.CLUSTERING.EPS": 0.6,
    "MODEL.SELCON.KEEP_CHECKPOINTS": 0,
    "MODEL.DEVICE": "cuda",
    "OUTPUT_DIR": "logs/a",
    "TEST.IMS_PER_BATCH": 64,
    "DATASETS.IMAGE_FOLDER.ROOT": "crops",
    "selcon.temperature": 0.05,
    "train.lr": 0.1,
    "train.max_epoch": 60,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("SOLVER.BASE_LR", 0.1), ("INPUT.SIZE_TRAIN", (128, 64)), ("train.lr", 0.2)),
        *(("MODEL.SELCON.TEMPERATURE", 0.5), ("selcon.temperature", 0.5)),
        ("MODEL.SELCON.CLUSTERING.EPS", "auto"),
    ],
)
def test_setting_that_changes_training_is_named_with_both_values(key, value):
    found = differing_settings(SETTINGS, {**SETTINGS, key: value})
    assert list(found) == [key]
    text = shown_settings(found, "was", "and is")
    for part in (key, repr(SETTINGS[key]), repr(plain_settings({key: value})[key])):
        assert part in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("SOLVER.MAX_EPOCH", 40), ("train.max_epoch", 80), ("OUTPUT_DIR", "b")),
        *(("MODEL.DEVICE", "cpu"), ("TEST.IMS_PER_BATCH", 1), ("NEW.KEY", 1)),
        *(("MODEL.SELCON.KEEP_CHECKPOINTS", 3), ("DATASETS.IMAGE_FOLDER.ROOT", "moved")),
        ("INPUT.SIZE_TRAIN", (256, 128)),
    ],
)
def test_setting_that_changes_no_trained_weight_may_change(key, value):
    assert differing_settings(SETTINGS, {**SETTINGS, key: value}) == {}


@pytest.mark.parametrize("now", [None, "auto", 700])
def test_a_former_default_of_another_labeler_is_not_compared(now):
    """Version 0.1 recorded num_clusters 750 also for DBSCAN, which now has None there."""
    key = "selcon.clustering.num_clusters"
    found = differing_settings({key: 750}, {key: now})
    assert found == ({} if now is None else {key: (750, now)})


def test_former_names_of_keys_are_understood():
    then = {"MODEL.SELCON.MAX_BAD_STEPS": 3, "selcon.image_share": 0.5}
    same = {"MODEL.SELCON.MAX_NONFINITE_STEPS": 3, "selcon.image_weight": 0.5}
    assert differing_settings(then, same) == {}
    assert differing_settings(then, {**same, "selcon.image_weight": 0.4})


def test_long_lists_of_differences_are_counted():
    found = {f"KEY{i}": (0, 1) for i in range(30)}
    text = shown_settings(found, "was", "and is")
    assert text.endswith("and 22 more")
    assert "\n" not in text


def test_checkpoint_of_other_settings_is_refused_and_an_old_one_is_not():
    state = RunState(SETTINGS, num_images=40).state_dict()
    assert state["settings"].keys() == {
        *("SOLVER.BASE_LR", "INPUT.SIZE_TRAIN", "MODEL.SELCON.TEMPERATURE"),
        *("MODEL.SELCON.CLUSTERING.EPS", "selcon.temperature", "train.lr"),
    }
    RunState(SETTINGS, num_images=40).load_state_dict(state)
    now = RunState({**SETTINGS, "SOLVER.BASE_LR": 0.1}, num_images=41)
    with pytest.raises(
        ValueError, match=r"num_images was 40 and is 41; SOLVER\.BASE_LR was"
    ):
        now.load_state_dict(state)
    RunState(SETTINGS, num_images=40).load_state_dict({"num_images": 40})
