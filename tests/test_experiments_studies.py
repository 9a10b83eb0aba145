"""Attentions by name, sizes that tell runs apart, paired differences."""

import argparse

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_kt
from tests.helpers.scripts import ROOT, experiment, script

COLUMNS = {
    "score": 0.5,
    "validation": 0.5,
    "metric": "accuracy",
    "task": "sparsity",
    "title": "Sparsity",
    "key_dim": 8,
    "sizes": "",
    "flags": "",
}


def rows(attention, scores, **columns):
    """A row a seed, as read from a CSV file."""
    return [
        {
            name: str(value)
            for name, value in {
                **COLUMNS,
                "attention": attention,
                "seed": seed,
                "score": score,
                "validation": score,
                **columns,
            }.items()
        }
        for seed, score in enumerate(scores)
    ]


def options(text, key_dim=8):
    attentions = script("attentions")
    args = attentions.parse(text)
    return attentions.layer_arguments(args.name, args, key_dim)


def test_an_attention_without_flags_has_the_layer_s_defaults():
    made = options("normal:trigonometric")
    assert set(made) == {"spectral_prior", "feature_map"}
    assert options("softmax") is None
    assert options("GMM-PRF").keys() == keras_kt.paper_system("GMM-PRF").keys()


def test_flags_reach_prior_map_and_layer():
    made = options(
        "normal:self --initial-scale 0.5 --scale-spread 2 --qk-norm none "
        "--spectral-pace 3 --num-features 16 --redraw step"
    )
    assert made["spectral_prior"].initial_scale == 0.5
    assert made["spectral_prior"].scale_spread == 2.0
    assert made["feature_map"].prefactor == "self"
    rest = {k: v for k, v in made.items() if not isinstance(v, keras.Layer)}
    assert rest == {
        "qk_norm": None,
        "spectral_pace": 3.0,
        "num_features": 16,
        "redraw": "step",
    }
    keras_kt.KernelizedAttention(2, 8, **made)
    assert options("normal:positive --qk-norm l2")["qk_norm"] == "l2"
    assert options("normal:trigonometric --qk-norm auto")["qk_norm"] == "auto"


def test_empirical_priors_are_tied_or_not():
    assert options("empirical:self")["spectral_prior"].tied
    assert not options("empirical:self --untied")["spectral_prior"].tied
    split = script("attentions").split
    assert split("empirical:self --untied") == ("empirical:self", "--untied")


def test_one_number_scales_the_spread_of_a_mixture():
    plain = options("mixture:positive --components 4")["spectral_prior"]
    scaled = options("mixture:positive --components 4 --initial-scale 0.5")
    np.testing.assert_allclose(
        scaled["spectral_prior"].initial_scale,
        0.5 * np.array(plain.initial_scale),
    )


def test_systems_come_as_published_and_mended_and_take_a_d():
    for name in keras_kt.PAPER_SYSTEMS:
        mended = options(f"mended:{name} --num-features 64")
        keras_kt.KernelizedAttention(2, 8, **mended)
        assert mended["num_features"] == 64
    assert options("GMM-RKS")["num_features"] == 64
    assert options("GMM-RKS --num-features 32")["num_features"] == 32


@pytest.mark.parametrize(
    "text",
    [
        "softmax --spectral-pace 3",
        "generator:positive --initial-scale 2",
        "GMM-PRF --scale-spread 2",
        "normal:self --untied",
        "normal:self --prefactor self",
        "mended:GMM-RKS --qk-norm l2",
        "normal:positive --smoothing 0.1",
    ],
)
def test_flags_of_other_attentions_are_refused(text):
    with pytest.raises(ValueError, match="does not apply to the --attention"):
        options(text)


@pytest.mark.parametrize("name", ["normal", "mended:softmax", "old:GMM-RKS"])
def test_unknown_attentions_are_refused(name):
    with pytest.raises(ValueError, match="must be softmax, one of GMM-RKS"):
        options(name)


