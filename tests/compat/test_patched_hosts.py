"""The patched hosts at work: training, resuming, ranking and reading images."""

import importlib
import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.hosts import needs_fastreid, needs_torchreid, run_python
from selcon_plugin import compat


def write_market(root, *, train, query, gallery):
    """Write noise images in Market-1501's layout; each argument lists (pid, camera)."""
    generator = np.random.default_rng(0)
    for folder, people in (
        ("bounding_box_train", train),
        ("query", query),
        ("bounding_box_test", gallery),
    ):
        (root / folder).mkdir(parents=True)
        for number, (pid, camera) in enumerate(people):
            pixels = generator.integers(0, 256, (64, 32, 3), dtype=np.uint8)
            name = f"{pid:04d}_c{camera}s1_{number:06d}_00.jpg"
            Image.fromarray(pixels).save(root / folder / name)


MARKET = {
    "train": [(pid, camera) for pid in range(1, 5) for camera in (1, 2)],
    "query": [(pid, 1) for pid in range(5, 11)],
    "gallery": [(pid, camera) for pid in range(5, 11) for camera in (2, 3)],
}


def small_fastreid_config(config):
    config.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    config.MODEL.BACKBONE.NAME = "build_osnet_backbone"
    config.MODEL.BACKBONE.DEPTH = "x0_25"
    config.MODEL.BACKBONE.FEAT_DIM = 128
    config.MODEL.BACKBONE.PRETRAIN = False
    config.INPUT.SIZE_TRAIN = config.INPUT.SIZE_TEST = [64, 32]
    config.DATASETS.NAMES = config.DATASETS.TESTS = ("Market1501",)
    config.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    config.DATALOADER.NUM_WORKERS = 0
    config.SOLVER.IMS_PER_BATCH = 4
    config.SOLVER.MAX_EPOCH = config.TEST.EVAL_PERIOD = 2
    config.TEST.RERANK.ENABLED = True
    config.TEST.RERANK.K1, config.TEST.RERANK.K2 = 3, 2
    return config


@pytest.fixture
def one_thread():
    """Use one thread: for tiny steps on a busy machine more threads only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_fastreid
@pytest.mark.usefixtures("one_thread")
def test_fastreid_trains_resumes_and_evaluates(tmp_path, monkeypatch):
    compat.prepare_fastreid()
    from fastreid.config import get_cfg
    from fastreid.data import build
    from fastreid.engine import DefaultTrainer

    def failing_make(command, **options):
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", failing_make)  # compiling takes half a minute
    monkeypatch.setattr(build, "_root", str(tmp_path))
    write_market(tmp_path / "Market-1501-v15.09.15", **MARKET)
    config = small_fastreid_config(get_cfg())
    config.OUTPUT_DIR = str(tmp_path)
    trainer = DefaultTrainer(config)
    trainer.resume_or_load(resume=False)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    results = trainer.train()
    assert trainer.iter == 4  # two epochs of two iterations
    assert 0 < results["mAP"] <= 100
    after = list(trainer.model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    resumed = DefaultTrainer(config)
    resumed.resume_or_load(resume=True)
    assert resumed.start_epoch == 2
    pairs = zip(after, resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@needs_torchreid
@pytest.mark.usefixtures("one_thread")
def test_torchreid_trains_resumes_and_evaluates(tmp_path):
    torchreid = compat.import_torchreid()
    write_market(tmp_path / "market1501" / "Market-1501-v15.09.15", **MARKET)
    data = torchreid.data.ImageDataManager(
        root=str(tmp_path),
        sources="market1501",
        height=64,
        width=32,
        batch_size_train=4,
        batch_size_test=4,
        transforms=["random_flip"],
        use_gpu=False,
        workers=0,
    )
    model = torchreid.models.build_model(
        "osnet_x0_25", data.num_train_pids, pretrained=False
    )
    optimizer = torchreid.optim.build_optimizer(model)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer)
    engine = torchreid.engine.ImageSoftmaxEngine(
        data, model, optimizer, scheduler, use_gpu=False
    )
    engine.run(save_dir=str(tmp_path), max_epoch=1, print_freq=1, ranks=[1, 5])

    (checkpoint,) = (tmp_path / "model").glob("model.pth.tar-*")
    stored = torch.load(checkpoint)
    assert isinstance(stored["rank1"], np.floating)
    assert torchreid.utils.resume_from_checkpoint(str(checkpoint), model) == 1


@needs_torchreid
def test_torchreid_ranks_by_both_protocols():
    torchreid = compat.import_torchreid()
    distance = np.array([[0.1, 0.9, 0.5], [0.9, 0.6, 0.3]], np.float32)
    query, gallery = np.array([0, 1]), np.array([0, 1, 2])
    ones = np.ones(3, np.int64)
    for cuhk03 in (False, True):
        cmc, mean_average_precision = torchreid.metrics.evaluate_rank(
            distance,
            query,
            gallery,
            0 * query,
            ones,
            max_rank=3,
            use_metric_cuhk03=cuhk03,
            use_cython=False,
        )
        # Query 0 finds its match first, query 1 second.
        np.testing.assert_allclose(cmc, [0.5, 1, 1])
        assert mean_average_precision == pytest.approx(0.75)


class TriedAgainError(Exception):
    """Error raised at the fifth line that torchreid prints about a file."""


@pytest.fixture
def torchreid_reader(monkeypatch):
    """Restore torchreid's own reader in every module that calls it."""
    torchreid = compat.import_torchreid()
    tools = sys.modules[f"{torchreid.__name__}.utils.tools"]
    dataset = sys.modules[f"{torchreid.__name__}.data.datasets.dataset"]
    own = inspect.unwrap(tools.read_image)
    places = (torchreid.utils, tools, dataset)
    for place in places:
        monkeypatch.setattr(place, "read_image", own)
    lines = []

    def print_five_times(line):
        lines.append(line)
        if len(lines) == 5:
            raise TriedAgainError

    monkeypatch.setattr(tools, "print", print_five_times, raising=False)
    monkeypatch.setattr(compat.torchreid, "_READ_PAUSES", (0, 0, 0))
    return torchreid, places


