"""``SelConModel`` and its names in torchreid's model factory."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.distance import fused_distance
from selcon_plugin.features import Embeddings, split_stripes
from selcon_plugin.methods import build_method
from selcon_plugin.torchreid_ext import (
    SelConModel,
    build_selcon_model,
    register_models,
    torchreid_model_names,
)
from selcon_plugin.torchreid_ext.weights import load_network

torchreid = import_torchreid()
SIZE = (64, 32)


def build(name="osnet_x0_25", seed=0, **options):
    torch.manual_seed(seed)
    options = {"num_parts": 2, "input_size": SIZE, "pretrained": False, **options}
    return build_selcon_model(name, **options)


def images(count=4, size=SIZE):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


class FixedMap(nn.Module):
    """A backbone whose map is known."""

    def __init__(self, feature_map):
        super().__init__()
        self.register_buffer("feature_map", feature_map)

    def forward(self, images):
        return self.feature_map[: len(images)]


# --- what it computes --------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [0, 2])
def test_embeddings_in_training_unit_features_in_evaluation(num_parts):
    model = build(num_parts=num_parts)
    embeddings = model.train()(images())
    assert isinstance(embeddings, Embeddings)
    assert torch.allclose(embeddings.global_features.norm(dim=1), torch.ones(4), atol=1e-5)
    if num_parts:
        norms = embeddings.part_features.norm(dim=2)
        assert torch.allclose(norms, torch.ones(4, num_parts), atol=1e-5)
    else:
        assert embeddings.part_features is None
    features = model.eval()(images())
    head = model.heads
    assert features.shape == (4, head.global_dim + num_parts * head.part_dim)
    assert torch.allclose(features.norm(dim=1), torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_test_feature_ranks_like_the_training_distance(weight):
    model = build().eval()
    model.global_distance_weight = weight
    embeddings = model.embed(images(8))
    features = model(images(8))
    distance = fused_distance(
        *embeddings, None, *embeddings, None, global_distance_weight=weight
    )
    assert torch.allclose(2 - 2 * features @ features.T, distance, atol=1e-5)


def test_same_map_as_the_torchreid_model():
    model = build("osnet_x0_25").eval()
    plain = torchreid.models.build_model("osnet_x0_25", num_classes=1, pretrained=False)
    plain.load_state_dict(model.backbone.model.state_dict(), strict=False)
    plain.eval()
    expected = plain.featuremaps(images())
    assert torch.allclose(model.backbone(images()), expected, atol=1e-6)


def pooled(kind, rows):
    """Pool by the definition."""
    cells = rows.flatten(2)
    if kind == "avg":
        return cells.mean(dim=2)
    if kind == "max":
        return cells.amax(dim=2)
    return cells.pow(3).mean(dim=2).pow(1 / 3)


@pytest.mark.parametrize("pool", ["avg", "max", "gem"])
def test_pooling_by_definition(pool):
    generator = torch.Generator().manual_seed(0)
    feature_map = torch.rand(4, 6, 4, 2, generator=generator) + 0.1
    model = SelConModel(
        FixedMap(feature_map),
        input_size=SIZE,
        num_parts=2,
        project_global=False,
        pool=pool,
    )
    model.eval()
    head = model.heads
    expected = F.normalize(pooled(pool, feature_map), dim=1)  # a fresh norm does nothing
    found = model.embed(images())
    assert torch.allclose(found.global_features, expected, atol=1e-4)
    for part, stripe in enumerate(split_stripes(feature_map, 2)):
        projected = pooled(pool, stripe) @ head.part_weight[part].T
        expected = F.normalize(projected, dim=1)
        assert torch.allclose(found.part_features[:, part], expected, atol=1e-4)


def test_unknown_pooling_lists_the_known():
    with pytest.raises(ValueError, match=r"pool .*avg, max, gem.*got 'mean'"):
        build(pool="mean")


@pytest.mark.parametrize("bn_neck", [False, True])
def test_neck_has_no_shift_and_torchreid_frees_none(bn_neck):
    model = build(bn_neck=bn_neck)
    torchreid.utils.open_all_layers(model)  # what torchreid does at every epoch
    for norm in (model.heads.global_norm, model.heads.part_norm):
        assert (norm.bias is None) == bn_neck
        assert norm.weight.requires_grad
    biases = [n for n, _ in model.heads.named_parameters() if n.endswith("norm.bias")]
    assert len(biases) == (0 if bn_neck else 2)
    sum(e.sum() for e in model.train()(images())).backward()
    assert model.heads.global_norm.weight.grad is not None


def test_neck_without_bias_only_normalizes_and_scales():
    model = build(bn_neck=True).train()
    seen = []
    model.heads.global_norm.register_forward_hook(lambda *args: seen.append(args[1:]))
    model(images(8))
    (((vectors,), normed),) = seen
    deviation = vectors.var(dim=0, unbiased=False).add(1e-5).sqrt()
    assert torch.allclose(normed, (vectors - vectors.mean(dim=0)) / deviation, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "channels", "parts"),
    [(16, 64, 8), (8, 64, 8), (7, 64, 4), (4, 6, 3), (3, 7, 1), (1, 64, 0), (16, 60, 6)],
)
def test_most_parts_that_fit_are_taken(rows, channels, parts):
    backbone = FixedMap(torch.rand(2, channels, rows, 2))
    assert SelConModel(backbone, input_size=SIZE).heads.num_parts == parts


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="4 rows into 8 horizontal parts"):
        build(num_parts=8)
    with pytest.raises(ValueError, match=r"dimension \(30\) must be a multiple .* \(4\)"):
        build(num_parts=4, embedding_dim=30)


def test_embedding_of_another_size():
    head = build(num_parts=4, embedding_dim=32).heads
    assert (head.global_dim, head.part_dim) == (32, 8)


def test_ghost_batches_reach_backbone_and_head():
    model = build(ghost_batch_size=2, bn_neck=True)
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert norms
    assert {type(norm).__name__[:5] for norm in norms} == {"Ghost"}
    assert model.heads.global_norm.bias is None


def test_other_normalization_of_the_loader_is_undone():
    """A model built for another loader sees the same pixels."""
    torch.manual_seed(0)
    usual = build().eval()
    mean, std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    other = build(pixel_mean=mean, pixel_std=std).eval()
    pixels = torch.rand(2, 3, *SIZE) * 255
    given = [(pixels - model.pixel_mean) / model.pixel_std for model in (usual, other)]
    with torch.no_grad():
        assert torch.allclose(usual(given[0]), other(given[1]), atol=1e-4)


def test_feature_extractor_use():
    """As torchreid's FeatureExtractor: in evaluation mode, again and again."""
    model = build().eval()
    before = copy.deepcopy(model)
    given = images()
    kept = given.clone()
    with torch.no_grad():
        first, second = model(given), model(given)
    assert torch.equal(first, second)
    assert torch.equal(given, kept)
    with torch.no_grad():  # one image or several
        assert torch.allclose(model(given[:1]), first[:1], atol=1e-5)
    assert_equal_states(model, before)


