"""Patches that let FastReID 1.4.0 run on current Python, PyTorch and NumPy.

Each one documents what fails without it and when it can be removed.
"""

from __future__ import annotations

import collections
import collections.abc
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from selcon_plugin.compat.fastreid_freezing import count_frozen_steps_in_optimizer
from selcon_plugin.compat.shared import (
    PATCHED,
    HostMissingError,
    allow_numpy_in_checkpoints,
    naming_what_is_missing,
    prepare_torchvision,
    restore_numpy_bool,
)
from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.io.safe_loading import load_data

logger = logging.getLogger(__name__)

FASTREID_INSTALL = "pip install --no-deps fastreid==1.4.0"


def prepare_fastreid() -> None:
    """Make ``import fastreid`` and its subpackages work.

    This imports all that training needs of FastReID, in order to patch it.
    FastReID reads its data set root from the environment variable ``FASTREID_DATASETS``
    at that moment: set it before the first call.

    Raises:
        HostMissingError: If FastReID is not installed.
        HostNeedsError: If a module that it imports is not installed.
        MismatchError: If torchvision does not work with the installed torch.
    """  # noqa: DOC502  (raised by the functions called here)
    if importlib.util.find_spec("fastreid") is None:
        raise HostMissingError("fastreid", FASTREID_INSTALL)
    prepare_torchvision()
    _restore_torch_six()
    _restore_collections_mapping()
    restore_numpy_bool()
    allow_numpy_in_checkpoints()
    with naming_what_is_missing("fastreid"):
        _patch_fastreid()
        importlib.import_module("fastreid.engine")


def _patch_fastreid() -> None:
    _translate_random_affine()
    _let_data_loader_run_without_cuda()
    _let_background_reader_fail()
    _let_optimizers_keep_their_gradients()
    count_frozen_steps_in_optimizer()
    _keep_running_without_compiler()
    _let_reranking_run_without_gpu_faiss()
    _load_fastreid_checkpoints_as_data()
    _exchange_data_without_code()
    _read_images_as_the_plugin_does()


def _restore_torch_six() -> None:
    """Provide ``torch._six.string_classes``.

    Without it: ``fastreid.data.build`` of the PyPI release raises
    ``ModuleNotFoundError: No module named 'torch._six'``; torch 2.0 removed the module.
    Can be removed when: FastReID on PyPI no longer imports it (its GitHub master does not).
    """
    if importlib.util.find_spec("torch._six") is not None:
        return
    module = types.ModuleType("torch._six", "Replacement of the module torch 2.0 removed.")
    module.__spec__ = importlib.machinery.ModuleSpec("torch._six", loader=None)
    module.__dict__["string_classes"] = (str, bytes)
    sys.modules["torch._six"] = module
    torch.__dict__["_six"] = module


def _restore_collections_mapping() -> None:
    """Provide ``collections.Mapping``.

    Without it: ``fastreid.data.build`` and ``fastreid.evaluation.testing`` raise
    ``ImportError: cannot import name 'Mapping' from 'collections'``; Python 3.10 removed
    the alias. Both FastReID's PyPI release and its GitHub master are affected.
    Can be removed when: FastReID imports it from ``collections.abc``.
    """
    if not hasattr(collections, "Mapping"):
        collections.__dict__["Mapping"] = collections.abc.Mapping


def _translate_random_affine() -> None:
    """Let FastReID's affine augmentation call torchvision with its old argument names.

    Without it: ``INPUT.AFFINE.ENABLED`` raises ``TypeError: RandomAffine.__init__() got an
    unexpected keyword argument 'resample'``; torchvision 0.15 removed ``resample`` and
    ``fillcolor``. The patch affects only FastReID's reference to torchvision.
    Can be removed when: FastReID passes ``interpolation`` and ``fill``.
    """
    build: Any = importlib.import_module("fastreid.data.transforms.build")
    original: Callable[..., Any] = build.T.RandomAffine
    if "resample" in inspect.signature(original).parameters:
        return  # an old torchvision, or already patched

    def random_affine(*, resample: int = 0, fillcolor: int = 0, **kwargs: Any) -> Any:
        modes = build.T.InterpolationMode
        mode = modes.BILINEAR if resample == 2 else modes.NEAREST  # Pillow's constants
        return original(**kwargs, interpolation=mode, fill=fillcolor)

    view = types.ModuleType(build.T.__name__)
    view.__dict__.update(vars(build.T), RandomAffine=random_affine)
    build.T = view


