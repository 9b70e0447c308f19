"""Backbones from torchreid's models, and names for torchreid's own model factory.

torchreid's models end in a pooling, in some cases a fully connected layer, and a
classifier. As a backbone a model returns the input of its pooling: the feature map, from
which global and part features are computed. ``create_torchreid_backbone`` creates one by
name; the map is accessible in every model of torchreid 0.2.5.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.io.errors import ResourceError
from selcon_plugin.io.responses import close_responses
from selcon_plugin.io.safe_loading import data_only
from selcon_plugin.models.backbone import (
    ModelBackbone,
    suggest_names,
    warn_of_fixed_stride,
)
from selcon_plugin.models.feature_map import as_feature_map
from selcon_plugin.models.inference import fits_exactly
from selcon_plugin.models.preprocessing import (
    IMAGENET_PIXEL_MEAN,
    IMAGENET_PIXEL_STD,
    Preprocessing,
)
from selcon_plugin.models.pretrained import load_weights, read_state_dict

__all__ = [
    "CLASSIFIER",
    "MODEL_PREFIX",
    "TorchreidBackbone",
    "add_to_model_factory",
    "build_named_model",
    "build_plain_model",
    "create_torchreid_backbone",
    "factory_name",
    "models_of_weights",
    "torchreid_model_names",
]

logger = logging.getLogger(__name__)

# Prefix of this plugin's names in torchreid's factory.
MODEL_PREFIX = "selcon_"
# Prefix of the tensors that only a training on identities needs.
CLASSIFIER = ("classifier",)


class TorchreidBackbone(ModelBackbone):
    """Backbone that wraps a torchreid model: host-normalized images in, feature map out.

    torchreid normalizes images with ImageNet's mean and deviation, and its models expect
    that. The map is the input of the model's pooling. The state dict has the model's own
    names after ``model.``. ``ModelBackbone`` describes how images and model are changed.

    The map of a model that is not torchreid's own and has no ``featuremaps`` is not
    accessible. Its feature vector, which it returns in evaluation mode or beside the
    logits, is used instead, in the form ``(B, C, 1, 1)``: there are global features but no
    parts, and a warning is logged.

    Attributes:
        model: The torchreid model, without the layers behind the map.
        feature_dim: Channels C of the map.
        feature_stride: Input pixels per cell of the map, H / h.
        has_feature_map: Whether the map is accessible.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, *, own_feature: bool = False
    ) -> None:
        """Wrap ``model`` and run it on one image of zeros.

        Args:
            model: A model of ``torchreid.models.build_model``, with ``loss="triplet"`` if
                its map is not accessible. It is changed as ``ModelBackbone`` describes.
            preprocessing: Size of the images, and how the host normalizes them.
            own_feature: Whether to return the model's own feature, as torchreid evaluates
                it, in the form ``(B, C, 1, 1)``.
        """
        self.own_feature = own_feature
        super().__init__(model, preprocessing)
        self.has_feature_map: bool = not own_feature and _map_of(model) is not _vector
        if not self.has_feature_map and not own_feature:
            logger.warning(
                "the feature map of %s cannot be reached: there are only global features. "
                "Leave parts out (NUM_PARTS 0), or give its class a method featuremaps",
                type(model).__name__,
            )

    def compute_map(self, images: Tensor) -> Tensor:
        """Compute the feature map of images that are normalized for the model.

        Args:
            images: Shape ``(B, 3, H, W)``.

        Returns:
            The feature map, shape ``(B, C, h, w)``.
        """
        compute = _vector if self.own_feature else _map_of(self.model)
        return as_feature_map(compute(self.model, images), images.shape[2:])


def create_torchreid_backbone(
    name: str,
    *,
    input_size: Sequence[int] = (256, 128),
    pretrained: bool = False,
    weights: str = "",
    last_stride: int = 1,
    own_feature: bool = False,
    pixel_mean: Sequence[float] = IMAGENET_PIXEL_MEAN,
    pixel_std: Sequence[float] = IMAGENET_PIXEL_STD,
) -> TorchreidBackbone:
    """Create a backbone from a torchreid model.

    Args:
        name: Name of the model in torchreid, for example ``"osnet_ain_x1_0"``.
        input_size: Height and width of the images.
        pretrained: Whether to load weights.
        weights: ``""`` for the ImageNet weights that torchreid downloads, otherwise the
            path of a file, such as one of torchreid's model zoo. Tensors that the backbone
            does not have (the classifier) are left out, and the log lists them. The weights
            are not read if ``pretrained`` is False.
        last_stride: 1 keeps the resolution in the last stage of the ResNets and their
            variants, so that 256x128 gives a map of 16x8. With 2 the model is as torchreid
            defines it.
        own_feature: Whether the backbone returns the model's own feature in place of the
            map; its strides are then torchreid's.
        pixel_mean: The host's mean per channel, on the scale 0..255.
        pixel_std: The host's standard deviation per channel, on the scale 0..255.

    Returns:
        The backbone, in train mode.

    Raises:
        ValueError: If torchreid has no such model, if the weights do not fit it, or if it
            does not run on images of ``input_size``. Other errors are ``HostMissingError``
            if torchreid is not installed, ``FileNotFoundError`` if there is no such file of
            weights, and ``RuntimeError`` if the download fails.
    """
    _check_name(name)
    model = _download(name) if pretrained and not weights else build_plain_model(name)
    if last_stride == 1 and not own_feature:
        _keep_last_resolution(model)
    try:
        backbone = TorchreidBackbone(
            model,
            Preprocessing.in_training(input_size, pixel_mean, pixel_std),
            own_feature=own_feature,
        )
    except (RuntimeError, IndexError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"torchreid's {name} gives no feature map of images of "
            f"{input_size[0]}x{input_size[1]}: {error}. Use larger images or another model"
        ) from error
    if last_stride == 1 and not own_feature:
        warn_of_fixed_stride(backbone, f"torchreid's {name}")
    if pretrained and weights:
        load_weights(backbone.model, read_state_dict(Path(weights).expanduser()), weights)
    return backbone


