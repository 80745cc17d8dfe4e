"""Sample texts during training: the model continues evaluation.sample_prompts greedily."""

from __future__ import annotations

from collections.abc import Callable

from megatron_tf.data.summary import known_end
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.inference.greedy import continue_greedily
from megatron_tf.model.stage import Stage
from megatron_tf.runtime.agreement import together
from megatron_tf.training.running import Run


def sample_texts(run: Run, stage: Callable[[], Stage]) -> SampleTexts | None:
    """The sample texts that the configuration asks for; None: none. All ranks call it together."""
    config = run.config
    if not config.evaluation.sample_prompts:
        return None
    assert config.data.tokenizer is not None, "validate asks for it"
    name = config.data.tokenizer
    return SampleTexts(run, stage(), together(lambda: load_tokenizer(name, known_end(config.data))))


class SampleTexts:
    """Continues the prompts with the present weights."""

    def __init__(self, run: Run, stage: Stage, tokenizer: Tokenizer):
        self._run = run
        self._stage = stage
        self._tokenizer = tokenizer
        # rank 0 of the last stage: stages are the outermost axis
        topology = run.plan.topology
        self._last_rank = topology.peers("pipeline", 0)[-1]
        self._prompts = tokenizer.encode_batch(list(run.config.evaluation.sample_prompts))

    def write(self) -> list[str]:
        """Prompt and continuation of each, the same on all ranks, which call it together."""
        config, texts = self._run.config, []
        for ids in self._prompts:
            prompt = ids or [self._tokenizer.eod_id]
            added = continue_greedily(
                self._stage,
                prompt,
                num_tokens=config.evaluation.sample_tokens,
                context=config.model.seq_length,
                vocab_size=self._tokenizer.vocab_size,
                end=self._tokenizer.eod_id,
                last_rank=self._last_rank,
            )
            texts.append(self._tokenizer.decode([*ids, *added]))
        return texts
