"""Ten faults of a GRPO step's wiring are noticed; `python -m tests.mutants` tries all there are."""
import mutants
import pytest

WIRING = [fault for fault in mutants.FAULTS if fault.file == "grpo.py"][:10]


@pytest.mark.parametrize("fault", WIRING, ids=lambda fault: fault.what)
def test_a_fault_is_noticed(fault):
    """Sign, pairing, noise, minibatches: each once survived the whole suite."""
    assert mutants.kill(fault)


def test_there_are_many_and_each_stands_once():
    """A fault whose line was rewritten breaks nothing any more."""
    assert len(mutants.FAULTS) >= 60
    for fault in mutants.FAULTS:
        text = (mutants.ROOT / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1 and fault.new not in ("", fault.old) or not fault.new
