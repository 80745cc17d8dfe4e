"""The configuration of a run: frozen, typed, strict. One class a section, one docstring a field.

Only facts that the user chooses stand here. What follows from them (batch arithmetic, layouts, sizes)
is computed by functions and never written back. Cross-field rules are in `validate.py`.

The docstring of a field becomes its line in the configuration reference (`reference.py`): "[unit] Meaning.", and
"Since X.Y." at its end for a field that came after 0.1.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
)

from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.deepspeed_section import DeepSpeed
from megatron_tf.config.fields import (
    Beta,
    Count,
    Fraction,
    NonNegative,
    OpenSection,
    Path,
    Positive,
    Seconds,
    Section,
    TokenId,
    TotalCount,
    name_in,
)
from megatron_tf.config.optimizers import DEFAULT as DEFAULT_OPTIMIZER
from megatron_tf.config.optimizers import OPTIMIZERS
from megatron_tf.config.tasks import TASKS


def _list_activations(node: dict[str, Any]) -> None:
    """Adds the choices to the JSON schema of a key."""
    node["enum"] = list(ACTIVATIONS.names())


ActivationName = Annotated[str, name_in(ACTIVATIONS), Field(json_schema_extra=_list_activations)]
Precision = Literal["bf16", "fp16", "fp32"]
TokenMethod = Literal["zero_key", "gram", "random"]
GrowthMethod = Literal["zero_key", "gram", "random", "split", "bank"]
DepthMethod = Literal["identity", "stack", "interleave"]
Moment = Literal["end", "before_decay"]


class Run(Section):
    name: str = "tokenformer"
    """Shown in logs and at trackers."""
    dir: Path
    """Folder of everything that the run writes: config.yml, metrics.jsonl, train.log, checkpoints/."""
    tags: tuple[str, ...] = ()
    """Words to find the run by at trackers."""
    notes: str = ""
    """A text on the run, shown at trackers."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Initial weights and data order are functions of it."""
    max_hours: Positive | None = None
    """[hours] The run saves and stops when this time has passed since its start."""
    hang_seconds: Annotated[float, Field(ge=1, le=1e7)] = 900.0
    """[seconds] A longer step, or a longer silence of a rank, ends the run."""


class ParameterTokens(Section):
    qkv: Count
    """[tokens] Of each of the query, key and value projections."""
    proj: Count
    """[tokens] Of the attention output projection."""
    ffn: Count
    """[tokens] Of the feed-forward Pattention."""


class Model(OpenSection):
    """What every model has. Its architecture and its task add keys; `Model(...)` makes the section of both."""

    registered = {"architecture": ARCHITECTURES, "task": TASKS}

    architecture: Annotated[str, name_in(ARCHITECTURES)] = "tokenformer"
    """What fills the blocks: a registered architecture."""
    task: Annotated[str, name_in(TASKS)] = "language_model"
    """What the model is trained for: a registered task. Since 0.2."""
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    """Number of blocks."""
    hidden_size: Count
    """[channels] Width of the hidden states."""
    num_attention_heads: Count
    """Heads of the attention. They must divide hidden_size."""
    seq_length: Count
    """[tokens] Length of a training sample. Of images it follows from model.image."""
    rotary_fraction: Fraction = 0.25
    """Share of each head's channels that is rotated."""
    rotary_base: Annotated[float, Field(gt=1, le=1e30)] = 10000.0
    """Wavelengths of the rotation run from 2π to 2π times this."""
    norm_eps: Positive = 1e-5
    """Of the weightless block norms and of the final norm."""

    @classmethod
    def usual(cls) -> type[Section]:
        return TASKS[cls.model_fields["task"].get_default()].section


class Parallel(Section):
    tensor: Count = 1
    """[ranks] They share each layer's parameter tokens, its heads and the vocabulary."""
    pipeline: Count = 1
    """[stages] They share the depth."""
    sequence: bool = False
    """Also split hidden states over the tensor ranks between the projections."""
    context: Count = 1
    """[ranks] They share the positions of each sample. Needs engine torch. Since 0.2."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """What trains: DeepSpeed, or torch alone. Checkpoints of one resume in the other."""
    shard: Literal["optimizer", "gradients", "parameters"] = "optimizer"
    """What each data-parallel rank keeps a part of, and with it all that stands before: needs engine torch."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of the micro batches in a pipeline. gpipe needs engine torch."""
    virtual_stages: Count = 1
    """Parts of the depth that a pipeline rank holds, dealt out in turn: interleaved 1F1B. Needs engine torch. Since 0.2."""
    timeout_seconds: Seconds = 1800.0
    """[seconds] A collective that waits longer ends the run."""

    @property
    def ranks_per_sample(self) -> int:
        """Ranks that work on one sample together: all, but for data parallelism."""
        return self.tensor * self.pipeline * self.context