def _let_data_loader_run_without_cuda() -> None:
    """Make FastReID's ``DataLoaderX`` a plain ``DataLoader`` on machines without CUDA.

    Without it: building any loader raises ``RuntimeError`` or ``AssertionError`` on a
    machine without CUDA, because ``DataLoaderX`` opens a CUDA stream and a thread that
    copies batches to the GPU. With CUDA the class is not changed.
    Can be removed when: FastReID's loader checks ``torch.cuda.is_available()``.
    """
    loader: Any = importlib.import_module("fastreid.data.data_utils").DataLoaderX
    if torch.cuda.is_available() or "__next__" not in vars(loader):
        return

    def __init__(self: Any, local_rank: int, **kwargs: Any) -> None:  # noqa: N807
        kwargs["pin_memory"] = False  # pinned memory only serves copies to a GPU
        DataLoader.__init__(self, **kwargs)
        self.local_rank = local_rank

    def shutdown(self: Any) -> None:
        """Return immediately, since there is no background thread to stop."""

    loader.__init__ = __init__
    loader.shutdown = shutdown
    for name in ("__iter__", "__next__", "preload", "_shutdown_background_thread"):
        delattr(loader, name)  # use the methods of DataLoader instead


def _let_background_reader_fail() -> None:
    """Make FastReID's loader raise the errors of the thread that fetches batches.

    Without it: with CUDA a run with unreadable images (or a failing transform) hangs
    forever. The thread dies, and the training waits for its next batch.
    Can be removed when: FastReID's ``BackgroundGenerator`` propagates errors.
    """
    generator: Any = importlib.import_module("fastreid.data.data_utils").BackgroundGenerator
    original = generator.run
    if hasattr(original, PATCHED):
        return

    @functools.wraps(original)
    def run(self: Any) -> None:
        try:
            original(self)
        except Exception as error:
            self.queue.put(None if self.exit_event.is_set() else error)

    def next_batch(self: Any) -> Any:
        batch = self.queue.get()
        if isinstance(batch, Exception):
            raise batch
        if batch is None:
            raise StopIteration
        return batch

    setattr(run, PATCHED, True)
    generator.run, generator.next = run, next_batch


def _let_optimizers_keep_their_gradients() -> None:
    """Make FastReID's optimizers keep the gradients of its contiguous buffers.

    Without it: **training silently has no effect**. FastReID packs all weights into a few
    buffers (``ContiguousParams``) and passes those to the optimizer, with gradients in the
    same memory as the weights' own. Since torch 2.0 ``optimizer.zero_grad()`` sets the
    buffers' gradients to None by default: the optimizer then skips every step, while the
    gradients of the weights accumulate unused.

    An optimizer of the model's own parameters, as this plugin builds it, deletes gradients
    as PyTorch does: a gradient of zeros would let weight decay and momentum move a weight
    that took no part in a step.

    Can be removed when: FastReID calls ``zero_grad(set_to_none=False)``.
    """
    build: Any = importlib.import_module("fastreid.solver.build")
    original: Callable[..., Any] = build.maybe_add_freeze_layer
    if hasattr(original, PATCHED) or not _zero_grad_drops_gradients():
        return

    # FastReID calls this function last on any optimizer class.
    @functools.wraps(original)
    def maybe_add_freeze_layer(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        if not inspect.isclass(optimizer):
            return optimizer  # an instance from the caller, who controls its parameters
        base: Any = optimizer

        def zero_grad(self: Any, set_to_none: bool | None = None) -> None:
            if set_to_none is None:
                set_to_none = not _holds_contiguous_buffers(self)
            base.zero_grad(self, set_to_none=set_to_none)

        return type(base.__name__, (base,), {"zero_grad": zero_grad})

    setattr(maybe_add_freeze_layer, PATCHED, True)
    build.maybe_add_freeze_layer = maybe_add_freeze_layer


def _holds_contiguous_buffers(optimizer: torch.optim.Optimizer) -> bool:
    # FastReID's buffers are plain tensors, all of them or none.
    return not isinstance(optimizer.param_groups[0]["params"][0], torch.nn.Parameter)


def _zero_grad_drops_gradients() -> bool:
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=0.1).zero_grad()
    return weight.grad is None


def _keep_running_without_compiler() -> None:
    """Fall back to FastReID's Python ranking if its Cython version cannot be compiled.

    Without it: the constructor of ``ReidEvaluator`` runs ``make`` inside the installed
    package and calls ``sys.exit(1)`` if that fails: without Cython or a compiler, in a
    read-only installation, or if ``python3`` on the path is another interpreter. Without
    ``make`` itself it raises ``FileNotFoundError``.
    Can be removed when: FastReID catches the failure itself.
    """
    rank_cylib = importlib.import_module("fastreid.evaluation.rank_cylib")
    evaluation = importlib.import_module("fastreid.evaluation.reid_evaluation")
    rank = importlib.import_module("fastreid.evaluation.rank")
    original = rank_cylib.compile_helper
    if rank.IS_CYTHON_AVAI or hasattr(original, PATCHED):
        return
    guarded = _compile_or_fall_back(original)
    rank_cylib.__dict__["compile_helper"] = guarded
    evaluation.__dict__["compile_helper"] = guarded


