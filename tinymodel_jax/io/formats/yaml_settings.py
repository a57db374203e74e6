"""The YAML of small configuration files: names with texts, and lists of texts. Anything deeper is left out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_SETTING = re.compile(r"([A-Za-z_][\w-]*)\s*:(?:\s+(.*))?")


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a file: name -> text, list of texts, or None.

    Raises:
        ValueError: the file cannot be read, or a line is neither a setting nor part of one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    settings: dict[str, Any] = {}
    name = None
    for number, line in enumerate(lines, 1):
        text = _without_comment(line).rstrip()
        if not text or text == "---":
            continue
        match = _SETTING.fullmatch(text)
        if match is not None:
            name = match[1]
            settings[name] = _value(match[2])
        elif text.lstrip().startswith("- ") and name is not None and not isinstance(settings[name], str):
            settings[name] = [*(settings[name] or []), _value(text.lstrip()[2:])]
        elif not text.startswith(" ") or name is None:
            raise ValueError(f"{path}, line {number}: {text!r:.60} is not a setting, 'name: value'.")
    return settings


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#[^\"']*$", "", line)


def _value(text: str | None) -> str | None:
    text = (text or "").strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return None if text in ("", "null", "~") else text
