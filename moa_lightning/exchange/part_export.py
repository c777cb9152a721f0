"""`moa export --to run`: one task of a joint run as the folder of a run of its own.

In it are the settings that this task alone would have been trained with, its weights (of tied parameters the shared
value), its masks where it is pruned, and what its checkpoint keeps, so every command takes it: test, predict, generate,
export, a start for others. It has no state of an optimiser, from which training could go on.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint_reading import LANGUAGE, PARTS, VISION, is_joint
from ..errors import UserError
from ..pruning import density, packed, sparsity_of, unpacked

PROBE, PRUNER = "OnlineProbe", "Pruning"  # the callbacks whose states judge images and hold masks


def write_part(checkpoint: str, domain: str | None, out: Path) -> int:
    """Write the folder.

    Args:
        checkpoint: of a joint run, in its folder: a file or a folder of shards.
        domain: "vision" or "language".
        out: the new folder, or an empty one.

    Returns:
        Number of tensors.

    Raises:
        UserError: no such task in the checkpoint, no config beside it, or the folder cannot be written.
    """
    import yaml

    from data.writers import new_folder, writing

    from ..checkpoints import RunCheckpointIO
    from ..configs import load_config
    from ..run_folder import CHECKPOINTS, CONFIG, LAST, PRUNING, TOKENIZER, checkpoint_path, run_of_checkpoint
    from ..transplants import MIXING

    path = str(checkpoint_path(checkpoint, None))
    files = RunCheckpointIO()
    content = files.load_checkpoint(path)
    if not is_joint(content.get("hyper_parameters")):
        raise UserError(f"'{path}' is of one task, whose run is its folder already; --to run is for joint runs")
    if domain is None:
        raise UserError("--to run writes one task of a joint run: say which, --part vision or --part language")
    run = run_of_checkpoint(path)
    if run is None:
        raise UserError(f"no {CONFIG} lies beside '{path}' to say what its data are; keep it in its run's folder")
    part = _part_of(content, domain)
    config = _config_of(load_config(str(run / CONFIG)).content, domain, part["hyper_parameters"], str(run / CONFIG))
    masks, pruned = _masks_of(content, domain), {}
    if masks:
        alone = {"sparsity": sparsity_of(masks), "mask_from": None, "shuffle": False}
        made_of = {**content["callbacks"][PRUNER]["made_of"], **alone}
        part["callbacks"][PRUNER] = {"made_of": made_of, "masks": packed(masks)}
        config["pruning"] = {**config["pruning"], **alone, "rewind_to": None}
        pruned = {**made_of, "found": sparsity_of(masks), "density": density(masks)}
    mixes = _mixes_of(run / MIXING, domain)
    with new_folder(str(out)) as folder:
        with writing(str(out)):
            (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
            if domain == LANGUAGE and (run / TOKENIZER).is_file():
                shutil.copyfile(run / TOKENIZER, folder / TOKENIZER)
            for name, facts in (MIXING, mixes), (PRUNING, pruned):
                if facts:
                    (folder / name).write_text(json.dumps(facts, indent=2) + "\n")
        files.save_checkpoint(part, folder / CHECKPOINTS / LAST)
        files.teardown()  # waits until it is on the disk
    return len(part["state_dict"])


def _part_of(content: dict[str, Any], domain: str) -> dict[str, Any]:
    """The checkpoint that the task would have written, without the state of training."""
    state = {}
    for name, tensor in content["state_dict"].items():
        for place, own in ((f"net.{domain}.", "net."), (f"{domain}.", "")):
            if name.startswith(place):
                state[own + name.removeprefix(place)] = tensor
    kept = content.get(PARTS, {}).get(domain, {})
    fields = {key: content[key] for key in ("epoch", "global_step", "pytorch-lightning_version") if key in content}
    options = dict(content["hyper_parameters"][domain]["options"])
    probe = {name: saved for name, saved in content.get("callbacks", {}).items() if (domain, name) == (VISION, PROBE)}
    return {**fields, **kept, "state_dict": state, "hyper_parameters": options, "callbacks": probe}


def _masks_of(content: Mapping[str, Any], domain: str) -> dict[str, Tensor]:
    """The masks of the task's weights, by the names that they have in its own run."""
    masks = unpacked(content.get("callbacks", {}).get(PRUNER, {}).get("masks", {}))
    state, own = content["state_dict"], f"net.{domain}."
    found = {name: mask for name, mask in masks.items() if name.startswith(own)}
    if {"ffn", "gates"} & set(content["hyper_parameters"]["tie"]):  # shared weights have theirs under the other's names
        shared = {name: mask for name, mask in masks.items() if not name.startswith(own)}
        for name, weight in state.items():
            same = (m for n, m in shared.items() if m.shape == weight.shape and weight.equal(state[n]))
            mask = next(same, None) if name.startswith(own) else None
            found |= {} if mask is None else {name: mask}
    return {f"net.{name.removeprefix(own)}": mask for name, mask in found.items()}


def _mixes_of(path: Path, domain: str) -> dict[str, Any]:
    """What the joint run's mixing.json says of the task's mixes; nothing where it has none, or calls whole layers that
    are shared by the other task's name."""
    from ..run_folder import read_json

    content = read_json(path)
    if content is None:
        return {}
    try:
        layers = {
            name.removeprefix(domain).lstrip("./"): {**layer, "module": layer["module"].removeprefix(f"{domain}.")}
            for name, layer in content["layers"].items()
            if layer["module"].startswith(f"{domain}.")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): remove it and try again") from error
    return {**content, "layers": layers} if layers else {}


def _config_of(whole: dict[str, Any], domain: str, options: dict[str, Any], name: str) -> dict[str, Any]:
    """The config of a run with this task and its data alone."""
    try:
        task = whole["model"]["init_args"][domain]["class_path"]
        data = whole["data"]["init_args"][domain]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"config file '{name}' names no {domain} task with its data; give a joint run's folder"
        ) from error
    return {**whole, "model": {"class_path": task, "init_args": options}, "data": data}
