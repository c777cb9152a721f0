"""What the mixes have learned, looked at in validations: on the same held-out batch each time, as it is judged.

The first validation batch (of the last loader: whole images, text windows) shows every mix its tokens in their places,
so that they can be asked by class: letters, digits, keywords, ink, background (evaluation/token_classes.py). Cheap
numbers come from every validation: mean coefficients and gate entropy, for all tokens and by class, to TensorBoard and
to mixing.json. Pictures come from the first validations past a quarter, half and three quarters of the run, and from
the last: the mean curve of each mix over training on its pre-activations, and the tokens whose mixes differ most.

Which tokens differ most is asked of their curves, since single coefficients are not identifiable: each token's curve
sum_k c_k sigma_k(u), u in [-4, 4], is projected on the direction in which curves vary most (first principal axis), and
the tokens at its two ends are shown. [O]
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from ..controls import MIXING
from ..evaluation.token_classes import TokenClasses
from ..mixing import MixCoefficients
from .common import domain_of, run_folder, tensorboard_step, tensorboard_writer, watched, write_scalars
from .figures import OverTime, Picture, draw_over_time, draw_patches, evenly, keep_latest, publish
from .files import write_json
from .mixing import (
    CURVE_RANGE,
    FILES_KEPT,
    curve_points,
    curve_values,
    histogram_of,
    is_compiled,
    mix_names,
    pre_activations,
    projections_of_mixes,
    start_coefficients,
)
from .seen_mixes import Seen, SeenByExperts, see

MARKS = (0.25, 0.5, 0.75)  # shares of a run after which it is drawn, besides its end
EXAMPLES = 8  # tokens at each end
EXAMPLE_MIXES = 3  # whose tokens are shown
CONTEXT = 24  # characters on each side of an example
PROBES = (-2.0, 2.0)  # points at which an end's mean curve is told in numbers


@dataclass(frozen=True)
class Ends:
    """Tokens at the two ends of the first principal axis of a mix's curves."""

    share: float
    """of the curves' variance that the axis explains"""
    order: np.ndarray
    """(N,) tokens from one end to the other, as indices into the flattened batch"""
    curves: np.ndarray
    """(N, P) the tokens' curves"""


