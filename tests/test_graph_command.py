"""`tinymodel graph`: circuit-tracer's JSON, the dictionaries it takes, and what it refuses."""

import json
from pathlib import Path

from conftest import as_users_run_it, error_line
from oracle import error_of

from tinymodel_jax import analysis
from tinymodel_jax.analysis import circuits
from tinymodel_jax.analysis.report.graph import save_page
from tinymodel_jax.commands import cli
from tinymodel_jax.lm import TinyModel

PROMPT = "Once upon a time, a fox was sad."


def run(story_model: Path, *options: str) -> int:
    with as_users_run_it():
        return cli.main(["graph", PROMPT, "--model", str(story_model), *options])


def test_the_json_is_in_circuit_tracer_s_schema(story_model, tmp_path):
    options = ["--target", " Lily", "--vs", " Tim", "--max-nodes", "120", "--sites", "A1"]
    assert run(story_model, *options, "--json", str(tmp_path / "graph.json")) == 0
    found = json.loads((tmp_path / "graph.json").read_text())
    assert set(found) == {"metadata", "qParams", "nodes", "links"}
    assert found["metadata"] == {
        "slug": "graph",
        "scan": story_model.name,
        "transcoder_list": [],
        "prompt_tokens": TinyModel(story_model).to_str_tokens(PROMPT),
        "prompt": f"[BEGIN]{PROMPT}",
        "node_threshold": None,
        "schema_version": 1,
    }
    nodes = {node["node_id"]: node for node in found["nodes"]}
    assert len(nodes) == len(found["nodes"])
    kinds = {"embedding", "mlp reconstruction error", "cross layer transcoder", "logit"}
    assert {node["feature_type"] for node in nodes.values()} == kinds
    for name, node in nodes.items():
        if node["feature_type"] == "cross layer transcoder":
            layer, feature, position = map(int, name.split("_"))
            assert node["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature
            assert (node["layer"], node["ctx_idx"]) == (str(layer), position)
            assert node["activation"] > 0
    (logit,) = (node for node in nodes.values() if node["feature_type"] == "logit")
    assert logit["is_target_logit"]
    assert logit["clerp"] == 'Output "“ Lily” − “ Tim”" (p=0.000)'
    assert {node["layer"] for node in nodes.values()} == {"E", "1", "2", "3", "5"}  # MLP 0, attention 1, MLP 1
    for link in found["links"]:
        assert link["source"] in nodes
        assert link["target"] in nodes
    assert json.loads((tmp_path / "graph-metadata.json").read_text()) == {"graphs": [found["metadata"]]}
    influences = sorted(node["influence"] for node in nodes.values() if node["influence"] is not None)
    assert 0 < influences[0] <= influences[-1] <= 1 + 1e-9


def test_dictionaries_of_a_folder_replace_the_model_s_own(story_model, tmp_path):
    own = TinyModel(story_model)
    TinyModel.from_params(own.config, own.params, own.tokenizer).save_pretrained(tmp_path / "lm")
    options = ["--max-nodes", "40", "--target", " Tim"]
    assert run(story_model, *options, "--json", str(tmp_path / "own.json")) == 0
    given = ["--dictionaries", str(story_model / "dictionaries"), "--json", str(tmp_path / "given.json")]
    assert run(tmp_path / "lm", *options, *given) == 0
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("own.json", "given.json"))
    assert [one[name] for name in ("nodes", "links")] == [other[name] for name in ("nodes", "links")]
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in listed] == ["own", "given"]


def test_a_graph_is_written_with_its_own_prompt_targets_and_dictionaries_only(story_model, tmp_path):
    lm, difference = TinyModel(story_model), analysis.logit_difference(" Lily", " Tim")
    graph = circuits.attribution_graph(lm, PROMPT, difference, 80, dictionaries="A1")
    other = PROMPT.replace("fox", "dog")
    turned = analysis.logit_difference(" Tim", " Lily")
    cases = {
        "save_page: the graph is of another prompt": lambda: save_page(
            tmp_path / "a.html", lm, other, graph, difference, dictionaries="A1"
        ),
        "save_page: the graph has nodes of A1": lambda: save_page(tmp_path / "a.html", lm, PROMPT, graph, difference),
        "or have other signs": lambda: save_page(tmp_path / "a.html", lm, PROMPT, graph, turned, dictionaries="A1"),
        "save_circuit_tracer: the graph is of another": lambda: circuits.save_circuit_tracer(
            tmp_path / "a.json", lm, other, graph, difference
        ),
        "the graph has 1 targets; got 2": lambda: circuits.save_circuit_tracer(
            tmp_path / "a.json", lm, PROMPT, graph, [4, 5]
        ),
    }
    for words, call in cases.items():
        assert words in error_of(call)
    assert graph.labels[-1] == f"logit ' Lily' - logit ' Tim' @{len(graph.tokens) - 1}"
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_in_one_line(story_model, tmp_path, capsys):
    page = str(tmp_path / "page.html")
    bare = TinyModel(story_model)
    TinyModel.from_params(bare.config, bare.params, bare.tokenizer).save_pretrained(tmp_path / "bare")
    cases = [
        ([], "give -o graph.html"),
        (["-o", "page.txt"], "--out page.txt: expected the name of a .html file"),
        (["-o", page, "--json", "x.js"], "--json x.js: expected the name of a .json file"),
        (["-o", page, "--vs", " Tim"], "give both"),
        (["-o", page, "--target", " Tim", "--vs", " Tim"], "the difference is always 0"),
        (["-o", page, "--target", " zebra"], "' zebra' is 4 tokens"),
        (["-o", page, "--max-nodes", "0"], "--max-nodes 0 must be 1 or more"),
        (["-o", page, "--max-nodes", "5"], "--max-nodes 5; 10 targets, the biases and the rest are 15 nodes"),
        (["-o", page, "--limit", "-1"], "--limit -1 must be 0"),
        (["-o", page, "--sites", "Rm1"], "'Rm1' cuts the residual stream"),
        (["-o", page, "--node-share", "2"], "--node-share 2.0 must be above 0 and at most 1"),
        (["-o", page, "--data", "nowhere"], "nowhere"),
        (["-o", page, "--dictionaries", "nowhere"], "--dictionaries nowhere does not exist"),
        (["-o", page, "--dashboard", "nowhere"], "nowhere holds no dashboard"),
    ]
    for options, words in cases:
        assert run(story_model, *options) == 1
        assert words in error_line(capsys)
    assert run(tmp_path / "bare", "-o", page) == 1
    assert "'M0': this model has no dictionary there" in (line := error_line(capsys))
    assert line.endswith("lm.attach('M0', path). For this command: --dictionaries FOLDER, or --sites neurons.\n")
    with as_users_run_it():
        assert cli.main(["graph", "a fox " * 40, "--model", str(story_model), "-o", page]) == 1
    assert "the context is 64" in error_line(capsys)
    assert not Path(page).exists()
