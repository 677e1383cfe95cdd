import math

import pytest
from separata_shared.metrics import Score


def test_a_score_shows_value_unit_signature_and_size() -> None:
    score = Score(31.25, "percent", "BLEU|tok:none", 7)
    assert str(score) == "31.25 percent (BLEU|tok:none, n = 7)"
    assert score.as_dict() == {
        "value": 31.25,
        "unit": "percent",
        "signature": "BLEU|tok:none",
        "n": 7,
    }


@pytest.mark.parametrize(("value", "n"), [(math.nan, 3), (1.0, 0)])
def test_a_score_of_nothing_is_refused(value: float, n: int) -> None:
    with pytest.raises(ValueError, match="MRR: "):
        Score(value, "fraction", "MRR", n)
