import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def modules_of_its_own(tmp_path, monkeypatch) -> Iterator[None]:
    """transformers copies a folder's code into this cache before it runs it.

    The package of all such code is imported from where the cache is, once in a process: what there is of another cache
    is set aside, and nothing of this one stays.
    """
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in _copied():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in _copied():
        del sys.modules[name]


def _copied() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
