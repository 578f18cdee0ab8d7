"""The sum of a tensor [N, C, *] over all dimensions but the channels: the bias gradient of a convolution.

A channels_last tensor is passed as [N * H * W, C].
"""

import itertools

from .channel_walk import KEPT, chunks_of, launch_combining, over_chunks, widths
from .common import FLOATS, THREADS, scalar, scalar_macros
from .source import Kernel, Variant

_FILE = "channel_sum.cu"


def channel_sum_workspace_size(x) -> int:
    """Number of float64 elements of the workspace `partial`."""
    return x.shape[1] * chunks_of(x)[1]


def channel_sum(x, sums, partial) -> None:
    """sums[c] = sum over n and positions of x[n, c, ...]. Writes sums, [C], and the workspace `partial`."""
    channels = x.shape[1]
    if sums.shape != (channels,):
        raise ValueError(f"sums must have shape ({channels},), received {sums.shape}")
    walk = over_chunks((x,), lambda width, planes: _macros(scalar(x), width, planes))
    walk.launch(_FILE, "channel_sum_partials", (x, partial, *walk.sizes, walk.chunks, walk.tile))
    args = (partial, sums, channels, walk.chunks)
    launch_combining(Kernel(_FILE, "channel_sum_combine", walk.macros), channels, walk.chunks, args)


def variants():
    """Every variant that this module launches."""
    for name in FLOATS:
        for width, planes in itertools.product(widths(name), (1, 0)):
            yield Variant(_FILE, _macros(name, width, planes))


def _macros(name, width, planes):
    sizes = {"WIDTH": width, "PLANES": planes, "KEPT": KEPT, "THREADS": THREADS}
    return (*scalar_macros(name), *sizes.items())
