"""Retired phrases are found wherever a person reads, and legitimate uses are not."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location(
    "check_language", ROOT / "tools/check_language.py"
)
check_language = sys.modules["check_language"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_language)


@pytest.fixture(scope="module")
def phrases():
    return check_language.load_phrases()


def found(text, phrases, file="page.md"):
    return [finding.found for finding in check_language.check_text(text, file, phrases)]


# One sentence or more for each example of the review, as it was written once.
PLANTED = [
    "Identities are dropped at the door.",
    "Cameras are made alike in their means.",
    "Images of a camera whose mean is half believed.",
    "The drawn people are easy.",
    "It draws 2,000 images.",
    "and the command that mends each gap",
    "## It survives",
    "A killed run goes on with --resume.",
    "to begin anew",
    "eps found without labels",
    "the label-free figure",
    "the share of true matches",
    "Bad numbers and collapse",
    "hostile checkpoints",
    "equal to the last digit",
    "who may be the same person",
    "and keep what became better",
    "Each cluster is cut by camera.",
    "pairs that the camera tells apart",
    "exempt_positive = None",
    "Small clusters come again in turn.",
    "DBSCAN and its kin.",
    "def _options_of_strangers():",
    "Words that are legal, such as auto.",
    "facts: what must not change.",
    "def _say(text):",
    "guard.judge(losses)",
    "run.forget_results()",
    "another image stands in for it",
    "one_core_left_free = True",
    "what has to be said with it",
    "the nearest neighbour",
    "tensors alone",
]


@pytest.mark.parametrize("text", PLANTED)
def test_each_planted_phrase_is_found(text, phrases):
    assert found(text, phrases)


@pytest.mark.parametrize(
    "text",
    [
        "figure, axes = plt.subplots()",
        "plt.figure(figsize=(4, 3))",
        "<figure><figcaption>A chart</figcaption></figure>",
        "Core images within eps of each other share a cluster.",
        "Two rows that share no neighbor are at distance 1.",
        "The file is left alone.",
        "mendacious amendments recommend Mendeley",
        "a shareable, shared and sharded set",
        "The run resumes and reports the ratio of outliers.",
    ],
)
def test_legitimate_uses_pass(text, phrases):
    assert not found(text, phrases)


@pytest.mark.parametrize(
    "text",
    [
        "A killed run goes\non with the same command.",
        "# A killed run goes\n    # on with the same command.",
        '    "a killed run goes "\n    "on"',
        "def test_a_killed_run_goes_on(): ...",
    ],
)
def test_phrase_is_found_across_lines_and_in_names(text, phrases):
    assert len(found(text, phrases)) == 1


def test_comment_with_a_reason_excuses_its_line_only(phrases):
    line = 'legacy = "judge_last"'
    text = f"{line}  # allow-phrase (key of old checkpoints)\n{line}\n"
    findings = list(check_language.check_text(text, "x.py", phrases))
    assert [finding.line for finding in findings] == [2]
    assert found(f"{line}  # allow-phrase ()", phrases)


def test_question_is_no_summary_of_a_docstring(phrases):
    text = 'def f():\n    """Has it collapsed?"""\n'
    assert found(text, phrases, "x.py") == ['"""Has']
    assert not found(text, phrases, "x.md")
    assert not found('"""Hash of a file."""', phrases, "x.py")


def test_finding_names_file_line_phrase_and_term(phrases):
    (finding,) = check_language.check_text("one\ntwo goes on\n", "docs/a.md", phrases)
    assert re.fullmatch(r"docs/a\.md:2: 'goes on'; .*resume.*", str(finding))


def test_files_of_text_are_read_and_exempt_ones_are_not(tmp_path, phrases):
    for name in ("a.md", "Makefile", "a.bin", "CHANGELOG.md"):
        (tmp_path / name).write_text("it goes on\n")
    files = sorted(tmp_path.iterdir())
    findings = check_language.check_files(tmp_path, files, phrases)
    assert [finding.file for finding in findings] == ["Makefile", "a.md"]


@pytest.mark.parametrize(
    "entry",
    [
        {"phrase": "x", "term": "y", "allow": {"z": ""}},
        {"phrase": "x", "term": "y", "why": "z"},
    ],
)
def test_rule_without_reason_or_with_an_unknown_key_is_refused(entry):
    with pytest.raises(ValueError, match="reason"):
        check_language.Phrase.parse(entry)


def test_command_prints_and_counts(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.md").write_text("goes on\nGoes on\n")
    monkeypatch.setattr(check_language, "ROOT", tmp_path)
    monkeypatch.setattr(
        check_language, "tracked_files", lambda root, below: [tmp_path / "a.md"]
    )
    assert check_language.main([]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert check_language.main(["--count"]) == 1
    assert capsys.readouterr().out.split()[0] == "2"
    (tmp_path / "a.md").write_text("resumes\n")
    assert check_language.main([]) == 0


def test_tracked_files_are_those_of_the_checkout():
    files = check_language.tracked_files(ROOT)
    names = {file.relative_to(ROOT).as_posix() for file in files}
    assert {"README.md", "tools/check_language.py"} <= names
    assert not any(name.startswith(".venv/") for name in names)
