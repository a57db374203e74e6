"""Stories per second of cleaning and tokenizing, alternating with plain calls of the libraries.

The plain calls are Unidecode (of the `test` extra) and four regular expressions for cleaning, and `encode_batch_fast`
with the library's truncation and one NumPy look-up for tokenizing. Both sides must give the same ids before anything is
timed. For one core: `taskset -c 0 python benchmarks/tokenizer.py --stories STORIES.jsonl.gz --gpt2 FOLDER`.
"""

import gzip
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import tyro
from tokenizers import models, pre_tokenizers
from unidecode import unidecode

from tinymodel_jax.commands.frame import USER_PATHS
from tinymodel_jax.text.tokenizer import Tokenizer, clean_text

MAX_LENGTH = 256


def main(stories: Path, gpt2: Path, rounds: int = 5) -> None:
    """Time cleaning and tokenizing.

    Args:
        stories: JSON lines, gzipped or not, with a field `text`.
        gpt2: folder with GPT-2's `vocab.json` and `merges.txt`.
        rounds: how often each is timed; the median counts.
    """
    with (gzip.open if stories.suffix == ".gz" else open)(stories, "rt") as lines:
        texts: list[str] = [json.loads(line)["text"] for line in lines]
    ours = Tokenizer.from_gpt2(gpt2)
    plain = plain_calls(gpt2, ours)
    first = Tokenizer.from_gpt2(gpt2)  # with empty look-ups
    first_seconds = seconds(lambda: first(texts))

    for mine, theirs in zip(ours(texts), plain(texts), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    contenders: dict[str, Callable[[], object]] = {
        "cleaning, plain": lambda: [plain_clean(text) for text in texts],
        "cleaning, ours": lambda: [clean_text(text) for text in texts],
        "cleaning + tokenizing, plain": lambda: plain(texts),
        "cleaning + tokenizing, ours": lambda: ours(texts),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(seconds(call))
    print(f"{len(texts)} stories, {platform.processor() or platform.machine()}, tokenizers {tokenizers.__version__}")
    for name, measured in times.items():
        slowest, fastest = len(texts) / max(measured), len(texts) / min(measured)
        print(f"{name:32}{len(texts) / np.median(measured):10,.0f} stories/s  ({slowest:,.0f} to {fastest:,.0f})")
    print(f"{'the first call of a tokenizer':32}{len(texts) / first_seconds:10,.0f} stories/s")


def plain_calls(gpt2: Path, ours: Tokenizer) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """What one would write with the `tokenizers` library alone, for `[BEGIN]` and padding to the longest row."""
    bpe = tokenizers.Tokenizer(models.BPE.from_file(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt")))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.enable_truncation(MAX_LENGTH - 1)
    model_ids = np.full(bpe.get_vocab_size(), ours.unk_id, dtype=np.int32)
    bpe_ids = np.load(Path(__file__).parents[1] / "tinymodel_jax" / "bundled" / "gpt2_ids.npy")
    model_ids[bpe_ids[:-4]] = np.arange(len(bpe_ids) - 4)

    def call(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = [encoding.ids for encoding in bpe.encode_batch_fast([plain_clean(text) for text in texts])]
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max() + 1) < lengths[:, None] + 1
        tok_ids = np.full(mask.shape, ours.pad_id, dtype=np.int32)
        tok_ids[:, 0] = ours.begin_id
        tok_ids[:, 1:][mask[:, 1:]] = model_ids[np.concatenate(rows)]
        padded = np.flatnonzero(lengths + 1 < mask.shape[1])
        tok_ids[padded, lengths[padded] + 1] = ours.end_id
        return tok_ids, mask.astype(np.int32)

    return call


def plain_clean(text: str) -> str:
    """The reference's cleaning, step by step."""
    text = unidecode(text).replace("\t", "  ")
    for pattern, replacement in ((r"\s+\n", "\n"), (r"\n\n+", "\n"), (r" +", " ")):
        text = re.sub(pattern, replacement, text)
    return text


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
