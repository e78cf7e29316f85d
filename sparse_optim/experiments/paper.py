"""The figures that the papers print, in per cent.

ID3: Agarwal et al. 2025, TACL 13:1767-1788. Averages are those of the paper: some differ by up to
half a point from the mean of the printed columns. Budgets of 184M and 1.33M are the whole model and
LoRA of rank 8; 201M is printed both for Pfeiffer's adapters and for LoRA of rank 32.
"""

from __future__ import annotations

from collections.abc import Mapping

GLUE_COLUMNS = ("mnli", "mnli-mm", "qqp", "qnli", "sst2", "stsb", "cola", "mrpc", "rte", "average")
MATH_COLUMNS = ("AddSub", "MultiArith", "SingleEq", "gsm8k", "AQuA", "SVAMP", "average")
NER_COLUMNS = ("conll2003",)


def table(
    columns: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]
) -> dict[str, dict[str, float]]:
    """Rows by label, their figures by column."""
    return {label: dict(zip(columns, row, strict=True)) for label, row in rows.items()}


# Tables 1 and 2: DeBERTa-v3-base on the development sets of GLUE.
GLUE = table(
    GLUE_COLUMNS,
    {
        "full": (90.34, 90.51, 92.11, 94.24, 96.33, 91.04, 71.43, 89.95, 83.75, 88.86),
        "r-mask-103K": (85.18, 85.87, 87.09, 89.31, 93.61, 84.05, 61.14, 78.59, 60.53, 80.60),
        "fish-103K": (88.14, 88.36, 87.50, 92.29, 95.22, 91.68, 69.16, 90.52, 84.72, 86.95),
        "pafi-103K": (88.21, 88.29, 89.30, 93.63, 95.84, 89.97, 68.45, 90.20, 81.83, 86.97),
        "bitfit": (88.64, 88.39, 88.94, 93.26, 95.38, 89.80, 69.08, 89.54, 80.87, 86.43),
        "id3-103K": (89.38, 89.64, 89.97, 93.67, 95.64, 92.10, 70.62, 91.01, 87.12, 88.13),
        "r-mask-320K": (88.30, 88.33, 89.07, 92.30, 95.30, 88.26, 66.19, 86.11, 74.73, 85.40),
        "fish-320K": (88.99, 89.70, 88.92, 93.99, 95.60, 92.09, 69.79, 90.69, 87.85, 88.07),
        "pafi-320K": (89.61, 89.73, 90.35, 93.93, 96.14, 90.37, 68.91, 90.52, 81.59, 87.68),
        "id3-320K": (89.73, 89.91, 90.42, 94.06, 95.95, 92.07, 72.07, 91.26, 87.73, 89.15),
        "lora-r8": (90.47, 90.46, 91.95, 93.76, 95.57, 91.86, 69.73, 89.71, 85.32, 88.76),
        "pafi+lora-r8-320K": (90.12, 90.06, 91.61, 94.31, 96.03, 91.19, 70.5, 90.28, 84.72, 88.76),
        "id3+lora-r8-320K": (90.26, 90.18, 91.48, 94.17, 95.76, 91.65, 69.07, 90.69, 87.12, 88.93),
    },
)

# Table 3: RoBERTa-base with Pfeiffer adapters.
ADAPTERS = table(
    ("stsb", "cola", "mrpc", "rte", "average"),
    {
        "pfeiffer-r10897": (90.78, 59.05, 89.21, 76.53, 78.89),
        "sparse-adapter+pfeiffer-r10897-8M": (90.88, 58.95, 89.41, 77.03, 79.07),
        "id3+pfeiffer-r10897-8M": (90.71, 59.84, 89.95, 79.42, 79.98),
    },
)

# Table 4: DeBERTa-v3-base, F1.
NER = table(
    NER_COLUMNS,
    {
        label: (score,)
        for label, score in {
            "full": 96.69,
            "r-mask-103K": 85.42,
            "fish-103K": 95.43,
            "pafi-103K": 95.23,
            "bitfit": 94.62,
            "id3-103K": 95.86,
            "r-mask-320K": 93.74,
            "fish-320K": 95.99,
            "pafi-320K": 96.04,
            "id3-320K": 96.17,
        }.items()
    },
)

# Table 5: Llama-7B with LoRA, trained on Math10K. The budgets are 3.5M and 7M entries there.
MATH = table(
    MATH_COLUMNS,
    {
        "lora-r32": (81.3, 95.5, 81.7, 34.1, 17.7, 46.7, 59.5),
        "lora-r2": (78.2, 96.7, 76.6, 35.3, 16.9, 44.9, 58.1),
        "pafi+lora-r32-6.25%": (78.7, 92.3, 76.8, 33.9, 16.9, 43.2, 57.0),
        "id3+lora-r32-6.25%": (80.7, 95.8, 79.3, 34.3, 15.7, 45.7, 58.6),
        "lora-r4": (79.2, 94.8, 77.9, 36.9, 17.3, 45.0, 58.5),
        "pafi+lora-r32-12.5%": (75.7, 92.3, 76.2, 34.9, 16.5, 42.9, 56.4),
        "id3+lora-r32-12.5%": (79.5, 94.8, 79.7, 38.3, 15.0, 47.2, 59.1),
    },
)