def test_model_in_parallel_gives_the_same():
    model = build().eval()
    assert torch.equal(nn.DataParallel(model)(images()), model(images()))


# --- names in torchreid's factory --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dim"), [("osnet_x0_25", 128), ("mobilenetv2_x1_0", 1280), ("resnet18", 512)]
)
def test_registered_name_builds_through_torchreid(name, dim):
    model = torchreid.models.build_model(
        f"selcon_{name}", num_classes=751, loss="triplet", pretrained=False, use_gpu=False
    )
    assert isinstance(model, SelConModel)
    assert (model.heads.global_dim, model.heads.num_parts) == (dim, 8)
    assert not any("classifier" in key for key in model.state_dict())


def test_every_model_has_a_name_and_a_second_call_changes_nothing():
    factory = vars(torchreid.models)["__model_factory"]
    before = dict(factory)
    names = register_models()
    assert names == register_models()
    assert dict(factory) == before
    assert names == [f"selcon_{name}" for name in torchreid_model_names()]
    assert set(names) < set(before)
    assert len(names) > 40


def test_name_with_and_without_prefix_is_the_same_model():
    assert_equal_states(build("selcon_osnet_x0_25"), build("osnet_x0_25"))


def test_unknown_name_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"no model named 'osnet_x25'; closest: .*x0_25"):
        build("osnet_x25")


def test_timm_model_by_its_prefix():
    model = build("timm:test_resnet")
    assert type(model.backbone).__name__ == "TimmBackbone"
    assert model.eval()(images()).shape[0] == 4


# --- loading weights ---------------------------------------------------------------------


def save(state, file):
    torch.save({"state_dict": state, "epoch": 3}, file)
    return str(file)


def in_training(model, *, teacher=True):
    """Give a model what a run adds: banks, and a teacher of other weights."""
    model.method = build_method("SelectiveContrastive", 6, 128, 2, 64)
    model.method.memory.mixture_bank.normal_()
    if teacher:
        model.add_teacher(0.9)
        for parameter in model.teacher.parameters():
            parameter.data.mul_(1.05)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("teacher", [False, True])
