from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed import spawn
from prepared import write_tokens
from torch.nn.functional import cross_entropy

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.topology import Topology
from megatron_tf.data.documents import Boundaries, LossMask
from megatron_tf.data.indexed import IndexedDataset, IndexedWriter
from megatron_tf.errors import DataError
from megatron_tf.evaluation import text
from megatron_tf.evaluation.perplexity import Score, num_batches, perplexity, pooled, summed_loss
from megatron_tf.evaluation.windows import Windows
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.parallel.groups import make_group

# Sums of some thousand fp64 numbers in another order: 1e-16 each.
TOLERANCE = 1e-12
# Added to the model: each position uses one of three groups in each of four slots, and five tokens more.
CANDIDATES = {
    "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 69},
    "sparse": {"ffn": {"group_size": 16, "candidates": 3, "dense": 5}},
}


@torch.no_grad()
def one_by_one(model, dataset, windows) -> float:
    """Every window by itself, through the model of one process, without batches, padding or masks."""
    total = 0.0
    for window in windows:
        tokens = torch.from_numpy(dataset.tokens(window.start, window.stop + 1))
        losses = cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
        total += float(losses[-window.scored :].sum())
    return total


def loss(
    rank, checkpoint, model, prefix, topology, stride, sequence=False, dtype=torch.float64, ends=(), **settings
) -> float:
    """Of all ranks together."""
    tensor = TensorParallel(make_group(topology, "tensor", 60.0), sequence)
    stage = load_stage(open_checkpoint(checkpoint), model, topology, rank, tensor, dtype, document_ends=ends)
    dataset = IndexedDataset(prefix)
    windows = Windows(dataset.num_tokens, model.seq_length, stride)
    own, scored = summed_loss(
        stage, dataset, windows, vocab_size=model.vocab_size, batch_size=3,
        data_rank=topology.coordinate("data", rank), data_size=topology.data, **settings,
    )  # fmt: skip
    is_reporter = stage.following is None and tensor.group.rank == 0
    total = torch.tensor([own, scored] if is_reporter else [0.0, 0.0], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    if "loss_mask" not in settings:
        assert int(total[1]) == dataset.num_tokens - 1
    return float(total[0])


@pytest.mark.parametrize("model", [{}, CANDIDATES], ids=["dense", "candidates"], indirect=True)
@pytest.mark.parametrize("stride", [16, 5])
def test_each_token_counts_once_with_its_own_context(checkpoint, model, tokens, stride):
    dataset = IndexedDataset(tokens)
    windows = Windows(dataset.num_tokens, model.seq_length, stride)
    expected = one_by_one(load_model(checkpoint, torch.float64), dataset, windows)
    done = []
    found = loss(0, checkpoint, model, tokens, Topology(), stride, progress=done.append)
    assert found == pytest.approx(expected, rel=TOLERANCE)
    assert done == list(range(1, num_batches(windows, 3) + 1))
    in_fp32 = loss(0, checkpoint, model, tokens, Topology(), stride, dtype=torch.float32)
    assert in_fp32 == pytest.approx(expected, rel=1e-6)


LAYOUTS = {
    2: [(Topology(tensor=2), False), (Topology(tensor=2), True), (Topology(pipeline=2), False), (Topology(data=2),
                                                                                                 False)],
    4: [(Topology(2, 2, 1), True), (Topology(1, 2, 2), False), (Topology(2, 1, 2), True), (Topology(4, 1, 1), False)],
}  # fmt: skip


@pytest.fixture
def few_tokens(tmp_path):
    """Prefix of data whose windows and batches divide by nothing."""
    write_tokens(tmp_path / "few", documents=3)
    return str(tmp_path / "few")


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, CANDIDATES], ids=["dense", "candidates"], indirect=True)
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_equal_at_every_layout(checkpoint, model, few_tokens, ranks):
    expected = [loss(0, checkpoint, model, few_tokens, Topology(), stride) for stride in (16, 7)]
    spawn(_layouts, ranks, str(checkpoint), model, few_tokens, expected)


