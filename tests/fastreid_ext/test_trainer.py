import json
import logging
import re
from pathlib import Path

import pytest
import torch
from fastreid.data.datasets import DATASET_REGISTRY

from selcon_plugin.engine.extraction import calibrate_normalization
from selcon_plugin.fastreid_ext import SelConTrainer, SyntheticPersons
from selcon_plugin.fastreid_ext.embedding import extract_training_set, unwrap
from selcon_plugin.fastreid_ext.trained_model import load_trained_model
from selcon_plugin.runs.metrics import read_metrics


@DATASET_REGISTRY.register()
class ShuffledIdentities(SyntheticPersons):
    """The same images with identities reassigned: nothing may depend on them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        pids = [pid for _, pid, _ in self.train]
        shuffled = [pids[(7 * i + 3) % len(pids)] for i in range(len(pids))]
        self._train = [
            (path, pid, camid)
            for (path, _, camid), pid in zip(self.train, shuffled, strict=True)
        ]


def train(cfg, resume=False, **changes):
    cfg = cfg.clone()
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    # Many tests train twice in one folder.
    trainer = SelConTrainer(cfg, overwrite=not resume)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def state_of(trainer):
    return unwrap(trainer.model).state_dict()


def assert_equal_states(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_training_is_blind_to_identities(tiny_cfg, tmp_path):
    true = train(tiny_cfg, SOLVER__MAX_EPOCH=3)
    shuffled = train(
        tiny_cfg,
        SOLVER__MAX_EPOCH=3,
        DATASETS__NAMES=("ShuffledIdentities",),
        OUTPUT_DIR=str(tmp_path / "shuffled"),
    )
    pids = [
        trainer.data_loader.dataset.evaluation_only_pids for trainer in (true, shuffled)
    ]
    assert pids[0] != pids[1]
    assert_equal_states(state_of(true), state_of(shuffled))


def test_training_changes_weights_and_fills_banks(tiny_cfg):
    trainer = SelConTrainer(tiny_cfg)
    before = {k: v.clone() for k, v in state_of(trainer).items()}
    trainer.resume_or_load(False)
    trainer.train()
    after = state_of(trainer)
    weights = [k for k, _ in unwrap(trainer.model).named_parameters()]
    unchanged = [k for k in weights if torch.equal(before[k], after[k])]
    assert not unchanged
    method = unwrap(trainer.model).method
    assert method.step == 2 * trainer.iters_per_epoch
    norms = method.memory.global_bank.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    assert method.memory.mixture_bank.any(dim=1).all()


def test_same_seed_same_run_other_seed_other_run(tiny_cfg):
    first, second = train(tiny_cfg), train(tiny_cfg)
    assert_equal_states(state_of(first), state_of(second))
    other = train(tiny_cfg, MODEL__SELCON__SEED=1)
    name = "heads.part_weight"
    assert not torch.equal(state_of(first)[name], state_of(other)[name])


@pytest.mark.parametrize(
    ("num_workers", "mixed_precision"), [(0, False), (2, False), (0, True)]
)
def test_resumed_run_equals_the_unbroken_one(
    tiny_cfg, tmp_path, num_workers, mixed_precision
):
    tiny_cfg.SOLVER.AMP.ENABLED = mixed_precision
    tiny_cfg.SOLVER.AMP.DTYPE = "bfloat16"
    unbroken = train(tiny_cfg, SOLVER__MAX_EPOCH=4)
    changes = {
        "OUTPUT_DIR": str(tmp_path / "broken"),
        "DATALOADER__NUM_WORKERS": num_workers,
        "SOLVER__MAX_EPOCH": 4,
    }
    # The run stops after its second epoch, as if killed there: its checkpoint is not final.
    trainer = _trainer(tiny_cfg, changes)
    trainer.resume_or_load(False)
    trainer.max_epoch = 2
    trainer.train()
    last = tmp_path / "broken" / "last_checkpoint"
    (tmp_path / "broken" / "model_final.pth").unlink()
    last.write_text("model_0000.pth")
    resumed = train(tiny_cfg, resume=True, **changes)
    assert resumed.start_epoch == 1
    assert_equal_states(state_of(unbroken), state_of(resumed))


def _trainer(cfg, changes):
    cfg = cfg.clone()
    for key, value in changes.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return SelConTrainer(cfg)


def test_weights_of_another_run_bring_no_banks(tiny_cfg, tmp_path):
    first = train(tiny_cfg)
    tiny_cfg.MODEL.WEIGHTS = str(Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth")
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "second")
    second = SelConTrainer(tiny_cfg)
    second.resume_or_load(False)
    model, method = unwrap(second.model), unwrap(second.model).method
    assert torch.equal(model.heads.part_weight, unwrap(first.model).heads.part_weight)
    assert not method.prepared
    assert method.step == 0
    assert not method.memory.global_bank.any()


def test_resuming_with_other_images_is_refused(tiny_cfg):
    train(tiny_cfg)
    with pytest.raises(ValueError, match=r"cannot resume: .*seed was 0 and is 7"):
        train(tiny_cfg, resume=True, MODEL__SELCON__SEED=7)
    with pytest.raises(ValueError, match=r"num_images was 40 and is 50"):
        train(tiny_cfg, resume=True, DATASETS__SYNTHETIC_PERSONS__NUM_TRAIN_IDS=10)


@pytest.mark.parametrize(("num_people", "epochs"), [(2, 1), (2, 2), (4, 1)])
def test_run_of_a_step_or_two(tiny_cfg, num_people, epochs):
    """FastReID's printer fails where an epoch has no step that its timer counts."""
    tiny_cfg.DATASETS.SYNTHETIC_PERSONS.NUM_TRAIN_IDS = num_people
    tiny_cfg.DATASETS.SYNTHETIC_PERSONS.IMAGES_PER_ID = 4
    trainer = train(tiny_cfg, SOLVER__MAX_EPOCH=epochs)
    assert trainer.iter == epochs * num_people // 2


