"""The configurations that come with megatron_tf. Every command takes one by its name: `megatron_tf train tiny`.

`megatron_tf config list` names them, `megatron_tf config show tiny > my.yml` makes a copy to edit. A file may also begin
with `extends: tiny.yml` and show only what differs; `--resolved` shows the values of the file and of those it extends.
`megatron_tf config reference` explains every key; with `--schema` it prints a JSON schema, by which editors check and
complete a configuration that has the line `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_tf.config.load import read_file
from megatron_tf.config.reference import json_schema, markdown
from megatron_tf.config.yaml_core import dump_yaml
from megatron_tf.shipped import configurations


def main() -> None:
    shipped = configurations()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="list|show|reference")
    modes.add_parser("list", help="names, each with the first line of its file")
    show = modes.add_parser("show", help="the text of one")
    show.add_argument("name", choices=shipped, metavar="NAME", help="one of `megatron_tf config list`")
    show.add_argument("--resolved", action="store_true", help="with the values of the files that it extends")
    reference = modes.add_parser("reference", help="every key: type, default, unit, meaning, first version")
    reference.add_argument("--schema", action="store_true", help="as a JSON schema for editors")
    arguments = parser.parse_args()
    if arguments.mode == "reference":
        print(
            json.dumps(json_schema(), indent=1) if arguments.schema else markdown(),
            end="\n" if arguments.schema else "",
        )
        return
    if arguments.mode == "show" and arguments.resolved:
        values, _ = read_file(shipped[arguments.name])
        print(dump_yaml(values), end="")
        return
    if arguments.mode == "show":
        sys.stdout.buffer.write(shipped[arguments.name].read_bytes())  # a copy, whatever the locale's encoding
        return
    width = max(map(len, shipped))
    for name, path in shipped.items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first.removeprefix('# ')}")
