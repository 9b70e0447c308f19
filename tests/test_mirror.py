"""The folders of the tests are those of the package."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
# What is not of one package: tools, and tests of the whole.
OTHERS = {"faults", "helpers", "old_runs", "properties", "tools"}


def folders(root: Path) -> set[str]:
    return {file.parent.name for file in root.glob("*/*.py")}


def test_every_package_has_its_folder_and_no_other_is_there() -> None:
    assert folders(ROOT / "tests") - OTHERS == folders(ROOT / "selcon_plugin")


def test_helpers_are_no_tests() -> None:
    assert not list((ROOT / "tests" / "helpers").glob("test_*.py"))


def test_no_file_is_longer_than_500_lines() -> None:
    long = [
        file.name
        for file in (ROOT / "tests").rglob("*.py")
        if len(file.read_text().splitlines()) > 500
    ]
    assert long == []
