"""Max pooling over two dimensions, of arrays [..., H, W]."""

from .pool import Pool, launch_pool


def max_pool_forward(x, y, taps, indices, kernel_size, stride, padding, dilation) -> None:
    """y = the largest element of each window of x, the first of equals. A NaN beats everything, the last of several.

    taps: where in its window that lies, kh * kernel_w + kw; uint8, or int32 for windows of more than 254 elements.
    indices: where in its plane that lies, h * W + w; int64. Both have y's shape, or are None.
    y, taps and indices are written.
    kernel_size, stride, padding, dilation: pairs; `pool_output_size` has the shapes they allow.
    """
    pool = Pool(kernel_size, stride, padding, dilation)
    windows = [a for a in (y, indices) if a is not None]
    launch_pool("max_pool_forward", "max_pool.cu", (x, y, taps, indices), (x,), windows, taps, pool)


def max_pool_backward(dy, taps, dx, kernel_size, stride, padding, dilation) -> None:
    """dx = for each pixel the sum of dy over the windows whose tap it is; taps are the forward's. dx is written."""
    pool = Pool(kernel_size, stride, padding, dilation)
    launch_pool("max_pool_backward", "max_pool.cu", (dy, taps, dx), (dx,), (dy,), taps, pool, backward=True)
