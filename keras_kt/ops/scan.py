"""One scan over blocks of tokens, whose gradient runs the blocks again.

It keeps inputs, results and what is carried into each block, unless that can be
found again, so memory does not grow with what a block computes inside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from keras_kt.ops.heads import size_of
from keras_kt.shared_traces import OPENING, shared_trace, without_tensors
from keras_kt.written_gradients import pullback, written_gradient


def scan(
    body,
    inputs,
    blocks,
    *,
    results,
    carry=(),
    memory=(),
    each=(),
    constants=(),
    otherwise=None,
    recall=None,
    reverse=False,
    records=False,
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
        each: tensors `(blocks, group, …)`, of which each block sees its own,
            behind the memory: what `records` of another scan gives.
        constants: a nest, such as a bound feature map, whose tensors all
            sequences share.
        otherwise: as `body`, run in its place where that was not exact.
        recall: `(inputs, start, group, block) -> carry` for a carry that is
            found again in the inputs, so that it need not be kept: from all
            inputs, padded, and what went into the group's first block.
        reverse: whether the last block of a sequence is its first.
        records: whether to return what went into each block, not what came out
            of the last.

    Returns:
        The results, a list of `(batch, length, heads, dim)`, and the carry
        after the last block, or with `records` a list of `(blocks, group, …)`.
        A loop of constant size in the graph, whatever the length.
    """
    leaves = tf.nest.flatten(constants)
    tensors = [list(inputs), list(carry), list(memory), list(each)]
    tensors.append([x for x in leaves if tf.is_tensor(x)])
    constants = without_tensors(constants)
    sizes = tuple(map(len, tensors))
    steps = _Steps(body, otherwise, constants, results, sizes)

    @written_gradient
    def walk_blocks(*tensors):
        inputs, carry, memory, each, shared = steps.parts(tensors)
        inputs = [blocks.pad(x) for x in inputs]
        start, memory = (
            [blocks.split_batch(x) for x in part] for part in (carry, memory)
        )

        first, final = 0, blocks.count - 1
        if reverse:
            first, final = final, first

        def at(group, block, carry):
            """What goes into a block."""
            return [
                *(blocks.pick(x, group, block) for x in inputs),
                *carry,
                *(x[group] for x in memory),
                *(x[group * blocks.count + block] for x in each),
                *shared,
            ]

        def forward(group, block, carry):
            carry = _restart(block == first, [x[group] for x in start], carry)
            keep = blocks.keep(group, block)
            outputs, after, exact = steps.forward(keep, at(group, block, carry))
            return [*outputs, *exact, *(() if recall else carry)], after

        stacked, after, _ = _walk(
            forward,
            blocks,
            [x[0] for x in start],
            results + steps.may_fail + (0 if recall else len(start)),
            len(start),
            reverse,
        )
        exacts = stacked[results:][: steps.may_fail]
        kept = stacked[results + steps.may_fail :]

        def gradient(*upstream):
            of_results = [blocks.pad(x) for x in upstream[:results]]
            of_records = upstream[results:] if records else []
            # At the last block of a group its sequences' gradients begin.
            if records:
                last = [tf.zeros_like(x) for x in start]
            else:
                last = [blocks.split_batch(x) for x in upstream[results:]]
            last += [tf.zeros_like(x) for x in memory]

            def backward(group, block, sums):
                index = group * blocks.count + block
                exact = [x[index] for x in exacts]
                if recall:
                    of_group = [x[group] for x in start]
                    carry = recall(inputs, of_group, group, block)
                else:
                    carry = [x[index] for x in kept]
                sums[: len(last)] = _restart(
                    block == final,
                    [x[group] for x in last],
                    sums[: len(last)],
                )
                arguments = [
                    blocks.keep(group, block),
                    at(group, block, carry),
                    exact,
                    [blocks.pick(x, group, block) for x in of_results],
                    sums,
                ]
                # Forwards no trace is shared: tf2onnx fails on two calls of
                # one function with branches. One block is in no loop, and a
                # tape may watch it.
                if blocks.are_one:
                    of_block, sums = steps.backward(arguments)
                else:
                    of_block, sums = shared_trace(
                        _Steps.backward, steps, arguments
                    )
                for i, of_record in enumerate(of_records):
                    sums[i] += of_record[index]
                return of_block, sums

            zeros = [*(x[0] for x in last), *shared]
            of_blocks, of_sequences, sums = _walk(
                backward,
                blocks,
                [tf.zeros_like(x) for x in zeros],
                len(inputs) + len(each),
                len(last),
                not reverse,
            )
            return [
                *map(blocks.join, of_blocks[: len(inputs)]),
                *map(blocks.join_batch, of_sequences),
                *of_blocks[len(inputs) :],
                *sums[len(last) :],
            ]

        outputs = map(blocks.join, stacked[:results])
        after = kept if records else map(blocks.join_batch, after)
        return [*outputs, *after], gradient

    outputs = walk_blocks(*sum(tensors, []))
    return outputs[:results], outputs[results:]


