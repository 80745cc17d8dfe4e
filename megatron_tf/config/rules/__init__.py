"""Rules between keys, a subject a file: generators of sentences with key and remedy. `config.validate` calls them all."""
