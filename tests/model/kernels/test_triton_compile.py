"""The GPU's kernels through Triton's compiler, which needs no GPU: they build, and move 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from live import PATIENCE_SECONDS

pytest.importorskip("triton")

# Each script below fills `found`: the code of each kernel, and the bytes of a multiprocessor's memory that it takes.
COMPILER = """
import json
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = {}

def compile_kernel(name, kernel, constants, types, aligned, options):
    '''`types`: of arguments that are not i32.  `aligned`: those that are multiples of 16.
    `options`: of the compiler, for an architecture.'''
    signature = {own: "constexpr" if own in constants else types.get(own, "i32") for own in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, own in enumerate(kernel.arg_names)
                  if own in aligned and own not in constants}
    for architecture in ARCHITECTURES:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        made = triton.compile(source, target=target, options=options(architecture))
        found[f"{name} {architecture}"] = made.asm["ptx"], made.metadata.shared
"""


PASSES = """
from megatron_tf.model.kernels import triton_pair_sums, triton_passes

SINGLE, FORWARD, BACKWARD = triton_passes.SINGLE, triton_passes.FORWARD, triton_passes.BACKWARD
names = {"norm": SINGLE, "weights": SINGLE, "norm_and_weights": FORWARD, "backward": SINGLE,
         "backward_with_product": SINGLE, "couple": SINGLE, "backward_and_couple": BACKWARD}
