"""Training of a byte-level BPE on texts, for `Tokenizer.train`.

With the same version of `tokenizers`, the same texts give the same BPE.
"""

from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinymodel_jax.text.tokenizer_files import SPECIAL_TOKENS

# Printable ASCII, space and newline in a byte-level BPE. Other characters become [UNK].
_ALPHABET = [*map(chr, range(ord("!"), ord("~") + 1)), "Ġ", "Ċ"]
SMALLEST_VOCABULARY = len(_ALPHABET) + len(SPECIAL_TOKENS)
"""Number of ids without a single merge."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE that splits text as GPT-2's does.

    Args:
        texts: cleaned texts.
        vocab_size: largest number of ids, at least `SMALLEST_VOCABULARY`.
    """
    bpe: Any = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer
    bpe.train_from_iterator(
        texts,
        trainer(
            vocab_size=vocab_size,
            initial_alphabet=_ALPHABET,
            special_tokens=list(SPECIAL_TOKENS),
            show_progress=False,
        ),
    )
    return bpe
