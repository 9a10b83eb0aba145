"""Numbers in README and on pages are those that results/ holds.

A claim is a text with the numbers that results/ gives. It has to stand on its
page, and a number there that no claim has, and that is not listed as one that
rests on no measurement, fails too. So a new figure needs a line here, which
says what it was read from. Pages of studies are in `test_figures_of_studies`.
"""

import inspect
import re

import pytest

import keras_kt
from benchmarks.ratios import tables
from experiments import distill, records
from keras_kt.layers import route
from tests.helpers import figures
from tests.helpers.figures import (
    decode,
    mean,
    memory,
    milliseconds,
    number,
    of_token,
    record,
    runs,
    stage,
    table,
)
from tests.helpers.pages import PAGES

PAPER = ("GMM", "FastFood", "Generator")
# Read here, since tests set them to 0.
SHORT = route.SHORT_LENGTH, route.SHORT_CAUSAL_LENGTH
TIMES_OF_FIRST_STEPS = "trace", "first", "compile", "cached", "fit", "built"
MENDED = [f"mended:{name}-{kind}" for name in PAPER for kind in ("RKS", "PRF")]


def layer_times(length):
    return [
        milliseconds("layer", length, column)
        for column in ("ours", "softmax", "ours causal", "softmax causal")
    ]


def times_as_fast(row):
    return float(row["softmax_milliseconds"]) / float(
        row["linear_milliseconds"]
    )


def look_up(attention, key_dim):
    flags = "--num-features 128"
    return mean("narrow_heads", attention, flags, key_dim=key_dim)


def of_conversion(task):
    (row,) = (r for r in figures.table("convert/runs.csv") if r["task"] == task)
    return row


CALIBRATION_STEPS = (
    inspect.signature(keras_kt.conversion.calibrate).parameters["steps"].default
)


def claims_of_readme():
    arguments = record("attention.json")["arguments"]
    yield (
        f"{arguments['heads']} heads of {arguments['head_dim']}, "
        f"{arguments['features']} features a head, float32, two cores of a "
        f"CPU, {arguments['tokens']:,} tokens in each batch and 8,192 in the "
        "last one"
    )
    for length in (256, 512, 1024, 4096, 8192):
        cells = " | ".join(map(number, layer_times(length)))
        yield f"| {length:,} | {cells} |"
    ours, softmax = (memory(name, 8192) for name in ("ours", "softmax"))
    yield (
        f"At 8,192 tokens attention of 8 heads of 64 takes {ours / 2**20:.0f} "
        f"MiB in a training step, and softmax {softmax / 2**20:,.0f} MiB."
    )
    yield (
        f"A token takes {of_token(100)} ms at position 100 and "
        f"{of_token(10**6)} ms at position 1,000,000, with "
        f"{decode('ours', 100)['bytes'] / 2**10:.0f} KiB of "
        "state. On a cache of keys and values it takes "
        f"{1e3 * decode('cache', 16384)['median']:.0f} ms at position 16,384."
    )
    yield (
        "1 to 256 among 256 (the third picture: three seeds, 128 features a "
        "head). With heads of 4 a learned kernel has an accuracy of "
        f"{look_up('normal:trigonometric', 4):.2f} where the same kernel kept "
        f"fixed has {look_up('fixed:trigonometric', 4):.2f}; with heads of 8 "
        f"it has {look_up('normal:trigonometric', 8):.2f} where the fixed "
        "kernel of Performer, a well-known linear attention, has "
        f"{look_up('fixed:positive', 32):.2f} with heads of 32. Softmax has "
        f"{mean('sparsity', 'softmax', key_dim=32):.2f} with heads of 32"
    )
    gated = "--num-features 128 --decay gated"
    forgetting = mean("learned", "fixed:positive", gated, task="language")
    softmax = runs("learned", "softmax", task="language")
    assert {(row["steps"], len(softmax)) for row in softmax} == {("800", 3)}
    yield (
        f'with `decay="gated"`, has {forgetting:.3f} bits per byte after 800 '
        "steps, and the same with softmax "
        f"{mean('learned', 'softmax', task='language'):.3f}"
    )
    (longest,) = runs(
        "long", "normal:positive", "--decay gated", sizes="--hidden 512"
    )
    yield (
        f"After {int(longest['steps']):,} steps, "
        f"{float(longest['seconds']) / 60:.0f} minutes of one thread, a wider "
        f"one has {float(longest['score']):.3f}"
    )
    before, _, _ = stage("classifier", "softmax")
    after, _, seconds = stage("classifier", "calibrated")
    assert before == after
    yield (
        f"keeps its accuracy of {after:.4f} after `convert_attention` and "
        f"`calibrate`, which takes {CALIBRATION_STEPS} gradient steps on one "
        f"batch ({seconds:.0f} seconds), and is "
        f"{times_as_fast(of_conversion('classifier')):.0f} times as fast at "
        f"{int(of_conversion('classifier')['speed_tokens']):,} tokens."
    )
    run = of_conversion("lm")
    yield (
        f"whose nearest {run['near_field']} bytes are still attended to "
        "exactly, goes from "
        f"{stage('lm', 'softmax')[0]:.3f} bits per byte to "
        f"{stage('lm', 'calibrated')[0]:.3f} by the same steps, and to "
        f"{stage('lm', 'fine-tuned')[0]:.3f} after {run['distill_steps']} "
        f"batches of distillation and {int(run['steps']) // 5} steps of "
        "training. The softmax model was not trained for as many steps more"
    )


