"""`tinymodel dashboard --export neuronpedia`: Neuronpedia's fields, with the dashboard's numbers."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import as_users_run_it, error_line

from tinymodel_jax.analysis.report.dashboard.build import read_data
from tinymodel_jax.analysis.report.dashboard.neuronpedia import source_of
from tinymodel_jax.commands import cli
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.lm.text import rows_of

STORIES = ["Once upon a time, a cat was happy.", "The dog ran home.", "A girl had a red ball."]
NUMBERS, TEXTS, INDICES = (list, (float, int)), (list, str), (list, int)
FEATURE = {
    "modelId": str, "layer": str, "index": str, "sourceSetName": str, "creatorId": str, "maxActApprox": float,
    "hasVector": bool, "vector": NUMBERS, "hookName": str, "topkCosSimIndices": INDICES, "topkCosSimValues": NUMBERS,
    "neuron_alignment_indices": INDICES, "neuron_alignment_values": NUMBERS, "neuron_alignment_l1": NUMBERS,
    "correlated_neurons_indices": INDICES, "correlated_neurons_pearson": NUMBERS, "correlated_neurons_l1": NUMBERS,
    "correlated_features_indices": INDICES, "correlated_features_pearson": NUMBERS, "correlated_features_l1": NUMBERS,
    "neg_str": TEXTS, "neg_values": NUMBERS, "pos_str": TEXTS, "pos_values": NUMBERS, "frac_nonzero": float,
    "freq_hist_data_bar_heights": NUMBERS, "freq_hist_data_bar_values": NUMBERS,
    "logits_hist_data_bar_heights": NUMBERS, "logits_hist_data_bar_values": NUMBERS, "decoder_weights_dist": NUMBERS,
}  # fmt: skip
ACTIVATION = {
    "id": str, "tokens": TEXTS, "index": str, "layer": str, "modelId": str, "maxValue": float,
    "maxValueTokenIndex": int, "minValue": float, "values": NUMBERS, "creatorId": str, "dataSource": type(None),
    "dataIndex": str, "dfaValues": NUMBERS, "dfaTargetIndex": type(None), "dfaMaxValue": type(None),
    "lossValues": NUMBERS, "logitContributions": type(None), "binMin": float, "binMax": float, "binContains": float,
    "qualifyingTokenIndex": int,
}  # fmt: skip
"""Fields of Neuronpedia's tables Neuron and Activation (apps/webapp/prisma/schema.prisma at ebb8426) and their types;
those that the database fills in, and the other methods' ones, are left out."""


