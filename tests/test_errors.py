from __future__ import annotations

import ast
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.errors import (
    MESSAGE_LIMIT,
    NOT_AS_WRITTEN,
    CheckpointError,
    ConfigError,
    DamagedError,
    DataError,
    LaunchError,
    UserError,
    file_errors,
    run_command,
    shown,
    write_errors,
)

PACKAGE = Path(__file__).parents[1] / "megatron_tf"


def fail_with(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_one_problem_is_the_message():
    error = ConfigError("model.num_layers: 0 must be at least 1.")
    assert error.problems == ["model.num_layers: 0 must be at least 1."]
    assert str(error) == "model.num_layers: 0 must be at least 1."


def test_all_problems_are_listed():
    error = ConfigError(("a.b: first.", "c.d: second."))
    assert error.problems == ["a.b: first.", "c.d: second."]
    assert str(error) == "2 problems in the configuration:\n  - a.b: first.\n  - c.d: second."


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, DamagedError, LaunchError])
def test_a_long_message_loses_its_middle_and_keeps_its_remedy(kind):
    message = str(kind("data/x.bin: " + 100_000 * "y" + ". Copy it again"))
    assert len(message) <= MESSAGE_LIMIT and "more characters" in message
    assert message.startswith("data/x.bin: yyy") and "Copy it again" in message[-90:]


def test_a_message_gives_a_terminal_nothing_to_obey():
    assert str(DataError("a\x1b[2Jb\r:\n  - ä × \udcff")) == r"a\x1b[2Jb\r:" + "\n  - ä × " + r"\udcff"


def test_many_problems_are_listed_and_countless_ones_are_not():
    some, countless = ([f"a.b{number}: {'wrong ' * 20}." for number in range(n)] for n in (50, 10_000))
    assert all(problem in str(ConfigError(some)) for problem in some)
    assert len(str(ConfigError(countless))) <= ConfigError.limit and ConfigError(countless).problems == countless


def test_a_value_is_shown_briefly_whatever_it_is():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (deep, 10**5000, "x" * 10**6, {str(n): [n] * 100 for n in range(1000)}):
        assert len(shown(value)) < 400
    assert shown([0, 5, "f"]) == "[0, 5, 'f']" and shown(True) == "True" and shown("12") == "'12'"


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, LaunchError])
def test_a_user_error_is_one_message_and_exit_code_2(kind, capsys):
    assert issubclass(kind, UserError)
    with pytest.raises(SystemExit) as ended:
        run_command(fail_with(kind("data/x.bin: 3 bytes, not 4.")))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "error: data/x.bin: 3 bytes, not 4.\n"
    assert printed.out == ""


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("runs/x: holds nothing. Give another folder", "runs/x: holds nothing. Give another folder."),
        ("lr: unknown key. Did you mean optimizer.lr?", "lr: unknown key. Did you mean optimizer.lr?"),
        ("two differ:\n  - a: 1 and 2\n  - b: 3 and 4", "two differ:\n  - a: 1 and 2\n  - b: 3 and 4"),
    ],
)
def test_every_sentence_of_a_message_has_its_full_stop(message, printed, capsys):
    with pytest.raises(SystemExit):
        run_command(fail_with(CheckpointError(message)))
    assert capsys.readouterr().err == f"error: {printed}\n"


def test_a_bug_keeps_its_traceback():
    for bug in (AssertionError("ours"), RuntimeError("ours"), FileNotFoundError("ours"), ConnectionError(111, "ours")):
        with pytest.raises(type(bug), match="ours"):
            run_command(fail_with(bug))


def test_a_link_that_leads_nowhere_says_where(tmp_path):
    gone, first, second = (tmp_path / name for name in ("gone", "first", "second"))
    gone.symlink_to(tmp_path / "elsewhere")
    first.symlink_to(second)
    second.symlink_to(first)
    for link, fragment in ((gone, f"is a link to {tmp_path}/elsewhere, and nothing is there"),
                           (first, f"is a link to {second}, which cannot be followed (Too many levels")):  # fmt: skip
        with pytest.raises(DataError) as caught, file_errors(DataError, link, "Correct the path."):
            link.read_bytes()
        assert str(caught.value).startswith(f"{link}: {fragment}")


def test_the_system_s_objection_to_a_file_is_one_message(capsys):
    cases = {
        PermissionError(errno.EACCES, "Permission denied", "data/x.bin"): "error: data/x.bin: Permission denied.\n",
        IsADirectoryError(errno.EISDIR, "Is a directory", b"data/x"): "error: data/x: Is a directory.\n",
        OSError(errno.ENOSPC, "No space left on device"): "error: a file or the output: No space left on device.\n",
    }
    for problem, message in cases.items():
        with pytest.raises(SystemExit) as ended:
            run_command(fail_with(problem))
        assert ended.value.code == 2
        assert capsys.readouterr().err == message


