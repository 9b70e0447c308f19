"""``selcon adapt`` on a small real network: real training, in seconds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selcon_plugin.cli.main import main
from selcon_plugin.hosts import find_network
from selcon_plugin.inference.embedder import Embedder
from selcon_plugin.io.locks import InUseError, owned_folder
from selcon_plugin.io.safe_loading import load_data
from selcon_plugin.metrics.label_free import LabelFreeQuality
from selcon_plugin.models.torchreid import build_plain_model
from selcon_plugin.torchreid_ext.train import build_engine
from selcon_plugin.workflows import adapt as adapt_module
from selcon_plugin.workflows.adapt import AdaptSettings, adapt, training_config
from selcon_plugin.workflows.adapt_record import AdaptRecord, Candidate

SMALL = ("data.height", "64", "data.width", "32", "selcon.iters_per_epoch", "2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "osnet.pth"
    torch.save({"state_dict": build_plain_model("osnet_x0_25").state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight people of five images each: a color above, another below, and noise."""
    rng = np.random.default_rng(0)
    place = tmp_path_factory.mktemp("crops")
    for person in range(8):
        colors = rng.integers(20, 235, size=(2, 1, 1, 3))
        for number in range(5):
            pixels = np.concatenate([np.broadcast_to(c, (32, 32, 3)) for c in colors])
            noisy = np.clip(pixels + rng.integers(-40, 40, size=pixels.shape), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(place / f"{person}_{number}.png")
    return place


@pytest.fixture
def settings(weights: Path, folder: Path) -> AdaptSettings:
    return AdaptSettings(
        str(weights),
        str(folder),
        backbone="osnet_x0_25",
        epochs=2,
        batch_size=8,
        device="cpu",
        options=SMALL,
    )


def worth(value: float) -> LabelFreeQuality:
    return LabelFreeQuality(value, 0.5, 2.0, 8, 0.0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch):
    """Let the criterion give these values, one after the other; the last stays."""

    def script(*values: float) -> list[float]:
        left = list(values)
        seen: list[float] = []

        def quality(*_: object, **__: object) -> LabelFreeQuality:
            seen.append(left.pop(0) if len(left) > 1 else left[0])
            return worth(seen[-1])

        monkeypatch.setattr(adapt_module, "label_free_quality", quality)
        return seen

    return script


def features(file: Path, folder: Path, **how: object) -> np.ndarray:
    embedder = Embedder.from_checkpoint(file, device="cpu", **how)
    return embedder.embed_folder(folder).features


def test_the_best_checkpoint_is_written_and_loads_by_itself(
    settings: AdaptSettings, folder: Path, tmp_path: Path, scripted
) -> None:
    scripted(0.3, 0.6, 0.5)
    said: list[str] = []
    result = adapt(settings, tmp_path / "out", echo=said.append)
    assert [c.epochs for c in result.candidates] == [0, 1, 2]
    assert (result.best.epochs, result.improved) == (1, True)
    assert "after 1 epochs, quality 0.3000 -> 0.6000" in said[-1]

    state = load_data(result.file)["state_dict"]
    assert not any(name.startswith("method.") for name in state)
    checkpoint = load_data(tmp_path / "out/training/model/model.pth.tar-1")["state_dict"]
    assert all(torch.equal(state[name], checkpoint[name]) for name in state)
    config = tmp_path / "out/training/config.yaml"
    np.testing.assert_array_equal(
        features(result.file, folder),
        features(
            tmp_path / "out/training/model/model.pth.tar-1", folder, config_file=config
        ),
    )
    record = json.loads((tmp_path / "out/adapt.json").read_text())
    assert record["done"] is True
    assert record["best_epochs"] == 1

    # Complete: nothing is done again.
    again = adapt(settings, tmp_path / "out", echo=said.append)
    assert str(tmp_path / "out") in said[-1]
    assert again == result


def test_a_harmful_learning_rate_leaves_the_given_network(
    settings: AdaptSettings, weights: Path, folder: Path, tmp_path: Path
) -> None:
    harmful = AdaptSettings(**{**vars(settings), "learning_rate": 1e4, "epochs": 1})
    said: list[str] = []
    result = adapt(harmful, tmp_path / "out", echo=said.append)
    assert not result.improved
    assert result.file.read_bytes() == weights.read_bytes()
    assert "No checkpoint is better" in said[-1]
    assert result.best.value == result.before.value
    assert all(c.value <= result.before.value for c in result.candidates)
    given = features(weights, folder, backbone="osnet_x0_25", options=SMALL[:4])
    np.testing.assert_array_equal(features(result.file, folder), given)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("osnet_x0_25", (64, 32)),  # a linear layer, its normalization and ReLU
        ("resnet18", (64, 32)),
        ("squeezenet1_0_fc512", (64, 32)),
        ("pcb_p4", (128, 64)),
        ("hacnn", (160, 64)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(upsample|grid_sample):UserWarning")  # in HACNN
def test_adaptation_begins_with_the_features_that_are_extracted(
    settings: AdaptSettings, folder: Path, tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    plain = build_plain_model(name)
    for key, buffer in plain.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    weights = tmp_path / "supervised.pth"
    torch.save({"state_dict": plain.state_dict()}, weights)
    options = ("data.height", str(size[0]), "data.width", str(size[1]))
    still = AdaptSettings(
        **{**vars(settings), "weights": str(weights), "backbone": name, "options": options}
    )
    network = find_network(still.weights, backbone=name)
    cfg = training_config(network, still, tmp_path / "run")
    engine = build_engine(cfg)
    engine._prepare_network()
    file = tmp_path / "start.pth"
    torch.save({"state_dict": engine.model.state_dict()}, file)
    started = Embedder(network.host.load_network(cfg, file, torch.device("cpu")))
    images = sorted(folder.glob("*.png"))[:8]
    extracted = Embedder.from_checkpoint(
        weights, backbone=name, options=options, device="cpu"
    )(images)
    np.testing.assert_allclose(started(images), extracted, atol=1e-5)


def test_a_killed_adaptation_resumes(
    settings: AdaptSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted
) -> None:
    seen = scripted(0.2, 0.4, 0.3)
    train = adapt_module.train

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_module, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        adapt(settings, tmp_path / "out")
    assert seen == [0.2]
    monkeypatch.setattr(adapt_module, "train", train)
    result = adapt(settings, tmp_path / "out")
    assert seen == [0.2, 0.4, 0.3]  # the given network is not measured again
    assert result.best.epochs == 1

    other = AdaptSettings(**{**vars(settings), "epochs": 3})
    with pytest.raises(ValueError, match=r"another epochs \(2, now 3\)"):
        adapt(other, tmp_path / "out")


def test_training_that_breaks_down_is_said_and_what_there_is_counts(
    settings: AdaptSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripted
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise FloatingPointError("ten steps in a row")

    scripted(0.2)
    monkeypatch.setattr(adapt_module, "train", broken)
    said: list[str] = []
    result = adapt(settings, tmp_path / "out", echo=said.append)
    assert "Training stopped early: ten steps in a row" in said
    assert not result.improved


def test_another_method_than_that_of_the_config(
    settings: AdaptSettings, tmp_path: Path, scripted
) -> None:
    scripted(0.1, 0.5)
    first = AdaptSettings(**{**vars(settings), "method": "ClusterContrast", "epochs": 1})
    once = adapt(first, tmp_path / "one")
    for method, expected in (("", "ClusterContrast"), ("SelConCluster", "SelConCluster")):
        second = AdaptSettings(
            **{
                **vars(first),
                "weights": str(once.file),
                "backbone": "",
                "method": method,
                "options": SMALL[4:],
            }
        )
        network = find_network(second.weights)
        cfg = training_config(network, second, tmp_path / f"two{method}")
        assert cfg.selcon.method == expected
        assert (cfg.data.height, cfg.selcon.embedding_dim) == (64, 512)


def test_of_equals_the_one_trained_less_is_best() -> None:
    record = AdaptRecord(Path("unused.json"), {})
    record.candidates = [
        Candidate(0, "a", worth(0.5)),
        Candidate(1, "b", worth(0.5)),
        Candidate(2, "c", None),
    ]
    assert record.best.epochs == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "adapt needs --images FOLDER"),
        (["--images", "."], "--weights FILE"),
        (["--images", ".", "--weights", __file__], "cannot be read safely"),
        (["--images", ".", "--weights", __file__, "--epochs", "0"], "epochs must be"),
        (
            ["--images", ".", "--weights", __file__, "--learning-rate", "nan"],
            "--learning-rate must be",
        ),
    ],
)
def test_mistakes_are_said_in_a_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 8)).save(tmp_path / "one.png")
    assert main(["adapt", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_or_damaged_result_is_written_again(
    settings: AdaptSettings, tmp_path: Path, scripted
) -> None:
    scripted(0.2, 0.4, 0.3)
    result = adapt(settings, tmp_path / "out")
    whole = result.file.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 8
    for content in (None, b"", bytes(damaged)):
        result.file.unlink()
        if content is not None:
            result.file.write_bytes(content)
        said: list[str] = []
        assert adapt(settings, tmp_path / "out", echo=said.append) == result
        assert result.file.read_bytes() == whole
        assert f"{result.file} is missing or damaged" in said[0]
    record = tmp_path / "out" / "adapt.json"
    record.write_text(record.read_text().replace("0.4", "0.1"))
    with pytest.raises(ValueError, match=r"adapt\.json is damaged"):
        adapt(settings, tmp_path / "out")


def test_mistakes_are_found_before_any_image_is_measured_and_block_nothing(
    settings: AdaptSettings, tmp_path: Path, scripted
) -> None:
    seen = scripted(0.2, 0.2, 0.4)
    output = tmp_path / "out"
    for change, message in (
        ({"method": "SpCLL"}, "--method 'SpCLL' is unknown"),
        ({"options": (*SMALL, "selcon.temperatur", "1")}, r"selcon\.temperatur"),
        ({"images": str(tmp_path / "nowhere")}, "nowhere"),
        ({"batch_size": 64}, "64"),
    ):
        wrong = AdaptSettings(**{**vars(settings), **change})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            adapt(wrong, output)
        if "batch_size" not in change:
            assert not seen
            assert not output.exists()
    right = AdaptSettings(**{**vars(settings), "epochs": 1})
    assert adapt(right, output).best.epochs == 1


def test_second_adaptation_at_once_is_refused(
    settings: AdaptSettings, tmp_path: Path
) -> None:
    with owned_folder(tmp_path / "out"), pytest.raises(InUseError, match=str(os.getpid())):
        adapt(settings, tmp_path / "out")
