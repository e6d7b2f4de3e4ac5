"""Which module accounts for which parameter.

A parameter belongs to the module that holds it, unless that module's children never run (MultiheadAttention,
re-parametrised modules, parameter containers). It can be moved up to an ancestor, whose forward-mode derivative then
covers every use below it; the ancestor takes it from every module inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.utils import parametrize

from finfluence.errors import RecordingError
from finfluence.gradients.rules import Rule, find_rule

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


class Plan:
    """The assignment of a model's recorded parameters to modules.

    Args:
        model: the root.
        parameters: canonical name → recorded parameter.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self._canonical = {id(p): name for name, p in parameters.items()}
        self._paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(path)
        self._by_path = {path: module for module, paths in self._paths.items() for path in paths}
        self.owned: dict[nn.Module, dict[str, str]] = {}
        self.rules: dict[nn.Module, Rule | None] = {}
        self._assign(model)
        held = {name for names in self.owned.values() for name in names.values()}
        missing = [name for name in parameters if name not in held]
        if missing:
            raise RecordingError(
                f"parameter {missing[0]!r} is not held by the model; "
                "pass parameters from dict(model.named_parameters())"
            )

    def _assign(self, module: nn.Module) -> None:
        whole = parametrize.is_parametrized(module) or isinstance(module, nn.MultiheadAttention)
        local = {
            name: self._canonical[id(p)]
            for name, p in module.named_parameters(recurse=whole, remove_duplicate=False)
            if id(p) in self._canonical
        }
        if isinstance(module, _CONTAINERS):
            for name in local.values():
                self._give(self.ancestors(module)[0], name)
        elif local:
            self.owned.setdefault(module, {}).update(local)
            self.rules[module] = find_rule(module)
        if not whole:
            for child in module.children():
                if child not in self.owned:
                    self._assign(child)

    def name(self, module: nn.Module) -> str:
        """The first path of a module, "" for the root."""
        return self._paths[module][0]

    def label(self, module: nn.Module) -> str:
        """How messages name a module."""
        return f"{self.name(module) or 'the model'!s} ({type(module).__name__})"

    def ancestors(self, module: nn.Module) -> list[nn.Module]:
        """The modules that contain every place of a module, nearest first; empty for the root."""
        parts = [path.split(".") if path else [] for path in self._paths[module]]
        common: list[str] = []
        for level in zip(*(p[:-1] for p in parts), strict=False):
            if len(set(level)) > 1:
                break
            common.append(level[0])
        if not self.name(module):
            return []
        found = [self._by_path[".".join(common[:depth])] for depth in range(len(common), -1, -1)]
        return [a for a in found if a is not module]

    def watched(self) -> Iterable[nn.Module]:
        """Every module that accounts for parameters or may have to: the owners and all modules with children."""
        inside: set[nn.Module] = set()
        for module in list(self.owned):
            inside.add(module)
            for path in self._paths[module]:
                pieces = path.split(".") if path else []
                inside.update(self._by_path[".".join(pieces[:depth])] for depth in range(len(pieces)))
        return [m for m in self._paths if m in inside and not isinstance(m, nn.ModuleList | nn.ModuleDict)]

    def move(self, name: str, target: nn.Module) -> None:
        """Make `target` account for a parameter, for every use below it."""
        for module in target.modules():
            owned = self.owned.get(module)
            if owned is not None:
                for local in [local for local, canonical in owned.items() if canonical == name]:
                    del owned[local]
        self._give(target, name)

    def _give(self, module: nn.Module, name: str) -> None:
        for local, p in module.named_parameters():
            if self._canonical.get(id(p)) == name:
                self.owned.setdefault(module, {})[local] = name
                self.rules[module] = None
                return
        raise AssertionError(f"{name} is not inside {self.label(module)}")
