"""``selcon run`` for torchreid's own scripts, which stay as they are.

Their engines for images are replaced by ours. torchreid's configs have no keys of the
plugin; keys that start with ``selcon.``, in a file or on the command line, are taken out
before the script's config sees them::

    selcon run scripts/main.py --config-file my.yaml selcon.method ClusterContrast
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from yacs.config import CfgNode

from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.config.checks import flatten_config
from selcon_plugin.models.pretrained import read_network_file
from selcon_plugin.torchreid_ext.checkpoints import read_run
from selcon_plugin.torchreid_ext.config import KEYS
from selcon_plugin.torchreid_ext.engine import ImageSelConEngine
from selcon_plugin.torchreid_ext.models import SelConModel
from selcon_plugin.torchreid_ext.weights import load_network

_REPLACED = ("ImageSoftmaxEngine", "ImageTripletEngine")
_REFUSED = ("VideoSoftmaxEngine", "VideoTripletEngine")
# Options of SelConModel.
_OF_HEAD = (
    *("num_parts", "embedding_dim", "project_global", "pool", "bn_neck"),
    *("ghost_batch_size", "wave_block"),
)

_given: dict[str, Any] = {}  # the plugin's options in the script's config, by name
# Checkpoints of the plugin that the script loads into a model without our head, by the name
# of torchreid's function. The engine loads them into the network with the head.
_to_load: dict[str, str] = {}
_LOAD, _RESUME = "load_pretrained_weights", "resume_from_checkpoint"


class ScriptSelConEngine(ImageSelConEngine):
    """Engine in place of torchreid's supervised engines, with options from the config.

    Args:
        datamanager: As in torchreid.
        model: As in torchreid.
        optimizer: As in torchreid.
        *args: As in :class:`ImageSelConEngine`, or the arguments of torchreid's engine.
        scheduler: As in torchreid.
        use_gpu: As in torchreid.
        **supervised: Arguments of torchreid's engine, which have no effect.
    """

    def __init__(
        self,
        datamanager: Any,
        model: nn.Module,
        optimizer: Any,
        *args: Any,
        scheduler: Any = None,
        use_gpu: bool = True,
        **supervised: Any,
    ) -> None:
        options = dict(_given)
        start = "clustering."
        clustering = {
            name.removeprefix(start): options.pop(name)
            for name in list(options)
            if name.startswith(start)
        }
        head = {name: options.pop(name) for name in _OF_HEAD if name in options}
        inner = model.module if isinstance(model, nn.DataParallel) else model
        if head and isinstance(inner, SelConModel):
            raise ValueError(
                f"{KEYS.path}.{next(iter(head))} is for torchreid's own models: the model "
                "has the plugin's head already"
            )
        super().__init__(
            datamanager,
            model,
            optimizer,
            scheduler if scheduler is not None or not args else _schedule_in(args),
            use_gpu=use_gpu,
            clustering=clustering or None,
            head=head or None,
            **options,
            **supervised,
        )
        if _LOAD in _to_load:
            load_network(self._network, _to_load.pop(_LOAD))
        if _RESUME in _to_load:
            self.resume(_to_load.pop(_RESUME))


def _schedule_in(args: tuple[Any, ...]) -> Any:
    """Return the schedule among positional arguments of torchreid's engines."""
    return next((value for value in args if hasattr(value, "step")), None)


def prepare_script() -> None:
    """Let a script of torchreid train without identities."""
    torchreid = import_torchreid()
    _given.clear()
    _to_load.clear()
    root = f"{torchreid.__name__}.engine"
    modules = [m for name, m in sys.modules.items() if name.startswith(root)]
    for module in modules:
        for name in (*_REPLACED, *_REFUSED):
            if hasattr(module, name):
                setattr(
                    module, name, ScriptSelConEngine if name in _REPLACED else _refuse_video
                )
    for module in (torchreid.utils, torchreid.utils.torchtools):
        for name in (_LOAD, _RESUME):
            setattr(module, name, _loader(name, getattr(module, name)))
    _take_options_from_configs()


def _loader(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep checkpoints of the plugin for the engine, which a script builds later."""

    def load_pretrained_weights(model: nn.Module, weight_path: str) -> None:
        if not _is_for_engine(model, weight_path):
            original(model, weight_path)
            return
        _to_load[name] = weight_path

    def resume_from_checkpoint(
        fpath: str, model: nn.Module, optimizer: Any = None, scheduler: Any = None
    ) -> int:
        if not _is_for_engine(model, fpath):
            return int(original(fpath, model, optimizer, scheduler))
        _to_load[name] = fpath
        return int(read_run(Path(fpath).expanduser())[1]["epoch"])

    return load_pretrained_weights if name == _LOAD else resume_from_checkpoint


def _is_for_engine(model: nn.Module, file: str) -> bool:
    inner = model.module if isinstance(model, nn.DataParallel) else model
    if isinstance(inner, SelConModel):
        return False
    state = read_network_file(Path(file).expanduser()).state
    return any(name.startswith("backbone.") for name in state)


def _refuse_video(*_args: Any, **_kwargs: Any) -> None:
    raise ValueError("data.type is 'video': training without identities needs 'image'")


def _take_options_from_configs() -> None:
    """Take the plugin's keys out of what a config of the script merges."""
    merge_list, merge_other = CfgNode.merge_from_list, CfgNode.merge_from_other_cfg

    def merge_from_list(self: CfgNode, pairs: list[Any]) -> Any:
        if KEYS.path in self:
            return merge_list(self, pairs)
        rest: list[Any] = []
        for key, value in zip(pairs[::2], pairs[1::2], strict=len(pairs) % 2 == 0):
            if str(key).startswith(f"{KEYS.path}."):
                _given[key.removeprefix(f"{KEYS.path}.")] = _value(value)
            else:
                rest += [key, value]
        return merge_list(self, rest + list(pairs[len(pairs) // 2 * 2 :]))

    def merge_from_other_cfg(self: CfgNode, other: CfgNode) -> Any:
        own = None if KEYS.path in self else other.pop(KEYS.path, None)
        if isinstance(own, Mapping):
            _given.update(flatten_config(own))
        return merge_other(self, other)

    CfgNode.merge_from_list = merge_from_list
    CfgNode.merge_from_other_cfg = merge_from_other_cfg


def _value(text: Any) -> Any:
    """Read a value of the command line as yacs does."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
