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
from megatron_tf.model.kernels import triton_pair_sums, triton_passes

ALIGNED = [["tt.divisibility", 16]]
POINTERS = {"norms": "*fp32", "totals": "*fp32", "products": "*fp32", "places": "*i32"}
passes = ("norm", "weights", "norm_and_weights", "backward", "backward_with_product", "couple", "backward_and_couple")
kernels = {name: (getattr(triton_passes, f"_{name}"), {"BLOCK": 2048}) for name in passes}
for name, add in (("sum", False), ("sum added", True)):
    kernels[name] = triton_pair_sums._sum, {"BLOCK": triton_passes.WARP, "ADD": add}
found = {}
for operation, (kernel, constants) in kernels.items():
    types, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("n", "slots"):  # of which nothing is known
            types[name] = "i32"
        elif name == "scale":
            types[name] = "fp32"
        else:
            types[name] = "i32" if name.endswith("stride") else POINTERS.get(name, "*bf16")
            aligned[(i,)] = ALIGNED
    for architecture in (80, 90):
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        options = {"num_warps": constants["BLOCK"] // triton_passes.WARP}
        target = GPUTarget("cuda", architecture, 32)
        found[f"{operation} {architecture}"] = triton.compile(source, target=target, options=options).asm["ptx"]
print(json.dumps(found))
"""


ROUND = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_tf.model.kernels import triton_rounding

# with sizes that are multiples of 16, as numbers of tokens are on GPUs
TYPES = {"x": "*bf16", "largest": "*i32", "found": "*i32", "by_row": "*u8", "by_column": "*u8", "down": "*fp32"}
ALIGNED = {"x", "stride", "n", "by_row", "by_column", "rows", "columns"}
SEARCH = {"ROWS": triton_rounding.SEARCHED_ROWS, "COLUMNS": triton_rounding.SEARCHED_COLUMNS}
WAYS = {"largest": (triton_rounding._largest, SEARCH)}
for gradient in (False, True):
    constants = {"GRADIENT": gradient, "HARDWARE": True, "TILE": triton_rounding.TILE}
    for layout, without in (("both", {}), ("by row", {"by_column": None}), ("by column", {"by_row": None})):
        for scale, known in (("found", {}), ("known", {"largest": None})):
            WAYS[f"{'e5m2' if gradient else 'e4m3'} {layout} {scale}"] = (
                triton_rounding._round, {**constants, **without, **known})
found = {}
for name, (kernel, constants) in WAYS.items():
    types = {own: "constexpr" if own in constants else TYPES.get(own, "i32") for own in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, own in enumerate(kernel.arg_names)
               if own in ALIGNED and own not in constants}
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", architecture, 32)
        options = {"num_warps": triton_rounding.WARPS}
        found[f"{name} {architecture}"] = triton.compile(source, target=target, options=options).asm["ptx"]
print(json.dumps(found))
"""


def compiled(script, folder):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("architectures", [(89, 90), pytest.param((100, 120), marks=pytest.mark.scale)])
def test_rounding_to_8_bits(tmp_path, architectures):
    """By the hardware's conversion of two numbers at a time, 16 bytes read and written at a time in both layouts."""
    made = compiled(f"ARCHITECTURES = {architectures}\n{ROUND}", tmp_path)
    assert len(made) == 13 * len(architectures)
    for name, code in made.items():
        assert "ld.global.v4.b32" in code, name
        if name.startswith("largest"):
            assert "max.s32" in code, name
            continue
        number = name.split()[0]
        elements = 16 * 16 * 16 // (32 * 4)  # of a thread
        assert code.count(f"cvt.rn.satfinite.{number}x2.f32") == elements // 2, name
        layouts = 2 if "both" in name else 1
        assert code.count("st.global.v4.b32") == layouts * elements // 16, name


def test_kernels_for_gpus(tmp_path):
    for operation, code in compiled(COMPILE, tmp_path).items():
        assert "ld.global.v4.b32" in code, operation
        assert "st.global.v4.b32" in code or operation.startswith("norm "), operation
