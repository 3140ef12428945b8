"""The window from Hounsfield units to grey levels, by hand and by properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from chestct.contract import LUNG_WINDOW, Window
from chestct.imaging.window import apply_window
from tests.support.scan_files import hu_slice


@pytest.mark.parametrize(
    ("hu", "expected"),
    [
        # Centre -600.5 and width 1499 after the corrections of C.11.2.1.2.1:
        # floor -600.5 - 749.5 = -1350, ceiling -600.5 + 749.5 = 149.
        (-3000, 0),
        (-1350, 0),  # the floor
        (-1349, 0),  # 1 * 255 / 1499 = 0.17
        (-1348, 0),  # 2 * 255 / 1499 = 0.34
        (-1347, 1),  # 3 * 255 / 1499 = 0.51
        (-601, 127),  # 749 * 255 / 1499 = 127.41
        (-600, 128),  # 750 * 255 / 1499 = 127.59
        (147, 255),  # 1497 * 255 / 1499 = 254.66
        (146, 254),  # 1496 * 255 / 1499 = 254.49
        (149, 255),  # the ceiling
        (150, 255),
        (3000, 255),
    ],
)
def test_lung_window_by_hand(hu: int, expected: int) -> None:
    for dtype in (np.int16, np.float32, np.float64):
        assert apply_window(np.array([hu], dtype), LUNG_WINDOW)[0] == expected


def test_halves_are_rounded_up() -> None:
    # Centre 0 and width 510: floor -255, so HU x becomes (x + 255) / 2.
    hu = np.array([-255, -254, -253, -252, 254])
    assert apply_window(hu, Window(0.5, 511)).tolist() == [0, 1, 1, 2, 255]


def test_narrowest_window_is_a_threshold() -> None:
    assert apply_window(np.array([39, 40, 41]), Window(40, 1)).tolist() == [0, 255, 255]


@settings(deadline=None)
@given(
    hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-32768, 65535)),
    st.floats(-2000, 2000),
    st.floats(1, 5000),
)
def test_window_is_monotone_and_reaches_both_ends(
    hu: np.ndarray, center: float, width: float
) -> None:
    hu = np.concatenate([np.sort(hu), [center + width]])
    shown = apply_window(hu, Window(center, width))
    assert shown.dtype == np.uint8
    assert (np.diff(shown.astype(int)) >= 0).all()
    assert shown[-1] == 255
    assert apply_window(np.array([center - width]), Window(center, width))[0] == 0


def test_window_leaves_its_input_alone() -> None:
    hu = hu_slice().astype(np.float64)
    before = hu.copy()
    apply_window(hu, LUNG_WINDOW)
    np.testing.assert_array_equal(hu, before)
