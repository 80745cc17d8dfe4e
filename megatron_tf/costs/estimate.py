"""The costs of a model: parameters, floating-point operations, and memory of a rank. Pure arithmetic, no torch.

Symbols: s positions of a sample on a rank, b micro batch, d hidden size, n tokens of a projection, T tensor-parallel
ranks, c bytes of the compute type (2 for bf16 and fp16, 4 for fp32).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_tf.architectures.work import compute_bytes, positions_of
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.optimizers import DEFAULT as DEFAULT_OPTIMIZER
from megatron_tf.config.optimizers import OPTIMIZERS
from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.sections.training import ComputeType
from megatron_tf.config.tasks import task_of
from megatron_tf.config.topology import Topology
from megatron_tf.state.parameters import ParameterSpec, parameter_table, shard_range


def num_parameters(model: Model) -> int:
    """Parameters of the logical (unsharded) model. A head tied to the input layer counts once."""
    return sum(spec.numel for spec in parameter_table(model).values())


@lru_cache(maxsize=64)  # a comparison of layouts asks for the same model for each layout
def num_used_block_parameters(model: Model) -> int:
    """Parameters of all blocks that one position uses: of parameter tokens, or of a transformer's matrices."""
    return sum(spec.num_used for name, spec in parameter_table(model).items() if name.startswith("blocks."))


def num_used_parameters(model: Model) -> int:
    """`num_parameters` without the parameters of candidates that a position does not choose."""
    return sum(spec.num_used for spec in parameter_table(model).values())


def chooses(model: Model) -> bool:
    """Whether a position uses only a part of the parameters: those of the candidates that it chooses."""
    return any(spec.one_in > 1 for spec in parameter_table(model).values())


def stage_parameters(model: Model, topology: Topology, stage: int) -> int:
    """Parameters on the fullest tensor rank of the pipeline stage `stage`.

    The first stage holds the task's input layer. The last one holds the final norm and the task's head, which may be a
    second copy of the input layer.
    """
    return _stage_parameters(model, _without_replicas(topology), stage, of_candidates=False)


def stage_candidates(model: Model, topology: Topology, stage: int) -> int:
    """As `stage_parameters`, of parameters of candidates alone: those of which a position uses only a part."""
    return _stage_parameters(model, _without_replicas(topology), stage, of_candidates=True)


def _without_replicas(topology: Topology) -> Topology:
    return Topology(topology.tensor, topology.pipeline, 1, 1, topology.virtual_stages)


@lru_cache(maxsize=4096)
def _stage_parameters(model: Model, topology: Topology, stage: int, of_candidates: bool) -> int:
    tensor = topology.tensor
    blocks = tuple(f"blocks.{layer}." for part in topology.parts(model.num_layers, stage) for layer in part)
    ends = {"first"} if stage == 0 else set()
    if stage == topology.pipeline - 1:
        ends.add("last")
    held = [spec for name, spec in parameter_table(model).items() if ends & set(spec.ends) or name.startswith(blocks)]
    held = [spec for spec in held if spec.one_in > 1 or not of_candidates]
    return max(sum(_shard_numel(spec, tensor, rank) for spec in held) for rank in range(tensor))


def _shard_numel(spec: ParameterSpec, tensor: int, rank: int) -> int:
    if not spec.sharded:
        return spec.numel
    start, stop = shard_range(spec.shape[0], tensor, rank)
    return (stop - start) * spec.width


def largest_shard(spec: ParameterSpec, tensor: int) -> int:
    """Elements of a parameter on the fullest of `tensor` ranks."""
    return max(_shard_numel(spec, tensor, rank) for rank in range(tensor))


def parameters_per_rank(model: Model, topology: Topology) -> int:
    """Parameters on the fullest rank, over all stages and tensor ranks."""
    return max(stage_parameters(model, topology, stage) for stage in range(topology.pipeline))


def flops_per_token(model: Model) -> int:
    """Floating-point operations of forward and backward for one trained token.

    A multiply-add counts as two.  Forward: 2 for each element of every key and value token (or matrix) that a position
    uses, a token's share of the task's input layer and head, and 4·s·d in each layer for the two products of attention.
    These are counted at full length, as is usual for MFU, although a causal model skips half of them.  Backward is
    twice the forward.  Norms, activations and recomputation under activation checkpointing do not count.
    """
    ends = task_of(model).multiply_adds(model) // model.seq_length
    attention = 4 * model.seq_length * model.hidden_size * model.num_layers
    return 3 * (2 * (num_used_block_parameters(model) + ends) + attention)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, without the allocator's fragmentation, communication buffers and kernels' workspaces."""

    weights: int  # in the compute type
    gradients: int  # those of one backward pass, and the fp32 sums over micro batches
    optimizer: int  # fp32 master weights and the optimizer's states
    activations: int  # saved for the backward pass, and the temporary tensors of that pass, at the peak of a step

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_per_rank(config: RunConfig, world_size: int) -> Memory:
    """Memory of a rank of the fullest pipeline stage.  `config` has passed `validate` for `world_size`.

    That is the first or the last stage: those between have no layers of the task, and have no more layers or micro
    batches in flight than the first.
    """
    _, memory = _fullest_stage(config, world_size)
    return memory


def candidates_per_rank(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(parameters of candidates on a rank of the fullest pipeline stage, bytes of them and of their gradients and
    optimizer states there). These bytes are a part of `memory_per_rank`."""
    stage, _ = _fullest_stage(config, world_size)
    topology = topology_for(config, world_size)
    parameters, own = (count(config.model, topology, stage) for count in (stage_parameters, stage_candidates))
    whole, others = (sum(_state_bytes(config, topology, stage, count)) for count in (parameters, parameters - own))
    return own, whole - others


