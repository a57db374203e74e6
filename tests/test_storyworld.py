"""The story world: what a story is, what its labels say, its tokenizer, and how much there is to predict."""

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.bundled.storyworld import cast, concepts, grammar, parts, token_labels
from tinymodel_jax.bundled.storyworld.concepts import PLOTS
from tinymodel_jax.text.tokenizer import Tokenizer, clean_text

pytestmark = pytest.mark.usefixtures("no_type_checks")  # which make generating a story twenty times slower
N_CTX = 256
"""Context of the bundled model."""


@pytest.fixture(scope="module")
def told() -> list[storyworld.Story]:
    with as_users_run_it():
        return list(storyworld.stories(7, 400))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return storyworld.tokenizer()


@pytest.fixture(scope="module")
def tok_ids(told: list[storyworld.Story], tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer([story.text for story in told])[0]


@pytest.fixture(scope="module")
def truth(told: list[storyworld.Story], tokenizer: Tokenizer) -> np.ndarray:
    with as_users_run_it():
        return storyworld.labels(told, tokenizer)


@functools.cache
def spans_of(story: storyworld.Story) -> list[storyworld.Span]:
    return story.spans()


def texts_of(story: storyworld.Story, *wanted: str) -> list[str]:
    """Return the stretches of a story that have all the wanted concepts."""
    return [story.text[span.start : span.end].strip() for span in spans_of(story) if span.concepts >= set(wanted)]


# What a story is


def test_a_story_is_a_function_of_seed_and_index_alone(told: list[storyworld.Story]) -> None:
    assert storyworld.story(7, 123) == told[123]
    assert [story.text for story in storyworld.stories(7, 3, first=200)] == [story.text for story in told[200:203]]
    assert storyworld.story(8, 123).text != told[123].text


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (1 << 63, 0), (0, 1 << 63)])
def test_a_seed_or_index_out_of_range_is_one_line(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=r"must be from 0 to 2\^63 - 1, got"):
        storyworld.story(seed, index)


def test_seeds_and_indices_do_not_run_into_each_other() -> None:
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (0, (1 << 63) - 1), ((1 << 63) - 1, 0)]
    assert len({storyworld.story(*pair).text for pair in pairs}) == len(pairs)


def check_many(count: int) -> None:
    """Check that no two stories are alike, and that each has the length, the characters and the marks it should."""
    seen = set()
    lengths = []
    for story in storyworld.stories(0, count):
        text = story.text
        assert text.isascii()
        assert text == clean_text(text)
        assert 100 <= len(text.split()) <= 220, text
        assert text.count("\n") == 4
        assert all(paragraph.count('"') % 2 == 0 for paragraph in text.split("\n")), text
        assert not re.search(r"[{}\[\]|^<>=]", text), text
        assert not re.search(r'(?:\A|\n|[.?!] |\." )[a-z]', text), "a sentence begins small"
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiouh]|\b(\w+) \1\b|'(?:m|re|ll)[.,!?]", text), text
        assert text[-1] in '.!?"'
        seen.add(text)
        lengths.append(len(storyworld.tokenizer().encode(text, max_length=None)))
    assert len(seen) == count
    assert max(lengths) + 1 <= N_CTX, "with [BEGIN]"
    assert np.mean(np.array(lengths) + 2 > N_CTX) < 1e-4, "with [END], too"
    assert 150 <= np.median(lengths) <= 220


