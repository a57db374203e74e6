"""Prompts and stories as rows of ids: `[BEGIN]` once, `[END]` by the story alone, special tokens named."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import as_users_run_it

from tinymodel_jax import TinyModel
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.commands import cli
from tinymodel_jax.commands.inputs import open_rows
from tinymodel_jax.commands.quickstart_steps import full_rows
from tinymodel_jax.text.prompts_and_stories import prompt_ids, story_rows
from tinymodel_jax.text.tokenizer import Tokenizer

STORIES = ["Mia saw a dog.", "Mia saw a dog and a cat and a bird."]
SPECIAL = ["Mia saw [END] a dog.", "A dog.[END]", "Mia [PAD]", "Mia [BEGIN] saw", "[BEGIN][BEGIN]Mia", "［END］"]


@pytest.fixture(scope="module")
def lm() -> TinyModel:
    return TinyModel("mini")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return storyworld.tokenizer()


def write_stories(folder: Path, texts: list[str]) -> str:
    path = folder / f"{len(texts)}-{abs(hash(tuple(texts)))}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def without_padding(rows: np.ndarray, tokenizer: Tokenizer) -> list[list[int]]:
    return [[i for i in row if i != tokenizer.pad_id] for row in rows.tolist()]


def test_a_story_s_row_is_the_same_alone_and_beside_others(lm, tokenizer, tmp_path):
    alone = [open_rows(lm, write_stories(tmp_path, [text]), 9) for text in STORIES]
    for order in (STORIES, STORIES[::-1], [STORIES[0], STORIES[0]]):
        rows = without_padding(open_rows(lm, write_stories(tmp_path, order), 9), tokenizer)
        assert rows == [without_padding(alone[STORIES.index(text)], tokenizer)[0] for text in order]
    expected = [[tokenizer.begin_id, *tokenizer.encode(text), tokenizer.end_id] for text in STORIES]
    assert [without_padding(rows, tokenizer)[0] for rows in alone] == expected


def test_a_story_that_just_fits_has_its_end_and_one_that_is_cut_has_none(tokenizer):
    n = len(tokenizer.encode(STORIES[0])) + 2
    assert story_rows(tokenizer, STORIES[:1], n)[0, -1] == tokenizer.end_id
    assert story_rows(tokenizer, STORIES, n)[1, -1] != tokenizer.end_id
    assert tokenizer.end_id not in story_rows(tokenizer, STORIES[:1], n - 1)
    assert story_rows(tokenizer, STORIES[:1], n, width=n + 3)[0].tolist()[-3:] == [tokenizer.pad_id] * 3


def test_all_stories_of_the_quickstart_end_alike(lm, tokenizer):
    rows = full_rows(lm, STORIES)
    assert rows.shape == (2, lm.config.n_ctx)
    assert [row[-1] for row in without_padding(rows, tokenizer)] == [tokenizer.end_id] * 2


def test_features_of_a_story_include_those_at_its_end(tmp_path, capsys):
    stories = write_stories(tmp_path, STORIES)
    assert cli.main(["features", "--model", "mini", "--site", "M0", "--stories", stories, "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["tokens"][-1]["token"] for one in shown] == ["[END]", "[END]"]


@pytest.mark.parametrize("text", SPECIAL)
def test_a_special_token_in_a_prompt_is_named(lm, text, capsys):
    with pytest.raises(ValueError, match=r"the prompt '.*' holds \[(BEGIN|END|PAD)\]; the only special token"):
        lm.generate(text)
    for command in (["generate"], ["features", "--site", "M0"], ["sweep", "--site", "M0"]):
        assert " holds [" in error_of(capsys, *command, text, "--model", "mini")


def test_all_special_tokens_of_a_prompt_are_named(tokenizer):
    with pytest.raises(ValueError, match=r"holds \[BEGIN\] and \[END\] and \[PAD\]"):
        prompt_ids(tokenizer, "a[PAD][END][BEGIN]")


def test_an_unknown_character_may_be_written_as_decoding_writes_it(tokenizer):
    ids = [tokenizer.begin_id, *tokenizer.encode("Mia"), tokenizer.unk_id]
    assert prompt_ids(tokenizer, tokenizer.decode(ids)) == ids


@pytest.mark.parametrize("command", ["eval --sites M0", "top --site M0", "importance --site M0"])
def test_a_special_token_in_a_story_is_named_with_the_story_s_number(command, tmp_path, capsys):
    stories = write_stories(tmp_path, [STORIES[0], "Mia saw [END] a dog."])
    error = error_of(capsys, *command.split(), "--model", "mini", "--data", stories)
    assert f"{stories}, story 2 'Mia saw [END] a dog.' holds [END]" in error


def test_decoded_ids_are_continued_as_the_ids_are(lm, capsys):
    ids = prompt_ids(lm.tokenizer, "Mia saw a")
    expected = lm.generate("Mia saw a", 8, temperature=0.0)
    decoded = lm.tokenizer.decode(ids)
    assert decoded == "[BEGIN]Mia saw a"
    assert lm.generate(decoded, 8, temperature=0.0) == expected
    assert lm.generate([decoded, "Mia saw a"], 8, temperature=0.0) == [expected] * 2
    assert cli.main(["generate", decoded, "--model", "mini", "--n-toks", "8", "--temperature", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tok_ids"] == lm.generate_ids([ids], 8, 0.0)[0].tolist()


def test_every_command_puts_begin_in_front_once(lm, tmp_path, capsys):
    for arguments in (["features", "--site", "M0"], ["sweep", "--site", "M3"]):
        outputs = []
        for text in ("Mia saw a dog", "[BEGIN]Mia saw a dog"):
            with as_users_run_it():
                assert cli.main([*arguments, text, "--model", "mini", "--json"]) == 0
            outputs.append(capsys.readouterr().out)
        assert outputs[0] == outputs[1]
    prompts = ["[BEGIN]Mia saw a dog", "Mia saw a cat"]
    with as_users_run_it():
        assert cli.main(["patch", *prompts, "--model", "mini", "--hooks", "hook_mlp_out", "--json"]) == 0
    stories = write_stories(tmp_path, ["[BEGIN]" + STORIES[0], STORIES[0]])
    first, second = open_rows(lm, stories, 9).tolist()
    assert first == second
