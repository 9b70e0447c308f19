"""``SelConModel``: torchreid model with our head, and its names in torchreid's factory.

In a script::

    import selcon_plugin.torchreid_ext
    model = torchreid.models.build_model("selcon_osnet_x1_0", num_classes=0)
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import (
    Embeddings,
    GeneralizedMeanPool,
    GlobalPartEmbedding,
    check_parts_fit,
    most_parts,
)
from selcon_plugin.io.tensor_names import unwrapped_name
from selcon_plugin.methods import method_class
from selcon_plugin.models.feature_map import infer_feature_shape
from selcon_plugin.models.preprocessing import (
    IMAGENET_PIXEL_MEAN,
    IMAGENET_PIXEL_STD,
    Preprocessing,
)
from selcon_plugin.models.state_keys import RUN_PREFIXES
from selcon_plugin.models.timm import TIMM_PREFIX, create_timm_backbone
from selcon_plugin.models.torchreid import (
    MODEL_PREFIX,
    TorchreidBackbone,
    add_to_model_factory,
    create_torchreid_backbone,
    factory_name,
    torchreid_model_names,
)

logger = logging.getLogger(__name__)

Pool = Literal["avg", "max", "gem"]
Feature = Literal["head", "model"]

_POOLS = {
    "avg": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.AdaptiveMaxPool2d(1),
    "gem": GeneralizedMeanPool,
}


class SelConModel(EmbeddingNetwork):
    """Backbone with global and part features, for :class:`ImageSelConEngine`.

    In training mode it returns :class:`Embeddings`, in evaluation mode one unit vector per
    image, as torchreid's tools expect: evaluation, ``visrank``, ``FeatureExtractor``.

    The engine adds the method, with its banks and labels, when training starts; it is part
    of the state dict, and so of torchreid's checkpoints. If a checkpoint is loaded before
    that, its banks and labels are kept here until the method exists.

    Args:
        backbone: Maps images to a feature map, such as :class:`TorchreidBackbone`.
        input_size: Height and width of the images.
        num_parts: Horizontal parts; None for 8, or fewer if the map does not allow 8.
        embedding_dim: Global feature dimension C; 0 for the backbone's.
        project_global: Whether the global branch has a linear layer.
        pool: ``"avg"``, ``"max"`` or ``"gem"``.
        bn_neck: Whether the normalization has no bias, as in the usual BN neck.
        feature: ``"head"``; or ``"model"`` for a backbone that returns the model's own
            feature, which is then only normalized to unit length.
        ghost_batch_size: Images that batch normalization sees together; 0 for all.
        wave_block: ``"none"``, ``"plain"`` or ``"attentive"``; see
            :mod:`selcon_plugin.models.wave_block`.
        pixel_mean: The loader's mean per channel, on the scale 0..255.
        pixel_std: The loader's standard deviation per channel, on that scale.

    Raises:
        ValueError: If ``pool`` is unknown or the sizes do not match.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        input_size: Sequence[int] = (256, 128),
        num_parts: int | None = None,
        embedding_dim: int = 0,
        project_global: bool = True,
        pool: Pool = "avg",
        bn_neck: bool = False,
        feature: Feature = "head",
        ghost_batch_size: int = 0,
        wave_block: str = "none",
        pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
        pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
    ) -> None:
        if pool not in _POOLS:
            raise ValueError(
                f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}"
            )
        channels, rows, _ = infer_feature_shape(backbone, input_size)
        own = feature == "model"
        if own:
            num_parts, embedding_dim, project_global = 0, channels, False
        embedding_dim = embedding_dim or channels
        if num_parts is None:
            num_parts = most_parts(rows, embedding_dim)
        check_parts_fit(rows, num_parts)
        head = GlobalPartEmbedding(
            channels,
            embedding_dim,
            num_parts,
            project_global=project_global,
            pool=_POOLS[pool],
            norm=nn.Identity if own else functools.partial(_batch_norm, shift=not bn_neck),
        )
        super().__init__(
            backbone,
            head,
            Preprocessing.in_training(input_size, pixel_mean, pixel_std),
            images_normalized=True,
            ghost_batch_size=ghost_batch_size,
            wave_block=wave_block,
        )
        self.own_properties = {"host": "torchreid"}
        self._pending_state: dict[str, Tensor] = {}
        self.build_options: dict[str, Any] = {
            "project_global": project_global,
            "pool": pool,
            "bn_neck": bn_neck,
            "feature": feature,
            "ghost_batch_size": ghost_batch_size,
            "wave_block": wave_block,
        }

    @property
    def holds_run(self) -> bool:
        """Return whether it contains banks and labels, or keeps them for the method."""
        return self.method is not None or bool(self._pending_state)

    def forward(
        self, images: Tensor, return_featuremaps: bool = False
    ) -> Embeddings | Tensor:
        """Compute embeddings (training) or test features (evaluation).

        Args:
            images: Images, normalized by torchreid's loaders, shape ``(B, 3, h, w)``.
            return_featuremaps: Whether to return the feature map instead, as torchreid's
                models do for its tool ``visualize_actmap.py``.

        Returns:
            Embeddings, or unit vectors ``(B, C + S*D)``, or the map ``(B, F, h, w)``.

        Raises:
            RuntimeError: If an engine for supervised training calls it.
        """  # noqa: DOC502  (raised by the functions called here)
        if return_featuremaps:
            return self.feature_map(images)
        self.check_training()
        embeddings = self.embed(images)
        return embeddings if self.training else self.test_feature(embeddings)

    def drop_parts(self) -> None:
        """Remove the part branch from the head."""
        self.heads.drop_parts()

    def fit_parts(self, state: Collection[str]) -> None:
        """Drop the parts if weights have none.

        Args:
            state: Names of the weights; without a head they say nothing about parts.
        """
        names = {unwrapped_name(name) for name in state}
        has_head = any(name.startswith("heads.") for name in names)
        if has_head and "heads.part_weight" not in names and self.heads.num_parts:
            logger.info("The weights have no parts: the head has none")
            self.drop_parts()

    def load_pending_state(self) -> None:
        """Load the pending state of method and teacher, if they exist now.

        There is no pending state unless a checkpoint was loaded before.
        """
        pending = self._pending_state
        for name in RUN_PREFIXES:
            part = getattr(self, name.rstrip("."))
            keys = [key for key in pending if key.startswith(name)]
            if part is not None and keys:
                state = {key.removeprefix(name): pending.pop(key) for key in keys}
                part.load_state_dict(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # This runs before the same method of the children, which see the changes.
        own = {
            key.removeprefix(prefix): key for key in state_dict if key.startswith(prefix)
        }
        self.fit_parts(own)
        for name in RUN_PREFIXES:
            if getattr(self, name.rstrip(".")) is None:
                for key in [key for key in own if key.startswith(name)]:
                    self._pending_state[key] = state_dict.pop(own[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _batch_norm(channels: int, *, shift: bool) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    if not shift:
        # The bias is removed instead of frozen: torchreid unfreezes all parameters at each
        # epoch.
        norm.register_parameter("bias", None)
    return norm


def build_selcon_model(
    name: str,
    *,
    pretrained: bool = True,
    weights: str = "",
    last_stride: int = 1,
    input_size: Sequence[int] = (256, 128),
    pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
    pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
    **head: Any,
) -> SelConModel:
    """Build a torchreid or timm model with our head.

    Args:
        name: Name in torchreid, for instance ``"osnet_x1_0"``, with or without ``selcon_``;
            or ``timm:`` and a name in timm, for instance ``"timm:tf_efficientnet_lite0"``.
        pretrained: Whether to start from ImageNet weights, or ``weights``.
        weights: File of weights; empty for the download of torchreid or timm; see
            :func:`create_torchreid_backbone`, :func:`create_timm_backbone`.
        last_stride: 1 keeps the resolution in the last stage of ResNets.
        input_size: Height and width of the images.
        pixel_mean: The loader's mean per channel, on the scale 0..255.
        pixel_std: The loader's standard deviation per channel, on that scale.
        **head: Other arguments of :class:`SelConModel`.

    Returns:
        The model.

    Raises:
        ValueError: If torchreid's own feature of a timm model is requested.
    """
    own_name = name.removeprefix(MODEL_PREFIX)
    own_feature = head.get("feature") == "model"
    create: Callable[..., nn.Module] = functools.partial(
        create_torchreid_backbone, own_feature=own_feature
    )
    if own_feature and own_name.startswith(TIMM_PREFIX):
        raise ValueError(
            f"feature is 'model', but {own_name} is not torchreid's model: use 'head'"
        )
    if own_name.startswith(TIMM_PREFIX):
        own_name, create = own_name.removeprefix(TIMM_PREFIX), create_timm_backbone
    backbone = create(
        own_name,
        input_size=input_size,
        pretrained=pretrained,
        weights=weights,
        last_stride=last_stride,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    model = SelConModel(
        backbone, input_size=input_size, pixel_mean=pixel_mean, pixel_std=pixel_std, **head
    )
    model.own_properties["backbone"] = name.removeprefix(MODEL_PREFIX)
    model.build_options |= {
        "name": name.removeprefix(MODEL_PREFIX),
        "last_stride": last_stride,
    }
    return model


def register_models() -> list[str]:
    """Add a ``selcon_`` name for each of torchreid's models to its factory.

    Returns:
        The names. A second call has no effect.
    """
    names = []
    for name in torchreid_model_names():
        names.append(MODEL_PREFIX + name)
        add_to_model_factory(names[-1], functools.partial(_from_factory, name))
    return names


def _from_factory(
    name: str,
    num_classes: int = 0,
    loss: str = "",
    pretrained: bool = True,
    use_gpu: bool = True,
) -> SelConModel:
    # Classes and loss are arguments of supervised training.
    model = build_selcon_model(name, pretrained=pretrained)
    model.own_properties |= dict.fromkeys(
        ("input_size", "pixel_mean", "pixel_std", "global_weight")
    )
    return model


def adopt_model(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    **options: Any,
) -> SelConModel:
    """Add our head to a plain torchreid model, and its weights to the optimizer.

    This way a script only has to change its engine. The head uses the learning rate of the
    optimizer's last group, which is that of torchreid's new layers.

    Args:
        model: torchreid model, whose layers after the feature map are removed.
        optimizer: Optimizer of the model's parameters, which gets a group for the head.
        scheduler: Schedule of the optimizer or None; it gets the new group as well.
        **options: Arguments of :class:`SelConModel`.

    Returns:
        The model with head, on the device of the given model.

    Raises:
        ValueError: If the schedule does not support another group.
    """
    if scheduler is not None and (
        not hasattr(scheduler, "base_lrs") or hasattr(scheduler, "lr_lambdas")
    ):
        raise ValueError(
            f"the schedule {type(scheduler).__name__} cannot include the head's weights: "
            "build the model with build_selcon_model, then its optimizer and schedule"
        )
    device = next(model.parameters()).device
    name = factory_name(model)
    backbone = TorchreidBackbone(model, Preprocessing(tuple(options["input_size"])))
    adopted = SelConModel(backbone, **options).to(device)
    # A model that torchreid has built has its own stride.
    adopted.build_options |= {"name": name, "last_stride": 2}
    last = optimizer.param_groups[-1]
    group = {key: value for key, value in last.items() if key != "params"}
    optimizer.add_param_group({**group, "params": list(adopted.heads.parameters())})
    if scheduler is not None:
        scheduler.base_lrs.append(last.get("initial_lr", last["lr"]))
    logger.info(
        "%s gets a head of %d parts in place of its classifier",
        type(model).__name__,
        adopted.heads.num_parts,
    )
    return adopted


def fit_to_method(
    network: SelConModel, method: str, options: Mapping[str, Any], datamanager: Any
) -> None:
    """Fit a network to method, images and device.

    Parts that the method does not use are dropped.

    Args:
        network: Network, which is changed.
        method: Registered name of the method.
        options: Constructor arguments of the method.
        datamanager: torchreid's data manager.
    """
    if not method_class(method).uses_parts and network.heads.num_parts:
        logger.info("%s does not use parts: the head has none", method)
        network.drop_parts()
    network.own_properties["method"] = method
    # An evaluation without training uses this weight as well.
    weight = options.get("global_distance_weight", network.global_distance_weight)
    network.set_input(loader_preprocessing(datamanager), weight)
    if network.device.type == "cpu":
        # Convolutions on a CPU are up to a third faster in channels-last format.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def with_head(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    datamanager: Any,
    head: dict[str, Any],
) -> tuple[nn.Module, SelConModel]:
    """Add our head to a model, unless it has one.

    Args:
        model: :class:`SelConModel` or torchreid model, possibly in ``nn.DataParallel``.
        optimizer: Optimizer of the model's parameters, which gets a group for a new head.
        scheduler: Schedule of the optimizer or None.
        datamanager: torchreid's data manager, whose image size and normalization are used.
        head: Arguments of :class:`SelConModel` for a model without our head.

    Returns:
        The model to call, and the network with our head inside it.

    Raises:
        ValueError: If arguments are given for a model that already has our head.
    """
    inner = model.module if isinstance(model, nn.DataParallel) else model
    if isinstance(inner, SelConModel):
        if head:
            raise ValueError(
                f"head {head} is for models without our head: pass it to "
                "build_selcon_model instead"
            )
        return model, inner
    loader = loader_preprocessing(datamanager)
    found = {
        "input_size": loader.size,
        "pixel_mean": loader.pixel_mean,
        "pixel_std": loader.pixel_std,
    }
    network = adopt_model(inner, optimizer, scheduler, **{**found, **head})
    if isinstance(model, nn.DataParallel):
        return nn.DataParallel(network, model.device_ids), network
    return network, network


def loader_preprocessing(datamanager: Any) -> Preprocessing:
    """Describe the preprocessing of a data manager's images.

    Args:
        datamanager: torchreid's data manager.

    Returns:
        Size and normalization, on the scale 0..255.
    """
    size = (datamanager.height, datamanager.width)
    for transform in datamanager.transform_te.transforms:
        if hasattr(transform, "mean") and hasattr(transform, "std"):
            return Preprocessing.in_training(
                size,
                [255.0 * value for value in transform.mean],
                [255.0 * value for value in transform.std],
            )
    return Preprocessing.in_training(size, [0.0] * 3, [255.0] * 3)
