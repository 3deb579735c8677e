"""The fleet: fingerprints of thousands of VMs, what KSM saves among them, and where to place them."""

from ksm.fleet.analysis import Analysis, Sharing
from ksm.fleet.analyze import analyze
from ksm.fleet.cluster import Tls, connect, local
from ksm.fleet.collections import content_totals, contents
from ksm.fleet.fingerprints import fingerprint_vm
from ksm.fleet.hosts import Host, read_hosts
from ksm.fleet.moves import Move
from ksm.fleet.packing import PlacementError
from ksm.fleet.place import Placement, place, read_fleet
from ksm.fleet.sketch import Bounds
from ksm.fleet.survey import LeftOut
from ksm.fleet.vm import Vm

__all__ = [
    "Analysis",
    "Bounds",
    "Host",
    "LeftOut",
    "Move",
    "Placement",
    "PlacementError",
    "Sharing",
    "Tls",
    "Vm",
    "analyze",
    "connect",
    "content_totals",
    "contents",
    "fingerprint_vm",
    "local",
    "place",
    "read_fleet",
    "read_hosts",
]
