"""The Transformer, to compare a TokenFormer with: matrices and a GELU MLP in otherwise equal blocks."""
