"""The commands as a user runs them: real processes, real files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.programs import Program, environment, run_program
from selcon_plugin.cli.main import main
from selcon_plugin.config.files import builtin_config
from selcon_plugin.hosts import load_config

SELCON = ["-m", "selcon_plugin"]

CONFIGS = Path(__file__).parents[2] / "configs"


def options(values):
    """Return options as they stand on a command line."""
    return [word for key, value in values.items() for word in (key, str(value))]


@pytest.fixture
def selcon(tiny_values):
    def run_selcon(*arguments, **values):
        return run_program(*SELCON, *arguments, *options(tiny_values | values))

    return run_selcon


def model_of(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=False)["model"]


def results_of(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def wait_until(reached, process):
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.output()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_run_resumes_to_the_weights_of_the_unbroken_one(
    selcon, tiny_values, tmp_path
):
    epochs = {"SOLVER.MAX_EPOCH": 8, "TEST.EVAL_PERIOD": 8}
    whole = selcon("train", **epochs, OUTPUT_DIR=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    broken = tmp_path / "broken"
    command = [*SELCON, "train", *options(tiny_values | epochs | {"OUTPUT_DIR": broken})]
    process = Program(*command)
    wait_until((broken / "model_0002.pth").exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (broken / "model_final.pth").exists(), "the run ended before it was killed"
    resumed = selcon("train", "--resume", **epochs, OUTPUT_DIR=broken)
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from epoch 0" not in resumed.stdout
    expected, got = model_of(tmp_path / "whole"), model_of(broken)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    unbroken, resumed = results_of(tmp_path / "whole"), results_of(broken)
    assert resumed["metrics"] == unbroken["metrics"]
    # The seconds of both parts: only the second took less than the whole.
    clock = torch.load(broken / "model_0002.pth", weights_only=True)["meter"]
    assert resumed["train_seconds"] > clock["seconds"] > 0


def test_eval_repeats_the_result_of_the_training(tiny_values, tmp_path):
    # The installed program itself, from its first import.
    values = options(tiny_values | {"OUTPUT_DIR": tmp_path / "run"})
    program = Path(sys.executable).with_name("selcon")
    trained = subprocess.run(
        [program, "train", *values],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    weights = tmp_path / "run" / "model_final.pth"
    expected = [
        line for line in trained.stdout.splitlines() if line.startswith("| Synthetic")
    ]
    # The terminal is short, and has one estimate of the time; the log file is complete.
    before, _, after = trained.stdout.partition("Training, epoch 1 of")
    assert len(before.splitlines()) <= 25, before
    assert "Method: SelectiveContrastive. Data: 40 images" in before
    assert "epoch/iter" not in after
    log = (tmp_path / "run" / "log.txt").read_text()
    assert len(log.splitlines()) > 300
    assert "Running with full config" in log
    # By its own command, and as FastReID writes it, with the config that the run left
    # behind.
    config = tmp_path / "run" / "config.yaml"
    for arguments in (["eval"], ["train", "--eval-only"]):
        command = [*SELCON, *arguments, "--config-file", config, "MODEL.WEIGHTS", weights]
        result = run_program(*command)
        assert result.returncode == 0, result.stderr
        assert expected[-1] in result.stdout
    # The training wrote them down as well: | data set | Rank-1 | Rank-5 | ...
    record = results_of(tmp_path / "run")
    names = ["Rank-1", "Rank-5", "Rank-10", "mAP", "mINP", "metric"]
    values = [record["metrics"]["SyntheticPersons"][name] for name in names]
    shown = [float(cell) for cell in expected[-1].split("|")[2:-1]]
    assert values == pytest.approx(shown, abs=0.0051)
    assert (record["method"], record["seed"]) == ("SelectiveContrastive", 0)
    assert (record["epochs"], record["steps"], record["num_images"]) == (2, 10, 40)
    assert record["train_seconds"] > 0
    assert 100 < record["peak_memory_mib"] < 4000
    assert record["num_clusters"] is None
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].endswith("1 thread")


@pytest.fixture
def messy_folder(tmp_path):
    """A folder as people have them: flat and deep, all types, some broken."""
    folder = tmp_path / "messy images"
    generator = np.random.default_rng(0)
    names = [f"person {i}.jpg" for i in range(12)] + ["a/b/c/d.png", "a/e.webp", "f.bmp"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, (48, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "empty.jpg").touch()
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "notes.txt").write_text("hello")
    return folder


def test_folder_without_structure_trains_and_gives_features(selcon, tmp_path, messy_folder):
    out = tmp_path / "out"
    values = {"OUTPUT_DIR": out, "MODEL.BACKBONE.PRETRAIN": False}
    values["MODEL.SELCON.MAX_UNREADABLE_RATIO"] = 0.2
    result = selcon("train", "--images", messy_folder, **values)
    assert result.returncode == 0, result.stderr
    assert "2 of 17 images cannot be read and are left out" in result.stdout
    assert model_of(out)["method.memory.global_bank"].shape[0] == 15
    record = results_of(out)
    assert (record["num_images"], record["metrics"]) == (15, {})
    file = tmp_path / "features.npz"
    values = {"MODEL.WEIGHTS": out / "model_final.pth", "MODEL.BACKBONE.PRETRAIN": False}
    values["MODEL.SELCON.MAX_UNREADABLE_RATIO"] = 0.2
    result = selcon("extract", "--images", messy_folder, "--output", file, **values)
    assert result.returncode == 0, result.stderr
    written = np.load(file)
    assert len(written["paths"]) == 15
    assert (written["camids"] == -1).all()
    assert np.allclose(np.linalg.norm(written["features"], axis=1), 1, atol=1e-5)


def test_second_extraction_to_a_file_is_refused_and_the_first_one_ends_unharmed(
    selcon, tiny_values, tmp_path, messy_folder
):
    values = {"MODEL.SELCON.MAX_UNREADABLE_RATIO": 0.2, "MODEL.BACKBONE.PRETRAIN": False}
    run = tmp_path / "run"
    trained = selcon("train", "--images", messy_folder, **values, OUTPUT_DIR=run)
    assert trained.returncode == 0, trained.stderr
    values["MODEL.WEIGHTS"] = run / "model_final.pth"

    def command(name):
        words = ["extract", "--images", messy_folder, "--output", tmp_path / name]
        return [*words, *options(tiny_values | values)]

    expected = run_program(*SELCON, *command("single.npz"))
    assert expected.returncode == 0, expected.stderr
    first = Program(*SELCON, *command("out.npz"))
    record = tmp_path / ".out.npz.in_use.json"
    wait_until(record.exists, first)
    first.send_signal(
        signal.SIGSTOP
    )  # it holds the file for as long as the second one runs
    try:
        second = run_program(*SELCON, *command("out.npz"))
        other = run_program(*SELCON, *command("other.npz"))
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    error = second.stderr.strip().splitlines()[-1]
    for part in (str(tmp_path / "out.npz"), f"process {first.pid} ", "another output"):
        assert part in error
    assert other.returncode == 0, other.stderr  # another file of the same folder is free
    assert first.wait(120) == 0, first.output()
    arrays = [
        dict(np.load(tmp_path / f"{name}.npz")) for name in ("single", "out", "other")
    ]
    for name, value in arrays[0].items():
        assert all(np.array_equal(value, found[name]) for found in arrays[1:]), name
    assert sorted(file.name for file in tmp_path.glob("*.npz*")) == [
        *("other.npz", "out.npz", "single.npz")
    ]
    assert not list(tmp_path.glob(".*"))


def test_two_processes_under_torchrun(tiny_values, tmp_path):
    command = [
        *("-m", "torch.distributed.run", "--standalone"),
        *("--nproc_per_node", "2", "-m", "selcon_plugin", "train"),
        *options(tiny_values | {"OUTPUT_DIR": tmp_path / "out"}),
    ]
    result = run_program(*command)
    assert result.returncode == 0, result.stderr
    assert "World size: 2" in (tmp_path / "out" / "log.txt").read_text()
    assert int(model_of(tmp_path / "out")["method._step"]) == 10


def test_two_processes_by_num_gpus(selcon, tmp_path):
    result = selcon("train", "--num-gpus", "2", OUTPUT_DIR=tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert results_of(tmp_path / "out")["num_processes"] == 2
    assert int(model_of(tmp_path / "out")["method._step"]) == 10


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train", "--config-file", "nowhere.yml"], ["nowhere.yml"]),
        (["train", "--images", "/nowhere"], ["/nowhere"]),
        (["train"], ["META_ARCHITECTURE", "SelCon"]),
        (["train", "MODEL.SELCON.TEMPERATURE", "0.0"], ["TEMPERATURE", "> 0"]),
        (["eval", "MODEL.META_ARCHITECTURE", "SelCon"], ["MODEL.WEIGHTS"]),
        (["extract", "--output", "x.npz"], ["--images"]),
        (["bench", "--configs", "nowhere.yml"], ["nowhere.yml"]),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    arguments, fragments, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # runs write to logs/ before they look at the data
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"selcon {arguments[0]}: error:")
    assert all(word in error for word in fragments)


def test_no_or_unknown_command_shows_the_commands(capsys):
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().err
    assert main(["fly"]) == 2
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out
    assert "extract" in commands
    assert "bench" in commands


@pytest.mark.parametrize(
    "name",
    [
        str(file.relative_to(CONFIGS))
        for file in sorted(CONFIGS.rglob("*.yml"))
        if file.parent.name != "torchreid"
    ],
)
def test_configs_of_the_package_are_complete(name):
    assert load_config(builtin_config(name)).MODEL.META_ARCHITECTURE == "SelCon"
