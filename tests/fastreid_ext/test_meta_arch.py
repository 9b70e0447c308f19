import pytest
import torch
from fastreid.config import get_cfg
from fastreid.modeling.heads import REID_HEADS_REGISTRY
from fastreid.modeling.meta_arch import build_model
from torch import nn

from selcon_plugin.distance import fused_distance
from selcon_plugin.fastreid_ext import add_selcon_config
from selcon_plugin.fastreid_ext.heads import GlobalPartHead


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    tiny_cfg.MODEL.HEADS.NUM_CLASSES = 12
    return build_model(tiny_cfg)


def batch(size=4, height=64, width=32):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, height, width, generator=generator) * 255
    return {
        "images": images,
        "targets": torch.arange(size),
        "camids": torch.arange(size) % 2,
    }


def test_test_feature_ranks_like_the_training_distance(model):
    model.eval()
    embeddings = model.embed(batch(8)["images"])
    features = model(batch(8))
    distance = fused_distance(*embeddings, None, *embeddings, None)
    assert torch.allclose(features.norm(dim=1), torch.ones(8), atol=1e-6)
    assert torch.allclose(2 - 2 * features @ features.T, distance, atol=1e-5)


def test_images_are_left_as_they_were(model):
    inputs = batch()
    before = inputs["images"].clone()
    model.eval()
    first = model(inputs)
    assert torch.equal(inputs["images"], before)
    assert torch.equal(model(inputs), first)


def test_one_step_reads_then_writes(model):
    model.train()
    model.method.start_epoch(5)
    banks = model.method.memory.state_dict()
    before = {name: bank.clone() for name, bank in banks.items()}
    sum(model(batch()).values()).backward()
    assert all(torch.equal(banks[name], before[name]) for name in banks)
    model.update_banks()
    assert all(not torch.equal(banks[name][:4], before[name][:4]) for name in banks)
    with pytest.raises(RuntimeError, match="training step"):
        model.update_banks()


def test_precise_bn_pass_computes_no_loss(model):
    model.train()
    inputs = batch()
    inputs["targets"].fill_(-1)  # what FastReID's update_bn_stats does
    norm = model.heads.global_norm
    before = norm.running_mean.clone()
    with torch.no_grad():
        assert model(inputs) == {}
    assert not torch.equal(norm.running_mean, before)


def test_training_without_number_of_images_says_who_sets_it(tiny_cfg):
    model = build_model(tiny_cfg)
    assert model.method is None
    model.eval()
    assert model(batch()).shape[0] == 4
    model.train()
    with pytest.raises(RuntimeError, match="SelConTrainer"):
        model(batch())


def test_more_parts_than_rows_is_an_error_that_names_the_remedy(tiny_cfg):
    tiny_cfg.MODEL.SELCON.NUM_PARTS = 8
    with pytest.raises(ValueError, match=r"4 rows into 8 .*NUM_PARTS.*larger input"):
        build_model(tiny_cfg)


@pytest.mark.parametrize(
    "pool", ["GlobalAvgPool", "GeneralizedMeanPoolingP", "GlobalMaxPool"]
)
@pytest.mark.parametrize("num_parts", [0, 3, 4])
def test_head_options(tiny_cfg, pool, num_parts):
    tiny_cfg.MODEL.HEADS.POOL_LAYER = pool
    tiny_cfg.MODEL.SELCON.NUM_PARTS = num_parts
    tiny_cfg.MODEL.HEADS.EMBEDDING_DIM = 24
    tiny_cfg.MODEL.HEADS.WITH_BNNECK = True
    tiny_cfg.MODEL.HEADS.NUM_CLASSES = 6
    model = build_model(tiny_cfg).train()
    assert not model.heads.global_norm.bias.requires_grad
    sum(model(batch()).values()).backward()
    model.eval()
    assert model(batch()).shape == (4, 48 if num_parts else 24)


def test_unknown_pooling_lists_the_known(tiny_cfg):
    tiny_cfg.MODEL.HEADS.POOL_LAYER = "MeanPool"
    with pytest.raises(ValueError, match=r"POOL_LAYER.*GlobalAvgPool.*'MeanPool'"):
        build_model(tiny_cfg)


def test_own_head_must_return_embeddings(tiny_cfg):
    class VectorHead(GlobalPartHead):
        def forward(self, feature_map):
            return super().forward(feature_map).global_features

    REID_HEADS_REGISTRY.register(VectorHead)
    tiny_cfg.MODEL.HEADS.NAME = "VectorHead"
    model = build_model(tiny_cfg).eval()
    with pytest.raises(TypeError, match=r"MODEL\.HEADS\.NAME"):
        model(batch())


HOST_BACKBONES = {
    "resnet": {"NAME": "build_resnet_backbone", "DEPTH": "18x"},
    "osnet": {"NAME": "build_osnet_backbone", "DEPTH": "x0_25"},
    "mobilenetv3": {"NAME": "build_mobilenetv3_backbone", "DEPTH": "Small"},
    "repvgg": {"NAME": "build_repvgg_backbone", "DEPTH": "A0"},
    "vit": {"NAME": "build_vit_backbone", "DEPTH": "small"},
}


@pytest.mark.parametrize("name", HOST_BACKBONES)
def test_host_backbone_trains_a_step_only_by_config(name):
    cfg = add_selcon_config(get_cfg())
    cfg.MODEL.META_ARCHITECTURE = "SelCon"
    cfg.MODEL.DEVICE = "cpu"
    for key, value in HOST_BACKBONES[name].items():
        cfg.MODEL.BACKBONE[key] = value
    cfg.INPUT.SIZE_TRAIN = cfg.INPUT.SIZE_TEST = [256, 128]
    cfg.MODEL.HEADS.NUM_CLASSES = 6
    torch.manual_seed(0)
    model = build_model(cfg).train()
    assert model.heads.num_parts == (0 if name == "vit" else 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.method.start_epoch(3)
    model.method.memory.mixture_bank.normal_()
    sum(model(batch(2, 256, 128)).values()).backward()
    moved = [p for p in model.backbone.parameters() if p.grad is not None and p.grad.any()]
    assert len(moved) > 10
    optimizer.step()
    model.update_banks()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_norm_layers_are_the_hosts(tiny_cfg):
    tiny_cfg.MODEL.HEADS.NORM = "GhostBN"
    model = build_model(tiny_cfg)
    assert type(model.heads.global_norm).__name__ == "GhostBatchNorm"
    assert isinstance(model.heads.global_norm, nn.BatchNorm2d)
