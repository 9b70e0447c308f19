"""Tests of the Python API: train on a folder of crops, index it and search it."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import selcon_plugin
from selcon_plugin.config.host import Host
from selcon_plugin.datasets import SyntheticPersonsSpec, generate_synthetic_persons

ROOT = Path(__file__).parents[2]
SPEC = SyntheticPersonsSpec(
    num_train_ids=6, num_test_ids=4, images_per_id=5, num_cameras=2, num_distractors=0
)
# The network is random and trains for one epoch, so its accuracy is low.
TINY = {
    "epochs": 1,
    "pretrained": False,
    "input_size": (64, 32),
    "batch_size": 8,
    "num_workers": 0,
    "device": "cpu",
    "num_parts": 0,
    "clustering": {"eps": 0.7, "min_samples": 2, "k1": 8, "k2": 3},
}


def needs(host):
    if (
        importlib.util.find_spec(host) is None
    ):  # do not import it: it needs compat's patches first
        pytest.skip(f"{host} is not installed")


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    return next(root.rglob("bounding_box_train"))


@pytest.mark.parametrize(
    ("host", "backbone"), [("fastreid", "timm:test_resnet"), ("torchreid", "osnet_x0_25")]
)
def test_fits_embeds_indexes_and_searches(tmp_path, crops, host, backbone):
    needs(host)
    run = selcon_plugin.fit(
        crops,
        tmp_path / "run",
        host=host,
        backbone=backbone,
        camera_pattern=r"c(\d)",
        **TINY,
    )
    assert run.weights.is_file()
    assert (run.record["method"], run.record["epochs"]) == ("SelConCluster", 1)
    assert run.metrics == {}
    embedder = run.embedder()
    assert embedder.input_size == (64, 32)
    folder = embedder.embed_folder(crops)
    assert folder.features.shape == (30, embedder.dim)

    index = selcon_plugin.Index.create(tmp_path / "index", embedder)
    index.add(crops, embedder, camera_pattern=r"c(\d)")
    query = Path(folder.paths[7])
    (found,) = selcon_plugin.search(index, [query], embedder=embedder, top=29)
    cosines = folder.features @ folder.features[7]
    expected = [folder.paths[row] for row in np.argsort(-cosines, kind="stable")]
    assert sorted(m.path for m in found.matches) == sorted(set(expected) - {str(query)})
    by_path = dict(zip(folder.paths, cosines, strict=True))
    for match in found.matches:
        assert match.similarity == pytest.approx(by_path[match.path], abs=1e-5)
        assert match.camera == re.search(r"c(\d)", match.path)[1]


@pytest.mark.parametrize("host", ["fastreid", "torchreid"])
def test_options_become_the_keys_of_the_host(monkeypatch, tmp_path, crops, host):
    needs(host)
    seen = {}

    def note(self, file, *, overrides, images, camera_pattern):
        seen.update(overrides)
        raise InterruptedError

    monkeypatch.setattr(Host, "load_config", note)
    asked = {
        "backbone": "osnet_x0_25",
        "temperature": 0.1,
        "clustering": {"eps": "auto"},
        "input_size": (128, 64),
        "device": "cpu",
    }
    own = {
        "fastreid": {"keys": {"SOLVER.BASE_LR": 0.5}},
        "torchreid": {"pretrained": "w.pth"},
    }
    with pytest.raises(InterruptedError):
        selcon_plugin.fit(crops, tmp_path, host=host, **asked, **own[host])
    expected = {
        "fastreid": {
            "OUTPUT_DIR": str(tmp_path),
            "MODEL.META_ARCHITECTURE": "SelCon",
            "MODEL.SELCON.METHOD": "SelConCluster",
            "MODEL.SELCON.TEMPERATURE": 0.1,
            "MODEL.SELCON.CLUSTERING.LABELER": "DBSCAN",
            "MODEL.SELCON.CLUSTERING.EPS": "auto",
            "MODEL.BACKBONE.NAME": "build_torchreid_backbone",
            "MODEL.BACKBONE.TORCHREID_NAME": "osnet_x0_25",
            "MODEL.BACKBONE.PRETRAIN": True,
            "MODEL.BACKBONE.PRETRAIN_PATH": "",
            "INPUT.SIZE_TRAIN": [128, 64],
            "INPUT.SIZE_TEST": [128, 64],
            "MODEL.DEVICE": "cpu",
            "SOLVER.BASE_LR": 0.5,
        },
        "torchreid": {
            "data.save_dir": str(tmp_path),
            "selcon.method": "SelConCluster",
            "selcon.temperature": 0.1,
            "selcon.clustering.labeler": "DBSCAN",
            "selcon.clustering.eps": "auto",
            "model.name": "osnet_x0_25",
            "model.pretrained": True,
            "selcon.weights": "w.pth",
            "data.height": 128,
            "data.width": 64,
            "use_gpu": False,
        },
    }
    assert seen == expected[host]


def test_wrong_arguments_are_explained(tmp_path, crops):
    needs("fastreid")
    with pytest.raises(ValueError, match="host 'mmreid' is unknown"):
        selcon_plugin.fit(crops, tmp_path, host="mmreid")
    with pytest.raises(ValueError, match=r"did you mean MODEL\.SELCON\.TEMPERATURE"):
        selcon_plugin.fit(crops, tmp_path, temprature=0.1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        selcon_plugin.fit(tmp_path / "none", tmp_path / "run", **TINY)


def test_importing_the_package_imports_no_host():
    code = (
        "import sys, selcon_plugin; "
        "assert not {'fastreid', 'torchreid', 'faiss', 'selcon_plugin.inference.embedder'} "
        "& set(sys.modules); "
        "assert selcon_plugin.search.__name__ == 'search'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT)})
    assert set(selcon_plugin.__all__) <= set(dir(selcon_plugin)) | set(
        selcon_plugin._MODULES
    )
    with pytest.raises(AttributeError, match="no attribute 'Indexer'"):
        selcon_plugin.Indexer  # noqa: B018


def test_the_code_of_the_documentation_runs_unchanged(tmp_path, crops, monkeypatch, capsys):
    needs("fastreid")
    text = (ROOT / "docs/python.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    shutil.copytree(crops, "crops")
    first = min(Path("crops").iterdir())
    fit = functools.partial(
        selcon_plugin.fit, backbone="timm:test_resnet", **{**TINY, "epochs": 1}
    )
    monkeypatch.setattr(
        selcon_plugin, "fit", lambda *where, method, epochs: fit(*where, method=method)
    )
    exec(compile(code, "docs/python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r"^cosine -?\d", printed, re.MULTILINE)
    # The query itself is left out: the match is another image.
    path, similarity = printed.splitlines()[-1].split()
    assert Path(path).parent == tmp_path / "crops"
    assert Path(path).name != first.name
    assert 0 < float(similarity) <= 1 + 1e-5
