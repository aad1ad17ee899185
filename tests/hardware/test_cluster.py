"""Clusters, and what a collective runs over."""

import pytest

from hcp_jax import hardware
from hcp_jax.hardware import Cluster, Path

H200 = hardware.gpu("h200")


@pytest.mark.parametrize("sizes", [(0, 8), (1, -1), (1.5, 8)])
def test_a_cluster_needs_whole_hosts(sizes):
    with pytest.raises(ValueError, match="must be a positive integer"):
        Cluster(H200, *sizes)


def test_an_nvlink_domain_may_be_larger_than_a_host():
    cluster = Cluster(hardware.gpu("gb200"), 18, 4)
    assert cluster.path("all-to-all", tuple(range(72))).link == hardware.INSIDE
    cluster = Cluster(hardware.gpu("gb200"), 36, 4)
    assert cluster.path("all-to-all", (71, 72)).link == hardware.BETWEEN


def test_groups_share_their_network_cards_in_gathers_but_not_in_permutes():
    cluster = Cluster(H200, hosts=2, gpus_per_host=8)
    network, nvlink = H200.network.rate.value, H200.nvlink.rate.value
    everyone = tuple(range(16))
    assert cluster.path("all-gather", everyone) == Path(
        hardware.BETWEEN, min(8 * network, nvlink), H200.network.latency
    )
    assert cluster.path("collective-permute", everyone).rate == network
    assert cluster.path("all-gather", (0, 8)).rate == network
    assert cluster.path("all-to-all", tuple(range(8))).link == hardware.INSIDE
    assert cluster.path("all-to-all", (3,)).link == hardware.NO_LINK


def test_where_a_group_is_uneven_the_host_with_fewest_cards_sets_the_pace():
    uneven = (*range(6), 8, 9)
    assert Cluster(H200, 2, 8).path("all-gather", uneven).rate == 2 * H200.network.rate.value
