"""The interface of an architecture to the rest of the package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from megatron_tf.activations.forms import Norm
from megatron_tf.architectures.spec import ParameterSpec, ProjectionSpec
from megatron_tf.architectures.work import BlockWork, Collectives
from megatron_tf.config.nearest import divisors_near
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model


class Architecture(ABC):
    """The content of a model's blocks. Norms, residual sums and the layers around the blocks are the same for all.

    Everything here is arithmetic without torch. The block itself is given by name, for `model.layers.build_block` to
    import.

    `section`: the type of the `model:` section of its configurations.
    `block`: "module:function" of (model, layer, scales, tensor) -> Block, see `model.layers.BlockFactory`.
    `formats`: the foreign formats that its models can be exported to and imported from, of "official" and
        "huggingface".
    `why_not_elsewhere`: the reason, as a clause, why keys of other architectures mean nothing to it.
    """

    section: ClassVar[type[Model]]
    block: ClassVar[str]
    formats: ClassVar[frozenset[str]] = frozenset()
    why_not_elsewhere: ClassVar[str] = "another architecture has this key"

    @abstractmethod
    def block_parameters(self, model: Model, layer: int) -> Iterator[ParameterSpec]:
        """The parameters of block `layer` in their order, named "blocks.<layer>.…"."""

    @abstractmethod
    def sharded_rows(self, model: Model) -> dict[str, int]:
        """Key of the configuration -> rows that are split over the tensor ranks; each rank needs one at least."""

    @abstractmethod
    def describe(self, model: Model) -> str:
        """The sizes of a block, as a short text."""

    @abstractmethod
    def work(self, config: RunConfig) -> BlockWork:
        """Products, traffic and memory of one block and micro batch on the fullest tensor rank."""

    @abstractmethod
    def collectives(self, config: RunConfig) -> tuple[Collectives, Collectives]:
        """(forward, backward): the collectives of one block and micro batch over two or more tensor ranks."""

    def step_collectives(self, config: RunConfig) -> tuple[Collectives, Collectives]:
        """(forward, backward): further collectives of one block, once a step, or once a micro batch if compiled."""
        return (), ()

    def losses(self, model: Model) -> tuple[str, ...]:
        """Names of the auxiliary losses of its blocks, see `model.context`. The sum over the blocks is logged."""
        return ()

    def metrics(self, model: Model) -> tuple[str, ...]:
        """Names of the metrics of its blocks. The mean over the blocks is logged."""
        return ()

    def format_problem(self, model: Model, form: str) -> str | None:
        """The reason, as a clause, why this model cannot be exported to `form`, one of `formats`; None when it can."""
        return None

    def problems(self, model: Model) -> Iterator[str]:
        """Sentences on fields that do not fit together, beyond the checks for every model."""
        return iter(())

    def shared_counts(self, model: Model) -> tuple[int, ...]:
        """What tensor ranks share evenly: parallel.tensor divides each of these counts."""
        return model.num_attention_heads, self.key_value_heads(model)

    def tensor_sizes_near(self, model: Model, tensor: int) -> list[int]:
        """The values of parallel.tensor next to `tensor` that divide all `shared_counts`."""
        return divisors_near(math.gcd(*self.shared_counts(model)), tensor)

    def layout_problems(self, config: RunConfig) -> Iterator[str]:
        """Sentences on a layout in which the block cannot be split. `sharded_rows` and whole heads for each rank are
        checked for every model."""
        return iter(())

    def key_value_heads(self, model: Model) -> int:
        """The number of attention heads of keys and values."""
        return model.num_attention_heads

    def token_counts(self, model: Model) -> dict[str, int]:
        """Parameter tokens by kind of projection; empty for an architecture without parameter tokens."""
        return {}

    def norm_forms(self, config: RunConfig, device: str) -> dict[str, Norm]:
        """How each kind of projection finds the norm of its scores on a `device` type; empty when `token_counts` is."""
        return {}

    def with_token_counts(self, model: Model, counts: Mapping[str, int]) -> Model:
        """The same model with other `token_counts`."""
        assert not counts, f"{model.architecture} has no parameter tokens"
        return model

    def with_sparse(self, model: Model, sparse: Mapping[str, Any] | None) -> Model:
        """The same model with other candidates: `sparse` has the form of `sparse_sections`, None removes them. Raises
        pydantic's ValidationError when it is not such a section."""
        assert sparse is None, f"{model.architecture} has no candidates"
        return model

    def sparse_sections(self, model: Model) -> dict[str, Any] | None:
        """The sizes of the candidates and slots by kind of projection, ready for JSON; None for a model without any."""
        return None

    def projections(self, model: Model) -> tuple[ProjectionSpec, ...]:
        """Every Pattention of the model, in model order. They can grow, be pruned and be measured."""
        return ()
