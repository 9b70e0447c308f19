"""Evaluators that a project or a script brings: what they get, and a rehearsal.

Such an evaluator expects what the head of its project returns, which may be several
tensors. It is tried on a few images before the training, because an evaluator that does
not fit would otherwise end the run after its first epochs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import fastreid.engine.defaults
import torch
from fastreid.config import CfgNode
from fastreid.evaluation import ReidEvaluator, inference_on_dataset
from torch import nn

from selcon_plugin.compat.shared import PATCHED
from selcon_plugin.fastreid_ext.data import build_test_loader
from selcon_plugin.fastreid_ext.embedding import unwrap
from selcon_plugin.fastreid_ext.meta_arch import SelCon

logger = logging.getLogger(__name__)

_NUM_PERSONS = 8  # of the rehearsal
_NUM_IMAGES = 64  # more than the 50 ranks that FastReID computes

Item = tuple[Any, ...]


def register_inference() -> None:
    """Let FastReID's trainer give an evaluator of a project all outputs of its head."""
    space = vars(fastreid.engine.defaults)
    original = space["inference_on_dataset"]
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def inference(
        model: nn.Module, loader: Any, evaluator: Any, *args: Any, **kw: Any
    ) -> Any:
        with outputs_for(evaluator, model):
            return original(model, loader, evaluator, *args, **kw)

    setattr(inference, PATCHED, True)
    space["inference_on_dataset"] = inference


@contextlib.contextmanager
def outputs_for(evaluator: Any, model: nn.Module) -> Iterator[None]:
    """Let a network return what an evaluator expects: FastReID's own takes one vector.

    Args:
        evaluator: Evaluator of FastReID or of a project.
        model: Network of any kind, which may be distributed.

    Yields:
        Nothing.
    """
    inner = getattr(model, "module", model)
    if isinstance(evaluator, ReidEvaluator) or not isinstance(inner, SelCon):
        yield
        return
    with inner.returning_all_outputs():
        yield


def few_images(
    query: Sequence[Item], gallery: Sequence[Item]
) -> tuple[list[Item], list[Item]]:
    """Choose a few queries that have a match, and enough images to rank.

    Args:
        query: Path, identity and camera of each query.
        gallery: Path, identity and camera of each gallery image; none where the queries are
            compared with each other.

    Returns:
        Queries and gallery images; all of a small test set.
    """
    if len(query) + len(gallery) <= 2 * _NUM_IMAGES:
        return list(query), list(gallery)
    compared = gallery or query
    images = Counter(item[1] for item in compared)
    same = Counter(tuple(item[1:3]) for item in compared)
    found = (q[1] for q in query if images[q[1]] > (same[tuple(q[1:3])] if gallery else 1))
    persons = set(list(dict.fromkeys(found))[:_NUM_PERSONS])

    def chosen(items: Sequence[Item]) -> list[Item]:
        first = sorted(items, key=lambda item: item[1] not in persons)
        return first[:_NUM_IMAGES]

    return chosen(query), chosen(gallery)


def rehearse_evaluation(trainer: Any, base: Any) -> None:
    """Evaluate a few images with the evaluators of a script, before the training.

    Args:
        trainer: Trainer of the script, with its network.
        base: The plugin's trainer. A script that builds another test loader is left alone:
            which images it holds is unknown.

    Raises:
        ValueError: If the evaluation fails; the message names evaluator, error and remedy.
    """  # noqa: DOC502  (raised by the function called here)
    kind, cfg = type(trainer), trainer.cfg.clone()
    if kind.build_test_loader.__func__ is not base.build_test_loader.__func__:
        return
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0

    def few(_: Any, cfg: Any, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name, choose=few_images)

    rehearsal = type(kind.__name__, (kind,), {"build_test_loader": classmethod(few)})
    for name in cfg.DATASETS.TESTS:
        with tempfile.TemporaryDirectory() as folder:
            cfg.OUTPUT_DIR = folder  # the files of the run stay
            _rehearse(rehearsal, cfg, name, unwrap(trainer.model))


def _rehearse(kind: Any, cfg: CfgNode, name: str, model: SelCon) -> None:
    evaluator: Any = None
    try:
        loader, evaluator = kind.build_evaluator(cfg, name)
        logger.info("The evaluation is tried on %d images of %s", len(loader.dataset), name)
        with torch.random.fork_rng(devices=[]), outputs_for(evaluator, model):
            flip = cfg.TEST.FLIP.ENABLED
            inference_on_dataset(model, loader, evaluator, flip_test=flip)
    except NotImplementedError:
        return  # as in FastReID, there is nothing to evaluate
    except Exception as error:
        # The code of a project may fail in any way.
        what = type(evaluator).__name__ if evaluator else f"{kind.__name__}.build_evaluator"
        raise ValueError(
            f"DATASETS.TESTS {name}: {what} fails on a few of its images, in "
            f"{_place(error, evaluator)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. "
            "Correct the evaluator, remove build_evaluator to measure mAP and Rank-k, or "
            "set DATASETS.TESTS to () to train without a test set"
        ) from error


def _place(error: Exception, evaluator: Any) -> str:
    """Return file and line of an error, those of the project if its code is on the way."""
    frames = list(traceback.extract_tb(error.__traceback__))
    if evaluator is not None:
        folder = os.path.dirname(inspect.getfile(type(evaluator)))
        frames = [f for f in frames if f.filename.startswith(folder)] or frames
    return f"{frames[-1].filename}, line {frames[-1].lineno}"
