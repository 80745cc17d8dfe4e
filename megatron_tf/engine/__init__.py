"""Engines train a model under a layout. `base.Engine` is the protocol; each engine has a folder of its own."""
