"""The table of figures: names, formats, and that suites and reports find theirs in it."""

import pytest

from grafting.words import FIGURES, amount, change, duration, number, short, without_empty


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(5.123), "5.12"),
        (number(613.2), "613"),
        (number(0.01234), "0.0123"),
        (number(-0.5), "\u22120.500"),
        (number(0), "0"),
        (number(None), "\u2013"),
        (number(float("nan")), "\u2013"),
        (number(True), "\u2013"),
        (short(0.0001), "1e\u22124"),
        (short(250.0), "250"),
        (short(2.5e7), "2.5e7"),
        (amount(2_634_000), "2.63\u00a0M"),
        (amount(999), "999"),
        (change(90, 100), "\u221210.0\u00a0%"),
        (change(100, 100), "same"),
        (change(350, 100), "+250\u00a0%"),
        (change(1, 0), ""),
        (duration(12.34), "12.3 s"),
        (duration(119.7), "2 min 0 s"),
        (duration(3 * 3600 + 59), "3 h 0 min"),
    ],
)
def test_numbers_in_words(written, expected):
    assert written == expected


def test_no_difference_has_no_sign():
    none = {"value": -0.0, "low": -0.0004, "high": 0.0}
    assert FIGURES["exact"].paired({"paired": {"exact": {"difference": none}}}) == "0.0 points (0.0 to 0.0)"


def test_a_difference_of_shares_is_in_points():
    difference = {"value": -0.1312, "low": -0.148, "high": -0.114}
    assert FIGURES["agreement"].paired({"paired": {"agreement": {"difference": difference}}}) == (
        "\u221213.1 points (\u221214.8 to \u221211.4)"
    )


def test_a_column_that_is_empty_in_all_rows_is_left_out():
    rows = [["x", "", "\u2013", "0"], ["y", "", "", ""]]
    assert without_empty(["a", "b", "c", "d"], rows) == (["a", "d"], [["x", "0"], ["y", ""]])
