"""The encoder of a trained model as the start of another one: from runs of MAE, DINO and ImageClassification, from what
`moa export` writes, and from files of others that name their tensors as timm does (facebookresearch/mae and /dino).
Those go through timm's own filters, which resize patches and positions and know the layouts of other projects.

Files are read as tensors and plain values only, so they run no code. Of DINO the teacher is taken. What belongs to the
old objective (decoder, projection head, classifier) is left, and what the file cannot have keeps its own start: the
new head with its norm, and the coefficients of learned mixes, so that a net with fixed activations can go on as LA or
MoA.

Tensors do not tell the activation that they were trained with. Runs and exports of ours say it, and the net must
compute the same or start as the same; of other files the activation of timm's own model is assumed.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor

from ..checkpoint_reading import VISION, is_joint
from ..checkpoints import RunCheckpointIO
from ..errors import UserError
from ..feedforward import FeedForward, MixedLayer
from ..mixing import FixedActivation, MixCoefficients
from ..optim import net_weights
from ..run_folder import given_checkpoint
from ..transplants import own_starts
from .timm_models import HEADS

ENVELOPES = ("state_dict", "teacher", "model")  # under which files keep their tensors
MARK = "patch_embed.proj.weight"  # every vision transformer has it: what stands before it is its prefix
NORM = ("norm.weight", "norm.bias")  # the last one, which a net that pools has behind the pool, as fc_norm


class Weights(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    ffn: dict[str, Any] | None
    """options of the encoder's feed-forward layers, where the file says them"""


def load_encoder(vit: Any, path: str) -> str:
    """Put the encoder of a file into a timm vision transformer, in place.

    Positions of another grid are interpolated, as timm does, and of the filters for three channels one channel gets the
    sum.

    Args:
        vit: its feed-forward layers are ours.
        path: a checkpoint (a file or a folder of shards), or a .safetensors file.

    Returns:
        What was taken, for the log.

    Raises:
        UserError: no such file, not a vision transformer, one of another shape, or of other activations than the net's.
    """
    content = read_weights(path)
    tensors = encoder_tensors(content.tensors, path)
    ffn, said = _activations(vit, tensors, content.ffn)
    found = _as_ours(vit, tensors, path)
    _fit_positions(vit, found)
    channels = vit.patch_embed.proj.weight.shape[1]
    found[MARK] = adapt_input_conv(channels, found[MARK], found[MARK].shape[1])
    if vit.num_classes:
        found = {name: tensor for name, tensor in found.items() if not name.startswith(HEADS)}
    own, fresh = vit.state_dict(), _fresh(vit)
    without_place = sorted(name for name in found if name.startswith("blocks.") and name not in own)
    if without_place:
        raise UserError(
            f"weights '{path}' have {without_place[0]}, for which this net has no place: give the backbone, "
            "backbone_args and ffn that they were trained as"
        )
    for name, tensor in own.items():
        given = found.get(name)
        if given is None and name not in fresh:
            raise UserError(f"weights '{path}' have no {name}: give the backbone and the ffn that they were trained as")
        if given is not None and given.shape != tensor.shape:
            raise UserError(
                f"weights '{path}' have {name} of shape {tuple(given.shape)}, and this net wants "
                f"{tuple(tensor.shape)}: give the backbone, backbone_args and ffn that they were trained as"
            )
    if not any(isinstance(m, MixedLayer) and m.config.start_from for m in vit.modules()):  # those start elsewhere
        own_starts(vit, found, {"ffn": ffn}, Path(path))
    vit.load_state_dict({name: found[name] for name in own if name in found}, strict=False)
    return f"encoder from {path}{said}"


