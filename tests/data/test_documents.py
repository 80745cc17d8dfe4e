"""Which token ends a document, and which labels have no loss for it."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_tf.config.sections.data import Data
from megatron_tf.data.documents import Boundaries, LossMask, boundaries, end_of_document, find_boundaries
from megatron_tf.data.indexed import IndexedDataset, IndexedWriter
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.errors import DataError

EOD, PAD = 7, 8
_ = -100


def prepared(prefix, documents=((1, 2, 7), (), (3, 7)), eod_id: int | None = EOD) -> dict[str, str]:
    """A source; with a summary that says `eod_id`, if that is not None."""
    with IndexedWriter(prefix, 100) as writer:
        for document in documents:
            writer.add_document(document)
    if eod_id is not None:
        write_summary(prefix, CorpusSummary(
            documents=len(documents), tokens=sum(map(len, documents)), bytes=1, max_token_id=9,
            tokenizer_fingerprint="f" * 64, vocab_size=100, eod_id=eod_id, files=(), skipped_records=0,
            empty_documents=0,
        ))  # fmt: skip
    return {"path": str(prefix)}


def data(*train, **fields) -> Data:
    return Data.model_validate({"train": train, "reset_at_eod": True, **fields})


def test_the_summary_says_it(tmp_path):
    assert end_of_document(data(prepared(tmp_path / "a"), prepared(tmp_path / "b"))) == EOD


def test_the_configuration_says_it_for_data_of_other_programs(tmp_path):
    other = prepared(tmp_path / "a", eod_id=None)
    assert end_of_document(data(other, eod_id=EOD)) == EOD
    assert end_of_document(data(other, validation=(prepared(tmp_path / "b"),))) == EOD
    with pytest.raises(DataError, match=r"data\.mask_eod_loss: the token .* no .*/a\.json\. Give it as data\.eod_id"):
        end_of_document(data(other, reset_at_eod=False, mask_eod_loss=True))


def test_all_sources_must_agree(tmp_path):
    mine, other = prepared(tmp_path / "a"), prepared(tmp_path / "b", ((1, 2),), eod_id=2)
    with pytest.raises(DataError, match=r"b\.json: documents end with token 2, but .*/a\.json says 7"):
        end_of_document(data(mine, validation=(other,)))
    with pytest.raises(DataError) as error:
        end_of_document(data(mine, other, eod_id=3))
    assert "a.json: documents end with token 7, but data.eod_id says 3" in str(error.value)
    assert "b.json: documents end with token 2, but data.eod_id says 3" in str(error.value)
    assert (
        "a.bin: its documents do not end with the end-of-document token 3 (2 documents looked at); the first one ends "
        "with 7"
    ) in str(error.value)


def test_data_without_ends(tmp_path):
    bare = prepared(tmp_path / "a", ((1, 2, 3), (4, 5)), eod_id=None)
    with pytest.raises(
        DataError, match=r"a\.bin: its documents do not end with .* 7 \(2 documents looked at\); the first .* with 3"
    ):
        end_of_document(data(bare, eod_id=EOD))


def test_padding_that_is_the_end(tmp_path):
    with pytest.raises(DataError, match=r"data\.pad_id: 7 is the end-of-document token too, as .*a\.json says"):
        end_of_document(data(prepared(tmp_path / "a"), pad_id=EOD))


def test_nothing_is_looked_for_that_is_not_needed():
    missing = {"path": "nowhere"}
    assert find_boundaries(data(missing, reset_at_eod=False)) == Boundaries((), None)
    assert find_boundaries(data(missing, reset_at_eod=False, pad_id=PAD)) == Boundaries((), LossMask(None, PAD))
    with pytest.raises(DataError, match=r"nowhere\.bin: no such file"):
        find_boundaries(data(missing, eod_id=EOD))


def test_what_is_asked_for():
    source = {"path": "unused"}
    assert boundaries(data(source), EOD) == Boundaries((EOD,), None)
    assert boundaries(data(source, pad_id=PAD), EOD) == Boundaries((EOD, PAD), LossMask(None, PAD))
    both = boundaries(data(source, mask_eod_loss=True, pad_id=PAD), EOD)
    assert both == Boundaries((EOD, PAD), LossMask(EOD, PAD))


def test_labels_without_a_loss():
    tokens = np.array([[1, 2, EOD, 3, EOD, PAD, PAD, 4], [PAD, 5, 6, EOD, EOD, 1, 2, PAD]])
    cases = {
        LossMask(EOD, None): [[2, EOD, _, EOD, _, PAD, 4], [5, 6, EOD, _, _, 2, PAD]],
        LossMask(None, PAD): [[2, EOD, 3, EOD, _, _, _], [_, 6, EOD, EOD, 1, 2, _]],
        LossMask(EOD, PAD): [[2, EOD, _, EOD, _, _, _], [_, 6, EOD, _, _, 2, _]],
    }
    for mask, expected in cases.items():
        ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        mask.apply(ids, labels)
        assert labels.tolist() == expected, mask
        assert (ids == tokens[:, :-1]).all()


def test_ends_of_documents_costs_only_what_is_asked_for(tmp_path):
    prepared(tmp_path / "a", ((), (1, 2), (), (3,), (4, 5, 6), ()))
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset.ends_of_documents(n).tolist() for n in (1, 2, 4, 6, 99)] == [[], [2], [2, 3], [2, 3, 6], [2, 3, 6]]
    assert "document_offsets" not in vars(dataset)