def test_period_0_evaluates_only_at_the_end(tiny_cfg):
    trainer = train(tiny_cfg, TEST__EVAL_PERIOD=0, SOLVER__MAX_EPOCH=2)
    assert trainer._last_eval_results["mAP"] > 0
    epochs = [epoch for _, epoch in trainer.storage.history("mAP").values()]
    assert len(epochs) == 1


def test_resuming_a_complete_run_evaluates_it(tiny_cfg):
    trained = train(tiny_cfg)._last_eval_results
    again = SelConTrainer(tiny_cfg)
    again.resume_or_load(True)
    assert again.train() == trained


def test_missing_weights_are_named(tiny_cfg):
    tiny_cfg.MODEL.WEIGHTS = "nowhere.pth"
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS 'nowhere\.pth'"):
        SelConTrainer(tiny_cfg).resume_or_load(False)


def test_only_the_newest_checkpoints_stay_if_asked(tiny_cfg):
    train(tiny_cfg, SOLVER__MAX_EPOCH=5, MODEL__SELCON__KEEP_CHECKPOINTS=2)
    periodic = Path(tiny_cfg.OUTPUT_DIR).glob("model_[0-9]*.pth")
    assert sorted(file.name for file in periodic) == ["model_0002.pth", "model_0003.pth"]
    assert (Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth").exists()


def test_best_weights_without_labels_are_kept(tiny_cfg, monkeypatch):
    # Untrained, a network this small puts most images into one cluster.
    monkeypatch.setattr("selcon_plugin.metrics.collapse.MAX_CLUSTER_RATIO", 1.0)
    trainer = train(
        tiny_cfg,
        SOLVER__MAX_EPOCH=2,
        MODEL__SELCON__METHOD="SelConCluster",
        MODEL__SELCON__CLUSTERING__EPS=0.7,
        MODEL__SELCON__CLUSTERING__K1=8,
        MODEL__SELCON__CLUSTERING__K2=3,
        MODEL__SELCON__CLUSTERING__MIN_SAMPLES=2,
        MODEL__SELCON__KEEP_BEST_BY="outlier_ratio",
    )
    folder = Path(tiny_cfg.OUTPUT_DIR)
    kept = torch.load(folder / "best_without_labels.pth", weights_only=True)
    assert not any(key.startswith("method.") for key in kept["model"])
    measured = [
        line["outlier_ratio"]
        for line in read_metrics(folder / "metrics.json")
        if "outlier_ratio" in line
    ]
    # Of the untrained network, after one epoch; after both, only the keeper knows.
    assert trainer.best.value <= measured[1]
    assert kept["epochs"] == (1 if trainer.best.value == measured[1] else 2)
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(folder / "best_without_labels.pth")
    model = load_trained_model(cfg)
    for key, value in model.state_dict().items():
        if not key.startswith("method."):
            assert torch.equal(value, kept["model"][key])

    cfg.MODEL.WEIGHTS = ""
    resumed = SelConTrainer(cfg)
    resumed.resume_or_load(True)
    assert resumed.best.value == trainer.best.value


def test_half_written_checkpoint_never_takes_the_place_of_a_whole_one(
    tiny_cfg, monkeypatch
):
    trainer = train(tiny_cfg)
    file = Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth"
    whole = file.read_bytes()

    def die(data, stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.checkpointer.save("model_final")
    assert file.read_bytes() == whole


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="before torch 2.6 the safe loader knows no Counter, which schedulers hold",
)
def test_checkpoint_is_read_without_running_code_from_it(tiny_cfg):
    train(tiny_cfg)
    file = Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth"
    from selcon_plugin.compat.fastreid import prepare_fastreid

    prepare_fastreid()  # allows the NumPy scalars that FastReID saves, nothing more
    checkpoint = torch.load(file, weights_only=True)
    assert {"model", "optimizer", "lr_sched", "run", "epoch"} <= checkpoint.keys()
    assert "method.memory.mixture_bank" in checkpoint["model"]


def test_metrics_reach_the_writers(tiny_cfg):
    train(tiny_cfg, MODEL__SELCON__DIAGNOSTICS_PERIOD=1, SOLVER__MAX_EPOCH=3)
    folder = Path(tiny_cfg.OUTPUT_DIR)
    lines = [
        json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()
    ]
    last = {key: value for line in lines for key, value in line.items()}
    assert {"loss_global", "loss_part", "total_loss", "lr", "mAP"} <= last.keys()
    assert 0 <= last["neighbor_precision"] <= 1
    assert -1 <= last["bank_agreement"] <= 1
    assert list(folder.glob("events.out.tfevents*"))


def test_config_with_bag_of_tricks_needs_one_line(tiny_cfg, caplog):
    """A FastReID config made for identities trains when its meta-architecture is SelCon."""
    changes = {
        "MODEL__HEADS__WITH_BNNECK": True,
        "MODEL__HEADS__NECK_FEAT": "after",
        "MODEL__HEADS__CLS_LAYER": "CircleSoftmax",
        "MODEL__HEADS__NUM_CLASSES": 751,
        "MODEL__LOSSES__NAME": ("CrossEntropyLoss", "TripletLoss"),
        "DATALOADER__SAMPLER_TRAIN": "NaiveIdentitySampler",
        "INPUT__AUTOAUG__ENABLED": True,
        "INPUT__AUTOAUG__PROB": 0.5,
        "INPUT__CJ__ENABLED": True,
        "SOLVER__OPT": "Adam",
        "SOLVER__AMP__ENABLED": True,
        "SOLVER__SCHED": "CosineAnnealingLR",
        "SOLVER__WARMUP_ITERS": 3,
        "TEST__PRECISE_BN__ENABLED": True,
        "TEST__PRECISE_BN__NUM_ITER": 2,
        "DATASETS__COMBINEALL": True,
    }
    trainer = train(tiny_cfg, **changes)
    num_images = len(trainer.data_loader.dataset)
    assert num_images > 40  # query and gallery joined the training set
    assert unwrap(trainer.model).method.num_images == num_images


def test_baseline_config_is_refused(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "Baseline"
    with pytest.raises(ValueError, match=r"META_ARCHITECTURE is 'Baseline'.*SelCon"):
        SelConTrainer(tiny_cfg)


def test_fresh_normalization_gets_the_statistics_of_the_images(tiny_cfg):
    trainer = SelConTrainer(tiny_cfg)
    model = unwrap(trainer.model)
    dataset = trainer.data_loader.dataset
    backbone_before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    assert calibrate_normalization(model, dataset, 16)
    assert model.training
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, backbone_before[name]), name
    norm = model.heads.global_norm
    assert norm.momentum == pytest.approx(0.1)
    seen = []
    hook = norm.register_forward_hook(lambda _, __, output: seen.append(output))
    model.eval()
    model.embed(torch.stack([dataset[i]["images"] for i in range(len(dataset))]))
    hook.remove()
    assert (
        seen[0].mean(dim=0).abs().mean() < 0.3
    )  # centered, where it was 1 and more before
    assert not calibrate_normalization(model, dataset, 16)


class OutputTypes:
    """Notes in which type the backbone computes, in training steps and otherwise."""

    def __init__(self, network):
        self.steps, self.others = set(), set()
        network.backbone.register_forward_hook(self._note)

    def _note(self, module, inputs, output):
        seen = self.steps if torch.is_grad_enabled() else self.others
        seen.add(output.dtype)


def test_bfloat16_is_for_steps_and_extraction_not_for_tests(tiny_cfg):
    tiny_cfg.SOLVER.AMP.ENABLED, tiny_cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
    trainer = SelConTrainer(tiny_cfg)
    trainer.resume_or_load(False)
    network = unwrap(trainer.model)
    half = trainer._extract()
    precise = extract_training_set(tiny_cfg, network, trainer.data_loader.dataset)
    for found, expected in zip(half, precise, strict=True):
        assert found.dtype == torch.float32
        cosines = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
        assert cosines.min() > 0.99
        assert not torch.equal(found, expected)

    seen = OutputTypes(network)
    trainer.test(tiny_cfg, trainer.model)
    assert seen.others == {torch.float32}
    before = {name: value.clone() for name, value in state_of(trainer).items()}
    trainer.train()
    assert seen.steps == {torch.bfloat16}
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    changed = [
        name for name, value in state_of(trainer).items() if value.is_floating_point()
    ]
    assert all(value.isfinite().all() for value in state_of(trainer).values())
    assert any(not torch.equal(before[name], state_of(trainer)[name]) for name in changed)


def test_bfloat16_losses_are_close_to_those_of_full_precision(tiny_cfg):
    tiny_cfg.SOLVER.MAX_EPOCH = 1
    tiny_cfg.SOLVER.AMP.DTYPE = "bfloat16"
    losses = []
    for mixed_precision in (False, True):
        tiny_cfg.SOLVER.AMP.ENABLED = mixed_precision
        trainer = train(tiny_cfg)
        history = trainer.storage.history("total_loss")
        losses.append([value for value, _ in history.values()])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["", "float16", "bfloat16"])
