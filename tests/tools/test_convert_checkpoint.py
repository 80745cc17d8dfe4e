from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from launching import PROJECT, run, train
from prepared import write_tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tooling import assert_refused, tool

from megatron_tf.checkpoint.compare import compare
from megatron_tf.checkpoint.load import load_logical
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.inference.load import load_model

GOLDEN = PROJECT / "tests" / "golden"
PUBLISHED = GOLDEN / "tiny_pytorch_model.bin"
REFERENCE = GOLDEN / "tiny_lm.safetensors"
CONFIG = """
run: {{dir: {folder}/run, name: test}}
model:
  num_layers: 3
  hidden_size: 64
  num_attention_heads: 4
  seq_length: 32
  vocab_size: 128
  parameter_tokens: {{qkv: 48, proj: 48, ffn: 160}}
training: {{train_steps: 2, global_batch_size: 4, micro_batch_size: 2, precision: fp32}}
optimizer: {{lr: 1e-3}}
data:
  train: [{{path: {folder}/tokens}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """config.yml and `run`, imported from the golden file by the command."""
    folder = tmp_path_factory.mktemp("convert")
    (folder / "config.yml").write_text(CONFIG.format(folder=folder))
    done = bring_in(folder, "run", "--reference", REFERENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run {folder}/config.yml with run.dir={folder}/run" in done.stdout
    return folder


def bring_in(folder: Path, target: str, *arguments, source=PUBLISHED, **options):
    return tool("convert_checkpoint", "from-official", source, "--config", folder / "config.yml",
                "--to", folder / target, *arguments, **options)  # fmt: skip


def test_a_dry_run_says_everything_and_writes_nothing(folder):
    done = bring_in(folder, "dry", "--dry-run", "--reference", REFERENCE)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        f"from {PUBLISHED}: published weights, 585,389 bytes",
        f"to {folder}/dry/checkpoints/step_00000000",
        "model as configured",
        "3 layers × 64, 4 heads, 32 positions, 128 vocabulary rows, l2_norm_gelu",
        "ffn 160 tokens, τ 12.6491",
        "parameters 143,488",
        "dry run: nothing is written",
    ):
        assert line in lines, done.stdout
    assert any(line.startswith("reference logits differ by") for line in lines)
    assert not (folder / "dry").exists()
    done = tool("convert_checkpoint", "to-official", folder / "run", "--to", folder / "dry.bin", "--dry-run")
    assert done.returncode == 0 and '"ffn_slot_num": 160' in done.stdout, done.stderr
    assert not (folder / "dry.bin").exists()


def test_the_imported_model_computes_what_the_official_one_does(folder):
    from safetensors.torch import load_file

    golden = load_file(REFERENCE)
    logits = load_model(folder / "run")(golden["input_ids"])
    torch.testing.assert_close(logits, golden["logits_fp32"], rtol=0, atol=5e-5)


def test_there_and_back_again(folder):
    done = tool("convert_checkpoint", "to-official", folder / "run", "--to", folder / "new" / "back.bin")
    assert done.returncode == 0, done.stderr
    there = torch.load(PUBLISHED, weights_only=True)
    back = torch.load(folder / "new" / "back.bin", weights_only=True)
    assert list(back) == list(there) and all(torch.equal(back[name], there[name]) for name in there)
    assert [path.name for path in (folder / "new").iterdir()] == ["back.bin"]


def test_bad_input_is_one_message(folder, tmp_path):
    weights = torch.load(PUBLISHED, weights_only=True)
    last = list(weights)[-1]
    torch.save({name: tensor for name, tensor in weights.items() if name != last}, tmp_path / "missing.bin")
    assert_refused(bring_in(folder, "refused", source=tmp_path / "missing.bin"), f"missing tensor {last}")
    assert_refused(bring_in(folder, "run"), "holds step_00000000 already. Nothing is overwritten")
    unknown = tool("convert_checkpoint", "from-official", PUBLISHED, "--to", folder / "refused")
    assert_refused(unknown, "none of the published models", "give --config")
    (tmp_path / "heads.yml").write_text((folder / "config.yml").read_text().replace("heads: 4", "heads: 3"))
    done = bring_in(folder, "refused", "--config", tmp_path / "heads.yml")
    assert_refused(done, "model.hidden_size: 64 is not a multiple of model.num_attention_heads 3. Set it to 63 or 66")
    damaged = bytearray(PUBLISHED.read_bytes())
    damaged[damaged.index(weights["sequential.3.mlp.key_param_tokens"].numpy().tobytes())] ^= 1
    (tmp_path / "damaged.bin").write_bytes(damaged)
    done = bring_in(folder, "refused", source=tmp_path / "damaged.bin")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "is damaged: the bytes of" in done.stderr
    assert not (folder / "refused").exists()
    taken = tool("convert_checkpoint", "to-official", folder / "run", "--to", PUBLISHED)
    assert_refused(taken, "exists already. Nothing is overwritten")


def test_a_full_disk_leaves_nothing_behind(folder, tmp_path):
    done = bring_in(folder, "full", largest_file=100_000)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "File too large" in done.stderr, done.stderr
    assert list((folder / "full" / "checkpoints").iterdir()) == []
    done = tool("convert_checkpoint", "to-official", folder / "run", "--to", tmp_path / "full.bin",
                largest_file=100_000)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "File too large" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_imported_model_is_trained_on_and_grown(folder, tmp_path):
    write_tokens(tmp_path / "tokens", 128, documents=20)
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=tmp_path))
    shutil.copytree(folder / "run", tmp_path / "run")
    done = train(tmp_path)
    assert done.returncode == 0 and "step_00000000 at step 0" in done.stdout, done.stdout
    weights, before = load_logical(tmp_path / "run"), load_logical(folder / "run")
    change = max((weights[name] - before[name]).abs().max() for name in weights)
    assert 0 < change < 0.01  # two steps away from the imported weights, not from initial ones
    done = run(["python", PROJECT / "tools" / "expand_checkpoint.py", "--from", folder / "run", "--config",
                tmp_path / "config.yml", "--to", tmp_path / "grown", "model.parameter_tokens.ffn=170"])  # fmt: skip
    assert done.returncode == 0 and "function    kept" in done.stdout, done.stdout
    grown = open_checkpoint(tmp_path / "grown" / "checkpoints" / "step_00000000")
    out = tool("convert_checkpoint", "to-official", grown.path, "--to", tmp_path / "out.bin")
    assert_refused(out, "blocks.0.ffn: τ 12.6491, the official code takes 13.0384")


@pytest.mark.slow
def test_to_transformers_and_back_again(folder, tmp_path):
    out, tokenizer = tmp_path / "out", tmp_path / "tokenizer.json"
    done = tool("convert_checkpoint", "to-hf", folder / "run", "--to", out, "--dry-run")
    assert done.returncode == 0 and "dry run" in done.stdout and not out.exists(), done.stderr
    assert "tokenizer   none: no config.yml with data.tokenizer" in done.stdout
    words = {word: number for number, word in enumerate(("<|endoftext|>", "?", "the", "of", "a", "is", "class"))}
    small = Tokenizer(WordLevel(words, unk_token="?"))  # bytes alone would be more than the golden model's vocabulary
    small.pre_tokenizer = Whitespace()
    small.save(str(tokenizer))
    done = tool("convert_checkpoint", "to-hf", folder / "run", "--to", out, "--tokenizer", tokenizer)
    assert done.returncode == 0 and "on text: logits differ by" in done.stdout, done.stdout + done.stderr
    done = tool("convert_checkpoint", "from-hf", out, "--to", tmp_path / "back")
    assert done.returncode == 0 and f"run.dir={tmp_path}/back" in done.stdout, done.stdout + done.stderr
    there, back = (
        open_checkpoint(path / "checkpoints" / "step_00000000") for path in (folder / "run", tmp_path / "back")
    )
    back.verify()
    assert [difference for difference in compare(there, back) if not difference.equal] == []
    assert (back.index.model, back.index.scales) == (there.index.model, there.index.scales)
    assert_refused(tool("convert_checkpoint", "to-hf", folder / "run", "--to", out), "exists already. Nothing is")
    assert_refused(tool("convert_checkpoint", "from-hf", out, "--to", tmp_path / "back"), "holds step_00000000 already")
    (out / "tokenizer.json").write_text('{"a":1}')
    done = tool("convert_checkpoint", "from-hf", out, "--to", tmp_path / "new")
    assert_refused(done, "tokenizer.json: not a Hugging Face tokenizers file")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_candidates_go_to_transformers_and_back_and_not_to_the_official_format(folder, tmp_path):
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=folder))
    done = run(["python", PROJECT / "tools" / "expand_checkpoint.py", "--from", folder / "run", "--config",
                tmp_path / "config.yml", "--to", tmp_path / "split", "growth.from=x", "growth.method=split",
                "model.sparse.ffn={group_size: 32, candidates: 3}"])  # fmt: skip
    assert done.returncode == 0 and "function    kept" in done.stdout, done.stdout
    done = tool("convert_checkpoint", "to-hf", tmp_path / "split", "--to", tmp_path / "out")
    assert done.returncode == 0 and "ffn         160 of 480 tokens, τ 12.6491" in done.stdout, done.stdout + done.stderr
    done = tool("convert_checkpoint", "from-hf", tmp_path / "out", "--to", tmp_path / "back")
    assert done.returncode == 0, done.stdout + done.stderr
    there, back = (open_checkpoint(tmp_path / name / "checkpoints" / "step_00000000") for name in ("split", "back"))
    assert [difference for difference in compare(there, back) if not difference.equal] == []
    out = tool("convert_checkpoint", "to-official", tmp_path / "split", "--to", tmp_path / "out.bin")
    assert_refused(out, "the official format has no place for model.sparse")


def test_an_export_that_cannot_be_leaves_nothing(folder, tmp_path):
    train_bpe([" ".join(map(str, range(1000)))], 300, tmp_path / "other.json")
    done = tool("convert_checkpoint", "to-hf", folder / "run", "--to", tmp_path / "out", "--tokenizer",
                tmp_path / "other.json")  # fmt: skip
    assert done.returncode == 2 and "tokens, the model's vocabulary 128" in done.stderr, done.stderr
    done = tool("convert_checkpoint", "to-hf", folder / "run", "--to", tmp_path / "out", largest_file=100_000)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "File too large" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
    done = tool("convert_checkpoint", "from-hf", folder / "run", "--to", tmp_path / "new")
    assert_refused(done, f"{folder / 'run'}: is a run or a checkpoint of one, not an export", "as growth.from to grow")
    (tmp_path / "empty").mkdir()
    done = tool("convert_checkpoint", "from-hf", tmp_path / "empty", "--to", tmp_path / "new")
    assert_refused(done, "config.json: No such file or directory. Give a folder that to-hf or save_pretrained")
