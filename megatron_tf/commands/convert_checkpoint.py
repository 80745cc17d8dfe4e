"""Weights from and to other formats:
`python tools/convert_checkpoint.py from-official pytorch_model.bin --to runs/150M`
`python tools/convert_checkpoint.py to-official runs/150M --to pytorch_model.bin`
`python tools/convert_checkpoint.py to-hf runs/150M --to exports/150M`
`python tools/convert_checkpoint.py from-hf exports/150M --to runs/150M`
`python tools/convert_checkpoint.py to-safetensors runs/150M --to 150M.safetensors`.

from-official reads the published file, or a training checkpoint of the official repository (its fp32 master weights),
without running anything in it, and writes step 0 of a run, to be trained on, grown and evaluated: the weights, τ = √n
and Adam moments of 0. The model is known by its shapes if it is one of those published, and otherwise given by
--config. to-official is the inverse, to the last bit, for every model whose τ is √n.

to-hf writes a folder that transformers and vLLM load: weights, configuration with τ of every projection, tokenizer, and
the model's code; of a classifier of images an image processor and the names of the classes. It is loaded with
transformers and compared with our own model before it gets its name. from-hf is the inverse, to the last bit, and also
takes what was trained further with transformers. Needs no GPU.

to-safetensors writes the fp32 weights alone, by logical name, with the model's configuration and τ in the file's
metadata.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.architectures.tokenformer.section import as_tokenformer, bank_of
from megatron_tf.arguments import config_file, path, text_path
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import load_config
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.errors import UserError
from megatron_tf.paths import literal
from megatron_tf.state.parameters import initial_scales, projections
from megatron_tf.tasks.image_classification.section import ImageModel
from megatron_tf.tasks.language_model.section import LanguageModel, vocab_size_of
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.text import count_of

if TYPE_CHECKING:
    from megatron_tf.convert.agreement import Agreement
    from megatron_tf.convert.huggingface.export import ExportedTokenizer
    from megatron_tf.model.tokenformer import TokenFormer

ReportProgress = Callable[[int, str], None]
Write = Callable[[], "dict[str, Agreement]"]
CLASSES_NAMED = 5
OFFICIAL_VOCABULARY_MULTIPLE = 128  # make_vocab_size_divisible_by, unless a configuration says otherwise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importer = commands.add_parser("from-official", help="official weights into step 0 of a run")
    importer.add_argument("source", type=path, help="pytorch_model.bin, or a folder of official training checkpoints")
    importer.add_argument("--to", dest="target", required=True, type=path, metavar="DIR", help="the run's folder")
    importer.add_argument(
        "--config", type=config_file, metavar="FILE", help="configuration whose model the weights must be of"
    )
    importer.add_argument(
        "--reference",
        type=path,
        metavar="FILE",
        help="safetensors of the official code's input_ids and logits, to compare with before anything is written",
    )
    importer.set_defaults(command=from_official)
    exporter = commands.add_parser("to-official", help="a checkpoint's weights into an official file")
    exporter.add_argument("source", type=path, help="run folder or checkpoint; memory for its weights is needed")
    exporter.add_argument("--to", dest="target", required=True, type=path, metavar="FILE", help="the file to write")
    exporter.set_defaults(command=to_official)
    to_folder = commands.add_parser("to-hf", help="a checkpoint's weights into a folder for transformers and vLLM")
    to_folder.add_argument("source", type=path, help="run folder or checkpoint; memory for twice its weights is needed")
    to_folder.add_argument("--to", dest="target", required=True, type=path, metavar="DIR", help="the folder to write")
    to_folder.add_argument(
        "--tokenizer", type=text_path, help="tokenizer file; default: data.tokenizer of the run's config.yml"
    )
    to_folder.add_argument(
        "--eod-token", metavar="NAME", help="token that ends a text; default: what the run's data say"
    )
    to_folder.add_argument(
        "--classes",
        type=path,
        metavar="FILE",
        help="names of a classifier's classes, one a line; default: those of the run's data.train, or numbers",
    )
    to_folder.set_defaults(command=to_hf)
    from_folder = commands.add_parser("from-hf", help="such a folder into step 0 of a run")
    from_folder.add_argument("source", type=path, help="folder with config.json and model.safetensors")
    from_folder.add_argument("--to", dest="target", required=True, type=path, metavar="DIR", help="the run's folder")
    from_folder.set_defaults(command=from_hf)
    to_file = commands.add_parser("to-safetensors", help="a checkpoint's weights alone into one safetensors file")
    to_file.add_argument("source", type=path, help="run folder or checkpoint; memory for its weights is needed")
    to_file.add_argument("--to", dest="target", required=True, type=path, metavar="FILE", help="the file to write")
    to_file.set_defaults(command=to_safetensors)
    for command in (importer, exporter, to_folder, from_folder, to_file):
        command.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.command(arguments)


def from_official(arguments: argparse.Namespace) -> None:
    from megatron_tf.checkpoint.format import folder_name
    from megatron_tf.checkpoint.step_zero import FIRST_STEP
    from megatron_tf.convert.official_checkpoint import compare_logits, import_folder, matching_model, write_imported
    from megatron_tf.convert.official_files import open_official
    from megatron_tf.convert.torch_file import check_bytes

    root = import_folder(arguments.target)
    given = load_config(arguments.config).model if arguments.config else None
    weights = open_official(arguments.source)
    model, origin = matching_model(weights, given)
    print(
        f"from        {arguments.source}: {weights.description}, "
        f"{sum(file.stat().st_size for file in weights.files):,} bytes"
    )
    print(f"to          {root / folder_name(FIRST_STEP)}")
    describe(model, origin)
    print("moments     0: training goes on from the weights alone, with a schedule of its own")
    if arguments.reference:
        agreement = compare_logits(weights, model, arguments.reference)
        print(f"reference   logits differ by {agreement.error:.2g} at most; the largest is {agreement.largest:.3g}")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    print("\ncomparing the checksums in the source")
    for file in weights.files:
        check_bytes(file)
    write_run(root, model, lambda progress: write_imported(root, model, weights, progress), arguments.config)


def write_run(root: Path, model: Model, write: Callable[[ReportProgress], Path], config: Path | None = None) -> None:
    from megatron_tf.checkpoint.step_zero import checkpoint_bytes

    total, began = checkpoint_bytes(model), time.monotonic()
    with Console(rank=0).bytes_written(total) as progress:
        path = write(progress)
    print(f"wrote {path}: {total:,} bytes in {time.monotonic() - began:.1f} s")
    folder = literal(str(root.parent))
    print(
        f"To train on, run {config or 'a configuration of this model'} with run.dir={folder}; "
        f"to grow, one with growth.from={folder}"
    )


def to_official(arguments: argparse.Namespace) -> None:
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.convert.official_checkpoint import (
        check_export_target,
        exportable_model,
        official_settings,
        write_official,
    )

    check_export_target(arguments.target)
    reader = open_checkpoint(resolve(arguments.source))
    model = exportable_model(reader)
    print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    print(f"to          {arguments.target}")
    describe(model, "as the checkpoint says")
    print("for use with the official code, whose configuration must say")
    for key, value in official_settings(model).items():
        print(f'  "{key}": {value:g}' if isinstance(value, float) else f'  "{key}": {value!r}'.replace("'", '"'))
    if vocab_size_of(model) % OFFICIAL_VOCABULARY_MULTIPLE:
        print(f"  and a make_vocab_size_divisible_by with which the tokenizer gives {vocab_size_of(model):,} rows")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    print("\ncomparing the source's checksums")
    reader.verify()
    size = write_official(arguments.target, model, reader)
    print(f"wrote {arguments.target}: {size:,} bytes")


def to_hf(arguments: argparse.Namespace) -> None:
    from megatron_tf.checkpoint.architecture import check_format, stored_model
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.convert.huggingface.export import check_target
    from megatron_tf.convert.huggingface.verify import require_transformers
    from megatron_tf.inference.load import load_model

    check_target(arguments.target)
    version = require_transformers()
    reader = open_checkpoint(resolve(arguments.source))
    stored = stored_model(reader.index)
    check_format(stored, "huggingface", "exported")
    check_options(arguments, is_image := isinstance(stored, ImageModel))
    print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    network = load_model(reader.path)
    write = image_writer(arguments, network) if is_image else text_writer(arguments, network)
    print(f"to          {arguments.target}")
    describe(network.config, "as the checkpoint says", network.scales)
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    for kind, agreement in write().items():
        print(f"compared    with transformers {version} on {kind}: {agreement}")
    print(f"wrote {arguments.target}: {sum(file.stat().st_size for file in arguments.target.iterdir()):,} bytes")


def check_options(arguments: argparse.Namespace, is_image: bool) -> None:
    """UserError for an option that does not apply to this kind of model."""
    given = {name: getattr(arguments, name) for name in ("tokenizer", "eod_token") if is_image} or {
        "classes": arguments.classes
    }
    for name, value in given.items():
        if value is not None:
            has = "classifies images and has no tokenizer" if is_image else "is of text and has no classes"
            raise UserError(f"--{name.replace('_', '-')}: the model {has}. Remove it.")


def text_writer(arguments: argparse.Namespace, network: TokenFormer) -> Write:
    from megatron_tf.convert.huggingface.export import write_export

    return partial(write_export, arguments.target, network, exported_tokenizer(arguments, network))


def image_writer(arguments: argparse.Namespace, network: TokenFormer) -> Write:
    from megatron_tf.convert.huggingface.image_export import write_image_export
    from megatron_tf.inference.images import class_names

    names = class_names(arguments.source, network, arguments.classes)
    print(f"classes     {first_classes(names)}")
    return partial(write_image_export, arguments.target, network, names)


def first_classes(names: Sequence[str]) -> str:
    return f"{', '.join(names[:CLASSES_NAMED])}{', ...' if len(names) > CLASSES_NAMED else ''}"


def exported_tokenizer(arguments: argparse.Namespace, network: TokenFormer) -> ExportedTokenizer | None:
    from megatron_tf.convert.huggingface.export import ExportedTokenizer
    from megatron_tf.inference.load import configured_tokenizer, known_eod, open_tokenizer, other_tokenizer

    name = arguments.tokenizer or configured_tokenizer(arguments.source)
    if name is None:
        print(
            "tokenizer   none: no config.yml with data.tokenizer is next to the checkpoint. Give one with --tokenizer"
        )
        return None
    tokenizer = open_tokenizer(name, network.config, arguments.eod_token or known_eod(arguments.source, name))
    if warning := other_tokenizer(arguments.source, name):
        print(f"warning     {warning}")
    exported = ExportedTokenizer(tokenizer, Path(name) if name.endswith(".json") else None)
    left_out = (
        ", left out: transformers reads a Hugging Face tokenizers file only. The export takes and gives token ids"
    )
    print(f"tokenizer   {name}{'' if exported.file else left_out}")
    return exported


def from_hf(arguments: argparse.Namespace) -> None:
    from megatron_tf.checkpoint.format import folder_name
    from megatron_tf.checkpoint.step_zero import FIRST_STEP, target_folder, write_weights
    from megatron_tf.convert.huggingface.importing import open_export, stored_classes
    from megatron_tf.inference.images import keep_names
    from megatron_tf.inference.load import configured_tokenizer, known_eod, open_tokenizer

    root = target_folder(arguments.target)
    export = open_export(arguments.source)
    tokenizer = configured_tokenizer(arguments.source)
    if tokenizer is not None:
        eod = known_eod(arguments.source, tokenizer)
        open_tokenizer(tokenizer, export.model, eod, remedy="put the right one there, or take it away")
    print(f"from        {arguments.source}")
    print(f"to          {root / folder_name(FIRST_STEP)}")
    describe(export.model, "as its config.json says", export.scales)
    names = stored_classes(arguments.source) if isinstance(export.model, ImageModel) else ()
    if isinstance(export.model, ImageModel):
        print(f"classes     {first_classes(names) or 'none there'}")
    else:
        print(f"tokenizer   {tokenizer or 'none there'}")
    print("moments     0: training goes on from the weights alone, with a schedule of its own")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    write_run(
        root, export.model, lambda progress: write_weights(root, export.model, export.weights, export.scales, progress)
    )
    if names and not keep_names(root.parent, names):
        print("warning: the names of the classes are not kept: some are empty, or the same. --classes takes others")


def to_safetensors(arguments: argparse.Namespace) -> None:
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.convert.official_checkpoint import check_export_target
    from megatron_tf.convert.weights_file import write_weights_file

    check_export_target(arguments.target)
    reader = open_checkpoint(resolve(arguments.source))
    print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    print(f"to          {arguments.target}")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    print("\ncomparing the source's checksums")
    reader.verify()
    size = write_weights_file(arguments.target, reader)
    print(f"wrote {arguments.target}: {size:,} bytes")


def describe(model: Model, origin: str, scales: Mapping[str, float] | None = None) -> None:
    print(f"model       {origin}")
    has = (
        f"{vocab_size_of(model):,} vocabulary rows, {as_tokenformer(model).activation}"
        if isinstance(model, LanguageModel)
        else task_of(model).describe(model)
    )
    print(
        f"            {count_of(model.num_layers, 'layer')} × {model.hidden_size}, "
        f"{count_of(model.num_attention_heads, 'head')}, {model.seq_length:,} positions, {has}"
    )
    scales = scales or initial_scales(model)
    for kind, count in architecture_of(model).token_counts(model).items():
        found = {scales[name] for name, projection in projections(model).items() if projection.kind == kind}
        bank = bank_of(as_tokenformer(model), kind)
        stored = "" if bank is None else f" of {bank.stored(count):,}"
        print(
            f"{kind:<11} {count:,}{stored} tokens, "
            f"τ {' to '.join(f'{scale:.6g}' for scale in sorted({min(found), max(found)}))}"
        )
    print(f"parameters  {num_parameters(model):,}")
