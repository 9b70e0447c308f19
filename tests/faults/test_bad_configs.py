"""Invalid configs: each fails before any training, with one line that names the remedy.

A case is an id, what the user wrote (options by key on top of a config that trains, or a
whole command line) and strings that the line must contain: key, value, range, remedy.
"""

import shlex
import time

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny
from helpers.tiny import SPEC
from selcon_plugin.cli.main import main
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.torchreid_ext import ImageSelConEngine
from selcon_plugin.torchreid_ext.datasets import image_datasets

# CPU time of this process. A case takes a fraction of 1; the first imports packages.
SECONDS = 20

NUM_IMAGES = SPEC.num_train_ids * SPEC.images_per_id

FASTREID = tiny.FASTREID | {
    "SOLVER.OPT": "SGD",
    "SOLVER.MAX_EPOCH": 1,
    "OUTPUT_DIR": "{place}/out",
}

TORCHREID = tiny.TORCHREID | {
    "data.root": "{data}",
    "data.save_dir": "{place}/out",
    "train.max_epoch": 1,
    "test.batch_size": 16,
}

CLUSTERS = {"MODEL.SELCON.METHOD": "ClusterContrast"}
S, C, D = "MODEL.SELCON.", "MODEL.SELCON.CLUSTERING.", "DATASETS."

