"""Networks of FastReID after training: ``Embedder``, ``selcon extract`` and ``export``."""

import numpy as np
import pytest
import torch
from fastreid.config import get_cfg
from fastreid.data.transforms import build_transforms
from fastreid.modeling.meta_arch import build_model

from selcon_plugin.cli.main import main
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.fastreid_ext import SelCon, SelConTrainer, add_selcon_config
from selcon_plugin.fastreid_ext.config import complete_config
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.inference.export import check_crops, export_onnx, export_torchscript
from selcon_plugin.inference.folder_features import FolderFeatures

RESNET = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.DEPTH": "18x",
    "MODEL.BACKBONE.FEAT_DIM": 512,
    "MODEL.BACKBONE.PRETRAIN": False,
}
BACKBONES = {
    "R18": RESNET,
    "R50-ibn": RESNET | {"MODEL.BACKBONE.DEPTH": "50x", "MODEL.BACKBONE.WITH_IBN": True},
    "timm": {"MODEL.SELCON.GHOST_BATCH_SIZE": 4},
    "timm-vit": {"MODEL.BACKBONE.TIMM_NAME": "test_vit"},
    "osnet": {
        "MODEL.BACKBONE.NAME": "build_torchreid_backbone",
        "MODEL.BACKBONE.TORCHREID_NAME": "osnet_x0_25",
    },
}