class _Steps(NamedTuple):
    """One block forwards, and backwards.

    Attributes:
        body, otherwise, results: as in `scan`.
        constants: as there, with openings in place of tensors.
        sizes: numbers of inputs, of what is carried, of memories, of what each
            block has, and of the tensors among the constants.
    """

    body: Callable
    otherwise: Callable | None
    constants: Any
    results: int
    sizes: tuple[int, ...]

    @property
    def may_fail(self):
        return self.otherwise is not None

    def parts(self, tensors):
        """Tensors in a row as inputs, carry, memory, each and constants."""
        rest = iter(tensors)
        return [[next(rest) for _ in range(size)] for size in self.sizes]

    def forward(self, keep, tensors):
        """Results, the carry, and whether they were exact, if it matters."""
        outputs, after, exact = self._run(self.body, keep, tensors)
        if not self.may_fail:
            return outputs, after, []

        def again():
            # For tf2onnx, which reads no shapes of what a branch takes in.
            told = [tf.reshape(x, _sizes(x)) for x in tensors]
            outputs, after, _ = self._run(self.otherwise, keep, told)
            return [*outputs, *after]

        # The carry is chosen outside: Grappler moves what only one branch
        # reads into it, and tf2onnx reads no shapes there.
        chosen = tf.cond(
            exact, lambda: [*outputs, *map(tf.zeros_like, after)], again
        )
        after = _restart(exact, after, chosen[len(outputs) :])
        return chosen[: len(outputs)], after, [tf.cast(exact, tf.float32)]

    def backward(self, arguments):
        """Gradients to what the block alone has, and those that are summed up.

        Args:
            arguments: keep, all tensors, exact as `forward` gave it, gradients
                to the results, to the carry, and sums of those to memory and
                constants.
        """
        keep, tensors, exact, of_results, sums = arguments

        def through(function):
            def again():
                outputs, after, _ = self._run(function, keep, tensors)
                return [*outputs, *after]

            of_carry = sums[: self.sizes[1]]
            return pullback(again, tensors, [*of_results, *of_carry])

        if self.may_fail:
            gradients = tf.cond(
                exact[0] > 0.0,
                lambda: through(self.body),
                lambda: through(self.otherwise),
            )
        else:
            gradients = through(self.body)
        inputs, carry, memory, each, shared = self.parts(gradients)
        pairs = zip(sums[len(carry) :], [*memory, *shared], strict=True)
        return [*inputs, *each], [*carry, *(a + b for a, b in pairs)]

    def _run(self, function, keep, tensors):
        inputs, carry, memory, each, shared = self.parts(tensors)
        memory = [*memory, *each]
        rest = iter(shared)
        leaves = tf.nest.flatten(self.constants)
        leaves = [next(rest) if x is OPENING else x for x in leaves]
        constants = tf.nest.pack_sequence_as(self.constants, leaves)
        outputs, after, exact = function(inputs, keep, carry, memory, constants)
        return list(outputs[: self.results]), list(after), exact


def _walk(body, blocks, carry, results, kept, reverse):
    """Walks all blocks of all groups.

    Args:
        body: `(group, block, carry) -> (results, carry)`.
        blocks: the `Blocks`.
        carry: list of tensors of the first call.
        results: number of float32 tensors that each block gives.
        kept: number of tensors, the first of the carry, of which each group
            keeps the last.
        reverse: whether to begin with the last.

    Returns:
        The results stacked over blocks, the kept stacked over groups, and the
        last carry.
    """
    groups, count = blocks.groups, blocks.count
    total = groups * count
    if blocks.are_one:
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


def _sizes(x):
    return [size_of(x, axis) for axis in range(x.shape.rank)]


def _stacked(tensors):
    return [tf.expand_dims(x, 0) for x in tensors]


def _restart(is_first, start, carry):
    """`start` at the first block of a group, else what was carried."""
    if isinstance(is_first, bool):
        return list(start if is_first else carry)
    return [tf.where(is_first, a, b) for a, b in zip(start, carry, strict=True)]
