"""Winning tickets: training with weights that are held at zero, and the rounds that find which.

One round is one run. It takes the masks and the final weights of the run before (`mask_from`), prunes them further,
starts at a checkpoint of an early step (`rewind_to`, with optimiser, schedule and data position) or at the initial
weights, and trains. So rounds are chained by naming runs, in a grid or by hand (docs/sparsity.md). The masks and what
they were made of lie in the checkpoint; a run that goes on takes its own. A vision transformer takes the masks of the
one in a run of another objective, so a sparse MAE or DINO is fine-tuned as it is.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple, get_args

import lightning as L
from torch import Tensor

from ..checkpoints import RunCheckpointIO
from ..errors import UserError
from ..exchange.pretrained import encoder_prefixes
from ..pruning import (
    NET,
    HeldMasks,
    Scope,
    density,
    magnitude_masks,
    packed,
    prunable,
    shuffled,
    sparsity_of,
    unpacked,
)
from ..run_folder import CHECKPOINTS, PRUNING, REWIND, checkpoint_path, given_checkpoint
from ..sharded import whole
from .common import run_folder, tensorboard_step, tensorboard_writer, write_scalars
from .figures import draw_densities, publish
from .files import write_json

log = logging.getLogger(__name__)

ALIKE = 1e-3  # sparsities that differ by whole weights only


class Trained(NamedTuple):
    """What another run came to, under this run's names."""

    weights: dict[str, Tensor]
    """final ones, whole"""
    masks: dict[str, Tensor]
    """of the same; none of a dense run"""
    sparsity: float
    """share of zeros in all masks of that run"""
    said: str
    """what has no counterpart, for the log; "" where the nets are alike"""


