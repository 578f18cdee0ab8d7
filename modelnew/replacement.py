"""`replace_layers`: PyTorch's layers in any network become ours."""

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from . import layers
from .fusions import CHAINS, LENGTH, Sequential
from .numerics import check_numerics

_OURS = {getattr(nn, name): getattr(layers, name) for name in layers.__all__} | {nn.Sequential: Sequential}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_IN_PLACE = "replace_layers changes a module in place, and returns a record of the changes: go on with the module"
_NOTHING = f"nothing\nkinds of layers that can be replaced: {', '.join(layers.__all__)}"


class Replaced(NamedTuple):
    """What `replace_layers` did. It prints in words, also in a notebook.

    layers: the modules that are ours now, by name.
    kept: why other layers of these kinds remain as they were, by name.
    before: how many layers were ours before the call.
    """

    layers: dict[str, nn.Module]
    kept: dict[str, str]
    before: int

    def __repr__(self) -> str:
        chains = [name for name, module in self.layers.items() if type(module) is Sequential]
        counts = Counter(type(module).__name__ for name, module in self.layers.items() if name not in chains)
        lines = ["replaced: " + (", ".join(f"{count} {name}" for name, count in counts.items()) or _NOTHING)]
        lines += [f"ours before: {self.before}"] * bool(self.before)
        lines += [f"fused where the kernels support it: a chain in {name or 'the network itself'}" for name in chains]
        reasons = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name or "the module")
        return "\n".join((*lines, *(f"kept {_first(names)}: {reason}" for reason, names in reasons.items())))

    if not TYPE_CHECKING:  # type checkers refuse both, and would else take what follows for unreachable

        def __call__(self, *args, **options):
            raise TypeError(_IN_PLACE)

        def __getattr__(self, name):
            raise AttributeError(f"{name!r} is no attribute of a Replaced. {_IN_PLACE}")

    def undo(self) -> None:
        """Makes the layers PyTorch's again, and empties `layers`. Parameters and buffers stay as they are now.

        A synchronised batch norm becomes a torch.nn.SyncBatchNorm. A layer whose class has changed since, as by a
        parametrization, or that was given another forward, as by accelerate's hooks, stays ours, and in `layers`.
        """
        for name, module in list(self.layers.items()):
            if type(module) not in _THEIRS or _has_another_forward(module):
                continue
            _change_class(module, _THEIRS[type(module)])
            vars(module).pop("numerics", None)
            if peers := vars(module).pop("peers", None):
                module.__class__, module.process_group = nn.SyncBatchNorm, peers.process_group
            del self.layers[name]


def replace_layers(module: nn.Module, *, numerics: str = "auto") -> Replaced:
    """Replaces PyTorch's layers in `module` by those of `modelnew.layers`, in place.

    module: any network, or a layer. Each replaced layer is the same object as before, with another class. So its
        parameters, buffers, hooks, name and mode stay, and so do optimizers and state dicts. A torch.nn.Sequential with
        a chain of layers that ours fuse becomes a `modelnew.Sequential`.
    numerics: of the transposed convolutions that become ours, see `modelnew.numerics`. Those that were ours before keep
        theirs.

    Returns a `Replaced`: print it to see what was done; `undo()` takes it back.

    A layer is kept if its class is derived from PyTorch's, for instance by a parametrization, if it changes its input
    in place, if it is lazy, or if it was given another forward, as by accelerate's hooks. So is a
    torch.nn.SyncBatchNorm. Calls of torch.nn.functional in a forward are not replaced: use `modelnew.functional` there.
    Call replace_layers before torch.compile and `fully_shard`, and before or after an optimizer is made. Inputs that
    ours refuse and PyTorch's take, such as complex numbers, raise an error: see docs/works_with.md.

    Raises ValueError for unknown numerics, and TypeError for what is no module. Nothing is changed then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, received a {type(module).__name__}")
    check_numerics(numerics)
    before = sum(type(child) in _THEIRS and not isinstance(child, Sequential) for child in module.modules())
    replaced = Replaced({}, {}, before)
    for name, child in module.named_modules():
        if can_be_replaced(child):
            _replace(replaced, name, child)
            if isinstance(child, layers.ConvTranspose2d):
                child.numerics = numerics
        elif reason := _reason_to_keep(child):
            replaced.kept[name] = reason
    for name, child in module.named_modules():
        if type(child) is nn.Sequential and _has_chain(child):
            if _has_another_forward(child):
                replaced.kept[name] = _reason_of_forward(child)
            else:
                _replace(replaced, name, child)
    return replaced


def can_be_replaced(module: nn.Module) -> bool:
    """Whether `replace_layers` replaces this very layer."""
    return type(module) in _OURS and not isinstance(module, nn.Sequential) and not _reason_to_keep(module)


def _replace(replaced, name, module):
    _change_class(module, _OURS[type(module)])
    replaced.layers[name] = module


def _change_class(module, kind):
    vars(module).pop("forward", None)  # see `_has_another_forward`; it would hide that of the new class
    module.__class__ = kind


def _has_another_forward(module) -> bool:
    """Whether the module was given a forward. The method of its class, which accelerate's hooks leave, is none."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _first(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _reason_to_keep(module) -> str | None:
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBatchNorm is PyTorch's: call replace_layers first, and modelnew.convert_sync_batchnorm then"
    if isinstance(module, LazyModuleMixin) and module.cls_to_become in _OURS:
        return f"{type(module).__name__} has no shape yet: call replace_layers again after a forward"
    if isinstance(module, nn.Sequential) or not isinstance(module, tuple(_OURS)) or type(module) in _THEIRS:
        return None
    if type(module) not in _OURS:
        return f"{type(module).__name__} is derived from PyTorch's layer"
    if getattr(module, "inplace", False):
        return f"{type(module).__name__}(inplace=True) changes its input, ours do not: set inplace to False before"
    return _reason_of_forward(module) if _has_another_forward(module) else None


def _reason_of_forward(module) -> str:
    return f"{type(module).__name__} was given another forward, as by accelerate's hooks: replace it before that"


def _has_chain(sequential) -> bool:
    kinds = tuple(map(type, sequential))
    runs = {kinds[at : at + LENGTH] for at in range(len(kinds))}
    return any(chain.kinds in runs for chain in CHAINS)
