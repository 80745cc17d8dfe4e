"""θ of Pattention: how scores over the parameter tokens become their weights. One object an activation.

`base` has what the package knows of an activation without torch, `built_in` the package's own, `function` what each
computes.
"""
