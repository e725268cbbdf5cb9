"""Traffic as plain data: what is asked, when, and how well it was answered. No torch, no clock, no I/O but files."""

from foretell.trace.arrivals import arrival_times
from foretell.trace.errors import TraceFormatError
from foretell.trace.metrics import Objectives, Report, RequestTimes, summarize
from foretell.trace.readers import read_trace
from foretell.trace.workloads import NAMED, Lengths, TraceRequest, Workload, named_workload

__all__ = [
    "NAMED",
    "Lengths",
    "Objectives",
    "Report",
    "RequestTimes",
    "TraceFormatError",
    "TraceRequest",
    "Workload",
    "arrival_times",
    "named_workload",
    "read_trace",
    "summarize",
]
