"""Convert TinyModel checkpoints between PyTorch's names and this package's folders; needs no PyTorch.

    python convert_torch_weights.py lm SRC.pt DEST_DIR
    python convert_torch_weights.py dictionary SRC DEST_DIR --site M2
    python convert_torch_weights.py dictionary SRC DEST --format saelens
    python convert_torch_weights.py export-lm SRC_DIR DEST.pt|DEST.safetensors
    python convert_torch_weights.py export-lm SRC_DIR DEST.safetensors --format transformer-lens
    python convert_torch_weights.py inspect SRC.pt

SRC may also be a safetensors file, as export-lm writes, and hub:OWNER/NAME/PATH. Installed as `tinymodel-convert`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tinymodel_jax.commands.frame import print_json, run_commands
from tinymodel_jax.io.formats.names import Format

if TYPE_CHECKING:
    from tinymodel_jax.io.torch_files import TorchFileSummary

Source = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Destination = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the converter; return its exit status."""
    description = "Convert TinyModel checkpoints between PyTorch files and folders of safetensors."
    return run_commands("tinymodel-convert", description, COMMANDS, argv)


def convert_lm(
    src: Source,
    dest: Destination,
    *,
    n_heads: int | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Convert a language model's file, and the dictionaries registered in it, to a folder.

    Args:
        src: file with the reference's names or TransformerLens's, .pt or .safetensors. TransformerLens's
            configuration is read from the file beside it with the ending .json.
        dest: folder to write: config.json, model.safetensors. An earlier model in it is replaced.
        n_heads: number of attention heads, for a width other than the published 768.
        tokenizer: folder or tokenizer.json with GPT-2's BPE, to save the published tokenizer with the model.
    """
    from tinymodel_jax.io.artifacts import read_model_file, save_model

    replaced = _replaced(dest)
    converted = read_model_file(src, n_heads)
    found = None
    if tokenizer is not None:
        from tinymodel_jax.text.tokenizer import Tokenizer

        found = Tokenizer.from_gpt2(tokenizer)
    save_model(converted.config, converted.params, dest, found, converted.dictionaries)
    cfg = converted.config
    extra = f", dictionaries {', '.join(converted.dictionaries)}" if converted.dictionaries else ""
    print(
        f"{dest}: {cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_heads} heads, d_mlp {cfg.d_mlp}, "
        f"context {cfg.n_ctx}, vocabulary {cfg.d_vocab}; {cfg.n_params:,} parameters{extra}{replaced}"
    )


def convert_dictionary(
    src: Source,
    dest: Destination,
    *,
    site: str | None = None,
    format: Format | None = None,
) -> None:
    """Convert a dictionary to a folder of this package or to another format.

    Args:
        src: file with the reference's names, .pt or .safetensors, or a folder of this package, SAELens,
            dictionary_learning, sparsify or circuit-tracer, recognized by its content.
        dest: folder to write, or for tinymodel-pt the file. An earlier dictionary in it is replaced.
        site: tag of the dictionary's site, such as M2. Files that do not say it need it.
        format: whose files to write; by default this package's config.json and dictionary.safetensors.
    """
    from tinymodel_jax.dictionaries.sites import Site
    from tinymodel_jax.io.artifacts import read_dictionary, require_place, save_dictionary

    if format is None:
        replaced = _replaced(dest)
    else:  # writing refuses other content
        replaced = "; it replaces what was there" if dest.is_file() or (dest.is_dir() and any(dest.iterdir())) else ""
    place = None if site is None else Site.whole(site)
    dictionary = read_dictionary(src, place)
    if place is not None:
        require_place(dictionary.config, place, src)
    save_dictionary(dictionary, dest, format)
    config = dictionary.config
    kind = "transcoder" if config.is_transcoder else "SAE"
    print(
        f"{dest}: {kind} of {config.n_features} features, reads {config.hook_in}, predicts {config.hook_out}{replaced}"
    )


def export_lm(
    src: Source, dest: Destination, *, format: Literal["reference", "transformer-lens"] = "reference"
) -> None:
    """Write a model's folder as one file with the names of another library.

    Args:
        src: folder or name of the model, such as `mini`.
        dest: file to write, .pt or .safetensors.
        format: whose names: the reference's, or TransformerLens's, with its configuration beside the file (.json).
    """
    from safetensors.numpy import save

    from tinymodel_jax.io.artifacts import load_model
    from tinymodel_jax.io.convert import export_model
    from tinymodel_jax.io.formats.transformer_lens import to_transformer_lens, write_config
    from tinymodel_jax.io.torch_files import save_torch_file
    from tinymodel_jax.runtime.atomic_files import replace_file

    if dest.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{dest}: the name of the file must end in .pt or .safetensors.")
    if src.is_file():
        raise ValueError(f"{src} is a file; convert it to a folder with 'lm' first.")
    files = load_model(str(src))
    fields = None
    if format == "reference":
        state = export_model(files.config, files.params)
    else:
        fields, state = to_transformer_lens(files.config, files.params)
    dest.parent.mkdir(parents=True, exist_ok=True)
    if fields is not None:
        write_config(fields, dest)
    if dest.suffix == ".pt":
        save_torch_file(state, dest)
    else:
        replace_file(dest, save(state))
    print(f"{dest}: {len(state)} tensors, {sum(array.nbytes for array in state.values()) / 1e6:.1f} MB")


def inspect(src: Source, *, json: bool = False) -> None:
    """Show what is in a PyTorch or safetensors file, without running code in it.

    Args:
        src: any .pt or .safetensors file.
        json: print one JSON object.
    """
    summary = _summary(_local(src))
    if json:
        tensors = [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "is_view": t.is_view} for t in summary.tensors
        ]
        print_json(
            {
                "form": summary.form,
                "file_bytes": summary.file_bytes,
                "globals": list(summary.globals),
                "refused": list(summary.refused),
                "tensors": tensors,
            }
        )
        return
    print(f"{src}: {summary.form} format, {summary.file_bytes:,} bytes")
    print(f"pickle globals: {', '.join(summary.globals) or 'none'}")
    if summary.refused:
        print(f"refused, so it will not be loaded: {', '.join(summary.refused)}")
    for tensor in summary.tensors:
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        print(f"  {tensor.name:44} {tensor.dtype:10} {shape}{'  (view)' if tensor.is_view else ''}")


def _summary(src: Path) -> TorchFileSummary:
    """Return what is in a file; the form of a .safetensors file is `safetensors`."""
    from tinymodel_jax.io.torch_files import TensorEntry, TorchFileSummary, describe_torch_file

    if src.suffix != ".safetensors":
        return describe_torch_file(src)
    from tinymodel_jax.io.data_files import read_tensors  # loads JAX, which PyTorch files do without

    entries = (
        TensorEntry(name, array.shape, array.dtype.name, is_view=False) for name, array in read_tensors(src).items()
    )
    return TorchFileSummary("safetensors", src.stat().st_size, (), (), tuple(entries))


def _local(src: Path) -> Path:
    """Return a file on this machine; an address on the hub is downloaded."""
    from tinymodel_jax.io.hub.addresses import HubAddress, download

    address = HubAddress.of(src)
    return src if address is None else download(address, []).path


def _replaced(dest: Path) -> str:
    """Return what to print about an earlier conversion at DEST; refuse a folder of other files."""
    from tinymodel_jax.io.config_files import CONFIG_FILE

    found = sorted(path.name for path in dest.iterdir()) if dest.is_dir() else []
    if found and CONFIG_FILE not in found:
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise FileExistsError(f"{dest} holds {shown}, but no {CONFIG_FILE}. Nothing was written; choose another DEST.")
    return "; it replaces what was there" if found else ""  # writing refuses a configuration that is not ours


COMMANDS = {"lm": convert_lm, "dictionary": convert_dictionary, "export-lm": export_lm, "inspect": inspect}


if __name__ == "__main__":
    sys.exit(main())
