"""The story world's tokenizer: how it is trained, the trained one, and how many nats a token of a story holds.

Rely on: the same `tokenizers` library gives the same BPE on the same stories; the bundled files are what
`train_tokenizer()` gave. It has the class, the cleaning and the special tokens of the big one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinymodel_jax.bundled.storyworld.generator import Story, stories
from tinymodel_jax.text.tokenizer import Tokenizer
from tinymodel_jax.text.tokenizer_files import SPECIAL_TOKENS

VOCAB_SIZE = 1024
"""Ids, the four special ones included."""
TOKENIZER_SEED = 0
TOKENIZER_STORIES = 20_000
"""What the bundled tokenizer was trained on: the first stories of this seed."""
_FOLDER = Path(__file__).parent / "tokenizer"
# How a byte-level BPE writes printable ASCII, the space and the newline. A text's other characters become [UNK].
_ALPHABET = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", "Ċ"]


def train_tokenizer(count: int = TOKENIZER_STORIES) -> Tokenizer:
    """Train a byte-level BPE of `VOCAB_SIZE` ids on the first `count` stories of `TOKENIZER_SEED`."""
    bpe: Any = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    bpe.train_from_iterator(
        (story.text for story in stories(TOKENIZER_SEED, count)),
        trainer(
            vocab_size=VOCAB_SIZE,
            initial_alphabet=_ALPHABET,
            special_tokens=list(SPECIAL_TOKENS),
            show_progress=False,
        ),
    )
    return Tokenizer(bpe)


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the bundled tokenizer: 1,024 ids, the four special ones last."""
    return Tokenizer.from_pretrained(_FOLDER)


def entropy(told: Iterable[Story], with_tokenizer: Tokenizer | None = None) -> float:
    """Estimate the entropy of the generator, in nats a token: no model's mean loss can be below it in the long run.

    The generator knows the probability p of every choice that it makes, so that H(choices) = E[-log p] exactly. A text
    follows from its choices, so that H(text) <= H(choices): what is returned, sum(-log p) / tokens, is an upper bound,
    up to the sampling error over the stories. It is above the truth by as much as different choices give the same
    text, and by minus the log of the share of stories that are not too long (0.31 nats a story), which p leaves out.

    Args:
        told: stories; the more, the better: 2,000 give it to about one part in 500.
        with_tokenizer: None: the bundled one.

    Returns:
        Nats a token. `[END]` counts as a token, `[BEGIN]`, which is given, does not.

    Raises:
        ValueError: there is no story.
    """
    encode = (with_tokenizer or tokenizer()).encode
    nats, tokens = 0.0, 0
    for one in told:
        nats += one.nats
        tokens += len(encode(one.text, max_length=None)) + 1
    if tokens == 0:
        raise ValueError("the entropy of no stories is not known; give some, as in entropy(stories(0, 2000)).")
    return nats / tokens
