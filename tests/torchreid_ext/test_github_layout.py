"""The adapter under torchreid's GitHub layout, where its parts lie without ``reid``.

The installed PyPI release is copied and renamed to that layout: apart from how they write
their imports, the modules of the two are the same. A second interpreter, which finds the
copy first, runs every function in ``CHECKS``. To check one more part of the adapter, write
a function that raises where something is wrong, and list it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("data", "engine", "losses", "metrics", "models", "optim", "utils")


# --- run by the second interpreter -------------------------------------------------------


def check_import():
    from selcon_plugin.compat.torchreid import import_torchreid

    torchreid = import_torchreid()
    assert torchreid.__name__ == "torchreid"
    assert all(hasattr(torchreid, part) for part in PARTS)
    assert importlib.util.find_spec("torchreid.reid") is None


def check_datasets():
    from selcon_plugin.datasets import SyntheticPersonsSpec
    from selcon_plugin.torchreid_ext.datasets import (
        register_datasets,
        register_synthetic_persons,
    )

    register_datasets()
    register_datasets()
    spec = SyntheticPersonsSpec(
        num_train_ids=2, num_test_ids=2, images_per_id=3, num_cameras=2, num_distractors=1
    )
    register_synthetic_persons("few", spec)
    with tempfile.TemporaryDirectory() as root:
        data = data_manager(root, "few")
        assert data.num_train_pids == 2
        (batch,) = data.train_loader
        assert batch["img"].shape == (4, 3, 64, 32)

        (folder,) = Path(root).glob("synthetic_persons-*")
        data = data_manager(str(folder / "query"), "imagefolderreid")
        assert data.num_train_pids == 1
        assert data.fetch_test_loaders("imagefolderreid") == ([], [])


def check_engine():
    from selcon_plugin.torchreid_ext import ImageSelConEngine, register_synthetic_persons

    import torchreid  # isort: skip
    from selcon_plugin.datasets import SyntheticPersonsSpec

    assert issubclass(ImageSelConEngine, torchreid.engine.Engine)
    spec = SyntheticPersonsSpec(
        num_train_ids=4, num_test_ids=2, images_per_id=4, num_cameras=2, num_distractors=1
    )
    register_synthetic_persons("some", spec)
    with tempfile.TemporaryDirectory() as root:
        data = data_manager(root, "some")
        for name in ("osnet_x0_25", "selcon_osnet_x0_25"):
            model = torchreid.models.build_model(name, 4, pretrained=False, use_gpu=False)
            optimizer = torchreid.optim.build_optimizer(model)
            scheduler = torchreid.optim.build_lr_scheduler(optimizer)
            clustering = {"eps": 0.7, "min_samples": 2, "k1": 4, "k2": 2}
            engine = ImageSelConEngine(
                data,
                model,
                optimizer,
                scheduler,
                method="ClusterContrast",
                clustering=clustering,
                use_gpu=False,
                num_instances=2,
            )
            folder = f"{root}/{name}"
            engine.run(save_dir=folder, max_epoch=1)
            assert engine.results["some"]["mAP"] > 0
            assert engine.model.method.step == 4
            assert engine.resume(folder) == 1


CHECKS = (check_import, check_datasets, check_engine)


def data_manager(root, sources):
    import torchreid

    return torchreid.data.ImageDataManager(
        root=root,
        sources=sources,
        height=64,
        width=32,
        batch_size_train=4,
        batch_size_test=4,
        use_gpu=False,
        workers=0,
    )


def run_checks():
    """Print, as one line of JSON, what each check failed of; "" where it passed."""
    failures = {}
    for check in CHECKS:
        try:
            check()
            failures[check.__name__] = ""
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    sys.stdout.write(json.dumps(failures) + "\n")


# --- run by pytest -----------------------------------------------------------------------


def write_github_layout(folder):
    """Copy the installed torchreid into ``folder / "torchreid"``, in the GitHub layout."""
    package = importlib.util.find_spec("torchreid")
    inner = Path(package.origin).parent / "reid"
    if not inner.is_dir():
        pytest.skip("torchreid is installed in the GitHub layout: all tests run under it")
    shutil.copytree(
        inner,
        folder / "torchreid",
        ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c"),
    )
    for path in (folder / "torchreid").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("torchreid.reid", "torchreid"), encoding="utf-8")


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("github_layout")
    write_github_layout(folder)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_adapter_works_under_the_github_layout(failures, check):
    assert not failures[check], failures[check]


if __name__ == "__main__":
    run_checks()