def claims_of_limits():
    rows = {
        (row["heads"], row["causal"], row["length"]): row["ratio"]
        for row in record("ratios.json")["short"]["rows"]
    }
    wide, wide_causal, narrow, narrow_causal = (
        [f"{rows[heads, causal, length]:.2f}" for length in (256, 512)]
        for heads in ("8x64", "4x16")
        for causal in (False, True)
    )
    yield (
        f"heads of 64 trains {wide[0]} times as fast as `MultiHeadAttention` "
        f"at 256 tokens and {wide[1]} times at 512, a causal one "
        f"{wide_causal[0]} and {wide_causal[1]} times; with four heads of 16 "
        f"it is {narrow[0]} and {narrow[1]} times, causal {narrow_causal[0]} "
        f"and {narrow_causal[1]}"
    )
    ours, theirs = first_steps()
    ratios = [f"{ours[kind] / theirs[kind]:.1f}" for kind in ("fit", "built")]
    yield (
        f"The first `fit` of four causal blocks takes {ratios[0]} times as "
        f"long as that of softmax; {ratios[1]} times where"
    )
    best = max(figures.sparsest("sparsity", name) for name in MENDED)
    exact = figures.sparsest("sparsity", "softmax")
    yield (
        "Where one token among 256 has to be found, the best of the paper's "
        f"systems, mended, is right in {best:.3f} of the cases with 128 "
        f"features, and softmax in {exact:.3f}"
    )


