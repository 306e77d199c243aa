"""The loader over many samples: as fast as raw WebDataset, and as large at the end as at the beginning."""

import statistics

import pytest

from benchmarks.loader import GROWTH, compare, index_times, long_run, write_tars


def check_long_run(found) -> None:
    assert found["growth"] < GROWTH, found["megabytes"]
    before, after = found["file_descriptors"]
    assert after <= before


def test_ten_thousand_samples(tmp_path):
    """The reduced form: speed is only told, since tests share their machine."""
    write_tars(tmp_path, 10_000, 1000)
    index = index_times(tmp_path)
    assert index["samples_per_second"] > 0
    found = long_run(sorted(tmp_path.glob("*.tar")), 16, 2, looks=40)
    assert found["samples"] == 10_000
    check_long_run(found)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_million_samples(tmp_path):
    write_tars(tmp_path, 1_000_000, 10_000)
    index_times(tmp_path)
    tars = sorted(tmp_path.glob("*.tar"))
    assert statistics.median(own / other for own, other in compare(tars, 64, 2)) >= 1.0
    found = long_run(tars, 64, 2)
    assert found["samples"] == 1_000_000
    check_long_run(found)
