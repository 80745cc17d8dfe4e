"""What is kept of every parameter while it is trained: the fp32 master weight and Adam's moments, by these names."""

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)
