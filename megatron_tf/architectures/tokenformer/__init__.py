"""The TokenFormer: every projection is a Pattention. Wang et al., 2024, arXiv 2410.23168."""
