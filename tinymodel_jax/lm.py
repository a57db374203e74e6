"""`TinyModel`: a language model with its parameters, tokenizer and dictionaries, behind the seed's API.

A small façade over pure functions: it checks input, pads it to a few lengths so that few programs are compiled, and
calls functions that instances with equal configurations share. Computations never change it; `attach` adds a
dictionary, `splice` returns another model. Inside `jit`, `grad` or `vmap` its methods work unpadded and unchecked.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinymodel_jax.config import ModelConfig, dtype_name
from tinymodel_jax.dictionaries.dictionary import Dictionary, Indices, require_finite, resolve_indices
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io import artifacts
from tinymodel_jax.model.forward import HookedModel, Output, features, forward, mean_loss
from tinymodel_jax.model.generate import continue_prompts, strip_padding
from tinymodel_jax.model.hook_points import (
    Hook,
    as_names,
    hook_names,
    hook_width,
    position_axes,
    require_edits,
    require_hook_names,
)
from tinymodel_jax.model.interventions import Hooks, Splice, combine
from tinymodel_jax.model.padding import batch_of, bucket, check_tok_ids, cut, is_traced, pad_right
from tinymodel_jax.params import WeightViews, flatten, own_array, require_tree, unflatten
from tinymodel_jax.text.prompts_and_stories import prompt_ids

if TYPE_CHECKING:
    from tinymodel_jax.text.tokenizer import Tokenizer

COMPUTE_DTYPES = ("float32", "bfloat16")


class TinyModel(WeightViews):
    """A TinyModel language model; calling it gives log-probabilities.

    Args:
        name_or_path: a published name (`tiny_model`, `tiny_model_1_epoch`, `tiny_model_2L_1E`, `tiny_model_2L_3E`),
            `mini`, which comes with the package and needs no network, a
            folder written by `save_pretrained` or by a training run, or a file with the reference's names, `.pt` or
            `.safetensors`.
        n_heads: attention heads of a file; needed where its width is not the published 768.
        dtype: number format of the computation, `"float32"` or `"bfloat16"`; parameters are float32.

    Raises:
        FileNotFoundError: there is no such model; the message says what was tried and what would work.
        ValueError: the file or folder holds no model or an incomplete one, or `dtype` is another.
    """

    config: ModelConfig
    params: Mapping[str, Any]
    dictionaries: dict[str, Dictionary]
    """Tag -> dictionary, attached or loaded so far; `dictionary_tags` names those yet to be loaded, too."""

    def __init__(
        self,
        name_or_path: str | os.PathLike[str] = "tiny_model",
        *,
        n_heads: int | None = None,
        dtype: Any = "float32",
    ):
        dtype = _compute_dtype(dtype)
        files = artifacts.load_model(name_or_path, n_heads)
        config = dataclasses.replace(files.config, dtype=dtype, param_dtype="float32")
        self._set(config, unflatten(files.params), None)
        self._tokenizer_folder = files.directory
        self._own_dictionaries = files.dictionaries

    @classmethod
    def from_params(
        cls, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None = None
    ) -> TinyModel:
        """Build a model from a parameter tree, such as `Transformer(config).init(key, tok_ids)["params"]`.

        Raises:
            ValueError: an argument is of another type, the tree does not fit the configuration, the tokenizer has
                another vocabulary size, or the configuration's dtype is neither float32 nor bfloat16.
        """
        ModelConfig.require(config, "TinyModel.from_params")
        _compute_dtype(config.dtype)
        require_tree(params)
        artifacts.require_model_params(config, flatten(params))
        lm = cls.__new__(cls)
        lm._set(config, params, tokenizer)
        return lm

    def with_params(self, config: ModelConfig, params: Mapping[str, Any]) -> TinyModel:
        """Return a model of other parameters with this one's tokenizer, and without dictionaries.

        Raises:
            ValueError: as `from_params`.
        """
        lm = type(self).from_params(config, params, self._tokenizer)
        lm._tokenizer_folder = self._tokenizer_folder
        return lm

    def _set(self, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None) -> None:
        if tokenizer is not None:
            artifacts.require_vocabulary(tokenizer, config)
        self.config = config
        self.params = jax.tree.map(functools.partial(own_array, dtype=config.param_dtype), params)
        self.dictionaries = {}
        self._tokenizer = tokenizer
        self._tokenizer_folder: Path | None = None
        self._own_dictionaries: Mapping[str, Any] = {}
        self._splices: dict[str, tuple[Dictionary, dict[str, bool]]] = {}

    def __repr__(self) -> str:
        cfg = self.config
        spliced = f", spliced: {', '.join(self.spliced)}" if self._splices else ""
        return f"TinyModel({cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_params:,} parameters{spliced})"

    # Forward passes

    def __call__(self, tok_ids: Any) -> Float[Array, "batch seq d_vocab"]:
        """Return float32 log-probabilities of the next token.

        Args:
            tok_ids: integers (batch, seq), or (seq,) for a batch of one; right-padded rows need no mask.
        """
        return self._run(tok_ids, "logprobs", ())[0]

    def logits(self, tok_ids: Any) -> Float[Array, "batch seq d_vocab"]:
        """Return float32 logits."""
        return self._run(tok_ids, "logits", ())[0]

    def residual(self, tok_ids: Any, layer: int) -> Float[Array, "batch seq d_model"]:
        """Return the residual stream before block `layer`; `layer == n_layers` is what the unembedding reads.

        Raises:
            ValueError: `layer` is outside 0..n_layers.
        """
        n_layers = self.config.n_layers
        if not isinstance(layer, int | np.integer) or layer not in range(n_layers + 1):
            raise ValueError(f"residual: layer {layer!r} is outside 0..{n_layers} ({n_layers} is the final residual).")
        if layer == n_layers:
            name, model = f"blocks.{n_layers - 1}.hook_resid_post", self.hooked()
        else:
            site = Site("Ra", layer)
            name, model = site.hook_in, self.hooked(before=site)
        return self._run(tok_ids, "none", (name,), model)[1][name]

    def loss(self, tok_ids: Any, attn_mask: Any = None) -> Float[Array, ""]:
        """Return the mean next-token cross-entropy in nats; `[PAD]` is never a target.

        Args:
            attn_mask: (batch, seq), 1 where the token counts as a target. Left out, it is the tokenizer's second
                output, which is 0 at `[END]` and `[PAD]`; to count `[END]`, as `evaluate` does, pass
                `tok_ids != lm.config.pad_id`.

        Raises:
            ValueError: the mask has another shape, or no token counts.
        """
        ids, length = self._prepare(tok_ids)
        given = ids[:, :length]
        mask = (given != self.config.end_id) if attn_mask is None else attn_mask
        mask = mask if is_traced(mask) else np.asarray(mask)
        mask = mask[None] if mask.ndim == np.ndim(tok_ids) == 1 else mask
        if mask.shape != (ids.shape[0], length):
            raise ValueError(f"attn_mask has shape {mask.shape}, tok_ids {(ids.shape[0], length)}; they must agree.")
        where = jnp.where if is_traced(given, mask) else np.where
        mask = where(given != self.config.pad_id, mask, np.zeros((), mask.dtype))
        if not is_traced(mask) and not np.any(mask[:, 1:]):
            raise ValueError(
                "loss: no token to predict; it takes at least two tokens a row, and a mask that is not all 0."
            )
        pad = jnp.pad if is_traced(mask) else np.pad  # outside of a trace, jnp.pad is a program for every length
        weights = pad(mask, ((0, 0), (0, ids.shape[1] - length))).astype(np.float32)
        return mean_loss(self.hooked(), ids, weights)

    def run_with_cache(
        self, tok_ids: Any, names: str | Iterable[str] | None = None
    ) -> tuple[Float[Array, "batch seq d_vocab"], dict[str, Array]]:
        """Return log-probabilities and the activations at hook points (all of them when `names` is None).

        Raises:
            ValueError: a name is no hook point; the closest are listed.
        """
        keep = hook_names(self.config) if names is None else as_names(names)
        require_hook_names(keep, self.config)
        return self._run(tok_ids, "logprobs", keep)

    def run_with_hooks(
        self, tok_ids: Any, hooks: Mapping[str, Hook], keep: str | Iterable[str] = ()
    ) -> tuple[Float[Array, "batch seq d_vocab"], dict[str, Array]]:
        """Return log-probabilities and kept activations of a pass with edits.

        Args:
            hooks: hook name -> edit. Edits of `tinymodel_jax.interventions` run compiled, once per kind of edit; plain
                functions `(value, acts) -> value` run operation by operation and are called anew on every call.
            keep: hook names, or one, whose values, after their edit, come back.

        Raises:
            ValueError: a name is no hook point, a hook is no edit, or an edit does not fit the value there.
        """
        keep = as_names(keep)
        require_edits(hooks)
        require_hook_names((*hooks, *keep), self.config)
        ids = batch_of(tok_ids, self.config)
        model = self.hooked().with_hooks(hooks)
        if _is_array_tree(model.hooks):
            logprobs, acts = forward(model, jnp.asarray(ids), keep=keep)
        else:
            logits, acts = model.run(jnp.asarray(ids), keep)
            logprobs = jax.nn.log_softmax(logits)
        return logprobs, {name: acts[name] for name in keep}  # compiled functions sort the names

    def _run(
        self, tok_ids: Any, output: Output, keep: tuple[str, ...], model: HookedModel | None = None
    ) -> tuple[Any, dict[str, Array]]:
        ids, length = self._prepare(tok_ids)
        value, acts = forward(self.hooked() if model is None else model, ids, keep=keep, output=output)
        value = None if value is None else cut(value, (1,), length)
        return value, {name: cut(acts[name], position_axes(name), length) for name in keep}

    def _prepare(self, tok_ids: Any) -> tuple[Any, int]:
        """Return ids padded to a compiled length, and their own length."""
        ids = batch_of(tok_ids, self.config)
        length = ids.shape[1]
        if is_traced(ids):
            return ids, length
        return pad_right(ids, bucket(length, self.config.n_ctx), self.config.pad_id), length

    # Dictionaries

    @property
    def dictionary_tags(self) -> tuple[str, ...]:
        """Tags of the dictionaries that are attached or came with the model, in the order of the forward pass.

        Those that came with it are loaded when they are used. Published ones, which any tag may fetch, are not listed.
        """
        tags = {*self._own_dictionaries, *self.dictionaries}
        return tuple(sorted(tags, key=lambda tag: Site.parse(tag)[0].order))

    def __getitem__(self, tag: str) -> FeatureReader:
        """Return the activations of a dictionary, or of one of its features, as a function of token ids.

        `lm["M2"](tok_ids)` is (batch, seq, n_features), `lm["M1N123"](tok_ids)` is (batch, seq). The dictionary is the
        attached one, else the model's own, else the published default, which is loaded once.

        Raises:
            ValueError: the tag is none, its layer or feature does not exist, or the site has no dictionary.
        """
        site, feature = self._site(tag)
        dictionary = self._dictionary(site)
        if feature is not None:
            resolve_indices(feature, dictionary.config.n_features)
        return FeatureReader(self, site, dictionary, feature)

    def attach(self, tag: str, dictionary: Dictionary | str | os.PathLike[str]) -> None:
        """Put a dictionary at a site, for `lm[tag]` and `splice`.

        Args:
            dictionary: folder of `save_pretrained`, which says for which hook points it was made; a file with the
                reference's names, which does not; or a Dictionary, which goes where you put it.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: the tag is none, the folder is for another site, the widths do not fit, or a parameter is not
                finite.
        """
        site, feature = self._site(tag)
        if feature is not None:
            raise ValueError(f"attach: {tag!r} names a feature; name the site, {site.tag!r}.")
        if isinstance(dictionary, Dictionary):
            require_finite(dictionary.params, f"attach: the dictionary for {site.tag}")
        else:
            dictionary = Dictionary.from_pretrained(dictionary, site.tag)
        config = artifacts.config_at(dictionary.config, site)
        for name, hook, width in (("d_in", config.hook_in, config.d_in), ("d_out", config.hook_out, config.d_out)):
            expected = hook_width(hook, self.config)
            if width != expected:
                raise ValueError(
                    f"attach: the dictionary has {name}={width}, "
                    f"but {hook} ({site.tag}) is {expected} wide in this model."
                )
        self.dictionaries[site.tag] = Dictionary.from_params(config, dictionary.params)

    def splice(
        self,
        tags: str | Iterable[str],
        include_error: bool = False,
        detach_error: bool = True,
        detach_pred: bool = False,
    ) -> TinyModel:
        """Return a model whose forward pass runs through the dictionaries at these sites; this one is unchanged.

        Dictionaries act in the order of the forward pass; a site that was spliced before takes the new switches.

        Args:
            include_error: add the reconstruction error back: values stay, gradients flow through the dictionary.
            detach_error: let no gradient through the error.
            detach_pred: let no gradient through the prediction.
        """
        lm = type(self).__new__(type(self))
        lm.__dict__.update(self.__dict__)
        switches = {"include_error": include_error, "detach_error": detach_error, "detach_pred": detach_pred}
        splices = dict(self._splices)
        for tag in as_names(tags):
            site, feature = self._site(tag)
            if feature is not None:
                raise ValueError(f"splice: {tag!r} names a feature; a whole dictionary is spliced, {site.tag!r}.")
            splices[site.tag] = self._dictionary(site), switches
        lm._splices = dict(sorted(splices.items(), key=lambda item: Site.parse(item[0])[0].order))
        lm.dictionaries = dict(self.dictionaries)
        return lm

    @property
    def spliced(self) -> tuple[str, ...]:
        """Tags of the dictionaries that the forward pass runs through, in its order."""
        return tuple(self._splices)

    def hooked(self, before: Site | None = None) -> HookedModel:
        """Return the model as it runs, spliced dictionaries included, for functions that run it themselves.

        Args:
            before: leave out the dictionaries that act when this site is read, or later.
        """
        edits = []
        for tag, (dictionary, switches) in self._splices.items():
            if before is None or Site.parse(tag)[0].order < before.order:
                edit = Splice(dictionary.params, config=dictionary.config, **switches)
                edits.append({dictionary.config.hook_out: edit})
        return HookedModel(self.params, self.config, combine(*edits))

    def _site(self, tag: str) -> tuple[Site, int | None]:
        site, feature = Site.parse(tag)
        if site.layer >= self.config.n_layers:
            raise ValueError(
                f"{tag!r}: layer {site.layer} does not exist; the layers are 0..{self.config.n_layers - 1}."
            )
        return site, feature

    def _dictionary(self, site: Site) -> Dictionary:
        if site.tag not in self.dictionaries:
            own = self._own_dictionaries.get(site.tag)
            if own is None and not self._has_published_sizes:
                has = ", ".join(self.dictionary_tags) or "none"
                raise ValueError(
                    f"{site.tag!r}: this model has no dictionary there (it has: {has}), and the published ones fit the "
                    f"published sizes only. Give one: lm.attach({site.tag!r}, path); on the command line, "
                    "--dictionary PATH is that of --site, and tinymodel eval takes --dictionaries."
                )
            if isinstance(own, Dictionary):
                self.attach(site.tag, own)
            else:
                self.attach(site.tag, Dictionary.from_pretrained(site.tag if own is None else own, site.tag))
        return self.dictionaries[site.tag]

    @property
    def _has_published_sizes(self) -> bool:
        """Whether the model has the sizes of the one that the published dictionaries were trained on."""
        return (self.config.n_layers, self.config.d_model, self.config.d_vocab) == (4, 768, 10_000)

    # Text

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer: its own, else the default one for the published vocabulary of 10,000.

        Raises:
            ValueError: the model has none.
        """
        if self._tokenizer is None:
            from tinymodel_jax.io.default_tokenizer import default_tokenizer, saved_tokenizer

            found = saved_tokenizer(self._tokenizer_folder)
            if found is None and self.config.d_vocab != 10_000:
                raise ValueError(
                    f"this model has no tokenizer, and the default one has 10,000 ids, not {self.config.d_vocab}. "
                    "Use token ids (generate_ids), or TinyModel.from_params(config, params, tokenizer)."
                )
            found = default_tokenizer() if found is None else found
            artifacts.require_vocabulary(found, self.config)
            self._tokenizer = found
        return self._tokenizer

    def generate(
        self,
        prompt: str | Sequence[str],
        n_toks: int = 50,
        temperature: float = 0.8,
        break_on_end: bool = True,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> str | list[str]:
        """Continue a prompt, or several in one batch; return prompts and continuations as text.

        Args:
            prompt: text, which gets `[BEGIN]` in front unless it has it; it may hold no other special token, so that a
                story that ended has to lose its `[END]` to be continued.
            n_toks: tokens to add at most; a row also stops where the context is full.
            temperature: divides the logits; 0 takes the most likely token.
            break_on_end: stop a row at `[END]`, which stays in the text.
            top_k: sample from the k most likely tokens only.
            top_p: sample from the fewest tokens whose probabilities reach this sum.
            seed: of the random draws, 0 to 2**32 - 1; a batch's rows draw differently.

        Raises:
            ValueError: a prompt is longer than the context or no text, holds `[END]`, `[PAD]` or a second `[BEGIN]`, or
                an option is out of range.
        """
        if not isinstance(prompt, Iterable):
            raise ValueError(f"generate takes a text or a list of texts, got {prompt!r:.80}.")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            return []
        rows = [prompt_ids(self.tokenizer, text) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.config.n_ctx:
                raise ValueError(
                    f"the prompt {text[:30]!r}… has {len(row)} tokens with [BEGIN]; the context is {self.config.n_ctx}."
                )
        width = max(map(len, rows))
        ids = np.array([row + [self.config.pad_id] * (width - len(row)) for row in rows], np.int32).reshape(-1, width)
        out = self.generate_ids(ids, n_toks, temperature, break_on_end, top_k=top_k, top_p=top_p, seed=seed)
        stories = [str(self.tokenizer.decode(strip_padding(row, self.config.pad_id)[1:])) for row in out]
        return stories[0] if isinstance(prompt, str) else stories

    def generate_ids(
        self,
        tok_ids: Any,
        n_toks: int = 50,
        temperature: float = 0.8,
        break_on_end: bool = True,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Continue rows of token ids; return int32 (batch, prompt + generated), padded with `[PAD]` after each row.

        Rows may be right-padded with `[PAD]`: each is continued where its own tokens end, so that a `[PAD]` at the end
        of a prompt is never a token of it. One that ends with `[END]`, as the tokenizer ends shorter rows, is finished
        unless `break_on_end=False`. Options as `generate`.
        """
        ids = check_tok_ids(tok_ids, self.config)
        end_id = self.config.end_id if break_on_end else None
        return continue_prompts(self.hooked(), ids, n_toks, temperature, end_id, top_k, top_p, seed)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors`, the tokenizer's files if there is one, and the dictionaries.

        Dictionaries that came with the model are saved too, used or not. `TinyModel(directory)` loads it. Splices are
        not saved.
        """
        for tag in self._own_dictionaries:
            self._dictionary(Site.parse(tag)[0])
        from tinymodel_jax.io.default_tokenizer import saved_tokenizer

        tokenizer = self._tokenizer or saved_tokenizer(self._tokenizer_folder)
        artifacts.save_model(self.config, flatten(self.params), directory, tokenizer, self.dictionaries)


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that `jax.jit(lm["M2"])` works
class FeatureReader:
    """The activations at one site as a function of token ids: what `lm[tag]` returns."""

    lm: TinyModel
    site: Site
    dictionary: Dictionary
    feature: int | None
    """The one feature that the tag names; None for all."""

    @classmethod
    def of(cls, lm: TinyModel, dictionary: Dictionary) -> FeatureReader:
        """Return the reader of a dictionary at its own site, whatever the model has there.

        Raises:
            ValueError: it does not fit the model.
        """
        tag = Site.at(dictionary.config.hook_in, dictionary.config.hook_out).tag
        holder = lm.splice([])  # attaching checks layer and width; the model's own stay what they are
        holder.attach(tag, dictionary)
        return holder[tag]

    def __call__(self, tok_ids: Any, indices: Indices = None) -> Array:
        """Return activations (batch, seq, n_features), only the columns of `indices` if given.

        Args:
            indices: an int (drops the last axis), a list or a slice; by default all, or the feature that the tag names.

        Raises:
            ValueError: an index is out of range, the tag names a feature, or `tok_ids` are not valid for the model.
        """
        config, tag = self.dictionary.config, self.site.tag
        if self.feature is not None and indices is not None:
            raise ValueError(
                f"'{tag}N{self.feature}' is one feature; indices={indices!r:.80} belong to the whole dictionary: "
                f"lm[{tag!r}](tok_ids, indices=…)."
            )
        chosen = resolve_indices(self.feature if indices is None else indices, config.n_features)
        ids, length = self.lm._prepare(tok_ids)
        acts = features(self.lm.hooked(before=self.site), self.dictionary.params, ids, chosen, dictionary_config=config)
        return cut(acts, (1,), length)


def _compute_dtype(dtype: Any) -> str:
    name = dtype_name(dtype)
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"dtype {name!r}: a TinyModel computes in {' or '.join(COMPUTE_DTYPES)}.")
    return name


def _is_array_tree(hooks: Hooks) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float) for leaf in jax.tree.leaves(hooks))
