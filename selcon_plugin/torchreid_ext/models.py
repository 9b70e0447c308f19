"""``SelConModel``: torchreid model with our head, and its names in torchreid's factory.

In a script::

    import selcon_plugin.torchreid_ext
    model = torchreid.models.build_model("selcon_osnet_x1_0", num_classes=0)
"""

from __future__ import annotations

import functools
import logging
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from selcon_plugin.engine.network import EmbeddingNetwork
from selcon_plugin.features import (
    Embeddings,
    GeneralizedMeanPool,
    GlobalPartEmbedding,
    check_parts_fit,
)
from selcon_plugin.methods import method_class
from selcon_plugin.models.feature_map import infer_feature_shape
from selcon_plugin.models.finite import check_state
from selcon_plugin.models.preprocessing import (
    IMAGENET_PIXEL_MEAN,
    IMAGENET_PIXEL_STD,
    Preprocessing,
)
from selcon_plugin.models.pretrained import load_weights, read_state_dict
from selcon_plugin.models.state_keys import RUN_PREFIXES, network_weights
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

_POOLS = {
    "avg": lambda: nn.AdaptiveAvgPool2d(1),
    "max": lambda: nn.AdaptiveMaxPool2d(1),
    "gem": GeneralizedMeanPool,
}
_DEFAULT_PARTS = 8
_FEATURE_LAYER = re.compile(r"(?:module\.)?fc\.\d+\.weight")


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
        ghost_batch_size: Images that batch normalization sees together; 0 for all.
        wave_block: ``"none"``, ``"plain"`` or ``"attentive"``; see
            :mod:`selcon_plugin.models.wave_block`.
        pixel_mean: The loader's mean per channel, on the scale 0..255.
        pixel_std: The loader's standard deviation per channel, on that scale.

    Attributes:
        architecture: Options of the plugin that describe the network, and the ``name`` of
            its model if it is known.

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
        embedding_dim = embedding_dim or channels
        if num_parts is None:
            num_parts = _most_parts(rows, embedding_dim)
        check_parts_fit(rows, num_parts)
        head = GlobalPartEmbedding(
            channels,
            embedding_dim,
            num_parts,
            project_global=project_global,
            pool=_POOLS[pool],
            norm=functools.partial(_batch_norm, shift=not bn_neck),
        )
        super().__init__(
            backbone,
            head,
            Preprocessing.in_training(input_size, pixel_mean, pixel_std),
            images_normalized=True,
            ghost_batch_size=ghost_batch_size,
            wave_block=wave_block,
        )
        self._pending_state: dict[str, Tensor] = {}
        self.architecture: dict[str, Any] = {
            "project_global": project_global,
            "pool": pool,
            "bn_neck": bn_neck,
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
        if any(key.startswith("heads.") for key in own) and "heads.part_weight" not in own:
            self.drop_parts()
        for name in RUN_PREFIXES:
            if getattr(self, name.rstrip(".")) is None:
                for key in [key for key in own if key.startswith(name)]:
                    self._pending_state[key] = state_dict.pop(own[key])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _most_parts(rows: int, embedding_dim: int) -> int:
    """Return the largest number of parts, up to 8, that map and embedding allow."""
    if rows == 1:
        return 0
    fitting = range(1, min(rows, _DEFAULT_PARTS) + 1)
    return max(parts for parts in fitting if embedding_dim % parts == 0)


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
    """
    own_name = name.removeprefix(MODEL_PREFIX)
    create: Callable[..., nn.Module] = create_torchreid_backbone
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
    model.architecture |= {
        "name": name.removeprefix(MODEL_PREFIX),
        "last_stride": last_stride,
    }
    return model


def load_network(model: SelConModel, file: str) -> None:
    """Load a network's weights, without banks and other state of their run.

    Args:
        model: Model to load into.
        file: Checkpoint of :class:`ImageSelConEngine`, from which the teacher's weights are
            loaded if it has one; or weights of a torchreid model, which are loaded into the
            backbone. If its layer after the pooling is as wide as the head's, the head is
            initialized with that layer.

    Raises:
        ValueError: If the file belongs to another model. ``FileNotFoundError`` if it does
            not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    state = read_state_dict(Path(file).expanduser())
    if not any(key.startswith("backbone.") for key in state):
        rest = _initialize_head(model.heads, state)
        load_weights(cast(nn.Module, model.backbone.model), rest, file)
        check_state(model, when=f"weights from {file}")
        return
    load_whole(model, network_weights(state), file)


def feature_layer_width(state: Mapping[str, Tensor]) -> int:
    """Return the width of the linear layer after the pooling of a torchreid model.

    Args:
        state: Weights of the model, with or without ``module.`` before their names.

    Returns:
        Number of outputs; 0 if there is no such layer, or there are several.
    """
    layers = [
        tensor
        for name, tensor in state.items()
        if _FEATURE_LAYER.fullmatch(name) and tensor.dim() == 2
    ]
    return len(layers[0]) if len(layers) == 1 else 0


def _initialize_head(head: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load a linear layer and its normalization into the head, if their shapes match.

    Args:
        head: Head to load into.
        state: Weights of a torchreid model.

    Returns:
        The remaining weights.
    """
    renamed = {
        name.replace("fc.0.", "global_projection.").replace("fc.1.", "global_norm."): value
        for name, value in state.items()
        if name.startswith(("fc.0.", "fc.1."))
    }
    own = head.state_dict()
    fits = [k in own and own[k].shape == value.shape for k, value in renamed.items()]
    if not feature_layer_width(state) or not all(fits):
        return state
    head.load_state_dict(renamed, strict=False)
    return {k: v for k, v in state.items() if not k.startswith(("fc.0.", "fc.1."))}


def load_whole(model: nn.Module, state: Mapping[str, Any], file: str | Path) -> None:
    """Load a state dict whose tensors must all match.

    Args:
        model: Model to load into.
        state: State of the model.
        file: Source of the state, for the error message.

    Raises:
        ValueError: If it belongs to another model.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # After a heading, PyTorch lists every tensor that does not match in one line.
        fault = str(error).splitlines()[1]
        raise ValueError(
            f"{file} belongs to another model: {textwrap.shorten(fault, 200)} Build the "
            "model with the name and the head of its training"
        ) from error
    check_state(model, when=f"weights from {file}")


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
    return build_selcon_model(name, pretrained=pretrained)


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
    adopted.architecture |= {"name": name, "last_stride": 2}
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


def fit_to_method(network: SelConModel, method: str) -> None:
    """Drop parts that a method does not use, and set the memory format for the device.

    Args:
        network: Network, which is changed.
        method: Registered name of the method.
    """
    if not method_class(method).uses_parts and network.heads.num_parts:
        logger.info("%s does not use parts: the head has none", method)
        network.drop_parts()
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
    size = (datamanager.height, datamanager.width)
    mean, std = _normalization(datamanager)
    network = adopt_model(
        inner,
        optimizer,
        scheduler,
        **{"input_size": size, "pixel_mean": mean, "pixel_std": std, **head},
    )
    if isinstance(model, nn.DataParallel):
        return nn.DataParallel(network, model.device_ids), network
    return network, network


def _normalization(datamanager: Any) -> tuple[list[float], list[float]]:
    """Return the manager's mean and standard deviation on the scale 0..255."""
    for transform in datamanager.transform_te.transforms:
        if hasattr(transform, "mean") and hasattr(transform, "std"):
            return (
                [255.0 * value for value in transform.mean],
                [255.0 * value for value in transform.std],
            )
    return [0.0] * 3, [255.0] * 3
