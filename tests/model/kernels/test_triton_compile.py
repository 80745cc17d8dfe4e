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
kernels = {}
for name in passes:
    rows, _ = triton_passes.SHORT_BACKWARD if name.startswith("backward") else triton_passes.SHORT
    for way, constants in (("", {"ROWS": 1, "BLOCK": 2048}), (" short", {"ROWS": rows, "BLOCK": 256})):
        kernels[name + way] = getattr(triton_passes, f"_{name}"), constants
for name, add in (("sum", False), ("sum added", True)):
    kernels[name] = triton_pair_sums._sum, {"BLOCK": triton_passes.WARP, "ADD": add}
found = {}
for operation, (kernel, constants) in kernels.items():
    types, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("n", "rows", "slots"):  # of which nothing is known
            types[name] = "i32"
        elif name == "scale":
            types[name] = "fp32"
        else:
            types[name] = "i32" if name.endswith("stride") else POINTERS.get(name, "*bf16")
            aligned[(i,)] = ALIGNED
    for architecture in (80, 90):
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        many_rows = constants.get("ROWS", 1) > 1
        warps = triton_passes.SHORT[1] if many_rows else constants["BLOCK"] // triton_passes.WARP
        options = {"num_warps": warps}
        target = GPUTarget("cuda", architecture, 32)
        found[f"{operation} {architecture}"] = triton.compile(source, target=target, options=options).asm["ptx"]
print(json.dumps(found))
"""


# For kernels with arguments of TYPES, of which those in ALIGNED are multiples of 16.
IN_8_BITS = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = {}

def compile_kernel(name, kernel, constants, warps):
    types = {own: "constexpr" if own in constants else TYPES.get(own, "i32") for own in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, own in enumerate(kernel.arg_names)
               if own in ALIGNED and own not in constants}
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", architecture, 32)
        found[f"{name} {architecture}"] = triton.compile(source, target=target, options={"num_warps": warps}).asm["ptx"]
"""


ROUND = """
from megatron_tf.model.kernels import triton_rounding

# with sizes that are multiples of 16, as numbers of tokens are on GPUs
TYPES = {"x": "*bf16", "largest": "*i32", "found": "*i32", "by_row": "*u8", "by_column": "*u8", "down": "*fp32"}
ALIGNED = {"x", "stride", "n", "by_row", "by_column", "rows", "columns"}
SEARCH = {"ROWS": triton_rounding.SEARCHED_ROWS, "COLUMNS": triton_rounding.SEARCHED_COLUMNS}
WAYS = {"largest": (triton_rounding._largest, SEARCH)}
LAYOUTS = {"both": {}, "by row": {"by_column": None}, "by column": {"by_row": None}}
for number, layout, known in (
    ("e4m3", "by row", {}), ("e4m3", "by row", {"largest": None}), ("e4m3", "by column", {}),
    ("e4m3", "by column", {"largest": None}), ("e5m2", "both", {}), ("e5m2", "by column", {}),
):
    constants = {"GRADIENT": number == "e5m2", "HARDWARE": True, "TILE": triton_rounding.TILE}
    WAYS[f"{number} {layout} {'known' if known else 'found'}"] = (
        triton_rounding._round, {**constants, **LAYOUTS[layout], **known})
for name, (kernel, constants) in WAYS.items():
    compile_kernel(name, kernel, constants, triton_rounding.WARPS)
print(json.dumps(found))
"""


SCORES = """
from megatron_tf.model import rounded_scores
from megatron_tf.model.kernels import triton_rounded_scores
from megatron_tf.model.kernels.triton_rounding import TILE, WARPS

TYPES = {"scores": "*bf16", "gradient": "*bf16", "norms": "*fp32", "scale": "fp32", "totals": "*fp32",
         "largest": "*i32", "weights": "*u8", "weights_down": "*fp32", "by_row": "*u8", "by_column": "*u8",
         "down": "*fp32"}
ALIGNED = {"scores", "a_stride", "gradient", "d_stride", "n", "weights", "by_row", "row_stride", "by_column", "rows",
           "columns"}
WAYS = {
    "forward": (triton_rounded_scores._weights, {}, WARPS),
    "backward": (triton_rounded_scores._backward, {"STRETCH": rounded_scores.STRETCH},
                 triton_rounded_scores.BACKWARD_WARPS),
    "without dx": (triton_rounded_scores._backward, {"STRETCH": rounded_scores.STRETCH, "by_row": None},
                   triton_rounded_scores.BACKWARD_WARPS),
}
for name, (kernel, more, warps) in WAYS.items():
    constants = {"HARDWARE": True, "TILE": TILE, **more}
    compile_kernel(name, kernel, constants, warps)
print(json.dumps(found))
"""


