"""Architectures, one folder each: its configuration, its parameters, its block and the cost of that block.

`base.Architecture` is the interface of an architecture. `ARCHITECTURES.register(name, object)` registers a new one; no
code outside its own module has to change.
"""
