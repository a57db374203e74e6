"""The cards of uploads: a README.md for each, filled in from what is known, with the tags that the hub's search knows.

A card begins with a line of which kind it is. The next upload of the same kind replaces it; without that line, it stays
as it is, so that what people write there is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.io.hub.addresses import HubAddress

LIBRARY = "tinymodel_jax"
Facts = Sequence[tuple[str, str]]
"""What is known about how something was made, as (name, value in Markdown)."""


class Card(NamedTuple):
    """A README.md."""

    kind: str
    """What it describes: "model", "dictionary", "run", or "repository" for a folder of the others."""
    metadata: Mapping[str, Any]
    text: str

    @property
    def marker(self) -> str:
        """The line by which a later upload knows the card."""
        return (
            f"<!-- {LIBRARY} wrote this card of a {self.kind}, and replaces it at the next upload of one. "
            "Delete this line to keep your edits. -->"
        )

    def content(self) -> bytes:
        """Return the file."""
        from huggingface_hub import ModelCardData

        metadata = ModelCardData(**self.metadata).to_yaml().strip()
        text = re.sub("\n{3,}", "\n\n", self.text.strip())
        return f"---\n{metadata}\n---\n\n{self.marker}\n\n{text}\n".encode()


def model_card(
    address: HubAddress,
    config: ModelConfig,
    dictionaries: Mapping[str, DictionaryConfig],
    has_tokenizer: bool,
    facts: Facts = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
) -> Card:
    """Return the card of a language model.

    Args:
        dictionaries: tag -> configuration of a dictionary that comes with it.
        license: the licence that the user states; None leaves it out.
        datasets: data sets of the hub that it was trained on, OWNER/NAME.
    """
    metadata = _metadata(license, ["interpretability", "jax", *(_tags(dictionaries.values()) if dictionaries else ())])
    metadata |= {"pipeline_tag": "text-generation"} | ({"datasets": [*datasets]} if datasets else {})
    sizes = [("layers", config.n_layers), ("d_model", config.d_model), ("heads", config.n_heads)]
    sizes += [("d_mlp", config.d_mlp), ("context", config.n_ctx), ("vocabulary", config.d_vocab)]
    listed = [(f"`{tag}`", *_described(one)) for tag, one in dictionaries.items()]
    text = f"""# {_title(address)}

A language model of {config.n_params:,} parameters, a transformer without layer norm, in the format of `{LIBRARY}`.

{_snippet(f'lm = TinyModel("{address}")', *(['lm.generate("Once upon a time")'] if has_tokenizer else []))}
{_table(("", ""), [(name, f"{number:,}") for name, number in sizes])}
{_section("Dictionaries", ("tag", *_COLUMNS), listed)}{_made(facts)}"""
    return Card("model", metadata, text)


def dictionary_card(
    address: HubAddress,
    config: DictionaryConfig,
    facts: Facts = (),
    license: str | None = None,
    base_model: str | None = None,
    format: str | None = None,
) -> Card:
    """Return the card of a dictionary.

    Args:
        license, base_model: as in `model_card` and `run_card`.
        format: the other library whose files are uploaded, as in `Dictionary.save_pretrained`.
    """
    kind = f"A {_kind(config).replace('sparse-', 'sparse ').replace('-transcoder', ' transcoder')}"
    also = "" if format is None else f", which `{LIBRARY}` reads, too"
    metadata = _of_format(_of_dictionaries([config], license, base_model), format)
    text = f"""# {_title(address)}

{kind} of {config.n_features:,} features, in the format of `{format or LIBRARY}`{also}.

{_snippet(f'dictionary = Dictionary.from_pretrained("{address}")', "acts = dictionary.encode(x)  # x: what it reads")}
{_table(_COLUMNS, [_described(config)])}
{_made(facts)}"""
    return Card("dictionary", metadata, text)


def transcoder_set_card(
    address: HubAddress, file: str, files: Sequence[str], config: DictionaryConfig, license: str | None
) -> Card:
    """Return the card of a transcoder set of circuit-tracer.

    Args:
        file, config: the layer that is uploaded.
        files: the files of all layers.
    """
    format = "circuit-tracer"
    metadata = _of_format(_of_dictionaries([config], license, None), format)
    listed = ", ".join(f"`{name}`" for name in sorted(files, key=lambda name: (len(name), name)))
    text = f"""# {_title(address)}

