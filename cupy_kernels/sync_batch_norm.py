"""Batch norm over the batches of several processes (ranks): what is computed before and after they exchange data.

`mean` and `invstd` are as in `batch_norm`. A message, (2 C + 1,) float64, describes a rank's batch to the others.
gathered and messages are those of all ranks, concatenated. share, (1,) float64: the rank's part of all values.
"""

from .common import THREADS, ceil_div, check_per_channel, parameter_type, scalar, scalar_macros
from .launch import launch
from .source import Kernel, Variant

_FILE, _TAIL_FILE = "sync_batch_norm.cu", "sync_pooled_tail.cu"


def sync_message(mean, invstd, shift, message, count: int) -> None:
    """Writes message, from the mean, and the invstd for eps 0, of a batch with `count` values per channel.

    shift: None, or a constant per channel that the values contain and mean does not. For an empty batch, mean and
        invstd are not read.
    """
    check_per_channel(mean.size, invstd=invstd, shift=shift)
    _launch(_FILE, "sync_message", mean, shift, mean.size, (mean, invstd, shift, message, mean.size, count))


def sync_statistics(
    messages, own, running_mean, running_var, batches, shift, mean, invstd, distance, share, momentum, eps
) -> None:
    """Writes mean (without shift), invstd = 1/sqrt(biased variance + eps) and share of the values of all ranks.

    own: the rank's message.
    distance: (C,), written: the mean of the rank's (x - mean) invstd.

    Running statistics and batches are as in `batch_norm_statistics`, over the values of all ranks.
    """
    channels = mean.size
    arrays = {"invstd": invstd, "distance": distance, "shift": shift}
    check_per_channel(channels, **arrays, running_mean=running_mean, running_var=running_var)
    args = (messages, own, running_mean, running_var, batches, shift, mean, invstd, distance, share, momentum, eps)
    parameter = shift if running_mean is None else running_mean
    _launch(_FILE, "sync_statistics", mean, parameter, channels, (*args, channels, messages.size // own.size))


def sync_sums(gathered, share, sums) -> None:
    """Writes sums, (2, C) float64: those of all ranks times share, as `batch_norm_backward_apply` takes them."""
    args = (gathered, share, sums, sums.size // 2, gathered.size // sums.size)
    _launch(_FILE, "sync_sums", sums, None, sums.size, args)


def sync_parameter_gradients(
    gathered, own, partials, mean, invstd, distance, share, weight, sums, rest, dy_exponents, dconv_bias, count
) -> None:
    """The results of `conv_bn_pool_backward.parameter_gradients` for one rank, from the sums of all ranks.

    gathered: (2, C) float64 of each rank, sums of g and g xhat.
    own: those of this rank.
    partials, sums, dy_exponents: as in `parameter_gradients`.
    count: the rank's number of pixels of a channel.
    rest: (C,), written: the sum of the rank's dy, without the factor weight invstd.
    dconv_bias: written where not None.
    """
    channels, images = mean.size, partials.shape[1]
    args = (gathered, own, partials[-1], mean, invstd, distance, share, weight, sums, rest, dy_exponents, dconv_bias)
    sizes = (channels, gathered.size // own.size, images, count)
    parameter = dconv_bias if weight is None else weight
    _launch(_TAIL_FILE, "sync_parameter_gradients", mean, parameter, channels * THREADS, (*args, *sizes))


def sync_borders(rest, invstd, weight, dy_exponents, borders) -> None:
    """Subtracts the sum of dy, see `sync_parameter_gradients`, from borders, which `weight_gradient` adds up."""
    channels, taps = invstd.size, borders.shape[1]
    args = (rest, invstd, weight, dy_exponents, borders, channels, taps)
    _launch(_TAIL_FILE, "sync_borders", invstd, weight, taps * channels, args)


def variants():
    """Every variant that this module launches."""
    for name, param in (("double", "double"), *(("float", p) for p in ("float", "half_t", "bf16_t"))):
        yield Variant(_FILE, _macros(name, param))
        if name == "float":
            yield Variant(_TAIL_FILE, _macros(name, param))


def _launch(file, name, array, parameter, threads, args) -> None:
    kernel = Kernel(file, name, _macros(scalar(array), parameter_type(array, parameter)))
    launch(kernel, (ceil_div(threads, THREADS), 1, 1), (THREADS, 1, 1), args)


def _macros(name, param):
    return (*scalar_macros(name), ("param_t", param), ("THREADS", THREADS))