PRODUCTS = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_tf.model.kernels import triton_gathered_products as products

INTEGERS = {"rows": "*i32", "ends": "*i32"}
MATRICES = {"x", "tokens", "out", "scores"}
ALIGNED = {*INTEGERS, *MATRICES, "x_stride", "o_stride", "s_stride", "size", "width"}
found = {}
for name, kernel, tile in (
    ("scores", products._scores, {**products.SCORES, "GROUPS": 256}),
    ("gradients", products._gradients, products.GRADIENTS),
):
    for whole in (True, False):
        constants = {**{key: value for key, value in tile.items() if key != "num_warps"}, "WHOLE": whole}
        types, aligned = {}, {}
        for i, own in enumerate(kernel.arg_names):
            types[own] = "constexpr" if own in constants else INTEGERS.get(own, "*bf16" if own in MATRICES else "i32")
            if own in ALIGNED:
                aligned[(i,)] = [["tt.divisibility", 16]]
        for architecture, kilobytes in MEMORY.items():
            options = {"num_warps": tile["num_warps"], "num_stages": products.stages_in(kilobytes * 1024, 2, tile)}
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            found[f"{name} {whole} {architecture}"] = made.asm["ptx"], made.metadata.shared
print(json.dumps(found))
"""


def test_products_of_gathered_rows(tmp_path):
    """By tensor cores, 16 bytes copied at a time while others are multiplied, in the memory of a multiprocessor."""
    memory = {80: 163, 89: 99, 90: 227}  # KiB that a program can use
    made = compiled(f"MEMORY = {memory}\n{PRODUCTS}", tmp_path)
    assert len(made) == 4 * len(memory)
    for name, (code, shared) in made.items():
        architecture = int(name.split()[-1])
        assert "cp.async.cg.shared.global" in code and "st.global.v4.b32" in code, name
        assert ("wgmma" if architecture == 90 else "mma.sync") in code, name
        assert shared <= memory[architecture] * 1024, (name, shared)


@pytest.mark.parametrize("architectures", [(89, 90), pytest.param((100, 120), marks=pytest.mark.scale)])
def test_scores_in_8_bits(tmp_path, architectures):
    """Tiles of 64 × 64; the scores and their gradient are read, and each result written, 16 bytes at a time."""
    made = compiled(f"ARCHITECTURES = {architectures}\n{IN_8_BITS}{SCORES}", tmp_path)
    assert len(made) == 3 * len(architectures)
    for name, code in made.items():
        way = name.rpartition(" ")[0]
        elements = 64 * 64 // (32 * (4 if way == "forward" else 8))
        loads, results = {"forward": (1, 1), "backward": (2, 3), "without dx": (2, 2)}[way]
        assert code.count("ld.global.v4.b32") == loads * elements // 8, name
        assert code.count("st.global.v4.b32") == results * elements // 16, name
        assert "cvt.rn.satfinite.e4m3x2.f32" in code and ("e5m2x2" in code) is (way != "forward"), name


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
    made = compiled(f"ARCHITECTURES = {architectures}\n{IN_8_BITS}{ROUND}", tmp_path)
    assert len(made) == 7 * len(architectures)
    for name, code in made.items():
        assert "ld.global.v4.b32" in code, name
        if name.startswith("largest"):
            assert "max.s32" in code, name
            continue
        number = name.split()[0]
        elements = 64 * 64 // (32 * 4)  # of a thread
        assert code.count(f"cvt.rn.satfinite.{number}x2.f32") == elements // 2, name
        layouts = 2 if "both" in name else 1
        assert code.count("st.global.v4.b32") == layouts * elements // 16, name


def test_kernels_for_gpus(tmp_path):
    for operation, code in compiled(COMPILE, tmp_path).items():
        assert "ld.global.v4.b32" in code, operation
        assert "st.global.v4.b32" in code or operation.startswith("norm "), operation
