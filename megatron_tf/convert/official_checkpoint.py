"""Conversion of official weights into a checkpoint at step 0 of a run, and of a checkpoint into an official file."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_tf.architectures.tokenformer.section import as_tokenformer
from megatron_tf.checkpoint.architecture import check_format, stored_model
from megatron_tf.checkpoint.format import folder_name
from megatron_tf.checkpoint.manager import STEP_PREFIX
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.checkpoint.safetensors_file import open_safetensors
from megatron_tf.checkpoint.step_zero import FIRST_STEP, target_folder, write_weights
from megatron_tf.config.sections.model import Model
from megatron_tf.config.validate import check_model
from megatron_tf.convert.agreement import TOLERANCES, Agreement, agreement
from megatron_tf.convert.official import check_official, known_model, recorded_problems
from megatron_tf.convert.official_files import WEIGHTS_NAME, OfficialWeights
from megatron_tf.durable import atomic_path, prepare_output, sync_folder
from megatron_tf.errors import CheckpointError, file_errors
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import candidate_counts, initial_scales, parameter_table
from megatron_tf.tasks.language_model.section import vocab_size_of
from megatron_tf.telemetry.text import bullets

_LOGITS = ("logits", "logits_fp32", "logits_fp64")
_FILE_OVERHEAD_BYTES = 2**20


def matching_model(weights: OfficialWeights, given: Model | None) -> tuple[Model, str]:
    """(The model that `weights` belong to, how that is known, as text). Checks every name and shape.

    `given`: the model of a configuration; None: it is inferred. CheckpointError when they do not fit, or for values
    that are not finite; ConfigError when the model is not valid.
    """
    if given is not None:
        if counts := candidate_counts(given):
            several = ", ".join(f"{kind} {count}" for kind, count in counts.items())
            raise CheckpointError(
                f"model.sparse: has {several} candidates a slot, and official weights have 1. Give a configuration "
                "without model.sparse; then grow its run into this model, with growth.method split"
            )
        check_format(given, "official", "read from official weights")
        check_model(given)
    model, origin = (given, "as configured") if given is not None else known_model(weights.shapes, weights.arguments)
    check_official(weights.shapes, model)
    if problems := recorded_problems(model, weights.arguments):
        raise CheckpointError(
            f"these weights are of another model:{bullets(problems)}"
            + "\nGive the configuration that they were trained with."
        )
    for name, tensor in weights.tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name}: holds values that are infinite or no numbers, so the file is damaged")
    return model, origin


def import_folder(path: Path | str) -> Path:
    """The run's folder of checkpoints, for the imported one. CheckpointError when it holds a checkpoint already."""
    if Path(path).name.startswith(STEP_PREFIX):
        raise CheckpointError(
            f"{path}: is the name of one checkpoint. Give a run's folder; the checkpoint will be "
            f"checkpoints/{folder_name(FIRST_STEP)} within it"
        )
    return target_folder(path)


def write_imported(root: Path, model: Model, weights: OfficialWeights, progress: Callable[[int, str], None]) -> Path:
    """Write `weights` as step 0 of a run of `model` under `root`; returns the checkpoint.

    Moments and step counts are 0, as of a fresh model, and τ is √n. `progress`: called with the bytes done so far and
    the tensor that is being written. Errors: CheckpointError, with nothing left behind.
    """
    tensors = {name: weights.tensors[spec.official_name] for name, spec in parameter_table(model).items()}
    return write_weights(root, model, tensors, initial_scales(model), progress)


@torch.no_grad()
def compare_logits(weights: OfficialWeights, model: Model, reference: Path) -> Agreement:
    """Logits of `weights`, in fp32 by our model, against those that the official code has computed.

    `reference`: safetensors with input_ids [b, s] and logits (or logits_fp32, logits_fp64) [b, s, vocab].
    CheckpointError when the file is not of this form, or when logits differ by more than rounding.
    """
    ids, expected = _read_reference(reference, model)
    with torch.device("meta"):
        network = TokenFormer(model)
    state = {name: weights.tensors[spec.official_name].float() for name, spec in parameter_table(model).items()}
    network.load_state_dict(state, assign=True)
    found = agreement(network.eval()(ids), expected)
    if not found.holds:
        raise CheckpointError(
            f"{reference}: its logits are other ones: {found}. Either they are not of these weights, or the model's "
            "heads, activation or rotary settings are not theirs"
        )
    return found