def _activations(vit: Any, tensors: Mapping[str, Tensor], ffn: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Options of the feed-forward layers that tensors are of, as far as they are known, and what of it is assumed."""
    if ffn is not None:
        return ffn, ""
    assumed: str | None = getattr(vit, "timm_activation", None)
    if assumed is None or any(".up_proj." in name for name in tensors):
        return {}, ", which does not say its activation"
    return {"activation": assumed}, f", which does not say its activation: {assumed} is assumed, as timm's model has it"


def no_weights(path: str) -> str:
    """What is wrong with `backbone_weights` that name nothing, or a run that has not saved."""
    return f"model.backbone_weights: there is no '{path}' that holds weights; name a run that has saved, or a file"


def read_weights(path: str) -> Weights:
    """The tensors of a file, or of a run's last checkpoint, by name, and what it says of the feed-forward layers.

    Of a run with an average they are those that it evaluates.

    Raises:
        UserError: it cannot be read.
    """
    place = given_checkpoint(path)
    if place is None:
        raise UserError(no_weights(path))
    if place.suffix == ".safetensors":
        try:
            with safe_open(place, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                return Weights(tensors, _ffn(json.loads(about.get("encoder") or about.get("hyper_parameters", "{}"))))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"weights '{path}' cannot be read ({error}); give another file") from error
    content: Any = RunCheckpointIO().load_checkpoint(place)
    if not isinstance(content, dict):
        raise UserError(f"weights '{path}' are no tensors by name; give another file")
    ffn = _ffn(content.get("hyper_parameters"))
    if ffn is not None and (of_run := net_weights(content)):
        return Weights(of_run, ffn)
    for envelope in ENVELOPES:
        inside = content.get(envelope)
        if isinstance(inside, dict):
            content = inside
    return Weights({name: value for name, value in content.items() if isinstance(value, Tensor)}, ffn)


def _ffn(settings: Any) -> dict[str, Any] | None:
    """The encoder's feed-forward options in what a file says of its net; of a joint run the vision task's."""
    settings = settings if isinstance(settings, dict) else {}
    found = (settings[VISION]["options"] if is_joint(settings) else settings).get("ffn")
    return found if isinstance(found, dict) else None


def encoder_tensors(content: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors of the vision transformer in a file, under its own names; of student and teacher the teacher's.

    Raises:
        UserError: there is none.
    """
    prefixes = encoder_prefixes(content)
    if not prefixes:
        raise UserError(f"weights '{path}' hold no vision transformer: give a run of MAE or DINO, or a timm model")
    prefix = prefixes[0]
    return {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}


def encoder_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of each vision transformer among these; a teacher first: it is the one to keep."""
    prefixes = sorted(name.removesuffix(MARK) for name in names if name.endswith(MARK))
    return sorted(prefixes, key=lambda prefix: "teacher" not in prefix)


def _as_ours(vit: Any, found: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors under the names of `vit`, where they have timm's or another project's."""
    layers = [name for name, module in vit.named_modules() if isinstance(module, FeedForward)]
    if not any(f"{name}.up_proj.weight" in found for name in layers):
        filter_fn = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
        try:
            found = dict(found if filter_fn is None else filter_fn(found, vit))
        except (RuntimeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"weights '{path}' are not those of such a net: {error}") from error
        for name in layers:
            _rename_layer(found, name, vit.get_submodule(name))
    for norm in NORM:
        if norm in vit.state_dict() and norm not in found and f"fc_{norm}" in found:
            found[norm] = found[f"fc_{norm}"]
    return found


def _rename_layer(found: dict[str, Tensor], name: str, layer: FeedForward) -> None:
    """Give the tensors of one feed-forward layer our names, in place: timm's are fc1 and fc2, with a gate fc1_g and
    fc1_x, or both in fc1, the gate first, as its vision transformers have it."""
    for leaf in ("weight", "bias"):
        if layer.gate_proj is not None and f"{name}.fc1.{leaf}" in found:
            gate, up = found.pop(f"{name}.fc1.{leaf}").chunk(2)
            found |= {f"{name}.fc1_g.{leaf}": gate, f"{name}.fc1_x.{leaf}": up}
        up_name = "fc1" if layer.gate_proj is None else "fc1_x"
        for theirs, ours in ((up_name, "up_proj"), ("fc1_g", "gate_proj"), ("fc2", "down_proj")):
            if f"{name}.{theirs}.{leaf}" in found:
                found[f"{name}.{ours}.{leaf}"] = found.pop(f"{name}.{theirs}.{leaf}")


def _fit_positions(vit: Any, found: dict[str, Tensor]) -> None:
    positions, own = found.get("pos_embed"), getattr(vit, "pos_embed", None)
    if positions is None or own is None or positions.shape == own.shape or positions.dim() != 3:
        return
    patches = int(vit.patch_embed.num_patches)
    prefix = own.shape[1] - patches
    if own.shape[2] == positions.shape[2] and (positions.shape[1] - prefix) ** 0.5 % 1 == 0:
        grid = list(vit.patch_embed.grid_size)
        found["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)


def _fresh(vit: Any) -> set[str]:
    """Names that a file need not have."""
    mixes = {
        f"{name}.{leaf}"
        for name, module in vit.named_modules()
        if isinstance(module, MixCoefficients | FixedActivation)
        for leaf in module.state_dict()
    }
    return mixes | {name for name in vit.state_dict() if name.startswith(HEADS)}