A transcoder set in the format of `{format}`, which `{LIBRARY}` reads, too. Each layer has a file: {listed}.

{_snippet(f'dictionary = Dictionary.from_pretrained("{address.joined(file)}")')}
The last upload was `{file}`:

{_table(_COLUMNS, [_described(config)])}"""
    return Card("dictionary", metadata, text)


def run_card(
    address: HubAddress,
    dictionaries: Mapping[str, DictionaryConfig],
    results: Sequence[tuple[str, ...]],
    facts: Facts = (),
    license: str | None = None,
    base_model: str | None = None,
    plot: str | None = None,
) -> Card:
    """Return the card of a training run of dictionaries.

    Args:
        dictionaries: folder -> configuration.
        results: a heading and a row for each dictionary: its folder and measurements.
        base_model: the model of the hub that they belong to, OWNER/NAME.
        plot: name of a picture among the files.
    """
    first = next(iter(dictionaries))
    picture = "" if plot is None else f"\n![Sparsity against quality]({plot})\n"
    text = f"""# {_title(address)}

The dictionaries of a training run, in the format of `{LIBRARY}`.

{_snippet(f'dictionary = Dictionary.from_pretrained("{address.joined(first)}")')}
{_table(results[0], results[1:])}
{picture}
{_made(facts)}"""
    return Card("run", _of_dictionaries(dictionaries.values(), license, base_model), text)


def repository_card(address: HubAddress, card: Card) -> Card:
    """Return the card of a repository that has nothing but a folder with a card, which describes it."""
    metadata = {name: value for name, value in card.metadata.items() if name != "pipeline_tag"}
    text = f"""# {address.repository.partition("/")[2]}

Folders of this repository hold models or dictionaries in the format of `{LIBRARY}`, each with a card that says what it
is and how it is loaded. The first is [{address.path}]({address.path}/README.md).
"""
    return Card("repository", metadata, text)


_COLUMNS = ("reads", "predicts", "architecture", "features")


def _described(config: DictionaryConfig) -> tuple[str, ...]:
    return f"`{config.hook_in}`", f"`{config.hook_out}`", config.architecture, f"{config.n_features:,}"


def _metadata(license: str | None, tags: Sequence[str]) -> dict[str, Any]:
    return {"library_name": LIBRARY, "tags": [*tags]} | ({} if license is None else {"license": license})


def _of_dictionaries(configs: Any, license: str | None, base_model: str | None) -> dict[str, Any]:
    metadata = _metadata(license, ["interpretability", "jax", *_tags(configs)])
    return metadata | ({} if base_model is None else {"base_model": base_model})


def _of_format(metadata: dict[str, Any], format: str | None) -> dict[str, Any]:
    return metadata if format is None else metadata | {"library_name": format, "tags": [*metadata["tags"], format]}


def _tags(configs: Any) -> list[str]:
    """Return the tags of dictionaries: what they are, and their architectures."""
    found = [(_kind(config), config.architecture.replace("_", "-")) for config in configs]
    return sorted({kind for kind, _ in found}) + sorted({architecture for _, architecture in found})


def _kind(config: DictionaryConfig) -> str:
    if config.is_transcoder:
        return "transcoder" if config.n_layers == 1 else "cross-layer-transcoder"
    return "crosscoder" if config.is_crosscoder else "sparse-autoencoder"


def _title(address: HubAddress) -> str:
    return (address.path or address.repository).rpartition("/")[2]


def _snippet(*lines: str) -> str:
    loaded = "Dictionary" if "Dictionary." in lines[0] else "TinyModel"
    code = "\n".join((f"from {LIBRARY} import {loaded}", "", *lines))
    return f"`pip install '{LIBRARY.replace('_', '-')}[hub]'`, then:\n\n```python\n{code}\n```\n"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _section(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"\n## {title}\n\n{_table(heading, rows)}" if rows else ""


def _made(facts: Facts) -> str:
    return _section("How it was made", ("", ""), facts)
