"""One scan over blocks of tokens, whose gradient runs the blocks again.

It keeps inputs, results and what is carried into each block, so memory does not
grow with what a block computes inside.
"""

import tensorflow as tf

from keras_kt.written_gradients import pullback, written_gradient


def scan(
    body,
    inputs,
    blocks,
    *,
    results,
    carry=(),
    memory=(),
    constants=(),
    otherwise=None,
):
    """Walks `body` over the blocks of all sequences.

    Args:
        body: `(inputs, keep, carry, memory, constants) -> (results, carry,
            exact)` for one block: `inputs` and `results` are lists of
            `(group, heads, block, dim)`, `keep` is `(group, 1, block, 1)` or
            `None`, `carry` and `memory` are lists of `(group, …)`, `exact` is a
            boolean, of Python or a scalar tensor.
        inputs: tensors `(batch, length, heads, dim)`.
        blocks: their `Blocks`.
        results: number of results that are wanted, the first of the body's.
        carry: tensors `(batch, …)` that go into the first block.
        memory: tensors `(batch, …)` that each block sees as they are.
        constants: a nest, such as a bound feature map, whose tensors all
            sequences share.
        otherwise: as `body`, run in its place where that was not exact.

    Returns:
        The results, a list of `(batch, length, heads, dim)`, and the carry
        after the last block. A loop of constant size in the graph, whatever
        the length.
    """
    leaves = tf.nest.flatten(constants)
    shared = [x for x in leaves if tf.is_tensor(x)]
    sizes = [len(x) for x in (inputs, carry, memory, shared)]

    def parts(tensors):
        rest = iter(tensors)
        return [[next(rest) for _ in range(size)] for size in sizes]

    def run(function, keep, tensors):
        tokens, carry, memory, shared = parts(tensors)
        rest = iter(shared)
        packed = [next(rest) if tf.is_tensor(x) else x for x in leaves]
        packed = tf.nest.pack_sequence_as(constants, packed)
        outputs, after, exact = function(tokens, keep, carry, memory, packed)
        return outputs[:results], after, exact

    @written_gradient
    def walk_blocks(*tensors):
        inputs, carry, memory, shared = parts(tensors)
        inputs = [blocks.pad(x) for x in inputs]
        start, memory = (
            [blocks.split_batch(x) for x in part] for part in (carry, memory)
        )

        def block_at(group, block, carry):
            return [
                *(blocks.pick(x, group, block) for x in inputs),
                *carry,
                *(x[group] for x in memory),
                *shared,
            ]

        def forward(group, block, carry):
            carry = _restart(block == 0, [x[group] for x in start], carry)
            keep = blocks.keep(group, block)
            tensors = block_at(group, block, carry)
            outputs, after, exact = run(body, keep, tensors)
            if otherwise is None:
                return [*outputs, *carry], after

            def again():
                outputs, after, _ = run(otherwise, keep, tensors)
                return [*outputs, *after]

            # The carry is chosen outside: Grappler moves what only one branch
            # reads into it, and tf2onnx reads no shapes there.
            slow = tf.cond(
                exact,
                lambda: [*outputs, *map(tf.zeros_like, after)],
                again,
            )
            after = _restart(exact, after, slow[results:])
            exact = tf.cast(exact, tf.float32)
            return [*slow[:results], *carry, exact], after

        stacked, after, _ = _walk(
            forward,
            blocks,
            [x[0] for x in start],
            results + len(start) + (otherwise is not None),
            len(start),
        )
        outputs, kept = stacked[:results], stacked[results:]
        outputs = [blocks.join(x) for x in outputs]
        after = [blocks.join_batch(x) for x in after]

        def gradient(*upstream):
            of_outputs = [blocks.pad(x) for x in upstream[:results]]
            of_after = [blocks.split_batch(x) for x in upstream[results:]]
            # At the last block of a group its sequences' gradients begin.
            of_group = [*of_after, *map(tf.zeros_like, memory)]

            def backward(group, block, sums):
                index = group * blocks.count + block
                keep = blocks.keep(group, block)
                carry = [x[index] for x in kept[: len(start)]]
                wanted = block_at(group, block, carry)
                of_sequences = _restart(
                    block == blocks.count - 1,
                    [x[group] for x in of_group],
                    sums[: len(of_group)],
                )
                of_carry = of_sequences[: len(start)]
                of_results = [blocks.pick(x, group, block) for x in of_outputs]

                def through(function):
                    def again():
                        outputs, after, _ = run(function, keep, wanted)
                        return [*outputs, *after]

                    return pullback(again, wanted, [*of_results, *of_carry])

                if otherwise is None:
                    gradients = through(body)
                else:
                    gradients = tf.cond(
                        kept[-1][index] > 0.0,
                        lambda: through(body),
                        lambda: through(otherwise),
                    )
                of_inputs, of_carry, of_memory, of_shared = parts(gradients)
                of_memory = _add(of_sequences[len(start) :], of_memory)
                of_shared = _add(sums[len(of_group) :], of_shared)
                return of_inputs, [*of_carry, *of_memory, *of_shared]

            zeros = [*(x[0] for x in of_group), *shared]
            of_inputs, of_group, sums = _walk(
                backward,
                blocks,
                [tf.zeros_like(x) for x in zeros],
                len(inputs),
                len(of_group),
                reverse=True,
            )
            return [
                *map(blocks.join, of_inputs),
                *map(blocks.join_batch, of_group),
                *sums[len(of_group) :],
            ]

        return [*outputs, *after], gradient

    tensors = walk_blocks(*inputs, *carry, *memory, *shared)
    return tensors[:results], tensors[results:]