FASTREID_CASES = [
    # --- keys and types
    ("unknown-node", {"MODEL.SELCN.TEMPERATURE": 0.1}, "MODEL.SELCON.TEMPERATURE"),
    ("unknown-key", {"SOLVER.MAX_EPOCHS": 3}, "SOLVER.MAX_EPOCHS; mean SOLVER.MAX_EPOCH"),
    ("unknown-option", {S + "TEMPERATURES": 0.1}, "TEMPERATURES; MODEL.SELCON.TEMPERATURE"),
    ("text-for-number", {S + "TEMPERATURE": "cold"}, "TEMPERATURE; cold; a number > 0"),
    ("float-for-int", {S + "NUM_PARTS": 2.5}, "NUM_PARTS; 2.5; a whole number >= 0"),
    ("int-for-bool", {S + "PROJECT_GLOBAL": 3}, "PROJECT_GLOBAL; 3; True or False"),
    ("host-type", {"SOLVER.MAX_EPOCH": "many"}, "SOLVER.MAX_EPOCH; many; whole number"),
    ("node-for-key", {"SOLVER": 3}, "SOLVER; group of keys; SOLVER."),
    # --- ranges
    ("temperature", {S + "TEMPERATURE": 0.0}, "TEMPERATURE; > 0; 0.0"),
    ("not-a-number", {S + "SELF_WEIGHT": "nan"}, "SELF_WEIGHT; nan"),
    ("num-parts", {S + "NUM_PARTS": -1}, "NUM_PARTS; >= 0; -1"),
    ("ema-decay-1", {S + "EMA_DECAY": 1.0}, "EMA_DECAY; < 1; 1.0"),
    ("ema-decay-negative", {S + "EMA_DECAY": -0.1}, "EMA_DECAY; >= 0; -0.1"),
    ("ghost-1", {S + "GHOST_BATCH_SIZE": 1}, "GHOST_BATCH_SIZE; 0; at least 2"),
    ("micro-batches", {S + "MICRO_BATCHES": 0}, "MICRO_BATCHES; >= 1; 0"),
    ("seed", {S + "SEED": -1}, "SEED; >= 0; -1"),
    ("outlier-ratio", {S + "OUTLIER_RATIO": 1.0}, "OUTLIER_RATIO; < 1; 1.0"),
    ("eps", CLUSTERS | {C + "EPS": 1.5}, "CLUSTERING.EPS; <= 1; auto; 1.5"),
    ("period", CLUSTERS | {C + "PERIOD": 0}, "CLUSTERING.PERIOD; >= 1; 0"),
    ("batch-0", {"SOLVER.IMS_PER_BATCH": 0}, "SOLVER.IMS_PER_BATCH; >= 1; 0"),
    ("epochs-0", {"SOLVER.MAX_EPOCH": 0}, "SOLVER.MAX_EPOCH; >= 1; 0"),
    ("learning-rate", {"SOLVER.BASE_LR": -0.1}, "SOLVER.BASE_LR; -0.1"),
    ("checkpoint-period", {"SOLVER.CHECKPOINT_PERIOD": 0}, "CHECKPOINT_PERIOD; >= 1; 0"),
    ("eval-period", {"TEST.EVAL_PERIOD": -1}, "TEST.EVAL_PERIOD; >= 0; -1"),
    ("test-batch", {"TEST.IMS_PER_BATCH": 0}, "TEST.IMS_PER_BATCH; >= 1; 0"),
    ("workers", {"DATALOADER.NUM_WORKERS": -2}, "DATALOADER.NUM_WORKERS; >= 0; -2"),
    ("instances", {"DATALOADER.NUM_INSTANCE": 0}, "DATALOADER.NUM_INSTANCE; >= 1; 0"),
    (
        "image-size",
        {"INPUT.SIZE_TRAIN": "[64,2,1]"},
        "SIZE_TRAIN; [64, 2, 1]; width",
    ),
    ("image-size-0", {"INPUT.SIZE_TEST": "[0,32]"}, "INPUT.SIZE_TEST; [0, 32]; >= 1"),
    ("drawn-cameras", {D + "SYNTHETIC_PERSONS.NUM_CAMERAS": 1}, "num_cameras; 1"),
    # --- unknown names
    ("method", {S + "METHOD": "ClusterContrats"}, "METHOD; did you mean 'ClusterContrast'"),
    ("sampler", {S + "SAMPLER": "kp"}, "SAMPLER; 'kp'; 'pk'"),
    ("labeler", CLUSTERS | {C + "LABELER": "dbscan"}, "LABELER; dbscan; 'DBSCAN'"),
    ("outliers", CLUSTERS | {C + "OUTLIERS": "keep"}, "OUTLIERS; keep; 'singleton'"),
    ("clustered", CLUSTERS | {C + "FEATURES": "parts"}, "FEATURES; parts; 'fused'"),
    ("wave-block", {S + "WAVE_BLOCK": "wavy"}, "WAVE_BLOCK; wavy; 'attentive'"),
    ("backbone", {"MODEL.BACKBONE.NAME": "build_resnt_backbone"}, "build_resnet_backbone"),
    ("timm", {"MODEL.BACKBONE.TIMM_NAME": "resnet5o"}, "TIMM_NAME; resnet5o; resnet50"),
    ("no-timm", {"MODEL.BACKBONE.TIMM_NAME": ""}, "TIMM_NAME; set it to a name"),
    (
        "torchreid-model",
        {
            "MODEL.BACKBONE.NAME": "build_torchreid_backbone",
            "MODEL.BACKBONE.TORCHREID_NAME": "osnet_x1",
        },
        "TORCHREID_NAME; osnet_x1; osnet_x1_0",
    ),
    ("head", {"MODEL.HEADS.NAME": "GlobalHead"}, "MODEL.HEADS.NAME; GlobalPartHead"),
    ("host-head", {"MODEL.HEADS.NAME": "ClasHead"}, "MODEL.HEADS.NAME; GlobalPartHead"),
    ("pool", {"MODEL.HEADS.POOL_LAYER": "AvgPool"}, "POOL_LAYER; GlobalAvgPool; AvgPool"),
    ("norm", {"MODEL.HEADS.NORM": "batch"}, "MODEL.HEADS.NORM; batch; BN"),
    ("optimizer", {"SOLVER.OPT": "sgd"}, "SOLVER.OPT; 'sgd'; 'SGD'"),
    ("schedule", {"SOLVER.SCHED": "cosine"}, "SOLVER.SCHED; cosine; CosineAnnealingLR"),
    ("host-network", {"MODEL.META_ARCHITECTURE": "Baseline"}, "META_ARCHITECTURE; SelCon"),
    ("network", {"MODEL.META_ARCHITECTURE": "Selcon"}, "META_ARCHITECTURE; Selcon; SelCon"),
    ("device", {"MODEL.DEVICE": "gpu"}, "MODEL.DEVICE; gpu; CUDA; cpu"),
    ("data-set", {D + "NAMES": "('Market',)"}, "DATASETS.NAMES; Market; Market1501"),
    ("test-set", {D + "TESTS": "('Duke',)"}, "DATASETS.TESTS; Duke; DukeMTMC"),
    # --- options that contradict each other
    (
        "other-methods",
        CLUSTERS | {S + "NUM_NEIGHBORS": 5},
        "NUM_NEIGHBORS; ClusterContrast",
    ),
    (
        "other-labelers",
        CLUSTERS | {C + "LABELER": "KMeans", C + "EPS": 0.5},
        "CLUSTERING.EPS; KMeans; NUM_CLUSTERS",
    ),
    ("no-clusters", {S + "SAMPLER": "pk"}, "SAMPLER; pk; SelectiveContrastive; auto"),
    ("camera-weight", {S + "CAMERA_WEIGHT": "cluster"}, "camera_weight; selection"),
    (
        "reliability",
        CLUSTERS | {C + "LABELER": "HDBSCAN", C + "RELIABILITY": True},
        "RELIABILITY; HDBSCAN; DBSCAN",
    ),
    (
        "reliability-margin",
        CLUSTERS | {C + "GRAPH_MARGIN": 0.01, C + "RELIABILITY": True},
        "RELIABILITY; GRAPH_MARGIN; 0.02",
    ),
    (
        "ensemble-delta",
        {S + "METHOD": "ISE", C + "LABELER": "Ensemble", C + "EPS": 0.05, C + "DELTA": 0.1},
        "eps; delta",
    ),
    ("camera-term", {S + "TEST_CAMERA_TERM": True, "TEST.AQE.ENABLED": True}, "TEST.AQE"),
    (
        "camera-term-method",
        CLUSTERS | {S + "TEST_CAMERA_TERM": True},
        "TEST_CAMERA_TERM; ClusterContrast; SAME_CAMERA_PENALTY",
    ),
    # --- batches
    (
        "micro-batches-cut",
        {S + "MICRO_BATCHES": 3},
        "SOLVER.IMS_PER_BATCH; 8; multiple; MICRO_BATCHES; 3",
    ),
    (
        "instances-cut",
        CLUSTERS | {"DATALOADER.NUM_INSTANCE": 3},
        "IMS_PER_BATCH; 8; multiple; NUM_INSTANCE; 3",
    ),
    ("batch-of-all", {"SOLVER.IMS_PER_BATCH": 48}, "40 training images; lower; 48"),
    ("parts-rows", {S + "NUM_PARTS": 5}, "5; NUM_PARTS; at most"),
    ("parts-width", {"MODEL.HEADS.EMBEDDING_DIM": 63}, "63; 2; parts"),
    # --- files
    ("no-output", {"OUTPUT_DIR": ""}, "OUTPUT_DIR; empty"),
    ("output-file", {"OUTPUT_DIR": "{place}/notes.txt"}, "OUTPUT_DIR; notes.txt; folder"),
    ("output-below", {"OUTPUT_DIR": "{place}/notes.txt/x"}, "OUTPUT_DIR; notes.txt/x"),
    ("output-kernel", {"OUTPUT_DIR": "/proc/selcon"}, "OUTPUT_DIR; /proc/selcon; writ"),
    ("extra-images", {S + "EXTRA_IMAGES": "{place}/nowhere"}, "EXTRA_IMAGES; nowhere"),
    ("data-missing", {D + "NAMES": "('Market1501',)"}, "Market1501; FASTREID_DATASETS"),
    (
        "default-data-missing",
        {D + "TESTS": "('Market1501',)"},
        "Market1501; default; DATASETS.TESTS may be ()",
    ),
    ("no-data", {D + "NAMES": "()"}, "DATASETS.NAMES; empty"),
    ("no-folder", {D + "NAMES": "('ImageFolderReID',)"}, "IMAGE_FOLDER.ROOT; --images"),
    ("weights-missing", {"MODEL.WEIGHTS": "{place}/no.pth"}, "MODEL.WEIGHTS; no.pth"),
    ("weights-text", {"MODEL.WEIGHTS": "{place}/notes.txt"}, "notes.txt; weights"),
    ("weights-other", {"MODEL.WEIGHTS": "{place}/other.pth"}, "other.pth; fit"),
    ("weights-empty", {"MODEL.WEIGHTS": "{place}/empty.pth"}, "empty.pth; weights"),
    (
        "pretrained-missing",
        {"MODEL.BACKBONE.PRETRAIN": True, "MODEL.BACKBONE.PRETRAIN_PATH": "{place}/no.pth"},
        "PRETRAIN_PATH; no.pth",
    ),
    (
        "pretrained-other",
        {
            "MODEL.BACKBONE.PRETRAIN": True,
            "MODEL.BACKBONE.PRETRAIN_PATH": "{place}/other.pth",
        },
        "PRETRAIN_PATH; other.pth; do not fit",
    ),
    (
        "pretrained-host",
        {
            "MODEL.BACKBONE.NAME": "build_resnet_backbone",
            "MODEL.BACKBONE.DEPTH": "18x",
            "MODEL.BACKBONE.PRETRAIN": True,
            "MODEL.BACKBONE.PRETRAIN_PATH": "{place}/no.pth",
        },
        "PRETRAIN_PATH; no.pth",
    ),
    (
        "depth",
        {"MODEL.BACKBONE.NAME": "build_resnet_backbone", "MODEL.BACKBONE.DEPTH": "51x"},
        "MODEL.BACKBONE.NAME; DEPTH '51x'",
    ),
]
COMMANDS = [
    ("value-missing", "train SOLVER.MAX_EPOCH", "SOLVER.MAX_EPOCH; value"),
    ("config-missing", "train --config-file {place}/no.yml", "--config-file; no.yml"),
    ("config-folder", "train --config-file {place}", "--config-file; folder"),
    ("config-empty", "train --config-file {place}/empty.yml", "empty.yml; no keys"),
    ("config-list", "train --config-file {place}/list.yml", "list.yml; KEY: value"),
    ("config-broken", "train --config-file {place}/broken.yml", "broken.yml; YAML"),
    ("config-binary", "train --config-file {place}/other.pth", "other.pth; YAML"),
    ("config-twice", "train --config-file {place}/loop.yml", "loop.yml; _BASE_"),
    ("base-missing", "train --config-file {place}/baseless.yml", "_BASE_; no.yml"),
    ("key-in-file", "train --config-file {place}/typo.yml", "typo.yml; SOLVER.MAX_EPOCH"),
    ("wrong-host", "train --host torchreid --config-file {place}/good.yml", "good.yml"),
    ("images-missing", "train --images {place}/nowhere", "nowhere; does not exist"),
    ("images-file", "train --images {place}/notes.txt", "notes.txt; not a folder"),
    ("images-empty", "train --images {place}/empty", "empty; no image files; .jpg"),
    ("images-broken", "train --images {place}/broken", "broken; 1 of 1 images"),
    (
        "camera-syntax",
        "train --images {place}/images --camera-pattern '(c'",
        "(c; camera pattern; regular expression",
    ),
    (
        "camera-nowhere",
        "train --images {place}/images --camera-pattern 'cam(\\d)'",
        "camera pattern; none of the 16 files",
    ),
    ("import-missing", "train --import {place}/no.py", "--import; no.py"),
    ("import-broken", "train --import {place}/notes.txt", "--import; notes.txt"),
    ("no-processes", "train --num-gpus 0 {fastreid}", "--num-gpus; >= 1; 0"),
    ("no-machines", "train --num-machines 0 {fastreid}", "--num-machines; >= 1; 0"),
    ("rank", "train --num-machines 2 --machine-rank 2 {fastreid}", "--machine-rank; 2"),
    ("meeting", "train --num-machines 2 {fastreid}", "--dist-url; tcp://"),
    (
        "dist-url",
        "train --num-gpus 2 --dist-url here {fastreid}",
        "--dist-url; here; tcp://",
    ),
    ("processes-cut", "train --num-gpus 3 {fastreid}", "IMS_PER_BATCH; 8; multiple; 3"),
    (
        "processes",
        "train --num-gpus 48 {fastreid} SOLVER.IMS_PER_BATCH 48",
        "40 training images; 48",
    ),
    ("eval-nothing", "eval {fastreid}", "MODEL.WEIGHTS; checkpoint"),
    ("eval-nowhere", "eval {fastreid} DATASETS.TESTS ()", "DATASETS.TESTS; empty"),
    ("eval-other", "eval {fastreid} MODEL.WEIGHTS {place}/other.pth", "other.pth; fit"),
    ("extract-nothing", "extract --output {place}/x.npz", "--images FOLDER"),
    (
        "extract-untrained",
        "extract --images {place}/images --output {place}/x.npz MODEL.DEVICE cpu",
        "MODEL.WEIGHTS",
    ),
    ("torchreid-processes", "train --num-gpus 2 {torchreid}", "--num-gpus; torchreid"),
    ("torchreid-eval", "eval {torchreid}", "model.load_weights; checkpoint"),
]
for method in ("CAP", "O2CAP", "ViTC"):
    images = "train --images {place}/images {folder} MODEL.SELCON.METHOD " + method
    COMMANDS.append((f"no-cameras-{method}", images, f"{method}; camera; --camera-pattern"))

