"""Sections of a configuration, a subject a file. `config.schema` puts them together and has the short ones."""
