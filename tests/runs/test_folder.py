"""The folder of a run: one owner, one run, and no file of another one."""

import json
import os
import shutil
import threading

import pytest

from selcon_plugin.io.locks import InUseError
from selcon_plugin.runs import folder as module
from selcon_plugin.runs.folder import RunExistsError, RunFolder, owned_run
from selcon_plugin.runs.metrics import append_metrics, end_last_line, read_metrics

FILES = (
    *("model_0000.pth", "model_best.pth", "last_checkpoint", "config.yaml"),
    *("images.json", "results.json", "report.html", "events.out.tfevents.1.host"),
    *("model/model.pth.tar-1", "model/model-stopped.pth.tar", "best_without_labels.pth"),
)


@pytest.fixture
def old(tmp_path):
    """Folder of an earlier run, with files of its own and of a person."""
    (tmp_path / "model").mkdir()
    for name in (*FILES, "notes.txt", "log.txt", "model/mine.bin"):
        (tmp_path / name).write_text("old")
    append_metrics(tmp_path, 4, {"total_loss": 9.0})
    return tmp_path


def content(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_new_run_is_refused_where_another_one_is_and_changes_nothing(old):
    before = content(old)
    with pytest.raises(RunExistsError) as refused, RunFolder(old).running(resumed=False):
        pytest.fail("began")
    for part in (str(old), "results.json", "--resume", "another output", "--overwrite"):
        assert part in str(refused.value)
    assert content(old) == before


@pytest.mark.parametrize("name", [f for f in FILES if "model" in f or "results" in f])
def test_each_result_counts_as_a_run(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    with pytest.raises(RunExistsError, match="holds a run"):
        RunFolder(tmp_path).check_new()


@pytest.mark.parametrize(
    "name", ["best_without_labels.pth", "model/best_without_labels.pth"]
)
def test_best_weights_are_moved_aside_where_a_run_resumes_from_its_start(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    run = RunFolder(tmp_path)
    run.resume_from_start()
    with run.running(resumed=False):
        assert not (tmp_path / name).exists()
    (aside,) = tmp_path.glob("old-*")
    assert (aside / name).read_text() == "x"
    # Whatever else a run has left is still in the way.
    for other in ("results.json", "model_best.pth"):
        (tmp_path / other).write_text("x")
        with pytest.raises(RunExistsError, match=f"holds a run .{other}"):
            run.check_new()
        (tmp_path / other).unlink()


def test_what_is_no_run_is_no_obstacle(tmp_path):
    for name in (
        "config.yaml",
        "log.txt",
        "bench.yaml",
        "console.txt",
        "model_1.pth.partial",
    ):
        (tmp_path / name).write_text("x")
    with RunFolder(tmp_path).running(resumed=False, config="A: 1\n"):
        pass
    assert (tmp_path / "config.yaml").read_text() == "A: 1\n"
    assert not list(tmp_path.glob("old-*")) + list(tmp_path.glob("*.partial"))


def test_overwriting_moves_the_files_of_the_run_aside_and_no_others(old):
    with RunFolder(old, overwrite=True).running(resumed=False, config="new"):
        (aside,) = old.glob("old-*")
        for name in FILES:
            assert (aside / name).read_text() == "old"
            assert name == "config.yaml" or not (old / name).exists()
        for name in ("notes.txt", "log.txt", "model/mine.bin"):
            assert (old / name).read_text() == "old"
        append_metrics(old, 0, {"total_loss": 1.0})
    assert read_metrics(old / "metrics.json") == [{"iteration": 0, "total_loss": 1.0}]
    assert read_metrics(aside / "metrics.json") == [{"iteration": 4, "total_loss": 9.0}]


@pytest.mark.parametrize("place", range(1, 14))
def test_kill_while_a_run_begins_leaves_none_that_could_be_taken_for_it(
    old, monkeypatch, place
):
    calls = []
    real = shutil.move

    def move(*names):
        calls.append(names)
        if len(calls) == place:
            raise KeyboardInterrupt
        return real(*names)

    monkeypatch.setattr(shutil, "move", move)
    run = RunFolder(old, overwrite=True)
    with pytest.raises(KeyboardInterrupt), run.running(resumed=False):
        raise KeyboardInterrupt  # killed before its first checkpoint
    monkeypatch.undo()
    again = RunFolder(old)
    if len(calls) == place:
        assert not again.has_begun
    else:
        assert not list(old.glob("model*.pth"))
    again.check_new()
    with again.running(resumed=False):
        assert not list(old.glob("model_*")) + list(old.glob("model/model*"))
    moved = {file.name for file in old.glob("old-*/**/*") if file.is_file()}
    assert {os.path.basename(name) for name in FILES} <= moved


def test_resumed_run_keeps_its_identity_and_files(tmp_path):
    first = RunFolder(tmp_path)
    with first.running(resumed=False, config="A: 1"):
        first.mark_last("model_0003.pth")
        append_metrics(tmp_path, 0, {"a": 1.0})
    second = RunFolder(tmp_path)
    assert second.has_begun
    with second.running(resumed=True, config="A: 2"):
        assert second.identity == first.identity
        assert second.last == "model_0003.pth"
        append_metrics(tmp_path, 1, {"a": 2.0})
    assert [m["iteration"] for m in read_metrics(tmp_path / "metrics.json")] == [0, 1]
    assert (tmp_path / "config.yaml").read_text() == "A: 2"
    assert not list(tmp_path.glob("old-*"))


def test_config_that_a_script_wrote_before_it_was_refused_is_restored(tmp_path):
    with RunFolder(tmp_path).running(resumed=False, config="A: 1\n"):
        (tmp_path / "model_0000.pth").write_text("x")
    (tmp_path / "config.yaml").write_text("A: 2\n")
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path).check_new()
    assert (tmp_path / "config.yaml").read_text() == "A: 1\n"


def test_run_of_an_earlier_version_gets_an_identity_when_it_resumes(old):
    run = RunFolder(old)
    assert run.has_begun
    with run.running(resumed=True):
        assert run.identity
    assert RunFolder(old).recorded_identity == run.identity
    assert len(read_metrics(old / "metrics.json")) == 1


def test_damaged_record_is_named_and_hides_no_run(tmp_path, caplog):
    with RunFolder(tmp_path).running(resumed=False):
        (tmp_path / "model_0000.pth").write_text("x")
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace("id", "ad"))
    with pytest.raises(RunExistsError):
        RunFolder(tmp_path).check_new()
    assert f"{file} is damaged" in caplog.text


def test_one_thread_may_own_a_folder_twice_and_another_one_may_not(tmp_path):
    refused = []

    def own():
        try:
            with owned_run(tmp_path):
                pass
        except InUseError as error:
            refused.append(str(error))

    with owned_run(tmp_path), owned_run(tmp_path):
        thread = threading.Thread(target=own)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert str(os.getpid()) in refused[0]
    own()
    assert len(refused) == 1


def test_folder_of_a_refused_command_is_removed_again(tmp_path):
    with pytest.raises(ValueError, match="bad"), owned_run(tmp_path / "a"):
        raise ValueError("bad")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    with owned_run(tmp_path / "b"):
        pass
    assert (tmp_path / "b").exists()
    with RunFolder("").running(resumed=False):
        pass


def test_metrics_of_an_earlier_run_in_the_same_file_are_left_out(tmp_path):
    append_metrics(tmp_path, 0, {"a": 1.0})
    with (tmp_path / "metrics.json").open("a") as stream:
        stream.write(json.dumps({"run": "x"}) + "\n")
    append_metrics(tmp_path, 5, {"a": 2.0})
    assert read_metrics(tmp_path / "metrics.json") == [{"iteration": 5, "a": 2.0}]


def test_line_that_a_kill_left_unfinished_costs_no_other_one(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 0, "a": 1.0}\n{"iterat')
    end_last_line(tmp_path)
    append_metrics(tmp_path, 1, {"a": 2.0})
    assert [m["iteration"] for m in read_metrics(tmp_path / "metrics.json")] == [0, 1]
    end_last_line(tmp_path / "missing")
    assert module.RUN_FILE == "run.json"
