"""Max pooling over two dimensions, of arrays [..., H, W]."""

from .pool import Pool, launch_pixels, launch_windows, pool_kernel, pool_variants


def max_pool_forward(x, y, argmax, indices, pool: Pool) -> None:
    """y = the largest element of each window of x: of equal ones the first. A NaN is the largest: of several the last.

    argmax: its place in the window, kh * kernel_w + kw; uint8, or int32 for windows of more than 254
        elements. indices: the argmax as its place in the plane, h * W + w; int64. Both have y's shape, or are None.
    y, argmax and indices are written.
    pool: the windows; `pool_output_size` has the shapes they allow.
    """
    windows = [a for a in (y, indices) if a is not None]
    kernel = pool_kernel("max_pool.cu", "max_pool_forward", (x,), windows, argmax, pool)
    launch_windows(kernel, (x, y, argmax, indices), x, y, pool)


def max_pool_backward(dy, argmax, dx, pool: Pool) -> None:
    """dx = for each pixel the sum of dy over the windows whose argmax, the forward's, it is. dx is written."""
    kernel = pool_kernel("max_pool.cu", "max_pool_backward", (dx,), (dy,), argmax, pool)
    launch_pixels(kernel, (dy, argmax, dx), dx, dy, pool)


def max_pool_select(x, argmax, y, pool: Pool) -> None:
    """y = the element of x at each window's argmax, a forward's; 0 where a window holds none. y is written."""
    kernel = pool_kernel("max_pool.cu", "max_pool_select", (x,), (y,), argmax, pool)
    launch_windows(kernel, (x, argmax, y), x, y, pool)


def variants():
    """Every variant that this module launches."""
    yield from pool_variants("max_pool.cu")