def torchreid_model_names() -> list[str]:
    """List the models in torchreid's factory that are torchreid's or the user's own.

    Returns:
        Names for ``create_torchreid_backbone``, in the factory's order, without those that
        start with ``MODEL_PREFIX``. ``HostMissingError`` is raised if torchreid is not
        installed.
    """
    return [name for name in _model_factory() if not name.startswith(MODEL_PREFIX)]


def add_to_model_factory(name: str, constructor: Callable[..., nn.Module]) -> None:
    """Make ``torchreid.models.build_model(name, ...)`` call ``constructor``.

    A name that is already in the factory keeps its constructor: a second call changes
    nothing.

    Args:
        name: The new name; it must start with ``MODEL_PREFIX``.
        constructor: Called with the keywords ``num_classes``, ``loss``, ``pretrained`` and
            ``use_gpu``.

    Raises:
        ValueError: If ``name`` does not start with it.
    """
    if not name.startswith(MODEL_PREFIX):
        raise ValueError(f"name must start with {MODEL_PREFIX!r}, got {name!r}")
    _model_factory().setdefault(name, constructor)


def _model_factory() -> dict[str, Callable[..., nn.Module]]:
    # torchreid has no function that adds a name: this dictionary is the only registry.
    return cast(
        dict[str, Callable[..., nn.Module]],
        vars(import_torchreid().models)["__model_factory"],
    )


def factory_name(model: nn.Module) -> str:
    """Find the name in torchreid's factory that builds a model.

    Args:
        model: A model with any number of classes, before its layers are changed.

    Returns:
        The name; empty if the factory builds no model with the same layers.
    """
    factory, own = _model_factory(), list(_layers(model))
    for name in torchreid_model_names():
        # Models of another file need not be built.
        if getattr(factory[name], "__module__", "") != type(model).__module__:
            continue
        for loss in ("softmax", "triplet"):
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                other = factory[name](
                    num_classes=1, loss=loss, pretrained=False, use_gpu=False
                )
            if list(_layers(other)) == own:
                return name
    return ""


def models_of_weights(state: Mapping[str, Tensor], file_name: str = "") -> list[str]:
    """Find the models of torchreid's factory that weights belong to.

    Args:
        state: Tensors by name, with or without those of a classifier.
        file_name: Name of their file. A model that it contains and whose tensors are these
            is the result, without a comparison of the others.

    Returns:
        Names of the models that have exactly these tensors; few models have the tensors of
        another one.
    """
    named = [name for name in torchreid_model_names() if name in file_name]
    for name in sorted(named, key=len, reverse=True):
        if _has_tensors(name, state):
            return [name]
    return [name for name in torchreid_model_names() if _has_tensors(name, state)]


def _has_tensors(name: str, state: Mapping[str, Tensor]) -> bool:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build_plain_model(name)
    return fits_exactly(model, state, ignore_prefixes=CLASSIFIER)


