"""What users get wrong: one message with key, numbers and remedy, exit code 2, and nothing written."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys

import pytest
from launching import PROJECT, TRAIN, free_port, run, train

from megatron_tf.data.indexed import IndexedWriter


def refused(result, folder, *fragments, run_dir="run", code=2):
    out = result.stdout
    assert result.returncode == code, out
    assert out.count("error:") == 1 and "Traceback" not in out, out
    for fragment in fragments:
        assert fragment in out, out
    assert not (folder / run_dir).exists()


CASES = {
    "misspelt key": (["training.micro_batch=2"], ["training.micro_batch", "micro_batch_size"]),
    "wrong type": (["model.num_layers=many"], ["model.num_layers", "many"]),
    "batch that does not divide": (["training.global_batch_size=9"], ["global_batch_size", "9", "2"]),
    "heads over tensor ranks": (["parallel.tensor=3"], ["num_attention_heads", "4", "3"]),
    "more stages than layers": (["parallel.pipeline=3"], ["parallel.pipeline", "3", "2"]),
    "world size": (["parallel.tensor=2"], ["tensor 2", "multiple of 2", "1"]),
    "stage 0 in bf16": (["zero.stage=0", "training.precision=bf16"], ["zero.stage", "bf16"]),
    "deepspeed section against ours": (["deepspeed.gradient_clipping=5"], ["deepspeed.gradient_clipping",
                                                                           "training.gradient_clipping"]),
    "deepspeed setting that makes gradients wrong": (["deepspeed.zero_optimization.round_robin_gradients=true"],
                                                     ["deepspeed.zero_optimization.round_robin_gradients: refused"]),
    "deepspeed value of a wrong type": (["deepspeed.zero_optimization.reduce_bucket_size=big"],
                                        ["deepspeed.zero_optimization.reduce_bucket_size", "'big'"]),
    "missing data": (["data.train=[{path: nowhere}]"], ["data.train[0].path: nowhere.bin", "preprocess_data"]),
    "missing tokenizer": (["data.tokenizer=no.json"], ["data.tokenizer: no.json: no such file"]),
    "tokenizer beyond the vocabulary": (["data.tokenizer=bytes"],
                                        ["model.vocab_size: 99, but data.tokenizer bytes has 257"]),
    "a model beyond memory": (["model.vocab_size=2000000000"], ["model: a rank needs about", "GiB"]),
    "a second configuration": (["other.yml"], ["other.yml: is a second configuration"]),
    "override without a value": (["training.train_steps"], ["training.train_steps=100"]),
    "vocabulary smaller than the tokens": (["model.vocab_size=50"], ["50"]),
    "growth from nowhere": (["growth.from=nowhere"], ["growth.from: nowhere"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_single_process(folder, name):
    overrides, fragments = CASES[name]
    result = train(folder, *overrides)
    if name == "vocabulary smaller than the tokens":  # found when a batch holds such a token: data without a summary
        assert result.returncode == 2 and "beyond the vocabulary" in result.stdout and "Traceback" not in result.stdout
        return
    refused(result, folder, *fragments)


def test_all_problems_at_once(folder):
    result = train(folder, "parallel.pipeline=3", "optimizer.schedule.min_lr=1", "optimizer.schedule.warmup_steps=100")
    refused(result, folder, "parallel.pipeline", "min_lr", "warmup_steps")


def test_duplicate_key(folder):
    text = (folder / "config.yml").read_text()
    (folder / "config.yml").write_text(text + "\nlogging: {interval_steps: 2}\n")
    refused(train(folder), folder, "logging", "twice")


def test_truncated_data(folder):
    with open(folder / "tokens.bin", "r+b") as file:
        file.truncate(1000)
    refused(train(folder), folder, "tokens.bin", "1000")


def test_not_an_index(folder):
    (folder / "tokens.idx").write_bytes(b"something else entirely, of no use")
    refused(train(folder), folder, "tokens.idx")


def test_one_message_from_many_ranks(folder):
    result = train(folder, "data.train=[{path: nowhere}]", ranks=2)
    out = result.stdout
    assert (
        result.returncode != 0
        and out.count("nowhere.bin and nowhere.idx: no such file") == 1
        and not (folder / "run").exists()
    ), out


def test_deepspeed_passes_the_exit_code_on(folder):
    result = train(folder, "parallel.pipeline=3", ranks=2, launcher="deepspeed")
    assert result.returncode == 2 and result.stdout.count("error:") == 1, result.stdout


def test_run_folder_of_another_run(folder):
    assert train(folder).returncode == 0
    before = sorted(path for path in (folder / "run").rglob("*"))
    never = train(folder, "checkpoint.resume=never")
    assert never.returncode == 2 and "checkpoint.resume" in never.stdout and "run.dir" in never.stdout, never.stdout
    result = train(folder, "model.hidden_size=64")
    assert result.returncode == 2 and result.stdout.count("error:") == 1, result.stdout
    assert "hidden_size" in result.stdout and "32" in result.stdout and "64" in result.stdout
    assert sorted(path for path in (folder / "run").rglob("*")) == before


def test_growth_that_takes_layers_away(started):
    result = train(started, f"growth.from={started}/run", f"run.dir={started}/grown", "model.num_layers=1",
                   "model.parameter_tokens.ffn=75")  # fmt: skip
    refused(result, started, "model.num_layers", "2", "1", run_dir="grown")


def test_growth_that_changes_more_than_tokens_and_layers(started):
    result = train(started, f"growth.from={started}/run", f"run.dir={started}/grown", "model.num_attention_heads=2",
                   "model.parameter_tokens.ffn=75")  # fmt: skip
    refused(result, started, "model.num_attention_heads", "4", "2", run_dir="grown")


def test_other_data_on_resume(folder):
    assert train(folder).returncode == 0
    with IndexedWriter(folder / "other", vocab_size=99) as writer:
        writer.add_document(range(90))
        writer.add_document(range(90))
    result = train(folder, f"data.train=[{{path: {folder}/other}}]", "training.train_steps=9")
    assert result.returncode == 2 and "data.train: the checkpoint was trained on" in result.stdout, result.stdout
    assert "allow_data_change" in result.stdout


def test_port_in_use(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        refused(train(folder, **ranks), folder, str(port), "--master_port")


def test_an_environment_that_contradicts_itself(folder):
    ranks = {"RANK": "3", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    refused(train(folder, **ranks), folder, "RANK", "3", "2")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_run_folder(folder):
    folder.chmod(0o500)
    try:
        refused(train(folder), folder, "run.dir")
    finally:
        folder.chmod(0o700)


def test_a_file_where_the_run_folder_should_be(folder):
    (folder / "run").write_text("in the way")
    result = train(folder)
    assert result.returncode == 2 and "run.dir" in result.stdout and "Traceback" not in result.stdout, result.stdout


def test_tokenizer_that_disagrees_with_the_data(folder):
    pytest.importorskip("tokenizers")
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat " * 200)
    tools = PROJECT / "tools"
    (folder / "other.txt").write_text("quite another text with other words in it " * 200)
    for name, learnt_from in (("one", text), ("two", folder / "other.txt")):
        made = run([sys.executable, tools / "train_tokenizer.py", "--input", learnt_from, "--vocab-size", 270,
                    "--output", folder / f"{name}.json"])  # fmt: skip
        assert made.returncode == 0, made.stdout
    made = run([sys.executable, tools / "preprocess_data.py", "--input", text, "--tokenizer", folder / "one.json",
                "--output-prefix", folder / "text"])  # fmt: skip
    assert made.returncode == 0, made.stdout
    overrides = [f"data.train=[{{path: {folder}/text}}]", "data.validation=[]", "evaluation.interval_steps=null",
                 "model.vocab_size=300"]  # fmt: skip
    refused(train(folder, *overrides, f"data.tokenizer={folder}/two.json"), folder, "tokenizer", "two.json")
    smaller = train(folder, *overrides, f"data.tokenizer={folder}/one.json", "model.vocab_size=100")
    refused(smaller, folder, "model.vocab_size", "100")
    shutil.rmtree(folder / "run", ignore_errors=True)


def test_usage_error_is_exit_code_2():
    result = run([sys.executable, TRAIN])
    assert result.returncode == 2 and result.stdout.endswith("the following arguments are required: config\n")


@pytest.mark.parametrize("name", ["gpu", "xpu"])
def test_accelerator_that_is_not_here(folder, name):
    refused(train(folder, DS_ACCELERATOR=name), folder, f"DS_ACCELERATOR={name}", "Unset it")


def test_precision_that_the_device_lacks(folder):
    script = "import torch; print(torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported())"
    if run([sys.executable, "-c", script]).stdout.strip() == "True":
        pytest.skip("this device computes in fp16")
    refused(train(folder, "training.precision=fp16"), folder, "training.precision: fp16 needs a GPU")


def test_trackers_that_are_not_installed(folder):
    missing = [name for name in ("wandb", "tensorboard") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("both are installed")
    result = train(folder, f"logging.trackers=[{', '.join(missing)}]")
    assert result.returncode == 2 and "Traceback" not in result.stdout and not (folder / "run").exists(), result.stdout
    for name in missing:
        assert f"pip install 'megatron_tf[{name}]'" in result.stdout


def test_ranks_that_do_not_meet(folder):
    """One line a rank, with address, port, seconds and remedy, and none of torch's stack."""
    port = str(free_port())
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    result = train(folder, "parallel.timeout_seconds=1", **ranks)
    refused(result, folder, "127.0.0.1", port, "within 1 seconds", "parallel.timeout_seconds", code=69)
    assert "frame #" not in result.stdout and len(result.stdout.splitlines()) == 1, result.stdout
