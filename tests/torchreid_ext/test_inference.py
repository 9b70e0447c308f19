"""Networks of torchreid after training: ``Embedder``, export and features."""

import numpy as np
import pytest
import torch
import yaml
from torchvision import transforms

from selcon_plugin.cli.main import main
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.export import check_crops, export_onnx, export_torchscript
from selcon_plugin.inference.folder_features import FolderFeatures

SMALL = ("data.height", "64", "data.width", "32")
CONFIG = {
    "use_gpu": False,
    "model": {"name": "osnet_x0_25", "pretrained": False},
    "data": {"targets": [], "height": 64, "width": 32, "workers": 0},
    "train": {"optim": "sgd", "lr": 0.02, "max_epoch": 1, "batch_size": 8},
    "selcon": {"num_parts": 2, "num_neighbors": 3, "num_negatives": 20, "warmup_epochs": 1},
}


@pytest.fixture
def images(data_root):
    return sorted(data_root.rglob("*.jpg"))[:12] or sorted(data_root.rglob("*.png"))[:12]


def by_torchreid(model, images):
    """By torchreid's own transform: Pillow, ToTensor, Normalize."""
    transform = transforms.Compose(
        [
            transforms.Resize((64, 32)),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    batch = torch.stack([transform(read_rgb(image)) for image in images])
    with torch.no_grad():
        return torch.nn.functional.normalize(model.eval()(batch), dim=1).numpy()


def plain(name, file, *, classes):
    torch.manual_seed(0)
    model = import_torchreid().models.build_model(
        name, num_classes=classes, pretrained=False, use_gpu=False
    )
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, file
    )
    return model


def test_run_to_features_and_onnx(data_root, images, tmp_path, capsys):
    config, run = tmp_path / "c.yml", tmp_path / "run"
    config.write_text(yaml.safe_dump(CONFIG))
    folder, exported = str(data_root), str(tmp_path / "net.onnx")
    command = ["train", "--config-file", str(config), "--images", folder]
    assert main([*command, "data.save_dir", str(run)]) == 0
    weights = run / "model" / "model.pth.tar-1"
    embedder = Embedder.from_checkpoint(weights, device="cpu")
    network = embedder.backend
    assert (network.method, network.host) == ("SelectiveContrastive", "torchreid")
    assert embedder.dim == 2 * 128  # global and parts
    expected = by_torchreid(network.network, images)
    assert np.allclose(embedder(images), expected, atol=1e-6)
    assert main(["export", "--weights", str(weights), "--onnx", exported]) == 0
    found = []
    for number, form in enumerate((["--weights", str(weights)], ["--onnx", exported])):
        file = str(tmp_path / f"{number}.npz")
        assert main(["extract", "--images", folder, "--output", file, *form]) == 0
        found.append(FolderFeatures.load(file))
    assert found[0].paths == found[1].paths
    assert np.allclose(found[0].features, found[1].features, atol=1e-5)


@pytest.mark.parametrize("name", ["osnet_x0_25", "resnet18"])
def test_plain_weights_give_the_models_own_feature(name, images, tmp_path):
    file = tmp_path / "zoo.pth"
    model = plain(name, file, classes=5)
    embedder = Embedder.from_checkpoint(file, backbone=name, options=SMALL)
    assert np.allclose(embedder(images), by_torchreid(model, images), atol=1e-6)
    crops = check_crops(number=22)
    for check in (
        export_onnx(embedder.backend, tmp_path / "n.onnx", crops=crops),
        export_torchscript(embedder.backend, tmp_path / "n.pt", crops=crops),
    ):
        assert check.max_difference < 1e-5
    half = export_onnx(embedder.backend, tmp_path / "n.onnx", crops=crops, fp16=True)
    assert half.max_difference < 5e-3


def test_models_that_need_contiguous_images_are_embedded(images, tmp_path):
    model = plain("pcb_p4", tmp_path / "zoo.pth", classes=5)
    embedder = Embedder.from_checkpoint(
        tmp_path / "zoo.pth", backbone="pcb_p4", options=SMALL
    )
    assert np.allclose(embedder(images), by_torchreid(model, images), atol=1e-6)


def test_plain_weights_of_timm_give_the_average_of_the_map(images, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=0, output_stride=16)
    file = tmp_path / "timm.pth"
    torch.save(model.state_dict(), file)
    options = ("selcon.last_stride", "1", *SMALL)
    embedder = Embedder.from_checkpoint(file, backbone="timm:test_resnet", options=options)
    # timm's test models are normalized by one half, and not by ImageNet's mean.
    pixels = np.stack([embedder.backend.preprocessing.resize(read_rgb(i)) for i in images])
    mean, std = np.array(model.pretrained_cfg["mean"]), model.pretrained_cfg["std"]
    batch = torch.from_numpy(((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        maps = model.eval().forward_features(batch)
    expected = torch.nn.functional.normalize(maps.mean((2, 3)), dim=1).numpy()
    assert np.allclose(embedder(images), expected, atol=1e-5)


def test_weights_of_another_model_are_refused(tmp_path):
    file = tmp_path / "zoo.pth"
    plain("osnet_x0_25", file, classes=5)
    with pytest.raises(ValueError, match="is of another network"):
        Embedder.from_checkpoint(file, backbone="osnet_x0_5")
    with pytest.raises(ValueError, match="did you mean osnet_x0_25"):
        Embedder.from_checkpoint(file, backbone="osnet_x0_24")
