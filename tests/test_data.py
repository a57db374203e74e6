"""Prepared folders as they are opened, batches as functions of (seed, step), and the thread that makes them ahead."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodel_jax.training.data import DataMeta, TokenData, batch_indices, host_batch, open_data, prefetch

ROWS, HELD_OUT, ROW = 11, 3, 4
SECONDS = 10
"""Longer than any thread here should take."""


def write_folder(folder: Path, **changes: Any) -> Path:
    """Write a prepared folder whose id at (row, column) is 4 * row + column; held-out rows follow the training rows."""
    folder.mkdir(exist_ok=True)
    ids = np.arange((ROWS + HELD_OUT) * ROW).reshape(-1, ROW).astype("<u2")
    ids[:ROWS].tofile(folder / "train.bin")
    ids[ROWS:].tofile(folder / "valid.bin")
    counts = {"train": ROWS, "valid": HELD_OUT}
    values: dict[str, Any] = {"row_length": ROW, "vocab_size": 100, "packed": False, "rows": counts, "tokens": counts}
    values |= {"stories": counts, "left_out": {"refused": 0, "empty": 0}, "source": "counting", "limit": 20}
    values |= {"source_fingerprint": "a", "tokenizer_fingerprint": "b", "valid_fraction": 0.2, "seed": 0}
    (folder / "data.json").write_text(DataMeta(**(values | changes)).to_json())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data")


@pytest.fixture
def data(folder: Path) -> TokenData:
    return open_data(folder)


def edit(folder: Path, **changes: Any) -> None:
    """Change the description by hand; None removes an entry."""
    content = json.loads((folder / "data.json").read_text()) | changes
    (folder / "data.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


# The folder


def test_an_opened_folder_maps_its_rows_into_memory(data: TokenData, folder: Path) -> None:
    assert isinstance(data.train, np.memmap)
    np.testing.assert_array_equal(data.train, np.arange(44).reshape(11, 4))
    np.testing.assert_array_equal(data.valid, np.arange(44, 56).reshape(3, 4))
    assert (data.row_length, data.vocab_size, data.folder) == (4, 100, folder)


def test_mapped_rows_cannot_be_written(data: TokenData) -> None:
    with pytest.raises(ValueError, match="read-only"):
        data.train[0, 0] = 1


def test_a_folder_without_held_out_rows_opens(folder: Path) -> None:
    (folder / "valid.bin").write_bytes(b"")
    edit(folder, rows={"train": ROWS, "valid": 0})
    assert open_data(folder).valid.shape == (0, ROW)


def test_the_description_survives_its_text(data: TokenData) -> None:
    assert DataMeta.from_json(data.meta.to_json(), "here") == data.meta


def test_the_fingerprint_tells_sources_apart(tmp_path: Path, data: TokenData) -> None:
    again = open_data(write_folder(tmp_path / "again"))
    other = open_data(write_folder(tmp_path / "other", source_fingerprint="c"))
    assert again.fingerprint == data.fingerprint != other.fingerprint


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; make it with: python -m train prepare"):
        open_data(tmp_path / "nowhere")


def test_an_unfinished_folder_is_told_from_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "data.partial").mkdir()
    with pytest.raises(FileNotFoundError, match="was not finished; run the same prepare command again"):
        open_data(tmp_path / "data")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"it has no data\.json"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "describes 'other', expected 'tinymodel_jax/data'"),
        ({"format_version": 7}, "has format version 7; this release reads 1"),
        ({"seed": None, "colour": "red"}, "'seed' is missing; 'colour' is unknown"),
        ({"row_length": 0, "rows": {"train": 1}}, "row_length is 0; rows is {'train': 1}"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"rows": {"train": -1, "valid": True}}, "rows is"),
    ],
)
def test_a_description_that_is_no_description_is_refused(folder: Path, changes: Any, message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        open_data(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_description_is_one_line(folder: Path, content: bytes) -> None:
    (folder / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.json (is damaged|cannot be read|describes None)") as error:
        open_data(folder)
    assert "\n" not in str(error.value)


def test_all_files_of_the_wrong_size_are_named(folder: Path) -> None:
    with (folder / "train.bin").open("ab") as file:
        file.write(b"\0")
    (folder / "valid.bin").unlink()
    with pytest.raises(ValueError, match=r"train\.bin has 89 bytes, 11 rows of 4 take 88; valid\.bin is missing"):
        open_data(folder)


# Batches


@given(n_rows=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(0, 2**64 - 1))
def test_every_epoch_has_every_row_once(n_rows: int, batch_size: int, seed: int) -> None:
    steps = -(-3 * n_rows // batch_size)
    stream = np.concatenate([batch_indices(n_rows, batch_size, seed, step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_batches_have_the_asked_size_even_beyond_the_rows() -> None:
    assert [len(batch_indices(5, size, 0, 7)) for size in (1, 4, 5, 13)] == [1, 4, 5, 13]


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    in_order = [batch_indices(50, 8, 3, step).tolist() for step in range(30)]
    backwards = [batch_indices(50, 8, 3, step).tolist() for step in reversed(range(30))]
    assert backwards[::-1] == in_order


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {tuple(batch_indices(100, 100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(100)) not in orders


def test_shuffling_is_even() -> None:
    """Row 0 lands in each of 5 places about 400 times in 2,000 epochs: binomial, standard deviation 17.9."""
    places = [int(np.flatnonzero(batch_indices(5, 5, 0, epoch) == 0)[0]) for epoch in range(2000)]
    assert np.abs(np.bincount(places, minlength=5) - 400).max() < 5 * 17.9


def test_the_order_is_that_of_the_bit_generators_raw_stream() -> None:
    bits = np.random.Philox(key=np.array([9, 1], np.uint64)).random_raw(6)
    assert batch_indices(6, 6, 9, 1).tolist() == sorted(range(6), key=lambda row: int(bits[row]))


def test_batches_cannot_change_later_ones() -> None:
    first = batch_indices(5, 5, 1, 0)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(batch_indices(5, 5, 1, 0), kept)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0, 0), "n_rows must be 1 or more, got 0"),
        ((1, 0, 0, 0), "batch_size must be 1 or more, got 0"),
        ((1, 1, -1, 0), "seed must be 0 to 18446744073709551615, got -1"),
        ((1, 1, 0, -1), "step must be 0 or more, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_indices(*arguments)


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_the_hosts_parts_make_the_global_batch(data: TokenData, hosts: int) -> None:
    for step in range(5):
        parts = [host_batch(data, 6, 1, step, host, hosts) for host in range(hosts)]
        assert {(part.shape, part.dtype) for part in parts} == {((6 // hosts, ROW), np.dtype(np.int32))}
        np.testing.assert_array_equal(np.concatenate(parts), data.train[batch_indices(ROWS, 6, 1, step)])


def test_a_host_reads_only_its_own_rows(folder: Path) -> None:
    class Watched(np.ndarray):
        asked: list[int]

        def __getitem__(self, rows: Any) -> Any:
            self.asked += rows.tolist()
            return np.asarray(self)[rows]

    train = np.arange(44, dtype="<u2").reshape(11, 4).view(Watched)
    train.asked = []
    opened = open_data(folder)
    host_batch(TokenData(train, opened.valid, opened.meta, folder), 6, 0, 0, 1, 3)
    assert train.asked == batch_indices(ROWS, 6, 0, 0)[2:4].tolist()


def test_hosts_that_do_not_divide_the_batch_are_refused(data: TokenData) -> None:
    with pytest.raises(ValueError, match="batch_size 6 cannot be divided among 4 hosts"):
        host_batch(data, 6, 0, 0, 0, 4)
    with pytest.raises(ValueError, match="process_index must be 0 to 1, got 2"):
        host_batch(data, 6, 0, 0, 2, 2)


# Making batches ahead


@pytest.fixture
def threads() -> Iterator[None]:
    """Check that no thread is left."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("depth", [1, 2, 50])
