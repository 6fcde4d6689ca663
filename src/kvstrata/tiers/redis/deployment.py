"""From what a URL names to the topology that serves it."""

from __future__ import annotations

from kvstrata.tiers.redis.cluster import ClusterTopology
from kvstrata.tiers.redis.ring import RingTopology
from kvstrata.tiers.redis.sentinel import SentinelTopology
from kvstrata.tiers.redis.server import Limits, Server
from kvstrata.tiers.redis.topology import SingleTopology, Topology
from kvstrata.tiers.redis.url import Deployment


def open_topology(deployment: Deployment, limits: Limits) -> Topology:
    """The topology; nothing is connected yet.

    Raises:
        ConfigError: a certificate file cannot be used.
    """
    context = deployment.data.tls_context()
    match deployment.kind:
        case "single":
            return SingleTopology(Server(deployment.data, limits, context))
        case "ring":
            return RingTopology([Server(endpoint, limits, context) for endpoint in deployment.endpoints])
        case "sentinel":
            return SentinelTopology(deployment, limits, context)
        case "cluster":
            return ClusterTopology(deployment, limits, context)