class LearnedMixes(L.Callback):
    """Writes mixing.json, mixing/<layer>/entropy/<class>, and the pictures and texts named above.

    Pictures mixing/training and mixing/patches, text mixing/tokens; as files <run_dir>/pictures/mixing-training-step*,
    mixing-patches-step* and <run_dir>/samples/mixing-tokens-step*. The first process looks at its part of the batch.
    Curves need a mix with one entry axis, so pairs are in mixing.json only. Routed experts have their numbers, by
    expert too, and their curves; not classes and examples, since their rows no longer stand in the tokens' places.
    """

    def __init__(self) -> None:
        self._marks: dict[str, dict[str, Any]] = {}  # share of the run -> {"step": ..., "means": {layer: (K,)}}
        self._seen: dict[str, Seen | SeenByExperts] = {}
        self._histograms: dict[str, Tensor] = {}
        self._batches: dict[str, Any] = {}  # by domain
        self._domains: dict[str, str] = {}  # of the mixes
        self._hooks = ExitStack()
        self._run_dir: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"marks": self._marks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._marks = state["marks"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == TrainerFn.FITTING:
            self._marks, self._run_dir = {}, run_folder(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if batch_idx or not fitting or not trainer.is_global_zero:
            return
        mixes = {n: m for n, m in pl_module.named_modules() if isinstance(m, MixCoefficients)}
        if not mixes:
            return
        domain = domain_of(batch)
        self._batches[domain] = batch
        for name in [name for name, of in self._domains.items() if of == domain]:  # the domain's last loader counts
            for found in (self._seen, self._histograms, self._domains):
                found.pop(name, None)
        projections = projections_of_mixes(pl_module)
        for name, module in mixes.items():
            self._hooks.callback(module.register_forward_pre_hook(self._mix_hook(name, domain)).remove)
            if module in projections:
                self._hooks.callback(projections[module].register_forward_hook(self._input_hook(name)).remove)
        if any(is_compiled(module) for module in pl_module.modules()):
            self._hooks.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_batch_end(self, *_: Any) -> None:
        self._hooks.close()

    def on_exception(self, *_: Any) -> None:
        self._hooks.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._seen:
            return
        mixes = {name: m for name, m in pl_module.named_modules() if isinstance(m, MixCoefficients)}
        for name, histogram in self._histograms.items():
            self._seen[name].histogram = histogram
        names = mix_names(pl_module)
        layers = {names[name]: (name, mixes[name], seen) for name, seen in self._seen.items()}
        by_domain = {domain: watched(pl_module).token_classes(batch) for domain, batch in self._batches.items()}
        classes = {
            layer: by_domain[self._domains[name]] if isinstance(seen, Seen) else None
            for layer, (name, _, seen) in layers.items()
        }
        self._seen, self._histograms, self._batches, self._domains = {}, {}, {}, {}
        facts = {layer: _facts(name, mix, seen, classes[layer]) for layer, (name, mix, seen) in layers.items()}
        due = self._note_marks(trainer, {layer: fact["mean"] for layer, fact in facts.items()})
        writer = tensorboard_writer(trainer)
        if writer is not None:
            entropies = {
                f"mixing/{layer}/entropy/{name}": value
                for layer, fact in facts.items()
                for name, value in fact["entropy_by_class"].items()
            }
            write_scalars(writer, entropies, tensorboard_step(trainer))
        if self._run_dir is not None:
            write_json(self._run_dir / MIXING, {"step": trainer.global_step, "layers": facts})
        if due:
            self._draw(trainer, {layer: (mix, seen) for layer, (_, mix, seen) in layers.items()}, classes)

    def _note_marks(self, trainer: L.Trainer, means: dict[str, Any]) -> bool:
        """Keep the means where a share of the run has passed; whether pictures are due."""
        done = trainer.global_step / trainer.estimated_stepping_batches  # 0 for a run without an end
        passed = [mark for mark in MARKS if mark <= done and str(mark) not in self._marks]
        for mark in passed:
            self._marks[str(mark)] = {"step": trainer.global_step, "means": means}
        return bool(passed) or done == 0 or done >= 1

    def _mix_hook(self, name: str, domain: str) -> Any:
        def look(module: MixCoefficients, arguments: tuple[Any, ...]) -> None:
            # the first pass is the one over whole samples
            if name not in self._seen and arguments[0].dim() > 1:
                self._seen[name] = see(module, *arguments)
                self._domains[name] = domain

        return look

    def _input_hook(self, name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if name not in self._histograms:
                self._histograms[name] = histogram_of(pre_activations(module, arguments, output)).cpu()

        return look

    def _draw(
        self,
        trainer: L.Trainer,
        layers: dict[str, tuple[MixCoefficients, Seen | SeenByExperts]],
        classes: dict[str, TokenClasses | None],
    ) -> None:
        single = {layer: (mix, seen) for layer, (mix, seen) in layers.items() if mix.entry_axes == 1}
        if not single:
            return
        panels = [self._over_time(layer, mix, seen, trainer.global_step) for layer, (mix, seen) in single.items()]
        title = f"Σ c_k σ_k(u), mean over tokens of a held-out batch, until step {trainer.global_step}"
        self._send(trainer, draw_over_time(panels, curve_points(), title), "training")
        in_place = {layer: (mix, seen) for layer, (mix, seen) in single.items() if isinstance(seen, Seen)}
        ends = {layer: most_different(seen, mix.entries) for layer, (mix, seen) in in_place.items()}
        found = {layer: each for layer, each in ends.items() if each is not None}
        for kind in {id(each): each for each in classes.values() if each is not None}.values():
            own = {layer: each for layer, each in found.items() if classes[layer] is kind}
            self._draw_examples(trainer, {layer: in_place[layer][1] for layer in own}, own, kind)

    def _draw_examples(
        self, trainer: L.Trainer, layers: dict[str, Seen], found: dict[str, Ends], classes: TokenClasses
    ) -> None:
        """The tokens of one domain whose mixes differ most."""
        chosen = evenly(list(found), EXAMPLE_MIXES)
        shape = {layer: layers[layer].coefficients.shape[:2] for layer in chosen}
        chosen = [layer for layer in chosen if shape[layer][1] == classes.ids.shape[1]]
        if classes.pieces is not None and chosen:
            text = "\n\n".join(text_examples(layer, found[layer], classes.pieces) for layer in chosen)
            self._write_text(trainer, text)
        if classes.images is not None and chosen:
            rows = [row for layer in chosen for row in patch_examples(layer, found[layer], classes)]
            picture = draw_patches(rows, classes.images.numpy(), classes.patch, "Patches whose mixes differ most")
            self._send(trainer, picture, "patches")

    def _over_time(self, layer: str, mix: MixCoefficients, seen: Seen | SeenByExperts, step: int) -> OverTime:
        values = curve_values(mix.entries)
        marks = {f"{float(mark):.0%}": each for mark, each in self._marks.items() if each["step"] < step}
        curves = {"start": start_coefficients(mix) @ values}
        known = {when: each["means"] for when, each in marks.items() if layer in each["means"]}
        curves |= {when: np.asarray(means[layer]) @ values for when, means in known.items()}
        curves["now"] = seen.mean.numpy() @ values
        experts = seen.means[seen.used].numpy() @ values if isinstance(seen, SeenByExperts) else None
        return OverTime(layer, curves, None if seen.histogram is None else seen.histogram.numpy(), experts)

    def _send(self, trainer: L.Trainer, picture: Picture, name: str) -> None:
        file = None
        if self._run_dir is not None:
            file = self._run_dir / "pictures" / f"mixing-{name}-step{trainer.global_step:06d}.png"
        publish(picture, f"mixing/{name}", tensorboard_step(trainer), tensorboard_writer(trainer), file)
        if file is not None:
            keep_latest(file.parent, f"mixing-{name}", FILES_KEPT)

    def _write_text(self, trainer: L.Trainer, text: str) -> None:
        writer = tensorboard_writer(trainer)
        if writer is not None:
            writer.add_text("mixing/tokens", "    " + text.replace("\n", "\n    "), tensorboard_step(trainer))
        if self._run_dir is not None:
            file = self._run_dir / "samples" / f"mixing-tokens-step{trainer.global_step:06d}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            keep_latest(file.parent, "mixing-tokens", FILES_KEPT)


def _facts(name: str, mix: MixCoefficients, seen: Seen | SeenByExperts, classes: TokenClasses | None) -> dict[str, Any]:
    """What mixing.json says about one mix."""
    shares, by_class = _by_class(seen, classes) if isinstance(seen, Seen) else ({}, {})
    facts = {
        "module": name.removeprefix("net."),
        "entries": list(mix.entries),
        "gate": mix.gate,
        "mean": seen.mean.view(mix.entry_shape).tolist(),
        "std": seen.std.view(mix.entry_shape).tolist(),
        "entropy": seen.mean_entropy,
        "entropy_by_class": by_class,
        "class_shares": shares,
        "pre_activation_within_4": None if seen.histogram is None else seen.histogram.double().sum().item(),
    }
    return facts | {"experts": seen.facts()} if isinstance(seen, SeenByExperts) else facts


def _by_class(seen: Seen, classes: TokenClasses | None) -> tuple[dict[str, float], dict[str, float]]:
    """Each class's share of the tokens, and the gate entropy of those that occur."""
    entropy, (samples, tokens) = seen.entropy, seen.coefficients.shape[:2]
    if classes is None or classes.ids.shape[1] != tokens:
        return {}, {}
    ids = classes.ids[:samples]
    shares = {label: (ids == i).double().mean().item() for i, label in enumerate(classes.names)}
    if entropy is None:
        return shares, {}
    present = {label: ids == i for i, label in enumerate(classes.names) if shares[label]}
    return shares, {label: entropy[here].double().mean().item() for label, here in present.items()}


def most_different(seen: Seen, entries: tuple[str, ...]) -> Ends | None:
    """Tokens in the order of their curves along the first principal axis; None where all tokens have one curve."""
    curves = seen.coefficients.flatten(0, 1).numpy() @ curve_values(entries)  # (N, P)
    centred = curves - curves.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    if variances[-1] <= 1e-10:
        return None
    axis = axes[:, -1]
    along = centred @ (axis if axis.sum() >= 0 else -axis)  # from lower curves to higher ones
    return Ends(float(variances[-1] / variances.sum()), np.argsort(along, kind="stable"), curves)


def text_examples(layer: str, ends: Ends, pieces: list[list[str]]) -> str:
    """The two ends in words: each different token once, in its place in the text."""
    length = len(pieces[0])
    lines = [f"{layer}: {ends.share:.0%} of the variance of the tokens' curves lies along one axis"]
    for order in (ends.order, ends.order[::-1]):
        different: dict[str, int] = {}
        for token in order:
            different.setdefault(pieces[token // length][token % length], int(token))
            if len(different) == EXAMPLES:
                break
        lines.append(f"  {_curve_in_words(ends, list(different.values()))}")
        for token in different.values():
            row, place = pieces[token // length], token % length
            before, after = "".join(row[:place])[-CONTEXT:], "".join(row[place + 1 :])[:CONTEXT]
            lines.append("    " + _visible(f"{before}⟦{row[place]}⟧{after}"))
    return "\n".join(lines)


def patch_examples(layer: str, ends: Ends, classes: TokenClasses) -> list[tuple[str, list[tuple[int, int]]]]:
    """The two ends as (label, [(image, patch index)]), each image once at most."""
    assert classes.images is not None
    tokens, rows = classes.ids.shape[1], []
    for order in (ends.order, ends.order[::-1]):
        found: dict[int, int] = {}
        for token in order:
            if token % tokens >= classes.prefix:
                found.setdefault(int(token // tokens), int(token % tokens) - classes.prefix)
            if len(found) == EXAMPLES:
                break
        chosen = [image * tokens + patch + classes.prefix for image, patch in found.items()]
        rows.append((f"{layer}, {_curve_in_words(ends, chosen)}", list(found.items())))
    return rows


def _curve_in_words(ends: Ends, tokens: list[int]) -> str:
    """The mean curve of some tokens at two points."""
    places = [round((probe + CURVE_RANGE) / (2 * CURVE_RANGE) * (ends.curves.shape[1] - 1)) for probe in PROBES]
    mean = ends.curves[tokens].mean(0)
    told = ", ".join(f"{mean[place]:.2f} at u = {probe:g}" for place, probe in zip(places, PROBES, strict=True))
    return f"mean curve {told}"


def _visible(text: str) -> str:
    """Text on one line, with marks in the place of line breaks and tabs."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(character if character.isprintable() else "·" for character in text)
