"""Sections of a configuration, one file for each subject. `config.schema` joins them and has the short ones."""
