"""Shipped configurations and those of a user, as `megatron_tf config show` prints them."""

from __future__ import annotations

import pytest

from megatron_tf.commands.config import main
from megatron_tf.config.load import load_config
from megatron_tf.errors import ConfigError
from megatron_tf.shipped import configurations


@pytest.fixture
def show(monkeypatch, capfdbinary):
    """show("tiny") is what the command prints."""

    def show(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["config", "show", *words])
        main()
        return capfdbinary.readouterr().out.decode()

    return show


def test_a_shipped_one_is_shown_as_it_is_or_resolved(show, tmp_path):
    file = configurations()["tiny_grow"]
    assert show("tiny_grow") == show("tiny_grow.yml") == file.read_text(encoding="utf-8")
    resolved = tmp_path / "resolved.yml"
    resolved.write_text(show("tiny_grow", "--resolved"))
    assert "extends" not in resolved.read_text() and load_config(resolved) == load_config(file)


def test_a_file_of_the_user_is_shown_with_what_it_extends(show, tmp_path):
    own = tmp_path / "own.yml"
    own.write_text("extends: tiny\nrun: {dir: runs/own}\n")
    resolved = tmp_path / "resolved.yml"
    resolved.write_text(show(str(own)))
    assert "extends" not in resolved.read_text() and load_config(resolved) == load_config(own)


def test_what_cannot_be_shown_is_one_message(show, tmp_path):
    with pytest.raises(ConfigError, match="^tini: there is no such file.*Did you mean tiny?"):
        show("tini")
    (tmp_path / "base.yml").write_text("extends: tiny\nmodle: {}\n")
    (tmp_path / "own.yml").write_text("extends: base.yml\n")
    with pytest.raises(ConfigError, match=r"base\.yml: modle: unknown key. Did you mean model?"):
        show(str(tmp_path / "own.yml"))
    (tmp_path / "own.yml").write_text("extends: tiny\ntrainng: {a: 1}\nmodel: {layers: 3}\n")
    with pytest.raises(ConfigError, match="trainng: unknown key. Did you mean training?") as error:
        show(str(tmp_path / "own.yml"))
    assert "model.layers: unknown key" in str(error.value)
