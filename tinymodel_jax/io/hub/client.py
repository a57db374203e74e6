"""What downloads and uploads share: the optional client library, the endpoint, and its errors in one line."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from tinymodel_jax.runtime.progress import SECONDS_OF_SILENCE

SHA256 = re.compile("[0-9a-f]{64}")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def require_client(doing: str, otherwise: str = "") -> None:
    """Check that `huggingface_hub` is installed.

    Args:
        doing: what needs it, such as "downloading X".
        otherwise: what the user can do without it.

    Raises:
        ModuleNotFoundError: it is not.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{doing} needs huggingface_hub: pip install 'tinymodel-jax[hub]'. {otherwise}".strip()
        ) from error


def endpoint() -> str:
    """Return the hub's address: `$HF_ENDPOINT`, by default https://huggingface.co."""
    from huggingface_hub import constants

    # huggingface_hub reads its environment only when it is imported.
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def late_progress() -> type:
    """Return the client's progress bar, which then appears after two seconds only: what is cached needs none."""
    from huggingface_hub.utils import tqdm

    class LateProgress(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{"delay": SECONDS_OF_SILENCE, **options})

    return LateProgress


def reason(error: BaseException) -> str:
    """Return what an error of the client says first, without a full stop."""
    return str(error).strip().partition("\n")[0].removeprefix("Got: ").rstrip(".:") or type(error).__name__


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