class TestFileErrors:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [("none", "No such file"), ("x" * 300, "File name too long"), (".", "Is a directory"), ("file/a", "Not a dir")],
    )
    def test_objections_become_the_kind_that_is_asked_for(self, tmp_path, name, reason):
        (tmp_path / "file").touch()
        with (
            pytest.raises(DataError, match=rf"^{tmp_path / name}: {reason}.*\. Correct it\.$"),
            file_errors(DataError, tmp_path / name, "Correct it."),
        ):
            (tmp_path / name).read_bytes()

    @pytest.mark.parametrize(
        ("failed", "named"),
        [("out", "out"), ("out.partial/weights", "out"), ("./out", "out"), ("out/weights", "out/weights"),
         ("cache/modules", "cache/modules"), (None, "out")],
    )  # fmt: skip
    def test_the_file_that_failed_is_named(self, failed, named):
        with pytest.raises(DataError, match=rf"^{named}: No space left on device\. Make room\.$"), \
             file_errors(DataError, "out", "Make room."):  # fmt: skip
            raise OSError(errno.ENOSPC, "No space left on device", failed)

    @pytest.mark.parametrize(
        ("number", "remedy"),
        [
            (errno.ENOSPC, "Free space there, or choose another folder."),
            (errno.EDQUOT, "Free space of your quota there, or choose another folder."),
            (errno.EFBIG, "Allow larger files (`ulimit -f`), or choose another folder."),
            (errno.EACCES, "Correct the permissions, or choose another folder."),
            (errno.EROFS, "Mount the file system writable, or choose another folder."),
            (errno.ENOTDIR, "Choose another folder."),
        ],
    )
    def test_the_remedy_fits_what_writing_failed_of(self, number, remedy):
        with pytest.raises(DataError) as refusal, write_errors(DataError, "out", "Choose another folder."):
            raise OSError(number, os.strerror(number))
        assert str(refusal.value) == f"out: {os.strerror(number)}. {remedy}"

    @pytest.mark.parametrize("name", ["a\0b", "a\ud800"])
    def test_names_that_can_be_no_path_are_refused_before_the_block(self, name):
        with pytest.raises(CheckpointError, match="cannot be a path. Correct it"), \
             file_errors(CheckpointError, name, "Correct it."):  # fmt: skip
            pytest.fail("the block ran")

    def test_everything_else_passes(self):
        for other in (ValueError("ours"), DataError("theirs")):
            with pytest.raises(type(other)), file_errors(ConfigError, "a", "Correct it."):
                raise other


def command(body: str, **options) -> subprocess.CompletedProcess:
    script = f"from megatron_tf.errors import run_command\nrun_command(lambda: {body})"
    return subprocess.run([sys.executable, "-c", script], timeout=PATIENCE_SECONDS, **options)


def test_characters_that_the_locale_lacks_are_escaped():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = command(r"print('\u03c4, file \udcff')", env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u03c4, file \\udcff\n", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("lines", [1, 100_000], ids=["noticed when flushing", "noticed when printing"])
def test_an_output_on_a_full_disk(lines):
    with open("/dev/full", "w") as full:
        done = command(f"print('line\\n' * {lines})", stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: a file or the output: No space left on device.\n")


def test_control_c_is_exit_code_130(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(fail_with(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_success_returns():
    ran = []
    run_command(lambda: ran.append("main"))
    assert ran == ["main"]


def test_exit_codes_of_the_command_are_kept():
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: sys.exit(3))
    assert ended.value.code == 3


@pytest.mark.parametrize("lines", [3, 100_000], ids=["noticed when flushing", "noticed when printing"])
def test_a_reader_that_closes_the_pipe(lines):
    """As in `tool | head -1`: no traceback, neither from `print` nor from the interpreter's shutdown."""
    script = f"""
import sys
from megatron_tf.errors import run_command
def main():
    sys.stdin.readline()  # until the reader is gone
    for at in range({lines}):
        print("line", at)
run_command(main)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert isinstance(child.stdout, io.TextIOWrapper)
    child.stdout.close()
    _, err = child.communicate("go\n", timeout=PATIENCE_SECONDS)
    assert (child.returncode, err) == (1, "")


def _reads_json(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.loads", "json.load")


def test_json_that_nests_too_deep_is_refused_wherever_json_that_is_wrong_is():
    """Python raises RecursionError for 100,000 brackets, which is no ValueError."""
    found, forgotten = 0, []
    for path in sorted(PACKAGE.rglob("*.py")):
        for block in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(block, ast.Try) or not any(map(_reads_json, ast.walk(ast.Module(block.body, [])))):
                continue
            caught = " ".join(ast.unparse(handler.type) for handler in block.handlers if handler.type)
            if "Error" in caught or "NOT_AS_WRITTEN" in caught:
                found += 1
                if "RecursionError" not in caught and "NOT_AS_WRITTEN" not in caught:
                    forgotten.append(f"{path}:{block.lineno}")
    assert found >= 10 and not forgotten, forgotten


def test_what_is_caught_for_json_that_is_not_as_written():
    for text, read in (
        ("[" * 100_000, lambda value: value),
        ("", lambda value: value),
        ("1" * 5_000, lambda value: value),
        ("[]", lambda value: value[0]),
        ("{}", lambda value: value["loss"]),
        ("[]", lambda value: value["loss"]),
        ("null", lambda value: value.get("loss")),
        ("1e999", int),
    ):
        with pytest.raises(NOT_AS_WRITTEN):
            read(json.loads(text))
