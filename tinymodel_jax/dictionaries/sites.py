"""Sites, where a dictionary can be attached to a model, and the grammar of their tags.

`M1` names a kind and a layer, `M1N123` also a feature, and `M1_S-2_R1_P0` a published file. Any other hook point of a
block is a site by its name: `blocks.1.attn.hook_z`, `blocks.1.attn.hook_zN123`; an SAE reads and replaces its value.
Several sites of one kind of dictionary, joined by "+" in the order of the forward pass, are a site as well: `Ra0+Ra1`
is that of a crosscoder, `M0+M1+M2+M3` that of a cross-layer transcoder.
Parsing does not check whether the layer and the feature exist; callers with a model or a dictionary do, for the layer
with `require_layer`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tinymodel_jax.block_order import BLOCK_HOOKS, forward_order
from tinymodel_jax.config import ModelConfig, split_hooks


class SiteKind(NamedTuple):
    """What a kind of dictionary reads and predicts, and where its published files are."""

    reads: str
    predicts: str
    folders: tuple[str, ...]
    meaning: str


KINDS: dict[str, SiteKind] = {
    "Ra": SiteKind(
        "hook_resid_pre", "hook_resid_pre", ("res_pre_attn",), "SAE on the residual stream before attention"
    ),
    "A": SiteKind("hook_attn_out", "hook_attn_out", ("attn", "attn_test"), "SAE on the attention output"),
    "Rm": SiteKind("hook_resid_mid", "hook_resid_mid", ("res_pre_mlp",), "SAE on the residual stream before the MLP"),
    "T": SiteKind("hook_mlp_in", "hook_mlp_out", ("mlp_map_test",), "transcoder of the MLP (M's published twin)"),
    "M": SiteKind("hook_mlp_in", "hook_mlp_out", ("mlp", "mlp_map_test"), "transcoder of the MLP"),
    "Mo": SiteKind("hook_mlp_out", "hook_mlp_out", ("mlp_out", "small_mlp_out"), "SAE on the MLP output"),
}
"""The kinds, in the order of a block's forward pass (Source: the reference's TransformerBlock)."""

_DEFAULT_FILES = {
    "M": ("mlp/M0_S-2_R1_P0", "mlp/M1_S-2_R1_P0", "mlp/M2_S-2_R1_P0", "mlp/M3_S-1_B0_P0"),
    "T": tuple(f"mlp_map_test/M{layer}_S-3_R1_P0" for layer in range(4)),
    "A": ("attn/A0_S-1_R1_P0", "attn/A1_S-1_R1_P0", "attn/A2_S-3_R1_P0", "attn/A3_S-3_R1_P0"),
    "Ra": tuple(f"res_pre_attn/Ra{layer}_S-3_R1_P0" for layer in range(4)),
    "Rm": tuple(f"res_pre_mlp/Rm{layer}_S-3_R1_P0" for layer in range(4)),
}

NO_SITE = frozenset({"x", "y"})
"""Hook points of dictionaries trained on arrays, which have no site until they are attached."""

HOOKS = tuple(hook for hook in BLOCK_HOOKS if not hook.endswith(("hook_attn_scores", "hook_pattern")))
"""Hook points of a block that are sites by their name: all but scores and pattern, whose last axis is a position."""
_KIND_OF_HOOK = {kind.reads: name for name, kind in KINDS.items() if kind.reads == kind.predicts}

_JOINT = re.compile(r"\+(?=[^0-9])")
"""Between joined sites; a "+" before a digit separates a feature from its site, as any character may."""
_TAG = re.compile(
    r"(?:(?P<kind>Ra|Rm|Mo|M|T|A)(?P<layer>[0-9]{1,9})(?P<suffix>_S[-0-9]+.{0,6}_P[0-9]+)?"
    rf"|blocks\.(?P<block>[0-9]{{1,9}})\.(?P<hook>{'|'.join(map(re.escape, HOOKS))}))"
    r"([^0-9](?P<feature>[0-9]{1,9}))?"
)


@dataclass(frozen=True)
class Site:
    """Where a dictionary is attached: a kind (`A M T Mo Ra Rm`) and a layer, and optionally one published file.

    Examples:
        >>> from tinymodel_jax import Site
        >>> site, feature = Site.parse("M2N304")
        >>> site.hook_in, site.hook_out, feature
        ('blocks.2.hook_mlp_in', 'blocks.2.hook_mlp_out', 304)
        >>> site.meaning
        'transcoder of the MLP, layer 2'
    """

    kind: str
    """Key of `KINDS`, or a hook point of a block that none of them is an SAE of, such as `attn.hook_z`; "+" if the site
    joins others."""
    layer: int
    """Block, counted from 0; the last one of joined sites."""
    suffix: str = ""
    """Rest of a published file's stem (`_S-2_R1_P0`); empty for the site itself."""
    joined: tuple[Site, ...] = ()
    """The sites that a crosscoder or cross-layer transcoder joins, in the order of the forward pass."""

    @staticmethod
    def parse(tag: str) -> tuple[Site, int | None]:
        """Split a tag into its site and its feature (None if it names none).

        Examples: `M1`, `M1N123`, `M0_S-3_R1_P0`, `A2_S-3_R1_P0N12`, `blocks.1.attn.hook_zN12`, `Ra0+Ra1N12`. Any
        character except a digit may replace the N. The name of a hook point that has a kind is that kind:
        `blocks.1.hook_resid_pre` is `Ra1`.

        Raises:
            ValueError: the text is not a tag; the message names the closest ones.
        """
        parts = _JOINT.split(tag) if isinstance(tag, str) and tag.isprintable() else []
        if len(parts) > 1 and all(map(_TAG.fullmatch, parts)):
            sites, features = zip(*map(Site.parse, parts), strict=True)
            if any(feature is not None for feature in features[:-1]):
                raise ValueError(f"{tag!r:.80} names a feature before its end; features of joined sites come last.")
            return Site.join(sites), features[-1]
        match = _TAG.fullmatch(tag) if isinstance(tag, str) and tag.isprintable() else None
        if match is None:
            close = f" Closest: {', '.join(_closest(tag))}." if isinstance(tag, str) else ""
            raise ValueError(
                f"{tag!r:.80} is not a dictionary tag, such as 'M1' or 'Ra0N12'.{close} "
                "All: docs/concepts/sites-and-tags.md."
            )
        feature = match["feature"]
        if match["hook"] is None:
            site = Site(match["kind"], int(match["layer"]), match["suffix"] or "")
        else:
            site = Site(_KIND_OF_HOOK.get(match["hook"], match["hook"]), int(match["block"]))
        return site, None if feature is None else int(feature)

    @staticmethod
    def whole(tag: str, asker: str = "") -> Site:
        """Return the site of a tag that names a whole dictionary, not one of its features.

        Args:
            asker: start of the error message: the function or option that received the tag, such as `attach: `.

        Raises:
            ValueError: the text is not a tag, or names a feature.
        """
        site, feature = Site.parse(tag)
        if feature is not None:
            raise ValueError(f"{asker}{tag!r} names a feature; name the site, {site.tag!r}.")
        return site

    @staticmethod
    def join(sites: Sequence[Site]) -> Site:
        """Return the site of a crosscoder of several SAEs' sites, or of a cross-layer transcoder of several MLPs.

        Raises:
            ValueError: they are not two or more of one of these, each once, in the order of the forward pass.
        """
        found, tag = tuple(sites), "+".join(site.tag for site in sites)
        saes = [site.hook_in == site.hook_out for site in found]
        if any(site.suffix or site.joined for site in found) or len(set(saes)) != 1:
            raise ValueError(
                f"{tag!r:.80} joins sites of different kinds; join SAEs' sites, as in 'Ra0+Ra1', or MLPs', as in "
                "'M0+M1'."
            )
        orders = [forward_order(site.hook_out) for site in found]
        if any(one >= other for one, other in itertools.pairwise(orders)):
            raise ValueError(f"{tag!r:.80}: name each site once, in the order of the forward pass.")
        return Site("+", found[-1].layer, joined=found)

    @staticmethod
    def at(hook_in: str, hook_out: str) -> Site:
        """Return the site of a dictionary with these hook points; for a transcoder of an MLP, `M` rather than `T`.

        Raises:
            ValueError: no kind of site has these hook points.
        """
        require_site(hook_in, hook_out)
        ins, outs = split_hooks(hook_in), split_hooks(hook_out)
        if len(ins) == len(outs) > 1:
            return Site.join([Site.at(*pair) for pair in zip(ins, outs, strict=True)])
        if hook_in == hook_out:
            return Site.whole(hook_in)
        for layer, kind in itertools.product(re.findall(r"^blocks\.([0-9]{1,9})\.", hook_in), ("M", "T")):
            site = Site(kind, int(layer))
            if (site.hook_in, site.hook_out) == (hook_in, hook_out):
                return site
        raise ValueError(
            f"there is no site for a dictionary from {hook_in!r} to {hook_out!r}; the kinds are {', '.join(KINDS)}."
        )

    @property
    def tag(self) -> str:
        """The site's tag, without a feature."""
        if self.joined:
            return "+".join(site.tag for site in self.joined)
        return f"{self.kind}{self.layer}{self.suffix}" if self.kind in KINDS else self.hook_in

    @property
    def parts(self) -> tuple[Site, ...]:
        """The sites that it joins, or itself."""
        return self.joined or (self,)

    @property
    def hook_in(self) -> str:
        """Hook point that the dictionary reads, or several joined by "+"."""
        if self.joined:
            return "+".join(site.hook_in for site in self.joined)
        return f"blocks.{self.layer}.{self._of_kind.reads}"

    @property
    def hook_out(self) -> str:
        """Hook point that the dictionary predicts, and replaces when spliced in, or several joined by "+"."""
        if self.joined:
            return "+".join(site.hook_out for site in self.joined)
        return f"blocks.{self.layer}.{self._of_kind.predicts}"

    @property
    def is_crosscoder(self) -> bool:
        """Whether it joins the sites of SAEs."""
        return bool(self.joined) and self.hook_in == self.hook_out

    @property
    def meaning(self) -> str:
        """What a dictionary at the site is, in words."""
        if self.joined:
            what = "crosscoder" if self.is_crosscoder else "cross-layer transcoder"
            return f"{what} of {', '.join(site.tag for site in self.joined)}"
        return f"{self._of_kind.meaning}, layer {self.layer}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: the order in which the forward pass meets what the dictionaries replace, or the last part of it."""
        if self.joined:
            return self.joined[-1].order
        return *forward_order(self.hook_out), list(KINDS).index(self.kind) if self.kind in KINDS else 0

    @property
    def _of_kind(self) -> SiteKind:
        return KINDS.get(self.kind) or SiteKind(self.kind, self.kind, (), f"SAE on {self.kind}")

    def published_files(self) -> tuple[str, ...]:
        """Return the published files (hub paths without `.pt`) of the tag, preferred ones first; () if it has none."""
        if self.suffix:
            # The twins of M are published under M's letter.
            letter = "M" if self.kind == "T" else self.kind
            return tuple(f"{folder}/{letter}{self.layer}{self.suffix}" for folder in KINDS[self.kind].folders)
        files = _DEFAULT_FILES.get(self.kind, ())
        return files[self.layer : self.layer + 1]