def test_own_checkpoint_gives_the_network_it_was_tested_with(tmp_path, prefix, teacher):
    trained = in_training(build(seed=1), teacher=teacher).eval()
    state = {prefix + key: value for key, value in trained.state_dict().items()}
    model = build(seed=2).eval()
    load_network(model, save(state, tmp_path / "own.pth"))
    assert torch.equal(model(images()), trained(images()))
    assert model.method is None
    model.load_pending_state()
    assert not model._pending_state


@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_torchreid_weights_go_into_the_backbone(tmp_path, prefix, caplog):
    caplog.set_level(logging.INFO)
    plain = torchreid.models.build_model("osnet_x0_25", num_classes=7, pretrained=False)
    state = {prefix + key: value for key, value in plain.state_dict().items()}
    model = build()
    head = copy.deepcopy(model.heads)
    load_network(model, save(state, tmp_path / "plain.pth"))
    for name, value in model.backbone.model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
    assert_equal_states(model.heads, head)
    assert "not in the model, ignored: fc.0.weight" in caplog.text  # the rest


def test_checkpoint_without_parts_drops_them(tmp_path):
    trained = build(seed=1, num_parts=0).eval()
    model = build(seed=2).eval()
    load_network(model, save(trained.state_dict(), tmp_path / "global.pth"))
    assert model.heads.num_parts == 0
    assert torch.equal(model(images()), trained(images()))


def test_file_that_fits_nothing_is_refused(tmp_path):
    file = save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth do not fit OSNet: only 0 of its"):
        load_network(build(), file)
    large, parts = build("osnet_x0_5").state_dict(), build().state_dict()
    # Without their description, as in earlier versions, the tensors decide.
    file = save(dict(large), tmp_path / "large.pth")
    with pytest.raises(
        ValueError, match=r"large\.pth belongs to another model: size mismatch"
    ):
        load_network(build(), file)
    file = save(large, tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"large\.pth .*osnet_x0_5 .*, osnet_x0_25 in"):
        load_network(build(), file)
    file = save(dict(parts), tmp_path / "parts.pth")
    with pytest.raises(ValueError, match=r"parts\.pth belongs .*part_weight.* Build"):
        load_network(build(num_parts=0), file)
    file = save(parts, tmp_path / "parts.pth")
    with pytest.raises(ValueError, match=r"parts\.pth .*parts: 2 .*, 0 .*NUM_PARTS"):
        load_network(build(num_parts=0), file)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_network(build(), "nowhere.pth")


@pytest.mark.parametrize("parallel", [False, True])
def test_banks_loaded_before_there_is_a_method_wait_for_it(parallel):
    trained = in_training(build(seed=1))
    state = copy.deepcopy(trained.state_dict())
    model = build(seed=2)
    if parallel:
        given = {f"module.{key}": value for key, value in state.items()}
        kept = dict(given)
        nn.DataParallel(model).load_state_dict(given)
        assert given == kept  # the caller's dict is left whole
    else:
        model.load_state_dict(state)
    assert model.method is None
    assert model.teacher is None
    model.add_teacher(0.9)
    model.load_pending_state()  # only the teacher's: there is no method yet
    assert_equal_states(model.teacher, trained.teacher)
    model.method = build_method("SelectiveContrastive", 6, 128, 2, 64)
    model.load_pending_state()
    assert_equal_states(model, trained)
    assert not model._pending_state


def test_pending_state_is_loaded_once():
    model = build()
    model.load_state_dict(in_training(build(seed=1)).state_dict())
    in_training(model)
    model.load_pending_state()
    model.method.memory.mixture_bank.zero_()
    model.load_pending_state()
    assert not model.method.memory.mixture_bank.any()


def test_state_of_a_model_in_training_is_loaded_at_once():
    trained, model = in_training(build(seed=1)), in_training(build(seed=2))
    model.load_state_dict(trained.state_dict())
    assert_equal_states(model, trained)


def test_missing_and_foreign_tensors_are_errors():
    model = build()
    state = build(seed=1).state_dict()
    state["heads.unheard_of"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"heads\.unheard_of"):
        model.load_state_dict(state)
    state = build(seed=1).state_dict()
    del state["heads.global_projection.weight"]
    with pytest.raises(RuntimeError, match=r"heads\.global_projection\.weight"):
        model.load_state_dict(state)