def test_the_number_of_features_is_the_layer_s_own():
    attentions = script("attentions")
    for name, flags in (
        ("normal:positive", ""),
        ("mixture:positive", "--components 4"),
        ("fixed:trigonometric", "--num-features 32"),
        ("GMM-RKS", ""),
        ("FastFood-PRF", ""),
    ):
        layer = keras_kt.LinearAttention(2, 8, **options(f"{name} {flags}"))
        layer.build(*[(None, 5, 2, 8)] * 3)
        prior, of_map = layer.spectral_prior, layer.feature_map
        count = prior.num_frequencies * of_map.sides
        assert attentions.num_features(name, flags, 8) == count
    assert attentions.num_features("softmax", "", 8) is None


def test_learned_laws_are_told_from_fixed_ones():
    is_learned = script("attentions").is_learned
    learned = ["GMM-RKS", "mended:GMM-RKS", "normal:self", "empirical:positive"]
    fixed = ["softmax", "fixed:self", "Performer", "mended:RBF-RKS"]
    assert all(map(is_learned, learned)) and not any(map(is_learned, fixed))


def test_sizes_are_in_one_order_and_leave_out_the_budget():
    given = script("flags").given_sizes
    words = "--key-dim=4 --steps 20 --draws 3 --blocks 2 --density 0.5 0.25"
    sizes = given([*words.split(), "--preset", "paper"], "sparsity")
    assert sizes == "--preset paper --density 0.5 0.25 --blocks 2 --key-dim 4"
    assert given(["--examples", "8", "--no-xla"], "text") == ""
    assert given(["--pairs", "16"], "mqar") == "--pairs 16"


def test_a_run_is_told_by_its_sizes(tmp_path):
    records = script("records")
    (first,) = rows("softmax", [0.5])
    for sizes in ("", "--pairs 16", "--pairs 32"):
        row = {**first, "sizes": sizes, "score": f"0.{len(sizes)}"}
        records.write(tmp_path, [row], {"curve": [float(len(sizes))]})
    again = {**first, "sizes": "--pairs 16", "score": "0.9"}
    records.write(tmp_path, [again], {"curve": [9.0]})
    read = records.read(tmp_path)
    assert [row["score"] for row in read] == ["0.0", "0.9", "0.10"]
    curves = [records.read_arrays(tmp_path, row)["curve"][0] for row in read]
    assert curves == [0.0, 9.0, 10.0]
    assert [records.label(row, True) for row in read] == [
        "softmax",
        "softmax-pairs-16",
        "softmax-pairs-32",
    ]


def test_studies_from_before_there_were_sizes_are_read_and_added_to(tmp_path):
    records = script("records")
    old = [
        {k: v for k, v in row.items() if k != "sizes"}
        for row in rows("softmax", [0.25, 0.75])
    ]
    keys = tuple(key for key in records.KEYS if key != "sizes")
    for row in old:
        records.write(tmp_path, [row], {"curve": [1.0]}, keys=keys)
    assert "sizes" not in records.read(tmp_path)[0]
    before = {
        row["seed"]: records.read_arrays(tmp_path, row)
        for row in records.read(tmp_path)
    }
    assert before["0"] and before["1"]
    new = rows("softmax", [0.5])[0] | {"sizes": "--blocks 1"}
    again = rows("softmax", [0.125])[0]
    records.write(tmp_path, [new], {"curve": [2.0]})
    records.write(tmp_path, [again], {"curve": [3.0]})
    read = records.read(tmp_path)
    assert [(row["sizes"], row["seed"], row["score"]) for row in read] == [
        ("", "0", "0.125"),
        ("", "1", "0.75"),
        ("--blocks 1", "0", "0.5"),
    ]
    curves = [records.read_arrays(tmp_path, row)["curve"][0] for row in read]
    assert curves == [3.0, 1.0, 2.0]


def test_the_report_names_sizes_where_they_differ():
    by_task = script("report").by_task
    same = rows("softmax", [0.5, 0.5], sizes="--blocks 1")
    assert list(by_task(same)["sparsity"]) == ["softmax"]
    other = rows("softmax", [0.5], sizes="--blocks 2")
    assert list(by_task([*same, *other])["sparsity"]) == [
        "softmax-blocks-1",
        "softmax-blocks-2",
    ]


