"""Memory recorded over time, and replayed under any tunables.

>>> import ksm.trace
>>> trace = ksm.trace.example()
>>> replay = trace.replay()
>>> replay.machine.ksm.run = 1
>>> replay.run_for(5)
>>> replay.machine.ksm.pages_sharing
3
"""

from ksm.trace.example import example
from ksm.trace.format import Metadata, is_trace
from ksm.trace.reader import Change, Moment, Step, Trace
from ksm.trace.recorder import Progress, record
from ksm.trace.replay import Replay
from ksm.trace.watch import series, watch

__all__ = [
    "Change",
    "Metadata",
    "Moment",
    "Progress",
    "Replay",
    "Step",
    "Trace",
    "example",
    "is_trace",
    "open",
    "record",
    "series",
    "watch",
]

open = Trace