def claims_of_converting():
    rows = {
        (row["model"], row["position"]): row
        for row in record("streams/hub_decode.json")["rows"]
    }
    times = (
        rows["original", 16384]["milliseconds"]
        / rows["converted", 16384]["milliseconds"]
    )
    yield f"({times:.0f} times as fast at 16,384 tokens)"
    classifier, lm = map(of_conversion, ("classifier", "lm"))
    assert classifier["seed"] == lm["seed"] == "0"
    yield (
        f"{int(lm['steps']):,} steps of {lm['batch_size']} sequences of "
        f"{lm['words']} tokens), converts them at D = {lm['features']}"
    )
    yield f"One seed, {int(lm['test_examples']):,} test reviews"
    for name, known in (
        ("softmax", "softmax"),
        ("plain orthogonal features", "plain orthogonal features"),
        ("`convert_attention`", "converted"),
        (f"`calibrate`, {lm['batch_size']} sequences", "calibrated"),
        (f"`distill`, {lm['distill_steps']} batches of 8", "distilled"),
        (f"`fit`, {int(lm['steps']) // 5} steps", "fine-tuned"),
    ):
        accuracy, errors, _ = stage("classifier", known)
        bits, bit_errors, _ = stage("lm", known)
        cells = [f"{accuracy:.4f}", ", ".join(errors)]
        cells += [f"{bits:.3f}", ", ".join(bit_errors)]
        yield f"| {name} | {' | '.join(cells)} |".replace("|  |", "| |")
    seconds = [stage(task, "calibrated")[2] for task in ("classifier", "lm")]
    yield (
        f"{CALIBRATION_STEPS} gradient steps of the coordinates of queries and "
        f"keys on one batch ({seconds[0]:.0f} seconds for the classifier, "
        f"{seconds[1]:.0f} for the language model)"
    )
    yield (
        f"Its {stage('lm', 'fine-tuned')[0]:.3f} bits after `fit` are no gain "
        f"over softmax's {stage('lm', 'softmax')[0]:.3f}: the softmax model "
        f"was not trained for those {int(lm['steps']) // 5} steps more."
    )
    pairs = [
        f"({float(row['linear_milliseconds']):.0f} and "
        f"{float(row['softmax_milliseconds']):.0f} ms"
        for row in (classifier, lm)
    ]
    yield (
        f"On one sequence of {int(lm['speed_tokens']):,} tokens the classifier "
        f"is {times_as_fast(classifier):.0f} times as fast as the softmax "
        f"model {pairs[0]}, one thread of a busy machine), the language model "
        f"with its near field {times_as_fast(lm):.0f} times {pairs[1]})."
    )
    first, last = records.numbers(lm["byte_milliseconds"])
    yield (
        f"A byte of a stream takes {first:.1f} ms after 100 bytes and "
        f"{last:.1f} ms after 4,096."
    )
    taught = table("distill/stages.csv")
    for task in ("classifier", "lm"):
        of_task = [row for row in taught if row["task"] == task]
        assert {row["seed"] for row in of_task} == set("012")
    steps = {row["stage"]: int(row["steps"]) for row in taught}
    teacher, layers, whole = (
        steps[stage]
        for stage in ("softmax", "layers distilled", "outputs distilled")
    )
    yield (
        f"the classifier after {teacher} steps of softmax training at "
        f"{taught[0]['tokens']} tokens, converted at D = "
        f"{taught[0]['num_features']}, then distilled layer by layer for "
        f"{layers} steps, then as a whole by its teacher's predictions for "
        f"{whole}."
    )
    yield f"in {layers / teacher:.0%} of the teacher's steps".replace("%", " %")
    for line in distill.render(figures.RESULTS / "distill").splitlines():
        if re.match(r"\| (default|points|near) \| (?!softmax)", line):
            yield line
    longer = distill.render(figures.RESULTS / "distill_layers").splitlines()
    for line in longer:
        if "| layers distilled |" in line:
            yield line
        elif line.startswith("| default | softmax |"):
            bits = line.split(" | ")[2]
            yield f"its teacher has {bits} bits per byte"
    (more,) = {
        int(row["steps"])
        for row in table("distill_layers/stages.csv")
        if row["stage"] == "layers distilled"
    }
    assert 5 * more == teacher
    yield f"Here {layers} steps of layers are too few"
    yield f"With {more}, a fifth of the teacher's"


def multiplications_of_decay(dim=64, width=128, chunk=64):
    """Of a token both ways, over those without a decay."""
    frequencies, state = dim * width // 2, width * (dim + 1)
    within = chunk * (width + dim + 1)
    # Keys twice, queries; a state of a block, two of a chunk, and two reads.
    return (3 * frequencies + 5 * state + within) / (
        2 * frequencies + 2 * state
    )


def claims_of_small_memory():
    narrow, wide = (
        {
            length: [
                round(
                    memory(name, length, path=f"memory_{size}/memory.json")
                    / 2**20
                )
                for name in ("ours", "softmax")
            ]
            for length in (64, 128, 256)
        }
        for size in ("narrow", "wide")
    )
    yield (
        f"The core of 4 heads of 16 takes {narrow[256][0]} MiB in a training "
        f"step at 256 tokens where softmax takes {narrow[256][1]}, and "
        f"{narrow[64][0]} where it takes {narrow[64][1]} at 64 tokens"
    )
    yield (
        "8 heads of 64 takes "
        f"{wide[256][0]} of {wide[256][1]} MiB at 256 tokens, "
        f"{wide[128][0]} of {wide[128][1]} at 128, and {wide[64][0]} where "
        f"softmax takes {wide[64][1]} at 64"
    )


