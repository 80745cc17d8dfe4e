"""The upper bounds in setup.py are the newest versions of other packages that all tests have passed with.

python .ci/bounds.py show         what is installed of what setup.py names, and its bounds
python .ci/bounds.py raise        allow what is installed beyond them, run every test, and keep that only if all pass

To try newer versions, install them into the environment of `make setup` first: `pip install --upgrade transformers`.
What is wanted in exactly one version is raised by hand: read what is said of it in setup.py. Arguments after `raise`
go to pytest.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

SETUP = Path(__file__).parents[1] / "setup.py"
REQUIREMENT = re.compile(r'"([A-Za-z][\w.-]*)((?:>=|==)[\d.]+)(?:,<([\d.]+))?(?:;[^"]*)?"')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("show", "raise"))
    command, rest = parser.parse_known_args()
    text = SETUP.read_text(encoding="utf-8")
    versions = installed(text)
    if command.command == "show":
        print(shown(text, versions))
        return 0
    new, changes = raised(text, versions)
    if not changes:
        print("nothing that is installed is beyond its bound")
        return 0
    print("\n".join(changes), flush=True)
    return try_out(text, new, rest)


def installed(text: str) -> dict[str, str]:
    """Versions of the packages that `text`, of a setup.py, names."""
    versions = {}
    for match in REQUIREMENT.finditer(text):
        try:
            versions[match[1]] = metadata.version(match[1])
        except metadata.PackageNotFoundError:
            continue
    return versions


def shown(text: str, versions: Mapping[str, str]) -> str:
    """A line for Python and for each package."""
    lines = [f"{'python':<16} {sys.version.split()[0]}"]
    for match in REQUIREMENT.finditer(text):
        bounds = match[2] + (f",<{match[3]}" if match[3] else "")
        lines.append(f"{match[1]:<16} {versions.get(match[1], 'not installed'):<16} {bounds}")
    return "\n".join(lines)


def raised(text: str, versions: Mapping[str, str]) -> tuple[str, list[str]]:
    """`text` with bounds above `versions`, as precise as they were, and what changed in words."""
    changes = []

    def above(match: re.Match[str]) -> str:
        name, version, bound = match[1], versions.get(match[1]), match[3]
        if version is None or bound is None:
            return match[0]
        limit = numbers(bound)
        have = (*numbers(version), *[0] * len(limit))[: len(limit)]
        if have < limit:
            return match[0]
        new = ".".join(map(str, (*have[:-1], have[-1] + 1)))
        changes.append(f"{name}: {version} is installed, the bound {bound} becomes {new}")
        return match[0].replace(f",<{bound}", f",<{new}")

    return REQUIREMENT.sub(above, text), changes


def numbers(version: str) -> tuple[int, ...]:
    """ "2.13.0+cpu" -> (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def try_out(old: str, new: str, arguments: list[str]) -> int:
    """Run every test under the setup.py `new`; the exit code. Unless all pass, `old` is put back."""
    passed = False
    try:
        write(new)
        code = subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=SETUP.parent).returncode
        passed = code == 0
    finally:
        if not passed:
            write(old)
            print("the bounds are as before: not all tests have passed", flush=True)
    if passed:
        print("the bounds in setup.py are raised")
    return code


def write(text: str) -> None:
    """Into setup.py, and into the metadata that the package itself reads."""
    SETUP.write_text(text, encoding="utf-8")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--editable"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(SETUP.parent)], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
