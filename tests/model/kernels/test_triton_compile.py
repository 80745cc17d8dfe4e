"""The GPU's kernels through Triton's compiler, which needs no GPU: they build, and move 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from live import PATIENCE_SECONDS

pytest.importorskip("triton")

COMPILE = """
import inspect, json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_tf.model.kernels import triton_passes

ALIGNED = [["tt.divisibility", 16]]
found = {}
for operation in ("norm", "weights", "norm_and_weights", "backward", "backward_with_product", "couple",
                  "backward_and_couple"):
    kernel = getattr(triton_passes, f"_{operation}")
    types, constants, aligned = {}, {"BLOCK": 2048}, {}
    for i, name in enumerate(kernel.arg_names):
        if name == "BLOCK":
            types[name] = "constexpr"
        elif name == "n":  # of which nothing is known
            types[name] = "i32"
        elif name == "scale":
            types[name] = "fp32"
        else:
            of_sums = "*fp32" if name in ("norms", "totals", "products") else "*bf16"
            types[name] = "i32" if name.endswith("stride") else of_sums
            aligned[(i,)] = ALIGNED
    for architecture in (80, 90):
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        options = {"num_warps": 2048 // triton_passes.WARP}
        target = GPUTarget("cuda", architecture, 32)
        found[f"{operation} {architecture}"] = triton.compile(source, target=target, options=options).asm["ptx"]
print(json.dumps(found))
"""


def test_kernels_for_gpus(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    for operation, code in json.loads(done.stdout).items():
        assert "ld.global.v4.b32" in code, operation
        assert "st.global.v4.b32" in code or operation.startswith("norm "), operation