def _layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield name and description of each layer except for the classifier."""
    for name, layer in model.named_modules():
        if "classifier" not in name and not any(layer.children()):
            yield name, repr(layer)


def _check_name(name: str) -> None:
    names = torchreid_model_names()
    if name not in names:
        close = suggest_names(name, names)
        hint = f"closest: {close}" if close else f"it has {', '.join(names)}"
        raise ValueError(f"torchreid has no model named {name!r}; {hint}")


def build_plain_model(name: str, *, pretrained: bool = False) -> nn.Module:
    """Build an unchanged model by torchreid's own factory.

    Args:
        name: Name in the factory.
        pretrained: Whether to load the ImageNet weights that torchreid downloads.

    Returns:
        The model, with a classifier of one class.
    """
    # With "triplet" the model in training returns its feature vector and the logits.
    model: nn.Module = import_torchreid().models.build_model(
        name, num_classes=1, loss="triplet", pretrained=pretrained, use_gpu=False
    )
    if type(model).__name__ in _NEED_CONTIGUOUS:
        model.register_forward_pre_hook(_contiguous)
    return model


def _contiguous(_model: nn.Module, images: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in images)


def build_named_model(name: str, *, num_classes: int, pretrained: bool) -> nn.Module:
    """Build a torchreid model with a classifier, for supervised training.

    Args:
        name: Name in the factory.
        num_classes: Number of identities.
        pretrained: Whether to load the ImageNet weights that torchreid downloads.

    Returns:
        The model.

    Raises:
        ValueError: If torchreid has no such model.
    """  # noqa: DOC502  (raised by the functions called here)
    _check_name(name)
    with data_only():
        model: nn.Module = import_torchreid().models.build_model(
            name, num_classes=num_classes, pretrained=pretrained, use_gpu=False
        )
    return model


def _download(name: str) -> nn.Module:
    """Build a model with the weights that torchreid downloads."""
    random_state = torch.get_rng_state()
    untrained = build_plain_model(name)
    torch.set_rng_state(random_state)
    try:
        with data_only():
            model = build_plain_model(name, pretrained=True)
    except Exception as error:
        # gdown, the network and torch.load each raise their own errors.
        close_responses(error)
        raise ResourceError(
            f"torchreid could not load its pre-trained weights of {name}: {error}. Run "
            "once with access to the network (weights are stored in TORCH_HOME), or set "
            "weights (PRETRAIN_PATH) to a file, such as one of torchreid's model zoo; or "
            "start without (PRETRAIN False)"
        ) from error
    # For some models torchreid has no weights, and continues with at most a warning.
    if _equal_states(model.state_dict(), untrained.state_dict()):
        raise RuntimeError(
            f"torchreid has no pre-trained weights of {name} to download: set weights "
            "(PRETRAIN_PATH) to the path of a file, or start without (PRETRAIN False)"
        )
    return model


def _equal_states(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _keep_last_resolution(model: nn.Module) -> None:
    """Remove the stride of ``layer4``, the last stage of the ResNets and their variants.

    This equals ``last_stride=1`` of their constructors, which the factory does not pass on.
    """
    last_stage = getattr(model, "layer4", None)
    if isinstance(last_stage, nn.Module):
        for module in last_stage.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)


# --- access to the feature map -----------------------------------------------------------


def _map_of(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    """Return the function that computes a model's map; ``_vector`` if there is none."""
    if hasattr(model, "featuremaps"):
        return _own_map
    return _MAPS.get(type(model).__name__, _vector)


def _own_map(model: Any, images: Tensor) -> Tensor:
    maps = model.featuremaps(images)
    # resnet50mid returns the maps of the last three blocks.
    return cast(Tensor, maps[-1] if isinstance(maps, tuple) else maps)


def _features(model: Any, images: Tensor) -> Tensor:
    return cast(Tensor, model.features(images))


def _rectified_features(model: Any, images: Tensor) -> Tensor:
    return F.relu(model.features(images), inplace=True)


def _shufflenet_map(model: Any, images: Tensor) -> Tensor:
    return cast(Tensor, model.stage4(model.stage3(model.stage2(model.conv1(images)))))


def _mlfn_map(model: Any, images: Tensor) -> Tensor:
    feature_map = model.maxpool(F.relu(model.bn1(model.conv1(images)), inplace=True))
    for block in model.feature:
        feature_map, _ = block(feature_map)  # the factors go to a branch without a map
    return cast(Tensor, feature_map)


def _nasnet_map(model: Any, images: Tensor) -> Tensor:
    stem = model.conv0(images)
    before = model.cell_stem_0(stem)
    now = model.cell_stem_1(stem, before)
    for name, cell in model.named_children():
        if name.startswith(("cell_", "reduction_cell_")) and "stem" not in name:
            before, now = now, cell(now, before)
    return cast(Tensor, model.relu(now))


def _hacnn_map(model: Any, images: Tensor) -> Tensor:
    """Compute the map of the global branch; the local branch pools its own regions."""
    feature_map = model.conv(images)
    for stage, attention in (
        (model.inception1, model.ha1),
        (model.inception2, model.ha2),
        (model.inception3, model.ha3),
    ):
        feature_map = stage(feature_map)
        feature_map = feature_map * attention.soft_attn(feature_map)
    return cast(Tensor, feature_map)


def _vector(model: Any, images: Tensor) -> Tensor:
    if type(model).__name__ == "PCB":  # in training mode it needs its classifiers
        parts = model.parts_avgpool(model.featuremaps(images))
        return F.normalize(parts, dim=1).flatten(1)
    output = model(images)
    vector = output[-1] if isinstance(output, tuple) else output
    if isinstance(vector, tuple):  # HACNN's branches, which it joins in evaluation mode
        vector = torch.cat([F.normalize(branch, dim=1) for branch in vector], dim=1)
    return cast(Tensor, vector)


# torchreid's classes that reshape a map by `view`, which channels-last images forbid.
_NEED_CONTIGUOUS = ("MuDeep", "PCB")
# torchreid's classes that have no method `featuremaps`.
_MAPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "DenseNet": _rectified_features,
    "HACNN": _hacnn_map,
    "InceptionV4": _features,
    "MLFN": _mlfn_map,
    "NASNetAMobile": _nasnet_map,
    "ShuffleNet": _shufflenet_map,
    "SqueezeNet": _features,
}
