"""An exported classifier has the evaluation's numbers to the last image: in transformers, and in timm.

timm wants an environment of its own, because it needs torchvision, whose builds for processors are not to be had
everywhere. Its Python is named by a variable:

python -m venv timm && timm/bin/pip install torch==2.13.0 numpy pillow safetensors
timm/bin/pip install --no-deps torchvision==0.28.0 timm==1.0.31 && timm/bin/pip install huggingface_hub pyyaml
MEGATRON_TF_TIMM_PYTHON=timm/bin/python python -m pytest tests/evaluation/test_exported_images.py
"""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from images import odd_classifier, write_contents
from launching import evaluate
from PIL import Image

from megatron_tf.checkpoint.step_zero import write_weights
from megatron_tf.convert.huggingface.image_export import write_image_export

PYTHON = os.environ.get("MEGATRON_TF_TIMM_PYTHON")
IMAGES = 60
CLASSES = tuple("abcdefg")
CONFIG = """
run: {{dir: {folder}/run, name: test}}
model:
  task: image_classification
  image: {{size: 6, patch: 3, classes: 7, crop: 0.7}}
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  parameter_tokens: {{qkv: 37, proj: 29, ffn: 69}}
training: {{train_steps: 6, global_batch_size: 8, micro_batch_size: 4, precision: fp32}}
optimizer: {{lr: 1e-2}}
data: {{train: {folder}/images, validation: {folder}/images}}
"""
TIMM = """
import json, sys
import torch
try:
    import torchvision
except RuntimeError:  # a build for GPUs: no image is classified with these two, which its import asks for
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
folder, images = sys.argv[1:]
sys.path.insert(0, folder)
import timm, tokenformer_timm
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy
model = timm.create_model("tokenformer_image", pretrained=True).eval()
settings = resolve_data_config({}, model=model, use_test_size=True)
settings = {key: settings[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
# as timm's validate.py goes on
loader = create_loader(create_dataset("", images), batch_size=7, num_workers=0, device=torch.device("cpu"), **settings)
found = torch.zeros(2)
with torch.no_grad():
    for inputs, labels in loader:
        found += torch.stack(accuracy(model(inputs), labels, topk=(1, 5))) / 100 * len(inputs)
head = timm.create_model("tokenformer_image", pretrained=True, num_classes=3)
assert head(inputs).shape[1] == 3
print(json.dumps([round(count) for count in found.tolist()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photographs of all shapes, a run whose weights are `out`'s, and that export."""
    folder = tmp_path_factory.mktemp("images")
    random, contents, labels = np.random.default_rng(3), [], []
    for number in range(IMAGES):
        shape = random.integers(4, 30, 2)
        levels = np.kron(random.integers(0, 256, (*shape, 3)), np.ones((2, 2, 1))).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(levels).save(content, "JPEG" if number % 2 else "PNG")
        contents.append(content.getvalue())
        labels.append(number % len(CLASSES))
        place = folder / "by class" / CLASSES[labels[-1]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.{'jpg' if number % 2 else 'png'}").write_bytes(contents[-1])
    write_contents(folder / "images", contents, labels, CLASSES)
    (folder / "config.yml").write_text(CONFIG.format(folder=folder))
    tokens = {"qkv": 37, "proj": 29, "ffn": 69}
    network = odd_classifier(
        {"size": 6, "patch": 3, "classes": 7, "crop": 0.7, "pooling": "class_token"}, {"parameter_tokens": tokens}
    )
    write_weights(
        folder / "run" / "checkpoints", network.config, network.state_dict(), network.scales, lambda done, text: None
    )
    write_image_export(folder / "out", network, CLASSES)
    return folder


@pytest.fixture(scope="module")
def evaluated(folder) -> dict:
    done = evaluate(folder, "--output", folder / "found")
    assert done.returncode == 0, done.stdout
    (found,) = json.loads((folder / "found" / "step_00000000_images.json").read_text())["data"]
    assert found["images"] == IMAGES and 0 < found["top1"] < found["top5"] < 1
    return found


def test_transformers_counts_what_the_evaluation_does(folder, evaluated):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(folder / "out", trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder / "out", trust_remote_code=True)
    right = {name: [0, 0] for name in CLASSES}
    for name in CLASSES:
        for file in (folder / "by class" / name).iterdir():
            with torch.no_grad():
                logits = model(**processor(Image.open(file), return_tensors="pt")).logits[0]
            best = [model.config.id2label[number] for number in logits.topk(5).indices.tolist()]
            right[name][0] += best[0] == name
            right[name][1] += name in best
    for entry in evaluated["classes"]:
        assert [round(entry[top] * entry["images"]) for top in ("top1", "top5")] == right[entry["name"]]


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.skipif(PYTHON is None, reason="MEGATRON_TF_TIMM_PYTHON names no Python that has timm")
def test_timm_counts_what_the_evaluation_does(folder, evaluated, tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", TIMM, folder / "out", folder / "by class"],
        cwd=tmp_path, env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == [round(evaluated[top] * IMAGES) for top in ("top1", "top5")]
