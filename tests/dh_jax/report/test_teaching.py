"""What a report reads of a run's teacher, and what such a run is called."""

from __future__ import annotations

import json

import pytest

from dh_jax.errors import DataError
from dh_jax.report.finding import moves
from dh_jax.report.teaching import TeachingPoint, named, teaching

PLAIN, LIVE = {"distillation": {"teacher": None, "cache": None}}, {"distillation": {"teacher": "x"}}


def test_records_of_the_teacher_are_read_and_a_broken_one_is_named(tmp_path):
    point = TeachingPoint(4, 0.5, 3.0, 0.25, 2.0, 0.1)
    record = {"kind": "distillation", "alpha": 1.0, "temperature": 1.0} | point._asdict()
    lines = [json.dumps({"kind": "train", "step": 4}), json.dumps(record)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines))
    assert teaching(tmp_path, LIVE) == (point,)
    assert teaching(tmp_path, PLAIN) == teaching(tmp_path, {}) == ()
    assert not point.inside and point._replace(relations=0.1).inside
    del record["relations"], record["hidden"]  # as runs were logged before there were such terms
    path.write_text(json.dumps(record))
    assert teaching(tmp_path, LIVE) == (point,)
    del record["agreement"]
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"metrics\.jsonl line 1.*agreement"):
        teaching(tmp_path, LIVE)


def test_a_distilled_run_is_another_policy_that_does_not_move_the_mixture():
    assert named("static", PLAIN) == "static" and named("static", LIVE) == "static, distilled"
    assert not moves("static") and not moves("static, distilled")
    assert moves("influence") and moves("influence, distilled")
