"""`moa export --to timm`: the vision transformer of a run as a model of timm, or as `moa_vit` where its layers are not
timm's.

Of MAE it is the encoder, of DINO the teacher's backbone, of ImageClassification all, with its head. Where every
feed-forward layer computes what timm's layer does (a fixed activation, the same widths), the tensors get timm's names
and plain timm loads the file. Otherwise, for LA and MoA above all, they keep ours, and `import moa_lightning;
timm.create_model("moa_vit", file=...)` loads it. Either way the net of the file is built and run beside the run's own
before the file is written.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import Eva
from torch import Tensor, nn

from ..activations import is_pointwise
from ..errors import UserError
from ..feedforward import FeedForward, FFNConfig, MixedLayer
from ..injection import inject
from ..injection_adapters import activation_name
from ..models.vit import build_vit, pooled, untouched_tokens

MAE, DINO, CLASSIFIER = "encoder.", "teacher.backbone.", "vit."  # where a task's net has its transformer
MEAN_OF_PATCHES = {"global_pool": "avg", "fc_norm": False}  # after the last norm, as MAE's features are
MEAN_OF_PATCHES_EVA = {"global_pool": "avg", "use_fc_norm": False}
LARGEST = 1e-6  # relative difference of features that is rounding


class Encoder(NamedTuple):
    """What goes into the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    call: str
    """the line of Python that loads it, with FILE for the file"""


def encoder_of(net: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Encoder:
    """The encoder of a run, or its classifier.

    Args:
        net: the tensors of its net by name.
        settings: the task's hyper-parameters.

    Raises:
        UserError: the run has no vision transformer.
    """
    prefix = next((p for p in (MAE, DINO, CLASSIFIER) if any(name.startswith(p) for name in net)), None)
    if prefix is None:
        raise UserError("the run has no encoder for timm: --to timm is for runs of MAE, DINO and ImageClassification")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in net.items() if name.startswith(prefix)}
    options, config = dict(settings["backbone_args"]), FFNConfig(**settings["ffn"])
    classes = settings["num_classes"] if prefix == CLASSIFIER else 0
    if prefix == CLASSIFIER:
        options["global_pool"] = settings["pool"]
    if prefix == MAE:
        options = {**{k: v for k, v in options.items() if k != "global_pool"}, **untouched_tokens(settings["backbone"])}
    name, size, channels = settings["backbone"], settings["image_size"], settings["channels"]
    run: nn.Module = build_vit(name, config, size, channels, 0, **options)
    if classes:
        run.reset_classifier(classes)  # type: ignore[operator]
    run.load_state_dict(tensors)
    mean = prefix == MAE and "global_pool" in options
    if mean:
        options |= MEAN_OF_PATCHES_EVA if isinstance(run, Eva) else MEAN_OF_PATCHES
    options = {"num_classes": classes, "img_size": size, "in_chans": channels, **options}
    written = timm.create_model(name, **options)
    state = timm_state(run, written)
    if state is None:
        inject(written, config)
        state = {key: value.contiguous().clone() for key, value in run.state_dict().items()}
        call = 'import moa_lightning; timm.create_model("moa_vit", file=FILE)'
    else:
        arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
        call = f'timm.create_model("{name}", checkpoint_path=FILE, {arguments})'
    written.load_state_dict(state)
    _check_same(run, written, mean, (1, channels, size, size))
    about = {"backbone": name, "ffn": asdict(config), "options": options}
    return Encoder(state, {"encoder": json.dumps(about)}, call)


@torch.no_grad()
def _check_same(run: Any, written: Any, mean: bool, shape: tuple[int, ...]) -> None:
    """RuntimeError unless both nets give the same tokens and the same vector or logits for an image of noise."""
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tokens, found = (net.eval().forward_features(image) for net in (run, written))
    vector = pooled(run, tokens) if mean else run(image)
    for expected, ours in ((tokens, found), (vector, written(image))):
        difference = float((ours - expected).norm() / expected.norm())
        if not difference <= LARGEST:
            raise RuntimeError(f"the exported encoder differs from the run's by {difference:.2g} of its outputs")


def timm_state(ours: nn.Module, theirs: nn.Module) -> dict[str, Tensor] | None:
    """The state of a net with FeedForwards under the names of timm's own net; None where that computes something else.

    Args:
        ours: a timm net whose feed-forward layers were swapped.
        theirs: the same net as timm makes it.
    """
    state = {key: value.detach() for key, value in ours.state_dict().items()}
    for name, layer in ours.named_modules():
        if not isinstance(layer, FeedForward):
            if isinstance(layer, MixedLayer):  # a gate or norm that timm has not
                return None
            continue
        renamed = _renamed(layer, theirs.get_submodule(name))
        if renamed is None:
            return None
        kept = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
        state = {**kept, **{f"{name}.{key}": value for key, value in renamed.items()}}
    return {key: value.contiguous().clone() for key, value in state.items()}


def _renamed(layer: FeedForward, theirs: Any) -> dict[str, Tensor] | None:
    """The tensors of one layer under timm's names, if timm's layer computes the same."""
    config = layer.config
    if config.mixing != "fixed" or not is_pointwise(config.activation):
        return None
    if activation_name(theirs.act, (config.activation,)) != config.activation:
        return None
    up, gate, down = layer.up_proj, layer.gate_proj, layer.down_proj
    if isinstance(theirs, SwiGLU) and gate is not None:
        parts: dict[str, Any] = {"fc1_x": _tensors(up), "fc1_g": _tensors(gate)}
    elif isinstance(theirs, GluMlp) and gate is not None:
        first, second = (_tensors(part) for part in ((up, gate) if theirs.gate_last else (gate, up)))
        parts = {"fc1": {key: torch.cat([first[key], second[key]]) for key in first}}
    elif isinstance(theirs, Mlp) and gate is None:
        parts = {"fc1": _tensors(up)}
    else:
        return None
    parts |= {"fc2": _tensors(down), "norm": {} if layer.norm is None else _tensors(layer.norm)}
    state = {f"{part}.{key}": value for part, tensors in parts.items() for key, value in tensors.items()}
    expected = theirs.state_dict()
    same = state.keys() == expected.keys() and all(state[key].shape == expected[key].shape for key in state)
    return state if same else None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in module.state_dict().items()}
