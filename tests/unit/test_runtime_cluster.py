"""The cluster's side of a new driver: whom an earlier one left."""

import logging

from ray.exceptions import RaySystemError

from elastic.runtime.cluster import living


def test_a_named_actor_that_is_dying_or_unknown_is_taken_for_lost_and_said(caplog):
    def actor_of(name: str) -> object:
        if name == "w1":
            raise ValueError("Failed to look up actor with name 'w1'")
        if name == "w2":
            raise RaySystemError("the control store did not answer")
        return name.upper()

    with caplog.at_level(logging.WARNING):
        assert dict(living(["w0", "w1", "w2", "w3"], actor_of)) == {"w0": "W0", "w3": "W3"}
    assert ["w1, which" in caplog.text, "did not answer" in caplog.text] == [True, True]
