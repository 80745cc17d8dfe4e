from __future__ import annotations

import sys

from megatron_tf.adapters.command_line import parse_arguments, print_written


def test_what_was_written_is_told(tmp_path, monkeypatch, capsys):
    target = tmp_path / "to"
    target.mkdir()
    (target / "config.json").write_text("x" * 1234)
    monkeypatch.setattr(sys, "argv", ["tool", "--base", "base", "--adapter", "adapter", "--to", str(target)])
    arguments = parse_arguments("Text.", base="the folder")
    print_written(arguments.base, arguments.adapter, {"on text": "logits differ by 0"}, arguments.target)
    assert capsys.readouterr().out.splitlines() == [
        "from        base, with adapter",
        "compared    on text: logits differ by 0",
        f"wrote {target}: 1,234 bytes",
    ]
