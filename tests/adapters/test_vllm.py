"""Adapters behind vLLM, which wants an environment of its own: tests/convert/huggingface/test_vllm.py says how to make
one. It needs xxhash and zstandard in addition; this package and its plugin are found there by PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import decoder, fill
from live import PATIENCE_SECONDS
from peft import PeftModel, get_peft_model
from tokenformers import tokenformer
from torch import nn

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.export import export_adapter
from megatron_tf.adapters.loading import load_base
from megatron_tf.adapters.vllm_plugin import BASES, Ranks, add_adapter, configured_folder
from megatron_tf.errors import CheckpointError

PYTHON = os.environ.get("MEGATRON_TF_VLLM_PYTHON")
PROJECT = Path(__file__).parents[2]
PROMPTS = [[40, 5, 77, 31, 9], [90]]
NEW = 10
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, options, prompts, new = json.loads(sys.argv[1])
    server = LLM(model, dtype="float32", max_num_seqs=2, max_model_len=64, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    outputs = server.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    print("FOUND " + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def prepare(folder, name="Llama", tokens=4, **options):
    """`base`, of heads that vLLM has kernels for, and `adapter`."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    decoder(name, **sizes).save_pretrained(folder / "base")
    model: Any = get_peft_model(decoder(name, **sizes), PattentionConfig(num_tokens=tokens, **options))
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_tokens" in name:
                parameter *= 0.2  # the base still has a say in what is written
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@torch.no_grad()
def greedy(model, ids):
    found = list(ids)
    for _ in range(NEW):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_the_branches_of_vllm_s_model_are_those_of_the_adapter(tmp_path):
    """Here the model is transformers' own: vLLM's has modules of the same names at these places."""
    base, adapter = prepare(tmp_path)
    model, expected = load_base(base), PeftModel.from_pretrained(load_base(base), adapter)
    added = add_adapter(model, adapter, model.config)
    assert len(added) == 8 and added <= {name for name, _ in model.named_parameters()}
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)


class Exchange:
    """Sums over ranks that are threads."""

    def __init__(self, size: int):
        self.barrier, self.parts = Barrier(size, timeout=PATIENCE_SECONDS), [torch.empty(0)] * size

    def reduce(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = part
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()  # all have it before the next parts come
        return total


@pytest.mark.parametrize("size, tokens, choice", [(2, 3, {}), (4, 3, {}), (2, 6, {"candidates": 2, "group_size": 1})])
def test_tensor_parallel_ranks_share_the_tokens_and_compute_what_one_does(size, tokens, choice, tmp_path):
    """3 tokens over 2 ranks are 1 and 2; over 4 the first rank has none."""
    base, adapter = prepare(tmp_path, tokens=tokens, **choice)
    exchange, ids = Exchange(size), torch.tensor([PROMPTS[0]])

    def loaded(ranks: Ranks) -> nn.Module:
        model = load_base(base, torch.float64)
        add_adapter(model, adapter, model.config, ranks)
        return model.double()

    @torch.no_grad()
    def logits(model: nn.Module) -> torch.Tensor:
        return model(ids).logits

    expected = logits(loaded(Ranks()))
    models = [loaded(Ranks(size, rank, partial(exchange.reduce, rank))) for rank in range(size)]
    keys = [dict(model.named_parameters())["model.layers.0.mlp.pattention_branch.key_tokens"] for model in models]
    assert [3 * len(own) // tokens for own in keys] == {2: [1, 2], 4: [0, 1, 1, 1]}[size]
    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(logits, models):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_vllm_cannot_serve_is_one_message(tmp_path):
    sizes = {"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2}
    adapter = prepare(tmp_path)[1]
    for change, message in (
        ({"model_type": "qwen2"}, "model_type is llama, and this one's is qwen2"),
        ({"num_hidden_layers": 3}, "num_layers is 2, and this one's is 3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            add_adapter(nn.Module(), adapter, SimpleNamespace(**{**sizes, **change}))
    with pytest.raises(CheckpointError, match="branches at linear layers"):
        add_adapter(nn.Module(), prepare(tmp_path / "linear", modules="linear")[1], SimpleNamespace(**sizes))
    get_peft_model(tokenformer(), PattentionConfig(num_tokens=2, modules="pattention")).save_pretrained(
        tmp_path / "own"
    )
    with pytest.raises(CheckpointError, match="megatron_tf merge-adapter"):
        add_adapter(nn.Module(), tmp_path / "own", SimpleNamespace(**sizes))
    with pytest.raises(CheckpointError, match="pattention_adapter: is None, .* in --hf-overrides"):
        configured_folder(SimpleNamespace(**sizes))


def plugged_in(folder):
    """A folder in which vLLM finds the plugin as it does where this package is installed."""
    entry = "megatron_tf = megatron_tf.adapters.vllm_plugin:register"
    assert f'"vllm.general_plugins": ["{entry}"]' in (PROJECT / "setup.py").read_text()
    metadata = folder / "site" / "megatron_tf-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron_tf\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    return metadata.parent


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.timeout(600)
@pytest.mark.skipif(PYTHON is None, reason="MEGATRON_TF_VLLM_PYTHON names no Python that has vLLM")
@pytest.mark.parametrize(
    ("name", "way", "ranks"),
    [("Llama", "plugin", 1), ("Llama", "plugin", 2), ("Llama", "folder", 1), ("Llama", "folder", 2),
     ("Qwen3", "plugin", 1)],
)  # fmt: skip
@pytest.mark.usefixtures("modules_of_its_own")
def test_vllm_writes_what_transformers_does(name, way, ranks, tmp_path):
    assert f"{name}ForCausalLM" in BASES
    model, adapter = prepare(tmp_path, name)
    plain = load_base(model)
    expected = [greedy(plain, ids) for ids in PROMPTS]
    with_adapter = PeftModel.from_pretrained(plain, adapter)
    adapted = [greedy(with_adapter, ids) for ids in PROMPTS]
    assert adapted != expected
    options = {"hf_overrides": {"architectures": [f"Pattention{name}ForCausalLM"], "pattention_adapter": str(adapter)}}
    if way == "folder":
        export_adapter(model, adapter, tmp_path / "export")
        model, options = tmp_path / "export", {"trust_remote_code": True, "model_impl": "transformers"}
    options |= {"enforce_eager": True, "tensor_parallel_size": ranks}
    (tmp_path / "serve.py").write_text(SCRIPT)
    variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
                 # By itself vLLM gives each rank a NUMA node of its own, and ends where there are fewer.
                 "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                 # Over ranks a function of its embedding is compiled at the first step, which has 300 seconds.
                 "TORCH_COMPILE_DISABLE": "1",
                 "PYTHONPATH": f"{PROJECT}{os.pathsep}{plugged_in(tmp_path)}"}  # fmt: skip
    command = [PYTHON, tmp_path / "serve.py", json.dumps([str(model), options, PROMPTS, NEW])]
    done = subprocess.run(
        command, env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (found,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    assert json.loads(found.removeprefix("FOUND ")) == adapted
