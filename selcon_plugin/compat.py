"""Let FastReID and torchreid import and run on current Python and PyTorch.

Both hosts predate what people install today. Each shim below mends one fault, and:

* says what breaks without it and when it can be deleted;
* changes nothing on a machine where that fault is absent;
* may be applied any number of times;
* touches objects in memory only, never a file on disk.

Only the adapters (``fastreid_ext``, ``torchreid_ext``), the command line and the tests
import this module; the core knows nothing of the hosts.
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
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from selcon_plugin.datasets.reading import read_rgb
from selcon_plugin.safe_loading import data_only, load_data

__all__ = [
    "HostMissingError",
    "import_torchreid",
    "prepare_fastreid",
    "prepare_torchreid",
    "prepare_torchvision",
    "torchvision_is_mended",
]

logger = logging.getLogger(__name__)

FASTREID_INSTALL = "pip install --no-deps fastreid==1.4.0"
TORCHREID_INSTALL = "pip install --no-deps torchreid==0.2.5"

# Set on functions that replace a host's: the sign not to replace them again.
_MENDED = "_selcon_mended"

# Schemas as torchvision's C++ library registers them.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class HostMissingError(ImportError):
    """A host is not installed; the message holds the command that installs it."""

    def __init__(self, host: str, install_command: str) -> None:
        super().__init__(
            f"{host} is not installed. Install it with: {install_command}", name=host
        )
        self.install_command = install_command


def prepare_fastreid() -> None:
    """Make ``import fastreid`` and everything below it work.

    Imports FastReID's data, evaluation and utility packages in order to mend them.
    FastReID reads its data set root from the environment variable ``FASTREID_DATASETS``
    at that moment: set it before the first call.

    Raises:
        HostMissingError: If FastReID is not installed.
    """
    if importlib.util.find_spec("fastreid") is None:
        raise HostMissingError("fastreid", FASTREID_INSTALL)
    prepare_torchvision()
    _restore_torch_six()
    _restore_collections_mapping()
    _restore_numpy_bool()
    _allow_numpy_in_checkpoints()
    _translate_random_affine()
    _let_data_loader_run_without_cuda()
    _let_background_reader_fail()
    _let_optimizers_keep_their_gradients()
    _keep_running_without_compiler()
    _let_reranking_run_without_gpu_faiss()
    _load_fastreid_checkpoints_as_data()
    _exchange_data_without_code()


def prepare_torchreid() -> None:
    """Make ``import torchreid`` work, whichever of its two layouts is installed.

    Raises:
        HostMissingError: If torchreid is not installed.
    """
    if importlib.util.find_spec("torchreid") is None:
        raise HostMissingError("torchreid", TORCHREID_INSTALL)
    prepare_torchvision()
    _restore_numpy_bool()
    _allow_numpy_in_checkpoints()


def import_torchreid() -> types.ModuleType:
    """Import torchreid and return the module under which its parts are reachable.

    The PyPI release keeps everything under ``torchreid.reid``, the GitHub release
    directly under ``torchreid``. Where it is not installed, ``HostMissingError`` says how
    to install it.

    Returns:
        The module that has ``data``, ``engine``, ``losses``, ``metrics``, ``models``,
        ``optim`` and ``utils`` as attributes.
    """
    prepare_torchreid()
    root = "torchreid"
    if importlib.util.find_spec("torchreid.reid") is not None:
        root = "torchreid.reid"
    module = importlib.import_module(root)
    _let_unreadable_images_fail(module)
    _load_torchreid_checkpoints_as_data(module)
    return module


# --- before a host is imported -----------------------------------------------------------

# Kept for the life of the process: dropping it would undefine its operators.
_torchvision_library: Any = None


def prepare_torchvision() -> None:
    """Let torchvision import when its compiled part cannot be loaded.

    Without it: ``import torchvision`` raises ``operator torchvision::nms does not exist``
    (then ``qnms``) where the wheel's compiled part was built for another torch, as with
    the PyPI wheel (CUDA) next to a CPU build of torch. The hosts use torchvision's
    transforms and model definitions only, so declaring the operators is enough.
    Can go when: torchvision imports without its compiled part.
    """
    global _torchvision_library
    if "torchvision" in sys.modules or _torchvision_operators_load():
        return
    for schema in _TORCHVISION_SCHEMAS:
        if hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            continue  # somebody else has declared it
        if _torchvision_library is None:
            library: Any = torch.library.Library
            _torchvision_library = library("torchvision", "FRAGMENT")
        _torchvision_library.define(schema)


def torchvision_is_mended() -> bool:
    """Tell whether torchvision runs without its compiled part in this process."""
    return _torchvision_library is not None


def _torchvision_operators_load() -> bool:
    """Try to load torchvision's compiled part, found the way torchvision finds it."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.submodule_search_locations is None:
        return True  # nothing to mend
    locations = list(package.submodule_search_locations)
    extension = importlib.machinery.PathFinder.find_spec("_C", locations)
    if extension is None or extension.origin is None:
        return False
    operators: Any = torch.ops
    try:
        operators.load_library(extension.origin)
    except (OSError, RuntimeError):
        return False
    return True


