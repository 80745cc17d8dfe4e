from __future__ import annotations

from megatron_tf.telemetry.text import are, bullets, count_of, plural, size, some_of, table


def test_one_is_singular_and_every_other_number_is_not():
    assert [plural("step", count) for count in (0, 1, 2)] == ["steps", "step", "steps"]
    assert [plural(noun, 2) for noun in ("process", "branch", "batch", "epoch")] == [
        "processes",
        "branches",
        "batches",
        "epochs",
    ]
    assert [count_of(count, "step") for count in (0, 1, 1000)] == ["0 steps", "1 step", "1,000 steps"]
    assert [are(count) for count in (0, 1, 2)] == ["are", "is", "are"]


def test_sizes_have_the_largest_unit_that_leaves_one_or_more():
    sizes = (0, 1023, 1024, 1.5 * 2**20, 2**30, 5000 * 2**30)
    assert [size(number) for number in sizes] == ["0 B", "1.02e+03 B", "1 KiB", "1.5 MiB", "1.0 GiB", "5,000.0 GiB"]


def test_lists_are_not_longer_than_asked():
    assert some_of(["a", "b"], 2) == "a, b" and some_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert bullets(["a", "b"]) == "\n  - a\n  - b" and bullets(["a", "b", "c"], 1) == "\n  - a\n  - and 2 more"


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text():
    rows = [("data", "loss", "note"), ("a", "2.5", ""), ("longer", "10.25", "new")]
    assert table(rows).splitlines() == [
        "data     loss  note",
        "a         2.5",
        "longer  10.25   new",
    ]
    assert table(rows, to_left=(0, 2)).splitlines()[-1] == "longer  10.25  new"
