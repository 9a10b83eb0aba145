"""Paired differences, and pictures against sizes."""

import numpy as np
import pytest

from benchmarks import overview
from benchmarks.attention import report
from experiments import records, tasks
from tests.helpers import figures
from tests.helpers.scripts import ROOT, experiment, script
from tests.helpers.studies import rows


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


def names_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_pictures_against_sizes_show_means_and_errors():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    size_plots = script("size_plots")
    figure = size_plots.draw_heads(heads_study())
    assert [axes.get_title() for axes in figure.axes] == [
        "positive features",
        "self-normalized features",
    ]
    assert names_of(figure) == ["empirical", "fixed", "normal"]
    for axes in figure.axes:
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
        "16 features, blocks 2",
        "32 features, blocks 2",
    ]
    assert names_of(figure) == ["normal:self", "softmax"]
    pyplot.close("all")


def test_a_study_of_one_size_has_no_such_picture():
    size_plots = script("size_plots")
    one = rows("normal:self", [0.5], pairs=16)
    assert size_plots.draw_heads(one) is size_plots.draw_pairs(one) is None
    assert size_plots.draw_pairs(rows("softmax", [0.5])) is None


def test_a_method_has_one_color_in_all_pictures():
    """Performer was grey, violet and black, softmax black, grey and brown."""
    of = script("styles").of
    assert of("GMM-RKS") == of("mended-GMM-RKS")
    assert of("generator:trigonometric") == of("Generator-RKS")
    assert of("fixed:positive") == of("Performer")
    colors = [of(f"{name}:self")["color"] for name in script("styles").METHODS]
    assert len(set(colors)) == len(colors)
    looks = [
        tuple(of(f"normal{rest}").items())
        for rest in (":positive", ":trigonometric", ":self", ":positive decay")
    ]
    assert len(set(looks)) == 4 and len({look[0] for look in looks}) == 1
    # The layer's default, in the pictures of benchmarks.
    assert report.style("ours")["color"] == of("normal:positive")["color"]
    assert report.style("softmax")["color"] == of("softmax")["color"]


def test_pictures_are_as_wide_as_they_are_shown():
    """Two columns of tiny panels were 1,500 pixels wide, and shown at 700."""
    styles = script("styles")
    for path in (ROOT / "results").rglob("*.png"):
        # These are drawn by the package's own functions.
        if path.parent.name not in ("convert", "gallery"):
            header = path.read_bytes()[16:24]
            width = int.from_bytes(header[:4])
            assert width == styles.WIDTH * styles.RESOLUTION, path


def test_scores_are_drawn_best_first_with_their_draws():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plots = script("plots")
    more = {"stride": 1, "fresh_draws": "0.25 0.375"}
    systems = {
        "softmax": rows("softmax", [0.5], **{**more, "fresh_draws": ""}),
        "Performer": rows("Performer", [0.75, 1.0], **more),
    }
    tasks = {"sparsity": systems}
    (panel,) = plots.draw_scores(tasks).axes
    names = [text.get_text() for text in panel.get_yticklabels()]
    assert names == ["Performer", "softmax"]
    points = [tuple(map(list, line.get_data())) for line in panel.lines]
    assert ([0.25, 0.375], [0, 0]) in points
    assert [x for x, y in points if y == [0] and x != []] == [[0.75], [1.0]]
    for of_system in systems.values():
        for row in of_system:
            row["metric"] = "bits per byte"
    (panel,) = plots.draw_scores(tasks).axes
    names = [text.get_text() for text in panel.get_yticklabels()]
    assert names == ["softmax", "Performer"]
    pyplot.close("all")


def test_curves_that_differ_in_flags_alone_look_different(tmp_path):
    """Three runs of one attention had one color and one mark."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    plots = script("plots")
    systems = {}
    for sizes in ("", "--dropout 0.1", "--hidden 512"):
        row = dict.fromkeys(records.KEYS, "0") | {
            "attention": "normal:positive",
            "sizes": sizes,
            "title": "a task",
            "metric": "accuracy",
            "stride": "1",
        }
        points = [[1.0, 2.0, 0.5, 1.0], [2.0, 1.0, 0.6, 2.0]]
        records.write(tmp_path, [row], {"curve": np.array(points)})
        systems[f"normal-positive{sizes}"] = [row]
    (panel,) = plots.draw_curves({"task": systems}, tmp_path).axes
    looks = {(line.get_alpha(), line.get_linestyle()) for line in panel.lines}
    assert len(panel.lines) == len(looks) == 3
    pyplot.close("all")


def test_the_first_picture_is_drawn_from_results():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    time, memory, accuracy = overview.draw(ROOT / "results").axes
    a_token = 1000 / 8192  # Microseconds, of milliseconds.
    for panel, expected in (
        (time, a_token * figures.milliseconds("layer", 8192, "ours")),
        (memory, figures.memory("ours", 8192) / 2**20),
    ):
        softmax, ours = panel.lines
        assert softmax.get_color() == script("styles").SOFTMAX
        lengths = ours.get_xdata()
        assert lengths[-1] == 65536 and 8192 in lengths
        place = list(lengths).index(8192)
        assert ours.get_ydata()[place] == pytest.approx(expected)
    learned = next(
        c for c in accuracy.containers if c[0].get_linestyle() == "--"
    )
    assert list(learned[0].get_xdata()) == [2, 4, 8, 16, 32]
    pyplot.close("all")


def test_what_is_to_beat_belongs_to_the_presets_data():
    assert "0.320" in tasks.to_beat("listops")
    assert "0.320" in tasks.to_beat("listops", "--key-dim 4")
    assert not tasks.to_beat("listops", "--min-length 30 --length 110")
    assert not tasks.to_beat("a task of one's own")
