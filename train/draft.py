"""The unfinished result of `prepare`: appended to, and safe from an interruption at any moment.

    DEST.partial/    lock  journal.json  data/

Rely on: the journal is replaced after the ids that it counts are on disk, and whatever lies beyond its counts is cut
off when the work goes on; the finished folder gets its name at once, whole. One process at a time, by a lock that ends
with the process. What the ids mean is not looked at here.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.training.data_folder import SPLITS, partial_folder
from train.encoding import Encoded


def _zeros() -> dict[str, int]:
    return dict.fromkeys(SPLITS, 0)


@dataclass
class Journal:
    """How far the work has come."""

    settings: dict[str, Any]
    """What the result depends on."""
    read: dict[str, int] = field(default_factory=_zeros)
    """Rows read from each split of the source."""
    size: dict[str, int] = field(default_factory=_zeros)
    """Bytes written to each split."""
    tokens: dict[str, int] = field(default_factory=_zeros)
    stories: dict[str, int] = field(default_factory=_zeros)
    left_out: dict[str, int] = field(default_factory=lambda: {"refused": 0, "empty": 0})


class Draft:
    """`DEST.partial`, open for adding. Use as a context manager."""

    def __init__(self, dest: Path, settings: dict[str, Any], require_same: Callable[[Mapping[str, Any]], None]) -> None:
        """Begin, or go on where an earlier process stopped.

        Args:
            dest: where the finished folder will be.
            settings: what the result depends on.
            require_same: called with the settings of the earlier process; raises when they differ.

        Raises:
            ValueError: another process works on it, or its journal is damaged.
        """
        self._dest, self._folder = dest, partial_folder(dest)
        self._data = self._folder / "data"
        has_data = self._data.exists()  # not when an earlier process was interrupted after the renaming
        self._data.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / "lock").open("wb")
        self._files: dict[str, IO[bytes]] = {}
        try:
            self._take_lock()
            self.journal = (self._read_journal() if has_data else None) or Journal(settings)
            require_same(self.journal.settings)
            self._write_journal()
            for split in SPLITS:
                self._files[split] = self._open_at(split, self.journal.size[split])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        if any(self.journal.read.values()):
            self.close()
        else:
            self.discard()

    def add(self, encoded: Encoded) -> None:
        """Append a batch, which must follow the last one added."""
        for split in SPLITS:
            self._append(split, encoded.ids[split])
            self.journal.tokens[split] += encoded.tokens[split]
            self.journal.stories[split] += encoded.stories[split]
        for reason, count in encoded.left_out.items():
            self.journal.left_out[reason] += count
        self.journal.read[encoded.split] += encoded.read
        self._write_journal()

    def fill_row(self, row_bytes: int, pad: bytes) -> None:
        """Complete the last row of each split with `pad`. Not in the journal, so done anew after an interruption."""
        for split in SPLITS:
            missing = -self.journal.size[split] % row_bytes
            self._append(split, pad * (missing // len(pad)))

    def finish(self, add_files: Callable[[Path], None]) -> None:
        """Let `add_files` add to the folder, then give it its name."""
        for file in self._files.values():
            file.close()
        add_files(self._data)
        if self._dest.is_dir():
            self._dest.rmdir()  # an empty one, as the caller has made sure
        os.rename(self._data, self._dest)
        self.discard()

    def discard(self) -> None:
        """Remove the draft."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # what is left harms nothing

    def close(self) -> None:
        """Close the files and give the lock back; what was added stays."""
        for file in (*self._files.values(), self._lock):
            file.close()

    def _append(self, split: str, content: bytes) -> None:
        if not content:
            return
        file = self._files[split]
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        self.journal.size[split] += len(content)

    def _open_at(self, split: str, size: int) -> IO[bytes]:
        file = (self._data / f"{split}.bin").open("ab")
        found = file.seek(0, os.SEEK_END)
        if found < size:
            file.close()
            raise ValueError(f"{file.name} has {found} bytes, {size} were written; delete {self._folder}, start anew.")
        file.truncate(size)
        file.seek(size)
        return file

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is preparing {self._dest}; wait for it or end it.") from None

    def _read_journal(self) -> Journal | None:
        file = self._folder / "journal.json"
        if not file.exists():
            return None
        try:
            journal = Journal(**json.loads(file.read_text("utf-8")))
            return journal if any(journal.read.values()) else None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete {self._folder} and start anew.") from error

    def _write_journal(self) -> None:
        content = json.dumps(dataclasses.asdict(self.journal), indent=2)
        replace_file(self._folder / "journal.json", content.encode())