def _read_reference(path: Path, model: Model) -> tuple[Tensor, Tensor]:
    with open_safetensors(path, "Give a file of input_ids and logits") as file:
        present = set(file.keys())
        kept = next((name for name in _LOGITS if name in present), None)
        if kept is None or "input_ids" not in present:
            raise CheckpointError(f"{path}: a reference holds input_ids and one of {', '.join(_LOGITS)}")
        ids, logits = file.get_tensor("input_ids").long(), file.get_tensor(kept)
    vocab_size = vocab_size_of(model)
    if tuple(logits.shape) != (*ids.shape, vocab_size) or ids.dim() != 2 or logits.dtype not in TOLERANCES:
        raise CheckpointError(
            f"{path}: input_ids {list(ids.shape)} and {kept} {list(logits.shape)} are not [b, s] and "
            f"[b, s, {vocab_size}]"
        )
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise CheckpointError(f"{path}: input_ids go to {int(ids.max())}, model.vocab_size is {vocab_size}")
    return ids, logits


def exportable_model(reader: CheckpointReader) -> Model:
    """The checkpoint's model. UserError unless the official code computes the same from its weights.

    That code does not read a stored τ: it uses that of a fresh model with the same number of tokens.
    """
    model = stored_model(reader.index)
    check_format(model, "official", "converted")
    check_model(model)
    assumed = initial_scales(model)
    held = reader.index.scales
    # A scale that differs only in its last bits is √n, computed another way.
    other = [name for name, scale in assumed.items() if not math.isclose(held[name], scale, rel_tol=1e-9)]
    if other:
        differing = [f"{name}: τ {held[name]:.6g}, the official code takes {assumed[name]:.6g}" for name in other]
        raise CheckpointError(
            f"{reader.path}: the official code would compute another function from these weights, because it takes "
            f"τ from the number of tokens:{bullets(differing, 5)}\nGrowth by zero_key holds τ as it was. Growth by "
            "gram ends with this τ and the same function: grow by it instead, or once more"
        )
    return model


def check_export_target(path: Path) -> None:
    """Create the folder of the official file `path`. UserError when the file cannot be written there."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder. Name the file, such as {path / WEIGHTS_NAME}")
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already. Nothing is overwritten: give another name")
    prepare_output(path)


def write_official(path: Path, model: Model, reader: CheckpointReader) -> int:
    """Write the weights to `path` as the official file: a dict of fp32 tensors. Returns its bytes.

    The whole model is held in memory. Errors: CheckpointError, with nothing left behind.
    """
    table = parameter_table(model)
    needed = 4 * sum(spec.numel for spec in table.values()) + _FILE_OVERHEAD_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise CheckpointError(f"{path}: the file takes {needed:,} bytes, and {free:,} are free there. Make room")
    tensors = {
        spec.official_name: reader.read(name, WEIGHT, 0, spec.numel).view(spec.shape) for name, spec in table.items()
    }
    with file_errors(CheckpointError, path, "Nothing was written."), atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(tensors, file)
        except RuntimeError as error:  # closing torch's archive after a failed write hides the system's error
            cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(f"torch: {error}")
            raise cause from error
        size = temporary.stat().st_size
    sync_folder(path.parent)
    return size


def official_settings(model: Model) -> dict[str, object]:
    """The settings that a configuration of the official repository needs for these weights."""
    model = as_tokenformer(model)
    counts = {f"{kind}_slot_num": count for kind, count in model.parameter_tokens.model_dump().items()}
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        **counts,
        "seq_length": model.seq_length,
        "max_position_embeddings": model.seq_length,
        "norm_activation_type": model.activation,
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
        "layernorm_epsilon": model.norm_eps,
    }