def test_batches_come_in_order(depth: int) -> None:
    assert list(prefetch(lambda step: step * step, 3, 40, depth)) == [(step, step * step) for step in range(3, 40)]


@pytest.mark.usefixtures("threads")
def test_no_steps_make_no_batch() -> None:
    assert list(prefetch(lambda step: 1 / 0, 5, 5)) == []


@pytest.mark.usefixtures("threads")
def test_as_many_batches_as_asked_are_made_ahead() -> None:
    made: list[int] = []
    enough = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        enough.release()
        return step

    batches = prefetch(make, 0, 100, depth=3)
    assert next(batches) == (0, 0)
    for _ in range(4):
        assert enough.acquire(timeout=SECONDS)
    assert not enough.acquire(timeout=0.1)
    assert made == [0, 1, 2, 3]
    batches.close()  # type: ignore[attr-defined]
    assert made == [0, 1, 2, 3]


@pytest.mark.usefixtures("threads")
def test_an_error_comes_after_the_batches_before_it() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("disk gone")
        return step

    seen = []
    with pytest.raises(OSError, match="disk gone"):  # noqa: PT012
        for step, _ in prefetch(make, 0, 9):
            seen.append(step)
    assert seen == [0, 1]


@pytest.mark.usefixtures("threads")
def test_leaving_the_loop_early_ends_the_thread() -> None:
    for step, _ in prefetch(lambda step: step, 0, 10**9):
        if step == 3:
            break


@pytest.mark.usefixtures("threads")
def test_an_iterator_that_is_never_used_starts_no_thread() -> None:
    prefetch(lambda step: step, 0, 9)


def test_a_depth_below_one_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="depth must be 1 or more, got 0"):
        prefetch(lambda step: step, 0, 9, depth=0)
