"""What a driver refuses before it starts anything."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

import elastic
from tests.fault.elastic_job import Settings
from tests.fault.elastic_orders import tiny_order


def test_settings_that_cannot_travel_to_a_worker_are_refused_by_name_before_anything_starts(
    tmp_path: Path,
) -> None:
    order = tiny_order(tmp_path, "stuck", Settings(), num_steps=1)
    order = replace(order, job=replace(order.job, settings={"lock": threading.Lock()}))
    with pytest.raises(elastic.JobRejected, match=r"job\.settings\.lock cannot travel.*TypeError"):
        elastic.train(order, lambda _: None)
    assert not order.run_dir.exists()


def test_only_a_run_that_has_begun_can_be_resized(tmp_path: Path) -> None:
    with pytest.raises(elastic.RunGone, match="nothing to resize"):
        elastic.resize(tmp_path / "none", 2)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ValueError, match="at least one worker"):
        elastic.resize(tmp_path, 0)
    elastic.resize(tmp_path, 2)
    assert (tmp_path / "workers").read_text() == "2"
