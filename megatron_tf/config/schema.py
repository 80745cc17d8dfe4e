"""The configuration of a run: frozen, typed, strict. One class a section, one comment a field.

Only facts that the user chooses stand here. What follows from them (batch arithmetic, layouts, sizes)
is computed by functions and never written back. Cross-field rules are in `validate.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    SerializeAsAny,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.paths import expand, literal

# Upper bounds are far beyond every real run; they keep the arithmetic that follows within 64 bits and within fp32.
Count = Annotated[int, Field(ge=1, lt=2**31)]
TotalCount = Annotated[int, Field(ge=1, lt=2**60)]  # of a whole run
EvenCount = Annotated[TotalCount, Field(multiple_of=2)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=1, le=1e7)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("must be a path: not empty, without NUL characters")
    return text


def _registered_architecture(name: str) -> str:
    if name not in ARCHITECTURES:
        raise PydanticCustomError(NOT_REGISTERED, "not registered", {"choices": ARCHITECTURES.names()})
    return name


# `~` and environment variables are replaced when a value is read. What is written, such as a run's config.yml, therefore
# names the very files that the run used, whatever the variables are when it is read again.
Path = Annotated[str, AfterValidator(_path), AfterValidator(expand), PlainSerializer(literal)]
ExpandedPath = Annotated[str, AfterValidator(_path)]  # what a path was, in a record of the past

Activation = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
Precision = Literal["bf16", "fp16", "fp32"]
GrowthMethod = Literal["zero_key", "gram", "random"]
NOT_REGISTERED = "not_registered"  # kind of a validation error: a name that no registered object has


class Section(BaseModel):
    """Frozen; an unknown key is an error; no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        """The classes that a section of this type may be of."""
        return (cls,)


class Run(Section):
    name: str = "tokenformer"  # shown in logs and trackers
    dir: Path  # folder of everything the run writes: config.yml, metrics.jsonl, train.log, checkpoints/
    seed: int = Field(1234, ge=0, lt=2**63)  # initial weights and data order are functions of it
    max_hours: Positive | None = None  # the run saves and stops when it has taken this long since it was started
    hang_seconds: Annotated[float, Field(ge=1, le=1e7)] = 900.0  # a longer step or silence of a rank ends the run


class ParameterTokens(Section):
    qkv: Count  # tokens of each of the query, key and value projections
    proj: Count  # tokens of the attention output projection
    ffn: Count  # tokens of the feed-forward Pattention


