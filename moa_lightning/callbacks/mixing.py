"""What the learned mixes do while they train: coefficients, how far they follow the token, the state of the gates, and
the curve sum_k c_k sigma_k(u) as a picture.

Judge the curve, not the entries: LeakyReLU = 0.99 ReLU + 0.01 identity, so single coefficients are not identifiable.

Gates are summarised on one scale. A sigmoid gate p, and a tanh gate t through p = (1 + t) / 2 (which is a sigmoid of
twice the logit), has the Bernoulli entropy H(p) = -p log2 p - (1 - p) log2(1 - p); a softmax gate, one choice among K,
the Shannon entropy of its K values over log K. So 1 is a gate that has not decided, as at the identity start, and 0
one that is shut. Saturated are p outside [0.05, 0.95], and softmax gates whose largest value is above 0.95: their
gradient is nearly gone.

The input of a mix is seen by a hook that lives for one forward pass. It runs before the mix, where the parameters
of a sharded net are whole; after it they may be shards again. Compiled code ignores such hooks, so a compiled net runs
that one step eagerly, and less often.
"""

import math
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ..activations import pointwise
from ..experts import StackedLinear
from ..feedforward import FeedForward
from ..mixing import MixCoefficients
from ..places import OutputGate, PointwiseNorm
from .common import (
    is_logging_step,
    run_folder,
    steps_in_this_batch,
    tensorboard_step,
    tensorboard_writer,
    write_scalars,
)
from .figures import Curve, PairMap, Picture, draw_curves, draw_pair_maps, keep_latest, publish

MAX_TOKENS = 4096  # tokens that statistics are taken over; more do not change them visibly
CURVE_TOKENS = 512  # tokens whose curves make the band of a picture
CURVE_POINTS = 81
CURVE_RANGE = 4.0
FILES_KEPT = 3
SATURATED = 0.05
PARTS_OF_MOE = ("experts", "shared")  # feed-forward layers side by side in one block


@dataclass
class Capture:
    """What one mix did in one forward pass; tensors stay on their device until they are logged.

    K stands for the coefficients of the mix, K² for pairs.
    """

    alpha: Tensor
    """(K,)"""
    coefficients: Tensor
    """(N, K), one row a token"""
    gates: Tensor | None
    """(N, K), None for LA"""
    histogram: Tensor | None = None
    """(CURVE_POINTS - 1,) shares of the pre-activations u of the mix between the curve's points; None for pairs"""


@dataclass
class _Pending:
    """A picture to be drawn when the training clocks stand still: after the next validation, or when fit ends."""

    step: int
    tensorboard_step: int
    captured: dict[str, Capture]


def mix_names(net: nn.Module) -> dict[str, str]:
    """A readable name for each mix of a net, by its qualified one: the same whichever of them are looked at."""
    return short_names([name for name, module in net.named_modules() if isinstance(module, MixCoefficients)])


def short_names(names: list[str]) -> dict[str, str]:
    """Readable names of modules: net.blocks.3.mlp.up_mix -> block03/up, decoder_blocks.0.mlp.gate_mix ->
    decoder_block00/gate, net.blocks.3.norm1.mix -> block03/norm1, and of a mixture of experts block03/experts/up and
    block03/shared/up. Where two would be the same, their transformers lead all of their mixes (student/block03/up);
    where those have no names either, the full path stays."""
    short = {name: _short_name(name) for name in names}
    taken = Counter(short.values())
    alike = {_stack(name) for name, value in short.items() if taken[value] > 1}
    longer = {name: _join(_stack(name), value) if _stack(name) in alike else value for name, value in short.items()}
    taken = Counter(longer.values())
    return {name: value if taken[value] == 1 else name for name, value in longer.items()}


