"""Trainings of FastReID's host in this process."""

from fastreid.config import CfgNode

from selcon_plugin.fastreid_ext import SelConTrainer


def trained(cfg: CfgNode, *, resume: bool = False) -> SelConTrainer:
    """Train, from the last checkpoint of the folder with ``resume``."""
    trainer = SelConTrainer(cfg, show_progress=False)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer
