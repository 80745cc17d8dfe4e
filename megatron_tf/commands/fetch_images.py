"""Fetch Fashion-MNIST through apt: 70,000 labelled pictures of clothes, 28 x 28 grey pixels, in ten classes.

Writes the four files of the Debian package dataset-fashion-mnist into OUTPUT, with classes.txt and LICENSE.txt. The
package is kept in OUTPUT.downloads, neither installed nor run. `tools/prepare_images.py` turns the files into training
data.
"""

from __future__ import annotations

import argparse

from megatron_tf.arguments import path
from megatron_tf.corpora.images import fetch_fashion_mnist
from megatron_tf.corpora.packages import Downloads
from megatron_tf.errors import DataError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=path, help="folder to write; files of the same names in it are replaced")
    parser.add_argument("--downloads", type=path, metavar="FOLDER", help="for the package (default: OUTPUT.downloads)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.output
    if not folder.name or folder.name == "..":  # files written next to it begin with its name
        raise DataError(f"{folder}: has no name of its own. Give a folder by its name, such as data/fashion.")
    downloads = Downloads(arguments.downloads or folder.with_name(folder.name + ".downloads"))
    for file in fetch_fashion_mnist(folder, downloads):
        print(file)
