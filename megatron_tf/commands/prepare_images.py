"""Turn images into PREFIX.bin and PREFIX.idx, with their classes in PREFIX.json, and read every one of them once.

A run that was interrupted goes on where it stopped when it is started again. Several runs with --shard-index and
--num-shards, on any nodes, share the work; the last to finish merges. PREFIX.report.json says what was left out and
why.
"""

from __future__ import annotations

import argparse
import sys

from megatron_tf.arguments import text_path, whole_number
from megatron_tf.data.preparation.options import add_preparation_options
from megatron_tf.telemetry.text import count_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preparation_options(
        parser,
        metavar="PATH",
        inputs="one folder with a folder of images for each class; or files or quoted globs: .tar shards as WebDataset "
        "has them (KEY.jpg and KEY.cls), .parquet as Hugging Face has it (image, label), or files of images of the "
        "MNIST family with their labels next to them, plain or .gz",
        things="images",
        bad="what is no whole image, or has no class,",
        does="read images",
    )
    parser.add_argument(
        "--classes",
        type=text_path,
        metavar="FILE",
        help="names of the classes in the order of their numbers, one a line; or how many there are (default: of "
        "folders their names in alphabetical order, of the MNIST family the numbers)",
    )
    parser.add_argument(
        "--classes-from", type=text_path, metavar="PREFIX", help="the classes of these prepared images, in their order"
    )
    parser.add_argument(
        "--shortest-side",
        type=whole_number(10**5),
        metavar="PIXELS",
        help="make larger images so small, and write them anew as JPEG of quality 95: they are read faster in "
        "training, and are no longer quite what they were",
    )
    parser.add_argument(
        "--ignore-orientation",
        action="store_true",
        help="leave images as their pixels lie, as timm and torchvision do, instead of turning them as EXIF says",
    )
    arguments = parser.parse_args()
    if arguments.classes is not None and arguments.classes_from is not None:
        parser.error("--classes and --classes-from both name the classes: give one of them")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.data.images.prepare import ImageSettings, merge_images, prepare_images
    from megatron_tf.data.preparation.progress import ProgressDisplay
    from megatron_tf.data.preparation.work import Share

    settings = ImageSettings(
        inputs=tuple(arguments.input),
        output_prefix=arguments.output_prefix,
        classes=arguments.classes,
        classes_from=arguments.classes_from,
        shortest_side=arguments.shortest_side,
        ignore_orientation=arguments.ignore_orientation,
        validation_fraction=arguments.validation_fraction,
        on_error=arguments.on_error,
        share=Share(arguments.workers, arguments.shard_index, arguments.num_shards),
        replace=arguments.replace,
    )
    command = merge_images if arguments.merge else prepare_images
    for prefix, summary in command(settings, ProgressDisplay(sys.stderr)).items():
        print(
            f"{prefix}: {count_of(summary.images, 'image')} of {len(summary.classes):,} classes, {summary.bytes:,} "
            "bytes"
        )
        if summary.skipped_records:
            print(
                f"{prefix}: left out of the input: {count_of(summary.skipped_records, 'bad image')}, see "
                f"{settings.output_prefix}.report.json"
            )
        if settings.classes_from is not None:
            warn_of_duplicates(prefix, settings.classes_from)


def warn_of_duplicates(prefix: str, others: str) -> None:
    """Warns when images for an evaluation (`prefix`) are also among those for training (`others`)."""
    from megatron_tf.data.images.duplicates import count_duplicates
    from megatron_tf.data.images.source import ImageFiles

    if count := count_duplicates(ImageFiles(prefix), ImageFiles(others)):
        print(
            f"warning: {prefix}: {count:,} of its images are in {others} too, byte for byte, and say little about "
            "images that a model has not seen",
            file=sys.stderr,
        )