TORCHREID_CASES = [
    ("unknown-key", {"train.max_epochs": 3}, "train.max_epochs; mean train.max_epoch"),
    (
        "unknown-option",
        {"selcon.temperatures": 0.1},
        "selcon.temperatures; selcon.temperature",
    ),
    ("text-for-number", {"selcon.temperature": "cold"}, "temperature; cold; a number > 0"),
    ("temperature", {"selcon.temperature": -1.0}, "selcon.temperature; > 0; -1.0"),
    ("ema-decay", {"selcon.ema_decay": 1.0}, "selcon.ema_decay; < 1; 1.0"),
    ("ghost-1", {"selcon.ghost_batch_size": 1}, "ghost_batch_size; at least 2"),
    ("pool", {"selcon.pool": "mean"}, "selcon.pool; mean; 'gem'"),
    ("last-stride", {"selcon.last_stride": 3}, "selcon.last_stride; <= 2; 3"),
    ("method", {"selcon.method": "SPCL"}, "selcon.method; SPCL; 'SpCL'"),
    ("batch-0", {"train.batch_size": 0}, "train.batch_size; >= 1; 0"),
    ("epochs-0", {"train.max_epoch": 0}, "train.max_epoch; >= 1; 0"),
    ("learning-rate", {"train.lr": -0.1}, "train.lr; -0.1"),
    ("workers", {"data.workers": -1}, "data.workers; >= 0; -1"),
    ("height", {"data.height": 0}, "data.height; >= 1; 0"),
    ("instances", {"sampler.num_instances": 0}, "sampler.num_instances; >= 1; 0"),
    ("optimizer", {"train.optim": "SGD"}, "train.optim; 'SGD'; 'sgd'"),
    ("schedule", {"train.lr_scheduler": "cos"}, "train.lr_scheduler; 'cos'; 'cosine'"),
    ("transform", {"data.transforms": "['flip']"}, "data.transforms; flip; random_flip"),
    ("metric", {"test.dist_metric": "l2"}, "test.dist_metric; 'l2'; 'cosine'"),
    ("video", {"data.type": "video"}, "data.type; video; image"),
    ("no-cuda", {"use_gpu": True}, "use_gpu; CUDA; False"),
    ("data-set", {"data.sources": "['market']"}, "data.sources; market; market1501"),
    ("test-set", {"data.targets": "['market']"}, "data.targets; market; market1501"),
    ("no-data", {"data.sources": "[]"}, "data.sources; empty"),
    ("data-missing", {"data.sources": "['market1501']"}, "data.root; market1501"),
    ("model", {"model.name": "osnet_x1"}, "osnet_x1; osnet_x1_0"),
    ("timm", {"model.name": "timm:resnet5o"}, "resnet5o; resnet50"),
    (
        "other-methods",
        {"selcon.method": "ClusterContrast", "selcon.num_neighbors": 5},
        "selcon.num_neighbors; ClusterContrast",
    ),
    ("no-clusters", {"selcon.sampler": "pk"}, "sampler; pk; SelectiveContrastive; auto"),
    ("micro-batches-cut", {"selcon.micro_batches": 3}, "batch; 8; multiple; micro; 3"),
    (
        "instances-cut",
        {"selcon.method": "ClusterContrast", "sampler.num_instances": 3},
        "batch; 8; multiple; 3",
    ),
    ("batch-of-all", {"train.batch_size": 48}, "40 training images; lower; 48"),
    ("parts-rows", {"selcon.num_parts": 5}, "5; at most"),
    (
        "no-images",
        {"data.sources": "['imagefolderreid']", "data.root": "{place}/empty"},
        "empty; no image files; .jpg",
    ),
    (
        "no-folder",
        {"data.sources": "['imagefolderreid']", "image_folder.root": "{place}/nowhere"},
        "nowhere; does not exist",
    ),
    (
        "no-cameras",
        {
            "selcon.method": "CAP",
            "data.sources": "['imagefolderreid']",
            "image_folder.root": "{place}/images",
        },
        "CAP; camera; --camera-pattern",
    ),
    ("no-output", {"data.save_dir": ""}, "data.save_dir; empty"),
    ("output-file", {"data.save_dir": "{place}/notes.txt"}, "data.save_dir; notes.txt"),
    ("weights-missing", {"model.load_weights": "{place}/no.pth"}, "load_weights; no.pth"),
    ("weights-text", {"model.load_weights": "{place}/notes.txt"}, "notes.txt; weights"),
    ("weights-other", {"model.load_weights": "{place}/other.pth"}, "other.pth; not fit"),
    ("resume-missing", {"model.resume": "{place}/no.pth"}, "model.resume; no.pth"),
    (
        "resume-other",
        {"model.resume": "{place}/other.pth"},
        "other.pth; checkpoint of a run",
    ),
]


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """Nothing answers at the address from which torchreid downloads a missing data set."""
    market = image_datasets()["market1501"]
    monkeypatch.setattr(market, "dataset_url", "http://127.0.0.1:9/market.zip")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    return root


