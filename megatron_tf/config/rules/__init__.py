"""Rules between keys, one subject per file. Each yields a sentence with key and remedy for every problem.

`config.validate` calls them all.
"""