@pytest.mark.parametrize("bank_dtype", ["float32", "float16"])
def test_training_on_a_gpu_fills_banks_there(tiny_cfg, precision, bank_dtype):
    changes = {
        "MODEL__DEVICE": "cuda",
        "MODEL__SELCON__BANK_DTYPE": bank_dtype,
        "SOLVER__AMP__ENABLED": bool(precision),
        "SOLVER__AMP__DTYPE": precision or "float16",
        "SOLVER__MAX_EPOCH": 3,
    }
    trainer = train(tiny_cfg, **changes)
    memory = unwrap(trainer.model).method.memory
    for bank in (memory.global_bank, memory.part_bank):
        assert bank.is_cuda
        norms = bank.float().norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms), atol=2e-3)
    assert trainer._last_eval_results["mAP"] > 0


def test_pictures_of_the_last_epoch_go_to_tensorboard(tiny_cfg):
    tiny_cfg.MODEL.SELCON.TENSORBOARD_PICTURES = True
    tiny_cfg.DATASETS.TESTS = ()
    tiny_cfg.SOLVER.MAX_EPOCH = 1
    trainer = SelConTrainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    (vectors,) = Path(tiny_cfg.OUTPUT_DIR).rglob("tensors.tsv")
    images = len(trainer.data_loader.dataset)
    assert len(vectors.read_text().splitlines()) == images


def test_each_stage_leaves_a_line_in_the_log(tiny_cfg, caplog):
    tiny_cfg.MODEL.SELCON.ITERS_PER_EPOCH = 2
    caplog.set_level("INFO", logger="selcon_plugin")
    trainer = SelConTrainer(tiny_cfg)
    logging.getLogger("selcon_plugin").propagate = True
    trainer.resume_or_load(resume=False)
    trainer.train()
    lines = [r.message for r in caplog.records if r.name == "selcon_plugin.engine.progress"]
    assert [line.partition(":")[0] for line in lines] == [
        "Features of 40 images",
        "Training, epoch 1 of 2",
        "Training, epoch 2 of 2",
        "Evaluation on SyntheticPersons",
    ]
    assert re.search(
        r": 2 steps in .*, loss \d+\.\d{3}, .* to the end of the run, ", lines[1]
    )