class Profile(Section):
    """A trace of some steps by torch's profiler, in run.dir/profile."""

    first_step: Count
    """[steps] As the log counts. Choose one after the first steps, which are slower."""
    num_steps: Annotated[int, Field(ge=1, le=100)] = 2
    """[steps] A trace of more is too large to look at."""
    all_ranks: bool = False
    """Trace every rank instead of rank 0 alone."""


class StopWhen(Section):
    """Ends the run before its last step, by the validation loss. The run is then complete, and a chain goes on."""

    loss_below: Positive | None = None
    """Validation loss that is low enough."""
    patience: Count | None = None
    """[evaluations] In a row without an improvement of the best validation loss."""
    min_improvement: NonNegative = 0.0
    """Difference of the validation loss that counts as an improvement."""


class Training(Section):
    train_steps: Count | None = None
    """[steps] Optimizer steps. Give this, train_tokens or train_samples."""
    train_tokens: TotalCount | None = None
    """[tokens] Rounded up to whole steps."""
    train_samples: TotalCount | None = None
    """[samples] Such as images times epochs. Rounded up to whole steps. Since 0.2."""
    global_batch_size: Count
    """[samples] Of a step, over all ranks."""
    micro_batch_size: Count
    """[samples] Computed by a rank at once."""
    precision: Precision = "bf16"
    """Of forward and backward pass. Master weights and gradient accumulation are always fp32."""
    gradient_clipping: NonNegative = 1.0
    """Largest global L2 norm of the gradient. 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass."""
    compile: bool = False
    """Run torch.compile on each block."""
    norm: Literal["auto", "direct", "gram"] = "auto"
    """Where the norm of Pattention's scores comes from: from them, or from KᵀK. auto: by size and device. Since 0.2."""
    scores: Literal["keep", "recompute"] = "keep"
    """Pattention's scores, for the backward pass. recompute: one more product, and no memory for them. Since 0.2."""
    stop_when: StopWhen | None = None
    """When to end before the last step. null: never."""
    profile: Profile | None = None
    """Steps to record with torch's profiler."""
    drop_path: Beta = 0.0
    """[share] Of the samples that skip a residual branch of the last block; towards the first one it falls to 0. Since 0.2."""
    label_smoothing: Fraction = 0.0
    """[share] Of a target that all classes share alike. Since 0.2."""
    init_from: Path | None = None
    """Run folder, checkpoint or export. A new run begins with its weights instead of random ones; all else is fresh."""


class Schedule(Section):
    type: Literal["cosine", "constant", "wsd"] = "cosine"
    """Of the learning rate. wsd: warm-up, stable, decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """[steps] The rate rises linearly from 0; the first update has rate 0."""
    decay_steps: Count | None = None
    """[steps] Of wsd: the last steps, in which the rate falls."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """Of wsd: how it falls. linear: on a straight line; sqrt: by 1 - √(share of the decay), faster at first. Since 0.2."""
    min_lr: NonNegative = 0.0
    """Where cosine and wsd end, at the last step."""


LrPower = Annotated[float, Field(ge=0, le=2)]


class LrRule(Section):
    """Learning rates of parameter tokens by their number, so that a rate that was tuned at one number serves at others.

    Each factor is a power of base / number, by kind of projection, where number is model.parameter_tokens: those that a
    position uses.
    """

    base_tokens: ParameterTokens
    """[tokens] At which optimizer.lr was tuned, by kind of projection. Since 0.2."""
    key_power: LrPower = 0.5
    """Of the factor of key tokens' rate. Since 0.2."""
    value_power: LrPower = 1.0
    """Of the factor of value tokens' rate. Their weight decay is divided by it, so that rate times decay stays. Since 0.2."""
    scale_initial_values: bool = False
    """Multiply initial value tokens of a new model by √(base / number), so that outputs begin equally large. Since 0.2."""


class Optimizer(OpenSection):
    """What every optimizer has. `type` adds its own keys; `Optimizer(...)` makes the section of that type."""

    registered = {"type": OPTIMIZERS}

    type: Annotated[str, name_in(OPTIMIZERS)] = DEFAULT_OPTIMIZER
    """How parameters are updated: a registered optimizer."""
    lr: Positive
    """Largest learning rate of the schedule."""
    weight_decay: NonNegative = 0.1
    """Of parameter tokens and embedding, never of the final norm."""
    lr_rule: LrRule | None = None
    """Learning rates by the number of tokens. null: all of a group learn at one rate. Since 0.2."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a block over that of the next one, of the head over that of the last block. Since 0.2."""
    schedule: Schedule = Schedule()
    """Learning rate over the steps."""


