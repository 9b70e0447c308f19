"""Every patch: the fault without it, no fault with it, and no change of a healthy host."""

import collections
import importlib.util
import inspect
import pickle
import sys
import threading
import types

import numpy as np
import pytest
import torch

from helpers.hosts import needs_fastreid, run_python
from selcon_plugin import compat

# One interpreter meets the faults one after another, in the order in which importing and
# using FastReID meets them, and applies each shim only after its fault was seen.
FAULTS = """
import importlib, io, json, os, subprocess, sys
import numpy as np, torch
from PIL import Image
from selcon_plugin import compat

seen = {"hosts imported by compat": sorted({"fastreid", "torchreid"} & set(sys.modules))}

def attempt(use, fault=""):
    try:
        use()
    except (Exception, SystemExit) as error:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            if fault == "torchvision":
                del sys.modules[name]  # half imported
        return f"{type(error).__name__}: {error}"
    return ""

def before_and_after(fault, shim, use):
    seen[fault] = [attempt(use, fault), shim() or attempt(use)]

module = importlib.import_module
from selcon_plugin.compat import fastreid as shims, shared
before_and_after("torchvision", compat.prepare_torchvision, lambda: module("torchvision"))
before_and_after("torch._six", shims._restore_torch_six, lambda: module("torch._six"))
mapping = lambda: exec("from collections import Mapping")
before_and_after("collections.Mapping", shims._restore_collections_mapping, mapping)

from fastreid.evaluation.rank import evaluate_rank
one, two = np.arange(1), np.arange(2)
cuhk03 = lambda: evaluate_rank(
    np.zeros((1, 2)), one, two, one, two + 1, 1, use_metric_cuhk03=True, use_cython=False
)
before_and_after("numpy.bool", shared.restore_numpy_bool, cuhk03)

stored = io.BytesIO()
content = {"rank1": np.float32(0.5), "epoch": np.int64(3), "model": {"w": np.ones((2, 2))}}
torch.save(content, stored)

def load():
    loaded = torch.load(io.BytesIO(stored.getvalue()))
    assert loaded["rank1"] == 0.5 and loaded["epoch"] == 3
    assert (loaded["model"]["w"] == 1).all()

before_and_after("checkpoint", shared.allow_numpy_in_checkpoints, load)

from fastreid.config import get_cfg
from fastreid.data.transforms import build_transforms
config = get_cfg()
config.INPUT.AFFINE.ENABLED = True
image = Image.fromarray(np.full((64, 32, 3), 9, np.uint8))
affine = lambda: build_transforms(config, is_train=True)(image)
before_and_after("affine", shims._translate_random_affine, affine)

from fastreid.data.data_utils import DataLoaderX

def load_batches():
    loader = DataLoaderX(0, dataset=[{"x": torch.ones(1) * i} for i in range(5)],
                         batch_size=2, pin_memory=True)
    for _ in range(2):  # two epochs
        assert [batch["x"].flatten().tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    loader.shutdown()

before_and_after("data loader", shims._let_data_loader_run_without_cuda, load_batches)

from fastreid.solver import build_optimizer

def take_two_steps(contiguous):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer, _ = build_optimizer(get_cfg(), net, contiguous=contiguous)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    return net.weight.detach().clone()

def optimize():
    assert torch.equal(take_two_steps(True), take_two_steps(False)), "weights stood still"

before_and_after("optimizer", shims._let_optimizers_keep_their_gradients, optimize)

from fastreid.evaluation import ReidEvaluator, rank, reid_evaluation
rank.IS_CYTHON_AVAI = False
sys.modules["fastreid.evaluation.rank_cylib.rank_cy"] = None  # it is not compiled
path = os.environ["PATH"]
calls = []

def failing_make(command, **options):
    calls.append(os.environ["PATH"].split(os.pathsep)[0])
    return subprocess.CompletedProcess(command, 2)

subprocess.run = failing_make
evaluator = lambda: ReidEvaluator(get_cfg(), 1)
before_and_after("compiler", shims._keep_running_without_compiler, evaluator)
again = attempt(evaluator)
seen["compiler calls"] = [len(calls), again, calls[-1] == os.path.dirname(sys.executable),
                          os.environ["PATH"] == path]

from fastreid.utils.compute_dist import build_dist
features = torch.eye(6)[torch.arange(12) % 6] + 0.01 * torch.arange(12)[:, None]

def rerank():
    distance = build_dist(features[:4], features[4:], metric="jaccard", k1=3, k2=2)
    assert distance.shape == (4, 8) and np.isfinite(distance).all()

before_and_after("re-ranking", shims._let_reranking_run_without_gpu_faiss, rerank)

print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def faults():
    return run_python(FAULTS)


# What a user sees without the shim; empty where the words differ between versions.
SYMPTOMS = {
    "torchvision": "operator torchvision::nms does not exist",
    "torch._six": "No module named 'torch._six'",
    "collections.Mapping": "cannot import name 'Mapping' from 'collections'",
    "numpy.bool": "module 'numpy' has no attribute 'bool'",
    "checkpoint": "WeightsUnpickler error: Unsupported",
    "affine": "unexpected keyword argument 'resample'",
    "data loader": "",
    "optimizer": "weights stood still",
    "compiler": "SystemExit: 1",
    "re-ranking": "",
}


@needs_fastreid
@pytest.mark.parametrize("fault", SYMPTOMS)
def test_fault_is_there_without_its_shim_and_gone_with_it(faults, fault):
    before, after = faults[fault]
    assert after == ""
    if not before:
        pytest.skip(f"the versions installed here are healthy: {fault}")
    assert SYMPTOMS[fault] in before


@needs_fastreid
def test_compat_itself_imports_no_host(faults):
    assert faults["hosts imported by compat"] == []


@needs_fastreid
def test_compiler_is_tried_once_with_the_running_python_first_on_the_path(faults):
    # One failing call without the shim, one with it, none for the second evaluator.
    assert faults["compiler calls"] == [2, "", True, True]


def test_existing_torch_six_is_untouched(monkeypatch):
    existing = types.ModuleType("torch._six")
    existing.__spec__ = importlib.util.spec_from_loader("torch._six", loader=None)
    monkeypatch.setitem(sys.modules, "torch._six", existing)
    compat.fastreid._restore_torch_six()
    assert sys.modules["torch._six"] is existing


def test_existing_mapping_is_untouched(monkeypatch):
    existing = object()
    monkeypatch.setattr(collections, "Mapping", existing, raising=False)
    compat.fastreid._restore_collections_mapping()
    assert collections.Mapping is existing


def test_existing_numpy_bool_is_untouched(monkeypatch):
    existing = object()
    monkeypatch.setitem(vars(np), "bool", existing)  # asking NumPy 1 for it would warn
    compat.shared.restore_numpy_bool()
    assert np.bool is existing


def test_torch_that_loads_numpy_numbers_is_told_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(compat.shared, "_loads_numpy_numbers", lambda: True)
    monkeypatch.setattr(torch.serialization, "add_safe_globals", told.append, raising=False)
    compat.shared.allow_numpy_in_checkpoints()
    assert told == []


def test_affine_of_an_old_torchvision_is_untouched(monkeypatch):
    class RandomAffine:
        def __init__(self, degrees, resample=False, fillcolor=0): ...

    view = types.SimpleNamespace(RandomAffine=RandomAffine)  # stands for torchvision
    fake_module(monkeypatch, "fastreid.data.transforms.build", T=view)
    compat.fastreid._translate_random_affine()
    assert view.RandomAffine is RandomAffine


def test_data_loader_is_untouched_with_cuda(monkeypatch):
    class DataLoaderX:
        def __next__(self): ...

    own = dict(vars(DataLoaderX))
    fake_module(monkeypatch, "fastreid.data.data_utils", DataLoaderX=DataLoaderX)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compat.fastreid._let_data_loader_run_without_cuda()
    assert dict(vars(DataLoaderX)) == own


@needs_fastreid
@pytest.mark.parametrize("patched", [False, True])
def test_error_in_the_thread_that_fetches_batches_reaches_the_training(
    monkeypatch, patched
):
    compat.prepare_fastreid()
    from fastreid.data.data_utils import BackgroundGenerator

    def batches():
        yield 1
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    if not patched:
        own = inspect.unwrap(BackgroundGenerator.run)
        monkeypatch.setattr(BackgroundGenerator, "run", own)
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
    fetched = BackgroundGenerator(batches(), 0)
    assert next(fetched) == 1
    if patched:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            next(fetched)
        assert list(BackgroundGenerator(iter([1, 2]), 0)) == [1, 2]
    else:
        fetched.join(60)
        assert fetched.queue.empty()  # and the training would wait for ever


def test_optimizers_of_an_old_torch_are_untouched(monkeypatch):
    def maybe_add_freeze_layer(): ...

    name = "fastreid.solver.build"
    module = fake_module(monkeypatch, name, maybe_add_freeze_layer=maybe_add_freeze_layer)
    monkeypatch.setattr(compat.fastreid, "_zero_grad_drops_gradients", lambda: False)
    compat.fastreid._let_optimizers_keep_their_gradients()
    assert module.maybe_add_freeze_layer is maybe_add_freeze_layer


def test_compiled_ranking_is_untouched(monkeypatch):
    def compile_helper(): ...

    name = "fastreid.evaluation"
    library = fake_module(monkeypatch, f"{name}.rank_cylib", compile_helper=compile_helper)
    fake_module(monkeypatch, f"{name}.reid_evaluation", compile_helper=compile_helper)
    fake_module(monkeypatch, f"{name}.rank", IS_CYTHON_AVAI=True)
    compat.fastreid._keep_running_without_compiler()
    assert library.compile_helper is compile_helper


def test_reranking_is_untouched_where_faiss_searches_on_the_gpu(monkeypatch):
    def compute_jaccard_distance(): ...

    names = ("StandardGpuResources", "cast_integer_to_long_ptr", "bruteForceKnn")
    module = fake_module(
        monkeypatch,
        "fastreid.utils.compute_dist",
        faiss=types.SimpleNamespace(**dict.fromkeys(names)),
        compute_jaccard_distance=compute_jaccard_distance,
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compat.fastreid._let_reranking_run_without_gpu_faiss()
    assert module.compute_jaccard_distance is compute_jaccard_distance


def fake_module(monkeypatch, name, **content):
    module = types.ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def fastreid_state():
    """Collect every object that a patch may have replaced."""
    compat.prepare_fastreid()
    from fastreid.data import data_utils
    from fastreid.data.transforms import build
    from fastreid.evaluation import rank_cylib, reid_evaluation
    from fastreid.solver import build as solver
    from fastreid.utils import compute_dist

    return [
        *vars(data_utils.DataLoaderX).values(),
        build.T,
        solver.maybe_add_freeze_layer,
        rank_cylib.compile_helper,
        reid_evaluation.compile_helper,
        compute_dist.compute_jaccard_distance,
        collections.Mapping,
        sys.modules.get("torch._six"),
        np.bool,
        compat.shared._torchvision_library,
    ]


@needs_fastreid
def test_preparing_twice_changes_nothing():
    first = fastreid_state()
    second = fastreid_state()
    assert all(a is b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("prepare", "command"),
    [
        (compat.prepare_fastreid, "pip install --no-deps fastreid==1.4.0"),
        (compat.prepare_torchreid, "pip install --no-deps torchreid==0.2.5"),
        (compat.import_torchreid, "pip install --no-deps torchreid==0.2.5"),
    ],
)
def test_missing_host_is_named_with_the_command_that_installs_it(
    monkeypatch, prepare, command
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(compat.HostMissingError, match=command) as caught:
        prepare()
    assert isinstance(caught.value, ImportError)


class RunsOnLoad:
    def __reduce__(self):
        return print, ("a checkpoint ran code",)


@pytest.mark.skipif(
    "weights_only" not in str(torch.load.__doc__) or torch.__version__ < "2.6",
    reason="torch.load runs pickled code by default before torch 2.6",
)
def test_checkpoints_still_cannot_run_code(tmp_path):
    compat.shared.allow_numpy_in_checkpoints()
    torch.save(RunsOnLoad(), tmp_path / "malicious.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "malicious.pth")
