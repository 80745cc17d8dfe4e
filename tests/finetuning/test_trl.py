"""An adapter in TRL's SFTTrainer, as its users call it: the trainer itself adds it to the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import decoder, questions, write_base
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from megatron_tf.adapters import PattentionConfig


def train(base: Path, to: Path, steps: int, resume: bool = False, **options: object) -> SFTTrainer:
    arguments = SFTConfig(
        str(to), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, max_length=64, logging_steps=1, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    examples = [
        {"messages": [{"role": "user", "content": each["prompt"]}, {"role": "assistant", "content": each["answer"]}]}
        for each in questions()
    ]
    adapter = PattentionConfig(num_tokens=4, task_type="CAUSAL_LM", **options)
    trainer = SFTTrainer(str(base), arguments, train_dataset=Dataset.from_list(examples), peft_config=adapter)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"modules": "linear"}])
def test_trl_trains_saves_and_goes_on(tmp_path, options):
    base = write_base(tmp_path / "base")
    whole = train(base, tmp_path / "whole", 8, **options)
    train(base, tmp_path / "parts", 4, **options)
    again = train(base, tmp_path / "parts", 8, resume=True, **options)
    losses = [record["loss"] for record in whole.state.log_history if "loss" in record]
    assert [record["loss"] for record in again.state.log_history if "loss" in record] == losses
    assert losses[-1] < losses[0]

    again.save_model(str(tmp_path / "adapter"))
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        found = saved(ids).logits
        assert torch.equal(found, whole.model.eval()(ids).logits)
        assert not torch.equal(found, decoder().eval()(ids).logits)