def test_sizes_that_vary_are_a_table_s_columns():
    study = [
        *rows("softmax", [0.5], sizes="--pairs 128 --blocks 2"),
        *rows("softmax", [0.5, 1.0], sizes="--pairs 16 --blocks 2"),
        *rows("softmax", [0.75], sizes="--pairs 16 --blocks 1"),
        *rows("normal:self", [0.25], sizes="--pairs 32 --blocks 2"),
    ]
    table = script("grids").table
    assert table("mqar", study) == [
        "## mqar by pairs",
        "",
        "| attention | 16 | 32 | 128 |",
        "| --- | --- | --- | --- |",
        "| normal-self --blocks 2 |  | 0.2500 |  |",
        "| softmax --blocks 1 | 0.7500 |  |  |",
        "| softmax --blocks 2 | 0.7500 ± 0.2500 |  | 0.5000 |",
        "",
    ]
    assert table("mqar", study[:1]) == table("mqar", rows("softmax", [0])) == []
    (job,) = rows("softmax", [0.5])
    columns = table("x", [job, *rows("softmax", [0.5], sizes="--length 9")])[2]
    assert columns == "| attention | preset | 9 |"


def jobs(*words):
    sweep = script("sweep")
    return sweep.make_jobs(sweep.parse_args(list(map(str, words))))


def test_a_sweep_crosses_what_varies():
    made = jobs(
        *("--tasks", "mqar", "--attention", "softmax", "normal:self"),
        *("--vary", "pairs", 16, 32, "--vary", "num_features", 64, 128),
        *("--seeds", 0, 1, "--", "--blocks", 2, "--steps", 20),
    )
    seen = {(j["attention"], j["flags"], j["sizes"], j["seed"]) for j in made}
    sizes = [f"--pairs {pairs} --blocks 2" for pairs in (16, 32)]
    assert len(made) == len(seen) and seen == {
        *(("softmax", "", each, seed) for each in sizes for seed in (0, 1)),
        *(
            ("normal:self", f"--num-features {d}", each, seed)
            for d in (64, 128)
            for each in sizes
            for seed in (0, 1)
        ),
    }
    # A job has the name of the row it leaves.
    (job,) = jobs("--tasks", "mqar", "--attention", "softmax")
    assert script("sweep").name(job) == "mqar-softmax-0"


@pytest.mark.parametrize(
    "words", ["pairs 16", "steps 20 40", "num_features", "nothing 1"]
)
def test_a_sweep_refuses_to_vary_what_tells_no_run_apart(words, capsys):
    with pytest.raises(SystemExit):
        jobs("--tasks", "mqar", "image", "--vary", *words.split())
    assert "--vary needs a flag's name" in capsys.readouterr().err


def test_differences_by_hand():
    compare = script("compare")
    study = [
        *rows("normal:self", [0.5, 0.75, 1.0], flags="--num-features 64"),
        *rows("fixed:self", [0.25, 0.75], flags="--num-features 64"),
        *rows("normal:self", [0.9], flags="--num-features 32"),
        *rows("softmax", [1.0, 1.0, 1.0]),
    ]
    (found,) = compare.differences(study, "normal:self", "fixed:self")
    # Of seeds 0 and 1: 1/4 and 0, whose deviation is √2/8.
    assert (found.first, found.second) == (0.625, 0.5)
    assert (found.gain, found.error, found.seeds) == (0.125, 0.125, 2)
    assert found.features == "64"
    few, many = compare.differences(study, "softmax", "normal:self")
    assert (few.features, few.seeds, few.error) == ("32", 1, None)
    assert few.gain == pytest.approx(0.1)
    assert (many.features, many.seeds, many.gain) == ("64", 3, 0.25)
    assert many.error == pytest.approx(0.25 / 3**0.5)
    unequal = "normal:self --num-features 32", "fixed:self --num-features 64"
    (found,) = compare.differences(study, *unequal)
    assert (found.features, found.seeds) == ("32 / 64", 1)
    assert not compare.differences(study, unequal[0], "fixed:self")


