"""The default folder of a run has the name of its images, and a number if needed."""

import pytest

from selcon_plugin.cli.train import main
from selcon_plugin.config.host_data import RunKeys
from selcon_plugin.workflows import train as module
from selcon_plugin.workflows.train import default_output


class _Host:
    name = "fastreid"
    run_keys = RunKeys("OUTPUT_DIR", "", "", "", "", "")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finish(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "model_final.pth").write_text("x")


def test_each_folder_of_images_has_its_own_output(tmp_path):
    assert default_output(_Host, "some/crops") == "logs/crops"
    assert default_output(_Host, "other/shop/") == "logs/shop"
    _Host.name = "torchreid"
    assert default_output(_Host, "some/crops") == "logs/torchreid/crops"
    _Host.name = "fastreid"


def test_second_run_is_numbered_and_the_last_one_is_continued(tmp_path):
    for number, name in enumerate(("crops", "crops-2", "crops-3"), start=1):
        assert default_output(_Host, "crops") == f"logs/{name}"
        finish(tmp_path, f"logs/{name}")
        for option in ("resume", "overwrite"):
            assert default_output(_Host, "crops", **{option: True}) == f"logs/{name}"
        assert number <= 3
    assert default_output(_Host, "new", resume=True) == "logs/new"


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ValueError, match=r"--resume.*--overwrite"):
        module.train(None, None, resume=True, overwrite=True)
    assert callable(main)
