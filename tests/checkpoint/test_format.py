from __future__ import annotations

import json
import math

import pytest

from megatron_tf.checkpoint.format import (
    CheckpointIndex,
    Manifest,
    RankContribution,
    StoredFile,
    StoredPiece,
    expected_tensors,
    folder_name,
)
from megatron_tf.errors import CheckpointError

CHECKSUM = "0123456789abcdef" * 2


def full_index(sandbox) -> CheckpointIndex:
    index = sandbox.index(
        growth_history=({"method": "zero_key", "loss_before": 3.25},),
        data={"files": [["a.bin", 12]]},
        trackers={"wandb": "abc"},
        run={"loss_scale": 65536.0},
    )
    return index.with_pieces(
        {
            (name, state): [StoredPiece(0, tensor.numel, "shard_00000.safetensors", f"{name}/{state}/0")]
            for name, tensor in index.tensors.items()
            for state in tensor.states
        }
    )


def test_index_survives_json(sandbox):
    index = full_index(sandbox)
    assert CheckpointIndex.from_json("index.json", index.to_json()) == index


def test_scale_survives_json_to_the_last_bit(sandbox):
    index = full_index(sandbox)
    assert CheckpointIndex.from_json("index.json", index.to_json()).scales["blocks.0.ffn"] == math.sqrt(11)


def test_folder_names_sort_and_do_not_run_out():
    assert folder_name(1000) == "step_00001000"
    assert folder_name(123456789) == "step_123456789"


def test_pieces_are_stored_in_order(sandbox):
    index = sandbox.index(shapes={"a": (4,)})
    pieces = [StoredPiece(2, 4, "f", "y"), StoredPiece(0, 2, "f", "x")]
    assert [piece.start for piece in index.with_pieces({("a", "weight"): pieces}).tensors["a"].states["weight"]] == [
        0,
        2,
    ]


def malformed(path: list, value):
    """Set, or with ... delete, one field of an index."""

    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        if value is ...:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


NAME = "final_norm.bias"
WEIGHT = ["tensors", NAME, "states", "weight"]


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["step"], ..., "step is missing"),
        (["step"], -1, "step is -1, expected an integer of at least 0"),
        (["step"], True, "step is True"),
        (["samples"], 1.0, "samples is 1.0"),
        (["tokens"], "12", "tokens is '12'"),
        (["model"], [], "model is a list, expected an object"),
        (["scales", "blocks.0.ffn"], 0, "scales.blocks.0.ffn is 0, expected a number above 0"),
        (["scales", "blocks.0.ffn"], "x", "scales.blocks.0.ffn is 'x'"),
        (["growth_history"], {}, "growth_history is an object, expected a list"),
        (["growth_history"], [1], "growth_history must hold objects"),
        (["trackers"], {"wandb": 3}, "trackers.wandb is a number, expected a string"),
        (["adam_steps", NAME], [[0, 5]], f"adam_steps.{NAME} holds [0, 5]"),
        (["adam_steps", NAME], [[0, 3, 1]], f"{NAME}, adam_steps: nothing holds [3, 5)"),
        (["adam_steps", "ghost"], [[0, 3, 1]], "ghost, adam_steps: there is no such tensor"),
        (["tensors", NAME, "shape"], [0], f"tensors.{NAME}.shape holds 0"),
        (["tensors", NAME, "shape"], [6], f"{NAME}, weight: nothing holds [5, 6)"),
        (["tensors", NAME, "states", "velocity"], {}, f"tensors.{NAME}.states.velocity is an unknown state"),
        ([*WEIGHT, "dtype"], "bfloat16", f"tensors.{NAME}.states.weight.dtype is 'bfloat16'"),
        ([*WEIGHT, "pieces"], [[0, 5, "f"]], "pieces holds [0, 5, 'f'], expected [start, stop, file, key]"),
        ([*WEIGHT, "pieces"], [[3, 3, "f", "k"]], "pieces holds [3, 3), which is not a range"),
        ([*WEIGHT, "pieces"], [[0, 5, "../f", "k"]], "names '../f', which is not a file name"),
        ([*WEIGHT, "pieces"], [], f"{NAME}, weight: nothing holds [0, 5)"),
        ([*WEIGHT, "rows"], 3, "rows is not a field of this format version"),
        (["notes"], "", "notes is not a field of this format version"),
        (["format_version"], 0, "format_version is 0"),
        (["format_version"], 2, "format_version is 2, this program reads up to 1. Use a newer version"),
    ],
)
def test_each_malformed_field_is_named(sandbox, path, value, field):
    content = json.loads(full_index(sandbox).to_json())
    malformed(path, value)(content)
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.from_json("run/index.json", json.dumps(content).encode())
    assert "run/index.json" in str(caught.value) and field in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "is a list, expected an object"),
        (b'{"step": 1, "step": 2}', "'step' stands there twice"),
        (b'{"step": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_is_not_proper_json_is_refused(text, problem):
    with pytest.raises(CheckpointError, match="index.json") as caught:
        CheckpointIndex.from_json("index.json", text)
    assert problem in str(caught.value)


def test_a_newer_version_is_reported_before_its_unknown_fields():
    with pytest.raises(CheckpointError, match="format_version is 7"):
        Manifest.from_json("manifest.json", b'{"format_version": 7, "shape_of_things": {}}')


def test_what_json_cannot_express_is_refused_when_writing(sandbox):
    with pytest.raises(CheckpointError, match="index.json"):
        sandbox.index(run={"loss": math.nan}).to_json()


def test_manifest_survives_json():
    manifest = Manifest("token", {"index.json": StoredFile(3, CHECKSUM)})
    assert Manifest.from_json("manifest.json", manifest.to_json()) == manifest


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "files has no index.json"),
        ({"../index.json": {"bytes": 1, "xxh3_128": CHECKSUM}}, "is not a file name"),
        ({"index.json": {"bytes": -1, "xxh3_128": CHECKSUM}}, "files.index.json.bytes is -1"),
        ({"index.json": {"bytes": 1, "xxh3_128": "abc"}}, "files.index.json.xxh3_128 is 'abc'"),
        ({"index.json": {"bytes": 1}}, "files.index.json.xxh3_128 is missing"),
    ],
)
def test_each_malformed_field_of_the_manifest_is_named(files, problem):
    text = json.dumps({"format_version": 1, "token": "t", "files": files}).encode()
    with pytest.raises(CheckpointError) as caught:
        Manifest.from_json("manifest.json", text)
    assert problem in str(caught.value)


def test_part_survives_json():
    part = RankContribution(3, None, "shard_00003.safetensors", 12, CHECKSUM, (("a", "weight", 0, 3, "a/weight/0"),))
    assert RankContribution.from_json("part", part.to_json()) == part
    assert RankContribution.from_json("part", RankContribution(3, error="disk full").to_json()).error == "disk full"


def test_weights_only_needs_no_step_counts(sandbox):
    index = sandbox.index(tensors=expected_tensors({"a": (4,)}, ["weight"]), adam_steps={})
    complete = index.with_pieces({("a", "weight"): [StoredPiece(0, 4, "f", "k")]})
    assert complete.problems() == []
