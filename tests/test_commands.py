from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from live import PATIENCE_SECONDS

from megatron_tf.__main__ import COMMANDS, find

PROJECT = Path(__file__).parents[1]
HELP = """
import contextlib, importlib, io, json, sys
found = {}
for name in sys.argv[1:]:
    main = importlib.import_module(f"megatron_tf.commands.{name}").main
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main()
    found[name] = [said.getvalue()[:6], *sorted({"torch", "transformers", "matplotlib", "pyarrow"} & set(sys.modules))]
print(json.dumps(found))
"""


def test_help_is_given_before_anything_heavy_is_imported():
    modules = [command.module for command in COMMANDS.values()]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *modules], env={**os.environ, "PYTHONPATH": str(PROJECT)}, capture_output=True,
        text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: ["usage:"] for name in modules}


def test_names_of_commands():
    assert find(["train", "tiny"]) == ("train", ["tiny"])
    assert find(["generate_text", "x"]) == find(["generate-text", "x"]) == ("generate", ["x"])
    assert find(["verify", "layout", "x"]) == find(["verify-layout", "x"]) == ("verify-layout", ["x"])
    assert find(["config", "show", "tiny"]) == ("config", ["show", "tiny"])
    assert find(["verify"]) is find(["trian"]) is find([""]) is None