@pytest.mark.parametrize("count", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_stories_are_well_formed_and_none_comes_twice(count: int) -> None:
    check_many(count)


def test_every_plot_and_every_kind_of_hero_comes(told: list[storyworld.Story]) -> None:
    assert {story.plot for story in told} == set(PLOTS)
    assert {story.hero_kind for story in told} == {"girl", "boy", "animal"}


def test_hero_and_friend_are_introduced_before_they_are_called_and_keep_their_names(
    told: list[storyworld.Story],
) -> None:
    for story in told:
        for role in ("hero", "friend"):
            named = [
                (story.text[span.start : span.end].strip(), "name.new" in span.concepts)
                for span in spans_of(story)
                if f"mention.{role}" in span.concepts and span.concepts & {"name.girl", "name.boy"}
            ]
            assert [is_new for _, is_new in named] == [True] + [False] * (len(named) - 1)
            assert len({name for name, _ in named}) == 1


# Labels


def test_the_pieces_are_the_text(told: list[storyworld.Story]) -> None:
    for story in told:
        spans = spans_of(story)
        assert "".join(text for text, _ in story.pieces()) == story.text
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        assert spans[-1].end == len(story.text)


def test_there_are_enough_concepts_and_each_is_described() -> None:
    assert len(storyworld.CONCEPTS) >= 60
    assert all(re.fullmatch(r"[a-z]+(?:\.[a-z_]+)?", name) for name in storyworld.CONCEPTS)
    assert all(text and "\n" not in text for text in storyworld.CONCEPTS.values())


def test_the_examples_in_a_description_have_the_concept(told: list[storyworld.Story]) -> None:
    checked = 0
    for name, description in storyworld.CONCEPTS.items():
        if ": " in description and not name.startswith(("phase.", "plot.")):
            found = set(
                re.findall(r"[a-z']+", " ".join(text for story in told for text in texts_of(story, name)).lower())
            )
            examples = description.rpartition(": ")[2].lower().split(", ")
            assert set(examples) <= found, name
            checked += len(examples)
    assert checked > 100


def test_every_concept_occurs_and_none_is_everywhere(truth: np.ndarray) -> None:
    share = truth.sum(axis=(0, 1)) / truth.any(axis=2).sum()
    assert [name for name, value in zip(storyworld.CONCEPTS, share, strict=True) if not 0 < value < 0.6] == []


def test_sets_of_concepts_and_names_are_inverse() -> None:
    chosen = frozenset({"word.color", "plot.race", "dialogue"})
    assert concepts.names(concepts.mask(*chosen)) == chosen
    with pytest.raises(ValueError, match=r"'word\.colour' is not a concept"):
        concepts.mask("word.colour")


def test_labels_lie_beside_the_tokens(truth: np.ndarray, tok_ids: np.ndarray, tokenizer: Tokenizer) -> None:
    assert truth.shape == (*tok_ids.shape, len(storyworld.CONCEPTS))
    np.testing.assert_array_equal(truth.any(axis=2), tok_ids < tokenizer.begin_id)


@pytest.mark.parametrize(
    ("concept", "pattern"),
    [
        ("word.color", r"red|blue|green|yellow|pink|white|black|brown|silver|gray"),
        ("mark.comma", r"[^,]*,[^,]*"),
        ("mark.opening_quote", r'"'),
        ("mark.newline", r"\n"),
        ("name.new", r"[A-Z][a-z]+"),
        ("pronoun.female", r"she|her|She|Her"),
        ("pronoun.first", r"I|me|my|My|mine|Me|'m|'ll|'ve"),
        ("word.the", r"the|The"),
    ],
)
def test_the_tokens_with_a_label_spell_what_it_says(
    truth: np.ndarray, tok_ids: np.ndarray, tokenizer: Tokenizer, concept: str, pattern: str
) -> None:
    stretches = 0
    for ids, here in zip(tok_ids, truth[:, :, list(storyworld.CONCEPTS).index(concept)], strict=True):
        places = np.flatnonzero(here)
        for group in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
            text = "".join(tokenizer.tok_see(ids[group], symbolic_spaces=False, symbolic_newlines=False))
            assert re.fullmatch(rf"(?: ?(?:{pattern}))*", text), text
            stretches += bool(text)
    assert stretches > 20


def test_labels_do_not_depend_on_how_the_tokenizer_cuts_words(
    told: list[storyworld.Story], tokenizer: Tokenizer
) -> None:
    """Another tokenizer cuts other tokens; the characters under a label stay the same, but for those a token joins."""
    other = storyworld.train_tokenizer(20)
    for story in told[:20]:
        rows = []
        for which in (tokenizer, other):
            ids = which.encode(story.text, max_length=None)
            here = storyworld.labels([story], which, max_length=None)[0, 1:]
            lengths = [len(text) for text in which.decode([[id_] for id_ in ids])]
            rows.append(np.repeat(here, lengths, axis=0))
        letters = np.array([character.isalpha() for character in story.text])
        words = [place for place, name in enumerate(storyworld.CONCEPTS) if name.startswith(("word.", "referent."))]
        np.testing.assert_array_equal(rows[0][letters][:, words], rows[1][letters][:, words])


def test_labels_may_be_padded_to_a_width_but_not_cut_by_it(told: list[storyworld.Story], tokenizer: Tokenizer) -> None:
    found = storyworld.labels(told[:5], tokenizer)
    padded = storyworld.labels(told[:5], tokenizer, width=N_CTX)
    assert padded.shape[1] == N_CTX
    np.testing.assert_array_equal(padded[:, : found.shape[1]], found)
    assert not padded[:, found.shape[1] :].any()
    with pytest.raises(ValueError, match=r"width 100 is too small: the longest story has \d+ tokens"):
        storyworld.labels(told[:5], tokenizer, width=100)


def test_labels_follow_the_tokenizers_max_length(told: list[storyworld.Story], tokenizer: Tokenizer) -> None:
    cut = storyworld.labels(told[:5], tokenizer, max_length=50)
    np.testing.assert_array_equal(cut, storyworld.labels(told[:5], tokenizer)[:, :50])


@pytest.mark.parametrize("max_length", [-1, 0, 1])
def test_a_max_length_without_a_token_is_refused_as_by_the_tokenizer(
    told: list[storyworld.Story], tokenizer: Tokenizer, max_length: int
) -> None:
    message = rf"max_length must be at least 2 \(one token after \[BEGIN\]\) or None, got {max_length}\."
    with pytest.raises(ValueError, match=message):
        tokenizer([told[0].text], max_length=max_length)
    with pytest.raises(ValueError, match=message):
        storyworld.labels(told[:1], tokenizer, max_length=max_length)


def test_no_stories_have_no_labels(tokenizer: Tokenizer) -> None:
    assert storyworld.labels([], tokenizer).shape == (0, 1, len(storyworld.CONCEPTS))


def test_a_tokenizer_without_the_stories_characters_is_refused(told: list[storyworld.Story]) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    bpe: Any = tokenizers.Tokenizer(models.BPE({"[UNK]": 0, "a": 1}, [], unk_token="[UNK]"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(ValueError, match="the tokenizer lacks a character of the story"):
        storyworld.labels(told[:1], Tokenizer(bpe))


# What the labels say is true


def test_pronouns_have_the_sex_of_whom_they_stand_for(told: list[storyworld.Story]) -> None:
    checked = 0
    for story in told:
        for role in ("hero", "friend"):
            named = {f"mention.{role}"}
            sexes = {
                sex for sex, name in (("female", "name.girl"), ("male", "name.boy")) if texts_of(story, *named, name)
            }
            assert len(sexes) == 1
            other = "male" if sexes == {"female"} else "female"
            assert not texts_of(story, f"referent.{role}", f"pronoun.{other}"), story.text
            checked += len(texts_of(story, f"referent.{role}", "pronoun.third"))
    assert checked > 1_000


def test_pronoun_words_match_their_labels(told: list[storyworld.Story]) -> None:
    words = {
        "pronoun.female": {"she", "her"},
        "pronoun.male": {"he", "him", "his"},
        "pronoun.neuter": {"it", "its"},
        "pronoun.first": {"i", "me", "my", "mine", "i'm", "i'll", "i've"},
        "pronoun.second": {"you", "your", "yours", "you're"},
    }
    for concept, allowed in words.items():
        found = {text.lower() for story in told for text in texts_of(story, concept)}
        assert found, concept
        assert found <= allowed
    for story in told:
        genders = texts_of(story, "pronoun.third")
        assert len(genders) == sum(len(texts_of(story, f"pronoun.{sex}")) for sex in ("female", "male", "neuter"))
        assert Counter(re.findall(r"\b(?:he|him|his|she|her)\b", story.text.lower())) == Counter(
            text.lower() for sex in ("female", "male") for text in texts_of(story, f"pronoun.{sex}")
        ), "every he and she is labelled"


@pytest.mark.parametrize(
    ("concept", "words"),
    [
        ("pronoun.first", r"i(?:'[a-z]+)?|me|my|mine"),
        ("pronoun.plural", r"we(?:'[a-z]+)?|us|our|they|them|their|let's"),
        ("pronoun.neuter", r"its"),
    ],
)
def test_every_such_word_has_the_label(told: list[storyworld.Story], concept: str, words: str) -> None:
    for story in told:
        found = re.findall(rf"\b(?:{words})\b(?!')", story.text.lower())
        labelled = [text.lower() for text in texts_of(story, concept)]
        assert Counter(found) == Counter(text for text in labelled if text != "it"), story.text


def test_an_it_without_a_label_is_of_the_weather_the_time_or_what_happens(told: list[storyworld.Story]) -> None:
    impersonal = re.compile(
        r"(?:do|did|saw|heard|got|knew|meant|forget|mixed|tried|of|about|is|was) it\b|\bit's"
        r"|\bit (?:is|isn't|was|wasn't|did|didn't|will|must|began|started|gets|grew|takes|took|helps|comes)\b"
    )
    stands_for_nothing = 0
    for story in told:
        for span in spans_of(story):
            for match in re.finditer(r"\bit\b", story.text[span.start : span.end].lower()):
                if "pronoun.neuter" not in span.concepts:
                    at = span.start + match.start()
                    assert impersonal.search(story.text[max(0, at - 7) : at + 10].lower()), story.text
                    stands_for_nothing += 1
    assert stands_for_nothing > 100


def test_they_are_hero_and_friend_unless_the_grammar_says_so(told: list[storyworld.Story]) -> None:
    others = {
        story.text[: span.start].split()[-1]
        for story in told
        for span in spans_of(story)
        if "pronoun.plural" in span.concepts and "referent.both" not in span.concepts
    }
    assert others == {"counted", "behind", "of"}, "pieces, sounds, cakes"


def test_the_words_of_the_lexicon_and_no_others_have_its_concepts(told: list[storyworld.Story]) -> None:
    """Wherever they stand; a helper's surname, as in Farmer Bell, is none of them."""
    of_words = frozenset(grammar.read_rules("lexicon.txt"))
    surnames = {surname.lower() for surname in cast.SURNAMES}
    for story in told:
        for span in spans_of(story):
            for word in re.findall(r"[a-z]+(?:'[a-z]+)?", story.text[span.start : span.end].lower()):
                is_surname = word in surnames and "mention.helper" in span.concepts
                expected = frozenset() if is_surname else concepts.names(grammar.lexicon().get(word, 0))
                assert span.concepts & of_words == expected, (word, story.text)


def test_speech_is_what_stands_between_quotes(told: list[storyworld.Story], tokenizer: Tokenizer) -> None:
    for story in told:
        said = "".join(text for text, held in story.pieces() if held & concepts.mask("dialogue"))
        assert said == "".join(re.findall(r'"([^"]*)"', story.text))
        for span in spans_of(story):
            speakers = [name for name in span.concepts if name.startswith("speaker.")]
            assert len(speakers) == ("dialogue" in span.concepts)


def test_i_is_the_speaker_and_you_the_listener(told: list[storyworld.Story]) -> None:
    checked = 0
    for story in told:
        for span in spans_of(story):
            for person, kind in (("first", "speaker"), ("second", "listener")):
                if f"pronoun.{person}" in span.concepts:
                    who = {name.split(".")[1] for name in span.concepts if name.startswith(f"{kind}.")} - {"other"}
                    referents = {name.split(".")[1] for name in span.concepts if name.startswith("referent.")}
                    assert referents == who
                    checked += len(who)
    assert checked > 500


def test_whoever_is_called_by_name_is_the_listener(told: list[storyworld.Story]) -> None:
    called = [
        {name for name in span.concepts if name.startswith(("mention.", "listener."))}
        for story in told
        for span in spans_of(story)
        if "name.called" in span.concepts
    ]
    assert len(called) > 50
    for found in called:
        assert {name.split(".")[1] for name in found if name.startswith("mention.")} == {
            name.split(".")[1] for name in found if name.startswith("listener.")
        }


def test_phases_come_in_order_a_paragraph_each(told: list[storyworld.Story]) -> None:
    for story in told:
        phases = [name for text, held in story.pieces() for name in concepts.names(held) if name.startswith("phase.")]
        assert list(dict.fromkeys(phases)) == [f"phase.{name}" for name in concepts.PHASES]
        for paragraph, phase in zip(story.text.split("\n"), concepts.PHASES, strict=True):
            found = "".join(text for text, held in story.pieces() if held & concepts.mask(f"phase.{phase}"))
            assert found == paragraph


def test_the_plot_is_not_known_in_the_opening_and_known_after_it(told: list[storyworld.Story]) -> None:
    for story in told:
        for span in spans_of(story):
            plots = {name for name in span.concepts if name.startswith("plot.")}
            is_break = story.text[span.start] == "\n"
            assert plots == (set() if is_break or "phase.opening" in span.concepts else {f"plot.{story.plot}"})


def test_first_words_and_questions_are_read_off_the_text() -> None:
    text = 'Sue ran. "Oh no! Is it me?" Tim said. "Yes," she said, "It is." Sue wept.\nThen "Why?" Tim told all.'
    found = {name: [match.group() for match in pattern.finditer(text)] for name, pattern in token_labels.MARKS.items()}
    assert found["sentence.first_word"] == ["Sue", "Oh", "Is", "Yes", "It", "Sue", "Then", "Why", "Tim"]
    assert found["sentence.question"] == ["Is it me?", "Why?"]
    assert len(found["mark.opening_quote"]) == len(found["mark.closing_quote"]) == 4


def test_after_a_quotation_a_sentence_begins_unless_it_says_who_spoke() -> None:
    first_word = token_labels.MARKS["sentence.first_word"]
    for said in ("Sue said.", "She asked.", "Sue's mom cried.", "Farmer Bell called, and ran."):
        assert not first_word.findall(f'"oh!" {said}'), said
    for new in ("But nobody called back.", "Mike grinned and said yes.", "Sue told her mom.", "It was a frog."):
        assert first_word.findall(f'"oh?" {new}') == [new.split()[0]]


# The grammar


def test_a_word_of_the_lexicon_is_of_one_kind() -> None:
    kinds = [name for name in storyworld.CONCEPTS if name.startswith("word.")]
    twice = [
        (word, names) for word, held in grammar.lexicon().items() if len(names := concepts.names(held) & set(kinds)) > 1
    ]
    assert not twice


def test_every_rule_of_the_grammar_is_told_in_some_plot() -> None:
    shared = grammar.read_rules("shared.txt")
    told_of_shared = set()
    for plot in PLOTS:
        own = grammar.read_rules(f"{plot}.txt")
        told_rules: set[str] = set()
        waiting = ["cast", *concepts.PHASES]
        while waiting:
            name = waiting.pop()
            if name not in told_rules:
                told_rules.add(name)
                waiting += re.findall(r"\{([a-z]\w*)\}", " ".join((shared | own)[name]))
        assert set(own) <= told_rules, plot
        told_of_shared |= told_rules - set(own)
    assert set(shared) <= told_of_shared


def test_every_word_of_the_lexicon_can_be_told() -> None:
    files = ["shared", "synonyms", *PLOTS]
    lines = [line for file in files for rule in grammar.read_rules(f"{file}.txt").values() for line in rule]
    forms = [*cast.SPECIES, *cast.WISE_SPECIES, *cast.JOBS, *(member for member, _ in cast.FAMILY)]
    words = set(re.findall(r"[a-z]+(?:'[a-z]+)?", " ".join([*lines, *forms]).lower()))
    assert set(grammar.lexicon()) <= words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[red|blue", r"lacks one of '\|\]'"),
        ("{nothing}", "no rule 'nothing'"),
        ("{ T}", "braces without a name"),
        ('"Hello"', "a quotation without a speaker"),
    ],
)
def test_a_mistake_in_the_grammar_is_shown(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grammar._Reader({"rule": [line]}).rule("rule", grammar._Speech())


def test_a_choice_knows_its_probability_and_equal_options_are_one() -> None:
    words = {name: parts.Fixed(((name, 0),)) for name in "abc"}
    once = parts.choice([(words["a"],), (words["b"],), (words["b"],), ()])
    draw = parts.Draw(iter([0.9, 0.3, 0.6, 0.1]).__next__)
    told = []
    for _ in range(4):
        draw.pieces, draw.nats = [], 0.0
        for part in once:
            part.expand(draw)
        told.append(("".join(text for text, _ in draw.pieces), draw.nats))
    expected = [("", 0.25), ("b", 0.5), ("b", 0.5), ("a", 0.25)]
    assert [text for text, _ in told] == [text for text, _ in expected]
    np.testing.assert_allclose([nats for _, nats in told], [-np.log(share) for _, share in expected])
    assert parts.choice([(words["c"],), (words["c"],)]) == (words["c"],)


def test_names_and_species_do_not_mix() -> None:
    assert not {*cast.GIRLS, *cast.FEMALE_ANIMALS} & {*cast.BOYS, *cast.MALE_ANIMALS}
    assert not set(cast.SPECIES) & set(cast.WISE_SPECIES)


# The tokenizer, and how much there is to predict


def test_the_bundled_tokenizer_has_1024_ids_and_knows_every_story(
    told: list[storyworld.Story], tokenizer: Tokenizer
) -> None:
    assert tokenizer.vocab_size == 1024
    for story in told[:50]:
        ids = tokenizer.encode(story.text)
        assert tokenizer.unk_id not in ids
        assert tokenizer.decode(ids) == story.text


def test_the_bundled_tokenizer_reads_any_ascii_text_and_marks_the_rest(tokenizer: Tokenizer) -> None:
    printable = "".join(map(chr, range(33, 127)))
    assert tokenizer.decode(tokenizer.encode(printable)) == printable
    assert tokenizer.encode("\x00") == [tokenizer.unk_id]


def test_training_a_tokenizer_is_deterministic() -> None:
    assert storyworld.train_tokenizer(50).fingerprint == storyworld.train_tokenizer(50).fingerprint
    assert storyworld.train_tokenizer(50).vocab_size <= 1024


@pytest.mark.slow
def test_the_bundled_tokenizer_is_what_training_gives(tokenizer: Tokenizer) -> None:
    assert storyworld.train_tokenizer().fingerprint == tokenizer.fingerprint


def test_the_entropy_is_the_choices_over_the_tokens(told: list[storyworld.Story], tokenizer: Tokenizer) -> None:
    few = told[:30]
    tokens = sum(len(tokenizer.encode(story.text)) + 1 for story in few)
    assert storyworld.entropy(few) == pytest.approx(sum(story.nats for story in few) / tokens)
    with pytest.raises(ValueError, match="entropy needs at least one story"):
        storyworld.entropy([])


def test_the_probabilities_of_a_small_grammar_add_up_to_one() -> None:
    """All derivations of a rule, by hand: the nats of each must be minus the log of how often it comes."""
    reader = grammar._Reader({"rule": ["a[b|c[d|e|f]]", "{X:=[g|h]}i"], "other": ["j"]})
    expected = {"ab": 0.25, "acd": 1 / 12, "ace": 1 / 12, "acf": 1 / 12, "i": 0.25}
    seen: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for _ in range(300):
        draw = parts.Draw(rng.random)
        for part in reader.rule("rule", grammar._Speech()):
            part.expand(draw)
        seen["".join(text for text, _ in draw.pieces)] = float(np.exp(-draw.nats))
    assert seen == pytest.approx(expected)


def test_the_fingerprint_changes_with_the_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = storyworld.fingerprint()
    assert before == storyworld.fingerprint()
    for file in grammar._FOLDER.glob("*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(grammar, "_FOLDER", tmp_path)
    assert storyworld.fingerprint() == before
    with (tmp_path / "race.txt").open("a") as file:
        file.write("# another\n")
    assert storyworld.fingerprint() != before


def test_the_page_lists_every_concept() -> None:
    page = (Path(__file__).parent.parent / "docs/concepts/story-world.md").read_text("utf-8")
    listed = re.findall(r"^\| `([a-z_.]+)` \| (.*) \|$", page, flags=re.MULTILINE)
    assert dict(listed) == storyworld.CONCEPTS


@pytest.mark.parametrize("kind", ["name", "speaker", "animal"])
def test_questions_end_before_a_word_that_the_story_has_mentioned(kind: Any) -> None:
    asked = list(storyworld.questions(kind, 7, 40, first=100))
    assert len(asked) == 40
    assert len({one.text for one in asked}) == 40
    texts = [storyworld.story(7, index).text for index in range(100, 800)]
    for one in asked:
        story = next(text for text in texts if text.startswith(one.text))
        assert re.match(rf"{one.answer}\b", story[len(one.text) :])
        assert one.text[: one.source].endswith(one.answer.strip())
        assert one.answer != one.wrong
        assert (re.search(rf"\b{one.wrong.strip()}\b", one.text) is not None) == (kind == "speaker")
    if kind == "speaker":
        assert all(re.search(r'[.,!?]" \w+$', one.text) for one in asked)
    names = "|".join(sorted(cast.NAMES))
    if kind == "name":  # nobody else has been named
        assert all(set(re.findall(rf"\b(?:{names})\b", one.text)) == {one.answer.strip()} for one in asked)
    assert asked[5:9] == list(storyworld.questions(kind, 7, 9, first=100))[5:]


def test_questions_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="kind='place'; it must be one of name, speaker, animal"):
        storyworld.questions("place", 0, 1)  # type: ignore[arg-type]