def _restore_torch_six() -> None:
    """Provide ``torch._six.string_classes``.

    Without it: ``fastreid.data.build`` of the PyPI release raises
    ``ModuleNotFoundError: No module named 'torch._six'``; torch 2.0 removed the module.
    Can go when: FastReID on PyPI no longer imports it (its GitHub master does not).
    """
    if importlib.util.find_spec("torch._six") is not None:
        return
    module = types.ModuleType("torch._six", "Stand-in for the module torch 2.0 removed.")
    module.__spec__ = importlib.machinery.ModuleSpec("torch._six", loader=None)
    module.__dict__["string_classes"] = (str, bytes)
    sys.modules["torch._six"] = module
    torch.__dict__["_six"] = module


def _restore_collections_mapping() -> None:
    """Provide ``collections.Mapping``.

    Without it: ``fastreid.data.build`` and ``fastreid.evaluation.testing`` raise
    ``ImportError: cannot import name 'Mapping' from 'collections'``; Python 3.10 removed
    the alias. Both FastReID's PyPI release and its GitHub master are affected.
    Can go when: FastReID imports it from ``collections.abc``.
    """
    if not hasattr(collections, "Mapping"):
        collections.__dict__["Mapping"] = collections.abc.Mapping


def _restore_numpy_bool() -> None:
    """Provide ``numpy.bool``.

    Without it: the CUHK03 protocol of both hosts (``eval_cuhk03``) raises
    ``AttributeError: module 'numpy' has no attribute 'bool'`` under NumPy 1.24 to 1.26.
    NumPy 2 has the name again.
    Can go when: NumPy 1 is no longer supported here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # NumPy 1.20 to 1.23 have it and warn of its removal
        present = hasattr(np, "bool")
    if not present:
        np.__dict__["bool"] = np.bool_


def _allow_numpy_in_checkpoints() -> None:
    """Let ``torch.load`` read the NumPy numbers that the hosts write into checkpoints.

    Without it: resuming raises ``WeightsUnpickler error: Unsupported global`` under
    torch >= 2.6, whose ``torch.load`` refuses everything but tensors and plain Python
    values unless told otherwise. torchreid stores Rank-1 as ``numpy.float32`` in every
    checkpoint, and FastReID's checkpointer takes weights stored as arrays. Only the classes
    needed to rebuild numbers and plain arrays are allowed: a checkpoint from a stranger
    still cannot run code.
    Can go when: the hosts store floats and tensors only.
    """
    if not hasattr(torch.serialization, "add_safe_globals") or _loads_numpy_numbers():
        return
    multiarray: Any = importlib.import_module(_numpy_core() + ".multiarray")
    allowed: list[Any] = [np.dtype, np.ndarray]
    allowed += [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8")]
    allowed += [type(np.dtype(kind)) for kind in ("u1", "u2", "u4", "u8", "?")]
    # NumPy 2 renamed numpy.core to numpy._core; a file may come from either side.
    for core in ("numpy.core", "numpy._core"):
        allowed.append((multiarray.scalar, f"{core}.multiarray.scalar"))
        allowed.append((multiarray._reconstruct, f"{core}.multiarray._reconstruct"))
    torch.serialization.add_safe_globals(allowed)


def _numpy_core() -> str:
    return "numpy._core" if hasattr(np, "_core") else "numpy.core"


def _loads_numpy_numbers() -> bool:
    buffer = io.BytesIO()
    torch.save({"number": np.float64(0.5), "array": np.zeros(2, np.float32)}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer)
    except Exception:  # torch raises pickle's or its own error, by version
        return False
    return True


# --- after FastReID is imported ----------------------------------------------------------


def _translate_random_affine() -> None:
    """Let FastReID's affine augmentation call torchvision by its old argument names.

    Without it: ``INPUT.AFFINE.ENABLED`` raises ``TypeError: RandomAffine.__init__() got an
    unexpected keyword argument 'resample'``; torchvision 0.15 removed ``resample`` and
    ``fillcolor``. Only FastReID's own view of torchvision changes.
    Can go when: FastReID passes ``interpolation`` and ``fill``.
    """
    build: Any = importlib.import_module("fastreid.data.transforms.build")
    original: Callable[..., Any] = build.T.RandomAffine
    if "resample" in inspect.signature(original).parameters:
        return  # an old torchvision, or mended already

    def random_affine(*, resample: int = 0, fillcolor: int = 0, **kwargs: Any) -> Any:
        modes = build.T.InterpolationMode
        mode = modes.BILINEAR if resample == 2 else modes.NEAREST  # numbers as in Pillow
        return original(**kwargs, interpolation=mode, fill=fillcolor)

    view = types.ModuleType(build.T.__name__)
    view.__dict__.update(vars(build.T), RandomAffine=random_affine)
    build.T = view


def _let_data_loader_run_without_cuda() -> None:
    """Make FastReID's ``DataLoaderX`` a plain ``DataLoader`` where there is no CUDA.

    Without it: building any loader raises ``RuntimeError`` or ``AssertionError`` on a
    machine without CUDA, because ``DataLoaderX`` opens a CUDA stream and a thread that
    copies batches to the GPU. With CUDA the class is left alone.
    Can go when: FastReID's loader checks ``torch.cuda.is_available()``.
    """
    loader: Any = importlib.import_module("fastreid.data.data_utils").DataLoaderX
    if torch.cuda.is_available() or "__next__" not in vars(loader):
        return

    def __init__(self: Any, local_rank: int, **kwargs: Any) -> None:  # noqa: N807
        kwargs["pin_memory"] = False  # pinned memory exists for copies to a GPU only
        DataLoader.__init__(self, **kwargs)
        self.local_rank = local_rank

    def shutdown(self: Any) -> None:
        """Do nothing: there is no background thread to stop."""

    loader.__init__ = __init__
    loader.shutdown = shutdown
    for name in ("__iter__", "__next__", "preload", "_shutdown_background_thread"):
        delattr(loader, name)  # what DataLoader itself does is right


def _let_background_reader_fail() -> None:
    """Let FastReID's loader raise what went wrong in the thread that fetches batches.

    Without it: with CUDA a run whose images cannot be read (or whose transform fails)
    neither goes on nor ends. The thread dies, and the training waits for its next batch.
    Can go when: FastReID's ``BackgroundGenerator`` hands errors on.
    """
    generator: Any = importlib.import_module("fastreid.data.data_utils").BackgroundGenerator
    original = generator.run
    if hasattr(original, _MENDED):
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

    setattr(run, _MENDED, True)
    generator.run, generator.next = run, next_batch


def _let_optimizers_keep_their_gradients() -> None:
    """Make FastReID's optimizers zero gradients in place rather than drop them.

    Without it: **nothing is learned, and nothing says so**. FastReID packs all weights into
    a few buffers (``ContiguousParams``) and gives the optimizer those, with gradients that
    share memory with the weights' own. Since torch 2.0 ``optimizer.zero_grad()`` sets the
    buffers' gradients to None by default: the optimizer then skips every step, while the
    gradients of the weights pile up unseen.
    Can go when: FastReID calls ``zero_grad(set_to_none=False)``.
    """
    build: Any = importlib.import_module("fastreid.solver.build")
    original: Callable[..., Any] = build.maybe_add_freeze_layer
    if hasattr(original, _MENDED) or not _zero_grad_drops_gradients():
        return

    # The last thing FastReID does to an optimizer's class, whichever that is.
    @functools.wraps(original)
    def maybe_add_freeze_layer(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        if not inspect.isclass(optimizer):
            return optimizer  # a caller's own, whose parameters are the caller's affair
        base: Any = optimizer

        def zero_grad(self: Any, set_to_none: bool = False) -> None:
            base.zero_grad(self, set_to_none=set_to_none)

        return type(base.__name__, (base,), {"zero_grad": zero_grad})

    setattr(maybe_add_freeze_layer, _MENDED, True)
    build.maybe_add_freeze_layer = maybe_add_freeze_layer


def _zero_grad_drops_gradients() -> bool:
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=0.1).zero_grad()
    return weight.grad is None


def _keep_running_without_compiler() -> None:
    """Fall back to FastReID's Python ranking where its Cython one cannot be compiled.

    Without it: ``ReidEvaluator`` runs ``make`` inside the installed package when it is
    built and calls ``sys.exit(1)`` if that fails: no Cython or compiler, a read-only
    installation, or a ``python3`` on the path that is not the one running. Also without
    ``make`` itself: ``FileNotFoundError``.
    Can go when: FastReID catches the failure itself.
    """
    rank_cylib = importlib.import_module("fastreid.evaluation.rank_cylib")
    evaluation = importlib.import_module("fastreid.evaluation.reid_evaluation")
    rank = importlib.import_module("fastreid.evaluation.rank")
    original = rank_cylib.compile_helper
    if rank.IS_CYTHON_AVAI or hasattr(original, _MENDED):
        return
    guarded = _compile_or_fall_back(original)
    rank_cylib.__dict__["compile_helper"] = guarded
    evaluation.__dict__["compile_helper"] = guarded


def _compile_or_fall_back(compile_helper: Callable[[], None]) -> Callable[[], None]:
    attempted = False

    @functools.wraps(compile_helper)
    def guarded() -> None:
        nonlocal attempted
        if attempted:  # a second try in the same process fails, or is done, like the first
            return
        attempted = True
        path = os.environ.get("PATH", "")
        own_directory = os.path.dirname(sys.executable)
        os.environ["PATH"] = os.pathsep.join((own_directory, path))  # its Makefile: python3
        try:
            compile_helper()
        except (SystemExit, OSError, subprocess.SubprocessError):
            logger.warning(
                "FastReID's compiled ranking cannot be built here; ranking runs in Python, "
                "with equal results but slower. `selcon doctor` says what is missing."
            )
        finally:
            os.environ["PATH"] = path

    setattr(guarded, _MENDED, True)
    return guarded


def _let_reranking_run_without_gpu_faiss() -> None:
    """Let FastReID's re-ranking search on the CPU where faiss cannot use a GPU.

    Without it: ``TEST.RERANK.ENABLED`` fails on ``features.cuda()`` without CUDA, and on
    ``faiss.StandardGpuResources`` with CUDA next to ``faiss-cpu``. FastReID has the CPU
    search (``search_option=3``) but its evaluator never asks for it.
    Can go when: FastReID's ``build_dist`` chooses the search by what is available.
    """
    module: Any = importlib.import_module("fastreid.utils.compute_dist")
    original = module.compute_jaccard_distance
    if hasattr(original, _MENDED) or _faiss_searches_on_gpu(module.faiss):
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

    setattr(compute_jaccard_distance, _MENDED, True)
    module.compute_jaccard_distance = compute_jaccard_distance


def _load_fastreid_checkpoints_as_data() -> None:
    """Let FastReID's checkpointer read files of tensors without running code from them.

    Without it: a checkpoint from a stranger runs code under torch < 2.6, where
    ``torch.load`` does so by default; under later versions the error advises to let it.
    Can go when: FastReID passes ``weights_only=True``.
    """
    module: Any = importlib.import_module("fastreid.utils.checkpoint")

    def _load_file(self: Any, f: str) -> Any:
        return load_data(f)

    module.Checkpointer._load_file = _load_file


class _DataExchange:
    """Stands for the module ``pickle`` where processes send each other values."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    @staticmethod
    def loads(received: bytes) -> Any:
        return load_data(io.BytesIO(received))