WAYS = {}
for name, blocks in names.items():
    rows, warps = triton_passes.SHORT_BACKWARD if name.startswith("backward") else triton_passes.SHORT
    kernel = getattr(triton_passes, f"_{name}")
    parts = {"PARTS": 1} if "PARTS" in kernel.arg_names else {}
    WAYS[name + " short"] = kernel, {"ROWS": rows, "BLOCK": 256, **parts}, warps
    for block in blocks:
        parts = {"PARTS": block.longest // 2 // block.columns if block.held else 0} if parts else {}
        constants = {"ROWS": 1, "BLOCK": block.columns, **parts}
        WAYS[f"{name} {block.longest}"] = kernel, constants, block.columns // block.per_warp
for name, add in (("sum", False), ("sum added", True)):
    WAYS[name] = triton_pair_sums._sum, {"BLOCK": triton_passes.WARP, "ADD": add}, 1
for name, (kernel, constants, warps) in WAYS.items():
    types = {"norms": "*fp32", "totals": "*fp32", "products": "*fp32", "places": "*i32", "scale": "fp32"}
    numbers = {"n", "rows", "slots"}  # of which nothing is known
    sizes = {own for own in kernel.arg_names if own.endswith("stride")}
    matrices = set(kernel.arg_names) - {*types, *numbers, *sizes, *constants}
    types |= dict.fromkeys(matrices, "*bf16")
    aligned = {*sizes, *matrices, *types} - {"scale"}
    if constants.get("PARTS"):
        aligned.add("n")  # the last part has a mask, and keys on GPUs are padded
    compile_kernel(name, kernel, constants, types, aligned, lambda architecture: {"num_warps": warps})
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
    compile_kernel(name, kernel, constants, TYPES, ALIGNED, lambda architecture: {"num_warps": triton_rounding.WARPS})
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
    compile_kernel(name, kernel, constants, TYPES, ALIGNED, lambda architecture: {"num_warps": warps})
"""


PRODUCTS = """
from megatron_tf.model.kernels import triton_gathered_products as products

TYPES = {"rows": "*i32", "ends": "*i32", "x": "*bf16", "tokens": "*bf16", "out": "*bf16", "scores": "*bf16"}
ALIGNED = {*TYPES, "x_stride", "o_stride", "s_stride", "size", "width"}

def options(tile):
    def of(architecture):
        stages = products.stages_in(MEMORY[architecture] * 1024, 2, tile)
        return {"num_warps": tile["num_warps"], "num_stages": stages}
    return of

for name, kernel, tile in (
    ("scores", products._scores, {**products.SCORES, "GROUPS": 256}),
    ("gradients", products._gradients, products.GRADIENTS),
):
    sizes = {key: value for key, value in tile.items() if key != "num_warps"}
    for whole in (True, False):
        compile_kernel(f"{name} {whole}", kernel, {**sizes, "WHOLE": whole}, TYPES, ALIGNED, options(tile))
"""


def compiled(script, folder, architectures, **names):
    """PTX and bytes of shared memory of each kernel of `script`, in which `names` are defined."""
    given = "".join(f"{name} = {value!r}\n" for name, value in {"ARCHITECTURES": architectures, **names}.items())
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", f"{given}{COMPILER}{script}\nprint(json.dumps(found))"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_of_gathered_rows(tmp_path):
    """By tensor cores, 16 bytes copied at a time while others are multiplied, in the memory of a multiprocessor."""
    memory = {80: 163, 89: 99, 90: 227}  # KiB that a program can use
    made = compiled(PRODUCTS, tmp_path, list(memory), MEMORY=memory)
    assert len(made) == 4 * len(memory)
    for name, (code, shared) in made.items():
        architecture = int(name.split()[-1])
        assert "cp.async.cg.shared.global" in code and "st.global.v4.b32" in code, name
        assert ("wgmma" if architecture == 90 else "mma.sync") in code, name
        assert shared <= memory[architecture] * 1024, (name, shared)


@pytest.mark.parametrize("architectures", [(89, 90), pytest.param((100, 120), marks=pytest.mark.scale)])
def test_scores_in_8_bits(tmp_path, architectures):
    """Tiles of 64 × 64; the scores and their gradient are read, and each result written, 16 bytes at a time."""
    made = compiled(SCORES, tmp_path, architectures)
    assert len(made) == 3 * len(architectures)
    for name, (code, _) in made.items():
        way = name.rpartition(" ")[0]
        elements = 64 * 64 // (32 * (4 if way == "forward" else 8))
        loads, results = {"forward": (1, 1), "backward": (2, 3), "without dx": (2, 2)}[way]
        assert code.count("ld.global.v4.b32") == loads * elements // 8, name
        assert code.count("st.global.v4.b32") == results * elements // 16, name
        assert "cvt.rn.satfinite.e4m3x2.f32" in code and ("e5m2x2" in code) is (way != "forward"), name


@pytest.mark.parametrize("architectures", [(89, 90), pytest.param((100, 120), marks=pytest.mark.scale)])
def test_rounding_to_8_bits(tmp_path, architectures):
    """By the hardware's conversion of two numbers at a time, 16 bytes read and written at a time in both layouts."""
    made = compiled(ROUND, tmp_path, architectures)
    assert len(made) == 7 * len(architectures)
    for name, (code, _) in made.items():
        assert "ld.global.v4.b32" in code, name
        if name.startswith("largest"):
            assert "max.s32" in code, name
            continue
        number = name.split()[0]
        elements = 64 * 64 // (32 * 4)  # of a thread
        assert code.count(f"cvt.rn.satfinite.{number}x2.f32") == elements // 2, name
        layouts = 2 if "both" in name else 1
        assert code.count("st.global.v4.b32") == layouts * elements // 16, name


def test_passes_and_sums(tmp_path):
    made = compiled(PASSES, tmp_path, (80, 90))
    # seven kernels for short rows and for three lengths, two of them for four, and two sums
    assert len(made) == 2 * (7 * (1 + 3) + 2 + 2)
    for name, (code, _) in made.items():
        # 8 bytes at a time was the fastest for these rows, which half fill the registers of a processor
        numbers = "v2" if name.startswith("norm_and_weights 73728") else "v4"
        assert f"ld.global.{numbers}.b32" in code, name
        assert f"st.global.{numbers}.b32" in code or name.startswith("norm "), name
