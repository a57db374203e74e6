"""The story world in numbers: speed, lengths, repetition, entropy.

    python benchmarks/storyworld.py                                       # the generator alone
    python benchmarks/storyworld.py --real tinystories.jsonl.gz           # compared with real stories

Repetition is the share of the 5-grams of words (small letters, without punctuation) of a text that came before in it;
it grows with the amount of text, so equal amounts are compared. Speed is stories per second of processor time of one
process; of several rounds, the median and the best are given, since other programs may be running.
"""

import gzip
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tyro
from machine import describe_machine

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands.frame import USER_PATHS

SEED = 1
NGRAM = 5
AMOUNTS = (50_000, 100_000, 200_000, 400_000)
"""Numbers of 5-grams in which repetition is counted."""
ROUNDS = 9
ROUND_STORIES = 1_000
SAMPLE = 5_000
"""Stories whose lengths and entropy are measured."""
COMPARED = 3_117
"""Stories in which repetition is counted."""


def main(real: Path | None = None) -> None:
    """Measure and print.

    Args:
        real: real stories to compare with: .jsonl or .jsonl.gz, in the field `text`.
    """
    print("  ".join(f"{name}: {value}" for name, value in describe_machine().items()))
    speeds = [stories_per_second(round_) for round_ in range(ROUNDS)]
    print(f"speed: {statistics.median(speeds):,.0f} stories/s (best round {max(speeds):,.0f})")

    told = list(storyworld.stories(SEED, SAMPLE))
    tokens = [len(storyworld.tokenizer().encode(story.text, max_length=None)) for story in told]
    words = [len(story.text.split()) for story in told]
    print(f"words per story: {quantiles(words)}; tokens per story: {quantiles(tokens)}")
    print(f"entropy: at most {storyworld.entropy(told):.3f} nats/token, of {np.mean(tokens) + 1:.1f} tokens per story")
    print(f"concepts: {len(storyworld.CONCEPTS)}")

    print_repetition("story world", [story.text for story in storyworld.stories(SEED, COMPARED)])
    if real is not None:
        print_repetition("real stories", list(islice(read_texts(real), COMPARED)))


def stories_per_second(round_: int) -> float:
    """Return the number of stories per second that one process generates."""
    start = time.process_time()
    for _ in storyworld.stories(SEED, ROUND_STORIES, round_ * ROUND_STORIES):
        pass
    return ROUND_STORIES / (time.process_time() - start)


def read_texts(path: Path) -> Iterator[str]:
    """Yield the field `text` of each line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)


def ngrams(text: str) -> list[tuple[str, ...]]:
    """Return the 5-grams of a text's words."""
    words = re.findall(r"[a-z']+", text.lower())
    return list(zip(*(words[shift:] for shift in range(NGRAM)), strict=False))


def print_repetition(name: str, texts: list[str]) -> None:
    """Print how much of the texts repeats earlier text."""
    shares = [f"{repetition(texts, amount):.1%} of {amount:,}" for amount in AMOUNTS]
    print(f"repeated 5-grams, {name}: {', '.join(shares)}; within a story {repetition_within(texts):.2%}")


def repetition(texts: Iterable[str], amount: int) -> float:
    """Return the share of the first `amount` 5-grams that occurred before."""
    counts = Counter(islice((ngram for text in texts for ngram in ngrams(text)), amount))
    return 1 - len(counts) / counts.total()


def repetition_within(texts: Iterable[str]) -> float:
    """Return the share of 5-grams that occurred before in the same story."""
    found = [ngrams(text) for text in texts]
    return 1 - sum(len(set(each)) for each in found) / sum(map(len, found))


def quantiles(values: list[int]) -> str:
    """Return minimum, maximum and median as text."""
    return f"{min(values)} to {max(values)}, median {int(statistics.median(values))}"


if __name__ == "__main__":
    tyro.cli(main, registry=USER_PATHS)
