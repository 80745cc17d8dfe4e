from __future__ import annotations

import pkgutil
from importlib import import_module

from megatron_tf.config import schema, sections
from megatron_tf.config.fields import Section


def test_every_section_can_be_imported_from_the_schema():
    """Whose code names a section need not know which file it stands in."""
    modules = [import_module(f"{sections.__name__}.{found.name}") for found in pkgutil.iter_modules(sections.__path__)]
    own = {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Section) and value.__module__ == module.__name__
    }
    assert "DataSource" in own and own <= set(schema.__all__), own - set(schema.__all__)
    assert all(isinstance(getattr(schema, name), type) for name in schema.__all__)
