"""The configurations that come with megatron_tf, and your own. Every command takes a shipped one by its name:
`megatron_tf train tiny`.

`megatron_tf config list` names them, `megatron_tf config show tiny > my.yml` makes a copy to edit. A file may also
begin with `extends: tiny.yml` and show only what differs; `megatron_tf config show my.yml` shows the values of a file
of yours together with those of the files that it extends, and `--resolved` does so for a shipped one. `megatron_tf
config reference` explains every key; with `--schema` it prints a JSON schema, by which editors check and complete a
configuration that has the line `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_tf.arguments import config_file
from megatron_tf.config.load import check_keys, read_file
from megatron_tf.config.reference import json_schema, markdown
from megatron_tf.config.yaml_core import dump_yaml
from megatron_tf.errors import ConfigError
from megatron_tf.shipped import configurations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="list|show|reference")
    modes.add_parser("list", help="names, each with the first line of its file")
    show = modes.add_parser("show", help="the text of a shipped one, or the values of a file of yours")
    show.add_argument(
        "file", type=config_file, metavar="FILE", help="a path, or one of the names of `megatron_tf config list`"
    )
    show.add_argument("--resolved", action="store_true", help="with the values of the files that it extends")
    reference = modes.add_parser("reference", help="every key: type, default, unit, meaning, first version")
    reference.add_argument("--schema", action="store_true", help="as a JSON schema for editors")
    arguments = parser.parse_args()
    if arguments.mode == "reference":
        print(
            json.dumps(json_schema(), indent=1) if arguments.schema else markdown(),
            end="\n" if arguments.schema else "",
        )
    elif arguments.mode == "show":
        print_file(arguments.file, arguments.resolved)
    else:
        print_names()


def print_file(file: Path, is_resolved: bool) -> None:
    """Prints a shipped file unchanged; with `is_resolved`, or for another file, its values and those of the files that
    it extends. ConfigError when it cannot be read or has unknown keys."""
    if file in configurations().values() and not is_resolved:
        sys.stdout.buffer.write(file.read_bytes())  # the same bytes, whatever the locale's encoding
        return
    values, problems = read_file(file)
    if problems:
        raise ConfigError(problems)
    check_keys(values)
    print(dump_yaml(values), end="")


def print_names() -> None:
    shipped = configurations()
    width = max(map(len, shipped))
    for name, path in shipped.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('# ')}")
