"""Transliteration: equal to Unidecode 1.4.0 at every code point; what the package requires, and its licences."""

import inspect
import re
import sys
import tomllib
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from unidecode import unidecode

from tinymodel_jax.text import transliteration
from tinymodel_jax.text.tokenizer import clean_text
from tinymodel_jax.text.transliteration import to_ascii

REPOSITORY = Path(__file__).parents[1]


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.fixture
def requirements() -> dict[str, set[str]]:
    """Names of what the package and each of its extras require."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    parts = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {part: {canonical(re.split(r"[^\w-]", line)[0]) for line in lines} for part, lines in parts.items()}


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million calls with the run-time type checks of the test session take ten seconds."""
    for name in ("_replacement", "_uncorrected"):
        monkeypatch.setattr(transliteration, name, inspect.unwrap(getattr(transliteration, name)))


@pytest.mark.usefixtures("without_type_checks")
def test_every_code_point_becomes_what_unidecode_makes_of_it() -> None:
    assert version("Unidecode") == "1.4.0"
    text = "\0".join(map(chr, range(sys.maxunicode + 1)))  # U+0000 stays itself
    with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # one for each surrogate
        expected = unidecode(text).split("\0")[2:]
    pairs = zip(to_ascii(text).split("\0")[2:], expected, strict=True)
    assert {hex(code): pair for code, pair in enumerate(pairs, 1) if pair[0] != pair[1]} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[?] [?", "[?] [?"),
        ("a\x00\x1f\x7fb", "a\x00\x1f\x7fb"),
        ("1½ cups", "1 1/2 cups"),
        ("ℌ𝓮𝐥𝗹𝕠 ⓦorld", "Hello world"),
        ("𝚨 (bold) and 𝛢 (italic)", "Alpha (bold) and (italic)"),
        ("cafe\u0301", "cafe"),
        ("北京", "Bei Jing "),
        ("“Hi” — it’s 25 ℃…", '"Hi" -- it\'s 25 degC...'),
        ("a😀\ud800\udc00\U0010ffff\uffffb", "ab"),
        ("¿⟦⸮]", "?[?]"),
    ],
)
def test_cleaning_transliterates_each_character_by_itself(text: str, expected: str) -> None:
    assert clean_text(text) == expected


def test_only_tests_need_unidecode(requirements: dict[str, set[str]]) -> None:
    assert {part for part, names in requirements.items() if "unidecode" in names} == {"test"}


def test_the_page_of_licences_lists_every_direct_dependency(requirements: dict[str, set[str]]) -> None:
    page = (REPOSITORY / "docs/reference/licences.md").read_text("utf-8")
    listed = {canonical(name) for name in re.findall(r"[\w-]+", page)}
    assert requirements["core"] | requirements["hub"] | requirements["train"] <= listed
