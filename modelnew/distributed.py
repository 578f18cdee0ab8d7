"""`convert_sync_batchnorm`: batch norm with the statistics of all processes of a group."""

import functools
from collections.abc import Callable

import torch.distributed as dist
from torch import nn

from . import functional, layers
from .functional import sync_batch_norm, sync_conv_bn_pool

_COUNTERPARTS = {
    functional.batch_norm: sync_batch_norm.batch_norm,
    functional.batch_norm_tanh: sync_batch_norm.batch_norm_tanh,
    functional.bn_tanh_max_pool2d: sync_batch_norm.bn_tanh_max_pool2d,
}
_LAYERS = (layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d)


def convert_sync_batchnorm(module: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> nn.Module:
    """Synchronises every batch norm in `module`: in training it uses the statistics of all processes' batches.

    module: the network, or a batch norm itself. It is changed in place and returned. BatchNorm1d, 2d and 3d of
        `modelnew.layers` keep their class, parameters and buffers. ModelNew and `modelnew.Sequential` stay fused. Batch
        norms of torch.nn become torch.nn.SyncBatchNorm, which needs a GPU.
    process_group: the processes that share statistics; by default all. Every process of the group must call the module,
        with an empty batch if it has no data.

    Outputs, gradients of the input and running statistics are those of one process with the whole batch. Gradients of
    weight and bias are the process's own part, which DistributedDataParallel averages. Batches may differ in size. The
    forward exchanges data once, and so does the backward.

    As with torch.nn.SyncBatchNorm, the module is an ordinary batch norm in evaluation, and in training if no process
    group is initialised or the group has one process.

    Raises TypeError for a module or process_group of another type; nothing is changed then. In training, a process
    outside the group gets a RuntimeError. A backward with create_graph=True raises RuntimeError.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, received a {type(module).__name__}")
    of_others = dist.is_available() and process_group == dist.GroupMember.NON_GROUP_MEMBER
    if not (process_group is None or isinstance(process_group, dist.ProcessGroup) or of_others):
        raise TypeError(
            f"process_group must be None or a group that torch.distributed.new_group made, received {process_group!r}"
        )
    if isinstance(module, _LAYERS):
        module.peers = Peers(process_group)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
    for name, child in module._modules.items():  # named_children() has one name of a child that has two
        if child is not None:
            module._modules[name] = convert_sync_batchnorm(child, process_group)
    return module


class Peers:
    """The processes that share a layer's statistics. process_group: None for all processes."""

    def __init__(self, process_group: "dist.ProcessGroup | None"):
        self.process_group = process_group

    def __deepcopy__(self, memo):
        return self  # a process group cannot be copied

    def counterpart(self, operation: Callable) -> Callable:
        """The function that replaces `operation`, a function with a batch norm in it, in training."""
        if not dist.is_available() or not dist.is_initialized():
            return operation
        group = dist.group.WORLD if self.process_group is None else self.process_group
        ranks = dist.get_world_size(group)
        if ranks < 1:
            raise RuntimeError(
                f"a batch norm is synchronised over a process group that rank {dist.get_rank()} is not in; give each "
                "process a group of its own: convert_sync_batchnorm(module, process_group)"
            )
        return operation if ranks == 1 else _synchronised(operation, group)


def _synchronised(operation, group):
    if operation is functional.conv_bn_activation_max_pool_group_norm:
        return functools.partial(operation, peers=functools.partial(sync_conv_bn_pool.run, group))
    return functools.partial(_COUNTERPARTS[operation], process_group=group)
