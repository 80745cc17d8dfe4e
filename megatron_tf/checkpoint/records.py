"""Types and ranges of the objects inside an index: the history of growths, the data, the state of the run.

Other packages write and read them. A checkpoint that was changed by hand can have right checksums, so everything is
checked here before it is used. Unknown fields are accepted, because a later version may add some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from megatron_tf.checkpoint.strict_json import LARGEST_NUMBER, MOST
from megatron_tf.config.fields import Count as TokenCount
from megatron_tf.config.fields import ExpandedPath, Fraction, Positive
from megatron_tf.config.mistakes import reason
from megatron_tf.config.sections.growth import DepthMethod, GrowthMethod
from megatron_tf.errors import shown

Count = Annotated[int, Field(ge=0, le=MOST)]
Number = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
Text = Annotated[str, Field(max_length=256)]
_Method = GrowthMethod | Literal["pruned"]
_Banks = dict[Text, dict[Text, Count]]
_LayerCount = Annotated[int, Field(ge=1, le=10_000)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class _LayerGrowth(_Record):
    """A growth in depth. `old_at`: where each layer of the smaller model stands in the bigger one."""

    method: DepthMethod
    before: _LayerCount = Field(alias="from")
    to: _LayerCount
    old_at: list[Count]

    @model_validator(mode="after")
    def _stands(self) -> Self:
        places = self.old_at
        if len(places) != self.before or places != sorted(set(places)) or places[-1] >= self.to:
            raise ValueError(f"old_at is not {self.before} ascending numbers below {self.to}")
        return self


class _CandidatesGrowth(_Record):
    """A growth, or pruning, of candidates: the section model.sparse before and after; None has none."""

    before: _Banks | None = Field(alias="from")
    to: _Banks | None


class _WidthGrowth(_Record):
    """See `growth.width`: keys of the model section, before and after."""

    before: dict[Text, Count] = Field(alias="from")
    to: dict[Text, Count]
    clone_noise: Fraction = 0.0


class GrowthEntry(_Record):
    """One growth, or pruning, see `growth.source.growth_entry`. Fields with a default are not in all of them."""

    method: _Method | dict[Text, _Method]
    moments: Literal["keep", "reset"]
    source: ExpandedPath
    step: Count
    samples: Count
    tokens: Count
    before: dict[Text, TokenCount] = Field(alias="from")
    to: dict[Text, TokenCount]
    loss_before: Number | None
    loss_after: Number | None
    noise: Fraction = 0.0
    preserves: bool = False
    data: str = ""
    data_samples: Count = 0
    layers: _LayerGrowth | None = None
    sparse: _CandidatesGrowth | None = None
    width: _WidthGrowth | None = None
    moments_factor: Positive = 1.0


class _Source(_Record):
    name: Text = ""
    weight: Positive = 1.0
    tokens: Count = 0
    bin_bytes: Count = 0
    idx_bytes: Count = 0
    ends_sha256: Text = ""
    samples_sha256: Text = ""


class _Fingerprint(_Record):
    """The training data, see `data.loader.fingerprint`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sources: list[_Source] = []


class _Guard(_Record):
    """State of `training.guard.LossGuard`."""

    lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    mean_loss: Number = 0.0
    lowest_mean_loss: Number = 0.0
    losses_seen: Count = 0
    spikes_in_a_row: Count = 0
    overflows_in_a_row: Count = 0


class _LossWindow(_Record):
    """State of `telemetry.meters.MeanMeter`: the steps since the last logged one."""

    total: Number = 0.0
    count: Count = 0


class _EarlyStop(_Record):
    """State of `training.early_stop.EarlyStop`: validation losses, and evaluations since the best one."""

    best: Number | None = None
    newest: Number | None = None
    waited: Count = 0


class _Folder(_Record):
    """See `training.run_folder`."""

    path: ExpandedPath
    device: Count
    inode: Count


class _Event(_Record):
    """An event of a run: it took its weights from `source`, or was resumed with `changes` of its configuration,
    [before, now] by key."""

    event: Text
    step: Count
    tokens: Count
    source: str = ""
    changes: dict[str, Annotated[list[str | None], Field(min_length=2, max_length=2)]] = {}


class _RunState(_Record):
    """The state that a run resumes from besides its tensors. The loss scaler's fields have DeepSpeed's names.

    `settings`: every key of the configuration with its value as text.  `history`: events, oldest first.
    """

    guard: _Guard = _Guard()
    loss_window: _LossWindow = _LossWindow()
    early_stop: _EarlyStop = _EarlyStop()
    folder: _Folder | None = None
    schedule_unit: Annotated[int, Field(ge=1, le=MOST)] = 1
    cur_scale: Positive = 1.0
    cur_iter: Count = 0
    last_overflow_iter: Annotated[int, Field(ge=-1, le=MOST)] = -1
    cur_hysteresis: Annotated[int, Field(le=MOST)] = 0
    settings: dict[str, str] = {}
    history: list[_Event] = []


def record_problems(
    history: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    run: Mapping[str, Any],
    tokens: int,
    *,
    complete: bool,
) -> list[str]:
    """Everything that is wrong with these parts of an index, each as "field is value: reason".

    `tokens`: of the index.  `complete`: a history also says all that resuming and growing need; without it, only what
    is there must be right, which is enough to look at it.
    """
    problems: list[str] = []
    for number, entry in enumerate(history):
        problems += _problems(GrowthEntry, entry, f"growth_history.{number}", complete)
    problems += _problems(_Fingerprint, data, "data", False) + _problems(_RunState, run, "run", complete)
    if complete and not problems:
        counts = [entry["tokens"] for entry in history] + [tokens]
        problems += [
            f"growth_history.{number}.tokens is {before}, and there were {after} after that"
            for number, (before, after) in enumerate(zip(counts, counts[1:]))
            if before > after
        ]
    return problems


def _problems(record: type[_Record], value: Mapping[str, Any], where: str, complete: bool) -> list[str]:
    try:
        record.model_validate(value)
    except ValidationError as error:
        return [
            f"{'.'.join([where, *map(str, found['loc'])])} "
            + (reason(found) if found["type"] == "missing" else f"is {shown(found['input'])}: {reason(found)}")
            for found in error.errors(include_url=False)
            if complete or found["type"] != "missing"
        ]
    return []
