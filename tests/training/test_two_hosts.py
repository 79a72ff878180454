"""Two hosts of a virtual network; one of them is cut off in mid-epoch. `benchmarks/two_hosts.py` does it."""

import pytest

from benchmarks import two_hosts

if reason := two_hosts.why_not():
    pytest.skip(f"no network namespaces: {reason}", allow_module_level=True)


def test_run_that_lost_a_host_matches_a_run_on_one_machine(tmp_path):
    one, cut = two_hosts.measure(tmp_path, epochs=2, undisturbed=False)
    assert 12 < cut["cut_off_at_update"] < 24
    assert cut["resumed"] >= 1
    assert cut["updates"] == one["updates"] == 24
    assert cut["bitwise_equal"] == cut["tensors"] > 100
    assert cut["best_file_equal"]


def test_the_network_is_gone_at_the_end():
    with two_hosts.Cable() as cable:
        assert set(cable.hosts) <= set(two_hosts.ip("netns", "list").split())
    assert not set(cable.hosts) & set(two_hosts.ip("netns", "list").split())
