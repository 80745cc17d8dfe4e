"""What the README shows as Python runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
WITHOUT_DEEPSPEED = """
import sys
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Away())
"""


def test_the_plain_torch_loop_trains_without_deepspeed():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "TokenFormer" in block]
    (loop,) = [block for block in blocks if "loss.backward()" in block]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED + "import torch; torch.manual_seed(0)\n" + loop],
        cwd=PROJECT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 2, done.stdout
