"""The story world's tokenizer: its training, the trained files, and the entropy of stories per token.

With the same version of `tokenizers`, training on the same stories gives the same BPE. The bundled files are the result
of `train_tokenizer()`. Class, cleaning and special tokens are those of the published model's tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from tinymodel_jax.bundled.storyworld.generator import Story, stories
from tinymodel_jax.text.tokenizer import Tokenizer

VOCAB_SIZE = 1024
"""Number of ids, including the four special ones."""
TOKENIZER_SEED = 0
TOKENIZER_STORIES = 20_000
"""The bundled tokenizer was trained on the first stories of this seed."""
_FOLDER = Path(__file__).parent / "tokenizer"


def train_tokenizer(count: int = TOKENIZER_STORIES) -> Tokenizer:
    """Train a byte-level BPE of 1,024 ids, including the four special ones, on the first `count` stories of seed 0.

    With the default `count` of 20,000 stories, the result is the bundled `tokenizer`.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> storyworld.train_tokenizer(count=100).vocab_size
        1024
    """
    return Tokenizer.train((story.text for story in stories(TOKENIZER_SEED, count)), VOCAB_SIZE)


@functools.cache
def tokenizer() -> Tokenizer:
    """Return the bundled tokenizer, which has 1,024 ids, the four special ones last.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> storyworld.tokenizer().vocab_size
        1024
    """
    return Tokenizer.from_pretrained(_FOLDER)


def entropy(told: Iterable[Story], with_tokenizer: Tokenizer | None = None) -> float:
    """Estimate the entropy of the generator in nats per token. In the long run, no model's mean loss can be below it.

    The generator records the probability p of all its choices, so H(choices) = E[-log p]. The choices determine the
    text, so H(text) <= H(choices), and the returned sum(-log p) / tokens is an upper bound, up to the sampling error
    over stories. It exceeds the entropy where different choices give the same text, and by minus the log of the share
    of stories that are not too long (0.31 nats per story), which p does not include.

    Args:
        told: stories; 2,000 give a precision of about one part in 500.
        with_tokenizer: tokenizer that counts the tokens; None takes the bundled one.

    Returns:
        Nats per token. `[END]` counts as a token; `[BEGIN]`, which is given, does not.

    Raises:
        ValueError: there are no stories.

    Examples:
        >>> from tinymodel_jax.bundled import storyworld
        >>> round(storyworld.entropy(storyworld.stories(seed=0, count=200)), 1)
        0.5
    """
    encode = (with_tokenizer or tokenizer()).encode
    nats, tokens = 0.0, 0
    for one in told:
        nats += one.nats
        tokens += len(encode(one.text, max_length=None)) + 1
    if tokens == 0:
        raise ValueError("entropy needs at least one story, for example entropy(stories(0, 2000)).")
    return nats / tokens
