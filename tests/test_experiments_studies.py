"""Sizes that tell runs apart: in records, sweeps, reports and pages."""

import pytest

from tests.helpers.scripts import ROOT, script
from tests.helpers.studies import rows


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
