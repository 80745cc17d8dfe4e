"""Optimizers: what each keeps of a parameter, and how it updates one. `base.UpdateRule` says what that is."""