def save(model, cfg, folder):
    """Leave what a run leaves: a checkpoint and its config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder / "model_final.pth"


def with_statistics(model, size=(64, 32)):
    """Let batch normalization see images, so that features differ."""
    model.train()
    with torch.no_grad():
        model.heads(model.backbone(torch.randn(16, 3, *size)))
    return model.eval()


@pytest.fixture
def trained(tiny_cfg, tmp_path):
    """Make a checkpoint of a network of the plugin, with some keys changed."""

    def make(**values):
        cfg = tiny_cfg.clone()
        for key, value in values.items():
            cfg.merge_from_list([key, value])
        torch.manual_seed(0)
        model = with_statistics(SelCon(complete_config(cfg)))
        return model, save(model, cfg, tmp_path / "run")

    return make


@pytest.fixture
def images(dataset_root):
    return (
        sorted(dataset_root.rglob("*.jpg"))[:12] or sorted(dataset_root.rglob("*.png"))[:12]
    )


@torch.no_grad()
def features_of(model, cfg, images):
    """By FastReID's own transform and the network's own evaluation."""
    transform = build_transforms(cfg, is_train=False)
    batch = torch.stack([transform(read_rgb(image)) for image in images])
    return torch.nn.functional.normalize(model(batch).flatten(1), dim=1).numpy()


def test_features_are_those_of_the_evaluation(trained, tiny_cfg, images):
    model, weights = trained()
    embedder = Embedder.from_checkpoint(weights, device="cpu")
    expected = features_of(model, tiny_cfg, images)
    assert np.allclose(embedder(images), expected, atol=1e-6)
    assert embedder.input_size == (64, 32)
    assert embedder.dim == expected.shape[1]
    other = Embedder.from_checkpoint(weights, options=("INPUT.SIZE_TEST", "[32, 32]"))
    assert other.input_size == (32, 32)


def test_teacher_takes_the_place_of_the_student(trained, tiny_cfg, images):
    model, weights = trained(**{"MODEL.SELCON.EMA_DECAY": 0.9})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("teacher"):
                parameter.normal_()
    torch.save({"model": model.state_dict()}, weights)
    expected = features_of(model, tiny_cfg, images)
    assert np.allclose(Embedder.from_checkpoint(weights)(images), expected, atol=1e-6)


def test_network_that_was_trained_on_identities(tmp_path, images):
    cfg = add_selcon_config(get_cfg())
    for key, value in RESNET.items():
        cfg.merge_from_list([key, value])
    cfg.MODEL.DEVICE, cfg.INPUT.SIZE_TEST = "cpu", [64, 32]
    heads = cfg.clone()
    heads.MODEL.HEADS.NUM_CLASSES = 7
    torch.manual_seed(0)
    model = with_statistics(build_model(heads))
    weights = save(model, cfg, tmp_path / "run")
    expected = features_of(model, cfg, images)
    embedder = Embedder.from_checkpoint(weights)
    assert np.allclose(embedder(images), expected, atol=1e-6)
    state = model.state_dict()
    del state["backbone.layer4.0.conv1.weight"]
    torch.save({"model": state}, weights)
    with pytest.raises(ValueError, match=r"backbone\.layer4\.0\.conv1\.weight"):
        Embedder.from_checkpoint(weights)


def test_weights_of_another_network_are_refused(trained):
    _, weights = trained()
    with pytest.raises(
        ValueError, match=r"model_final.* 96 in the weights, 6 in the net.*EMBEDDING_DIM"
    ):
        Embedder.from_checkpoint(weights, options=("MODEL.HEADS.EMBEDDING_DIM", "6"))
    with pytest.raises(ValueError, match=r"INPUT\.CROP"):
        Embedder.from_checkpoint(weights, options=("INPUT.CROP.ENABLED", "True"))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "R50-ibn" else ()) for n in BACKBONES],
)
def test_export_of_each_kind_of_backbone(name, trained, tmp_path):
    _, weights = trained(**BACKBONES[name])
    network = Embedder.from_checkpoint(weights, device="cpu").backend
    crops = check_crops(number=22)
    check = export_onnx(network, tmp_path / "net.onnx", crops=crops)
    assert check.max_difference < 1e-5
    assert (
        export_torchscript(network, tmp_path / "net.pt", crops=crops).min_cosine > 0.99999
    )


def test_commands_from_a_run_to_features_without_it(
    tiny_cfg, dataset_root, tmp_path, capsys
):
    """Train, extract by weights, by config and by ONNX: three times the same."""
    tiny_cfg.SOLVER.MAX_EPOCH, tiny_cfg.DATASETS.TESTS = 1, ()
    trainer = SelConTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    out = tmp_path / "out"
    (out / "config.yaml").write_text(tiny_cfg.dump())
    weights, folder = str(out / "model_final.pth"), str(dataset_root)
    exported = str(tmp_path / "net.onnx")
    capsys.readouterr()
    assert main(["export", "--weights", weights, "--onnx", exported]) == 0
    assert "largest difference" in capsys.readouterr().out
    config = ["--config-file", str(out / "config.yaml"), "MODEL.WEIGHTS", weights]
    forms = [["--weights", weights], config, ["--onnx", exported]]
    found = []
    for number, form in enumerate(forms):
        file = str(tmp_path / f"{number}.npz")
        given = ["--images", folder, "--camera-pattern", "none", "--output", file]
        assert main(["extract", *given, *form]) == 0, capsys.readouterr().err
        found.append(FolderFeatures.load(file))
    for other in found[1:]:
        assert other.paths == found[0].paths
        assert np.array_equal(other.camids, found[0].camids)
        assert np.allclose(other.features, found[0].features, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["export"], "--weights"),
        (["export", "--weights", "w.pth"], "--onnx FILE, --torchscript FILE"),
        (["export", "--weights", "w.pth", "--torchscript", "x", "--fp16"], "--fp16"),
        (
            ["export", "--weights", "w.pth", "--onnx", "x"],
            "the checkpoint 'w.pth' does not exist",
        ),
        (["extract", "--images", "i", "--output", "o.npz", "--backbone", "b"], "--weights"),
        (
            ["extract", "--images", "i", "--output", "o.npz", "--onnx", "n", "A", "1"],
            "leave the others out",
        ),
    ],
)
def test_mistakes_end_in_one_line(arguments, fragments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert fragments in error[0]


def test_export_past_the_bound_leaves_no_file(trained, tmp_path, capsys):
    _, weights = trained()
    file = tmp_path / "net.onnx"
    command = ["export", "--weights", str(weights), "--onnx", str(file)]
    assert main([*command, "--max-difference", "1e-12"]) == 2
    assert "is not written" in capsys.readouterr().err
    assert not file.exists()
