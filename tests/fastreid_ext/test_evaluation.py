import pytest
import torch
import torch.nn.functional as F

from selcon_plugin.distance import fused_distance
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.evaluation import RecordingEvaluator, append_camera_term
from selcon_plugin.features import BadFeaturesError


def test_cosine_ranks_by_distance_plus_camera_term():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(12, 6, generator=generator), dim=1)
    camids = torch.arange(12) % 3
    is_query = torch.arange(12) < 4
    extended = append_camera_term(features, camids, is_query, penalty=0.3, num_cameras=3)
    query, gallery = features[:4], features[4:]
    expected = fused_distance(
        query, None, camids[:4], gallery, None, camids[4:], same_camera_penalty=0.3
    )
    unit = F.normalize(extended, dim=1)
    distance = (2 - 2 * unit[:4] @ unit[4:].T) * extended[0].norm() ** 2
    offset = distance - expected  # the common length adds a constant
    assert torch.allclose(offset, offset[0, 0].expand_as(offset), atol=1e-5)


def test_camera_term_is_off_by_default_and_named_in_the_log_when_on(tiny_cfg, caplog):
    model = SelConTrainer.build_model(tiny_cfg).eval()
    plain = SelConTrainer.test(tiny_cfg, model)
    assert "TEST_CAMERA_TERM" not in caplog.text
    tiny_cfg.MODEL.SELCON.TEST_CAMERA_TERM = True
    tiny_cfg.MODEL.SELCON.SAME_CAMERA_PENALTY = 50.0
    with_term = SelConTrainer.test(tiny_cfg, model)
    assert "TEST_CAMERA_TERM is on" in caplog.text
    assert with_term["mAP"] != plain["mAP"]


def test_flip_test_expansion_and_reranking_are_the_hosts(tiny_cfg):
    model = SelConTrainer.build_model(tiny_cfg).eval()
    plain = SelConTrainer.test(tiny_cfg, model)
    for key in ("FLIP", "AQE", "RERANK"):
        cfg = tiny_cfg.clone()
        cfg.TEST[key].ENABLED = True
        if key == "RERANK":
            cfg.TEST.RERANK.K1, cfg.TEST.RERANK.K2 = 5, 3
        results = SelConTrainer.test(cfg, model)
        assert results["mAP"] > 0
        assert results["mAP"] != plain["mAP"], key


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda rows: rows.index_fill(0, torch.tensor([0]), float("nan")), "not finite"),
        (lambda rows: rows.index_fill(0, torch.tensor([0]), float("inf")), "not finite"),
        (lambda rows: rows * 1e30, "not finite"),
        (lambda rows: rows[:-1], r"shape \("),
        (lambda rows: rows.flatten(), r"shape \("),
        (lambda rows: rows.long(), "floating-point"),
    ],
)
def test_wrong_features_are_refused(tiny_cfg, fault, message):
    model = SelConTrainer.build_model(tiny_cfg).eval()
    forward = model.forward
    model.forward = lambda inputs: fault(forward(inputs))
    with pytest.raises(BadFeaturesError, match=message):
        SelConTrainer.test(tiny_cfg, model)


def test_images_without_a_feature_are_noticed(tiny_cfg, monkeypatch):
    tiny_cfg.TEST.IMS_PER_BATCH = 4
    model = SelConTrainer.build_model(tiny_cfg).eval()
    process, seen = RecordingEvaluator.process, []

    def lose_one(self, inputs, outputs):
        seen.append(inputs)
        if len(seen) != 2:
            process(self, inputs, outputs)

    monkeypatch.setattr(RecordingEvaluator, "process", lose_one)
    with pytest.raises(BadFeaturesError, match="queries and gallery images"):
        SelConTrainer.test(tiny_cfg, model)
