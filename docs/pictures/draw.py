"""Draws the pictures of the README and the documentation: `python docs/pictures/draw.py` writes the .svg files here.

The numbers in them are those of the configurations of the paper's chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_tf.config import load_config
from megatron_tf.costs.estimate import num_parameters

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
CHAIN = ("124M", "354M", "757M", "1.4B")
INK, SOFT, OLD, NEW = "#1f2937", "#6b7280", "#9db4e8", "#3f51b5"
STEPS = (
    ("text", "jsonl, txt, parquet"),
    (".bin / .idx", "opens at once"),
    ("sample order", "f(seed, index)"),
    ("sharded model", "tensor · pipeline · data"),
    ("logical ranges", "a checkpoint"),
)


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "middle", colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def box(x: float, y: float, width: float, height: float, colour: str, more: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}" {more}/>'


def arrow(x: float, y: float, x_end: float, y_end: float) -> str:
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{x_end:g}" y2="{y_end:g}" stroke="{SOFT}" stroke-width="2" '
        'marker-end="url(#head)"/>'
    )


def picture(width: int, height: int, parts: Iterator[str]) -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<defs><marker id="head" markerUnits="userSpaceOnUse" markerWidth="12" markerHeight="12" refX="9" '
        'refY="5" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{SOFT}"/></marker></defs>',
        box(0, 0, width, height, "#ffffff", 'rx="12"'),
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def growth() -> Iterator[str]:
    """Tokens of one feed-forward Pattention along the chain, and how two ranks share the last one."""
    bottom, tallest, wide = 300, 215, 110
    counts, sizes = [], []
    for name in CHAIN:
        model = load_config(CONFIGS / f"{name}.yml").model
        counts.append(model.model_dump()["parameter_tokens"]["ffn"])
        sizes.append(num_parameters(model))
    yield text(450, 34, "A model grows by rows: its width stays, parameter tokens are appended", 18)
    for index, (name, count, size) in enumerate(zip(CHAIN, counts, sizes, strict=True)):
        x = 50 + index * 195
        old = counts[index - 1] if index else 0
        high, old_high = count / counts[-1] * tallest, old / counts[-1] * tallest
        yield box(x, bottom - high, wide, high - old_high, NEW)
        if old:
            yield box(x, bottom - old_high, wide, old_high, OLD)
            yield arrow(x - 78, bottom - old_high - 14, x - 8, bottom - old_high - 14)
            yield text(x - 43, bottom - old_high - 24, "append", 12, colour=SOFT)
        yield text(x + wide / 2, bottom + 22, f"{name}: {count:,} ffn tokens", 14)
        yield text(x + wide / 2, bottom + 40, f"{size:,} parameters", 11, colour=SOFT)
    x = 50 + 3 * 195 + wide + 12
    for rank in range(2):
        high = bottom - tallest + rank * tallest / 2
        yield f'<path d="M{x},{high + 4:g} h8 v{tallest / 2 - 8:g} h-8" fill="none" stroke="{INK}"/>'
        yield text(x + 14, high + tallest / 4 + 5, f"rank {1 - rank}", 13, "start")
    yield text(
        450, 376, "Appended tokens keep the function (measured when it happens); the optimizer's state comes along.", 13
    )
    yield text(
        450, 396, "Ranks share the token axis, so any piece of any state is a range that every layout can read.", 13
    )


def architecture() -> Iterator[str]:
    """What happens to text, and how state comes back."""
    wide, high, y = 150, 64, 60
    yield text(450, 34, "From text to a model that grows", 18)
    for index, (name, note) in enumerate(STEPS):
        x = 25 + index * 175
        yield box(x, y, wide, high, "#eef2ff", f'rx="8" stroke="{NEW}"')
        yield text(x + wide / 2, y + 28, name, 15)
        yield text(x + wide / 2, y + 48, note, 11, colour=SOFT)
        if index:
            yield arrow(x - 23, y + high / 2, x - 3, y + high / 2)
    last, model = 25 + 4 * 175 + wide / 2, 25 + 3 * 175 + wide / 2
    yield f'<path d="M{last},{y + high} v70 H{model}" fill="none" stroke="{SOFT}" stroke-width="2"/>'
    yield arrow(model, y + high + 70, model, y + high + 5)
    yield text((last + model) / 2, y + high + 62, "resume, any layout", 12, colour=SOFT)
    yield text((last + model) / 2, y + high + 88, "grow: a function on ranges", 12, colour=SOFT)
    yield arrow(last, y + high + 70, last, y + high + 118)
    yield text(875, y + high + 136, "export, evaluate, generate, prune", 12, "end", SOFT)


PICTURES = {"growth": (900, 415, growth), "architecture": (900, 275, architecture)}


def main() -> None:
    for name, (width, height, parts) in PICTURES.items():
        (HERE / f"{name}.svg").write_text(picture(width, height, parts()), encoding="utf-8")


if __name__ == "__main__":
    main()