Span = tuple[Fraction, Fraction]


class DataSource(Section):
    path: Path
    """Prefix of a .bin/.idx pair."""
    weight: Positive = 1.0
    """Share of the samples, relative to the other sources."""


def _with_paths(value: Any) -> Any:
    """The prefix of a source, alone or in a list, stands for a source without other fields."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


# Also written as the prefix of one source, or as a list with prefixes in it.
Sources = Annotated[
    tuple[DataSource, ...],
    BeforeValidator(_with_paths, json_schema_input_type=str | tuple[str | DataSource, ...]),
]


class RandAugment(Section):
    """timm's rand-m9-mstd0.5-inc1: each operation is one of fifteen and is done half of the time."""

    operations: Annotated[int, Field(ge=1, le=15)] = 2
    """That are drawn for an image."""
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """How strong they are, 10 being the strongest."""
    deviation: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Standard deviation of the magnitude."""


class Augmentation(Section):
    """What is done to training images. All of it is a function of the seed and the sample."""

    crop_scale: Span | None = None
    """[share] Least and largest area of a random crop, which becomes the image. null: the square in the middle."""
    crop_ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    """Least and largest width of such a crop over its height."""
    shift: Annotated[int, Field(ge=0, le=10_000)] = 0
    """[pixels] Largest move to each side; black comes in."""
    flip: Fraction = 0.0
    """[share] Of the images that are mirrored."""
    rand_augment: RandAugment | None = None
    """Random operations on colours and geometry. null: none."""
    erasing: Fraction = 0.0
    """[share] Of the images in which a rectangle becomes noise."""
    mixup: NonNegative = 0.0
    """Two neighbours become mixtures by a share from Beta(mixup, mixup). 0: never."""
    cutmix: NonNegative = 0.0
    """Two neighbours exchange a rectangle, by a share from Beta(cutmix, cutmix). With mixup, one of both. 0: never."""


class Data(Section):
    tokenizer: Path | None = None
    """A .json, .model or .tiktoken file, tiktoken:NAME, or bytes. It is compared with that of the data."""
    train: Sources = Field(min_length=1)
    """Sources of training samples. A prefix may stand for a source, and one source for a list of them."""
    validation: Sources = ()
    """Sources of validation samples, written as data.train."""
    eod_id: TokenId | None = None
    """Id of the token that ends a document. null: read from the summary next to the data."""
    pad_id: TokenId | None = None
    """Id of the token that fills up data of other programs. It is never predicted and never attended to."""
    reset_at_eod: bool = False
    """Begin attention and rotary positions anew with each document."""
    mask_eod_loss: bool = False
    """No loss for the token after an end of document, the first of an unrelated one."""
    augmentation: Augmentation = Augmentation()
    """Changes to training images. Since 0.2."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """[threads] That read and change images, on each rank. Since 0.2."""

    @property
    def masks_loss(self) -> bool:
        """Whether some labels have no loss."""
        return self.mask_eod_loss or self.pad_id is not None


class Checkpoint(Section):
    interval_steps: Count | None = None
    """[steps] Between checkpoints. The last step is always saved."""
    keep_last: Count | None = None
    """[checkpoints] Older complete ones are deleted. null keeps all."""
    keep_before_decay: bool = False
    """Save what the decay of a wsd schedule begins with, and never delete it: growths and branches start there. Since 0.2."""
    asynchronous: bool = True
    """Write in the background, from a copy of the state in CPU memory."""
    on_failure: Literal["warn", "stop"] = "warn"
    """What a save that fails does to the run."""
    resume: Literal["auto", "never"] = "auto"
    """auto: from the newest complete checkpoint of run.dir."""
    allow_data_change: bool = False
    """Resume although the data is not what the checkpoint was trained on."""


class LearningRates(Section):
    old_tokens: NonNegative = 1.0
    """Tokens of the smaller model. 0 freezes them, to the last bit."""
    new_tokens: NonNegative = 1.0
    """Tokens that the growth added."""
    new_layers: NonNegative = 1.0
    """Everything in layers that the growth added."""
    other: NonNegative = 1.0
    """Embedding, final norm, and a transformer's matrices in layers that are not new."""


class GrowthMethods(Section):
    qkv: TokenMethod | None = None
    """null: the one of growth.method."""
    proj: TokenMethod | None = None
    """null: the one of growth.method."""
    ffn: TokenMethod | None = None
    """null: the one of growth.method."""