def _short_name(name: str) -> str:
    path, _, mix = name.removesuffix(".mix").rpartition(".")
    numbered = re.findall(r"([^.]+)\.(\d+)(?=\.|$)", path)
    place = ".".join(f"{container.removesuffix('s')}{int(number):02d}" for container, number in numbered)
    layer = path.rpartition(".")[2]
    return _join(place, layer if layer in PARTS_OF_MOE else "", mix.removesuffix("_mix"))


def _stack(name: str) -> str:
    """What stands before the first numbered container, or before a layer that lies in none."""
    before, *inside = re.split(r"(?:^|\.)[^.]+\.\d+(?:\.|$)", name, maxsplit=1)
    before = before if inside else name.removesuffix(".mix").rpartition(".")[0]
    return ".".join(part for part in before.split(".") if part != "net")


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def gate_entropy(gates: Tensor, kind: str) -> Tensor:
    """Entropy of each token's gates (N, K) -> (N,) in [0, 1], see above; `kind` is sigmoid, softmax or tanh."""
    if kind == "softmax":
        return torch.special.entr(gates).sum(-1) / np.log(max(gates.shape[-1], 2))
    p = gates if kind == "sigmoid" else (1 + gates) / 2
    return ((torch.special.entr(p) + torch.special.entr(1 - p)) / np.log(2)).mean(-1)


def gate_saturation(gates: Tensor, kind: str) -> Tensor:
    """Share of saturated gates (of tokens, for softmax) among gates (N, K), see above. A 0-d tensor."""
    if kind == "softmax":
        return (gates.amax(-1) > 1 - SATURATED).float().mean()
    p = gates if kind == "sigmoid" else (1 + gates) / 2
    return ((p < SATURATED) | (p > 1 - SATURATED)).float().mean()


def capture(module: MixCoefficients, x: Tensor, *rows: Any) -> Capture:
    """What the mix makes of its FFN's input x (..., d); of experts (whose rows x has), each row's own, α their mean."""
    tokens = x.detach()
    filled = filled_slots(tokens) if module.stack and not rows else None
    if not module.stack:
        tokens = _thinned(tokens.flatten(0, -2))
    with torch.no_grad():
        gates = module.gates(tokens, *rows)
        varies = gates is not None or module.stack
        coefficients = module.coefficients(tokens if varies else tokens[:1], *rows)
        return Capture(
            alpha=module.base.detach().float().reshape(-1, math.prod(module.entry_shape)).mean(0),
            coefficients=_by_token(coefficients, module, filled),
            gates=None if gates is None else _by_token(gates, module, filled),
        )


def filled_slots(x: Tensor) -> Tensor:
    """Which of the experts' slots x (E, C, d) hold a token, bool (E, C): what is left empty is all zero."""
    return x.any(-1)


