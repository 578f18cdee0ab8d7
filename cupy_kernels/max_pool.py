"""Max pooling over two dimensions, of arrays [..., H, W]."""

from .pool import Pool, launch_pixels, launch_windows, pool_kernel, pool_variants


def max_pool_forward(x, y, taps, indices, kernel_size, stride, padding, dilation) -> None:
    """y = the largest element of each window of x: of equal ones the first. A NaN is the largest: of several the last.

    taps: the argmax as its place in the window, kh * kernel_w + kw; uint8, or int32 for windows of more than 254
        elements. indices: the argmax as its place in the plane, h * W + w; int64. Both have y's shape, or are None.
    y, taps and indices are written.
    kernel_size, stride, padding, dilation: pairs; `pool_output_size` has the shapes they allow.
    """
    pool = Pool(kernel_size, stride, padding, dilation)
    windows = [a for a in (y, indices) if a is not None]
    kernel = pool_kernel("max_pool.cu", "max_pool_forward", (x,), windows, taps, pool)
    launch_windows(kernel, (x, y, taps, indices), x, y, pool)


def max_pool_backward(dy, taps, dx, kernel_size, stride, padding, dilation) -> None:
    """dx = for each pixel the sum of dy over the windows whose argmax it is, by the forward's taps. dx is written."""
    pool = Pool(kernel_size, stride, padding, dilation)
    kernel = pool_kernel("max_pool.cu", "max_pool_backward", (dx,), (dy,), taps, pool)
    launch_pixels(kernel, (dy, taps, dx), dx, dy, pool)


def max_pool_select(x, taps, y, kernel_size, stride, padding, dilation) -> None:
    """y = the element of x at each window's tap, 0 where a window holds none; taps are a forward's. y is written."""
    pool = Pool(kernel_size, stride, padding, dilation)
    kernel = pool_kernel("max_pool.cu", "max_pool_select", (x,), (y,), taps, pool)
    launch_windows(kernel, (x, taps, y), x, y, pool)


def variants():
    """Every variant that this module launches."""
    yield from pool_variants("max_pool.cu")