def claims_of_benchmarks():
    rows = {
        (row["tau"], row["num_features"], row["method"]): float(row["median"])
        for row in figures.table("approximation.csv")
    }
    for name, method in (
        ("iid positive features", "iid"),
        ("Performer's orthogonal features", "Performer (orthogonal)"),
        (
            "default: two-sided, orthogonal, fixed radius",
            "default (two-sided, fixed radius)",
        ),
        ("uniform attention", "uniform"),
    ):
        small, large = (rows["0.5", d, method] for d in ("128", "256"))
        yield f"| {name} | {small:.3f} | {large:.3f} |"
    for level, columns in (
        ("layer", ("ours", "ours causal", "softmax", "Model Garden")),
        ("core", ("ours", "ours causal", "softmax", "floor")),
    ):
        for length in (256, 384, 512, 1024, 4096, 8192, 65536):
            times = [milliseconds(level, length, name) for name in columns]
            yield f"| {length:,} | {' | '.join(map(number, times))} |"
    hub = record("streams/hub_decode.json")
    for position in hub["positions"]:
        cells = [
            f"{row['milliseconds']:.1f}, {mebibytes(row['cache_bytes'])} MiB"
            for row in hub["rows"]
            if row["position"] == position
        ]
        yield f"| {position:,} | {' | '.join(cells)} |"
    calls = {(x["model"], x["prompt"]): x["seconds"] for x in hub["whole"]}
    (late, ours), (later, ours_later) = (
        [calls[name, prompt] for name in ("original", "converted")]
        for prompt in (128, 4096)
    )
    yield (
        f"Whole calls of {hub['new']:,} new tokens take {late:.1f} s and "
        f"converted {ours:.1f} s after a prompt of 128 tokens "
        f"({late / ours:.1f} times as fast), {later:.1f} s and "
        f"{ours_later:.1f} s after one of 4,096 "
        f"({later / ours_later:.1f} times)"
    )
    stream = record("streams/long_stream.json")
    assert stream["restart_equals"] and stream["tokens"] == 10**6
    yield (
        f"the state has {stream['state_bytes']:,} bytes throughout, the last "
        f"calls take {stream['last_by_first']:.2f} of the time of the first"
    )
    window = record("streams/window.json")["rows"]
    for tokens in (16384, 65536):
        cells = [f"{r['ratio']:.2f}" for r in window if r["tokens"] == tokens]
        yield f"| {tokens:,} | {' | '.join(cells)} |"
    growth = [
        f"{late['window ms'] / early['window ms']:.1f}"
        for early, late in zip(window[:4], window[4:], strict=True)
    ]
    yield (
        f"take the window {growth[0]} and {growth[1]} times as long forward, "
        f"{growth[2]} and {growth[3]} with the gradient"
    )
    ratios = record("ratios.json")
    for line in dict.fromkeys(tables(ratios).splitlines()):
        if re.match(r"\|.*\d", line):
            yield line
    arguments = ratios["short"]["arguments"]
    than = f"more than {100 * arguments['spread']:.0f} %"
    yield f"`benchmarks.ratios` write no table whose times spread by {than}"
    yield f"as it comes, {arguments['tokens']:,} tokens in a batch"
    tokens = ratios["options"]["arguments"]["core_length"]
    yield f"A training step of the core at {tokens:,} tokens"
    yield f"{ratios['steps']['arguments']['steps']} tokens in a loop"
    yield (
        f'Up to {SHORT[0]} tokens, causal {SHORT[1]}, `"auto"` forms the matrix'
    )
    under_xla = {
        (row["heads"], row["length"]): row["ratio"]["XLA"]
        for row in ratios["routes"]["rows"]
    }
    assert all(under_xla[x, 64] > 1 for x in ("4x16", "8x32"))
    yield (
        "with narrow heads under XLA, "
        '`implementation="linear"` is faster from 64 tokens on'
    )
    yield from claims_of_small_memory()
    yield (
        "counted in multiplications it takes "
        f"{multiplications_of_decay():.1f} times as many as no decay"
    )
    tensors = record("memory.json")["memory"][-1]["tensors"]
    ratios = [
        f"{memory(column, 65536, xla) / tensors:.2f}"
        for column in ("ours", "ours causal")
        for xla in (True, False)
    ]
    peaks = [memory("ours", 2**n) for n in range(13, 17)]
    for early, late in zip(peaks, peaks[1:], strict=False):
        assert abs(late / early / 2 - 1) <= 0.1
    softmax = memory("softmax", 8192) / (tensors / 8)
    yield (
        "(from 8,192 on, doubling it doubles it within 10 %) and is "
        f"{ratios[0]} times the bytes of q, k, v, output and their gradients "
        f"at 65,536 tokens under XLA, {ratios[1]} without; causal {ratios[2]} "
        f"and {ratios[3]}. Softmax takes {softmax:.0f} times those bytes at "
        "8,192"
    )
    early, late = decode("cache", 100), decode("cache", 16384)
    yield (
        f"One token of a stream takes {of_token(100)} ms in the layer at "
        f"position 100 and {of_token(10**6)} ms at position 1,000,000, with a "
        "state of "
        f"{decode('ours', 100)['bytes'] / 2**10:.0f} KiB; on a key-value cache "
        f"of the same size it takes {1e3 * early['median']:.1f} ms at position "
        f"100 and {1e3 * late['median']:.0f} ms at 16,384, with "
        f"{late['bytes'] / 2**20:.0f} MiB."
    )
    compiled = [
        compile_seconds(column, length, mode)
        for column in ("ours", "ours causal")
        for length in (1024, 65536)
        for mode in ("forward", "forward+backward")
    ]
    yield (
        "A layer compiles under XLA in {:.1f} s (forward) and {:.1f} s "
        "(training) at 1,024 tokens, {:.1f} s and {:.1f} s at 65,536; causal "
        "ones in {:.1f} s and {:.1f} s, {:.1f} s and {:.1f} s"
    ).format(*compiled)
    for row in record("tracing_seconds.json")["rows"]:
        times = [
            f"{row[kind]['cpu']:.1f} ({row[kind]['wall']:.1f})"
            for kind in TIMES_OF_FIRST_STEPS
        ]
        yield (
            f"| {row['row']} | {row['blocks']} | {row['operations']:,} "
            f"| {' | '.join(times)} |"
        )
    ours, theirs = first_steps()
    for row in ours, theirs:
        yield f"from {row['fit']:.1f} s to {row['built']:.1f} of"
    yield (
        f"from {ours['compile']:.1f} s to {ours['cached']:.1f}, from "
        f"{theirs['compile']:.1f} s to {theirs['cached']:.1f}"
    )
    yield (
        "takes {fit:.1f} times as long as softmax's, {built:.1f} with the "
        "optimizer built; the step alone {first:.1f}."
    ).format(**{kind: seconds / theirs[kind] for kind, seconds in ours.items()})
    imports = record("imports/imports.json")
    median = imports["median"]
    yield (
        f"adds {median['added s']:.2f} s and {median['added MiB']:.1f} MiB to "
        "`import keras` on TensorFlow, which takes "
        f"{median['keras s']:.1f} s, medians of {len(imports['runs'])} "
        "processes"
    )