def _thinned(rows: Tensor) -> Tensor:
    return rows[:: -(-rows.shape[0] // MAX_TOKENS)]


def _by_token(values: Tensor, module: MixCoefficients, filled: Tensor | None) -> Tensor:
    """(..., K) or (..., K, K) as a copy (N, K) or (N, K²) of at most MAX_TOKENS rows, of `filled` slots only."""
    values = values.flatten(-module.entry_axes)
    return _thinned(values.flatten(0, -2) if filled is None else values[filled]).clone()


def start_coefficients(module: MixCoefficients) -> np.ndarray:
    """The coefficients (K,) or (K, K) that the mix had before training, by its settings; of experts, their mean."""
    shape = module.entry_shape
    if module.given_start is not None:
        return module.given_start.double().reshape(-1, *shape).mean(0).cpu().numpy()
    if module.init == "identity":
        start = np.zeros(shape)
        start[module.start] = 1.0
        return start
    return np.full(shape, module.gate_zero if module.gate else 1 / math.prod(shape))


def projections_of_mixes(net: nn.Module) -> dict[MixCoefficients, nn.Module]:
    """The module to whose output each mix is applied; none for pairs, which mix the outputs of two."""
    found: dict[MixCoefficients, nn.Module] = {}
    for layer in net.modules():
        if isinstance(layer, FeedForward):
            for mix, projection in ((layer.up_mix, layer.up_proj), (layer.gate_mix, layer.gate_proj)):
                if isinstance(mix, MixCoefficients) and projection is not None:
                    found[mix] = projection
        elif isinstance(layer, OutputGate | PointwiseNorm) and isinstance(layer.mix, MixCoefficients):
            found[layer.mix] = layer.gate_proj if isinstance(layer, OutputGate) else layer.scale
    return found


def pre_activations(projection: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """What a projection returned for tokens (..., h): experts' slots that are empty left out."""
    slots = isinstance(projection, StackedLinear) and len(arguments) == 1
    return output[filled_slots(arguments[0])] if slots else output


@torch.no_grad()
def histogram_of(u: Tensor) -> Tensor:
    """Shares of pre-activations u (..., h) between the points of a curve, those outside left out but counted."""
    rows = u.flatten(0, -2)
    rows = rows[:: -(-rows.shape[0] // CURVE_TOKENS)].float()
    return torch.histc(rows, CURVE_POINTS - 1, -CURVE_RANGE, CURVE_RANGE) / rows.numel()


class MixingTelemetry(L.Callback):
    """Logs the learned mixes of a net; does nothing for a net without any.

    On logging steps, for each mix that trains: mixing/<layer>/alpha/<entry>; for MoA also mean/<entry> and
    std/<entry>, mean and standard deviation of c_k(x) over tokens, and gate_entropy and gate_saturation. Pairs, which
    have K² entries, only get the last two. Pictures mixing/curves and mixing/pairs in TensorBoard, the last few also
    in <run_dir>/pictures. All of it for the tokens of the first process, in the first forward pass of the batch.

    Args:
        every_n_steps: steps between pictures; the last step of a run makes one too. Compiled nets log their scalars
            at this cadence as well.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self.every_n_steps = every_n_steps
        self._mixes: dict[str, MixCoefficients] = {}
        self._captured: dict[str, Capture] = {}
        self._histograms: dict[str, Tensor] = {}
        self._pending: _Pending | None = None
        self._hooks = ExitStack()
        self._run_dir: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._run_dir = run_folder(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        learning = {
            name: module
            for name, module in pl_module.named_modules()
            if isinstance(module, MixCoefficients) and any(p.requires_grad for p in module.parameters())
        }
        names = mix_names(pl_module)
        self._mixes = {names[name]: module for name, module in learning.items()}
        self._projections = projections_of_mixes(pl_module)
        self._compiled = any(is_compiled(module) for module in pl_module.modules())
        self._captured, self._histograms, self._pending = {}, {}, None
        self._last_step = trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self._mixes or not steps_in_this_batch(trainer) or tensorboard_writer(trainer) is None:
            return
        self._draw = self._picture_is_due(trainer)
        if self._draw or (is_logging_step(trainer) and not self._compiled):
            for name, module in self._mixes.items():
                self._hooks.callback(module.register_forward_pre_hook(self._hook(name)).remove)
                if self._draw and module in self._projections:
                    see = self._histogram_hook(name)
                    self._hooks.callback(self._projections[module].register_forward_hook(see).remove)
            if self._compiled:
                self._hooks.enter_context(torch.compiler.set_stance("force_eager"))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._hooks.close()
        writer = tensorboard_writer(trainer)
        if not self._captured or writer is None:
            return
        write_scalars(writer, self._scalars(), tensorboard_step(trainer))
        if self._draw:
            self._draw_pending(trainer)
            for name, histogram in self._histograms.items():
                self._captured[name].histogram = histogram
            self._pending = _Pending(trainer.global_step, tensorboard_step(trainer), self._captured)
        self._captured, self._histograms = {}, {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw_pending(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw_pending(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._hooks.close()

    def _picture_is_due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step + 1
        return step % self.every_n_steps == 0 or step == self._last_step

    def _hook(self, name: str) -> Any:
        def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(module, MixCoefficients)
            if name not in self._captured:  # not again for further views, nor when a checkpointed block is recomputed
                self._captured[name] = capture(module, *arguments)

        return see

    def _histogram_hook(self, name: str) -> Any:
        def see(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if name not in self._histograms:
                self._histograms[name] = histogram_of(pre_activations(module, arguments, output))

        return see

    def _scalars(self) -> dict[str, float]:
        """All scalars of the captured mixes, brought from the device in one transfer."""
        tags: list[str] = []
        parts: list[Tensor] = []
        for layer, seen in self._captured.items():
            module = self._mixes[layer]
            if module.entry_axes == 1:
                tags += [f"mixing/{layer}/alpha/{entry}" for entry in module.entries]
                parts.append(seen.alpha)
            if seen.gates is None or module.gate is None:
                continue
            if module.entry_axes == 1:
                tags += [f"mixing/{layer}/{what}/{entry}" for what in ("mean", "std") for entry in module.entries]
                parts += [seen.coefficients.mean(0), seen.coefficients.std(0, correction=0)]
            tags += [f"mixing/{layer}/gate_entropy", f"mixing/{layer}/gate_saturation"]
            parts.append(
                torch.stack([gate_entropy(seen.gates, module.gate).mean(), gate_saturation(seen.gates, module.gate)])
            )
        values = torch.cat([part.double() for part in parts]).tolist() if parts else []
        return dict(zip(tags, values, strict=True))

    def _draw_pending(self, trainer: L.Trainer) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        curves, maps = [], []
        for name, seen in pending.captured.items():
            module = self._mixes[name]
            if module.entry_axes == 1:
                curves.append(_curve(name, module, seen))
            else:
                maps.append(_pair_map(name, module, seen))
        when = f"after {pending.step} steps"
        if curves:
            self._send(trainer, draw_curves(curves, curve_points(), f"Σ c_k σ_k(u) {when}"), "curves", pending)
        if maps:
            self._send(trainer, draw_pair_maps(maps, f"c_kl of σ_k(gate) · σ_l(up) {when}"), "pairs", pending)

    def _send(self, trainer: L.Trainer, picture: Picture, name: str, pending: _Pending) -> None:
        folder = None if self._run_dir is None else self._run_dir / "pictures"
        file = None if folder is None else folder / f"mixing-{name}-step{pending.step:06d}.png"
        publish(picture, f"mixing/{name}", pending.tensorboard_step, tensorboard_writer(trainer), file)
        if folder is not None:
            keep_latest(folder, f"mixing-{name}", FILES_KEPT)


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")  # module.compile(), torch.compile


def curve_points() -> np.ndarray:
    return np.linspace(-CURVE_RANGE, CURVE_RANGE, CURVE_POINTS)


def curve_values(entries: tuple[str, ...]) -> np.ndarray:
    """sigma_k(u) at the points of a curve, (K, P)."""
    u = torch.from_numpy(curve_points())
    return torch.stack([pointwise(entry).function(u) for entry in entries]).numpy()


def _curve(name: str, module: MixCoefficients, seen: Capture) -> Curve:
    values = curve_values(module.entries)
    rows = seen.coefficients[:: -(-seen.coefficients.shape[0] // CURVE_TOKENS)]
    tokens = rows.double().cpu().numpy() @ values  # (N, P)
    low, high = np.quantile(tokens, (0.1, 0.9), axis=0)
    histogram = None if seen.histogram is None else seen.histogram.cpu().numpy()
    return Curve(name, tokens.mean(0), low, high, start_coefficients(module) @ values, histogram)


def _pair_map(name: str, module: MixCoefficients, seen: Capture) -> PairMap:
    mean = seen.coefficients.double().mean(0).reshape(module.entry_shape).cpu().numpy()
    start = (module.start[0], module.start[1]) if module.init == "identity" else None
    return PairMap(name, mean, module.entries, start)
