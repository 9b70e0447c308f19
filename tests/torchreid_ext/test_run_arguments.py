"""Arguments of an engine and of a run are checked before anything is written."""

import pytest

from helpers.engines import assert_equal_states, run


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"start_epoch": 99}, ["start_epoch", "99", "resume"]),
        ({"start_epoch": 1}, ["start_epoch", "1", "not trained"]),
        ({"start_epoch": -1}, ["start_epoch", "-1"]),
        ({"max_epoch": 0}, ["max_epoch", "0"]),
        ({"print_freq": 0}, ["print_freq", "0"]),
        ({"fixbase_epoch": -1}, ["fixbase_epoch", "-1"]),
        ({"eval_freq": "often"}, ["eval_freq", "often"]),
        ({"start_eval": None}, ["start_eval", "None"]),
        ({"ranks": ["a"]}, ["ranks", "'a'"]),
        ({"ranks": [0]}, ["ranks", "0"]),
        ({"ranks": 5}, ["ranks", "5"]),
        ({"ranks": "1,5"}, ["ranks", "1,5"]),
        ({"ranks": [1.5]}, ["ranks", "1.5"]),
        ({"dist_metric": "cosin"}, ["dist_metric", "cosine"]),
        ({"visrank": True}, ["visrank", "test_only"]),
        ({"visrank_topk": 0}, ["visrank_topk", "0"]),
        ({"rerank": "yes"}, ["rerank", "yes"]),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    make_engine, tmp_path, wrong, named
):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match=named[0]) as caught:
        make_engine().run(**{"save_dir": str(folder), "max_epoch": 3} | wrong)
    assert all(word in str(caught.value) for word in named)
    assert not folder.exists()


def test_resumed_run_is_not_longer_than_asked(make_engine, tmp_path):
    run(make_engine(iters_per_epoch=1), tmp_path, 2)
    engine = make_engine(iters_per_epoch=1)
    engine.resume(tmp_path)
    with pytest.raises(ValueError, match=r"start_epoch is 2, beyond .* max_epoch 1"):
        run(engine, tmp_path / "shorter", 1)


@pytest.mark.parametrize(
    "given",
    [{"label_smooth": False}, {"margin": 0.3, "weight_t": 1.0, "weight_x": 0.0}],
    ids=["softmax", "triplet"],
)
def test_arguments_of_supervised_engines_have_no_effect(make_engine, caplog, given):
    assert_equal_states(make_engine(), make_engine(**given))
    (line,) = [r.message for r in caplog.records if "supervised" in r.message]
    assert all(name in line for name in given)


def test_option_of_the_method_is_not_taken_for_an_argument_of_torchreid(
    make_engine, caplog
):
    engine = make_engine(method="DCMIP", margin=0.4)
    assert "supervised" not in caplog.text
    assert engine._method_options["margin"] == 0.4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("label_smoth", None),
        ("temprature", "temperature"),
        ("iters_per_epok", "iters_per_epoch"),
    ],
)
def test_typo_gets_a_suggestion(make_engine, wrong, right):
    with pytest.raises(ValueError, match=wrong) as caught:
        make_engine(**{wrong: 1})
    assert right is None or f"did you mean {right}?" in str(caught.value)
