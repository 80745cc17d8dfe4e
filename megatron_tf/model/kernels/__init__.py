"""Kernels for what is done to the scores: an implementation of one activation, found by whether it can be used."""
