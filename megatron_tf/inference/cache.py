"""Generation that does not recompute the past: the keys and values of tokens that the model has read are kept.

| tensor | shape |
|---|---|
| new query, key, value | [s, b, heads, head_dim], as everywhere in the model |
| kept keys, values | [b, g, capacity, head_dim], `length` positions in use, g heads of keys and values; keys rotated |

Rows of a batch are padded on the left to one length. A rotary embedding depends on differences of positions only, so a
row's positions may begin anywhere, and padding needs nothing but a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.checks import described
from megatron_tf.errors import ArgumentError
from megatron_tf.model.attention import Documents, apply_rotary, causal_attention, rotary_tables
from megatron_tf.model.checks import check_device, check_padding
from megatron_tf.model.layers import Attention
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tasks.language_model.checks import check_id_tensor, check_vocabulary
from megatron_tf.tasks.language_model.section import check_reads_text, vocab_size_of

_CAPACITY_STEP = 256  # positions by which the kept tensors grow, so that they are rarely copied
_TABLE_STEP = 1024  # lengths of angle tables are multiples of this, so that few tables are made


class CachedModel:
    """(ids [b, s], padding [b]) -> logits [b, vocab] after the last id of each row.

    `padding`: the number of padding ids at the beginning of each row. If a call brings the ids of the call before and
    some more, only the new ones are computed; the logits equal those of the whole computation up to rounding. After any
    other change, such as dropped ids at the beginning, everything is computed again. ArgumentError for ids outside the
    vocabulary and for wrong shapes, types or devices.
    """

    def __init__(self, model: TokenFormer):
        if not isinstance(model, TokenFormer):
            raise ArgumentError(f"model: {described(model)}, but a TokenFormer is expected.")
        check_reads_text(model.config, "generation")
        self._model = model
        self._layers: list[LayerCache] = []
        self._ids = torch.empty(0, 0, dtype=torch.long)
        self._padding = torch.empty(0, dtype=torch.long)

    @torch.no_grad()
    def __call__(self, ids: Tensor, padding: Tensor) -> Tensor:
        check_id_tensor("ids", ids)
        check_device("ids", ids, "the model", self._model.final_norm.weight.device)
        check_padding(padding, ids)
        known = self._ids.shape[1]
        if not (
            ids.shape[0] == self._ids.shape[0]
            and ids.shape[1] > known
            and torch.equal(ids[:, :known], self._ids)
            and torch.equal(padding, self._padding)
        ):
            known = 0
            self._layers = [LayerCache(padding) for _ in self._model.blocks]
        check_vocabulary("ids", ids[:, known:], vocab_size_of(self._model.config))
        self._ids, self._padding = ids.clone(), padding.clone()
        with self._attached():
            hidden = self._model.hidden_states(ids[:, known:])
        return self._model.logits(hidden[-1:])[0]

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Within the block the model's attention uses the caches; afterwards it is `causal_attention` again."""
        attentions = [module for module in self._model.modules() if isinstance(module, Attention)]
        try:
            for attention, layer in zip(attentions, self._layers):
                attention.attend = layer.attend
            yield
        finally:
            for attention in attentions:
                attention.attend = causal_attention


class LayerCache:
    """Keys and values of one layer, and attention over them."""

    def __init__(self, padding: Tensor):
        self._padding = padding
        self._length = 0
        self._keys = self._values = torch.empty(0)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        channels: int,
        base: float,
        documents: Documents | None = None,
    ) -> Tensor:
        """As `causal_attention`, for positions that follow the kept ones, and keeps their keys and values too.

        Each row is one document: `documents` must be None.
        """
        assert documents is None
        start, stop = self._length, self._length + query.shape[0]
        if channels:
            length = -(-stop // _TABLE_STEP) * _TABLE_STEP
            cos, sin = (table[start:stop] for table in rotary_tables(length, channels, base, query.device))
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        heads = query.shape[2]
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        keys, values = (t.repeat_interleave(heads // t.shape[1], 1) for t in self._extended(key, value))
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._mask(start, stop, query.device))
        return out.permute(2, 0, 1, 3).flatten(-2)

    def _extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones [b, heads, s, head_dim] appended."""
        start, stop = self._length, self._length + key.shape[2]
        if start == 0:
            self._keys, self._values = key[:, :, :0], value[:, :, :0]
        if stop > self._keys.shape[2]:
            room = stop + _CAPACITY_STEP - self._keys.shape[2]
            self._keys, self._values = (
                torch.cat((kept, kept.new_zeros(*kept.shape[:2], room, kept.shape[3])), 2)
                for kept in (self._keys, self._values)
            )
        self._keys[:, :, start:stop], self._values[:, :, start:stop] = key, value
        self._length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def _mask(self, start: int, stop: int, device: torch.device) -> Tensor | None:
        """Which keys [0, stop) the queries [start, stop) see: bool [b, 1, queries, keys]. None: all of them.

        A padding position sees itself, because a softmax over no keys gives NaN, which would spread.
        """
        if stop - start == 1 and not self._padding.any():
            return None
        queries, keys = torch.arange(start, stop, device=device)[:, None], torch.arange(stop, device=device)
        real = keys >= self._padding.to(device)[:, None, None, None]
        return (keys <= queries) & real | (keys == queries)
