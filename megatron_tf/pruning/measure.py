"""Measures the contributions of a model's parameter tokens on real data, and drops the tokens that contribute least.

`pruning.criterion` has the criterion and the maths. All projections are measured in the unpruned model, over the same
data. Each projection of each layer has its own selection. Memory holds the model's weights, the activations of one
block for a few samples, and one number for each token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.checks import check_whole_number
from megatron_tf.config.nearest import either
from megatron_tf.config.sections.data import DataSource
from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.data.documents import Boundaries, find_boundaries
from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.loader import BatchLoader, build_dataset, check_tokenizer
from megatron_tf.data.summary import read_summary, summary_file
from megatron_tf.errors import CheckpointError, DataError, UserError
from megatron_tf.growth.source import PRUNED, growth_entry
from megatron_tf.inference.load import file_of_run, run_config
from megatron_tf.model.attention import document_starts
from megatron_tf.model.observing import observed
from megatron_tf.model.projection import Pattention
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.paths import literal
from megatron_tf.pruning.criterion import largest, summed_contributions, summed_scale_terms
from megatron_tf.pruning.source import PrunedSource
from megatron_tf.state.optimizer_states import STATES, WEIGHT
from megatron_tf.state.parameters import parameter_table, projections
from megatron_tf.state.sources import StateSource, StepZero
from megatron_tf.tasks.classes import IGNORED
from megatron_tf.tasks.data import Batch
from megatron_tf.tasks.language_model.section import vocab_size_of
from megatron_tf.telemetry.text import count_of

DEFAULT_SAMPLES = 64
NO_BOUNDARIES = Boundaries()
_SEED = 0  # of the order of samples; constant, so that the samples depend only on the data and seq_length
_BATCH_TOKENS = 2048


def target_counts(text: str, old: Mapping[str, int], option: str = "--tokens") -> dict[str, int]:
    """The counts by kind after an `option` such as "qkv=96,ffn=384". Kinds that it does not name keep those of `old`.

    UserError with all problems.
    """
    counts, given, problems = dict(old), set(), []
    for part in text.split(","):
        kind, _, number = (piece.strip() for piece in part.partition("="))
        if option == "--candidates" and kind in ParameterTokens.model_fields and kind not in counts:
            problems.append(f"{option}: {kind} has no candidates in this model. Choose {either(counts)}.")
        elif kind not in counts or not re.fullmatch(r"-?[0-9]+", number):
            problems.append(f"{option}: {part!r} is not KIND=N with a KIND of {', '.join(counts)}.")
        elif kind in given:
            problems.append(f"{option}: names {kind} twice.")
        elif not 1 <= int(number) < old[kind]:
            problems.append(
                f"{option}: {kind} is {int(number)}, the checkpoint has {old[kind]}. Choose 1 to {old[kind] - 1}, or "
                f"leave {kind} out to keep all."
            )
        else:
            counts[kind] = int(number)
        given.add(kind)
    if problems:
        raise UserError("\n".join(problems))
    return counts


def check_run_tokenizer(checkpoint: Path, prefix: str) -> bool:
    """DataError when the data `prefix` were prepared with another tokenizer than the training data of the checkpoint.

    Returns False when that cannot be checked, because the run's config.yml, which names them, is missing.
    """
    config = run_config(checkpoint)
    if config is None:
        return False
    data = config.data
    tokenizer = data.tokenizer if data.tokenizer is not None and Path(data.tokenizer).is_file() else None
    check_tokenizer([*data.train, DataSource(path=literal(prefix))], tokenizer)
    return True


def boundaries_of_run(checkpoint: Path, prefix: str) -> Boundaries:
    """The boundaries of documents that the run of the checkpoint has been trained with, in the data `prefix`; none
    without the run's config.yml.

    The token that ends a document is data.eod_id there, or what the summary of `prefix` says, or else that of the run's
    training data. DataError when it is not known, or the data are missing.
    """
    IndexedDataset(prefix)
    config = run_config(checkpoint)
    if config is None:
        return NO_BOUNDARIES
    data = config.data
    if data.eod_id is None and read_summary(prefix) is None:
        summaries = (read_summary(source.path) for source in data.train)
        known = next((summary.eod_id for summary in summaries if summary is not None), None)
        if known is None and (data.reset_at_eod or data.mask_eod_loss):
            raise DataError(
                f"{prefix}: the run of {checkpoint} has learnt documents apart, and which token ends them is not "
                f"known: there is no {summary_file(prefix)}, and none with the run's training data. Set data.eod_id in "
                f"{file_of_run(checkpoint, 'config.yml')}."
            )
        data = data.model_copy(update={"eod_id": known})
    own = {"train": (DataSource(path=literal(prefix)),), "validation": ()}
    return find_boundaries(data.model_copy(update=own))


class DataSample:
    """Two disjoint parts of prepared data: `measured` for contributions and τ, `held` for the loss.

    `prefix`: of the .bin/.idx pair.  `boundaries`: of documents, for attention and the loss.  `samples`: the number in
    each part, of `model.seq_length` tokens each; None: DEFAULT_SAMPLES, or half of the data if there are fewer than
    twice as many. DataError when the data are missing, have another vocabulary, or are too few.
    """

    def __init__(self, prefix: str, model: Model, samples: int | None, boundaries: Boundaries = NO_BOUNDARIES):
        dataset = build_dataset([DataSource(path=literal(prefix))], model.seq_length, _SEED, vocab_size_of(model))
        available = dataset.sources[0].samples_per_epoch
        if available < 2:
            raise DataError(
                f"{prefix}: has {count_of(available, 'sample')} of {model.seq_length} tokens, and one is needed to "
                "measure and another one for the loss. Prepare more text."
            )
        self.samples = min(DEFAULT_SAMPLES, available // 2) if samples is None else samples
        if not 1 <= self.samples <= available // 2:
            raise DataError(
                f"--samples: {self.samples} to measure and as many others for the loss are asked of {prefix}, which "
                f"has {available} of {model.seq_length} tokens. Choose 1 to {available // 2}."
            )
        self.prefix, self.ends = prefix, boundaries.ends
        self._loader = BatchLoader(
            dataset,
            micro_batch_size=1,
            num_micro_batches=self.samples,
            data_rank=0,
            data_size=1,
            vocab_size=vocab_size_of(model),
            loss_mask=boundaries.loss_mask,
        )
        self._together = max(1, _BATCH_TOKENS // model.seq_length)

    @property
    def measured(self) -> Iterable[Batch]:
        return self._batches(0)

    @property
    def held(self) -> Iterable[Batch]:
        return self._batches(self.samples)

    @property
    def num_batches(self) -> int:
        """The number of batches in each part."""
        return -(-self.samples // self._together)

    def _batches(self, first: int) -> Iterator[Batch]:
        waiting: list[Batch] = []
        for number, sample in enumerate(self._loader.step_batches(first), 1):
            waiting.append(sample)
            if len(waiting) == self._together or number == self.samples:
                yield torch.cat([ids for ids, _ in waiting]), torch.cat([labels for _, labels in waiting])
                waiting = []


@dataclass(frozen=True)
class Selection:
    """The tokens that stay in each projection that loses some, by its name.

    `kept`: their rows, ascending.  `dropped_share`: the share of the dropped tokens in all contributions, 0 to 1.
    """

    kept: dict[str, Tensor]
    dropped_share: dict[str, float]


@torch.no_grad()
def select_tokens(
    model: TokenFormer, batches: Iterable[Batch], counts: Mapping[str, int], ends: Sequence[int] = ()
) -> Selection:
    """For each projection, the tokens that contribute most over `batches`, as many as `counts` has for its kind.

    `ends`: the tokens after which attention begins anew.
    CheckpointError when contributions are not finite. ArgumentError when a projection has fewer tokens than that.
    """
    specs = projections(model.config)
    for kind, tokens in {spec.kind: spec.tokens for spec in specs.values()}.items():
        check_whole_number(f"counts.{kind}", counts[kind], 1, tokens)
    shrinking = [name for name, spec in specs.items() if counts[spec.kind] < spec.tokens]
    totals: dict[str, Tensor] = {}

    def add(name: str, projection: Pattention, x: Tensor) -> None:
        summed = summed_contributions(
            x, projection.key_tokens, projection.value_tokens, projection.scale, projection.activation
        )
        totals[name] = totals[name] + summed if name in totals else summed

    for ids, _ in batches:
        visit_projections(model, ids, shrinking, add, ends)
    kept, dropped = {}, {}
    for name, total in totals.items():
        if not total.isfinite().all():
            raise CheckpointError(
                f"{name}: what its tokens contribute is not finite: the training diverged. Use an earlier checkpoint."
            )
        kept[name] = largest(total, counts[specs[name].kind])
        whole = float(total.sum())
        dropped[name] = 1 - float(total[kept[name]].sum()) / whole if whole else 0.0
    return Selection(kept, dropped)


@torch.no_grad()
def fit_scales(
    model: TokenFormer, batches: Iterable[Batch], kept: Mapping[str, Tensor], ends: Sequence[int] = ()
) -> dict[str, float]:
    """τ' of each projection in `kept`, which changes its outputs least, see `pruning.criterion`. `ends`: see
    `select_tokens`."""
    sums = {name: [0.0, 0.0] for name in kept}

    def add(name: str, projection: Pattention, x: Tensor) -> None:
        above, below = summed_scale_terms(
            x, projection.key_tokens, projection.value_tokens, kept[name], projection.scale, projection.activation
        )
        sums[name][0] += above
        sums[name][1] += below

    for ids, _ in batches:
        visit_projections(model, ids, kept, add, ends)
    # Where the output is 0, every τ is as good, and where the best one is not positive, it cannot be used: τ stays.
    return {
        name: model.scales[name] * (above / below if above > 0 and below > 0 else 1.0)
        for name, (above, below) in sums.items()
    }


@torch.no_grad()
def drop_tokens(model: TokenFormer, kept: Mapping[str, Tensor], scales: Mapping[str, float]) -> None:
    """Reduces each projection in `kept` to these rows and sets its τ from `scales`, in place."""
    for name, rows in kept.items():
        projection = model.get_submodule(name)
        assert isinstance(projection, Pattention)
        projection.key_tokens = nn.Parameter(projection.key_tokens[rows])
        projection.value_tokens = nn.Parameter(projection.value_tokens[rows])
        projection.scale = model.scales[name] = scales[name]


@torch.no_grad()
def mean_loss(model: TokenFormer, batches: Iterable[Batch], ends: Sequence[int] = ()) -> float:
    """Mean cross-entropy per token, in nats, of labels that are not IGNORED. `ends`: see `select_tokens`.
    CheckpointError when it is not finite, DataError when no label counts."""
    total, tokens = 0.0, 0
    for ids, labels in batches:
        for row, targets in zip(ids.split(1), labels.split(1)):  # by sample, because logits are large
            logits = model(row, document_starts(row, ends))[0].float()
            total += float(F.cross_entropy(logits, targets[0], ignore_index=IGNORED, reduction="sum"))
        tokens += int((labels != IGNORED).sum())
    if not math.isfinite(total):
        raise CheckpointError("the model's loss is not finite: its training diverged. Use an earlier checkpoint.")
    if not tokens:
        raise DataError("no label of the held-out samples counts: all are padding. Give more --samples, or other data.")
    return total / tokens


def pruned_start(
    reader: CheckpointReader,
    model: Model,
    kept: Mapping[str, Tensor],
    scales: Mapping[str, float],
    measured: Mapping[str, Any],
) -> StepZero:
    """Step 0 of the smaller `model`, with the tokens that stay.

    `kept`, `scales`: see `Selection` and `fit_scales`.  `measured`: see `smaller_start`.
    """
    source = PrunedSource(CheckpointSource(reader), parameter_table(model), kept, scales)
    return smaller_start(reader, model, source, measured)


def smaller_start(reader: CheckpointReader, model: Model, source: StateSource, measured: Mapping[str, Any]) -> StepZero:
    """Step 0 of the smaller `model`, at the position in the data where the checkpoint stands, ready to be written.

    `source`: its state.  `measured`: further fields of the history entry, such as both losses.
    """
    index = reader.index
    entry = growth_entry(
        method=PRUNED,
        moments="keep",
        source=str(reader.path),
        step=index.step,
        samples=index.samples,
        tokens=index.tokens,
        old_model=stored_model(index),
        new_model=model,
    )
    history = (*index.growth_history, {**entry, "preserves": False, **measured})
    # A checkpoint that has weights only becomes a start with the default optimizer's states.
    states = STATES if index.states == (WEIGHT,) else index.states
    return StepZero(source, index.samples, index.tokens, history, states)


def visit_projections(
    model: TokenFormer,
    ids: Tensor,
    names: Iterable[str],
    visit: Callable[[str, Pattention, Tensor], None],
    ends: Sequence[int] = (),
) -> None:
    """Runs the model on ids [b, s], and calls visit(name, projection, x [s·b, d]) with the input x of each projection
    in `names`, in model order. `ends`: see `select_tokens`.
    """
    observers = []
    for name in names:
        projection = model.get_submodule(name)
        assert isinstance(projection, Pattention)
        observers.append((projection, partial(_visit, visit, name, projection)))
    with observed(observers):
        model.hidden_states(ids, document_starts(ids, ends))


def _visit(visit: Callable[[str, Pattention, Tensor], None], name: str, projection: Pattention, x: Tensor) -> None:
    visit(name, projection, x.flatten(0, -2))
