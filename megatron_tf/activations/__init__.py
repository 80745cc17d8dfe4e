"""θ of Pattention: how scores over the parameter tokens become their weights. Each activation is one object.

`base` declares the facts that the package needs without torch, `built_in` the activations of the package, and
`function` the interface of the code that computes one.
"""