def _fullest_stage(config: RunConfig, world_size: int) -> tuple[int, Memory]:
    """The pipeline stage whose ranks need most memory, and that memory."""
    topology = topology_for(config, world_size)
    num_micro_batches = plan_batches(config, world_size).num_micro_batches
    stages = {stage: _stage_memory(config, topology, num_micro_batches, stage) for stage in (0, topology.pipeline - 1)}
    return max(stages.items(), key=lambda entry: entry[1].total)


def _state_bytes(config: RunConfig, topology: Topology, stage: int, parameters: int) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer) for `parameters` elements on a rank of a stage."""
    precision, optimizer_type = config.training.compute_type, config.optimizer.type
    if config.parallel.engine == "torch":
        return sharded_state_bytes(
            parameters,
            2 * parameters // (1 + topology.num_layers(config.model.num_layers, stage)),
            precision,
            config.parallel.shard if topology.pipeline == 1 else "optimizer",
            topology.replicas,
            optimizer_type,
        )
    return parameter_state_bytes(parameters, precision, config.zero.stage, topology.data, optimizer_type)


def _stage_memory(config: RunConfig, topology: Topology, num_micro_batches: int, stage: int) -> Memory:
    parameters = stage_parameters(config.model, topology, stage)
    weights, gradients, optimizer = _state_bytes(config, topology, stage, parameters)
    in_flight = _layers_in_flight(config, topology, num_micro_batches, stage)
    activations = _stage_activation_bytes(config, topology, stage, in_flight)
    return Memory(
        weights, gradients, optimizer, activations + _waiting_bytes(config, topology, num_micro_batches, stage)
    )


def _waiting_bytes(config: RunConfig, topology: Topology, num_micro_batches: int, stage: int) -> int:
    """Bytes held for delayed weight gradients: under a zero-bubble schedule stage i delays those of i passes.

    Until then it keeps both factors of each gradient's product, over all positions.
    """
    if config.parallel.schedule != "zero_bubble":
        return 0
    parts = topology.parts(config.model.num_layers, stage)
    elements = sum(
        product.m * (product.k + product.n) for product in architecture_of(config.model).work(config).weights
    )
    passes = min(stage, num_micro_batches * len(parts))
    return passes * max(map(len, parts)) * elements * compute_bytes(config.training.compute_type)


def _layers_in_flight(config: RunConfig, topology: Topology, num_micro_batches: int, stage: int) -> int:
    """Layers, counted once for each micro batch, whose forward pass is done before the first backward pass.

    P is the number of stages. One forward, one backward: stage i has begun P − i micro batches by then. Interleaved,
    with v parts of the depth on a rank: (v − 1) P + 2 (P − i) − 1 passes of a part. With parts and a zero-bubble
    schedule: (v − 1) P + P − i.
    """
    parts, ranks = topology.parts(config.model.num_layers, stage), topology.pipeline
    if len(parts) == 1:
        return min(num_micro_batches, ranks - stage) * len(parts[0])
    ahead = ranks - stage
    passes = (len(parts) - 1) * ranks + (ahead if config.parallel.schedule == "zero_bubble" else 2 * ahead - 1)
    return min(num_micro_batches * len(parts), passes) * max(map(len, parts))


def parameter_state_bytes(
    parameters: int, precision: ComputeType, zero_stage: int, data_parallel: int, optimizer: str = DEFAULT_OPTIMIZER
) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer) for `parameters` elements on a rank, as DeepSpeed lays them out.

    | precision, ZeRO | weights | gradients                      | optimizer                  |
    |-----------------|---------|--------------------------------|----------------------------|
    | bf16, 1         | 2       | 2 + 4 (whole fp32 sum)         | (4 + s)/DP                 |
    | fp16, 1         | 2       | 2 + 4/DP (fp32 copy of a part) | (4 + s)/DP                 |
    | fp32, 1         | 4       | 4 + 4/DP (copy of a part)      | (4 + s)/DP (a master copy) |
    | fp32, 0         | 4       | 4                              | s                          |

    s: bytes of the states that `optimizer` (its name in the configuration) keeps for each weight; 8 for adamw.
    """
    kept = OPTIMIZERS[optimizer].state_bytes
    share = -(-parameters // data_parallel)
    if zero_stage == 0:
        assert precision == "fp32", "validate() refuses stage 0 in other precisions"
        return 4 * parameters, 4 * parameters, kept * parameters
    compute = compute_bytes(precision)
    sums = 4 * parameters if precision == "bf16" else 4 * share
    return compute * parameters, compute * parameters + sums, (4 + kept) * share


def sharded_state_bytes(
    parameters: int,
    gathered: int,
    precision: ComputeType,
    shard: str,
    data_parallel: int,
    optimizer: str = DEFAULT_OPTIMIZER,
) -> tuple[int, int, int]:
    """Bytes of (weights, gradients, optimizer) for `parameters` elements on a rank, as torch's `fully_shard` does it.

    `gathered`: elements that a rank holds unsharded at one time where parameters are sharded: those of two blocks.

    | shard        | weights      | gradients         | optimizer  |
    |--------------|--------------|-------------------|------------|
    | `optimizer`  | c            | 4 + 4/DP          | (4 + s)/DP |
    | `gradients`  | c            | 4/DP, 4 of blocks | (4 + s)/DP |
    | `parameters` | c of blocks  | 4/DP, 4 of blocks | (4 + s)/DP |

    c: bytes of the compute type; s: see `parameter_state_bytes`. One rank in fp32 shards nothing: 4, 4 and s.
    """
    kept, compute = OPTIMIZERS[optimizer].state_bytes, compute_bytes(precision)
    if data_parallel == 1 and precision == "fp32":
        return 4 * parameters, 4 * parameters, kept * parameters
    share, blocks = -(-parameters // data_parallel), min(gathered, parameters)
    weights = compute * (blocks if shard == "parameters" else parameters)
    return weights, 4 * (parameters if shard == "optimizer" else blocks) + 4 * share, (4 + kept) * share


def _stage_activation_bytes(config: RunConfig, topology: Topology, stage: int, in_flight: int) -> int:
    """Bytes of activations at the peak of a stage.  `in_flight`: see `_layers_in_flight`.

    Without checkpointing every layer of every micro batch in flight keeps `block_activation_bytes`; with it, only its
    input.  To this comes the larger of two that never exist at the same time: the temporary tensors of one block's
    backward pass (with checkpointing also that block's activations), and, on the last stage, those of the head.
    """
    model, training = config.model, config.training
    positions = positions_of(config)
    compute = compute_bytes(training.compute_type)
    block, backward = block_activation_bytes(config), block_backward_bytes(config)
    kept = block
    if training.activation_checkpointing:
        split = topology.tensor if config.parallel.sequence else 1
        kept, backward = compute * positions * model.hidden_size // split, block + backward
    head = 0
    if stage == topology.pipeline - 1:
        # The final norm's output; logits and their gradient. Only a few of their rows are in fp32 at one time.
        head = compute * (positions * model.hidden_size + 2 * task_of(model).work(config).logits)
    return in_flight * kept + max(head, backward)


def block_activation_bytes(config: RunConfig) -> int:
    """Bytes that one block keeps for the backward pass of one micro batch, on one rank.

    | kept                                                | elements     | bytes |
    |-----------------------------------------------------|--------------|-------|
    | inputs of both norms, split under sequence parallel | 2 · s·b·d/T  | c     |
    | whole inputs of attention and feed-forward          | 2 · s·b·d    | c     |
    | mean and deviation of both norms                    | 4 · s·b      | 4     |
    | log-sum-exp of attention, a head                    | s·b·heads/T  | 4     |

    The tensors that the architecture's `BlockWork` declares come in addition.
    """
    model, tensor = config.model, config.parallel.tensor
    split = tensor if config.parallel.sequence else 1
    work = architecture_of(model).work(config)
    kept = 2 * model.hidden_size // split + 2 * model.hidden_size + work.kept
    statistics = 4 + model.num_attention_heads // tensor + work.kept_statistics
    of_positions = positions_of(config) * (compute_bytes(config.training.compute_type) * kept + 4 * statistics)
    return of_positions + 4 * work.kept_of_step


def block_backward_bytes(config: RunConfig) -> int:
    """Bytes that the backward pass of one block needs in addition to what the forward pass kept, at its peak, on one
    rank: the gradients of a projection's output and input, and what the architecture's `BlockWork` declares.
    """
    elements = architecture_of(config.model).work(config).backward_peak + 2 * config.model.hidden_size
    return positions_of(config) * compute_bytes(config.training.compute_type) * elements
