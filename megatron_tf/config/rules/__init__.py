"""Rules between keys, a subject a file: they yield sentences with key and remedy. `config.validate` calls them all."""
