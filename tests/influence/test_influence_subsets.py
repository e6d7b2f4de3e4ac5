"""Ids to codes, and every kind of bad subset with a one-line message that names the value."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finfluence.errors import InputError
from finfluence.influence import SampleIndex

STRINGS = ["b", "a", "d", "c"]


@settings(max_examples=80, deadline=None)
@given(
    ids=st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 30), min_size=2, max_size=30, unique=True),
    data=st.data(),
)
def test_codes_and_sums_equal_a_dictionary(ids, data):
    index = SampleIndex(np.array(ids))
    some = st.lists(st.sampled_from(ids), min_size=1, max_size=len(ids) - 1, unique=True)
    subsets = data.draw(st.lists(some, min_size=1, max_size=5))
    packed = index.pack(subsets)
    values = np.arange(len(ids)) ** 2.0
    place = {sample: code for code, sample in enumerate(ids)}
    expected = [sum(values[place[sample]] for sample in subset) for subset in subsets]
    np.testing.assert_allclose(packed.sums(values), expected)
    assert packed.names == list(range(len(subsets)))
    for row, subset in enumerate(subsets):
        assert packed.codes_of(row).tolist() == [place[sample] for sample in subset]


@pytest.mark.parametrize("ids", [STRINGS, np.array(STRINGS), pl.Series(STRINGS)])
def test_string_ids(ids):
    index = SampleIndex(ids)
    assert index.codes(["c", "a"]).tolist() == [3, 1]
    packed = index.pack({"x": np.array(["a"]), "y": pl.Series(["d", "b"]), "z": {"c", "a"}})
    assert packed.codes.tolist() == [1, 2, 0, 1, 3]
    assert packed.names == ["x", "y", "z"]


@pytest.mark.parametrize("ids", [4, range(4), np.array([0, 10**12, 5, 7]), np.array([3, 2, 1, 0], dtype=np.uint8)])
def test_integer_ids_dense_and_sparse(ids):
    index = SampleIndex(ids)
    assert index.codes(index.ids.gather([2, 0])).tolist() == [2, 0]
    assert len(index.codes(np.array([], dtype=np.int64))) == 0
    with pytest.raises(InputError, match="sample id 99 is not in the run"):
        index.codes([99])
    with pytest.raises(InputError, match="sample id -1 is not"):
        index.codes([-1])


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ({}, "no subsets"),
        ([], "no subsets"),
        ({"web": []}, "subset 'web' is empty"),
        ({"ok": [1], "all": [0, 1, 2, 3]}, "subset 'all' is the whole training set of 4"),
        ({"web": [0, 77, 88]}, "sample id 77 is not in the run \\(2 unknown"),
        ({"ok": [2, 1], "web": [1, 2, 1]}, "subset 'web' holds sample id 1 more than once"),
        ({"web": ["1"]}, "sample id '1' has type"),
        ({"web": [0.5]}, "0.5"),
        ({"web": "01"}, "subset 'web' is not a sequence"),
        ({"web": 3}, "subset 'web' is not a sequence"),
        ({"web": np.zeros((2, 2), dtype=int)}, "shape \\(2, 2\\)"),
        ({"web": [None, 1]}, "type"),
    ],
)
def test_bad_subsets_of_integers(subsets, message):
    with pytest.raises(InputError, match=message) as error:
        SampleIndex(4).pack(subsets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ({"web": ["a", "zz"]}, "sample id 'zz' is not in the run"),
        ({"web": [1, 2]}, "the run's ids are strings"),
        ({"web": ["a", "a"]}, "holds sample id 'a' more than once"),
        ({"ok": ["a"], "web": [1]}, "sample id 1 has type"),
    ],
)
def test_bad_subsets_of_strings(subsets, message):
    with pytest.raises(InputError, match=message) as error:
        SampleIndex(STRINGS).pack(subsets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 2, 1], "id 1 occurs more"), (["a", None], "null"), ([0.5, 1.5], "Float64"), (["a", "a"], "'a' occurs")],
)
def test_bad_indices(ids, message):
    with pytest.raises(InputError, match=message):
        SampleIndex(ids)