def _closest(text: str) -> list[str]:
    """Return tags that are like a text, in its layer if it holds a number."""
    layer = (re.findall("[0-9]+", text[:80]) or ["0"])[0]
    tags = [f"{kind}{layer}" for kind in KINDS] + [f"blocks.{layer}.{hook}" for hook in HOOKS]
    of_lower = {tag.lower(): tag for tag in tags}
    close = difflib.get_close_matches(text[:80].lower(), of_lower, cutoff=0.3)
    return [of_lower[tag] for tag in close] or tags[:3]


def require_site(hook_in: str, hook_out: str) -> None:
    """Check that a dictionary's hook points belong to a model.

    Raises:
        ValueError: the dictionary was trained on arrays.
    """
    if {*split_hooks(hook_in), *split_hooks(hook_out)} <= NO_SITE:
        raise ValueError(
            "this dictionary has no site yet: it was trained on arrays. Attach it to the site whose activations it was "
            "trained on, for example lm.attach('M2', dictionary), then use lm['M2'].dictionary."
        )


def require_layer(site: Site, config: ModelConfig, asker: str = "") -> None:
    """Check that a model has the site's layer.

    Args:
        asker: start of the error message, as in `Site.whole`.

    Raises:
        ValueError: it does not.
    """
    if site.layer >= config.n_layers:
        raise ValueError(
            f"{asker}{site.tag!r}: layer {site.layer} does not exist; the layers are 0..{config.n_layers - 1}."
        )
