"""Non-finite values and collapse in whole runs of FastReID."""

import logging
import re

import pytest
import torch
from fastreid.engine.train_loop import HookBase

from selcon_plugin.cli.main import main
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.embedding import unwrap

CLUSTERED = [
    *("MODEL.SELCON.METHOD", "ClusterContrast"),
    *("MODEL.SELCON.CLUSTERING.EPS", 0.7),
    *("MODEL.SELCON.CLUSTERING.MIN_SAMPLES", 2),
    *("MODEL.SELCON.CLUSTERING.K1", 8),
    *("MODEL.SELCON.CLUSTERING.K2", 3),
    *("DATALOADER.NUM_INSTANCE", 2),
]
OTHER_METHODS_KEYS = ("NUM_NEIGHBORS", "NUM_NEGATIVES", "WARMUP_EPOCHS")


class Messages(logging.Handler):
    """Warnings of the package, as a user sees them."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []
        logging.getLogger("selcon_plugin").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())

    def about(self, fragments):
        return [text for text in self.texts if fragments in text]


class Spoiler(HookBase):
    """Puts a NaN into the pixels of one image whenever it is sampled."""

    def __init__(self, model, bad_steps):
        self.step, self.bad_steps, self.states = 0, bad_steps, {}
        model.register_forward_pre_hook(self.spoil)
        self.model = model

    def spoil(self, model, arguments):
        if model.training and self.step in self.bad_steps:
            self.states[self.step] = {k: v.clone() for k, v in model.state_dict().items()}
            images = arguments[0]["images"]
            arguments[0]["images"] = images.index_fill(0, torch.tensor([2]), torch.nan)

    def after_step(self):
        if self.step in self.states:
            for name, value in self.model.state_dict().items():
                assert torch.equal(value, self.states[self.step][name]), name
        self.step += 1


def trainer_of(cfg, *changes, bad_steps=()):
    cfg.DATASETS.TESTS = ()
    if "ClusterContrast" in changes:
        for key in OTHER_METHODS_KEYS:
            cfg.MODEL.SELCON[key] = None
    cfg.merge_from_list(list(changes))
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(False)
    spoiler = Spoiler(unwrap(trainer.model), bad_steps)
    trainer.register_hooks([spoiler])
    return trainer


def finite(model):
    return all(
        v.isfinite().all() for v in model.state_dict().values() if v.is_floating_point()
    )


@pytest.mark.parametrize("method", ["SelectiveContrastive", "ClusterContrast"])
def test_run_continues_without_the_nonfinite_steps(tiny_cfg, method):
    changes = CLUSTERED if method == "ClusterContrast" else []
    trainer = trainer_of(tiny_cfg, *changes, bad_steps=(1, 2, 6))
    messages = Messages()
    trainer.train()
    model = unwrap(trainer.model)
    assert finite(model)
    assert model.method.step == 10 - 3
    skipped = messages.about("Skipped step")
    assert [re.search(r"step (\d+)", text)[1] for text in skipped] == ["2", "3", "7"]
    assert all("pixels are not finite in " in text and ".jpg" in text for text in skipped)


def test_teacher_stands_still_and_schedule_continues(tiny_cfg):
    tiny_cfg.MODEL.SELCON.EMA_DECAY = 0.9
    trainer = trainer_of(tiny_cfg, bad_steps=(3,))
    trainer.train()
    assert unwrap(trainer.model).teacher.step == 9
    assert trainer.iter == 10


def test_stopping_by_option_writes_no_checkpoint(tiny_cfg, tmp_path):
    trainer = trainer_of(tiny_cfg, "MODEL.SELCON.ON_NONFINITE", "stop", bad_steps=(6,))
    with pytest.raises(FloatingPointError, match=r"step 7: .*pixels are not finite"):
        trainer.train()
    assert finite(unwrap(trainer.model))
    names = {file.name for file in (tmp_path / "out").glob("*.pth")}
    assert names == {"model_0000.pth"}


def test_bound_on_steps_in_a_row(tiny_cfg):
    changes = ["MODEL.SELCON.MAX_NONFINITE_STEPS", 2]
    trainer = trainer_of(tiny_cfg, *changes, bad_steps=(1, 3, 4, 5))
    with pytest.raises(FloatingPointError, match=r"step 5: .* 2 such steps in a row"):
        trainer.train()


def test_spoilt_weights_are_not_trained_on_nor_used(
    tiny_cfg, tiny_values, tmp_path, capsys
):
    trainer = trainer_of(tiny_cfg, "SOLVER.MAX_EPOCH", 1)
    trainer.train()
    file = tmp_path / "out" / "model_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["model"]["heads.part_weight"][0, 0, 0] = torch.inf
    torch.save(checkpoint, file)
    changes = {"MODEL.WEIGHTS": file, "OUTPUT_DIR": tmp_path / "again"}
    options = [str(part) for pair in (tiny_values | changes).items() for part in pair]
    capsys.readouterr()
    assert main(["train", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "selcon train: error: after loading: weights are not finite: heads.part_weight"
    )


def test_last_weights_of_an_epoch_are_checked_before_they_are_saved(tiny_cfg, tmp_path):
    trainer = trainer_of(tiny_cfg)
    model = unwrap(trainer.model)

    class Overflow(HookBase):
        def after_step(self):
            if self.trainer.iter == 9:
                model.get_parameter("heads.part_weight").data[0] = torch.inf

    trainer.register_hooks([Overflow()])
    with pytest.raises(FloatingPointError, match="after epoch 2: weights are not finite"):
        trainer.train()
    assert not (tmp_path / "out" / "model_final.pth").exists()


def test_why_training_could_not_begin_is_not_hidden(tiny_cfg):
    """FastReID ends hooks that never began, which fails in its timer."""
    trainer = trainer_of(tiny_cfg)
    unwrap(trainer.model).get_parameter("heads.part_weight").data[0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"^before training: weights are not"):
        trainer.train()


# --- collapse ----------------------------------------------------------------------------


def test_healthy_run_reports_its_features_and_warns_of_nothing(tiny_cfg):
    messages = Messages()
    trainer = trainer_of(tiny_cfg)
    trainer.train()
    latest = trainer.storage.latest()
    assert latest["embedding_variance"][0] > 0.9
    assert latest["effective_rank"][0] > 8
    assert not messages.texts


def test_collapse_is_seen_in_the_epoch_it_happens(tiny_cfg):
    """A rate a hundred times too high draws all images into a few directions."""
    tiny_cfg.merge_from_list(
        ["MODEL.SELCON.SELF_WEIGHT", 0.1, "SOLVER.BASE_LR", 2.0, "SOLVER.MAX_EPOCH", 7]
    )
    messages = Messages()
    trainer_of(tiny_cfg).train()
    warnings = messages.about("the representation has collapsed")
    assert 1 <= len(warnings) <= 2
    assert "few directions" in warnings[0]
    assert "raise self_weight" in warnings[0]
    epochs = [text.split(":")[0] for text in warnings]
    assert epochs == sorted(set(epochs))  # once an epoch


def test_one_cluster_of_nearly_all_is_warned_about(tiny_cfg):
    changes = [*CLUSTERED, "MODEL.SELCON.CLUSTERING.EPS", 0.95]
    messages = Messages()
    trainer_of(tiny_cfg, *changes).train()
    found = messages.about("one cluster holds")
    assert found
    assert "lower eps" in found[0]