def test_runs_of_other_sizes_or_schedules_are_no_pairs():
    compare = script("compare")
    first = rows("normal:self", [0.5, 0.5], steps=800, sizes="--blocks 1")
    for columns in ({"steps": 400}, {"sizes": "--blocks 2"}, {"task": "mqar"}):
        shared = {"steps": 800, "sizes": "--blocks 1", **columns}
        study = [*first, *rows("softmax", [0.5, 0.5], **shared)]
        assert not compare.differences(study, "normal:self", "softmax")
    assert not compare.differences(
        [*first, *rows("softmax", [0.5], steps=800, sizes="--blocks 1")][1:],
        "normal:self",
        "softmax",
    )


def test_lower_bits_are_a_gain():
    study = [
        *rows("normal:self", [2.0, 2.5], metric="bits per byte"),
        *rows("fixed:self", [2.5, 2.5], metric="bits per byte"),
    ]
    (found,) = script("compare").differences(study, "normal:self", "fixed:self")
    assert (found.gain, found.error) == (0.25, 0.25)
    (found,) = script("compare").best_differences(study)
    assert (found.gain, found.names) == (0.25, ("normal-self", "fixed-self"))


def test_the_best_are_chosen_by_validation_at_equal_d():
    compare = script("compare")
    of_64 = {"flags": "--num-features 64"}
    study = [
        *rows("normal:self", [0.5, 0.5], validation=0.9, **of_64),
        *rows("mixture:self", [0.8, 0.8], validation=0.8, **of_64),
        # A single seed is no match for two, and another D none at all.
        *rows("generator:self", [0.9], validation=1.0, **of_64),
        *rows("fixed:self", [0.4, 0.4], validation=0.3, **of_64),
        *rows("Performer", [0.7, 0.7], validation=0.2, **of_64),
        *rows("GMM-RKS", [0.7, 0.7], flags="--num-features 128"),
        *rows("normal:self", [0.7], flags="--num-features 64 --decay gated"),
    ]
    (found,) = compare.best_differences(study)
    assert found.names == (
        "normal-self-num-features-64",
        "fixed-self-num-features-64",
    )
    assert found.gain == pytest.approx(0.1) and found.error == 0.0


def test_comparisons_are_printed_and_kept(tmp_path, capsys):
    records = script("records")
    for row in [
        *rows("normal:self", [0.5, 1.0]),
        *rows("Performer", [0.5] * 2),
    ]:
        records.write(tmp_path, [row])
    words = ("compare", "--results", tmp_path, "--pair")
    experiment(*words, "normal:self", "Performer")
    text = (tmp_path / "compare.md").read_text()
    line = "| sparsity |  | 16 | 0.7500 | 0.5000 | +0.2500 | 0.2500 | 2 |"
    assert text.count(line) == 2 and text.rstrip() in capsys.readouterr().out
    experiment(*words, "normal:self", "GMM-RKS")
    assert "No runs differ" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="run something first"):
        experiment("compare", "--results", tmp_path / "nothing")


def test_names_of_lines_keep_apart():
    spread = script("size_plots").spread
    assert spread([0.1, 0.5, 0.9], 0.25) == [0.1, 0.5, 0.9]
    np.testing.assert_allclose(spread([0.5, 0.5], 0.1), [0.45, 0.55])
    np.testing.assert_allclose(spread([0.0, 0.0, 0.2], 0.1), [0.0, 0.1, 0.2])
    places = spread([0.1, 0.12, 0.2, 0.21, 0.8], 0.1)
    assert (np.diff(places) > 0.1 - 1e-9).all()
    assert places[-1] == 0.8 and np.mean(places[:4]) == pytest.approx(0.1575)


def heads_study():
    return [
        row
        for prior in ("fixed", "normal", "empirical")
        for feature_map in ("positive", "self")
        for key_dim in (2, 8)
        for row in rows(
            f"{prior}:{feature_map}",
            [0.5, 0.75],
            flags="--num-features 64",
            key_dim=key_dim,
            sizes=f"--key-dim {key_dim}",
        )
    ]