def first_steps():
    """Seconds of four causal blocks, of ours and of softmax."""
    return (
        {kind: row[kind]["wall"] for kind in TIMES_OF_FIRST_STEPS}
        for row in record("tracing_seconds.json")["rows"]
        if row["blocks"] == 4
    )


def mebibytes(count):
    count /= 2**20
    return f"{count:.0f}" if count > 10 else f"{count:.1f}"


def compile_seconds(column, length, mode):
    (row,) = (
        row
        for row in record("attention.json")["timings"]
        if (row["level"], row["column"]) == ("layer", column)
        and (row["length"], row["mode"]) == (length, mode)
        and row["xla"]
    )
    return row["first_call"] - row["median"]


def claims_of_tpu():
    programs = record("tpu.json")["programs"]["rows"]
    seconds = [row["compile_seconds"] for row in programs]
    assert all("temporary_bytes" in row for row in programs)
    yield (
        f"All {len(programs)} compile: five priors (a `DistributionPrior` "
        "among them) × two maps × float32 and `mixed_bfloat16`"
    )
    yield (
        f"at 512 tokens, in {min(seconds):.1f} to {max(seconds):.0f} s each on "
        "two busy cores"
    )
    rows = record("tpu.json")["lengths"]["rows"]
    for name, attention, form in (
        ("`MultiHeadAttention`", "softmax", "bidirectional"),
        ("ours", "normal positive", "bidirectional"),
        ("`MultiHeadAttention`, causal", "softmax", "causal"),
        ("ours, causal", "normal positive", "causal"),
    ):
        found = {
            row["length"]: row
            for row in rows
            if (row["attention"], row["form"]) == (attention, form)
            and (row["policy"], row["program"]) == ("float32", "train")
        }
        cells = []
        for length in (8192, 32768, 131072, 524288):
            size = found[length].get("temporary_bytes")
            text = "refused" if size is None else f"{size / 2**20:,.0f}"
            flops = found[length]["counted_flops"]
            cells.append(f"{text}; {flops / 1e9:,.0f}")
        yield f"| {name} | {' | '.join(cells)} |"


