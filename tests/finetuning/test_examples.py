from __future__ import annotations

import pytest
import torch
from bases import TEMPLATE, questions, write_base, write_lines

from megatron_tf.adapters.loading import load_tokenizer
from megatron_tf.errors import DataError
from megatron_tf.finetuning.batches import collate, count_targets, pack, rows_from
from megatron_tf.finetuning.examples import Example, read_examples


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def read(tokenizer, tmp_path):
    def read(*records, seq_length=64, drop_long=False):
        return read_examples([write_lines(tmp_path / "lines.jsonl", list(records))], tokenizer, seq_length, drop_long)

    return read


def learnt(example: Example, tokenizer) -> str:
    return tokenizer.decode([token for token, counts in zip(example.ids, example.learnt) if counts]).replace(" ", "")


def test_of_a_prompt_and_an_answer_the_answer_is_learnt(read, tokenizer):
    (example,) = read({"prompt": "ab", "answer": "cd", "id": 3})
    assert len(example.ids) == 5 and example.learnt == [False, False, True, True, True]
    assert learnt(example, tokenizer) == "cd[eos]"


def test_of_messages_what_the_assistant_says_is_learnt(read, tokenizer):
    messages = [{"role": role, "content": text} for role, text in
                (("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant",
                                                                                       "two"))]  # fmt: skip
    (example,) = read({"messages": messages})
    assert learnt(example, tokenizer) == "one[eos]two[eos]"
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(example.ids) == tokenizer(whole)["input_ids"]
    (example,) = read({"messages": [*messages, {"role": "user", "content": "more"}]})
    assert learnt(example, tokenizer) == "one[eos]two[eos]"


def test_text_is_learnt_whole_and_cut_into_pieces(read, tokenizer):
    (example,) = read({"text": "abc"})
    assert example.learnt == [False, True, True, True] and example.ids[-1] == tokenizer.eos_token_id
    assert [len(piece.ids) for piece in read({"text": "a" * 20}, seq_length=9)] == [9, 9, 3]
    assert [len(piece.ids) for piece in read({"text": "a" * 9}, seq_length=9)] == [9]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "answer": "b", "text": "c"},
            "line 1: has prompt and answer, as well as text, and one of these is learnt. Leave the others out",
        ),
        ({"prompt": "a"}, "line 1: has the fields prompt. Give prompt and answer, or messages, or text"),
        ({"prompt": "a", "answer": " "}, "line 1: answer is ' ', and a text is expected"),
        ({"prompt": "a", "answer": None}, "answer is None"),
        ({"messages": []}, "no message is of the assistant"),
        ({"messages": [{"role": "user"}]}, "Give a list of objects with role and content"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message is of the assistant"),
        ([1], r"has \[1\]. Give prompt and answer"),
        (
            {"prompt": "a" * 60, "answer": "b" * 10},
            "has 71 tokens, and data.seq_length is 64; 1 of 1 example is too long",
        ),
    ],
)
def test_a_line_that_is_no_example_is_named(read, record, message):
    with pytest.raises(DataError, match=message):
        read(record)


def test_long_examples_are_dropped_where_that_is_said(read):
    long = {"prompt": "a" * 60, "answer": "b" * 10}
    assert len(read(long, {"prompt": "a", "answer": "b"}, drop_long=True)) == 1
    with pytest.raises(DataError, match="no example is left of at most 64 tokens"):
        read(long, drop_long=True)


def test_files_that_cannot_be_read_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: No such file"):
        read_examples([str(tmp_path / "none.jsonl")], tokenizer, 64, False)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="bad.jsonl: line 2: is not JSON"):
        read_examples([str(tmp_path / "bad.jsonl")], tokenizer, 64, False)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty.jsonl: holds no examples"):
        read_examples([str(tmp_path / "empty.jsonl")], tokenizer, 64, False)


def test_messages_need_a_template_that_keeps_what_it_wrote(tmp_path):
    messages = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}
    file = write_lines(tmp_path / "lines.jsonl", [messages])
    for name, template, message in (
        ("none", None, "has no chat template. Put chat_template.jinja"),
        (
            "raising",
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses it .roles must alternate",
        ),
        ("counting", "{{ messages | length }}" + TEMPLATE, "what the assistant says cannot be told"),
    ):
        tokenizer = load_tokenizer(write_base(tmp_path / name, template))
        with pytest.raises(DataError, match=message):
            read_examples([file], tokenizer, 64, False)


def test_packing_keeps_examples_whole_and_apart(read):
    examples = read(*questions())
    rows = pack(examples, 32, seed=1)
    assert len(rows) < len(examples) / 2 and all(sum(len(one.ids) for one in row) <= 32 for row in rows)
    assert sorted(one.place for row in rows for one in row) == sorted(one.place for one in examples)
    batch = collate(rows[:2], 32)
    assert int((batch.targets != -100).sum()) == count_targets(rows[:2])
    start = 0
    for example in rows[0]:
        stop = start + len(example.ids)
        assert batch.input_ids[0, start:stop].tolist() == list(example.ids)
        assert batch.position_ids[0, start:stop].tolist() == list(range(stop - start))
        assert batch.targets[0, stop - 1] == -100  # what follows is another example
        start = stop
    assert batch.attention_mask is None


def test_without_packing_rows_are_as_long_as_the_longest(read):
    batch = collate([[one] for one in read({"prompt": "a", "answer": "b"}, {"prompt": "abc", "answer": "d"})], None)
    assert batch.input_ids.shape == (2, 5)
    assert torch.equal(batch.attention_mask, torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(read):
    rows = [[one] for one in read(*questions(6))]
    steps = [rows_from(rows, 4 * step, 4, seed=1) for step in range(6)]
    flat = [row[0].place for step in steps for row in step]
    epochs = [flat[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == sorted(row[0].place for row in rows) for epoch in epochs)
    assert epochs[0] != epochs[1]
