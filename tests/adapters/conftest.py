import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def modules_of_its_own(tmp_path, monkeypatch) -> Iterator[None]:
    """transformers copies a folder's code into this cache before it runs it.

    The package of all such code is imported once in a process, from the first cache in the search path: what there is
    of another cache is set aside, this one comes first, and nothing of it stays.
    """
    import transformers.dynamic_module_utils as dynamic

    cache = str(tmp_path / "modules")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [cache, *sys.path])
    for name in _copied():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in _copied():
        del sys.modules[name]


def _copied() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