# Numbers of a page that rest on no measurement: sizes and settings.
OTHERS = {
    "docs/tpu.md": [
        "Keras 3's `fit` fails (keras #20585)",
        # Bounds that tests of these names hold.
        "Over 20 steps on two logical CPUs the losses differ from those of one "
        "device by at most 5e-7 and the weights by 2e-7",
        "more than 0.01 in ω·x",
        "batch 1, 4 heads of 64, 128 features",
        "A v5e has 15.75 GiB",
        "| tokens | 8,192 | 32,768 | 131,072 | 524,288 |",
    ],
    "README.md": [
        "tries Python 3.10 to 3.13",
        "Attention for Keras 3 on TensorFlow",
        "arXiv 2110.08323",
        "scripts of at most 150 lines",
        "less than some 500 tokens",
    ],
    "docs/limits.md": ["below some 500 tokens take it"],
    "docs/converting.md": [
        "Mistral, Mixtral, Gemma, Gemma 3, Qwen",
        "(two blocks of width 64, 4 heads of 16,",
    ],
    "docs/benchmarks.md": [
        "head_dim 64, median of 8 seeds",
        r"| \|q\|² = \|k\|² = 0.5 | D = 128 | D = 256 |",
        "8 heads of 64, 128 features, float32, 2 cores (AMD EPYC); batch × "
        "length = 4,096, beyond that batch 1",
        "of inputs 512 wide",
        "(8 heads of 64, 128 features)",
        "A layer of 8 heads of 64 and width 512",
        "(4 blocks, 4 heads of 64, float32, batch 1)",
        "medians of 7 turns",
        "four heads of 8 in compiled calls of 1,000 single tokens, 10⁶ in all, "
        "with a near field of 16",
        "a restart from the state at 500,000",
        "sliding window of 256 tokens",
        "8 heads of 64, 128 features, batch 1",
        "medians of 3",
        "at 2 × 1,024 tokens",
    ],
}
CLAIMS = {
    "docs/tpu.md": claims_of_tpu,
    "README.md": claims_of_readme,
    "docs/limits.md": claims_of_limits,
    "docs/converting.md": claims_of_converting,
    "docs/benchmarks.md": claims_of_benchmarks,
}


@pytest.mark.parametrize("page", CLAIMS)
def test_figures_are_those_of_the_results(page):
    left = figures.unclaimed(page, list(CLAIMS[page]()), OTHERS[page])
    assert not left, f"{page}: no claim has {left}"


def test_no_page_installs_from_an_index():
    """`pip install 'keras_kt[plot]'` stood there, which no index has."""
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"pip install '?keras_kt", text), page
