"""The story world: an endless supply of short stories, with known concepts for every token.

    told = list(storyworld.stories(seed=0, count=1000))
    truth = storyworld.labels(told, storyworld.tokenizer())  # (stories, seq, concepts)

Story i of a seed is always the same, and nothing is downloaded. `CONCEPTS` describes the columns of `labels`.
"""

from tinymodel_jax.bundled.storyworld.concepts import CONCEPTS
from tinymodel_jax.bundled.storyworld.generator import FIRST_UNSEEN, Span, Story, fingerprint, stories, story
from tinymodel_jax.bundled.storyworld.questions import Question, questions
from tinymodel_jax.bundled.storyworld.token_labels import labels
from tinymodel_jax.bundled.storyworld.vocabulary import entropy, tokenizer, train_tokenizer

__all__ = [
    "CONCEPTS",
    "FIRST_UNSEEN",
    "Question",
    "Span",
    "Story",
    "entropy",
    "fingerprint",
    "labels",
    "questions",
    "stories",
    "story",
    "tokenizer",
    "train_tokenizer",
]
