"""The documentation's snippets and commands run as written, and name only options that exist."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
from command_lines import PROGRAMS, command_lines, options_of, run, split_program
from conftest import return_memory, save_story_model
from hub_server import TOKEN

from tinymodel_jax.commands import quickstart

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS_THE_HUB = "lm = TinyModel()"
SMALLER = {
    "--limit 100000": "--limit 100 --tokenizer mini --workers 1",  # the published tokenizer is on the hub
    "--row-length 256 --limit 2000": "--row-length 256 --limit 100 --workers 1",
    "--hooks hook_resid_pre hook_attn_out hook_mlp_out attn.hook_z": "--hooks hook_attn_out attn.hook_z",
}
"""Parts of commands, and what replaces them in these tests."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's root, to write into, with a file of stories."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "stories").mkdir()
    with gzip.open(tmp_path / "stories" / "one.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": f"Once there were {n} dogs."}) for n in range(200)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's, of its httpx
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_run_in_order(
    page: Path,
    standard_promotion: None,
    checkout: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    namespace: dict[str, object] = {}
    if page.name == "publish-to-the-hub.md":
        request.getfixturevalue("hub_server")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    for snippet in blocks(page, "python"):
        if NEEDS_THE_HUB not in snippet:
            exec(compile(snippet, page.name, "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformer-lens", "saelens", "dictionary-learning"])
def test_calls_beside_those_of_other_libraries_run(
    library: str, standard_promotion: None, no_type_checks: None, checkout: Path
) -> None:
    """Each call and attribute in the last column of the page's tables, in order."""
    page = ROOT / "docs" / "coming-from" / f"{library}.md"
    namespace: dict[str, object] = {}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, page.name, "exec"), namespace)
    tables = re.findall(r"\| this package \|\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"))
    cells = [row.split(" | ")[-1] for table in tables for row in table.splitlines()]
    calls = [code for cell in cells for code in re.findall("`([^`]+)`", cell) if re.search(r"[(.]", code)]
    assert len(calls) > 15
    for call in calls:
        exec(compile(call, page.name, "exec"), namespace)


@pytest.fixture(scope="module")
def small_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model than mini, with the dictionaries that the commands name."""
    return_memory()  # of the snippets' programs, which the commands do not share
    return save_story_model(tmp_path_factory.mktemp("docs") / "mini", 4, ("Ra0", "M0", "M1", "M2", "A3", "M3"), 160)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run_in_order(
    page: Path,
    checkout: Path,
    small_mini: Path,
    standard_promotion: None,
    no_type_checks: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quickstart, "run_quickstart", lambda *given: None)  # test_quickstart.py runs it whole
    for block in blocks(page, "bash"):
        for words in command_lines(block):
            if any(word.startswith("hub:") for word in words):  # there is no network
                continue
            model = {"--model mini": f"--model {small_mini}"} if split_program(words)[0] == "tinymodel" else {}
            run(words, SMALLER | model)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_shown_have_the_options_that_they_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    transcripts = [
        line.replace("\\\n", " ")
        for block in blocks(page, "console")
        for line in re.findall(r"^\$ ((?:.*\\\n)*.*)", block, flags=re.MULTILINE)
    ]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    for line in (*transcripts, *inline):
        if not re.match(rf"(\.venv/bin/)?({'|'.join(map(re.escape, PROGRAMS))}) ", line):
            continue
        program, arguments = split_program(shlex.split(line, comments=True))
        command = arguments[0] if arguments and not arguments[0].startswith(("-", "…")) else None
        named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert named <= options_of(PROGRAMS[program], command), line
        if (
            program == "python -m train"
            and command in ("lm", "dictionaries")
            and not named & {"--help", "--compile-for"}
        ):
            assert "…" in arguments or named >= {"--data", "--out"}, f"{line}: it fails as it stands; end it with …"


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)\)", prose):
            if "://" not in target:
                assert is_there(page.parent / target), f"{page.name} -> {target}"


def test_the_list_of_tasks_links_every_page_about_a_task() -> None:
    folder = ROOT / "docs" / "how-to"
    listed = re.findall(r"\]\(([\w-]+)\.md", (folder / "index.md").read_text(encoding="utf-8"))
    pages = {page.stem for page in folder.iterdir() if page.suffix in (".md", ".ipynb")}
    assert pages - {"index"} == set(listed)


def is_there(target: Path) -> bool:
    """Whether a file exists, or the site makes it of a notebook or of the `--help` of a program."""
    return target.exists() or target.with_suffix(".ipynb").exists() or target.parent.name == "commands"
