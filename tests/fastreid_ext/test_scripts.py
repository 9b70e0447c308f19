"""Scripts that keep FastReID's own trainer train without identities, or stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastreid.config import CfgNode, get_cfg
from fastreid.data import build_reid_train_loader
from fastreid.engine import DefaultTrainer, SimpleTrainer
from fastreid.evaluation import ReidEvaluator
from fastreid.modeling.meta_arch import build_model
from fastreid.utils.events import EventStorage

from helpers.checkpoints import assert_equal
from helpers.programs import run_program
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.fastreid_ext.config import complete_config
from selcon_plugin.fastreid_ext.embedding import unwrap

# In function the train script of FastReID's repository.
SCRIPT = '''
from fastreid.config import get_cfg
from fastreid.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from fastreid.utils.checkpoint import Checkpointer


class Trainer(DefaultTrainer):
    """A trainer of the script's own."""


def main(args):
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if args.eval_only:
        cfg.defrost()
        cfg.MODEL.BACKBONE.PRETRAIN = False
        model = Trainer.build_model(cfg)
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    numbers = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    launch(main, *numbers, args=(args,))
'''


def trained(trainer: Any) -> Any:
    trainer.resume_or_load(False)
    trainer.train()
    return trainer


def test_default_trainer_of_a_selcon_config_is_label_free(
    tiny_cfg: CfgNode, tmp_path: Path
) -> None:
    twin = tiny_cfg.clone()
    twin.OUTPUT_DIR = str(tmp_path / "twin")
    default = trained(DefaultTrainer(tiny_cfg))
    assert type(default) is SelConTrainer
    own = trained(SelConTrainer(twin))
    assert_equal(
        dict(unwrap(default.model).state_dict()), dict(unwrap(own.model).state_dict())
    )


def test_trainer_of_a_script_keeps_its_own_methods(tiny_cfg: CfgNode) -> None:
    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(
            cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
        ) -> Any:
            loader, num_query = cls.build_test_loader(cfg, dataset_name)
            return loader, ReidEvaluator(cfg, num_query, output_dir)

    trainer: Any = Trainer(tiny_cfg)
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer, SelConTrainer)
    assert type(trainer).__name__ == "Trainer"
    # As in a script that only evaluates.
    _, evaluator = trainer.build_evaluator(trainer.cfg, "SyntheticPersons")
    assert type(evaluator) is ReidEvaluator
    found = Trainer.test(tiny_cfg, trainer.model)
    assert found == SelConTrainer.test(trainer.cfg, trainer.model)


def test_supervised_config_stays_with_the_host() -> None:
    new: Any = DefaultTrainer.__new__
    assert type(new(DefaultTrainer, get_cfg())) is DefaultTrainer
    assert type(new(DefaultTrainer)) is DefaultTrainer


def test_trainer_that_loads_identities_is_refused(tiny_cfg: CfgNode) -> None:
    class Trainer(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            return build_reid_train_loader(cfg)

    with pytest.raises(ValueError, match=r"Trainer\.build_train_loader.*remove"):
        Trainer(tiny_cfg)


class Batches:
    """FastReID's batches with identities: in one batch or another images share them."""

    def __init__(self, cfg: CfgNode, *, paths: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch = {
            "images": torch.rand(8, 3, 64, 32, generator=generator) * 255,
            "targets": torch.arange(8) // 2,
            "camids": torch.zeros(8, dtype=torch.int64),
        }
        if paths:
            self.batch["img_paths"] = [f"{number}.jpg" for number in range(8)]

    def __iter__(self) -> Any:
        while True:
            yield dict(self.batch)


@pytest.mark.parametrize(("paths", "steps"), [(True, 0), (False, 1)])
def test_hosts_own_loop_stops_with_the_remedy(
    tiny_cfg: CfgNode, paths: bool, steps: int
) -> None:
    cfg = complete_config(tiny_cfg)
    cfg.defrost()
    cfg.MODEL.HEADS.NUM_CLASSES = 40
    model: Any = build_model(cfg)
    optimizer, groups = DefaultTrainer.build_optimizer(cfg, model)  # contiguous buffers
    trainer = SimpleTrainer(model, Batches(cfg, paths=paths), optimizer, groups)
    trainer.iter = 0
    with EventStorage(0):
        for _ in range(steps):
            trainer.run_step()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="SelConTrainer"):
                trainer.run_step()
    assert len(model._pending) <= 1


def test_replaced_loader_of_identities_stops_at_once(tiny_cfg: CfgNode) -> None:
    trainer = SelConTrainer(tiny_cfg, show_progress=False)
    dataset = trainer.data_loader.dataset
    sample = dataset.sample
    dataset.sample = lambda index, image: {**sample(index, image), "targets": index // 2}
    trainer.restart_data = lambda: None
    trainer.training_run.extract = lambda: None
    trainer.training_run.before_training = lambda: None
    with pytest.raises(RuntimeError, match=r"label.*SelConTrainer"):
        trainer.train()


def arguments(values: dict[str, Any], folder: Path) -> list[str]:
    opts = {**values, "OUTPUT_DIR": repr(str(folder)), "SOLVER.MAX_EPOCH": 1}
    return [str(word) for pair in opts.items() for word in pair]


def test_script_trains_and_evaluates_unedited(
    tiny_values: dict, tmp_path: Path, dataset_root: Path
) -> None:
    script = tmp_path / "train_net.py"
    script.write_text(SCRIPT)
    config = tmp_path / "one_line.yml"
    config.write_text("MODEL:\n  META_ARCHITECTURE: SelCon\n")
    folder = tmp_path / "out"
    run = ["-m", "selcon_plugin", "run", script, "--config-file", config]
    options = arguments(tiny_values, folder)
    done = run_program(*run, *options)
    assert done.returncode == 0, done.stderr
    final = folder / "model_final.pth"
    twin = tmp_path / "twin"
    command = ["-m", "selcon_plugin", "train", "--config-file", config]
    done = run_program(*command, *arguments(tiny_values, twin))
    assert done.returncode == 0, done.stderr
    states = [
        torch.load(file, weights_only=True)["model"]
        for file in (final, twin / "model_final.pth")
    ]
    assert_equal(*states)
    weights = ["MODEL.WEIGHTS", final]
    done = run_program(*run, "--eval-only", *options, *weights)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((twin / "results.json").read_text())["metrics"]
    assert f"{metrics['SyntheticPersons']['mAP']:.2f}" in done.stdout
    done = run_program(*run, *options, "SOLVER.BASE_LR", "-1.0")
    assert done.returncode == 2
    assert "SOLVER.BASE_LR" in done.stderr.splitlines()[-1]


def test_precise_statistics_of_a_supervised_script_follow_its_data(
    tiny_values: dict, tmp_path: Path, dataset_root: Path
) -> None:
    script, config, folder = (tmp_path / n for n in ("train_net.py", "own.yml", "out"))
    script.write_text(SCRIPT)
    config.write_text(
        "MODEL:\n  HEADS:\n    NAME: EmbeddingHead\n    NORM: BN\n"
        "  BACKBONE:\n    FEAT_DIM: 96\n    PRETRAIN: False\n"
    )
    own = {"MODEL.META_ARCHITECTURE": "Baseline", "DATALOADER.NUM_INSTANCE": 2}
    own |= {"TEST.PRECISE_BN.ENABLED": True, "TEST.PRECISE_BN.NUM_ITER": 2}
    options = arguments({**tiny_values, **own}, folder)
    run = ["-m", "selcon_plugin", "run", script, "--config-file", config]
    done = run_program(*run, *options)
    assert done.returncode == 0, done.stderr
    text = (folder / "log.txt").read_text()
    assert "Running precise-BN" in done.stdout + text


@pytest.mark.slow
def test_script_trains_in_two_processes(tiny_values: dict, tmp_path: Path) -> None:
    script = tmp_path / "train_net.py"
    script.write_text(SCRIPT)
    config = tmp_path / "one_line.yml"
    config.write_text("MODEL:\n  META_ARCHITECTURE: SelCon\n")
    run = ["-m", "selcon_plugin", "run", script, "--config-file", config]
    options = arguments(tiny_values, tmp_path / "out")
    done = run_program(*run, "--num-gpus", "2", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "log.txt.rank1").exists()
    assert (tmp_path / "out" / "model_final.pth").exists()


@pytest.mark.parametrize("name", ["nowhere.py", "notes.txt"])
def test_what_is_no_script_is_named(tmp_path: Path, name: str) -> None:
    from selcon_plugin.cli.run import main

    (tmp_path / "notes.txt").touch()
    with pytest.raises((FileNotFoundError, ValueError), match=f"SCRIPT.*{name}"):
        main([str(tmp_path / name)])