def _walk(body, blocks, carry, results, kept, reverse=False):
    """Walks all blocks of all groups.

    Args:
        body: `(group, block, carry) -> (results, carry)`.
        blocks: the `Blocks`.
        carry: list of tensors of the first call.
        results: number of float32 tensors that each block gives.
        kept: number of tensors, the first of the carry, of which each group
            keeps the last.

    Returns:
        The results stacked over blocks, the kept stacked over groups, and the
        last carry.
    """
    groups, count = blocks.groups, blocks.count
    total = groups * count
    if isinstance(total, int) and total == 1:
        outputs, carry = body(0, 0, carry)
        return _stacked(outputs), _stacked(carry[:kept]), carry
    one_block, one_group = (
        isinstance(size, int) and size == 1 for size in (count, groups)
    )
    sizes = [total] * results
    if not one_group:
        sizes += [groups] * kept

    def advance(index, carry, arrays):
        place = total - 1 - index if reverse else index
        group = 0 if one_group else place if one_block else place // count
        block = 0 if one_block else place if one_group else place % count
        outputs, carry = body(group, block, carry)
        places = [place] * results + [group] * kept
        # Without the kept ones if there are no arrays for them.
        values = zip(arrays, places, [*outputs, *carry], strict=False)
        arrays = [array.write(place, x) for array, place, x in values]
        return index + 1, list(carry), arrays

    _, carry, arrays = tf.while_loop(
        lambda index, *_: index < total,
        advance,
        (
            tf.constant(0),
            list(carry),
            [tf.TensorArray(tf.float32, size=size) for size in sizes],
        ),
        parallel_iterations=1,
        maximum_iterations=total,
    )
    stacked = [array.stack() for array in arrays]
    ends = _stacked(carry[:kept]) if one_group else stacked[results:]
    return stacked[:results], ends, carry


def _stacked(tensors):
    return [x[tf.newaxis] for x in tensors]


def _restart(is_first, start, carry):
    """`start` at the first block of a group, else what was carried."""
    if isinstance(is_first, bool):
        return list(start if is_first else carry)
    return [tf.where(is_first, a, b) for a, b in zip(start, carry, strict=True)]


def _add(sums, others):
    return [a + b for a, b in zip(sums, others, strict=True)]
