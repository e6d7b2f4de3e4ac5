"""Detection figures on small known rankings, and bad input."""

import numpy as np
import pytest

from finfluence.errors import InputError
from finfluence.influence import detection


def test_known_ranking():
    found = detection([4.0, 3.0, 2.0, 1.0], [1, 0, 1, 0])
    assert found.auroc == 0.75
    assert found.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert found.prevalence == 0.5
    assert str(found) == "AUROC 0.750, average precision 0.833 (chance 0.500)"


@pytest.mark.parametrize(
    ("score", "planted", "message"),
    [
        ([1.0], [1, 0], "shapes"),
        ([1.0, np.nan], [1, 0], "1 scores are not finite"),
        ([1.0, 2.0], [0, 0], "0 of 2"),
        ([1.0, 2.0], [1, 1], "2 of 2"),
    ],
)
def test_bad_detection(score, planted, message):
    with pytest.raises(InputError, match=message):
        detection(score, planted)
