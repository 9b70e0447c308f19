"""FastReID's own scripts train without identities where their config selects ``SelCon``.

When the plugin is imported, ``DefaultTrainer``, and a trainer of a script derived from it,
become a :class:`SelConTrainer` for a config with the meta-architecture ``SelCon``.
Otherwise a script that keeps ``DefaultTrainer`` would train on identities. Configs with
other meta-architectures are not affected.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import fastreid.config.defaults
import fastreid.engine
from fastreid.config import CfgNode
from fastreid.engine.defaults import DefaultTrainer, default_setup
from fastreid.modeling.meta_arch import META_ARCH_REGISTRY

from selcon_plugin.compat.faiss import offer_gpu_names
from selcon_plugin.compat.shared import PATCHED
from selcon_plugin.fastreid_ext.config import add_selcon_config, complete_config
from selcon_plugin.fastreid_ext.host_values import follow_training_data
from selcon_plugin.fastreid_ext.launch import launch, under_torchrun
from selcon_plugin.fastreid_ext.meta_arch import SelCon
from selcon_plugin.fastreid_ext.own_evaluators import register_inference
from selcon_plugin.fastreid_ext.trainer import SelConTrainer

_ADDRESS = re.compile(r"tcp://(\S+):(\d+)")


def register_trainer() -> None:
    """Let ``DefaultTrainer`` train a config of SelCon without identities."""
    host: Any = DefaultTrainer
    if hasattr(host.__new__, PATCHED):
        return

    def __new__(cls: Any, cfg: Any = None, *_: Any, **__: Any) -> Any:  # noqa: N807
        return object.__new__(_label_free(cls) if _selects_selcon(cfg) else cls)

    test = vars(host)["test"].__func__

    @functools.wraps(test)
    def tested(cls: Any, cfg: Any, model: Any) -> Any:
        if _selects_selcon(cfg) and not issubclass(cls, SelConTrainer):
            trainer: Any = _label_free(cls)
            return trainer.test(complete_config(cfg), model)
        return test(cls, cfg, model)

    setattr(__new__, PATCHED, True)
    host.__new__ = __new__
    host.test = classmethod(tested)
    register_inference()


def _selects_selcon(cfg: Any) -> bool:
    """Return whether a config selects ``SelCon``, or a meta-architecture based on it."""
    if not isinstance(cfg, CfgNode) or "MODEL" not in cfg:
        return False
    known = META_ARCH_REGISTRY._obj_map
    architecture = known.get(cfg.MODEL.get("META_ARCHITECTURE"))
    return isinstance(architecture, type) and issubclass(architecture, SelCon)


@functools.cache
def _label_free(trainer: type) -> type:
    """Return the label-free form of a trainer; its own methods keep their precedence."""
    if issubclass(trainer, SelConTrainer):
        return trainer
    if trainer is DefaultTrainer:
        return SelConTrainer
    return type(trainer.__name__, (trainer, SelConTrainer), {"__module__": __name__})


def prepare_script(command: Sequence[str]) -> None:
    """Prepare FastReID for a script that does not know the plugin.

    FastReID's default config gets the plugin's keys, its ``launch`` starts several
    processes on CPUs as well, and faiss for CPUs has the names that a project uses. The
    data set of the precise statistics (``TEST.PRECISE_BN``) is the one that is trained on,
    unless the script names another.

    Args:
        command: Arguments of Python that run the script under the plugin, with its
            arguments; every process runs them.
    """
    offer_gpu_names()
    add_selcon_config(fastreid.config.defaults._C)
    vars(fastreid.engine)["launch"] = _launcher(command)
    vars(fastreid.engine)["default_setup"] = _set_up


def _set_up(cfg: CfgNode, args: Any) -> None:
    """Set up FastReID, with the config that a script has merged and uses afterwards."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    follow_training_data(cfg)
    if frozen:
        cfg.freeze()
    default_setup(cfg, args)


def _launcher(command: Sequence[str]) -> Callable[..., Any]:
    def launch_script(
        main_func: Callable[..., Any],
        num_gpus_per_machine: int,
        num_machines: int = 1,
        machine_rank: int = 0,
        dist_url: str | None = None,
        args: tuple[Any, ...] = (),
    ) -> Any:
        """Replace FastReID's function of the same purpose."""
        if num_machines * num_gpus_per_machine == 1 or under_torchrun():
            return launch(main_func, num_gpus_per_machine, args=args)
        # The workers of torch.multiprocessing would import the script before the plugin.
        meeting = ["--standalone"]
        address = _ADDRESS.fullmatch(dist_url or "")
        if num_machines > 1:
            if address is None:
                raise ValueError(
                    f"several machines need a common --dist-url tcp://host:port, got "
                    f"{dist_url!r}"
                )
            meeting = [
                f"--nnodes={num_machines}",
                f"--node_rank={machine_rank}",
                f"--master_addr={address[1]}",
                f"--master_port={address[2]}",
            ]
        torchrun = ["-m", "torch.distributed.run", *meeting]
        processes = f"--nproc_per_node={num_gpus_per_machine}"
        done = subprocess.run([sys.executable, *torchrun, processes, *command], check=False)
        raise SystemExit(done.returncode)

    return launch_script
