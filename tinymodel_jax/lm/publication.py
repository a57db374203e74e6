"""`lm.push_to_hub`: a model's folder, with its card, in a repository on the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.io.hub.addresses import HubAddress

if TYPE_CHECKING:
    from tinymodel_jax.lm.tiny_model import TinyModel


def push_to_hub(lm: TinyModel, address: str, *, license: str | None = None, private: bool | None = None) -> str:
    """Upload what `save_pretrained` writes, and a card, in one commit; return its address.

    `TinyModel` of the address that is returned loads exactly this upload.

    Args:
        address: OWNER/NAME, with /PATH for a folder of the repository and @BRANCH for another branch than main. The
            repository and the branch are created if they do not exist.
        license: the model's licence for the card, in the hub's spelling, such as "mit"; None states none.
        private: whether a new repository is private; None takes the owner's default.

    Raises:
        ModuleNotFoundError: `huggingface_hub` is not installed.
        OSError: the upload failed, and changed no file; the message says how to go on.
        ValueError: it is not an address, or the repository has other files there, or is public and not to be.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> lm.push_to_hub("me/my-model", license="mit")  # doctest: +SKIP
    """
    from tinymodel_jax.io.hub import cards, upload  # the network part loads when it is needed

    place = HubAddress.parse(address)
    with tempfile.TemporaryDirectory() as folder:
        lm.save_pretrained(folder)
        configs = {tag: lm[tag].dictionary.config for tag in lm.dictionary_tags}
        files = upload.files_in(Path(folder))
        card = cards.model_card(place, lm.config, configs, "tokenizer.json" in files, license=license)
        return upload.push(place, files, {"": card}, private)
