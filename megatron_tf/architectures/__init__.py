"""One folder an architecture: its configuration, its parameters, its block and what that block costs.

`base.Architecture` says what an architecture has to give. A new one is registered by
`ARCHITECTURES.register(name, object)`; nothing outside its own module has to know it.
"""