@pytest.fixture
def place(tmp_path):
    """A folder with what people name by mistake."""
    for folder in ("empty", "broken", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"\xff\xd8 no more")
    for number in range(16):
        pixels = np.full((32, 16, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "notes.txt").write_text("hello, this is no file of weights\n")
    (tmp_path / "empty.pth").touch()
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    for name, text in {
        "empty": "",
        "list": "- SOLVER\n- MODEL\n",
        "broken": "SOLVER: [1,\nMODEL: }\n",
        "loop": "_BASE_: loop.yml\nSOLVER:\n  MAX_EPOCH: 3\n",
        "baseless": "_BASE_: no.yml\n",
        "typo": "SOLVER:\n  MAX_EPOCS: 3\n",
        "good": "SOLVER:\n  MAX_EPOCH: 3\n",
    }.items():
        (tmp_path / f"{name}.yml").write_text(text)
    return tmp_path


@pytest.fixture
def fails(place, data, capfd, monkeypatch):
    """Run a command that must end in one line with status 2, before any training."""
    monkeypatch.setenv("FASTREID_DATASETS", str(data))
    monkeypatch.chdir(place)
    for trainer in (SelConTrainer, ImageSelConEngine):
        monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("it trains"))
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SELCON_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    names = {"place": str(place), "data": str(data)}

    def run(command, parts):
        started = time.process_time()
        status = main([word.format(**names) for word in command])
        assert time.process_time() - started < SECONDS
        output = capfd.readouterr()
        errors = [line for line in output.err.splitlines() if "error:" in line]
        assert status == 2, output.err
        assert len(errors) == 1, output.err
        assert errors[0].startswith(f"selcon {command[0]}: error: "), output.err
        assert output.err.endswith(f"{errors[0]}\n"), output.err
        assert "Traceback" not in output.out + output.err
        missing = [part for part in parts.split("; ") if part not in errors[0]]
        assert not missing, f"{missing} not in: {errors[0]}"

    return run


def arguments_of(options):
    return [word for key, value in options.items() for word in (key, str(value))]


@pytest.mark.parametrize(
    ("options", "parts"), [pytest.param(*case[1:], id=case[0]) for case in FASTREID_CASES]
)
def test_fastreid_config(fails, options, parts):
    fails(["train", *arguments_of(FASTREID | options)], parts)


@pytest.mark.parametrize(
    ("options", "parts"), [pytest.param(*case[1:], id=case[0]) for case in TORCHREID_CASES]
)
def test_torchreid_config(fails, options, parts):
    fails(["train", "--host", "torchreid", *arguments_of(TORCHREID | options)], parts)


@pytest.mark.parametrize(
    ("line", "parts"), [pytest.param(*case[1:], id=case[0]) for case in COMMANDS]
)
def test_command(fails, line, parts):
    folder = {key: v for key, v in FASTREID.items() if not key.startswith("DATASETS")}
    placeholders = {
        "{fastreid}": arguments_of(FASTREID),
        "{folder}": arguments_of(folder),
        "{torchreid}": ["--host", "torchreid", *arguments_of(TORCHREID)],
    }
    command = [
        part for word in shlex.split(line) for part in placeholders.get(word, [word])
    ]
    fails(command, parts)
