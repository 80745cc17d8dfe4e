"""What a report says, in words and as a page."""

from __future__ import annotations

from megatron_tf.study.tables import as_page, in_words


def arm(name, **changes):
    return {
        "name": name, "comparable": True, "parameters": 12345, "tokens": 4_070_000, "flops": 1.5e13, "ended": 2,
        "seeds": 2,
        "seconds": 3600.0, "state_bytes": 2**20, "loss": {"mean": 3.7052, "low": 3.5, "high": 3.9}, "sweep": None,
        "cost_against": {}, "growth": None, "routing": None, "clock": None, "diverged": 0, "metrics": {}, **changes,
    }  # fmt: skip


def found(*arms):
    return {
        "unit": "tokens", "unit_tokens": 1, "reference": "on", "arms": arms, "laws": {}, "transfers": [],
        "runs_ended": 4, "runs": 6, "flops_spent": 1e14, "seconds_spent": 60.0,
    }  # fmt: skip


def test_a_page_is_markdown_of_what_has_ended():
    better = {"mean": -0.0537, "low": -0.06, "high": -0.04, "verdict": "better"}
    other = {"mean": -0.076, "low": -0.1, "high": -0.05, "cost": 2.3456}
    page = as_page(
        found(
            arm("on"),
            arm("split", difference=better),
            arm("dense", comparable=False, difference_at_other_cost=other),
            arm("part", seeds=3),
            arm("longer", ended=1, seeds=1),
            arm("later", loss=None, ended=0),
        )
    )
    head, rule, *rows = page.splitlines()
    assert head.startswith("| arm | parameters | tokens | FLOPs | loss | against `on` | 95 % | state |")
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert rows[0] == "| `on` | 12,345 | 4.07M | 1.5e13 | 3.705 |  |  | 1 MiB |"
    assert rows[1].split(" | ")[5:7] == ["−0.054", "−0.060 to −0.040"]
    assert rows[2].split(" | ")[5] == "−0.076, at 2.35 times the cost"
    assert rows[3].startswith("| `part` (2 of 3 seeds) |") and rows[4].startswith("| `longer` (one seed) |")
    assert "later" not in page and "![" in page and "4 of 6 runs have ended" in page


def test_routers_have_a_table_and_a_picture():
    routing = {
        "candidates": 288, "steps": [250, 500], "load_max": [1.8, 1.6], "load_spread": [0.91, 0.94],
        "unused_share": [1 / 288, 0.0], "copy_distance": [0.4, 0.66],
    }  # fmt: skip
    of = found(arm("split", routing={"ffn": routing}))
    line = next(line for line in in_words(of).splitlines() if line.startswith("split") and "288" in line)
    assert line.split() == ["split", "ffn", "288", "250", "1.80", "1.60", "0.910", "0.940", "1", "0", "0.40", "0.66"]
    assert "routing.png" in as_page(of) and "routing.png" not in as_page(found(arm("dense")))
