"""The tables of faults follow the code: every fault can be planted, and its tests are there."""

import run


def test_every_fault_can_be_planted():
    assert len(run.faults_of(run.AREAS, "")) > 300
