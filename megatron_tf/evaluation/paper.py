"""The results of the paper (arXiv 2410.23168), which are shown next to ours.

Zero-shot tasks, Table 1: TokenFormers of configs/pile_*.yml after 300B tokens of the Pile. Accuracies are in percent;
those of HellaSwag and ARC-Challenge are normalised by the length of the answers, as is usual for this set of tasks.
Images: Table 2.
"""

from __future__ import annotations

SIZES = ("150M", "450M", "900M", "1.5B")
ACCURACY_METRICS = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
}
TASKS = tuple(ACCURACY_METRICS)
ACCURACIES = {
    "lambada_openai": (45.0, 57.3, 64.0, 64.7),
    "hellaswag": (35.5, 47.5, 55.3, 60.0),
    "piqa": (64.9, 69.5, 72.4, 74.8),
    "arc_easy": (47.3, 56.2, 59.9, 64.8),
    "arc_challenge": (24.9, 26.7, 30.6, 32.0),
    "winogrande": (50.4, 54.6, 56.4, 59.7),
}
LAMBADA_PERPLEXITY = (16.38, 7.69, 5.46, 5.24)
AVERAGE = (44.7, 52.0, 56.4, 59.3)
# Parameters of configs/vision_*.yml -> name in the paper, and top-1 accuracy in percent on ImageNet-1k
VISION = {
    86_447_848: ("TokenFormer-B/16 of 86M", 82.1),
    114_759_400: ("TokenFormer-B/16 of 109M", 82.5),
    304_007_144: ("TokenFormer-L/16 of 307M", 83.0),
    404_670_440: ("TokenFormer-L/16 of 407M", 83.1),
}
