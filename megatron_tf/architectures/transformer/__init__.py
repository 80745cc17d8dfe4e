"""The Transformer to compare a TokenFormer with: matrices and a GELU MLP in the same blocks."""
