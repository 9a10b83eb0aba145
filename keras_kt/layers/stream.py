"""What streams of `LinearAttention`: its state, and steps on it."""

from typing import Any

import tensorflow as tf

from keras_kt import ops
from keras_kt.layers import kernel, rotary, route
from keras_kt.layers.axes import both, mask_of, select_heads, select_rows
from keras_kt.ops import states


class HeadStream(kernel.LearnedKernel):
    """`initial_state`, `state_shapes` and `step` of `LinearAttention`."""

    def initial_state(self, batch_size: int | tf.Tensor) -> Any:
        """The state of a causal stream that has seen nothing.

        Args:
            batch_size: number of streams, an integer or a scalar tensor.

        Returns:
            `AttentionState`, `NearFieldState` or `WindowState` of float32
            tensors; in a `RotaryState` if there are rotary positions. Needs no
            built layer.
        """
        return states.initial(self.state_shapes, batch_size)

    @property
    def state_shapes(self) -> Any:
        """Shapes of the state's tensors, as a state; `None` for the batch."""
        sizes = self.num_key_value_heads, self.feature_dim, self.value_dim
        windows = self.near_field, self.sliding_window
        shapes = states.shapes(*sizes, self.key_dim, *windows)
        if self.rotary_max_wavelength is None:
            return shapes
        return states.RotaryState(shapes, (None,))

    def step(
        self,
        query: tf.Tensor,
        key: tf.Tensor,
        value: tf.Tensor,
        state: Any,
        key_mask: tf.Tensor | None = None,
        query_mask: tf.Tensor | None = None,
        decay: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Any]:
        """Causal attention of new tokens on a state: prefill and decode.

        Equals `call(..., use_causal_mask=True)` on the whole sequence, however
        it is cut. The stored draw is used.

        Args:
            query, key, value, decay: as in the call, of as many new tokens, at
                least one.
            state: from `initial_state` or an earlier `step`; or its arrays,
                NumPy's too, in a tuple, a list or a dict.
            key_mask: `(batch, new_tokens)` boolean; masked tokens leave the
                state as it is, and take no place.
            query_mask: likewise; masked queries get zeros.

        Returns:
            `(batch, new_tokens, num_heads, value_dim)`, which carries the
            query's mask, and the new state.
        """
        query_mask = mask_of(query, query_mask)
        key_mask = both(mask_of(key, key_mask), mask_of(value))
        query, key, value = (
            tf.convert_to_tensor(x, self.compute_dtype)
            if not tf.is_tensor(x)
            else x
            for x in (query, key, value)
        )
        if not self.built:
            self.build(query.shape, key.shape, value.shape)
        self._check_heads(query.shape, key.shape, value.shape)
        route.check_step(query, key, value)
        state = route.restore(state, self.state_shapes, query)
        query_mask, query = select_heads("query_mask", query_mask, query)
        key_mask, key, value = select_heads("key_mask", key_mask, key, value)
        decay = self.rates(key, decay)
        position = None
        if self.rotary_max_wavelength is not None:
            state, position = state
        query, key = self.rotated(query, key, key_mask, position)
        query, key, feature_map, near = self.kernel_inputs(query, key)
        output, state = ops.attend(
            query,
            key,
            tf.cast(value, tf.float32),
            feature_map,
            causal=True,
            key_mask=key_mask,
            decay=decay,
            near=near,
            state=state,
        )
        if position is not None:
            position += rotary.count(key, key_mask)
            state = states.RotaryState(state, position)
        output = tf.cast(output, self.compute_dtype)
        if query_mask is not None:
            output = select_rows(output, query_mask[:, :, tf.newaxis])
            output._keras_mask = query_mask
        return output, state
