"""`TinyModel`: a language model with its parameters, tokenizer and dictionaries.

A small façade over pure functions. It checks token ids, pads them to one of a few lengths so that few programs are
compiled, and calls compiled functions that all models with the same configuration share. `attach` adds a dictionary to
the model, `splice` returns another model, and everything else leaves the model unchanged. Inside `jit`, `grad` and
`vmap` the methods neither pad nor check values.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinymodel_jax.block_order import final_stream
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary, resolve_indices
from tinymodel_jax.dictionaries.readers import Reader
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io import artifacts
from tinymodel_jax.io.default_tokenizer import saved_tokenizer, tokenizer_of_model
from tinymodel_jax.io.formats import transformer_lens
from tinymodel_jax.lm import generation, publication, text
from tinymodel_jax.lm.dictionaries import FeatureReader, ModelDictionaries
from tinymodel_jax.model.edits import can_be_padded, pad_edits
from tinymodel_jax.model.forward import HookedModel, Output, forward, mean_loss, token_losses
from tinymodel_jax.model.hook_points import (
    Hook,
    Names,
    as_names,
    chosen_names,
    hook_names,
    position_axes,
    require_edits,
    require_hook_names,
)
from tinymodel_jax.model.padding import batch_of, bucket, cut, is_traced, pad_right, target_weights
from tinymodel_jax.number_formats import compute_dtype
from tinymodel_jax.params import WeightViews, flatten, own_array, require_tree, unflatten

if TYPE_CHECKING:
    from tinymodel_jax.text.tokenizer import Tokenizer


class TinyModel(WeightViews):
    """A TinyModel language model; calling it gives log-probabilities.

    Args:
        name_or_path: a published name (`tiny_model`, `tiny_model_1_epoch`, `tiny_model_2L_1E`, `tiny_model_2L_3E`),
            `mini`, which comes with the package and needs no network, a folder written by `save_pretrained` or by a
            training run, a `.pt` or `.safetensors` file with the reference's names or TransformerLens's, or any of
            these on the hub: `hub:OWNER/NAME`, with `/PATH` and `@REVISION` where needed.
        n_heads: number of attention heads, for a file whose width is not the published 768.
        dtype: number format of the computation, `"float32"` or `"bfloat16"`; parameters are float32.

    Raises:
        FileNotFoundError: the model was not found; the message says what was tried and what would work.
        ValueError: the file or folder does not hold a complete model, or `dtype` is not supported.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> lm = TinyModel("mini")
        >>> logprobs = lm("The dog ran to the")
        >>> logprobs.shape
        (1, 6, 1024)
        >>> lm.to_string(logprobs[0, -1].argmax().item())
        ' woods'
    """

    config: ModelConfig
    """Shape and number formats."""
    params: Mapping[str, Any]
    """Parameter tree, float32; `W_E`, `W_Q` and so on are views of it with the layers stacked."""

    def __init__(
        self, name_or_path: str | os.PathLike[str] = "tiny_model", *, n_heads: int | None = None, dtype: Any = "float32"
    ):
        dtype = compute_dtype(dtype)
        files = artifacts.load_model(name_or_path, n_heads)
        config = dataclasses.replace(files.config, dtype=dtype, param_dtype="float32")
        dictionaries = ModelDictionaries(config, files.dictionaries)
        self._fill(config, _arrays(unflatten(files.params), config), files.directory, dictionaries)

    @classmethod
    def from_params(
        cls, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer | None = None
    ) -> TinyModel:
        """Build a model from a parameter tree, such as `Transformer(config).init(key, tok_ids)["params"]`.

        Args:
            tokenizer: tokenizer of the ids; None takes the published one if the vocabulary has 10,000 ids.

        Raises:
            ValueError: an argument has the wrong type, the tree does not fit the configuration, the tokenizer's
                vocabulary size differs, or the configuration's dtype is neither float32 nor bfloat16.

        Examples:
            >>> import jax, jax.numpy as jnp
            >>> from tinymodel_jax import ModelConfig, TinyModel, Transformer
            >>> config = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=32, n_ctx=8, d_vocab=32)
            >>> variables = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
            >>> TinyModel.from_params(config, variables["params"])([[1, 2, 3]]).shape
            (1, 3, 32)
        """
        return cls._of(config, _checked_arrays(params, config), tokenizer, ModelDictionaries(config))

    @classmethod
    def from_transformer_lens(
        cls, config: Mapping[str, Any], state: Mapping[str, Any], tokenizer: Tokenizer | None = None
    ) -> TinyModel:
        """Build a model from a `HookedTransformer`: its `cfg.to_dict()` and its `state_dict()`.

        Args:
            config: `HookedTransformer.cfg.to_dict()`.
            state: NumPy arrays, or PyTorch tensors on the CPU; TransformerLens 4 gives it as `tl_parameters()`.
            tokenizer: as for `from_params`.

        Raises:
            ValueError: it has layer norm, another activation function or anything else that a TinyModel cannot
                represent, which the message names; or as `from_params`.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> config, state = lm.to_hooked_transformer_state_dict()
            >>> TinyModel.from_transformer_lens(config, state).config == lm.config
            True
        """
        found, params = transformer_lens.from_transformer_lens(config, state)
        return cls.from_params(found, unflatten(params), tokenizer)

    def with_params(self, config: ModelConfig, params: Mapping[str, Any]) -> TinyModel:
        """Return a model with these parameters and this model's tokenizer, without dictionaries.

        Raises:
            ValueError: as `from_params`.

        Examples:
            >>> import jax
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> half = lm.with_params(lm.config, jax.tree.map(lambda leaf: leaf / 2, lm.params))
            >>> half.dictionary_tags, bool((half.W_E == lm.W_E / 2).all())
            ((), True)
        """
        return self._of(config, _checked_arrays(params, config), self._tokenizer, ModelDictionaries(config))

    @classmethod
    def _of(cls, *parts: Any) -> TinyModel:
        """Build a model from the arguments of `_fill`, without loading anything."""
        lm = cls.__new__(cls)
        lm._fill(*parts)
        return lm

    def _fill(
        self, config: ModelConfig, params: Any, tokenizer: Tokenizer | Path | None, dictionaries: ModelDictionaries
    ) -> None:
        if tokenizer is not None and not isinstance(tokenizer, Path):
            artifacts.require_vocabulary(tokenizer, config)
        self.config = config
        self.params = params
        self._tokenizer = tokenizer
        self._dictionaries = dictionaries

    def __repr__(self) -> str:
        cfg = self.config
        spliced = f", spliced: {', '.join(self.spliced)}" if self.spliced else ""
        return f"TinyModel({cfg.n_layers} layers, d_model {cfg.d_model}, {cfg.n_params:,} parameters{spliced})"

    # Forward passes

    def __call__(self, tok_ids: Any) -> Float[Array, "batch seq d_vocab"]:
        """Return float32 log-probabilities of the next token.

        Args:
            tok_ids: in all methods, integers (batch, seq), or (seq,) for a batch of one; or a text or a list of
                texts, as `to_tokens` reads them. Right-padded rows need no mask.

        Raises:
            ValueError: the ids are not in the vocabulary or do not fit the context, or a text as for `to_tokens`.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> logprobs = lm("Once upon a")
            >>> logprobs.shape, lm.to_string(logprobs[0, -1].argmax())
            ((1, 4, 1024), ' time')
        """
        return self._run(tok_ids, "logprobs", ())[0]

    def logits(self, tok_ids: Any) -> Float[Array, "batch seq d_vocab"]:
        """Return float32 logits.

        Args:
            tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> lm.logits("The dog ran").shape
            (1, 4, 1024)
        """
        return self._run(tok_ids, "logits", ())[0]

    def residual(self, tok_ids: Any, layer: int) -> Float[Array, "batch seq d_model"]:
        """Return the residual stream before block `layer`, or after the last block if `layer == n_layers`.

        Args:
            tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.

        Raises:
            ValueError: `layer` is outside 0..n_layers.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> lm.residual("The dog ran", lm.config.n_layers).shape
            (1, 4, 128)
        """
        name = _residual_name(layer, self.config.n_layers)
        return self._run(tok_ids, "none", (name,), before=Site("Ra", layer))[1][name]

    def loss(
        self, tok_ids: Any, attn_mask: Any = None, hooks: Mapping[str, Hook] | None = None, per_token: bool = False
    ) -> Float[Array, "*batch_and_targets"]:
        """Return the mean next-token cross-entropy in nats; `[PAD]` is never a target.

        Args:
            tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.
            attn_mask: (batch, seq), 1 where the token counts as a target. By default all tokens count but `[END]` and
                `[PAD]`, as in the tokenizer's mask; to count `[END]`, as `evaluate` does, pass
                `tok_ids != lm.config.pad_id`.
            hooks: edits, as `run_with_hooks` takes them.
            per_token: return (batch, seq - 1), the cross-entropy of each token but the first, instead of the mean; 0
                at tokens that do not count.

        Raises:
            ValueError: the shapes of mask and ids differ, no token counts, or as `run_with_hooks`.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> bool(lm.loss("The dog ran to the park.") < lm.loss("park the to ran dog The."))
            True
            >>> lm.loss("The dog ran", per_token=True).shape
            (1, 3)
        """
        hooks, measure = hooks or {}, token_losses if per_token else mean_loss
        require_edits(hooks)
        require_hook_names(hooks, self.config)
        given = self.to_tokens(tok_ids)
        rows = batch_of(given, self.config)
        if np.ndim(given) == np.ndim(attn_mask) == 1:
            attn_mask = (jnp if is_traced(attn_mask) else np).asarray(attn_mask)[None]
        model, ids, length = self.padded_pass(rows, hooks)
        losses = measure(model, ids, target_weights(ids, length, attn_mask, self.config))
        return cut(losses, (1,), length - 1) if per_token else losses

    def run_with_cache(
        self, tok_ids: Any, names: Names | None = None, return_logprobs: bool = True
    ) -> tuple[Any, dict[str, Array]]:
        """Return log-probabilities (batch, seq, d_vocab) and the activations at hook points.

        Args:
            tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.
            names: names, patterns in which `*` matches any characters, `?` one and `[01]` one of those
                ("blocks.*.hook_mlp_out"), or a function of the name such as `lambda name: "resid" in name`. By default
                all hook points.
            return_logprobs: with False, the first result is None, and neither the unembedding nor any layer after the
                last of the hook points runs.

        Raises:
            ValueError: a name is not a hook point (the message lists the closest ones), or nothing is chosen.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> logprobs, acts = lm.run_with_cache("The dog ran", "blocks.*.hook_mlp_out")
            >>> len(acts), acts["blocks.0.hook_mlp_out"].shape
            (4, (1, 4, 128))
        """
        keep = hook_names(self.config) if names is None else chosen_names(names, self.config)
        return self._run(tok_ids, "logprobs" if return_logprobs else "none", keep)

    def run_with_hooks(
        self, tok_ids: Any, hooks: Mapping[str, Hook] | None, keep: Names = (), return_logprobs: bool = True
    ) -> tuple[Any, dict[str, Array]]:
        """Run the model with edits; return log-probabilities (batch, seq, d_vocab) and the activations to keep.

        Args:
            tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.
            hooks: hook name -> edit; None is no edit. Edits of `tinymodel_jax.interventions` are padded with the ids to
                one of a few lengths, and compiled once per kind of edit. Plain functions `(value, acts) -> value` see
                the exact length and are called on every pass, which then runs operation by operation.
            keep: the hook points whose values are returned as they are after their edits; as `names` of
                `run_with_cache`.
            return_logprobs: with False, the first result is None, and compiled passes compute only what is kept.

        Raises:
            ValueError: a name is not a hook point, a hook is not an edit, or an edit does not fit the value there.

        Examples:
            >>> from tinymodel_jax import TinyModel, interventions
            >>> lm = TinyModel("mini")
            >>> hooks = interventions.scale("blocks.1.hook_mlp_out", 0.0)
            >>> logprobs, kept = lm.run_with_hooks("The dog ran", hooks, keep="blocks.3.hook_resid_post")
            >>> logprobs.shape, kept["blocks.3.hook_resid_post"].shape
            ((1, 4, 1024), (1, 4, 128))
        """
        hooks = {} if hooks is None else hooks
        require_edits(hooks)
        keep = chosen_names(keep, self.config, hooks)
        return self._run(tok_ids, "logprobs" if return_logprobs else "none", keep, hooks=hooks)

    def _run(
        self,
        tok_ids: Any,
        output: Output,
        keep: tuple[str, ...],
        before: Site | None = None,
        hooks: Mapping[str, Hook] = MappingProxyType({}),
    ) -> tuple[Any, dict[str, Array]]:
        """Return what `forward` does, cut to the length of the ids."""
        model, ids, length = self.padded_pass(tok_ids, hooks, before)
        value, acts = forward(model, ids, keep=keep, output=output)
        value = None if value is None else cut(value, (1,), length)
        return value, {name: cut(acts[name], position_axes(name), length) for name in keep}

    # Dictionaries

    @property
    def dictionaries(self) -> dict[str, Dictionary]:
        """Tag -> dictionary, for the dictionaries attached or loaded so far."""
        return self._dictionaries.loaded

    @property
    def dictionary_tags(self) -> tuple[str, ...]:
        """Tags of the dictionaries that are attached or came with the model, in the order of the forward pass.

        Published dictionaries are not listed until they are loaded.
        """
        return self._dictionaries.tags

    def __getitem__(self, tag: str) -> FeatureReader:
        """Return the activations of a dictionary, or of one of its features, as a function of token ids.

        `lm["M2"](tok_ids)` is (batch, seq, n_features), `lm["M1N123"](tok_ids)` is (batch, seq). The dictionary is the
        attached one, otherwise the one that came with the model, otherwise the published default. It is loaded once.

        Raises:
            ValueError: the tag is not valid, its layer or feature does not exist, or the site has no dictionary.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> lm["M2"]("The dog ran").shape, lm["M2N304"]("The dog ran").shape
            ((1, 4, 512), (1, 4))
        """
        site, feature = Site.parse(tag)
        dictionary = self._dictionaries.at(site)
        if feature is not None:
            resolve_indices(feature, dictionary.config.n_features)
        return FeatureReader(self, site, dictionary, feature)

    def attach(self, tag: str, dictionary: Dictionary | Reader | str | os.PathLike[str]) -> None:
        """Put a dictionary at a site, for `lm[tag]` and `splice`.

        Args:
            tag: the site, such as "M2".
            dictionary: a folder written by `save_pretrained`, also on the hub (`hub:OWNER/NAME/PATH`), which must be
                for this site; or a file with the reference's names, a `Dictionary` or another model's `lm[tag]`, which
                may go to any site of the same width.

        Raises:
            FileNotFoundError: the file or folder does not exist.
            ValueError: the tag is not valid, the folder is for another site, the widths do not fit, or a parameter is
                not finite.

        Examples:
            >>> import jax.numpy as jnp
            >>> from tinymodel_jax import Dictionary, TinyModel
            >>> lm = TinyModel("mini")
            >>> lm.attach("Ra2", Dictionary.from_directions("blocks.2.hook_resid_pre", jnp.eye(128)[:3]))
            >>> lm["Ra2"]("The dog ran").shape
            (1, 4, 3)
        """
        self._dictionaries.attach(Site.whole(tag, "attach: "), dictionary)

    def splice(
        self,
        tags: str | Iterable[str],
        include_error: bool = False,
        detach_error: bool = True,
        detach_pred: bool = False,
        exclude: str | int | Iterable[str | int] | None = None,
    ) -> TinyModel:
        """Return a model whose forward pass runs through the dictionaries at these sites; this one is unchanged.

        Dictionaries act in the order of the forward pass. Splicing a site again replaces its options.

        Args:
            tags: one tag or several, such as `["M1", "M2"]`.
            include_error: add the reconstruction error, so that values stay the same and gradients flow through the
                dictionary.
            detach_error: stop gradients at the error.
            detach_pred: stop gradients at the prediction.
            exclude: token ids, "begin" or "end", at whose positions the value stays; None takes those that each
                dictionary was trained without, () none.

        Raises:
            ValueError: a tag is not valid or names a feature, a site has no dictionary, or `exclude` holds no tokens.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> sparse = lm.splice(["M1", "M2"])
            >>> sparse.spliced, lm.spliced
            (('M1', 'M2'), ())
            >>> bool((sparse("The dog ran") != lm("The dog ran")).any())
            True
        """
        switches = {"include_error": include_error, "detach_error": detach_error, "detach_pred": detach_pred}
        sites = [Site.whole(tag, "splice: ") for tag in as_names(tags)]
        excluded = None if exclude is None else self.config.named_tokens(exclude)
        return self._of(
            self.config, self.params, self._tokenizer, self._dictionaries.spliced(sites, switches, excluded)
        )

    @property
    def spliced(self) -> tuple[str, ...]:
        """Tags of the spliced dictionaries, in the order of the forward pass."""
        return tuple(self._dictionaries.splices)

    def hooked(self, before: Site | None = None) -> HookedModel:
        """Return parameters, configuration and splices in one value, for functions that run the model themselves.

        Args:
            before: leave out the dictionaries that act when this site is read, or later.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> model = lm.splice("M1").hooked()
            >>> sorted(model.hooks)
            ['blocks.1.hook_mlp_out']
        """
        return HookedModel(self.params, self.config, self._dictionaries.hooks(before))

    def padded_pass(
        self, tok_ids: Any, hooks: Mapping[str, Hook], before: Site | None = None
    ) -> tuple[HookedModel, Int[Array | np.ndarray, "batch padded"], int]:
        """Return what `hooked` does with edits, the ids (batch, compiled length), and their own length.

        Traced ids are not padded, nor are ids under edits that are functions, which see the exact length.

        Args:
            tok_ids: integers (batch, seq) or (seq,), a text or a list of texts.
            hooks: edits, as `run_with_hooks` takes them.
            before: as for `hooked`.

        Raises:
            ValueError: as `run_with_hooks`.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> model, ids, seq = lm.padded_pass("The dog ran", {})
            >>> ids.shape, seq
            ((1, 16), 4)
        """
        given, model = batch_of(self.to_tokens(tok_ids), self.config), self.hooked(before)
        batch, seq = given.shape
        if is_traced(given) or not can_be_padded(hooks):
            return model.with_hooks(hooks), jnp.asarray(given), seq
        ids = pad_right(given, bucket(seq, self.config.n_ctx), self.config.pad_id)
        return model.with_hooks(pad_edits(hooks, self.config, (batch, seq), ids.shape[1])), ids, seq

    # Text

    generate = generation.generate
    generate_ids = generation.generate_ids
    to_tokens = text.to_tokens
    to_str_tokens = text.to_str_tokens
    to_string = text.to_string
    to_single_token = text.to_single_token

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved with the model, otherwise the default one for the published vocabulary of 10,000 ids.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self._tokenizer is None or isinstance(self._tokenizer, Path):
            found = tokenizer_of_model(self._tokenizer, self.config)
            artifacts.require_vocabulary(found, self.config)
            self._tokenizer = found
        return self._tokenizer

    def to_hooked_transformer_state_dict(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the configuration and the state dict from which `HookedTransformer` computes the same logits.

        They hold the language model only. The configuration is JSON-ready; the state dict has no buffers.

        Raises:
            ValueError: the model has JumpReLU neurons.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> config, state = lm.to_hooked_transformer_state_dict()
            >>> config["n_layers"], state["embed.W_E"].shape
            (4, (1024, 128))
        """
        return transformer_lens.to_transformer_lens(self.config, flatten(self.params))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors`, the tokenizer's files if there is one, and the dictionaries.

        This includes all dictionaries that came with the model, but not its splices. `TinyModel(directory)` loads it.

        Args:
            directory: a folder, created if it does not exist. A file replaces an earlier one only when it is complete.

        Raises:
            ValueError: the folder holds another model's files.

        Examples:
            >>> from tinymodel_jax import TinyModel
            >>> lm = TinyModel("mini")
            >>> lm.save_pretrained("my_model")
            >>> TinyModel("my_model").config == lm.config
            True
        """
        tokenizer = saved_tokenizer(self._tokenizer) if isinstance(self._tokenizer, Path) else self._tokenizer
        dictionaries = self._dictionaries.load_own()
        artifacts.save_model(self.config, flatten(self.params), directory, tokenizer, dictionaries)

    push_to_hub = publication.push_to_hub


def _residual_name(layer: int, n_layers: int) -> str:
    if not isinstance(layer, int | np.integer) or layer not in range(n_layers + 1):
        raise ValueError(f"residual: layer {layer!r} is outside 0..{n_layers} ({n_layers} is the final residual).")
    return Site("Ra", layer).hook_in if layer < n_layers else final_stream(n_layers)


def _checked_arrays(params: Mapping[str, Any], config: ModelConfig) -> Any:
    ModelConfig.require(config, "TinyModel.from_params")
    compute_dtype(config.dtype)
    require_tree(params)
    artifacts.require_model_params(config, flatten(params))
    return _arrays(params, config)


def _arrays(params: Mapping[str, Any], config: ModelConfig) -> Any:
    return jax.tree.map(functools.partial(own_array, dtype=config.param_dtype), params)