@pytest.fixture(params=[b"", b"no image", "truncated"])
def broken_image(request, tmp_path):
    path = tmp_path / "broken.jpg"
    if request.param == "truncated":
        Image.effect_noise((64, 32), 50).save(path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes(request.param)
    return path


@needs_torchreid
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # torchreid's own
def test_broken_image_stops_torchreid_once_patched(torchreid_reader, broken_image):
    torchreid, places = torchreid_reader
    with pytest.raises(TriedAgainError):
        torchreid.utils.read_image(str(broken_image))
    compat.torchreid._let_unreadable_images_fail(torchreid)
    for place in places:
        with pytest.raises(OSError, match=r"broken\.jpg cannot be read as an image: "):
            place.read_image(str(broken_image))


@needs_torchreid
def test_reader_is_patched_once(torchreid_reader):
    torchreid, places = torchreid_reader
    compat.torchreid._let_unreadable_images_fail(torchreid)
    patched = torchreid.utils.read_image
    compat.torchreid._let_unreadable_images_fail(torchreid)
    assert all(place.read_image is patched for place in places)


@needs_torchreid
def test_patched_reader_equals_torchreids(torchreid_reader, tmp_path):
    torchreid, _ = torchreid_reader
    path = str(tmp_path / "palette.png")
    Image.effect_noise((8, 4), 50).convert("P").save(path)
    own = torchreid.utils.read_image(path)
    compat.torchreid._let_unreadable_images_fail(torchreid)
    patched = torchreid.utils.read_image(path)
    assert patched.mode == "RGB"
    assert patched.tobytes() == own.tobytes()


@needs_torchreid
def test_reader_that_raises_is_replaced_too(torchreid_reader, monkeypatch, tmp_path):
    torchreid, _ = torchreid_reader
    monkeypatch.setattr(torchreid.utils, "read_image", lambda path: None)
    compat.torchreid._let_unreadable_images_fail(torchreid)
    path = tmp_path / "16bit.png"
    Image.fromarray(np.full((2, 2), 0x1234, dtype=np.uint16)).save(path)
    assert torchreid.utils.read_image(str(path)).getpixel((0, 0)) == (0x12,) * 3


@needs_fastreid
def test_fastreid_reads_images_as_the_plugin_does(tmp_path):
    compat.prepare_fastreid()
    common = importlib.import_module("fastreid.data.common")
    utils = importlib.import_module("fastreid.data.data_utils")
    path = tmp_path / "16bit.png"
    Image.fromarray(np.full((2, 2), 0x1234, dtype=np.uint16)).save(path)
    for read_image in (common.read_image, utils.read_image):
        assert read_image(str(path)).getpixel((0, 0)) == (0x12,) * 3
    Image.effect_noise((8, 4), 50).convert("P").save(tmp_path / "palette.png")
    read = common.read_image(str(tmp_path / "palette.png"))
    assert read.tobytes() == Image.open(tmp_path / "palette.png").convert("RGB").tobytes()


PARTS = ("data", "engine", "losses", "metrics", "models", "optim", "utils")

LAYOUT = f"""
import json
from selcon_plugin import compat
root = compat.import_torchreid()
print(json.dumps([root.__name__, all(hasattr(root, part) for part in {PARTS})]))
"""


@pytest.mark.parametrize("root", ["torchreid", "torchreid.reid"])
def test_both_layouts_of_torchreid_are_found(tmp_path, root):
    folder = tmp_path.joinpath(*root.split("."))
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "__init__.py").touch()
    (tmp_path / "torchreid" / "__init__.py").touch()
    (folder / "__init__.py").write_text(f"from {root} import {', '.join(PARTS)}\n")
    assert run_python(LAYOUT, path=[tmp_path]) == [root, True]
