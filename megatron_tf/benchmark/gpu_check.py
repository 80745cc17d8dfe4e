"""A check of a GPU in a few minutes: results against fp64, speeds, memory, one rank of NCCL.
The parts are independent: if one fails, it is reported, and the others run. The last ones are left out if time is up.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.benchmark import fp8, memory, pattention, sparse, stages, step
from megatron_tf.benchmark.device import machine
from megatron_tf.benchmark.references import plain_formula
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.sparse import BOUNDS
from megatron_tf.config import load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.engine.device import has_fp8
from megatron_tf.errors import first_line
from megatron_tf.model import build_model
from megatron_tf.model import pattention as pattention_layer
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.shipped import configurations
from megatron_tf.tasks.classes import cross_entropy
from megatron_tf.tasks.language_model.section import vocab_size_of

TOKENS = (768, 2304, 8560, 34480)


@dataclass(frozen=True)
class CheckedPart:
    """One table of the report. `problem`: why it is missing, or what is wrong in it."""

    name: str
    rows: list[Row]
    seconds: float
    problem: str | None = None


def run(device: torch.device, seconds: float) -> Iterator[CheckedPart]:
    """The parts, as each is done. None begins after `seconds`."""
    began = time.monotonic()
    for name, make in parts(device).items():
        if time.monotonic() - began > seconds:
            yield CheckedPart(name, [], 0.0, f"not run: {seconds:.0f} s were over")
        else:
            yield _run(name, make)


def parts(device: torch.device) -> Mapping[str, Callable[[], Iterable[Row]]]:
    """Name -> a function that makes its rows; the most important first."""
    bf16 = [torch.bfloat16]
    in_fp8 = {"fp8": lambda: fp8.rows(device, (2304, 8560, 34480), 8192, 768, 9)} if has_fp8(device) else {}
    return {
        "results": lambda: results(device),
        "NCCL": lambda: nccl(device),
        "pattention": lambda: pattention.rows(device, bf16, TOKENS, 8192, 768, 9),
        **in_fp8,
        "sparse": lambda: sparse.rows(device, bf16, (2304, 8448), (4, 16), 256, 8192, 768, 9),
        "stages": lambda: stages.rows(device, bf16, 8560, 8192, 768, 9),
        "step 354M": lambda: _steps(device, "354M", samples=16),
        "step 1.4B": lambda: _steps(device, "1.4B", samples=8),
        "memory": lambda: memory.rows(device, _config("354M")),
        "step with candidates": lambda: _steps(device, "sparse_124M_to_762M", samples=16),
    }


def _steps(device: torch.device, name: str, samples: int) -> Iterable[Row]:
    """Rows with all models in memory, which take turns; with less than 100 GB of it, at half their depth."""
    whole = device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory > 100e9
    layers = None if whole else _config(name).model.num_layers // 2
    forms = "fp8", "plain"
    options = step.StepOptions(device, torch.bfloat16, samples, layers, compile=True, rounds=5, forms=forms)
    return step.rows({name: _config(name).model}, options)


def results(device: torch.device) -> Iterator[Row]:
    """Relative errors ‖found − expected‖ / ‖expected‖ against fp64, of outputs and gradients."""
    for dtype in BOUNDS:
        for tokens in (13, 768, 2140, 8620, 34480):
            yield _compared("pattention", tokens, dtype, *_pattention_pair(device, dtype, tokens))
        for vocabulary in (257, 50304):
            yield _compared("loss", vocabulary, dtype, *_loss_pair(device, dtype, vocabulary))
    for dtype in (torch.bfloat16, torch.float32):
        yield _compared("model", 0, dtype, *_model_pair(device, dtype))


def nccl(device: torch.device) -> Iterator[Row]:
    """The collectives of one rank: NCCL is there, starts, and returns its input."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            given = torch.randn(1024, device=device)
            reduced, gathered = given.clone(), torch.empty_like(given)
            dist.all_reduce(reduced)
            dist.all_gather([gathered], given)
            right = torch.equal(reduced, given) and torch.equal(gathered, given)
            yield {"collectives": backend, "right": right}
        finally:
            dist.destroy_process_group()


def as_json(device: torch.device, done: Iterable[CheckedPart]) -> dict[str, object]:
    return {"machine": machine(device), "parts": [asdict(part) for part in done]}


def _run(name: str, make: Callable[[], Iterable[Row]]) -> CheckedPart:
    if torch.cuda.is_available():
        # memory that the part before has cached must be free for this one
        torch.cuda.empty_cache()
    began, rows = time.monotonic(), []
    problem = None
    try:
        for row in make():
            rows.append(row)
    # a part may fail in any way, and the others must still be reported
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
    wrong = [row for row in rows if row.get("right") is False]
    if wrong and problem is None:
        problem = f"{len(wrong)} of {len(rows)} results are wrong"
    return CheckedPart(name, rows, time.monotonic() - began, problem)


def _compared(what: str, size: int, dtype: torch.dtype, found: list[Tensor], expected: list[Tensor]) -> Row:
    errors = [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(found, expected, strict=True)
    ]
    return {
        "of": what,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "output": errors[0],
        "worst gradient": max(errors[1:]),
        "bound": BOUNDS[dtype],
        # written so that NaN counts as an error
        "right": all(error <= BOUNDS[dtype] for error in errors),
    }


def _pattention_pair(device: torch.device, dtype: torch.dtype, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(tokens)
    drawn = [torch.randn(size, 256, generator=generator) for size in (512, tokens, tokens, 512)]
    x, keys, values, grad = (tensor.to(device, dtype) for tensor in drawn)

    def of_type(layer: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        return _outputs(layer, [t.to(dtype) for t in (x, keys, values)], grad.to(dtype))

    return of_type(pattention_layer, dtype), of_type(_plain, torch.float64)


def _plain(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return plain_formula(x.unsqueeze(1), keys, values).squeeze(1)


def _loss_pair(device: torch.device, dtype: torch.dtype, vocabulary: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (3 * torch.randn(64, vocabulary, generator=generator)).to(device, dtype)
    labels = torch.randint(0, vocabulary, (64,), generator=generator).to(device)
    grad = torch.linspace(0.5, 2, 64, device=device)
    found = _outputs(lambda z: cross_entropy(z, labels, 0, SINGLE), [logits], grad)
    expected = _outputs(
        lambda z: F.cross_entropy(z, labels, reduction="none"), [logits.double()], grad.to(torch.float64)
    )
    return found, expected


def _model_pair(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The tiny model's loss and gradients, all in one vector, and the same in fp64 on the CPU."""
    model = _config("tiny").model
    ids = torch.randint(0, vocab_size_of(model), (2, model.seq_length), generator=torch.Generator().manual_seed(0))

    def loss_and_gradients(on: torch.device, of: torch.dtype) -> list[Tensor]:
        built = build_model(model, seed=0).to(on, of)
        logits = built(ids.to(on))
        loss = F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(of, torch.float32)), ids.flatten().to(on))
        gradients = torch.autograd.grad(loss, list(built.parameters()))
        return [loss.detach().cpu(), torch.cat([g.flatten() for g in gradients]).cpu()]

    return loss_and_gradients(device, dtype), loss_and_gradients(torch.device("cpu"), torch.float64)


def _outputs(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _config(name: str) -> RunConfig:
    return load_config(configurations()[name])
