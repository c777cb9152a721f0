"""timm's model `moa_vit`: a timm vision transformer with feed-forward layers of ours, built by timm.create_model.

    import moa_lightning
    net = timm.create_model("moa_vit", file="encoder.safetensors")                       # what moa export has written
    net = timm.create_model("moa_vit", backbone="vit_small_patch16_224", ffn={"mixing": "moa"}, num_classes=10)

`import moa_lightning` announces it to timm; where timm is not imported yet, as soon as it is. So the package itself
stays quick to import.
"""

import importlib.machinery
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError

NAME = "moa_vit"
FROM_TIMM = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # what create_model hands to every model
# belong to a classifier, which starts anew where the file has none that fits
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.")


def register() -> None:
    """Announce `moa_vit` to timm, now or when it is imported."""
    if "timm" in sys.modules:
        _announce()
    else:
        sys.meta_path.insert(0, _AfterTimm())


def _announce() -> None:
    from timm.models import register_model

    register_model(moa_vit)


class _AfterTimm(MetaPathFinder):
    """Finds timm as Python would, and has `moa_vit` announced once it is there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_announce(module: ModuleType) -> None:
            sys.meta_path.remove(self)  # not before: others only ask whether timm is installed
            execute(module)
            _announce()

        spec.loader.exec_module = execute_and_announce  # type: ignore[method-assign]
        return spec


def moa_vit(
    pretrained: bool = False,
    file: str | None = None,
    backbone: str | None = None,
    ffn: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A timm vision transformer with swapped feed-forward layers.

    Args:
        pretrained: not offered.
        file: safetensors of moa export; says backbone, ffn and options, and has the weights.
        backbone: timm model name.
        ffn: fields of FFNConfig.
        options: of the timm model; they win over the file's. With another number of classes than the file's a fresh
            classifier stands on top, with none (num_classes=0) nothing.

    Raises:
        UserError: neither file nor backbone, or a file that moa export has not written.
    """
    from timm import create_model

    from ..feedforward import FFNConfig
    from ..injection import inject

    if pretrained:
        raise UserError(f"{NAME} has no pre-trained weights of its own: give file, which moa export writes")
    options = {name: value for name, value in options.items() if name not in FROM_TIMM}
    tensors: dict[str, Any] = {}
    if file is not None:
        saved, tensors = read(file)
        backbone, ffn = backbone or saved["backbone"], ffn or saved["ffn"]
        options = {**saved["options"], **options}
    if backbone is None:
        raise UserError(f"{NAME} needs file, or backbone with the name of a timm model")
    net = create_model(backbone, **options)
    inject(net, FFNConfig(**(ffn or {})))
    if tensors:
        heads = {key: value for key, value in net.state_dict().items() if key.startswith(HEADS)}
        kept = {
            key: value
            for key, value in tensors.items()
            if not key.startswith(HEADS) or (key in heads and heads[key].shape == value.shape)
        }
        net.load_state_dict({**heads, **kept})
    return net


def read(file: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file of moa export says about its net, and its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(file), "pt") as content:
            saved = json.loads((content.metadata() or {}).get("encoder", "null"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read as an encoder ({error}); moa export --to timm writes one") from error
    if saved is None:
        raise UserError(f"'{file}' does not say which net it is of; moa export --to timm writes one that does")
    return saved, tensors