class Pruning(L.Callback):
    """Holds the smallest weights of the linear layers in the transformer blocks at zero.

    Args:
        sparsity: share of zeros among those weights; 0: no pruning.
        scope: rank magnitudes over the whole net ("global") or in each layer ("layer").
        gates: prune the gates of learned mixes too.
        dense_blocks: the first blocks of each stack that stay dense.
        mask_from: folder of a run (or a checkpoint) whose final weights are ranked and whose masks stay; null: the
            weights that this run starts with. Of a run of another objective it is the vision transformer alone: at that
            run's sparsity its masks are taken as they are.
        rewind_to: folder of a run that wrote a checkpoint for rewinding (--checkpoint.rewind_step), or a checkpoint,
            where this run starts; null: at its initial weights.
        shuffle: random masks with the same density in each layer instead.

    Written: <run_dir>/pruning.json and pruning.png, the density of each layer. Logged: pruning/density/<layer>.

    Raises:
        UserError: options that make no sense, a run that is not there or of another net.
    """

    def __init__(
        self,
        sparsity: float = 0.0,
        scope: Scope = "global",
        gates: bool = False,
        dense_blocks: int = 0,
        mask_from: str | None = None,
        rewind_to: str | None = None,
        shuffle: bool = False,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise UserError(f"pruning.sparsity is {sparsity}; give a share from 0 to below 1")
        if scope not in get_args(Scope):
            raise UserError(f"pruning.scope is '{scope}'; choose from {', '.join(get_args(Scope))}")
        if dense_blocks < 0:
            raise UserError(f"pruning.dense_blocks is {dense_blocks}; give 0 or more")
        if sparsity == 0 and (mask_from is not None or shuffle):
            raise UserError("pruning.mask_from and pruning.shuffle do nothing at sparsity 0; give --pruning.sparsity")
        self.sparsity, self.scope, self.gates, self.dense_blocks = sparsity, scope, gates, dense_blocks
        self.mask_from, self.rewind_to, self.shuffle = mask_from, rewind_to, shuffle
        self.masks: dict[str, Tensor] = {}
        self._restored: dict[str, Any] = {}
        self._held: HeldMasks | None = None

    @property
    def made_of(self) -> dict[str, Any]:
        """What the masks follow from, beside weights and seed."""
        names = ("sparsity", "scope", "gates", "dense_blocks", "mask_from", "shuffle")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {"made_of": self.made_of, "masks": packed(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restored = state

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.sparsity == 0:
            if self._restored.get("masks"):
                raise UserError("the checkpoint's net is pruned; give its --pruning options, or another --ckpt_path")
            return
        before = self._restored.get("made_of", {})
        changed = [f"pruning.{name}" for name, value in self.made_of.items() if value != before.get(name)]
        goes_on = bool(self._restored.get("masks")) and self._goes_on(trainer)
        if self._restored and (not changed or (goes_on and changed == ["pruning.mask_from"])):  # which may have moved
            self.masks = unpacked(self._restored["masks"])
        elif goes_on:
            raise UserError(
                f"a run goes on with the masks that it has, and {', '.join(changed)} would make others; leave that "
                "out, or prune in a new run with --pruning.mask_from"
            )
        else:
            self.masks = self._make(pl_module)
        self._held = held = HeldMasks(pl_module, self.masks)
        held.weights()
        for optimizer in trainer.optimizers:
            held.moments(optimizer)
            # at once after each step, so that nobody (a teacher's average, a checkpoint) sees another weight
            optimizer.register_step_post_hook(lambda *_: held.weights())
        self._report(trainer)

    def on_before_optimizer_step(self, *_: Any) -> None:
        if self._held is not None:
            self._held.gradients()

    def _goes_on(self, trainer: L.Trainer) -> bool:
        """Whether the checkpoint is of this run, and not one that it begins with."""
        folder, given = run_folder(trainer), trainer.ckpt_path
        if folder is None or given is None:
            return False
        return Path(given).parent.resolve() == (folder / CHECKPOINTS).resolve()

    def _make(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        own = prunable(pl_module, self.gates, self.dense_blocks)
        if self.mask_from is None:
            weights = {name: whole(parameter).detach().cpu() for name, parameter in own.items()}
            before = unpacked(self._restored.get("masks", {}))
            if before and before.keys() != weights.keys():
                raise _other_layers(f"the checkpoint '{pl_module.trainer.ckpt_path}'", len(before), len(weights))
            masks = magnitude_masks(weights, before, self.sparsity, self.scope)
        else:
            shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
            found = _trained(self.mask_from, shapes, encoder_prefixes(name for name, _ in pl_module.named_parameters()))
            masks = self._taken(found, pl_module.trainer)
        return shuffled(masks, int(pl_module.seed)) if self.shuffle else masks  # type: ignore[arg-type]

    def _taken(self, found: Trained, trainer: L.Trainer) -> dict[str, Tensor]:
        """The other run's weights ranked, or of a larger net's masks that are as sparse as is wanted these."""
        if found.said:
            if self.sparsity < found.sparsity - ALIKE:
                raise UserError(
                    f"pruning.sparsity is {self.sparsity}, and '{self.mask_from}' has {found.sparsity:.4g}; give that "
                    "to take its masks, or more"
                )
            if trainer.is_global_zero:
                log.warning("%s", found.said)
            if found.masks and self.sparsity <= found.sparsity + ALIKE:
                return found.masks
        return magnitude_masks(found.weights, found.masks, self.sparsity, self.scope, part=bool(found.said))

    def _report(self, trainer: L.Trainer) -> None:
        densities, found = density(self.masks), sparsity_of(self.masks)
        folder, writer = run_folder(trainer), tensorboard_writer(trainer)
        if not trainer.is_global_zero:
            return
        step = tensorboard_step(trainer)
        if writer is not None:
            write_scalars(writer, {f"pruning/density/{name}": value for name, value in densities.items()}, step)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / PRUNING, {**self.made_of, "found": found, "density": densities})
            picture = draw_densities(densities, f"{1 - found:.3g} of the weights stay")
            publish(picture, "pruning/density", step, writer, folder / "pruning.png")


def rewind_checkpoint(given: str) -> str:
    """The checkpoint that `rewind_to` means.

    Raises:
        UserError: there is none.
    """
    if not (Path(given) / CHECKPOINTS).is_dir():
        return str(checkpoint_path(given, None))
    path = Path(given) / CHECKPOINTS / REWIND
    if not path.exists():
        what = f"pruning.rewind_to: the run '{given}' has no {CHECKPOINTS}/{REWIND}"
        raise UserError(f"{what}; train it with --checkpoint.rewind_step")
    return str(path)


def _trained(source: str, shapes: dict[str, tuple[int, ...]], prefixes: list[str]) -> Trained:
    """What a run came to, for weights of these names and shapes.

    Args:
        source: its folder, or a checkpoint.
        shapes: of this net's weights that may be pruned, by name.
        prefixes: of the names of this net's vision transformers.
    """
    path = given_checkpoint(source)
    if path is None:
        raise UserError(f"pruning.mask_from: '{source}' is no run with a checkpoint, and no checkpoint")
    content = RunCheckpointIO().load_checkpoint(path)
    state = content.get("state_dict", {})
    masks = held = unpacked(content.get("callbacks", {}).get(Pruning.__qualname__, {}).get("masks", {}))
    names, said = {name: name for name in shapes}, ""
    theirs = encoder_prefixes(name for name in state if name.startswith(NET))
    own = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in shapes)), None)
    if own is not None and theirs and own not in theirs:
        place = theirs[0]
        names = {name: place + name.removeprefix(own) for name in shapes if name.startswith(own)}
        held = {place + n.removeprefix(p): mask for p in theirs for n, mask in masks.items() if n.startswith(p)}
        said = (
            f"pruning.mask_from: {len(names)} layers of the vision transformer are matched with those of '{source}'; "
            f"without a counterpart are {len(shapes) - len(names)} here, which stay dense, and "
            f"{len(masks) - len(held)} there"
        )
    for name, other in names.items():
        if other not in state or tuple(state[other].shape) != shapes[name]:
            raise UserError(
                f"pruning.mask_from: '{source}' has no {other} of shape {shapes[name]}; name a run of the same net"
            )
    if held and held.keys() != set(names.values()):
        raise _other_layers(f"pruning.mask_from: '{source}'", len(held), len(names))
    weights = {name: state[other] for name, other in names.items()}
    carried = {name: held[other] for name, other in names.items()} if held else {}
    return Trained(weights, carried, sparsity_of(masks) if masks else 0.0, said)


def _other_layers(what: str, theirs: int, own: int) -> UserError:
    return UserError(
        f"{what} is pruned in {theirs} layers and this run would be in {own}; give the same pruning.gates, "
        "pruning.dense_blocks and, of a joint run, model.tie"
    )
