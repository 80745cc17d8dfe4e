"""Optimizers: the states that each keeps for a parameter, and its update. `base.UpdateRule` is the interface."""
