"""Accuracy of a classifier: intervals, tables, the columns of timm, and the same result at every layout."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from images import image_config

from megatron_tf.errors import ConfigError
from megatron_tf.evaluation.images import (
    CSV_COLUMNS,
    IMAGE_EVALUATION,
    Counts,
    as_csv,
    class_table,
    interval,
    paper_line,
    summary_table,
)
from megatron_tf.evaluation.loaded import EvaluationRequest
from megatron_tf.evaluation.run import evaluate
from megatron_tf.runtime.environment import detect

COUNTS = Counts("data/x", ("ape", "bee", "cat"), torch.tensor([[8.0, 4, 6, 8], [2, 1, 0, 1], [0, 0, 0, 0]]).double())


def test_the_interval_is_wilsons():
    assert interval(0.5, 100) == pytest.approx((0.4038315, 0.5961685))
    low, high = interval(1.0, 10)
    assert low == pytest.approx(0.7224672) and high == pytest.approx(1.0)


def test_tables():
    lines = summary_table([COUNTS]).splitlines()
    assert lines[0].split() == ["data", "images", "loss", "top-1", "%", "95", "%", "top-5", "%"]
    assert lines[-1].split()[:4] == ["data/x", "10", "0.5000", "60.00"] and lines[-1].endswith("90.00")
    assert class_table(COUNTS).splitlines()[-3:][0].split() == ["ape", "8", "75.00", "100.00"]
    assert class_table(COUNTS).splitlines()[-1].split() == ["cat", "0", "–", "–"]


def test_the_row_is_timms():
    (row,) = csv.DictReader(io.StringIO(as_csv(image_config({"classes": 3}), 86_447_848, [COUNTS])))
    assert tuple(row) == CSV_COLUMNS
    assert row | {"model": ""} == {
        "model": "", "img_size": "6", "top1": "60.0", "top1_err": "40.0", "top5": "90.0", "top5_err": "10.0",
        "param_count": "86.45", "crop_pct": "0.875", "interpolation": "bicubic",
    }  # fmt: skip


def test_the_paper_is_quoted_where_it_is_about_the_model():
    config = image_config({"classes": 1000})
    assert paper_line(config, 86_447_848) == (
        "The paper's TokenFormer-B/16 of 86M has a top-1 of 82.1 % on ImageNet-1k's validation images."
    )
    assert paper_line(config, 99) is None and paper_line(image_config(), 86_447_848) is None


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (EvaluationRequest(), "data.validation: is empty. Name prepared images there"),
        (EvaluationRequest(data=("x",), stride=3), "--stride: is about text"),
        (EvaluationRequest(data=("x",), tasks=("piqa",)), "--tasks: is about text"),
        (EvaluationRequest(data=("x",), copying=True), "--copying: is about text"),
    ],
)
def test_what_is_about_text_is_refused(request_, message):
    (problem,) = IMAGE_EVALUATION.request_problems(image_config(), request_)
    assert message in problem


def test_a_model_of_text_has_no_classes():
    from tiny import run_config

    with pytest.raises(ConfigError, match="--per-class: a model of text has no classes"):
        evaluate(run_config(), detect({}), EvaluationRequest(data=("x",), per_class=True))
