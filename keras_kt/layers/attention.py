"""KernelizedAttention: MultiHeadAttention's contract at O(length) cost.

Projections, masks and the redraw policy live here; what is computed lives in
`features` and `ops`. Inside, tensors are
`(batch, length, heads, head_dim)`; other attention axes are folded into the
batch or the length.
"""

import functools
import string
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_kt import _checks, features, priors
from keras_kt.layers.axes import (
    Folding,
    as_axes,
    both,
    check_one_axis,
    check_shapes,
    check_tensors,
    mask_of,
    match_length,
    resolve_axes,
    select_rows,
    vector_mask,
)
from keras_kt.layers.scaling import Decay, UnitNorm
from keras_kt.ops import linear, quadratic, states, window

IMPLEMENTATIONS = ("auto", "linear", "quadratic")
# Up to about this length the matrix is as fast as the linear form or faster,
# with XLA and without: benchmarks/attention.py --levels core --lengths 16 32 64
SHORT_LENGTH = 32
REDRAWS = ("never", "step")
DECAYS = (None, "constant", "gated")
QK_NORMS = (None, "l2")
_COUNT = functools.partial(_checks.integer, optional=True)
# Which check the value of an argument has to pass, to leave as plain Python.
_ARGUMENTS = {
    "num_heads": _checks.integer,
    "key_dim": _checks.integer,
    "value_dim": _COUNT,
    "dropout": functools.partial(_checks.number, below=1.0),
    "use_bias": _checks.boolean,
    "sliding_window": _COUNT,
    "use_gate": _checks.boolean,
    "seed": functools.partial(_checks.integer, minimum=None, optional=True),
    "num_features": _COUNT,
    "qk_norm": functools.partial(_checks.choice, choices=QK_NORMS),
    "redraw": functools.partial(_checks.choice, choices=REDRAWS),
    "implementation": functools.partial(
        _checks.choice, choices=IMPLEMENTATIONS
    ),
    "decay": functools.partial(_checks.choice, choices=DECAYS),
    "near_field": _COUNT,
}


def plain_arguments(**arguments) -> dict:
    """Checked arguments of `KernelizedAttention`, as plain Python values.

    Those of instances and names that are looked up are left as they are.
    """
    return {
        name: _ARGUMENTS[name](name, value) if name in _ARGUMENTS else value
        for name, value in arguments.items()
    }


