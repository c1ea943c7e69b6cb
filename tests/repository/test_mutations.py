"""The table of plausible faults (tests/mutations) fits the code: each can still be planted."""

import pytest
from mutations.faults import FAULTS
from support.paths import ROOT


def test_there_are_many_faults_of_different_names():
    assert len(FAULTS) >= 80
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_at_one_place_and_leaves_a_program(fault):
    text = (ROOT / fault.file).read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has changed; correct or delete this fault"
    planted = text.replace(fault.old, fault.new)
    assert planted != text
    compile(planted, fault.file, "exec")
    for path in fault.tests.split():
        assert (ROOT / path.partition("::")[0]).exists(), path