def _compile_or_fall_back(compile_helper: Callable[[], None]) -> Callable[[], None]:
    attempted = False

    @functools.wraps(compile_helper)
    def guarded() -> None:
        nonlocal attempted
        if attempted:  # a second attempt in the same process would end like the first
            return
        attempted = True
        path = os.environ.get("PATH", "")
        own_directory = os.path.dirname(sys.executable)
        # FastReID's Makefile calls python3.
        os.environ["PATH"] = os.pathsep.join((own_directory, path))
        try:
            compile_helper()
        except (SystemExit, OSError, subprocess.SubprocessError):
            logger.warning(
                "FastReID's compiled ranking cannot be built here; ranking runs in Python "
                "with the same results, but slower. `selcon doctor` lists what is missing."
            )
        finally:
            os.environ["PATH"] = path

    setattr(guarded, PATCHED, True)
    return guarded


def _let_reranking_run_without_gpu_faiss() -> None:
    """Let FastReID's re-ranking search on the CPU if faiss cannot use a GPU.

    Without it: ``TEST.RERANK.ENABLED`` fails on ``features.cuda()`` without CUDA, and on
    ``faiss.StandardGpuResources`` with CUDA next to ``faiss-cpu``. FastReID has a CPU
    search (``search_option=3``), but its evaluator never uses it.
    Can be removed when: FastReID's ``build_dist`` chooses an available search.
    """
    module: Any = importlib.import_module("fastreid.utils.compute_dist")
    original = module.compute_jaccard_distance
    if hasattr(original, PATCHED) or _faiss_searches_on_gpu(module.faiss):
        return

    @functools.wraps(original)
    def compute_jaccard_distance(
        features: torch.Tensor,
        k1: int = 20,
        k2: int = 6,
        search_option: int = 0,
        fp16: bool = False,
    ) -> Any:
        return original(features, k1=k1, k2=k2, search_option=3, fp16=fp16)

    setattr(compute_jaccard_distance, PATCHED, True)
    module.compute_jaccard_distance = compute_jaccard_distance


def _load_fastreid_checkpoints_as_data() -> None:
    """Make FastReID's checkpointer read tensor files without running code from them.

    Without it: an untrusted checkpoint can run code under torch < 2.6, where ``torch.load``
    allows it by default; under later versions the error message advises allowing it.
    Can be removed when: FastReID passes ``weights_only=True``.
    """
    module: Any = importlib.import_module("fastreid.utils.checkpoint")

    def _load_file(self: Any, f: str) -> Any:
        return load_data(f)

    module.Checkpointer._load_file = _load_file


class _DataExchange:
    """Replacement of the module ``pickle`` for values exchanged between processes."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    @staticmethod
    def loads(received: bytes) -> Any:
        return load_data(io.BytesIO(received))


def _exchange_data_without_code() -> None:
    """Make FastReID's processes read received values only as data.

    Without it: ``comm.gather`` and ``comm.all_gather``, with which FastReID collects losses
    and features, unpickle everything from the network: anyone with access to the port can
    run code.
    Can be removed when: FastReID gathers tensors.
    """
    comm: Any = importlib.import_module("fastreid.utils.comm")
    comm.pickle = _DataExchange


def _read_images_as_the_plugin_does() -> None:
    """Make FastReID's own data sets and predictor read images like the plugin.

    Without it: transparent, palette and 16-bit images have other pixels in a loader of
    FastReID than in one of the plugin, so the same picture has two features; and EPS files
    start Ghostscript.
    Can be removed when: FastReID's data sets accept a reader.
    """
    utils: Any = importlib.import_module("fastreid.data.data_utils")
    if hasattr(utils.read_image, PATCHED):
        return
    original = utils.read_image

    @functools.wraps(original)
    def read_image(file_name: str, format: str | None = None) -> Any:
        if format in (None, "RGB"):
            return read_rgb(file_name)
        return original(file_name, format)

    setattr(read_image, PATCHED, True)
    utils.read_image = read_image
    for part in ("fastreid.data.common", "fastreid.data"):
        module: Any = importlib.import_module(part)
        if hasattr(module, "read_image"):
            module.read_image = read_image


def _faiss_searches_on_gpu(faiss: Any) -> bool:
    # Names used by FastReID's search_option=0; later faiss releases removed the second.
    needed = ("StandardGpuResources", "cast_integer_to_long_ptr", "bruteForceKnn")
    return torch.cuda.is_available() and all(hasattr(faiss, name) for name in needed)
