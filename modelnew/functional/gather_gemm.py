"""conv_transpose2d's forward and gradients as implicit GEMMs, in either memory format: operations of `calls.call`.

Arrays are [N, C, H, W], or [N, H, W, C] with channels_last. Weights are [Cin, Cout/groups, KH, KW], or [Cin, KH, KW,
Cout/groups] with w_channels_last. These are the physical shapes of channels_last tensors. Each gradient has the format
of its tensor.

A large batch is computed in parts, because its workspaces are as large as its tensors.
"""

import itertools

import numpy as np

from cupy_kernels import conv_transpose as ops
from cupy_kernels import fp16_tiles, gather_gemm, gather_gemm_plan
from cupy_kernels.common import scalar

_PART_BYTES = 64 << 20  # of workspaces, about. Parts of half the size made some forwards 30% slower on an H200


def physical(shape, channels_last) -> tuple[int, ...]:
    """The shape of the array that stores a tensor of shape [N, C, H, W]."""
    return (shape[0], *shape[2:], shape[1]) if channels_last else tuple(shape)


def forward(new, x, w, bias, geometry, split, gpu, channels_last, w_channels_last):
    """y of conv_transpose2d. gpu: `Choice.gpu`."""
    x_shape, w_shape = ops.logical(x.shape, channels_last), ops.logical(w.shape, w_channels_last)

    def plan(images):
        return gather_gemm_plan.plan((images, *x_shape[1:]), w_shape, geometry, split, scalar(x), gpu)

    y = new(physical(ops.output_shape(x_shape, w_shape, geometry), channels_last), x.dtype)
    source = _Packed(new, x, geometry.groups, split, channels_last)
    turned = y.nbytes if plan(x_shape[0]).phased and not channels_last else 0
    for part in _parts(x_shape[0], source.nbytes + turned):
        out = y[part]
        _gather(
            new, plan(out.shape[0]), source.of(part), source.exponents, w, bias, out, channels_last, w_channels_last
        )
    return y


def gradients(new, x, w, dy, x_shape, w_shape, geometry, split, gpu, channels_last, w_channels_last, need_x, need_w):
    """(dx, dw), None where not needed. x may be None if dw is not needed, w if dx is not. Shapes are logical."""
    dx = new(physical(x_shape, channels_last), dy.dtype) if need_x else None
    dw = new(physical(w_shape, w_channels_last), dy.dtype) if need_w else None
    how = geometry.groups, split, channels_last
    dys, xs = _Packed(new, dy, *how), _Packed(new, x, *how) if need_w else None
    parts = _parts(x_shape[0], dys.nbytes + (xs.nbytes if need_w else 0))

    def plans(make, **options):
        shapes = [(len(range(x_shape[0])[part]), *x_shape[1:]) for part in parts]
        return [make(shape, w_shape, geometry, split, scalar(dy), gpu, **options) for shape in shapes]

    wgrads = plans(gather_gemm_plan.wgrad_plan) if need_w else []
    dgrads = plans(gather_gemm_plan.plan, dgrad=True) if need_x else []
    ends = [0, *itertools.accumulate(p.partial_size for p in wgrads)]
    partial = new.scratch(ends[-1], np.float32) if need_w else None

    def to_dw(number, part, packed):
        p = wgrads[number]
        gather_gemm.wgrad_sums(p, xs.of(part), packed, partial[ends[number] : ends[number + 1]])
        if part is parts[-1]:
            splits, exponents = sum(p.splits for p in wgrads), (xs.exponents, dys.exponents)
            gather_gemm.wgrad_reduce(p, splits, partial, *exponents, dw, w_channels_last)

    def to_dx(number, part, packed):
        _gather(new, dgrads[number], packed, dys.exponents, w, None, dx[part], channels_last, w_channels_last)

    steps = need_w * [to_dw] + need_x * [to_dx]
    if need_x and need_w and dx.nbytes < dw.nbytes:
        steps.reverse()  # the smaller result first: it is there while the workspaces of the other one are, too
    for number, part in enumerate(parts):
        packed = dys.of(part)
        for step in steps:
            step(number, part, packed)
    return dx, dw


def _parts(images, workspace_bytes) -> list[slice]:
    """The images in parts of about _PART_BYTES of workspaces. workspace_bytes: for all images."""
    count = max(1, min(images, workspace_bytes // _PART_BYTES))
    return [slice(i * images // count, (i + 1) * images // count) for i in range(count)]


class _Packed:
    """A tensor that is packed in parts, all under one scale.

    nbytes: of the whole, packed. exponents: of the scale, None for 16 bits.
    """

    def __init__(self, new, tensor, groups, split, channels_last):
        self._new, self._tensor, self._how = new, tensor, (split, groups, channels_last)
        name, shape = scalar(tensor), ops.logical(tensor.shape, channels_last)
        self._dtype = gather_gemm.operand_dtype(name)
        self._image_size = gather_gemm.packed_size((1, *shape[1:]), groups, split)
        self._as_is, self.exponents = gather_gemm.is_packed(shape, groups, name, channels_last), None
        self.nbytes = 0 if self._as_is else shape[0] * self._image_size * self._dtype.itemsize
        if name == "float":
            self.exponents = new.scratch(fp16_tiles.exponents_size(shape, tensor.itemsize), np.int32)
            fp16_tiles.largest_magnitude(tensor, self.exponents)

    def of(self, part):
        """These images, packed."""
        source = self._tensor[part]
        if self._as_is:
            return source
        packed = self._new.scratch(source.shape[0] * self._image_size, self._dtype)
        gather_gemm.pack_pixels(source, self.exponents, packed, *self._how)
        return packed


def _gather(new, plan, source, source_exponents, w, bias, out, channels_last, w_channels_last):
    weights = new.scratch(plan.packed_size, gather_gemm.operand_dtype(scalar(w)))
    exponents = new.scratch(plan.columns, np.int32) if scalar(w) == "float" else None
    partial = new.scratch(plan.partial_size, np.float32) if plan.partial_size else None
    turn = plan.phased and not channels_last
    to = new.scratch(physical(out.shape, True), out.dtype) if turn else out
    workspaces = weights, exponents, partial
    gather_gemm.gather(plan, source, source_exponents, w, bias, to, *workspaces, channels_last or turn, w_channels_last)
    if turn:
        gather_gemm.turn_rows(to, out)
