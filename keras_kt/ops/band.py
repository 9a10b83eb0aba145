"""The band of the attention matrix near its diagonal, block by block.

A block of queries attends to its own keys and to the last ones before it by an
explicit matrix; a ring of these, as the kernel takes them, goes from block to
block. The kernel is known in closed form, or estimated by features.
O(length · window) time; in memory is one block, for the gradient too, which
finds each ring again in the keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from keras_kt.ops import blocks, heads, logits, scaling, visible_tokens
from keras_kt.ops.heads import part, repeat_rows, size_of, swap_heads
from keras_kt.ops.scan import scan


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
    past=None,
    strict=False,
):
    """Attention to the last keys up to each query.

    Args:
        query, key, value, feature_map, key_mask: as in `ops.attend`.
        kernel: an `ExactKernel`, or `None` for features.
        window: keys less than so many visible tokens away are seen.
        decay: as in `ops.attend`, 0 where masked; or `None`.
        past: key, value, decay and keep of the `window` tokens before, as in
            `WindowState`; or `None`.
        strict: whether a query sees no key of its own token, and the key before
            it fades by that one's own decay: what keys after each query weigh,
            of tokens in reverse order.

    Returns:
        `Sums`, and key, value, decay and keep of the last `window` tokens.
    """
    repeats = query.shape[2] // key.shape[2]
    fades = decay is not None
    if past is None:
        past = _nothing(key, value, window)
    rule, weigh, otherwise = kernel, _by_kernel, None
    if kernel is None:
        rule, weigh = feature_map, _by_signed_features
    if kernel is None and feature_map.positive:
        weigh, otherwise = _by_features, _by_features_exactly
    inputs = [heads.share(query, repeats), key, value]
    if fades:
        inputs.append(decay)
    of_tokens = blocks.of_band(inputs[0], window, key_mask)
    rows = _Rows(weigh, window, strict, repeats)
    key_ring, *ring = [swap_heads(x) for x in past[: 2 + fades]]
    ring.append(past[3][:, tf.newaxis, :, tf.newaxis])
    order = None
    if key_mask is not None:
        order = visible_tokens.visible_order(key_mask)
    (joined,), _ = scan(
        rows,
        inputs,
        of_tokens,
        results=1,
        carry=[rule.keys(key_ring), *ring],
        constants=rule,
        otherwise=otherwise and rows._replace(weigh=otherwise),
        recall=_Recall(of_tokens, order, window, rule),
    )
    joined = heads.unshare(joined, repeats)
    sums = scaling.Sums(part(joined, 3, 0, -1), part(joined, 3, -1))
    return sums, _last(past, key, value, decay, order, window)


def _last(past, key, value, decay, order, window):
    """Key, value, decay and keep of the last visible tokens."""
    if decay is None:
        decay = tf.zeros_like(key[..., :1])
    tokens = [key, value, decay, tf.ones(tf.shape(key)[:2])]
    if order is None:
        # No more than these of a long sequence.
        tokens = [x[:, -window:] for x in tokens]
        line = [tf.concat(x, 1) for x in zip(past, tokens, strict=True)]
        return [part(x, 1, -window) for x in line]
    slots = order.count[:, -1:] + tf.range(window)
    places = visible_tokens.take(order.order, slots - window)

    def pick(old, new):
        old = visible_tokens.take(old, slots)
        new = visible_tokens.take(new, places)
        is_old = tf.reshape(
            slots < window, (-1, window, *[1] * (old.shape.rank - 2))
        )
        return tf.where(is_old, old, new)

    return [pick(*x) for x in zip(past, tokens, strict=True)]


def _nothing(key, value, window):
    """The tokens before the first one, none of which is seen."""
    batch, count = size_of(key, 0), key.shape[2]
    sizes = key.shape[3], value.shape[3], 1
    tokens = [tf.zeros((batch, window, count, size)) for size in sizes]
    return [*tokens, tf.zeros((batch, window))]


class _Rows(NamedTuple):
    """Attention of the rows of one block.

    Attributes:
        weigh: function of what the rule makes of queries and keys, of which
            pairs are seen, and of the logarithm of what fading leaves; it gives
            weights, their scale or count as in `Sums`, and whether it is exact.
        window, strict: as in `attend`.
        repeats: rows of the query for each token.
    """

    weigh: Callable
    window: int
    strict: bool
    repeats: int

    def __call__(self, tokens, keep, ring, _, rule):
        """Joined `Sums` of the rows, the ring after, and whether it is exact.

        Args:
            tokens: query, key, value and, if any, decay, heads first.
            keep: `(group, 1, block, 1)` or `None`.
            ring: what the rule makes of the keys before, their value and, if
                any, decay, and `(group, 1, window, 1)`, 1 where they are seen.
            rule: an `ExactKernel` or a bound feature map.
        """
        query, *tokens = tokens
        if keep is not None:
            tokens = [tf.where(keep, x, 0.0) for x in tokens]
        tokens[0] = rule.keys(tokens[0])
        kept = tf.ones_like(tokens[1][:, :1, :, :1])
        if keep is not None:
            kept = tf.cast(keep, tf.float32)
        line = [
            tf.concat(x, axis=2)
            for x in zip(ring, [*tokens, kept], strict=True)
        ]
        count = tf.cumsum(tf.cast(kept[:, 0, :, 0], tf.int32), axis=1)
        seen = self._seen(count, line[-1])
        log_fading = None
        if len(tokens) > 2:
            log_fading = self._log_fading(ring[2], tokens[2])
            log_fading = tf.where(seen, log_fading, 0.0)
        query = rule.queries(heads.split_rows(query, self.repeats))
        weights, scale, exact = self.weigh(query, line[0], seen, log_fading)
        values = tf.matmul(weights, scaling.with_ones(line[1], None))
        # One result, since LiteRT takes the arrays of two for one.
        joined = heads.join_rows(tf.concat([values, scale], -1), self.repeats)
        return [joined], self._after(line, keep, count), exact

    def _seen(self, count, kept):
        """Which keys of the line are seen: `(group, 1, row, key)`."""
        reach = count
        if self.strict:
            reach -= tf.cast(kept[:, 0, self.window :, 0], tf.int32)
        reach = repeat_rows(reach, self.repeats, axis=1)
        # Places among the visible tokens; the ring's end in 0.
        places = tf.zeros_like(count[:, :1]) + tf.range(1 - self.window, 1)
        places = tf.concat([places, count], axis=1)
        distance = reach[:, :, tf.newaxis] - places[:, tf.newaxis]
        near = (distance >= 0) & (distance < self.window - self.strict)
        return near[:, tf.newaxis] & (tf.linalg.matrix_transpose(kept) > 0.0)

    def _log_fading(self, before, decay):
        """Minus the decay from each key to each row."""
        # Since the block's start, so that no sum grows with the length.
        before = -tf.cumsum(
            before, axis=2, exclusive=not self.strict, reverse=True
        )
        elapsed = tf.cumsum(decay, axis=2, exclusive=self.strict)
        of_keys = tf.concat([before, elapsed], axis=2)
        of_rows = repeat_rows(elapsed, self.repeats, axis=2)
        return tf.linalg.matrix_transpose(of_keys) - of_rows

    def _after(self, line, keep, count):
        """The ring after a line: its last visible tokens."""
        if keep is None:
            return [part(x, 2, -self.window) for x in line]
        order = visible_tokens.visible_order(keep[:, 0, :, 0]).order
        index = count[:, -1:] + tf.range(self.window)
        new = index - self.window
        new = self.window + visible_tokens.take(order, new)
        index = tf.where(index < self.window, index, new)
        return [tf.gather(x, index, axis=2, batch_dims=1) for x in line]


class _Recall:
    """The ring that went into a block, from the tokens before it.

    Args:
        of_tokens: the `Blocks`.
        order: the `VisibleOrder`, or `None`.
        window, rule: as in `_Rows`.
    """

    def __init__(self, of_tokens, order, window, rule):
        self.blocks, self.window, self.rule = of_tokens, window, rule
        self.count = self.order = None
        if order is not None:
            self.count = of_tokens.pad(order.count)
            self.order = of_tokens.pad(order.order)

    def __call__(self, inputs, start, group, block):
        size = self.blocks.group
        rows = group * size + tf.range(size)[:, tf.newaxis]
        rows = tf.broadcast_to(rows, (size, self.window))
        begin = block * self.blocks.size
        if self.count is not None:
            # Visible tokens up to the block.
            at = tf.maximum(begin - 1, 0)
            before = tf.gather(tf.gather(self.count, at, axis=1), rows[:, :1])
            begin = tf.where(begin > 0, before, 0)
        place = begin + tf.zeros_like(rows) + tf.range(-self.window, 0)
        is_new = place >= 0
        index = tf.stack([rows, tf.maximum(place, 0)], axis=-1)
        if self.order is not None:
            place_of = tf.gather_nd(self.order, index)
            index = tf.stack([rows, place_of], axis=-1)
        # From the ring that went into the first block.
        old = tf.clip_by_value(place + self.window, 0, self.window - 1)
        start = [tf.gather(x, old, axis=2, batch_dims=1) for x in start]
        key, *new = (swap_heads(tf.gather_nd(x, index)) for x in inputs[1:])
        new = [self.rule.keys(key), *new, tf.ones_like(start[-1])]

        def choose(new, old):
            shape = size, 1, self.window, *[1] * (new.shape.rank - 3)
            return tf.where(tf.reshape(is_new, shape), new, old)

        return [choose(*pair) for pair in zip(new, start, strict=True)]


# What keys of a line weigh for the rows of a block.


def _by_kernel(query, key, seen, log_fading):
    """By a kernel in closed form."""
    return *_of_logits(logits.of_kernel(query, key), seen, log_fading), True


def _of_logits(exponents, seen, log_fading):
    # Added, since TensorFlow selects slowly where it broadcasts; nothing is
    # left of an exponent beside the floor.
    floor = tf.where(seen, 0.0, scaling.FLOOR)
    exponents += floor if log_fading is None else log_fading + floor
    # Rows that see nothing have a scale, too, on which their weights are zero.
    scale = tf.maximum(scaling.row_maximum(exponents), 0.5 * scaling.FLOOR)
    return tf.exp(exponents - scale), scale


def _by_features(query, key, seen, log_fading):
    """By positive features, on one scale for each."""
    # Of what any row sees: keys of the ring may be none.
    any_row = tf.reduce_any(seen, axis=2)[..., tf.newaxis]
    key = tf.where(any_row, key, scaling.FLOOR)
    maximum = scaling.maximum_of(key)
    query, scale = scaling.exp_query(query, maximum)
    weights = tf.matmul(query, scaling.exp_key(key, maximum), transpose_b=True)
    if log_fading is not None:
        weights *= tf.exp(log_fading)
    weights = tf.where(seen, weights, 0.0)
    total = tf.reduce_sum(weights, axis=-1, keepdims=True)
    sees = tf.reduce_any(seen, axis=-1, keepdims=True)
    return weights, scale, scaling.is_exact(total, sees)


def _by_features_exactly(query, key, seen, log_fading):
    """By positive features of any range, pair by pair."""
    return *_of_logits(logits.of_features(query, key), seen, log_fading), True


def _by_signed_features(query, key, seen, log_fading):
    """By signed features, with the number of keys that are seen."""
    shares = tf.cast(seen, tf.float32)
    if log_fading is not None:
        shares *= tf.exp(log_fading)
    weights = tf.matmul(query, key, transpose_b=True) * shares
    # Of keys that weigh one; the last feature is a constant.
    count = tf.matmul(shares, key[..., -1:]) / query[..., -1:]
    return weights, count, True