class Model(Section):
    """What every model has. An architecture adds its own keys; `Model(...)` makes the section of `architecture`."""

    architecture: Annotated[str, AfterValidator(_registered_architecture)] = "tokenformer"
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Count
    num_attention_heads: Count
    seq_length: Count  # tokens a sample is trained on
    vocab_size: Count  # rows of the embedding, which is also the output head
    rotary_fraction: Fraction = 0.25  # share of each head's channels that is rotated
    rotary_base: Annotated[float, Field(gt=1, le=1e30)] = 10000.0  # wavelengths are 2π to 2π times this
    norm_eps: Positive = 1e-5  # of the weightless block norms and the final norm

    def __new__(cls, /, **fields: Any) -> Self:
        name = fields.get("architecture", cls.model_fields["architecture"].get_default())
        is_open = cls is Model and isinstance(name, str) and name in ARCHITECTURES
        return super().__new__(ARCHITECTURES[name].section if is_open else cls)  # type: ignore[return-value]

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_architecture(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validates a mapping as the section of the architecture that it names.

        A key of an architecture may be null, which is the same as leaving it out. A key of another one may also stand
        there with its default.
        """
        if not isinstance(values, Mapping):
            return handler(values)
        name = values.get("architecture", cls.model_fields["architecture"].get_default())
        if not isinstance(name, str) or name not in ARCHITECTURES:
            return handler({key: value for key, value in values.items() if key in Model.model_fields})
        section = ARCHITECTURES[name].section
        said = {key: value for key, value in values.items() if not _says_nothing(section, key, value)}
        return handler(said) if issubclass(cls, section) else section.model_validate(said)  # type: ignore[return-value]

    @classmethod
    def variants(cls) -> tuple[type[Section], ...]:
        return tuple(ARCHITECTURES[name].section for name in ARCHITECTURES.names())


def _says_nothing(section: type[Model], key: str, value: Any) -> bool:
    """Whether a key that not every model has is null, or of another architecture than `section`'s and its default."""
    fields = [variant.model_fields[key] for variant in Model.variants() if key in variant.model_fields]
    if key in Model.model_fields or not fields:
        return False
    return value is None or (key not in section.model_fields and all(value == field.get_default() for field in fields))


class Parallel(Section):
    tensor: Count = 1  # ranks that share each layer's parameter tokens, heads and vocabulary
    pipeline: Count = 1  # stages that share the depth
    sequence: bool = False  # also split hidden states over the tensor ranks between the projections
    timeout_seconds: Seconds = 1800.0  # a collective that waits longer than this ends the run


class Profile(Section):
    """A trace of some steps by torch's profiler, in run.dir/profile."""

    first_step: Count  # as the log counts; choose one after the first steps, which are slower
    num_steps: Annotated[int, Field(ge=1, le=100)] = 2  # a trace of more is too large to look at
    all_ranks: bool = False  # instead of rank 0 alone


class Training(Section):
    train_steps: Count | None = None  # optimizer steps; give this or train_tokens
    train_tokens: TotalCount | None = None  # rounded up to whole steps
    global_batch_size: Count  # samples a step, over all ranks
    micro_batch_size: Count  # samples a rank computes at once
    precision: Precision = "bf16"  # fp32 master weights and gradient accumulation always
    gradient_clipping: NonNegative = 1.0  # largest global L2 norm; 0 is off
    activation_checkpointing: bool = False  # recompute each block in the backward pass
    compile: bool = False  # torch.compile of each block
    profile: Profile | None = None  # steps to look into
    # run folder, checkpoint or export whose weights a new run begins with, instead of random ones; all else is fresh
    init_from: Path | None = None


class Schedule(Section):
    type: Literal["cosine", "constant", "wsd"] = "cosine"  # wsd: warm-up, stable, decay
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # linear from 0; the first update then has lr 0
    decay_steps: Count | None = None  # wsd: the last steps, in which the rate falls on a straight line
    min_lr: NonNegative = 0.0  # where cosine and wsd end, at the last step


class Optimizer(Section):
    type: Literal["adamw"] = "adamw"
    lr: Positive
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1  # on tokens and embedding, never on the final norm
    schedule: Schedule = Schedule()


class DataSource(Section):
    path: Path  # prefix of a .bin/.idx pair
    weight: Positive = 1.0  # share of the samples, relative to the other sources


def _with_paths(value: Any) -> Any:
    """The prefix of a source, alone or in a list, stands for a source without other fields."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


# Also written as the prefix of one source, or as a list with prefixes in it.
Sources = Annotated[tuple[DataSource, ...], BeforeValidator(_with_paths)]


class Data(Section):
    tokenizer: Path | None = None  # a .json, .model or .tiktoken file, tiktoken:NAME, or bytes; compared with the data
    train: Sources = Field(min_length=1)
    validation: Sources = ()
    eod_id: TokenId | None = None  # token that ends a document; None: what the summary beside the data says
    pad_id: TokenId | None = None  # token that fills up data of other programs: never predicted, never attended to
    reset_at_eod: bool = False  # attention and rotary positions begin anew with each document
    mask_eod_loss: bool = False  # no loss for the token after an end of document, the first of an unrelated one

    @property
    def masks_loss(self) -> bool:
        """Whether some labels have no loss."""
        return self.mask_eod_loss or self.pad_id is not None


class Checkpoint(Section):
    interval_steps: Count | None = None  # the last step is always saved
    keep_last: Count | None = None  # older complete checkpoints are deleted; None keeps all
    asynchronous: bool = True  # write in the background from a copy of the state in CPU memory
    on_failure: Literal["warn", "stop"] = "warn"  # what a save that fails does to the run
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest complete checkpoint of run.dir
    allow_data_change: bool = False  # resume although the data is not what the checkpoint was trained on


class LearningRates(Section):
    old_tokens: NonNegative = 1.0  # 0 freezes the tokens of the smaller model, to the last bit
    new_tokens: NonNegative = 1.0
    other: NonNegative = 1.0  # embedding and final norm


class GrowthMethods(Section):
    qkv: GrowthMethod | None = None  # None: growth.method
    proj: GrowthMethod | None = None
    ffn: GrowthMethod | None = None


class Growth(Section):
    source: Path = Field(alias="from")  # run folder, checkpoints folder or checkpoint to grow from
    method: GrowthMethod = "zero_key"  # what new tokens begin as; random alone changes the function
    methods: GrowthMethods = GrowthMethods()  # for single projections instead of `method`
    noise: Fraction = 0.0  # relative standard deviation of a change to each old token weight; 0 keeps the function
    moments: Literal["keep", "reset"] = "keep"  # Adam moments of the old tokens; new ones start at 0
    lr_multipliers: LearningRates = LearningRates()  # times the schedule's rate

    def method_of(self, projection: str) -> GrowthMethod:
        """The method of `projection`, a field of model.parameter_tokens."""
        return getattr(self.methods, projection, None) or self.method


class Guard(Section):
    nonfinite: Literal["skip", "stop"] = "skip"  # a step whose gradient is inf or nan; it never changes the weights
    nonfinite_patience: Count = 20  # skipped steps in a row that stop the run; in fp16 at the least loss scale
    # a loss more than this many times its running mean is a spike; None: do not watch
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    spike_patience: Count = 5  # steps in a row before something is done
    spike_action: Literal["stop", "lower_lr"] = "stop"
    spike_lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5  # lower_lr: multiplies the rate from then on


class Evaluation(Section):
    interval_steps: Count | None = None  # the last step is always evaluated when there is validation data
    samples: Count = 64  # validation samples, the same ones each time; rounded up to whole batches


class Logging(Section):
    interval_steps: Count = 10
    health_interval_steps: Count | None = None  # measure Pattention's parameter tokens; one more forward pass each time
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()  # beside metrics.jsonl, which is always written
    project: str = "megatron_tf"  # project name at the tracker


class Zero(Section):
    stage: Literal[0, 1] = 1  # 1 shards master weights and optimizer state over the data-parallel ranks


class DeepSpeedFp16(Section):
    """Dynamic loss scaling, with training.precision fp16."""

    initial_scale_power: Annotated[int, Field(ge=0, le=40)] = 16  # the first scale is 2 to this
    loss_scale_window: Count = 1000  # steps without an overflow until the scale doubles
    hysteresis: Count = 2  # overflows until the scale halves
    consecutive_hysteresis: bool = False  # count only overflows one after another
    min_loss_scale: Count = 1


class DeepSpeedZero(Section):
    """How ZeRO communicates."""

    reduce_bucket_size: TotalCount = 500_000_000  # elements of a gradient reduction
    allgather_bucket_size: EvenCount = 500_000_000  # of a gathering of updated weights
    overlap_comm: bool = False  # reduce gradients while the backward pass goes on
    contiguous_gradients: bool = True  # copy gradients into one buffer as they are made
    reduce_scatter: bool = True  # instead of all-reducing
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True  # instead of broadcasts


class DeepSpeed(Section):
    """Settings under DeepSpeed's own names, of those that change speed or memory but never what is computed."""

    fp16: DeepSpeedFp16 = DeepSpeedFp16()
    zero_optimization: DeepSpeedZero = DeepSpeedZero()


class RunConfig(Section):
    """One file is one runnable run."""

    run: Run
    model: SerializeAsAny[Model]
    parallel: Parallel = Parallel()
    training: Training
    optimizer: Optimizer
    data: Data
    checkpoint: Checkpoint = Checkpoint()
    growth: Growth | None = None
    guard: Guard = Guard()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    zero: Zero = Zero()
    deepspeed: DeepSpeed = DeepSpeed()
