"""Networks of earlier runs, to compute features in FastReID."""

from __future__ import annotations

from fastreid.config import CfgNode

from selcon_plugin.fastreid_ext.checkpoint import SelConCheckpointer
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.fastreid_ext.trainer import SelConTrainer
from selcon_plugin.models.finite import check_state


def load_trained_model(cfg: CfgNode) -> SelCon:
    """Build the network of ``MODEL.WEIGHTS``, without banks, to compute features.

    Args:
        cfg: Complete config; ``MODEL.WEIGHTS`` names the checkpoint.

    Returns:
        The model with its weights.

    Raises:
        ValueError: If the config names no checkpoint.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS must name the checkpoint to compute features with")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.PRETRAIN = False
    cfg.MODEL.HEADS.NUM_CLASSES = 0
    model = unwrap(SelConTrainer.build_model(cfg))
    SelConCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    check_state(model, when=f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}")
    return model
