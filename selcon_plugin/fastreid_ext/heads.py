"""``GlobalPartHead``: embedding head with FastReID's config and layers."""

from __future__ import annotations

from fastreid.config import CfgNode
from fastreid.layers import get_norm, pooling
from fastreid.modeling.heads import REID_HEADS_REGISTRY
from torch import nn

from selcon_plugin.features import GlobalPartEmbedding


@REID_HEADS_REGISTRY.register()
class GlobalPartHead(GlobalPartEmbedding):
    """Head for global and part features with FastReID's pooling and normalization layers.

    It reads ``MODEL.BACKBONE.FEAT_DIM``, ``MODEL.HEADS.{EMBEDDING_DIM, POOL_LAYER, NORM,
    WITH_BNNECK}`` and ``MODEL.SELCON.{NUM_PARTS, PROJECT_GLOBAL}``. ``EMBEDDING_DIM`` 0
    selects the dimension of the backbone; ``WITH_BNNECK`` freezes the bias of the
    normalization at 0, as FastReID's own head does.

    Raises:
        ValueError: If ``POOL_LAYER`` or ``NORM`` is unknown or the sizes do not fit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        heads = cfg.MODEL.HEADS
        if heads.POOL_LAYER not in pooling.__all__:
            raise ValueError(
                f"MODEL.HEADS.POOL_LAYER must be one of {', '.join(pooling.__all__)}, "
                f"got {heads.POOL_LAYER!r}"
            )

        def make_norm(channels: int) -> nn.Module:
            try:
                layer: nn.Module = get_norm(
                    heads.NORM, channels, bias_freeze=heads.WITH_BNNECK
                )
            except KeyError as error:
                raise ValueError(
                    "MODEL.HEADS.NORM must be one of BN, syncBN, GhostBN, FrozenBN, GN, "
                    f"got {heads.NORM!r}"
                ) from error
            return layer

        super().__init__(
            cfg.MODEL.BACKBONE.FEAT_DIM,
            heads.EMBEDDING_DIM or cfg.MODEL.BACKBONE.FEAT_DIM,
            cfg.MODEL.SELCON.NUM_PARTS,
            project_global=cfg.MODEL.SELCON.PROJECT_GLOBAL,
            pool=getattr(pooling, heads.POOL_LAYER),
            norm=make_norm,
        )
