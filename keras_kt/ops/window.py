"""Weights that depend on the distance: a window, and features beyond or none.

Attention to disjoint sets of keys is merged by the logarithms of its
normalizers: keys of a window by their exact kernel, those before it by features
that a decay may fade, and those after by the same in reverse order.
"""

from typing import NamedTuple

import tensorflow as tf

from keras_kt.ops import band, linear, scaling, visible_tokens
from keras_kt.ops.blocks import shares
from keras_kt.ops.heads import part, repeat_rows, size_of
from keras_kt.ops.states import NearFieldState, WindowState


def attend(
    query,
    key,
    value,
    feature_map,
    kernel,
    window,
    *,
    key_mask=None,
    decay=None,
    causal=False,
    state=None,
):
    """Exact weights of near keys, features beyond, one normalizer.

    For positive features. Time and memory are those of `causal`, twice if not
    causal, and O(length · window) more. Masked tokens take no place: the
    distance is a number of visible keys.

    Args:
        query, key, value, feature_map, key_mask, decay: as in `causal`; a key
            after the query fades as in `quadratic`.
        kernel: an `ExactKernel`, for keys less than `window` tokens away.
        window: number of tokens, the query's own included.
        causal: whether query t sees keys 0 … t only.
        state: `NearFieldState` of a causal stream to resume.

    Returns:
        Outputs as in `causal`, and the `NearFieldState` after the last token;
        `None` where attention is not causal.
    """
    fades = decay is not None
    tokens = _stream(key, value, decay, key_mask)
    past, far_state = _before(tokens, window), None
    if state is not None:
        far_state, *past = state
    near, last = _near(
        query,
        key,
        value,
        feature_map,
        kernel,
        window,
        key_mask=key_mask,
        decay=decay,
        causal=causal,
        past=past,
    )
    near = [_with_logarithm(sums) for sums in near]
    order = None
    if key_mask is not None:
        order = visible_tokens.visible_order(key_mask)
        tokens = [order.move_together(x) for x in tokens]
    line = _join(past, tokens)
    if not causal:
        line = _join(line, _before(tokens, window + 1))
    walk = _Walk(query, order, feature_map, fades)
    far, far_state = walk.past(line, window, far_state)
    if causal:
        return _merge(*near, far), NearFieldState(far_state, *last)
    return _merge(*near, far, walk.future(line, window)), None


def sliding(
    query,
    key,
    value,
    feature_map,
    kernel,
    window,
    *,
    key_mask=None,
    decay=None,
    causal=False,
    state=None,
):
    """Weights of near keys, and none beyond. O(length · window) time.

    Args:
        query, key, value, feature_map, window, key_mask, decay, causal: as in
            `attend`.
        kernel: an `ExactKernel`, or `None` for the estimate by features.
        state: `WindowState` of a causal stream to resume.

    Returns:
        Outputs as in `causal`, and the `WindowState` after the last token;
        `None` where attention is not causal.
    """
    parts, last = _near(
        query,
        key,
        value,
        feature_map,
        kernel,
        window,
        key_mask=key_mask,
        decay=decay,
        causal=causal,
        past=state,
    )
    state = WindowState(*last) if causal else None
    if kernel is None and not feature_map.positive:
        sums = scaling.Sums(*(sum(x) for x in zip(*parts, strict=True)))
        return scaling.divide(sums, is_signed=True)[0], state
    if len(parts) == 1:
        return scaling.divide(*parts, is_signed=False)[0], state
    return _merge(*map(_with_logarithm, parts)), state


def _near(query, key, value, *rule, key_mask, decay, causal, past):
    """`Sums` of a window's keys up to each query, of those after, and the ring.

    Args:
        query, key, value, rule, key_mask, decay, past: as in `band.attend`.
        causal: whether keys after the query are left out.
    """
    options = {"key_mask": key_mask, "decay": decay}
    tokens = query, key, value
    sums, last = band.attend(*tokens, *rule, past=past, **options)
    if causal:
        return [sums], last
    tokens, options = tf.nest.map_structure(
        lambda x: None if x is None else tf.reverse(x, [1]), (tokens, options)
    )
    ahead, _ = band.attend(*tokens, *rule, strict=True, **options)
    return [sums, scaling.Sums(*(tf.reverse(x, [1]) for x in ahead))], None


def _with_logarithm(sums):
    """Outputs with the logarithms of their normalizers."""
    output, normalizer = scaling.divide(sums, is_signed=False)
    return output, scaling.absolute_log(normalizer, sums.scale)


# A line is key, value, decay and keep of tokens in a row, masked ones last, or
# in their places where there is no order. Query t stands behind as many new
# tokens as it counts: t + 1, or the visible ones up to it.


def _stream(key, value, decay, key_mask):
    """Key, value, decay, and 1 where they are seen, for each token."""
    if decay is None:
        decay = tf.zeros_like(key[..., :1])
    if key_mask is None:
        key_mask = tf.ones(tf.shape(key)[:2], "bool")
    keep = tf.cast(key_mask, tf.float32)
    seen = keep[..., tf.newaxis, tf.newaxis] > 0.0
    key, value, decay = (tf.where(seen, x, 0.0) for x in (key, value, decay))
    return [key, value, decay, keep]


