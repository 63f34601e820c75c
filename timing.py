"""How times are taken: by the device's clock, after warm-up, as medians; of work in CUDA graphs."""
import functools
import math
import statistics

import torch

from decode import timestamp

WARM_UP = 5  # calls before those that are timed


def median_s(call, repeats, device, warm=lambda: None):
    """Median seconds of call(), of so many one after the other, after warm-up and warm()."""
    for _ in range(min(WARM_UP, repeats - 1)):
        call()
    warm()
    events = [timestamp(torch.device(device))]
    for _ in range(repeats):
        call()
        events.append(timestamp(torch.device(device)))
    events[-1].synchronize()
    return statistics.median(a.elapsed_time(b) * 1e-3 for a, b in zip(events, events[1:]))


def captured(call, device):
    """call, which is made a few times, as a CUDA graph; on a CPU call itself."""
    if device == "cpu":
        return call
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def layer_us(calls, device, repeats=30):
    """Median microseconds of one of the calls, eight or more in a CUDA graph as layers are in a
    step's. On a CPU, whose times say nothing, of few."""
    if device == "cpu":
        repeats = 1
    else:
        calls = calls * math.ceil(8 / len(calls))

    def step():
        for call in calls:
            call()

    return median_s(captured(step, device), repeats, device) / len(calls) * 1e6


@functools.cache  # measured once
def copy_bandwidth(device):
    """Bytes per second of a large copy on the GPU, read and written bytes both counted."""
    a = torch.empty(2**29, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    # not in a graph, where a copy engine, slower than a kernel, may do it
    return 2 * a.nbytes / median_s(lambda: b.copy_(a), 20, device)


def host_bandwidth(host, device):
    """Bytes per second of a copy of pinned memory to the GPU."""
    to = torch.empty(host.shape, dtype=host.dtype, device=device)
    return host.nbytes / median_s(lambda: to.copy_(host, non_blocking=True), 5, device)
