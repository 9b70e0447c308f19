"""The examples run unchanged on a few small images."""

import importlib.util
from pathlib import Path

import pytest
import torch

from helpers.programs import environment, run_program
from selcon_plugin.datasets import SyntheticPersonsSpec, generate_synthetic_persons

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tools/examples"
SPEC = SyntheticPersonsSpec(
    num_train_ids=8, num_test_ids=4, images_per_id=5, num_cameras=3, num_distractors=0
)


def needs(host):
    if importlib.util.find_spec(host) is None:  # not imported: compat patches it first
        pytest.skip(f"{host} is not installed")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    return root


def run(name, *arguments, **changes):
    done = run_program(EXAMPLES / name, *arguments, env=environment(**changes))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in text


def test_own_folder_from_images_to_a_page(tmp_path, drawn):
    needs("fastreid")
    images = next(drawn.rglob("bounding_box_train"))
    said = run(
        *("own_folder.py", "--images", images, "--camera-pattern", r"c(\d)"),
        *("--backbone", "timm:test_resnet", "--untrained", "--height", 128),
        *("--epochs", 1, "--output", tmp_path),
    )
    assert "clusters of 40 images" in said
    assert "40 images, " in said
    assert (tmp_path / "search.html").stat().st_size > 10_000


def test_own_model_finds_the_query_itself(tmp_path, drawn):
    needs("torchreid")
    images = next(drawn.rglob("bounding_box_train"))
    copied = tmp_path / "copy.jpg"
    original = sorted(images.iterdir())[4]
    copied.write_bytes(original.read_bytes())
    from selcon_plugin.compat.torchreid import import_torchreid

    model = import_torchreid().models.build_model("osnet_x0_25", 7, pretrained=False)
    # As torchreid's published files: a data-parallel model with its classifier.
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "osnet.pth")
    said = run(
        *("own_model.py", "--images", images, "--query", copied, "--height", 64),
        *("--model", "osnet_x0_25", "--weights", tmp_path / "osnet.pth"),
        *("--index", tmp_path / "index"),
    )
    assert "40 images added" in said
    first = said.partition(f"{copied}\n")[2].splitlines()[0]
    assert first.split() == ["1.000", str(original)]


def test_own_method_is_in_the_table(tmp_path, drawn):
    needs("fastreid")
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
        "MODEL.BACKBONE.PRETRAIN": False,
        "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2,
        "MODEL.SELCON.CLUSTERING.K1": 8,
        "INPUT.SIZE_TRAIN": [64, 32],
        "INPUT.SIZE_TEST": [64, 32],
        "SOLVER.IMS_PER_BATCH": 8,
        "DATALOADER.NUM_WORKERS": 0,
    }
    options |= {
        f"DATASETS.SYNTHETIC_PERSONS.{key.upper()}": value
        for key, value in vars(SPEC).items()
    }
    words = [str(word) for pair in options.items() for word in pair]
    arguments = ("--output", tmp_path, "--seeds", 1, "--epochs", 1, *words)
    run("own_method.py", *arguments, FASTREID_DATASETS=str(drawn))
    table = (tmp_path / "bench/table.md").read_text()
    assert "SmoothContrast" in table
    assert "ClusterContrast" in table