def _exchange_data_without_code() -> None:
    """Let FastReID's processes read what others send as data alone.

    Without it: ``comm.gather`` and ``comm.all_gather``, with which FastReID collects losses
    and features, unpickle whatever comes from the network: who reaches the port runs code.
    Can go when: FastReID gathers tensors.
    """
    comm: Any = importlib.import_module("fastreid.utils.comm")
    comm.pickle = _DataExchange


def _faiss_searches_on_gpu(faiss: Any) -> bool:
    # The names FastReID's search_option=0 calls; later faiss releases dropped the second.
    needed = ("StandardGpuResources", "cast_integer_to_long_ptr", "bruteForceKnn")
    return torch.cuda.is_available() and all(hasattr(faiss, name) for name in needed)


# --- after torchreid is imported ---------------------------------------------------------

_READ_PAUSES = (0.0, 1.0, 2.0)  # seconds before each try


def _let_unreadable_images_fail(torchreid: types.ModuleType) -> None:
    """Let torchreid give up on an image that cannot be read.

    Without it: a run that meets a broken image file, in a test set for instance, neither
    goes on nor ends. ``read_image`` tries again without a pause until it succeeds, and
    prints a line each time. A file on a network drive still gets three tries.
    Can go when: torchreid's ``read_image`` raises its error.
    """
    original = getattr(torchreid.utils, "read_image", None)
    if original is None or hasattr(original, _MENDED):
        return
    if "while not " not in inspect.getsource(original):
        return  # a reader that does not wait for success

    @functools.wraps(original)
    def read_image(path: str) -> Any:
        for pause in _READ_PAUSES:
            time.sleep(pause)
            try:
                return read_rgb(path)
            except OSError as error:
                fault = error
        raise OSError(f"{path} cannot be read as an image: {fault}") from fault

    setattr(read_image, _MENDED, True)
    for part in ("utils", "utils.tools", "data.datasets.dataset"):
        sys.modules[f"{torchreid.__name__}.{part}"].__dict__["read_image"] = read_image


def _load_torchreid_checkpoints_as_data(torchreid: types.ModuleType) -> None:
    """Let torchreid read checkpoints and weights without running code from them.

    Without it: ``load_checkpoint``, and with it ``load_pretrained_weights``,
    ``resume_from_checkpoint`` and ``FeatureExtractor``, run code that a file brings along
    under torch < 2.6, where ``torch.load`` does so by default.
    Can go when: torchreid passes ``weights_only=True``.
    """
    original = getattr(torchreid.utils, "load_checkpoint", None)
    if original is None or hasattr(original, _MENDED):
        return

    @functools.wraps(original)
    def load_checkpoint(fpath: str) -> Any:
        with data_only():
            return original(fpath)

    setattr(load_checkpoint, _MENDED, True)
    for part in ("utils", "utils.torchtools"):
        sys.modules[f"{torchreid.__name__}.{part}"].__dict__["load_checkpoint"] = (
            load_checkpoint
        )