@keras.saving.register_keras_serializable(package="keras_kt")
class KernelizedAttention(keras.layers.Layer):
    """Multi-head attention with a learned kernel, in time linear in length.

    Takes the place of `keras.layers.MultiHeadAttention`: same arguments, same
    call, same weights first. Weights of keys are k(q, k) / Σ k(q, ·) with
    k(x, y) = E[φ_ω(x)·φ_ω(y)], ω drawn from a trainable spectral prior; the
    matrix is never formed.

    Masked keys leave numerator and normalizer by selection, so their content
    (NaN too) has no effect. Masked queries, and queries that see no key, get a
    zero context (the output bias). True keeps in every mask.

    Args:
        num_heads: number of attention heads.
        key_dim: size of each head for query and key.
        value_dim: size of each head for value. Defaults to `key_dim`.
        dropout: rate of dropout on the heads' outputs (there is no matrix to
            drop weights from).
        use_bias: whether the projections have biases.
        output_shape: shape of an output token. Defaults to the query's.
        attention_axes: axes that are attended over. Defaults to all but batch
            and features.
        sliding_window: as in `MultiHeadAttention`; costs O(length²) here.
        flash_attention: accepted for compatibility; there is nothing to turn
            on, since memory is linear without it.
        kernel_initializer: of the projections, as in `MultiHeadAttention`;
            as are bias_initializer, kernel_regularizer, bias_regularizer,
            activity_regularizer, kernel_constraint, bias_constraint and
            use_gate.
        seed: integer seed of the stored draw, of redraws and of dropout.
            Defaults to `None`, which means one from Keras's global generator.
        spectral_prior: `"normal"` (default), `"mixture"`, `"fastfood"`,
            `"generator"`, or an instance of a `SpectralPrior`. An instance is a
            recipe; the built copy is `layer.spectral_prior`.
        feature_map: `"positive"` (default; also `"prf"`), `"trigonometric"`
            (also `"rks"`), or an instance of a `FeatureMap`.
        num_features: D, the width of φ per head. Defaults to `None`, which
            means one whole block of orthogonal frequencies for each component
            of the prior: 2 · key_dim · components.
        qk_norm: `None` (default) scales queries and keys by key_dim^(-1/4)
            each, as `MultiHeadAttention` does; `"l2"` normalizes them and
            learns a temperature per head, which bounds the logits.
        redraw: `"never"` (default): one stored draw of the base noise, a
            weight. `"step"`: fresh noise at every training step; inference,
            saving and decoding still use the stored draw.
        implementation: `"auto"` (default) is linear, except where a call needs
            the matrix (a dense `attention_mask`, `return_attention_scores`,
            `sliding_window`) and where forming it is faster: sequences known
            to have at most 32 tokens. `"linear"` never forms it and refuses
            such calls. `"quadratic"` always forms it. The estimate is the same.

        decay: `None` (default), `"constant"` or `"gated"`: forgetting with
            the distance. The weight of key s for query t is multiplied by
            exp(−Σ λ_u) over the tokens u after s up to t (after t up to s, for
            keys after the query), with λ ≥ 0 learned per head, or computed
            from each token of `key` by a gate that starts at such a constant.
            Heads start with memories of 32 to 4096 tokens. Masked tokens do
            not count. Attention with trigonometric features has to be causal
            then, or form the matrix.

        near_field: number of tokens; keys less than that far from the query
            weigh by the kernel in closed form, those beyond by features, under
            one normalizer. Needs positive features of a normal or mixture
            prior. The distance is a number of visible tokens: masked ones take
            no place. Defaults to `None`: features at any distance.

    Call arguments:
        query: `(batch, query_length, features)`.
        value: `(batch, key_length, features)`.
        key: `(batch, key_length, features)`. Defaults to `value`.
        query_mask, value_mask, key_mask: `(batch, length)` boolean. Default to
            the Keras masks of the tensors.
        attention_mask: boolean, broadcast to `(batch, heads, query_length,
            key_length)` as in `MultiHeadAttention`. Costs O(length²), unless
            its query axis is known to have size 1: that is a key mask.
        return_attention_scores: also return the attention weights.
        training: whether to apply dropout and redraws.
        use_causal_mask: query t sees keys 0 … t only; stays linear.

    Returns:
        `(batch, query_length, output_dim)`, and the weights
        `(batch, heads, query_length, key_length)` if asked for.

    Examples:

    >>> x = np.random.normal(size=(2, 100, 32)).astype("float32")
    >>> layer = keras_kt.KernelizedAttention(num_heads=4, key_dim=8)
    >>> layer(x, x, use_causal_mask=True).shape
    TensorShape([2, 100, 32])
    >>> state = layer.initial_state(batch_size=2)
    >>> output, state = layer.step(x[:, :1], state)
    >>> output.shape
    TensorShape([2, 1, 32])

    References:
        Chowdhury et al., "On Learning the Transformer Kernel",
        arXiv 2110.08323.
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        *,
        spectral_prior="normal",
        feature_map="positive",
        num_features=None,
        qk_norm=None,
        redraw="never",
        implementation="auto",
        decay=None,
        near_field=None,
        **kwargs,
    ):
        plain = plain_arguments(
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            sliding_window=sliding_window,
            use_gate=use_gate,
            seed=seed,
            num_features=num_features,
            qk_norm=qk_norm,
            redraw=redraw,
            implementation=implementation,
            decay=decay,
            near_field=near_field,
        )
        if flash_attention:
            warnings.warn(
                "`flash_attention` has no effect on KernelizedAttention, whose "
                "memory is linear in length without it.",
                stacklevel=2,
            )
        super().__init__(**_checks.keywords(kwargs))
        self.supports_masking = True
        for name, value in plain.items():
            setattr(self, name, value)
        self.value_dim = self.value_dim or self.key_dim
        # Not a public attribute: Functional models have one of that name.
        self._output_shape = _as_shape(output_shape)
        # As given: what "all axes" and negative ones are, the rank decides.
        self._given_axes = as_axes(attention_axes)
        self._attention_axes = self._given_axes
        # Under MultiHeadAttention's private name too, which its tests read.
        self._sliding_window = self.sliding_window
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.projection_activity_regularizer = keras.regularizers.get(
            activity_regularizer
        )
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self._recipes = _Recipes(
            priors.get(spectral_prior), features.get(feature_map)
        )
        self._check_near_field()
        self._resolve_num_features()
        self._warned_of_dense_mask = False

    @property
    def attention_axes(self):
        return self._attention_axes

    @property
    def spectral_prior(self):
        """The built prior; before `build`, the recipe."""
        return getattr(self, "_spectral_prior", self._recipes.spectral_prior)

    @property
    def feature_map(self):
        """The built feature map; before `build`, the recipe."""
        return getattr(self, "_feature_map", self._recipes.feature_map)

    @property
    def spectral_weights(self):
        """The trainable weights of the kernel: of the prior and the feature
        map, and the temperature. Their names begin with `spectral_`."""
        layers = (
            self.spectral_prior,
            self.feature_map,
            getattr(self, "_qk_norm", None),
        )
        return [w for layer in layers if layer for w in layer.trainable_weights]

    @property
    def query_dense(self):
        return self._query_dense

    @property
    def key_dense(self):
        return self._key_dense

    @property
    def value_dense(self):
        return self._value_dense

    @property
    def output_dense(self):
        return self._output_dense

    def _resolve_num_features(self):
        """Returns `(num_features, num_frequencies)`, or says what is wrong."""
        prior, feature_map = self.spectral_prior, self.feature_map
        feature_map.validate(prior)
        num_features = self.num_features
        if num_features is None:
            num_features = feature_map.default_num_features(prior, self.key_dim)
        num_frequencies = feature_map.num_frequencies(num_features)
        prior.validate(num_frequencies, num_features)
        return num_features, num_frequencies

    def _check_near_field(self):
        prior, feature_map = self.spectral_prior, self.feature_map
        if self.near_field and not feature_map.has_exact_kernel(prior):
            raise ValueError(
                "`near_field` needs a kernel in closed form: positive features "
                "of a NormalPrior or MixturePrior. Received: near_field="
                f"{self.near_field} with {type(feature_map).__name__} of a "
                f"{type(prior).__name__}. Choose among these, or leave "
                "`near_field` out."
            )

    def build(self, query_shape, value_shape, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        check_shapes(query_shape, value_shape, key_shape)
        rank = len(query_shape)
        if len(value_shape) != rank:
            raise ValueError(
                "`query` and `value` must have the same rank. Received: "
                f"query_shape={tuple(query_shape)} and "
                f"value_shape={tuple(value_shape)}"
            )
        self._attention_axes = resolve_axes(self._given_axes, rank)
        heads_in = (self.num_heads, self.key_dim)
        heads_out = (self.num_heads, self.value_dim)
        self._query_dense = self._project("query", query_shape, heads_in)
        self._key_dense = self._project("key", key_shape, heads_in)
        if self.use_gate:
            self._gate_dense = self._project(
                "gate", query_shape, heads_out, activation="sigmoid"
            )
        self._value_dense = self._project("value", value_shape, heads_out)
        self._dropout_layer = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, seed=self.seed
        )
        self._output_dense = self._project(
            "attention_output",
            (*query_shape[:-1], *heads_out),
            self._output_shape or (query_shape[-1],),
            bound=2,
        )
        self._build_kernel()
        if self.decay:
            check_one_axis("decay", self.decay, self._attention_axes)
            self._decay = Decay(self.decay == "gated", name="decay")
            self._decay.build((self.num_heads, key_shape[-1]))
        if self.near_field:
            check_one_axis("near_field", self.near_field, self._attention_axes)
        self.built = True

    def _build_kernel(self):
        """Builds what makes the kernel; last, so that MHA's weights lead."""
        # The draw, the redraws and dropout each need a stream of their own.
        offset = None if self.seed is None else self.seed + 1
        self._spectral_prior = self._recipes.prior_copy(offset)
        self._feature_map = self._recipes.feature_map_copy()
        _, num_frequencies = self._resolve_num_features()
        self._spectral_prior.build(
            (self.num_heads, num_frequencies, self.key_dim)
        )
        self._feature_map.build(self.num_heads)
        # Some priors know only now whether they have what the map needs.
        self._feature_map.validate(self._spectral_prior)
        if self.qk_norm:
            self._qk_norm = UnitNorm(name="qk_norm")
            self._qk_norm.build(self.num_heads)
        if self.redraw == "step":
            offset = None if self.seed is None else self.seed + 2
            self._redraw_seed = keras.random.SeedGenerator(offset)

    def _project(self, name, input_shape, output_shape, bound=1, **kwargs):
        letters = string.ascii_lowercase
        free = len(input_shape) - bound
        inputs = letters[: free + bound]
        outputs = letters[free + bound : free + bound + len(output_shape)]
        equation = (
            f"{inputs},{inputs[free:]}{outputs}->{inputs[:free]}{outputs}"
        )
        layer = keras.layers.EinsumDense(
            equation,
            output_shape=(*[None] * (free - 1), *output_shape),
            bias_axes=outputs if self.use_bias else None,
            name=name,
            kernel_initializer=self.kernel_initializer.clone(),
            bias_initializer=self.bias_initializer.clone(),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            activity_regularizer=self.projection_activity_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            **kwargs,
        )
        layer.build(tuple(input_shape))
        return layer

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        # Keras passes these on only where it calls, not to `layer.call`.
        query_mask = mask_of(query, query_mask)
        value_mask = mask_of(value, value_mask)
        key_mask = key_mask if key is None else mask_of(key, key_mask)
        key = value if key is None else key
        check_tensors(query, value, key)
        query_mask = self._check_mask("query_mask", query_mask, query)
        value_mask = self._check_mask("value_mask", value_mask, value)
        key_mask = self._check_mask("key_mask", key_mask, key)
        key_mask = both(value_mask, key_mask)
        shared_mask = vector_mask(attention_mask, query)
        if shared_mask is not None:
            key_mask, attention_mask = both(key_mask, shared_mask), None
        output, scores = self._attend(
            query,
            value,
            key,
            query_mask=query_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            training=training,
            return_attention_scores=return_attention_scores,
            use_causal_mask=use_causal_mask,
            same_length=query is key or query is value,
        )
        if query_mask is not None:
            output._keras_mask = query_mask
        if return_attention_scores:
            return output, scores
        return output

    def _check_mask(self, name, mask, x):
        """A boolean mask that broadcasts to the positions of x, or `None`."""
        if mask is None:
            return None
        mask = tf.cast(mask, "bool")
        positions = tuple(x.shape[:-1])
        free = [
            axis
            for axis in range(1, len(positions))
            if axis not in self._attention_axes
        ]
        # A `(batch, length)` mask holds for every index of the free axes.
        if mask.shape.rank == 2 and len(self._attention_axes) == 1:
            for axis in free:
                mask = tf.expand_dims(mask, axis)
        fits = mask.shape.rank == len(positions) and all(
            None in (got, size) or got in (1, size)
            for got, size in zip(mask.shape, positions, strict=True)
        )
        if not fits:
            raise ValueError(
                f"`{name}` must have the shape of the tensor's positions, "
                f"{positions}. Received: a mask of shape {tuple(mask.shape)}. "
                "Use `attention_mask` for a mask of pairs of positions."
            )
        return mask

    def _attend(self, query, value, key, *, query_mask, key_mask, **kwargs):
        # What is selected has no Keras mask, of whose loss the projections
        # would warn; the caller's tensors keep theirs.
        if query_mask is not None:
            query = select_rows(query, query_mask)
        if key_mask is not None:
            same = key is value
            value = select_rows(value, key_mask)
            key = value if same else select_rows(key, key_mask)
        if self.decay:
            kwargs["decay"] = self._decay(key)
        heads, scores = self._compute_attention(
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
            query_mask=query_mask,
            key_mask=key_mask,
            **kwargs,
        )
        return self._project_heads(heads, query, kwargs["training"]), scores

    def _project_heads(self, heads, query, training):
        if self.dropout:
            heads = self._dropout_layer(heads, training=training)
        if self.use_gate:
            heads = heads * self._gate_dense(query)
        return self._output_dense(heads)

    def _compute_attention(
        self,
        query,
        key,
        value,
        attention_mask=None,
        training=None,
        return_attention_scores=False,
        use_causal_mask=False,
        query_mask=None,
        key_mask=None,
        decay=None,
        same_length=False,
    ):
        """Attention of projected heads; MultiHeadAttention's override point.

        Args:
            query: `(batch, query_length, heads, key_dim)`.
            key: `(batch, key_length, heads, key_dim)`.
            value: `(batch, key_length, heads, value_dim)`.
            attention_mask: dense mask, or `None`.
            training, return_attention_scores, use_causal_mask: as in `call`.
            query_mask, key_mask: `(batch, length)` masks that stay vectors.
            decay: `(batch, key_length, heads, 1)`, or `None`.
            same_length: whether queries are known to be as many as keys, which
                dynamic shapes do not tell.

        Returns:
            `(batch, query_length, heads, value_dim)`, and the weights or
            `None`.
        """
        axes = self._attention_axes
        if len(axes) > 1 and (use_causal_mask or self.sliding_window):
            raise ValueError(
                "`use_causal_mask` and `sliding_window` need an order of "
                "positions, so a single attention axis. Received: "
                f"attention_axes={axes}. Flatten the axes, or pass an "
                "`attention_mask`."
            )
        folding = Folding(query, value, axes)
        if attention_mask is not None:
            attention_mask = folding.fold_dense_mask(attention_mask)
        needs_matrix = self._needs_matrix(
            attention_mask, return_attention_scores
        )
        if self.sliding_window is not None:
            band = folding.band(self.sliding_window)
            attention_mask = both(attention_mask, band)
        folded_key_mask = folding.fold_mask(key_mask, folding.key_sizes)
        q, k, feature_map, kernel = self._kernel_inputs(
            folding.fold(query), folding.fold(key), training
        )
        v = tf.cast(folding.fold(value), tf.float32)
        if decay is not None:
            decay = folding.fold(decay)
        scores = None
        if needs_matrix or self._prefers_matrix(q, k):
            heads, scores = quadratic.quadratic(
                q,
                k,
                v,
                feature_map,
                key_mask=folded_key_mask,
                attention_mask=attention_mask,
                use_causal_mask=use_causal_mask,
                decay=decay,
                kernel=kernel,
                window=self.near_field,
            )
        elif use_causal_mask:
            if not same_length:
                folded_key_mask, k, v, decay = match_length(
                    q, folded_key_mask, k, v, decay
                )
            tokens = q, k, v, feature_map
            masks = {"key_mask": folded_key_mask, "decay": decay}
            if kernel is None:
                heads, _ = linear.causal(*tokens, **masks)
            else:
                heads, _ = window.near_field(
                    *tokens,
                    kernel,
                    self.near_field,
                    use_causal_mask=True,
                    **masks,
                )
        elif decay is None and kernel is None:
            heads = linear.bidirectional(
                q, k, v, feature_map, key_mask=folded_key_mask
            )
        else:
            heads = self._attend_by_distance(
                q,
                k,
                v,
                feature_map,
                kernel,
                folded_key_mask,
                decay,
                same_length=same_length,
            )
        folded_query_mask = folding.fold_mask(query_mask, folding.query_sizes)
        if folded_query_mask is not None:
            rows = folded_query_mask[:, :, tf.newaxis, tf.newaxis]
            heads = tf.where(rows, heads, 0.0)
            if scores is not None:
                rows = tf.transpose(rows, (0, 2, 1, 3))
                scores = tf.where(rows, scores, 0.0)
        heads = folding.unfold(tf.cast(heads, self.compute_dtype))
        if not return_attention_scores:
            return heads, None
        scores = tf.cast(scores, self.compute_dtype)
        return heads, folding.unfold_scores(scores)

    def _attend_by_distance(
        self,
        query,
        key,
        value,
        feature_map,
        kernel,
        key_mask,
        decay,
        *,
        same_length,
    ):
        """Bidirectional attention with a decay or a near field."""
        if not feature_map.positive:
            raise ValueError(
                "`decay` with trigonometric features needs "
                "`use_causal_mask=True` or the attention matrix. Received: "
                f"decay={self.decay!r}, use_causal_mask=False. Use positive "
                'features, or implementation="quadratic".'
            )
        static, length = query.shape[1], tf.shape(query)[1]
        if not same_length and (static is None or static != key.shape[1]):
            missing = tf.maximum(tf.shape(key)[1] - length, 0)
            query = tf.pad(query, [(0, 0), (0, missing), (0, 0), (0, 0)])
        if not same_length:
            key_mask, key, value, decay = match_length(
                query, key_mask, key, value, decay
            )
        tokens = query, key, value, feature_map
        if kernel is None:
            heads = window.fading(*tokens, decay, key_mask=key_mask)
        else:
            heads, _ = window.near_field(
                *tokens,
                kernel,
                self.near_field,
                key_mask=key_mask,
                decay=decay,
            )
        return heads[:, : static or length]

    def _needs_matrix(self, attention_mask, return_attention_scores):
        if self.implementation == "quadratic":
            return True
        dense = {
            "a dense `attention_mask`": attention_mask is not None,
            "`return_attention_scores=True`": return_attention_scores,
            "`sliding_window`": self.sliding_window is not None,
        }
        reasons = [name for name, present in dense.items() if present]
        if not reasons:
            return False
        alternatives = (
            "Padding masks (`query_mask`, `value_mask`, `key_mask`, or the "
            "Keras masks of the inputs) and `use_causal_mask=True` stay linear."
        )
        if self.implementation == "linear":
            raise ValueError(
                f"{' and '.join(reasons)} needs the attention matrix, which "
                'implementation="linear" never forms. Use '
                'implementation="auto" to allow O(length²) for such calls. '
                f"{alternatives}"
            )
        if not return_attention_scores and not self._warned_of_dense_mask:
            self._warned_of_dense_mask = True
            warnings.warn(
                f"{' and '.join(reasons)} costs O(length²) time and memory in "
                f"KernelizedAttention. {alternatives}",
                stacklevel=2,
            )
        return True

    def _prefers_matrix(self, query, key):
        lengths = query.shape[1], key.shape[1]
        return (
            self.implementation == "auto"
            and None not in lengths
            and max(lengths) <= SHORT_LENGTH
        )

    def scaled(self, query, key):
        """Heads as the kernel takes them: scaled, or normalized by `qk_norm`.

        Args:
            query: projected queries `(batch, query_length, heads, key_dim)`.
            key: projected keys `(batch, key_length, heads, key_dim)`.

        Returns:
            Both, float32. Weights of keys are the kernel of these.
        """
        query, key, scale = self._normalized(query, key)
        return scale * query, scale * key

    def bound(self):
        """The feature map of the stored draw, a function of `scaled` heads.

        It takes and gives `(batch, heads, length, dim)`; logarithms of features
        where its `positive` is true. Needs a built layer.
        """
        return self.feature_map.bind(self.spectral_prior.stored_frequencies())

    def exact_kernel(self):
        """The kernel of `scaled` heads in closed form, an `ExactKernel`.

        `None` where no closed form is known. Needs a built layer.
        """
        return self.feature_map.exact_kernel(self.spectral_prior)

    @property
    def temperature(self):
        """What `qk_norm` has learned, `(heads, 1)`; `None` without it."""
        return self._qk_norm.temperature if self.qk_norm else None

    def _normalized(self, query, key):
        """Float32 heads, and the factor of both that `scaled` applies."""
        query = tf.cast(query, tf.float32)
        key = tf.cast(key, tf.float32)
        if self.qk_norm:
            return self._qk_norm(query), self._qk_norm(key), 1.0
        return query, key, self.key_dim**-0.25

    def _kernel_inputs(self, query, key, training=False):
        """Queries and keys, float32, the feature map that scales them, and
        the kernel of the near field or `None`."""
        query, key, scale = self._normalized(query, key)
        seed = None
        if training and self.redraw == "step":
            seed = self._redraw_seed.next()
            seed = tf.cast(seed, tf.int64) % (2**31 - 1)
            seed = tf.cast(seed, tf.int32)
        frequencies = self._spectral_prior(seed=seed)
        kernel = None
        if self.near_field:
            kernel = self._feature_map.exact_kernel(self._spectral_prior, scale)
        feature_map = self._feature_map.bind(frequencies, scale)
        return query, key, feature_map, kernel

    def initial_state(self, batch_size):
        """The state of a causal stream that has seen nothing.

        Args:
            batch_size: number of streams, an integer or a scalar tensor.

        Returns:
            `AttentionState` of float32 tensors, or `NearFieldState`. Needs no
            built layer.
        """
        if self.near_field:
            return window.initial_near_field_state(
                batch_size, *self._state_sizes()
            )
        return states.initial_state(batch_size, *self._state_sizes())

    @property
    def state_shapes(self):
        """Shapes of the state's tensors, as a state; `None` for the batch."""
        if self.near_field:
            return window.near_field_state_shapes(*self._state_sizes())
        return states.state_shapes(*self._state_sizes())

    def _state_sizes(self):
        num_features, _ = self._resolve_num_features()
        width = self.feature_map.feature_dim(num_features)
        sizes = self.num_heads, width, self.value_dim
        return (
            (*sizes, self.key_dim, self.near_field)
            if self.near_field
            else sizes
        )

    def step(
        self,
        query,
        state,
        value=None,
        key=None,
        value_mask=None,
        query_mask=None,
        key_mask=None,
    ):
        """Causal attention of new tokens on a state: prefill and decode.

        Equals `call(..., use_causal_mask=True)` on the whole sequence, however
        it is cut. The stored draw is used, and no dropout.

        Args:
            query: `(batch, new_tokens, features)`, at least one new token.
            state: `AttentionState` from `initial_state` or an earlier `step`;
                or its arrays, NumPy's too, in a tuple, a list or a dict.
            value: `(batch, new_tokens, features)`. Defaults to `query`.
            key: likewise. Defaults to `value`.
            value_mask, key_mask: `(batch, new_tokens)` boolean; masked tokens
                leave the state as it is, and take no place. Default to the
                Keras masks of the tensors.
            query_mask: likewise; masked queries get a zero context.

        Returns:
            `(batch, new_tokens, output_dim)`, which carries the query's mask,
            and the new state, whose size does not depend on how many tokens
            came before.
        """
        value = query if value is None else value
        key = value if key is None else key
        # Read before conversions lose them.
        query_mask = mask_of(query, query_mask)
        value_mask = mask_of(value, value_mask)
        if key is not value:
            key_mask = mask_of(key, key_mask)
        query, value, key = (
            tf.convert_to_tensor(x, self.compute_dtype)
            if not tf.is_tensor(x)
            else x
            for x in (query, value, key)
        )
        if not self.built:
            self.build(query.shape, value.shape, key.shape)
        state = self._check_step(query, value, key, state)
        query_mask = self._check_mask("query_mask", query_mask, query)
        key_mask = both(
            self._check_mask("value_mask", value_mask, value),
            self._check_mask("key_mask", key_mask, key),
        )
        if query_mask is not None:
            query = select_rows(query, query_mask)
        if key_mask is not None:
            value, key = (select_rows(x, key_mask) for x in (value, key))
        heads, state = self._attend_on_state(
            query, value, key, state, query_mask=query_mask, key_mask=key_mask
        )
        output = self._project_heads(heads, query, training=False)
        if query_mask is not None:
            output._keras_mask = query_mask
        return output, state

    def _attend_on_state(
        self, query, value, key, state, *, query_mask, key_mask
    ):
        """Heads `(batch, new_tokens, heads, value_dim)` and the new state."""
        folding = Folding(query, value, self._attention_axes)
        q, k, feature_map, kernel = self._kernel_inputs(
            folding.fold(self._query_dense(query)),
            folding.fold(self._key_dense(key)),
        )
        v = tf.cast(folding.fold(self._value_dense(value)), tf.float32)
        rest = {
            "key_mask": folding.fold_mask(key_mask, folding.key_sizes),
            "decay": self._decay(key) if self.decay else None,
            "state": state,
        }
        tokens = q, k, v, feature_map
        if kernel is None:
            heads, state = linear.step(*tokens, **rest)
        else:
            heads, state = window.near_field(
                *tokens, kernel, self.near_field, use_causal_mask=True, **rest
            )
        rows = folding.fold_mask(query_mask, folding.query_sizes)
        if rows is not None:
            heads = tf.where(rows[:, :, tf.newaxis, tf.newaxis], heads, 0.0)
        return folding.unfold(tf.cast(heads, self.compute_dtype)), state

    def _check_step(self, query, value, key, state):
        """The state as tensors, or what is wrong with it or the tokens."""
        if len(query.shape) != 3 or self.sliding_window is not None:
            raise ValueError(
                "`step` streams one causal axis: it needs inputs of rank 3 and "
                "no `sliding_window`. Received: query of shape "
                f"{tuple(query.shape)}, sliding_window={self.sliding_window}"
            )
        lengths = {x.shape[1] for x in (query, value, key)} - {None}
        if len(lengths) > 1:
            raise ValueError(
                "`step` is causal: every new query comes with its own new key "
                "and value, so their lengths must be equal. Received: query of "
                f"shape {tuple(query.shape)}, value of shape "
                f"{tuple(value.shape)} and key of shape {tuple(key.shape)}. "
                "For attention without causality (to an encoder's output, say) "
                "call the layer itself."
            )
        state = states.restore(state, self.state_shapes)
        batches = {query.shape[0], state.sums.shape[0]} - {None}
        if len(batches) > 1:
            raise ValueError(
                "`state` must have the batch size of the new tokens. Received: "
                f"a state of batch size {state.sums.shape[0]} and query of "
                f"shape {tuple(query.shape)}. Start a stream of another batch "
                "size with `initial_state(batch_size)`."
            )
        return state

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        key_shape = value_shape if key_shape is None else key_shape
        check_shapes(query_shape, value_shape, key_shape)
        if self._output_shape:
            return (*query_shape[:-1], *self._output_shape)
        return tuple(query_shape)

    def compute_output_spec(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        check_tensors(query, value, value if key is None else key)
        shape = self.compute_output_shape(
            query.shape, value.shape, None if key is None else key.shape
        )
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return output
        rank = len(query.shape)
        axes = resolve_axes(self._given_axes, rank)
        free = [axis for axis in range(rank - 1) if axis not in axes]
        scores = (
            *(query.shape[axis] for axis in free),
            self.num_heads,
            *(query.shape[axis] for axis in axes),
            *(value.shape[axis] for axis in axes),
        )
        return output, keras.KerasTensor(scores, dtype=self.compute_dtype)

    def load_own_variables(self, store):
        """Tells weights of MultiHeadAttention, which lack the kernel's."""
        super().load_own_variables(store)
        path = getattr(store, "_h5_entry_path", None)
        if not (self.built and path and hasattr(store, "has_path")):
            return
        # Keras files a sublayer under the first attribute that has it.
        names = ("spectral_prior", "_spectral_prior")
        if not any(store.has_path(f"{path}/{name}") for name in names):
            has = "another layer" if store.has_path(path) else "nothing"
            raise ValueError(
                f"The file must hold the weights of a {type(self).__name__}, "
                f"its kernel's among them, at {path!r}. Received: a file with "
                f"{has} there. If it was saved from a model with "
                "MultiHeadAttention, load it into that model and convert it: "
                "`model, report = keras_kt.convert_attention(model)`."
            )

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": self._output_shape,
            "attention_axes": self._given_axes,
            "sliding_window": self.sliding_window,
            "kernel_initializer": serialize(self.kernel_initializer),
            "bias_initializer": serialize(self.bias_initializer),
            "kernel_regularizer": serialize(self.kernel_regularizer),
            "bias_regularizer": serialize(self.bias_regularizer),
            "activity_regularizer": serialize(
                self.projection_activity_regularizer
            ),
            "kernel_constraint": serialize(self.kernel_constraint),
            "bias_constraint": serialize(self.bias_constraint),
            "use_gate": self.use_gate,
            "seed": self.seed,
            "spectral_prior": serialize(self._recipes.spectral_prior),
            "feature_map": serialize(self._recipes.feature_map),
            "num_features": self.num_features,
            "qk_norm": self.qk_norm,
            "redraw": self.redraw,
            "implementation": self.implementation,
            "decay": self.decay,
            "near_field": self.near_field,
        }


class _Recipes:
    """The prior and map as given; not a container that Keras would track."""

    def __init__(self, spectral_prior, feature_map):
        self.spectral_prior = spectral_prior
        self.feature_map = feature_map

    def prior_copy(self, seed):
        prior = self.spectral_prior
        seed = seed if prior.seed is None else prior.seed
        return prior.copy(name="spectral_prior", seed=seed)

    def feature_map_copy(self):
        return self.feature_map.copy(name="feature_map")


def _as_shape(output_shape):
    if output_shape is None:
        return None
    if np.ndim(output_shape) == 0:
        output_shape = [output_shape]
    try:
        return _checks.integers("output_shape", output_shape) or None
    except ValueError as error:
        raise ValueError(
            f"Invalid `output_shape`: {output_shape}. When specified, the "
            "`output_shape` should be of type tuple, list, or int."
        ) from error