def test_pictures_against_sizes_show_means_and_errors():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    size_plots = script("size_plots")
    figure = size_plots.draw_heads(heads_study())
    assert [axes.get_title() for axes in figure.axes] == [
        "positive features",
        "self-normalized features",
    ]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == [
            *("empirical", "fixed", "normal"),
        ]
        for container in axes.containers:
            (line, _, (bars,)) = container
            np.testing.assert_array_equal(line.get_xdata(), [2, 8])
            np.testing.assert_array_equal(line.get_ydata(), [0.625] * 2)
            # Of two seeds: a quarter apart, so an error of an eighth.
            (low, high), _ = bars.get_segments()
            assert high[1] - low[1] == pytest.approx(0.25)
    recall = [
        row
        for attention, d in (("normal:self", 16), ("normal:self", 32))
        for pairs in (16, 64)
        for row in rows(
            attention,
            [0.5],
            flags=f"--num-features {d}",
            pairs=pairs,
            sizes=f"--pairs {pairs} --blocks 2",
        )
    ]
    recall += rows("softmax", [1.0], pairs=16, sizes="--pairs 16 --blocks 2")
    figure = size_plots.draw_pairs(recall)
    assert [axes.get_title() for axes in figure.axes] == [
        "D = 16, blocks 2",
        "D = 32, blocks 2",
    ]
    for axes in figure.axes:
        names = [text.get_text() for text in axes.texts]
        assert sorted(names) == ["normal:self", "softmax"]
    pyplot.close("all")


def test_a_study_of_one_size_has_no_such_picture():
    size_plots = script("size_plots")
    one = rows("normal:self", [0.5], pairs=16)
    assert size_plots.draw_heads(one) is size_plots.draw_pairs(one) is None
    assert size_plots.draw_pairs(rows("softmax", [0.5])) is None


def test_arguments_of_a_layer_come_from_a_run_s_flags():
    flags = script("flags")
    args = script("attentions").parse("fixed:positive --num-features 8")
    args.attention, args.preset = args.name, argparse.Namespace(key_dim=4)
    assert flags.attention_options(args)["num_features"] == 8


def test_weight_decay_spares_all_that_a_kernel_learns():
    """Temperatures and smoothings are matrices, and were not spared."""
    x = keras.Input((5, 6))
    made = options("normal:trigonometric --qk-norm l2 --num-features 8")
    layer = keras_kt.KernelizedAttention(2, 8, **made)
    model = keras.Model(x, layer(x, x))
    preset = script("mqar").PRESETS["cpu"]
    args = argparse.Namespace(preset=preset)
    optimizer = script("recipe").make_optimizer(args, model)
    weights = model.trainable_variables
    for weight in weights:
        weight.assign(tf.ones_like(weight))
    for _ in range(2):
        # The first step has a rate of zero.
        optimizer.apply(
            [np.zeros(w.shape, "float32") for w in weights], weights
        )
    kernel = {id(weight) for weight in layer.spectral_weights}
    assert len(kernel) == 3
    for weight in weights:
        is_spared = id(weight) in kernel or len(weight.shape) < 2
        is_same = (weight.numpy() == 1.0).all()
        assert is_same == is_spared, weight.path


PAGE = """Text
<!-- table: results/a.md, B less C -->
| old |
<!-- end -->
More
"""
STUDY = (
    "# A\n\n| no |\n\n## B less C\n\nWords.\n\n| x |\n| - |\n| 1 |\n\n| y |\n"
)


def test_marked_tables_are_those_of_the_study(tmp_path):
    (tmp_path / "results").mkdir()
    study, pages = tmp_path / "results" / "a.md", script("pages")
    with pytest.raises(LookupError, match="results/a.md does not exist"):
        pages.fill(PAGE, tmp_path)
    study.write_text(STUDY)
    filled = pages.fill(PAGE, tmp_path)
    assert filled == PAGE.replace("| old |\n", "| x |\n| - |\n| 1 |\n")
    assert pages.fill(filled, tmp_path) == filled
    study.write_text("## B less C\n\n## D\n\n| x |\n")
    with pytest.raises(
        LookupError, match="no table under a heading 'B less C'"
    ):
        pages.fill(PAGE, tmp_path)


def test_the_tables_of_all_pages_are_those_of_their_studies():
    fill = script("pages").fill
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        assert fill(text, ROOT) == text, page