@pytest.fixture(scope="module")
def run(story_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that runs the command on three stories: sites, pages, export, further options."""
    file = tmp_path_factory.mktemp("stories") / "stories.txt"
    file.write_text("\n".join(STORIES))

    def command(sites: str, pages: Path, dest: Path, *options: str) -> int:
        given = ["--model", str(story_model), "--data", str(file), "-o", str(pages)]
        with as_users_run_it():
            return cli.main(["dashboard", "--site", sites, *given, "--export", "neuronpedia", str(dest), *options])

    return command


@pytest.fixture(scope="module")
def exported(run: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pages of M0 and A1, and their export."""
    folder = tmp_path_factory.mktemp("exported")
    assert run("M0,A1", folder / "pages", folder / "export") == 0
    return folder / "pages", folder / "export" / "lm"


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(isinstance(item, kind[1]) for item in value)
    return isinstance(value, kind)


def test_the_export_has_the_files_of_the_documented_layout(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    assert {path.name for path in folder.iterdir()} == {"0-hook_mlp_in-hook_mlp_out", "1-hook_attn_out"}
    for source in folder.iterdir():
        files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        assert files == {
            *("release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl"),
            *("features/batch-0.jsonl.gz", "activations/batch-0.jsonl.gz"),
        }
        (release,), (model,), (group,), (row,) = (
            lines(source / f"{name}.jsonl") for name in ("release", "model", "sourceset", "source")
        )
        assert (row["id"], row["modelId"], row["setName"]) == (source.name, model["id"], group["name"])
        assert (group["modelId"], group["releaseName"]) == (model["id"], release["name"])
        assert source.name == f"{source.name[0]}-{group['name']}"
        assert (row["num_prompts"], model["layers"], model["neuronsPerLayer"]) == (3, 2, 32)


def test_every_row_has_the_fields_of_its_table(exported: tuple[Path, Path]) -> None:
    _, folder = exported
    for source in folder.iterdir():
        features = lines(source / "features" / "batch-0.jsonl.gz")
        activations = lines(source / "activations" / "batch-0.jsonl.gz")
        assert [row["index"] for row in features] == [str(i) for i in range(24)]
        for rows, schema in ((features, FEATURE), (activations, ACTIVATION)):
            for row in rows:
                assert list(row.keys() ^ schema.keys()) == []
                assert [name for name, kind in schema.items() if not fits(row[name], kind)] == []
        for names in (("pos_str", "pos_values"), ("neg_str", "neg_values"), ("topkCosSimIndices", "topkCosSimValues")):
            assert all(len(row[names[0]]) == len(row[names[1]]) for row in features)
        for kind in ("freq", "logits"):
            pairs = [[len(row[f"{kind}_hist_data_bar_{part}"]) for part in ("heights", "values")] for row in features]
            assert all(heights == values for heights, values in pairs)
        assert all(len(row["tokens"]) == len(row["values"]) for row in activations)
        assert len({row["id"] for row in activations}) == len(activations)


def test_features_have_the_numbers_of_the_pages(exported: tuple[Path, Path], story_model: Path) -> None:
    pages, folder = exported
    lm = TinyModel(story_model)
    effects = np.asarray(lm["M0"].dictionary.params["W_dec"]) @ np.asarray(lm.W_U)
    effects -= effects.mean(axis=1, keepdims=True)
    index, records = read_data(pages / "M0", "index"), read_data(pages / "M0", "shard-0000")
    rows = lines(folder / "0-hook_mlp_in-hook_mlp_out" / "features" / "batch-0.jsonl.gz")
    for feature, (row, record) in enumerate(zip(rows, records, strict=True)):
        assert row["frac_nonzero"] == index["columns"]["active"][feature] / index["n_tokens"]
        assert row["maxActApprox"] == index["columns"]["largest"][feature]
        assert sum(row["freq_hist_data_bar_heights"]) == index["columns"]["active"][feature]
        assert row["pos_values"] == [effect for _, effect in record["promoted"]]
        assert row["pos_str"][0] == lm.tokenizer.decode([int(effects[feature].argmax())])
        assert row["neg_str"][0] == lm.tokenizer.decode([int(effects[feature].argmin())])
        assert [[i, cosine] for i, cosine in zip(row["topkCosSimIndices"], row["topkCosSimValues"], strict=True)] == (
            record["neighbours"]
        )
        heights, values = row["logits_hist_data_bar_heights"], np.array(row["logits_hist_data_bar_values"])
        assert sum(heights) == lm.config.d_vocab
        half, of_feature = (values[1] - values[0]) / 2, effects[feature]
        np.testing.assert_allclose(values[0] - half, of_feature.min(), rtol=0.02)
        np.testing.assert_allclose(values[-1] + half, of_feature.max(), rtol=0.02)
        assert row["hookName"] == "blocks.0.hook_mlp_out"


def test_activations_are_those_of_the_dictionary_on_the_rows(exported: tuple[Path, Path], story_model: Path) -> None:
    _, folder = exported
    lm = TinyModel(story_model)
    ids = np.asarray(rows_of(lm, STORIES))
    acts = np.array(lm["A1"](ids))
    acts[~lm.config.is_text(ids)] = 0
    rows = lines(folder / "1-hook_attn_out" / "activations" / "batch-0.jsonl.gz")
    assert {row["index"] for row in rows} == {str(i) for i in np.flatnonzero(acts.max(axis=(0, 1)))}
    for row in rows:
        at, of_row = row["maxValueTokenIndex"], acts[int(row["dataIndex"]), :, int(row["index"])]
        place = int(of_row.argmax())
        window = slice(place - at, place - at + len(row["values"]))
        np.testing.assert_allclose(row["values"], of_row[window], rtol=1e-3, atol=1e-6)
        assert row["tokens"] == [lm.tokenizer.decode([i]) for i in ids[int(row["dataIndex"])][window]]
        assert row["values"][row["qualifyingTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert row["minValue"] == min(row["values"])
        assert (row["binMin"] == -1) == (row["binContains"] == -1)
        assert max(row["binMin"], 0) <= row["maxValue"] <= row["binMax"]


def test_one_dictionary_without_logit_effects_is_exported_with_empty_lists(run: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "neurons.npy", np.eye(16)[:3])
    options = ("--directions", str(tmp_path / "neurons.npy"))
    assert run("blocks.0.attn.hook_q", tmp_path / "pages", tmp_path / "export", *options) == 0
    rows = lines(tmp_path / "export" / "lm" / "0-attn-hook_q" / "features" / "batch-0.jsonl.gz")
    assert len(rows) == 3
    assert not any(row[name] for row in rows for name in ("pos_str", "neg_values", "logits_hist_data_bar_values"))
    assert any(row["maxActApprox"] for row in rows)


def test_an_export_that_exists_is_kept(run: Any, exported: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    _, folder = exported
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run("A1", tmp_path / "pages", folder.parent) == 1
    assert f"{folder / '1-hook_attn_out'} exists; remove it or name another folder" in error_line(capsys)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not (tmp_path / "pages").exists()


@pytest.mark.parametrize(
    ("model", "tag", "folder"),
    [
        ("mini", "Ra0", "mini/0-hook_resid_pre"),
        ("runs/My Model.pt", "M3", "my-model-pt/3-hook_mlp_in-hook_mlp_out"),
        ("/", "blocks.2.mlp.hook_post", "model/2-mlp-hook_post"),
    ],
)
def test_ids_have_the_characters_that_neuronpedia_allows(model: str, tag: str, folder: str) -> None:
    assert str(source_of(model, Site.whole(tag)).folder) == folder
