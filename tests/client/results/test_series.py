"""Slices of a series: their order, what lacks, and what they say together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chestct.imaging.metadata import SliceMetadata
from chestct.results.series import (
    SeriesSlice,
    gaps_mm,
    group_series,
    num_top_slices,
    series_record,
    series_warnings,
    sort_slices,
)


def at(position_mm: float | None, cancer: float = 0.1, **changes: Any) -> SeriesSlice:
    facts = SliceMetadata(
        study_uid="1.2.3",
        series_uid="1.2.3.4",
        sop_uid=f"1.2.3.4.{position_mm}",
        frame_of_reference_uid="1.9",
        position_mm=position_mm,
        thickness_mm=5.0,
        kernel="B40f",
    )
    item = SeriesSlice(
        f"study/{position_mm}.dcm", {"cancer": cancer, "normal": 1 - cancer}, True, facts
    )
    for name, value in changes.items():
        if hasattr(facts, name):
            item = replace(item, facts=replace(item.facts, **{name: value}))
        else:
            item = replace(item, **{name: value})
    return item


CHEST = [at(5 * number) for number in range(60)]


def test_slices_are_sorted_by_position_then_by_number() -> None:
    loose = [at(None, instance=2, path="c"), at(None, instance=1, path="d")]
    mixed = [loose[0], at(10), at(-20), loose[1], at(3.5)]
    assert [item.facts.position_mm for item in sort_slices(mixed)] == [-20, 3.5, 10, None, None]
    assert [item.path for item in sort_slices(mixed)][3:] == ["d", "c"]
    repeated = [at(5, path="b", frame=2), at(5, path="a", frame=3), at(5, path="c", frame=1)]
    assert [item.path for item in sort_slices(repeated)] == ["c", "b", "a"]


def test_slices_are_grouped_by_series() -> None:
    other = at(1, series_uid="1.2.9")
    none = at(2, series_uid="")
    assert group_series([CHEST[0], other, none, CHEST[1]]) == {
        "1.2.3.4": CHEST[:2],
        "1.2.9": [other],
    }


def test_a_whole_series_has_no_warnings() -> None:
    assert series_warnings(CHEST) == []
    assert gaps_mm(CHEST) == []


def test_gaps_are_found_whatever_the_order() -> None:
    holed = [item for item in CHEST if item.facts.position_mm not in (50, 100, 105)]
    assert gaps_mm(holed[::-1]) == [(45, 55), (95, 110)]
    assert series_warnings(holed) == ["gaps: 2 between neighbouring slices, the widest 15.0 mm"]


def test_uneven_distances_below_the_limit_are_no_gap() -> None:
    assert gaps_mm([at(0), at(5), at(10), at(17), at(22)]) == []
    assert gaps_mm([at(0), at(5), at(10), at(18), at(23)]) == [(10, 18)]
    assert gaps_mm([at(3)]) == gaps_mm([]) == gaps_mm([at(None), at(None)]) == []


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        (at(5, sop_uid="1.7"), "repeated positions: 1 slices lie where another one does"),
        (at(None), "no position: 1 of 61 slices do not tell theirs"),
        (at(300, kernel="B70f"), "mixed kernels: B40f (60), B70f (1)"),
        (at(300, kernel=""), "mixed kernels: B40f (60), unknown (1)"),
        (at(300, thickness_mm=1.0), "mixed slice thicknesses in mm: 5.0 (60), 1.0 (1)"),
        (
            at(300, frame_of_reference_uid="1.8"),
            "several frames of reference: positions may not be comparable",
        ),
    ],
)
def test_what_makes_a_series_doubtful(changed: SeriesSlice, warning: str) -> None:
    assert series_warnings([*CHEST, changed]) == [warning]


def test_few_slices_are_doubtful() -> None:
    assert series_warnings(CHEST[:9]) == ["few slices: 9, expected at least 10 of a chest"]
    assert series_warnings(CHEST[:10]) == []


@pytest.mark.parametrize(
    ("num_in_domain", "expected"),
    [(1, 1), (2, 2), (3, 3), (30, 3), (31, 4), (60, 6), (61, 7), (1000, 100)],
)
def test_a_tenth_of_the_slices_speaks_but_at_least_three(num_in_domain: int, expected: int) -> None:
    assert num_top_slices(num_in_domain) == expected


def test_record_of_a_series() -> None:
    slices = [at(5 * number, cancer=0.2) for number in range(40)]
    slices[20:24] = [at(100, 0.7), at(105, 0.9), at(110, 0.8), at(115, 0.6)]
    record = series_record(slices[::-1])
    assert record == {
        "path": "study",
        "status": "ok",
        "label": "cancer",
        # (0.9 + 0.8 + 0.7 + 0.6) / 4, of the four that are a tenth of 40
        "probabilities": {"cancer": 0.75, "normal": 0.25},
        "aggregation": {
            "rule": "mean of the slices with most evidence against normal",
            "num_slices": 4,
        },
        "slice": {"path": "study/105.dcm", "position_mm": 105, "evidence": 0.9},
        "num_slices": 40,
        "num_out_of_domain": 0,
        "num_failed": 0,
        "kernel": "B40f",
        "gaps_mm": [],
        "warnings": [],
        "notice": "Research use only. Not a medical device.",
    }


def test_one_mistaken_slice_decides_nothing() -> None:
    slices = [at(5 * number, cancer=0.02) for number in range(30)]
    slices[4] = at(20, 0.99)
    record = series_record(slices)
    assert record["label"] == "normal"
    assert record["slice"]["path"] == "study/20.dcm"


def test_slices_out_of_domain_are_counted_and_left_out() -> None:
    slices = [at(5 * number, 0.1) for number in range(12)]
    slices += [at(60 + 5 * number, 0.99, in_domain=False) for number in range(5)]
    record = series_record(slices, num_failed=2)
    assert record["label"] == "normal"
    assert record["probabilities"] == {"cancer": 0.1, "normal": 0.9}
    assert (record["num_slices"], record["num_out_of_domain"], record["num_failed"]) == (17, 5, 2)
    assert record["warnings"] == ["unreadable: 2 slices of the series are missing here"]


def test_series_with_nothing_in_domain_has_no_label() -> None:
    record = series_record([replace(item, in_domain=False) for item in CHEST])
    assert record["status"] == "error"
    assert record["error"]["type"] == "OutOfDomainError"
    assert "none of its 60 slices" in record["error"]["message"]
    assert not {"label", "probabilities", "slice", "aggregation"} & set(record)


def test_copies_of_a_slice_count_once() -> None:
    copies = [replace(item, path=f"copy/{item.path}") for item in CHEST[:5]]
    record = series_record([*CHEST, *copies])
    assert record["num_slices"] == 60
    assert record["warnings"] == ["copies: 5 slices occur again and count once"]


def test_model_without_normal_takes_the_mean_of_all() -> None:
    slices = [
        replace(at(5 * n), probabilities={"benign": 0.4 + 0.01 * n, "malignant": 0.6 - 0.01 * n})
        for n in range(11)
    ]
    record = series_record(slices)
    assert record["probabilities"] == {"benign": 0.45, "malignant": 0.55}
    assert record["aggregation"] == {"rule": "mean of all slices in domain", "num_slices": 11}
    assert record["slice"] == {"path": "study/0.dcm", "position_mm": 0}


def test_uids_only_if_asked_for() -> None:
    assert "1.2.3" not in repr(series_record(CHEST))
    record = series_record(CHEST, with_uids=True)
    assert (record["study_uid"], record["series_uid"]) == ("1.2.3", "1.2.3.4")


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/b/1.dcm", "a/b/2.dcm"], "a/b"),
        (["a/b/1.dcm", "a/c/2.dcm"], "a"),
        (["1.dcm", "2.dcm"], "."),
        (["/x/1.dcm", "2.dcm"], "."),
        (["/x/run.dcm#1", "/x/run.dcm#2"], "/x/run.dcm"),
        (["/x/one.dcm"], "/x/one.dcm"),
        (["s.zip!a/1", "s.zip!a/2"], "s.zip!a"),
        (["s.zip!1", "s.zip!2"], "s.zip"),
    ],
)
def test_path_of_a_series_is_what_holds_its_slices(paths: list[str], expected: str) -> None:
    slices = [at(number, path=path) for number, path in enumerate(paths)]
    assert series_record(slices)["path"] == expected


def test_nothing_is_no_series() -> None:
    with pytest.raises(ValueError, match="a series without slices"):
        series_record([])


@given(
    st.lists(
        st.tuples(
            st.floats(-1000, 1000) | st.none(), st.floats(0, 1), st.booleans(), st.integers(0, 9)
        ),
        min_size=1,
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_order_of_the_files_makes_no_difference(items: list[Any], shuffle: Any) -> None:
    slices = [
        at(position, cancer, in_domain=fit, instance=number, sop_uid=f"1.{place}", path=f"{place}")
        for place, (position, cancer, fit, number) in enumerate(items)
    ]
    record = series_record(slices)
    shuffle.shuffle(slices)
    assert series_record(slices) == record
    if record["status"] == "ok":
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        evidence = record["slice"]["evidence"]
        assert evidence == pytest.approx(
            max(s.non_normal_probability for s in slices if s.in_domain), abs=1e-6
        )
