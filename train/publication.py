"""`--push-to`: the results of a finished run in a repository on the hub, with cards that say how they were made.

Everything on the cards comes from the run's folder, except for the command, which is shown as it was typed.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.io.config_files import read_config
from tinymodel_jax.io.hub.addresses import HubAddress
from tinymodel_jax.io.hub.cards import Card, dictionary_card, model_card, run_card
from tinymodel_jax.io.hub.published import MODELS, REPOSITORY
from tinymodel_jax.io.hub.upload import Files, push, require_access
from tinymodel_jax.runtime.collectives import on_first
from tinymodel_jax.training.data_folder import DataMeta, is_remote
from train.run import trained_seconds
from train.run_folder import run_settings

MEASURED = {
    "l0": ("L0", ".1f"),
    "explained_variance": ("explained variance", ".3f"),
    "ce_recovered": ("CE recovered", ".3f"),
    "dead_fraction": ("dead features", ".1%"),
}
"""Results that the cards show: name in sweep.json -> heading and format."""


@dataclass(frozen=True)
class Publication:
    """Where the results of a finished run are uploaded."""

    push_to: str | None = None
    """repository on the hub to upload the results to when the run has finished: OWNER/NAME, with /PATH for a folder in
    it and @BRANCH for another branch than main"""
    license: str | None = None
    """licence that the cards state, in the hub's spelling, such as mit"""
    private: bool = False
    """make a new repository private"""


NOT_PUBLISHED = Publication()


def require_publication(publication: Publication) -> None:
    """Check, before a run begins, that its results can be uploaded: the address, the network and the user's token.

    Raises:
        ValueError: the options do not fit together, or it is not an address.
        ModuleNotFoundError, OSError: as `require_access`.
    """
    if publication.push_to is not None:
        address = HubAddress.parse(publication.push_to)
        on_first(lambda: require_access(address))
    elif publication.license is not None or publication.private:
        raise ValueError("--license and --private are about an upload; give --push-to OWNER/NAME, too.")


def push_model(publication: Publication, out: epath.Path, data: DataMeta) -> None:
    """Upload the model of a finished run of `train lm`, if an address is given."""

    def upload(address: HubAddress) -> str:
        settings = run_settings(out)
        recipe = f"preset `{settings['preset']}`: {settings['steps']:,} steps of {settings['batch_size']} rows"
        facts = [("data", _of_data(data)), ("recipe", f"{recipe}, seed {settings['seed']}")]
        facts += [("optimizer", _listed(settings["optimizer"]))]
        facts += [("held-out loss", f"{loss:.4f} nats per token") for loss in _held_out_losses(out)[-1:]]
        config = ModelConfig.from_dict(settings["model"])
        on_hub = [data.source.removeprefix("hub:")] if data.source.startswith("hub:") else []
        files, facts = _files(out / "model"), [*facts, *_circumstances(out)]
        card = model_card(address, config, {}, "tokenizer.json" in files, facts, publication.license, on_hub)
        return push(address, files, {"": card}, publication.private or None)

    _push(publication, out, upload)


def push_dictionaries(publication: Publication, out: epath.Path, data: DataMeta | None) -> None:
    """Upload the dictionaries of a finished run, each in its folder, with sweep.json and the plot, if asked for."""

    def upload(address: HubAddress) -> str:
        settings = run_settings(out)
        name = settings.get("model", {}).get("name")
        facts = [("model", f"`{name}`")] if name else []
        facts += [("data", _of_data(data))] if data else []
        facts += [("steps", f"{settings['steps']:,}"), *_circumstances(out)]
        files = {name: _content(out / name) for name in ("sweep.json", "pareto.png")}
        cards, results, configs = {}, [("dictionary", *(heading for heading, _ in MEASURED.values()))], {}
        for record in json.loads((out / "sweep.json").read_text())["dictionaries"]:
            folder = record["folder"]
            files |= {f"{folder}/{name}": file for name, file in _files(out / folder).items()}
            configs[folder] = read_config("dictionary", DictionaryConfig, out / folder)
            results.append((f"[`{folder}`]({folder}/README.md)", *_measured(record["results"])))
            cards[folder] = _card(publication, address.joined(folder), configs[folder], out / folder, facts, name)
        license, plot = publication.license, "pareto.png"
        cards[""] = run_card(address, configs, results, facts, license, _base_model(name), plot)
        return push(address, files, cards, publication.private or None)

    _push(publication, out, upload)


def _card(
    publication: Publication,
    address: HubAddress,
    config: DictionaryConfig,
    folder: epath.Path,
    facts: Sequence[tuple[str, str]],
    model: str | None,
) -> Card:
    """Return the card of one dictionary of a run."""
    training = json.loads((folder / "training.json").read_text())
    measured = zip(MEASURED.values(), _measured(training["results"]), strict=True)
    own = [("recipe", _listed(training["recipe"]))]
    own += [(heading, number) for (heading, _), number in measured if number]
    return dictionary_card(address, config, [*own, *facts], publication.license, _base_model(model))


def _push(publication: Publication, out: epath.Path, upload: Callable[[HubAddress], str]) -> None:
    if publication.push_to is None:
        return
    address = HubAddress.parse(publication.push_to)

    def run() -> None:
        try:
            print(f"{out}: uploaded to {upload(address)}", flush=True)
        except OSError as error:
            raise OSError(f"{out} is finished, but {error}") from error

    on_first(run)


def _files(folder: epath.Path) -> Files:
    return {path.name: _content(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _content(path: epath.Path) -> Path | bytes:
    return path.read_bytes() if is_remote(path) else Path(path)


def _measured(results: Mapping[str, float | None]) -> list[str]:
    found = [(results.get(name), shape) for name, (_, shape) in MEASURED.items()]
    return ["" if number is None else f"{number:{shape}}" for number, shape in found]


def _of_data(data: DataMeta) -> str:
    rows = f"{data.rows['train']:,} rows of {data.row_length} tokens"
    return f"`{data.source}`, {rows} and {data.rows['valid']:,} held-out ones (fingerprint `{data.fingerprint[:16]}`)"


def _held_out_losses(out: epath.Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["held_out_loss"] for line in lines if "held_out_loss" in line]


def _circumstances(out: epath.Path) -> list[tuple[str, str]]:
    """Return the command, the time and the versions of a run."""
    facts, seconds = [], trained_seconds(out)
    if Path(sys.argv[0]).parts[-2:] == ("train", "__main__.py"):
        facts.append(("command", f"`python -m train {shlex.join(sys.argv[1:])}`"))
    if seconds is not None:
        facts.append(("training time", f"{seconds / 60:.0f} minutes"))
    return [*facts, ("versions", _listed(run_settings(out).get("versions") or {}))]


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, [], ""))


def _base_model(name: str | None) -> str | None:
    """Return the repository on the hub of a model that a run was trained on."""
    if name in MODELS:
        return REPOSITORY
    address = HubAddress.of(name)
    return None if address is None else address.repository
