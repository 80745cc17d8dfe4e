"""The language model: predicts the next token of a text."""
