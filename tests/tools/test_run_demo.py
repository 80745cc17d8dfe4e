"""The demo: what it starts, what its table says, and that it deletes nothing."""

from __future__ import annotations

import json
import sys

import pytest
from launching import PROJECT

from megatron_tf.commands import run_demo
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.errors import UserError


def record_run(folder, steps, tokens, flops, perplexity, parameters):
    """What a finished run and its evaluation leave."""
    (folder / "evaluation").mkdir(parents=True)
    lines = [
        {"step": 1, "tokens": tokens // steps, "flops": flops / steps, "perf/tokens_per_second": 50.0},
        {"step": steps, "tokens": tokens, "flops": flops, "perf/tokens_per_second": 100.0},
        {"step": steps, "tokens": tokens, "flops": flops, "eval/loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {"parameters": parameters, "all": {"perplexity": perplexity}}
    (folder / "evaluation" / f"step_{steps:08}_perplexity.json").write_text(json.dumps(result))


def summarise(prefix, vocab_size):
    """What a preparation leaves besides the data."""
    write_summary(prefix, CorpusSummary(1, 9, 9, 8, "0" * 64, vocab_size, 0, ("a.txt",), 0, 0))


def test_the_control_stands_in_the_table(tmp_path):
    record_run(tmp_path / "small", 20, 2000, 2e5, 50.0, 10)
    record_run(tmp_path / "control", 35, 3500, 3.5e5, 45.0, 10)
    record_run(tmp_path / "grown", 15, 3500, 7e5, 40.0, 30)
    small, control, grown = (run_demo.summary(tmp_path / name) for name in ("small", "control", "grown"))
    rows = [line.split("  ") for line in run_demo.table(small, control, grown).splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["parameters", "tokens", "FLOPs", "perplexity", "tokens/s"],
        ["small", "10", "2,000", "2.0e+05", "50.00", "100"],
        ["small, trained on", "10", "3,500", "3.5e+05", "45.00", "100"],
        ["grown, and trained on", "30", "3,500", "7.0e+05", "40.00", "100"],
    ]


@pytest.fixture
def started(tmp_path, monkeypatch, capsys):
    """What the demo starts in an empty folder, without being run; its data are there."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data" / "demo"
    (data / "novels").mkdir(parents=True)  # as a fetch that failed leaves it
    for name in ("train.jsonl.zst", "tokenizer.json", "train.idx", "validation.idx"):
        (data / name).touch()
    for split in ("train", "validation"):
        summarise(data / split, vocab_size=2048)
    for name in ("small", "control", "grown"):
        record_run(tmp_path / "runs" / "demo" / name, 1, 1, 1.0, 1.0, 1)

    def start(*words):
        commands = []
        monkeypatch.setattr(run_demo, "run", lambda shown, words, **options: commands.append(shown) or "Text.\n")
        monkeypatch.setattr(sys, "argv", ["demo", *words])
        run_demo.main()
        return commands

    return start


def test_growth_and_control_begin_with_the_small_run(started, tmp_path):
    mine = tmp_path / "runs" / "tiny" / "config.yml"
    mine.parent.mkdir(parents=True)
    mine.touch()
    before = sorted(tmp_path.rglob("*"))
    small, grown, control, *rest = started("--ranks", "4", "optimizer.lr=1e-3")
    assert [words[:8] for words in (small, grown, control)] == [
        ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "megatron_tf", "train", name]
        for name in ("demo", "demo_grow", "demo")
    ]
    assert all("optimizer.lr=1e-3" in words for words in (small, grown, control))
    assert {"run.dir=runs/demo/grown", "growth.from=runs/demo/small"} <= set(grown)
    assert control[-5:] == [
        "branch={from: runs/demo/small, at: before_decay}", "training.train_steps=1860", "optimizer.lr=0.001",
        "optimizer.schedule.decay_steps=180", "run.dir=runs/demo/control",
    ]  # fmt: skip
    assert [words[1] for words in rest] == ["evaluate", "evaluate", "evaluate", "plot", "expand", *["generate"] * 3]
    assert [words[2].rpartition("/")[2] for words in rest[-3:]] == ["small", "expanded", "grown"]
    assert all(words[4] == "The return value is" for words in rest[-3:])
    assert sorted(tmp_path.rglob("*")) == before


DAMAGED = {
    "metrics.jsonl": [
        ('{"step": 1, "tok\n', r"metrics\.jsonl:1: has no step and tokens: .*Correct or delete the line"),
        ('{"step": 1, "tokens": 9, "perf/tokens_per_second": "fast"}\n', "per_second is 'fast', not a number"),
        (
            '{"step": 1, "tokens": 9}\n',
            r"metrics\.jsonl: holds no record of a finished run\. Move the run's folder away",
        ),
        ("", r"metrics\.jsonl: holds no record of a finished run\. Move the run's folder away"),
    ],
    "evaluation/step_00000001_perplexity.json": [
        (
            '{"parameters": 1, "all"',
            r"perplexity\.json: is not the result of an evaluation\. Move the run's folder away",
        ),
        ('{"parameters": 1, "all": {}}', r"perplexity\.json: is not the result of an evaluation"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in DAMAGED.items() for case in cases]
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content, message):
    record_run(tmp_path / "small", 1, 1, 1.0, 1.0, 1)
    assert run_demo.summary(tmp_path / "small").tokens == 1
    (tmp_path / "small" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        run_demo.summary(tmp_path / "small")


def test_a_damaged_summary_of_the_data_is_named(started, tmp_path):
    (tmp_path / "data" / "demo" / "train.json").write_text('{"vocab_size": ')
    with pytest.raises(UserError, match=r"train\.json: has 15 bytes that are no JSON"):
        started()
    (tmp_path / "data" / "demo" / "train.json").unlink()
    with pytest.raises(UserError, match=r"data/demo: holds data of an older demo, with no known vocabulary; .*2,048"):
        started()


def test_data_of_an_older_demo_are_not_replaced(started, tmp_path):
    summarise(tmp_path / "data" / "demo" / "train", vocab_size=1024)
    with pytest.raises(UserError, match=r"data/demo: holds data of an older demo, with a vocabulary of 1,024; .*2,048"):
        started()


def test_where_no_novels_can_be_fetched_the_documentation_takes_their_place(tmp_path, monkeypatch, capsys):
    """The first command is one that fails, or that does not end in time."""
    for failing, seconds, reason in ((["false"], 60, "exit code 1"), (["sleep", "60"], 0.1, "not ended after 0.1 s")):
        shown = []
        monkeypatch.setattr(run_demo, "FETCH_SECONDS", seconds)

        def command(*words, failing=failing, shown=shown, **options):
            shown.append(words[0])
            return run_demo.run(["megatron_tf", *words], failing if len(shown) == 1 else ["true"], **options)

        monkeypatch.setattr(run_demo, "command", command)
        run_demo.fetch_or_build()
        assert shown == ["fetch-corpus", "build-demo-corpus"]
        out = capsys.readouterr().out
        assert reason in out and "goes on with the documentation of this Python's" in out


def test_novels_are_prepared_from_their_folder(started, tmp_path):
    (tmp_path / "data" / "demo" / "novels" / "corpus.json").touch()
    for name in ("tokenizer.json", "train.idx", "validation.idx"):
        (tmp_path / "data" / "demo" / name).unlink()
    tokenizer, train, validation, *rest = started()
    novels = "data/demo/novels"
    assert tokenizer[1:4] == ["train-tokenizer", "--input", f"{novels}/train/*.jsonl.zst"]
    assert [words[3] for words in (train, validation)] == [
        f"{novels}/{split}/*.jsonl.zst" for split in ("train", "validation")
    ]
    assert rest[-1][4] == "She was"


def test_what_is_said_to_do_next_stands_in_the_documentation(started, capsys):
    """Where every command is checked."""
    started()
    out = capsys.readouterr().out
    _, _, block = out.partition("What to do next:\n\n")
    page = (PROJECT / "docs" / "start" / "demo.md").read_text()
    commands = block.strip().replace("The return value is", "She was").splitlines()
    assert len(commands) == 6 and all(line in page for line in commands), commands
    assert "The small model, before growth, writes:\n\n    Text.\n" in out
