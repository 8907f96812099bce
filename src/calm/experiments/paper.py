"""Tables 1-5 of the paper (Bansal et al. 2024, arXiv 2401.02412v1): its numbers, under our names of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SOURCE = "Bansal et al. 2024, arXiv 2401.02412v1"

BEFORE = "m_A before its specialist training"
"""PaLM2-XXS alone, which is no method of ours."""


@dataclass(frozen=True)
class PaperTable:
    """One table, or one half of it.

    Attributes:
        number: Of the table in the paper.
        title: What it measures, metric and models included.
        columns: Tasks; of Table 1 methods, as in the paper.
        rows: By method, or `BEFORE` (of Table 1 by task), a number for each column.
        domains: Whose results stand beside it; none where no domain of ours has such a task.
    """

    number: int
    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    domains: tuple[str, ...]


_FLORES = ("lij", "mr", "taq", "nn", "su", "ban", "pl", "th", "min", "acm", "average")
_LOW = ("meo", "mfa", "pcm", "efi", "min", "ilo", "ady", "mai", "nso", "mzn", "average")
_HIGH = ("en", "te", "bn", "sw", "ja", "zh", "th", "fr", "es", "de", "average")

TABLES = (
    PaperTable(
        1,
        "key-value arithmetic, accuracy in %; m_A is a PaLM2-XXS, m_B PaLM2-XS",
        ("m_A", "m_B", "composed"),
        {"KV-SUBS": (98.1, 0.0, 92.9), "NUM-MATH": (4.2, 73.7, 72.0), "KV-MATH": (0.7, 0.0, 84.3)},
        ("key_value_arithmetic",),
    ),
    PaperTable(
        2,
        "FLORES-200, translation into English, chrF1, 10 of 192 languages (in 175 composed is better than m_B); "
        "m_A is a PaLM2-XXS, m_B PaLM2-S",
        _FLORES,
        {
            BEFORE: (24.0, 16.5, 21.6, 33.3, 20.6, 2.1, 5.3, 63.2, 44.0, 59.8, 29.0),
            "m_A": (32.0, 21.6, 46.9, 50.0, 40.6, 4.1, 4.0, 63.8, 47.8, 61.1, 37.2),
            "m_B": (32.6, 24.2, 44.6, 50.8, 50.9, 5.4, 9.5, 69.0, 61.0, 68.6, 41.7),
            "composed": (44.1, 30.4, 55.1, 54.6, 54.4, 11.8, 11.3, 69.4, 61.1, 68.9, 46.1),
            "full_on_all": (48.1, 39.1, 59.2, 57.5, 57.3, 11.4, 9.9, 69.4, 61.4, 69.0, 48.2),
        },
        ("low_resource",),
    ),
    PaperTable(
        3,
        "grade-school maths in low-resource languages, accuracy in %",
        _LOW,
        {
            BEFORE: (5.2, 6.8, 6.8, 4.0, 5.6, 7.2, 6.0, 3.6, 7.2, 6.8, 5.9),
            "m_A": (7.6, 4.0, 4.4, 3.2, 6.0, 4.8, 6.4, 3.2, 6.0, 4.8, 5.0),
            "m_B": (28.8, 14.0, 34.4, 14.8, 25.2, 14.8, 30.0, 22.8, 8.4, 31.6, 22.5),
            "composed": (34.0, 17.6, 33.6, 18.0, 23.6, 16.8, 36.4, 24.8, 8.4, 36.4, 25.0),
            "full_on_all": (33.2, 20.4, 31.6, 14.0, 24.8, 14.0, 29.2, 21.2, 9.6, 27.6, 22.6),
        },
        (),
    ),
    PaperTable(
        3,
        "grade-school maths in high-resource languages, accuracy in %",
        _HIGH,
        {
            BEFORE: (5.6, 4.0, 2.0, 7.6, 2.0, 4.4, 6.0, 6.8, 5.6, 9.2, 5.3),
            "m_A": (4.8, 3.6, 3.2, 4.8, 3.2, 7.6, 6.4, 9.2, 5.6, 7.2, 5.6),
            "m_B": (36.8, 19.2, 23.2, 16.0, 2.0, 39.2, 29.6, 38.0, 32.4, 43.2, 28.0),
            "composed": (37.2, 28.0, 27.2, 18.0, 2.4, 43.6, 33.2, 42.8, 36.0, 49.2, 31.8),
            "full_on_all": (36.0, 17.6, 18.4, 14.4, 0.8, 33.6, 27.2, 34.8, 31.2, 42.0, 25.6),
        },
        (),
    ),
    PaperTable(
        4,
        "code: HumanEval and MBPP, pass@1 in %; code to text by language, chrF1; m_A is a PaLM2-XXS, m_B PaLM2-S",
        ("HumanEval", "MBPP", "Python", "PHP", "Go", "Java", "JS", "Ruby"),
        {
            "m_A": (19.5, 28.0, 28.0, 34.7, 32.6, 29.6, 26.5, 26.0),
            "m_B": (16.4, 28.6, 30.4, 35.5, 40.4, 31.0, 28.8, 27.9),
            "composed": (22.5, 32.2, 30.5, 35.8, 40.6, 31.4, 29.3, 29.0),
            "full_on_all": (24.3, 43.0, 18.9, 35.0, 41.1, 31.1, 20.2, 27.6),
        },
        ("code",),
    ),
    PaperTable(
        5,
        "ablations, tasks across where the paper has them down: FLORES-200 (chrF1), grade-school maths in low- and "
        "high-resource languages (accuracy in %), each with in how many of 192, 25 and 11 languages the method is "
        "better than m_B; HumanEval and MBPP (pass@1 in %), CodeXGLUE (chrF1)",
        ("FLORES", "of 192", "maths, low", "of 25", "maths, high", "of 11", "HumanEval", "MBPP", "CodeXGLUE"),
        {
            "composed": (60.5, 175, 21.4, 20, 33.1, 11, 22.5, 32.2, 32.6),
            "vanilla_m_A": (59.2, 115, 19.0, 15, 29.7, 8, 20.0, 28.0, 32.2),
            "random_m_A": (58.8, 43, 17.8, 9, 28.5, 4, 20.1, 27.0, 32.1),
            "encoder_m_A": (59.3, 102, 19.1, 12, 29.1, 6, 16.0, 27.0, 32.0),
            "lora": (59.2, 82, 20.9, 15, 31.2, 9, 18.3, 28.7, 32.6),
            "full_on_all": (62.1, 171, 19.8, 15, 27.1, 1, 24.3, 43.0, 29.0),
        },
        ("key_value_arithmetic", "low_resource", "code"),
    ),
)