class Growth(Section):
    source: Path = Field(alias="from")
    """Run folder, checkpoints folder or checkpoint to grow from."""
    at: Moment = "end"
    """Which checkpoint of the folder: end is the newest; before_decay needs checkpoint.keep_before_decay. Since 0.2."""
    method: GrowthMethod = "zero_key"
    """What new tokens begin as; split and bank make candidates of model.sparse. Only random changes the function."""
    methods: GrowthMethods = GrowthMethods()
    """Methods of single projections, instead of growth.method."""
    depth_method: DepthMethod = "identity"
    """What new layers begin as, where model.num_layers rises. identity keeps the function, the others copy layers."""
    clone_noise: Fraction = 0.1
    """What sets clones apart where model.hidden_size rises, relative to each weight; it cancels in the function. Since 0.2."""
    noise: Fraction = 0.0
    """Standard deviation of a change to each old token weight, relative to it. 0 keeps the function."""
    moments: Literal["keep", "reset"] = "keep"
    """Optimizer states of what there was. New tokens and layers start afresh."""
    moments_factor: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Of moments that are kept, squares by its square. Below 1, gradients after the growth weigh more. Since 0.2."""
    lr_multipliers: LearningRates = LearningRates()
    """Factors of the schedule's learning rate."""

    def method_of(self, projection: str) -> GrowthMethod:
        """The method of `projection`, a field of model.parameter_tokens."""
        return getattr(self.methods, projection, None) or self.method


class Branch(Section):
    """A run that goes on from another one's checkpoint as from its own, and leaves that run as it is."""

    source: Path = Field(alias="from")
    """Run folder, checkpoints folder or checkpoint of the same model on the same data."""
    at: Moment = "end"
    """Which checkpoint of the folder: end is the newest; before_decay needs checkpoint.keep_before_decay."""


class Guard(Section):
    nonfinite: Literal["skip", "stop"] = "skip"
    """What a step with an infinite or NaN gradient does. It never changes the weights."""
    nonfinite_patience: Count = 20
    """[steps] Skipped steps in a row that stop the run; in fp16 at the least loss scale."""
    spike_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """A loss more than this many times its running mean is a spike. null: do not watch."""
    spike_patience: Count = 5
    """[steps] Spikes in a row before something is done."""
    spike_action: Literal["stop", "lower_lr"] = "stop"
    """What is done about them."""
    spike_lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of lower_lr: multiplies the learning rate from then on."""


class Evaluation(Section):
    interval_steps: Count | None = None
    """[steps] Between evaluations. The last step is always evaluated when there is validation data."""
    samples: Count = 64
    """[samples] Validation samples, the same ones each time; rounded up to whole batches."""
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model writes on after each evaluation, by the likeliest tokens; shown in the log and at trackers."""
    sample_tokens: Annotated[int, Field(ge=1, le=1000)] = 40
    """[tokens] Most that are added to a prompt."""


class Logging(Section):
    interval_steps: Count = 10
    """[steps] Between logged steps."""
    health_interval_steps: Count | None = None
    """[steps] Between measurements of Pattention's parameter tokens; each is one more forward pass."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """In addition to metrics.jsonl, which is always written."""
    project: str = "megatron_tf"
    """Name of the project at the tracker."""


class Zero(Section):
    stage: Literal[0, 1] = 1
    """1 shards master weights and optimizer state over the data-parallel ranks."""


class RunConfig(Section):
    """One file is one runnable run."""

    run: Run
    """Name, folder and limits."""
    model: SerializeAsAny[Model]
    """Sizes of the model."""
    parallel: Parallel = Parallel()
    """Layout over ranks. Data-parallel ranks are those that remain."""
    training: Training
    """Length, batch and precision."""
    optimizer: SerializeAsAny[Optimizer]
    """The optimizer and its learning rate."""
    data: Data
    """Tokenizer and sources."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save, and where to go on."""
    growth: Growth | None = None
    """Where the run grows from. null: it does not."""
    branch: Branch | None = None
    """The run that this one branches off. Its length counts from the other's first step. null: none. Since 0.2."""
    guard: Guard = Guard()
    """What to do about bad steps."""
    evaluation: Evaluation = Evaluation()
    """Validation while training."""
    logging: Logging = Logging()
    """Log and trackers."""
    zero: Zero = Zero()
    """Sharding of the optimizer."""
    deepspeed: DeepSpeed = DeepSpeed()
    """Settings under DeepSpeed's own names."""
