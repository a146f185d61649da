"""What is said of MorphSeek's claims: intervals over cases, Holm's correction, both measures of folding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch  # noqa: F401 (before SciPy, whose OpenMP is another)
from claims import compared, holm, judged, markdown, weights


def table(dice, folded, cases: int = 6, **more: float) -> list[dict]:
    """Every ordered pair of some cases, by functions of the two numbers."""
    return [
        {"fixed": str(f), "moving": str(m), "dice": dice(f, m), "folded_percent": folded(f, m), "njd_percent": 0.0}
        | more
        for f, m in itertools.permutations(range(cases), 2)
    ]


def test_what_is_the_same_everywhere_has_no_width():
    base = table(lambda f, m: 0.5 + f / 100, lambda f, m: 1.0 + m, njd_percent=2.0)
    new = table(lambda f, m: 0.53 + f / 100, lambda f, m: 0.5 * (1.0 + m), njd_percent=1.0)
    row = compared(new, base, draws=500)
    assert row["dice"]["mean"] == pytest.approx(0.03)
    assert row["dice"]["interval"] == pytest.approx([0.03, 0.03])
    assert row["folded_percent"]["interval"] == pytest.approx([0.5, 0.5])
    assert (row["pairs"], row["cases"], row["reached"], row["shown"]) == (30, 6, True, True)
    assert row["p"] == pytest.approx(2 / 500), "no draw is on the other side"


def test_cases_are_drawn_and_not_pairs():
    """Where a case decides the difference, 30 pairs of 6 cases are no 30 measurements."""
    base = table(lambda f, m: 0.5, lambda f, m: 0.0)
    new = table(lambda f, m: 0.5 + 0.1 * (f == 0), lambda f, m: 0.0)
    row = compared(new, base, draws=4000)
    gains = np.array([one["dice"] - 0.5 for one in new])
    by_pairs = np.random.default_rng(0).choice(gains, (4000, 30)).mean(axis=1)
    width = np.ptp(row["dice"]["interval"])
    assert width > 1.5 * np.ptp(np.quantile(by_pairs, (0.025, 0.975)))
    assert not row["shown"]
    drawn = weights(new, 50)
    assert drawn.shape[1] == 30
    assert (drawn.sum(axis=1) > 0).all()


def test_folding_is_asked_of_both_measures():
    base = table(lambda f, m: 0.5, lambda f, m: 1.0, njd_percent=1.0)
    new = table(lambda f, m: 0.6, lambda f, m: 0.1, njd_percent=0.9)
    assert not compared(new, base, draws=200)["reached"]
    nothing = table(lambda f, m: 0.5, lambda f, m: 0.0)
    row = compared(table(lambda f, m: 0.6, lambda f, m: 0.0), nothing, draws=200)
    assert (row["njd_percent"]["less"], row["reached"]) == (None, False)
    with pytest.raises(ValueError, match="same pairs"):
        compared(new, base[1:], draws=200)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def test_seeds_are_averaged_and_every_row_is_told():
    runs = [
        {
            "runs": {
                f"organ/net/{arm}": {"pairs": table(lambda f, m, s=shift: 0.5 + s, lambda f, m, d=fold: d)}
                for arm, shift, fold in (("soft-dice", 0.0, 1.0), ("morphseek", gain, 0.2), ("soft-dice-3", 0.03, 0.0))
            }
        }
        for gain in (0.02, 0.04)
    ]
    rows = judged(runs, draws=200)
    assert list(rows) == ["organ, net, the best form over one step", "organ, net, the best form over three steps"]
    one, three = rows.values()
    assert one["dice"]["mean"] == pytest.approx(0.03)
    assert three["dice"]["mean"] == pytest.approx(0.0, abs=1e-12)
    text = markdown(rows, 2)
    assert "| 30 (6) | +3.0 (+3.0 to +3.0) |" in text
    assert "0 → 0.2 %" in text
    with pytest.raises(ValueError, match="other pairs"):
        judged([runs[0], {"runs": {name: {"pairs": run["pairs"][::-1]} for name, run in runs[1]["runs"].items()}}])
