"""The costs that the tests print at their end are added up by file and by method."""

from types import SimpleNamespace

import pytest
from costs import BUDGET, FILES, Costs, method_of, spent


@pytest.mark.parametrize(
    ("nodeid", "method"),
    [
        ("tests/methods/test_token_prepending.py::test_one[case]", "token-prepending"),
        ("tests/contract/test_outputs.py::test_one[pre-llama-left]", "pre"),
        ("tests/contract/test_outputs.py::test_one[deep-prompt-qwen2_vl-left]", "deep-prompt"),
        ("tests/contract/test_methods.py::test_json[minicache]", "minicache"),
        ("tests/contract/test_training.py::test_one[TokenRouter-ftp-llama]", None),  # one for a role, however many methods there are
        ("tests/contract/test_outputs.py::test_one[probe-drop-llama]", None),
        ("tests/engine/test_cache.py::test_one", None),
    ],
)
def test_a_test_belongs_to_the_method_that_it_is_there_for(nodeid, method):
    assert method_of(nodeid) == method


def lines(*reports):
    costs = Costs()
    for report in reports:
        costs.pytest_runtest_logreport(SimpleNamespace(**report))
    return costs.lines()


def test_phases_files_and_methods_are_added_up():
    one, other = "tests/methods/test_ftp.py::test_one", "tests/contract/test_outputs.py::test_one[ftp-llama]"
    told = lines({"nodeid": one, "cpu": 1.0}, {"nodeid": one, "cpu": 2.0}, {"nodeid": other, "cpu": BUDGET}, {"nodeid": other + "x"})
    assert told[0].split() == ["5.0", "tests/contract/test_outputs.py"] and told[1].split() == ["3.0", "tests/methods/test_ftp.py"]
    assert told[2].split() == ["8.0", "all", "2", "files,", "3", "tests"]
    assert told[3].endswith("in the middle of 1; 1 over 5: ftp 8.0")


def test_the_slowest_files_are_shown():
    told = lines(*({"nodeid": f"tests/engine/test_{i}.py::test_one", "cpu": float(i)} for i in range(20)))
    assert [float(line.split()[0]) for line in told[:-1]] == [float(i) for i in range(19, 19 - FILES, -1)]


def test_a_phase_costs_what_it_computed():
    costs, report = Costs(), SimpleNamespace()
    costs.mark = spent()
    sum(range(3 * 10**6))
    phase = costs.pytest_runtest_makereport()
    next(phase)
    with pytest.raises(StopIteration):
        phase.send(report)
    assert report.cpu > 0 and costs.mark == pytest.approx(spent(), abs=1)
