"""Show the likeliest classes of images: `python tools/classify_images.py RUN_DIR IMAGE ...`.

Of a run, a checkpoint or an export whose model.task is image_classification. Needs no GPU and no launcher.
"""

from __future__ import annotations

import argparse

from megatron_tf.arguments import path, whole_number


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=path, help="run folder, checkpoints folder, checkpoint or export")
    parser.add_argument("images", type=path, nargs="+", metavar="IMAGE", help="image files of any kind")
    parser.add_argument(
        "--best", type=whole_number(2**31), default=5, metavar="N", help="classes to show of each (default: 5)"
    )
    parser.add_argument(
        "--classes",
        type=path,
        metavar="FILE",
        help="names of the classes, one a line (default: those of the run or export, or numbers)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.inference.images import class_names, probabilities
    from megatron_tf.inference.load import load_model
    from megatron_tf.tasks.image_classification.section import check_sees_images

    model = load_model(arguments.checkpoint)
    check_sees_images(model.config, "classification")
    names = class_names(arguments.checkpoint, model, arguments.classes)
    for file, shares in zip(arguments.images, probabilities(model, arguments.images)):
        print(file)
        for number in (-shares).argsort(kind="stable")[: arguments.best]:
            print(f"  {100 * shares[number]:6.2f} %  {names[number]}")