def _layouts(group, checkpoint, model, tokens, expected):
    for topology, sequence in LAYOUTS[group.size]:
        for stride, reference in zip((16, 7), expected):
            found = loss(group.rank, checkpoint, model, tokens, topology, stride, sequence)
            assert found == pytest.approx(reference, rel=TOLERANCE), (topology, sequence, stride)
        found = loss(group.rank, checkpoint, model, tokens, topology, 16, sequence, torch.bfloat16)
        assert found == pytest.approx(expected[0], rel=1e-2), (topology, sequence)


ENDS = (95, 60)


def documents_one_by_one(model, dataset) -> float:
    """Windows of 16 side by side, in which each document is read by itself and nothing is asked after an end."""
    total = 0.0
    for window in Windows(dataset.num_tokens, 16, 16):
        tokens = dataset.tokens(window.start, window.stop + 1).tolist()
        document: list[int] = []
        for token, target in zip(tokens, tokens[1:]):
            document.append(token)
            if token == ENDS[0]:
                document = []
                continue
            losses = cross_entropy(model(torch.tensor([document]))[0, -1:], torch.tensor([target]), reduction="sum")
            total += float(losses)
            if token == ENDS[1]:
                document = []
    return total


@torch.no_grad()
def test_documents_are_read_as_in_training(checkpoint, model, tokens):
    """95 ends a document and what follows is not scored; 60 is padding in name only: attention begins anew after it."""
    expected = documents_one_by_one(load_model(checkpoint, torch.float64), IndexedDataset(tokens))
    mask = LossMask(ENDS[0], None)
    alone = loss(0, checkpoint, model, tokens, Topology(), 16, ends=ENDS, loss_mask=mask)
    assert alone == pytest.approx(expected, rel=1e-9)  # positions and masks are the same, sums in another order
    assert alone < 0.999 * loss(0, checkpoint, model, tokens, Topology(), 16)  # there are ends
    spawn(_documents, 2, str(checkpoint), model, tokens, alone)


def _documents(group, checkpoint, model, tokens, expected):
    for topology in (Topology(pipeline=2), Topology(tensor=2)):
        found = loss(group.rank, checkpoint, model, tokens, topology, 16, ends=ENDS, loss_mask=LossMask(ENDS[0], None))
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_a_text_shorter_than_a_window(checkpoint, model, tmp_path):
    with IndexedWriter(tmp_path / "short", vocab_size=99) as writer:
        writer.add_document([5, 7, 11])
    dataset = IndexedDataset(tmp_path / "short")
    expected = one_by_one(load_model(checkpoint, torch.float64), dataset, Windows(3, 16, 16))
    found = loss(0, checkpoint, model, str(tmp_path / "short"), Topology(), 16)
    assert found == pytest.approx(expected, rel=TOLERANCE)


def test_an_id_outside_the_vocabulary_is_named(checkpoint, model, tmp_path):
    with IndexedWriter(tmp_path / "wide", vocab_size=200) as writer:
        writer.add_document([1] * 20)
        writer.add_document([1, 2, 99])
    with pytest.raises(DataError, match=r"document 1, token 2 of it \(token 22 of the file\).*id 99"):
        loss(0, checkpoint, model, str(tmp_path / "wide"), Topology(), 16)


def test_scores():
    first, second = Score(10.0, 5, 4), Score(2.0, 1, None)
    assert (first.loss, first.perplexity) == (2.0, math.exp(2.0))
    assert first.bits_per_byte == pytest.approx(10 / math.log(2) / 4)
    assert second.bits_per_byte is None
    assert pooled([first, first]) == Score(20.0, 10, 8)
    assert pooled([first, second]) == Score(12.0, 6, None)  # a mean over tokens, not over texts
    assert perplexity(1e6) == math.inf


@pytest.mark.parametrize(
    ("mask", "key"),
    [(LossMask(7, None), "mask_eod_loss"), (LossMask(None, 0), "pad_id"), (LossMask(7, 0), "mask_eod_loss")],
)
def test_bits_per_byte_are_not_given_where_tokens_are_left_out(mask, key):
    """Their bytes would be counted, and their losses not."""
    masked = Boundaries((), mask)
    dataset, request = SimpleNamespace(prefix="a", num_tokens=9), SimpleNamespace(max_tokens=None)
    result = text._with_bytes(request, None, masked, dataset, Score(3.0, 4, None))
    assert result.score.bits_per_byte is None and f"data.{key}" in str(result)
