"""The documentation's snippets and commands run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

import convert_torch_weights
from tinymodel_jax import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_THE_HUB = "lm = TinyModel()"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's root, to write into."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run_in_order(page: Path, checkout: Path) -> None:
    namespace: dict[str, object] = {}
    for snippet in blocks(page, "python"):
        if NEEDS_THE_HUB not in snippet:
            exec(compile(snippet, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_in_order(page: Path, checkout: Path, standard_promotion: None, no_type_checks: None) -> None:
    programs = {"tinymodel": cli.main, "tinymodel-convert": convert_torch_weights.main}
    for block in blocks(page, "bash"):
        for command in re.split(r"\n|&&", block):
            words = shlex.split(command)
            if words and (main := programs.get(Path(words[0]).name)) is not None:
                assert main(words[1:]) == 0, command


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} -> {target}"