def _before(tokens, count):
    """Tokens that are not there, before the first or after the last."""
    return [tf.zeros((size_of(x, 0), count, *x.shape[2:])) for x in tokens]


def _join(line, tokens):
    return [tf.concat(x, 1) for x in zip(line, tokens, strict=True)]


def _slots(x, order, offset, length):
    """Of a line, what is `offset` behind each query's count."""
    if order is None:
        return part(x, 1, 1 + offset, length)
    return visible_tokens.take(x, order.count + offset)


class _Walk(NamedTuple):
    """Attention by features to what lies far from each query.

    Attributes:
        query, feature_map: as in `attend`.
        order: a `VisibleOrder`, or `None`.
        fades: whether there is a decay.
    """

    query: tf.Tensor
    order: visible_tokens.VisibleOrder | None
    feature_map: NamedTuple
    fades: bool

    def past(self, line, distance, state):
        """Attention to keys at least `distance` tokens before the query.

        Args:
            line: preceded by `distance` earlier tokens.
            distance: number of tokens.
            state: `AttentionState` of what came before, or `None`.

        Returns:
            Outputs with the logarithms of their normalizers, and the state.
        """
        length = size_of(self.query, 1)
        entering = [_slots(x, self.order, -1, length) for x in line]
        if self.order is not None:
            # With a token one leaves the window; nothing moves without.
            enters = self.order.mask & (entering[3] > 0.0)
            entering = _stream(*entering[:3], enters)
        (output, logarithm), state = self._causal(self.query, entering, state)
        if self.fades:
            # Keys have faded to where they left the window; this is the rest.
            sums = _moving_sum(line[2], distance)
            logarithm -= self._rows(_slots(sums, self.order, 0, length))
        return (output, logarithm), state

    def future(self, line, distance):
        """Attention to keys at least `distance` tokens after the query.

        Args:
            line: `distance` earlier tokens, then the new ones, then
                `distance` + 1 that are not there.
            distance: number of tokens.

        Returns:
            As `past`, without the state.
        """
        order, length = self.order, size_of(self.query, 1)
        # In reverse order a token is reached by the decay of the one after it.
        key, value, decay, keep = line
        shifted = key, value, part(decay, 1, 1), keep
        offset = 2 * distance - 1
        entering = [_slots(x, order, offset, length) for x in shifted]
        if order is not None:
            enters = tf.pad(order.mask[:, 1:], [(0, 0), (0, 1)])
            entering = _stream(*entering[:3], enters & (entering[3] > 0.0))
        entering = [tf.reverse(x, [1]) for x in entering]
        sums, _ = self._causal(tf.reverse(self.query, [1]), entering, None)
        output, logarithm = (tf.reverse(x, [1]) for x in sums)
        if self.fades:
            sums = _moving_sum(decay, distance)
            logarithm -= self._rows(_slots(sums, order, distance, length))
        return output, logarithm

    def _causal(self, query, entering, state):
        """Attention to what has come in up to each query, and the state."""
        key, value, decay, keep = entering
        sums, state = linear.causal(
            query,
            key,
            value,
            self.feature_map,
            key_mask=keep > 0.0,
            decay=decay if self.fades else None,
            state=state,
            with_scale=True,
        )
        return _with_logarithm(sums), state

    def _rows(self, decay):
        """The decay of each key-value head for all its query heads."""
        repeats = self.query.shape[2] // decay.shape[2]
        return repeat_rows(decay, repeats, axis=2)


def _moving_sum(x, count):
    """Sums of `count` tokens before each place, and behind the last one.

    Those of the first `count` places are left out.
    """
    batch, length = size_of(x, 0), size_of(x, 1) - count + 1
    chunks = shares(length, count)
    # One more in front, so that the first sums are a chunk's rest.
    missing = chunks * count - length
    x = tf.pad(x, [(0, 0), (1, missing), (0, 0), (0, 0)])
    x = tf.reshape(x, (batch, chunks + 1, count, *x.shape[2:]))
    sums = tf.cumsum(x, axis=2)
    # The rest of the chunk before, without subtracting from a total.
    rest = tf.cumsum(x, axis=2, reverse=True, exclusive=True)
    sums = part(sums, 1, 1) + part(rest, 1, 0, -1)
    sums = tf.reshape(sums, (batch, chunks * count, *x.shape[3:]))
    return part(sums, 1, 0, length)


def _merge(*parts):
    """Attention to disjoint keys as one: outputs by their normalizers."""
    # Not `add_n`, which sums three parts in an order that changes from call to
    # call: it begins with whichever buffer happens to be free.
    outputs, logarithms = (tf.stack(x) for x in zip(*parts, strict=True))
    weights = tf.nn.softmax(logarithms, axis=0)
    return tf.reduce_sum(outputs * weights, axis=0)
