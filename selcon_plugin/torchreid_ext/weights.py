"""Loading of weights into torchreid models, by the plugin and by torchreid's own functions.

torchreid's functions load what fits and continue with the rest as it was initialized. For a
network of this plugin they load all of it here, or nothing.
"""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from selcon_plugin.compat.torchreid import import_torchreid, replace_function
from selcon_plugin.models.architecture import recorded_architecture
from selcon_plugin.models.finite import check_state
from selcon_plugin.models.pretrained import load_weights, read_network_file
from selcon_plugin.models.state_keys import network_weights
from selcon_plugin.torchreid_ext.models import SelConModel

logger = logging.getLogger(__name__)

_FEATURE_LAYER = re.compile(r"fc\.\d+\.weight")


def load_network(
    model: SelConModel, file: str | Path, *, initializes: bool = False
) -> None:
    """Load a network's weights, without banks and other state of their run.

    Args:
        model: Model to load into.
        file: Checkpoint of ``ImageSelConEngine``, from which the teacher's weights are
            loaded if it has one; or weights of a torchreid model, which are loaded into the
            backbone. If its layer after the pooling is as wide as the head's, the head is
            initialized with that layer.
        initializes: Whether a training starts from them, with images of any size.

    Raises:
        ValueError: If the file belongs to another model. ``FileNotFoundError`` if it does
            not exist.
    """  # noqa: DOC502  (raised by the functions called here)
    found = read_network_file(Path(file).expanduser())
    if not any(key.startswith("backbone.") for key in found.state):
        rest = _initialize_head(model.heads, found.state)
        load_weights(cast(nn.Module, model.backbone.model), rest, str(file))
        check_state(model, when=f"weights from {file}")
        return
    weights = network_weights(found.state)
    model.fit_parts(weights)
    ignore = ("input_size",) if initializes else ()
    model.check_record(found.architecture, str(file), ignore=ignore)
    load_whole(model, weights, file)


def feature_layer_width(state: Mapping[str, Tensor]) -> int:
    """Return the width of the linear layer after the pooling of a torchreid model.

    Args:
        state: Weights of the model.

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


def load_whole(model: SelConModel, state: Mapping[str, Any], file: str | Path) -> None:
    """Load a state dict whose tensors must all match.

    Args:
        model: Model to load into.
        state: State of the model.
        file: Source of the state, for the error message.

    Raises:
        ValueError: If it belongs to another model.
    """
    model.fit_parts(state)
    model.check_record(recorded_architecture(state), str(file))
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


# --- torchreid's own functions -----------------------------------------------------------


def guard_host_loaders() -> None:
    """Make torchreid's ``load_pretrained_weights`` and ``resume_from_checkpoint`` exact.

    They are changed in place, because a script may have imported them before. For models
    that are not of this plugin they do what they did, but refuse its checkpoints, of which
    they would load nothing.
    """
    tools = import_torchreid().utils.torchtools
    replace_function(tools, "load_pretrained_weights", _load_pretrained_weights)
    replace_function(tools, "resume_from_checkpoint", _resume_from_checkpoint)


def _load_pretrained_weights(
    original: Callable[..., Any], model: nn.Module, weight_path: str
) -> None:
    inner = model.module if isinstance(model, nn.DataParallel) else model
    if isinstance(inner, SelConModel):
        load_network(inner, weight_path)
        logger.info("Loaded all weights of the network from %s", weight_path)
        return
    _refuse_own_checkpoint(model, weight_path)
    original(model, weight_path)


def _resume_from_checkpoint(
    original: Callable[..., Any],
    fpath: str,
    model: nn.Module,
    optimizer: Any = None,
    scheduler: Any = None,
) -> int:
    inner = model.module if isinstance(model, nn.DataParallel) else model
    if isinstance(inner, SelConModel):
        found = read_network_file(Path(fpath).expanduser())
        inner.fit_parts(found.state)
        inner.check_record(found.architecture, fpath)
        model = inner
    else:
        _refuse_own_checkpoint(model, fpath)
    epoch: int = original(fpath, model, optimizer, scheduler)
    return epoch


def _refuse_own_checkpoint(model: nn.Module, file: str) -> None:
    """Refuse weights of a network of this plugin for a plain model.

    Raises:
        ValueError: If the file has such weights.
    """
    state = read_network_file(Path(file).expanduser()).state
    own = [name for name in state if name.startswith("backbone.")]
    if own and not any(name.startswith("backbone.") for name in model.state_dict()):
        raise ValueError(
            f"{file} is a checkpoint of selcon_plugin, not of {type(model).__name__}: "
            "build the model as selcon_NAME (build_model, build_selcon_model), or write "
            "its plain weights with selcon export --torchreid"
        )
