"""Which classes and functions a config may name: those of this project and of the packages that it is made of.

To import a module is to run it, and a config may come from a stranger. So whatever a config or an option names is
looked at before it is imported; a user's own module is allowed by naming it on the command line (--import). The parser
holds the same list, which covers what only it sees: callables, types, classes inside lists of callbacks. What a config
gives arguments to must besides be a class that runs are made of: the packages have functions that unpickle a file or
fetch one.
"""

import importlib
from collections.abc import Iterator
from typing import Any

from .configs import Fragment
from .errors import UserError

OWN = ("moa_lightning", "tasks", "data")
PACKAGES = (*OWN, "lightning", "torch", "torchvision", "timm", "torchmetrics")
# parts of these that load or start code of others
REFUSED = (
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.package",
    "torch.serialization",
    "torch.multiprocessing",
    "torch.distributed.run",
    "torch.distributed.launcher",
    "torch.utils.cpp_extension",
)


def allow_packages(modules: list[str]) -> None:
    """Have the parser import from these packages and from the user's modules only.

    Args:
        modules: named with --import. Their whole package is allowed.
    """
    from jsonargparse import set_parsing_settings

    set_parsing_settings(
        import_path_denylist=["*", *REFUSED],
        import_path_allowlist=[*PACKAGES, *(name for name in _packages(modules) if name.isidentifier())],
        instantiate_subclass_spec_in_any=False,
    )


def _packages(modules: list[str]) -> set[str]:
    """The packages of the user's modules."""
    return {name.removesuffix(".py").partition(".")[0] for name in modules}


def check_import(path: str, where: str, modules: list[str]) -> None:
    """Raise UserError for a dotted path that may not be imported; `where` says who named it."""
    package = path.partition(".")[0]
    refused = any(f"{path}.".startswith(f"{name}.") for name in REFUSED)
    if package not in (*PACKAGES, *_packages(modules)) or refused:
        raise UserError(refusal(path, where))


def refusal(path: str, where: str) -> str:
    """The sentence about a path that may not be imported."""
    package = path.partition(".")[0]
    if package in PACKAGES:
        return f"{where} '{path}' loads code of others, which no config may do; leave it out"
    return (
        f"{where} '{path}' is outside of {', '.join(PACKAGES)}, and importing it runs its code; if you trust it, add "
        f"--import {package}"
    )


def check_fragments(fragments: list[Fragment], modules: list[str]) -> None:
    """Raise UserError where a config file names a class outside of the packages, or a module to import.

    Args:
        fragments: the config files.
        modules: named with --import on the command line.
    """
    for fragment in fragments:
        for key, path in _class_paths(fragment.content, ""):
            if "." in path:
                check_import(path, f"config file '{fragment.name}': {key}", modules)
        wanted = fragment.content.get("import") or []
        if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
            raise UserError(f"config file '{fragment.name}': import must be a list of modules")
        for name in wanted:
            if name not in modules:
                raise UserError(
                    f"config file '{fragment.name}' asks for the module '{name}', and importing it runs its code; if "
                    f"you trust it, add --import {name}"
                )


def _class_paths(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted key and value of each `class_path` at or below a node."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        inside = f"{key}.{name}" if key else str(name)
        if name == "class_path" and isinstance(child, str):
            yield inside, child
        else:
            yield from _class_paths(child, inside)


def check_classes(config: Any, modules: list[str]) -> None:
    """Raise UserError where a parsed config gives arguments to anything but a class that runs are made of. The parser
    would call whatever function stands where a callable is wanted.

    Args:
        config: mappings and lists.
        modules: named with --import on the command line; their classes and functions are trusted.
    """
    for key, path in _class_paths(config, ""):
        package, _, name = path.rpartition(".")
        if path.partition(".")[0] in _packages(modules):
            continue
        check_import(path, f"{key}:", modules)
        found = getattr(importlib.import_module(package), name, None)
        if not isinstance(found, type) or not issubclass(found, _parts_of_runs()):
            raise UserError(
                f"{key} '{path}' is no task, data module, view, callback, logger, profiler, strategy or plugin, and a "
                "config may give arguments to nothing else; leave it out"
            )


def _parts_of_runs() -> tuple[type, ...]:
    import lightning.pytorch as lightning  # here, because the command line asks this module before anything heavy
    from lightning.pytorch import accelerators, loggers, plugins, profilers, strategies
    from lightning.pytorch.plugins import environments

    from data import View

    return (
        View,
        lightning.LightningModule,
        lightning.LightningDataModule,
        lightning.Callback,
        loggers.Logger,
        profilers.Profiler,
        accelerators.Accelerator,
        strategies.Strategy,
        plugins.Precision,
        plugins.CheckpointIO,
        plugins.LayerSync,
        environments.ClusterEnvironment,
    )
