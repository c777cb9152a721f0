"""`moa export`: the weights of a run as one safetensors file, an encoder for timm, or a net for transformers.

The checkpoint may be a file or shards. The file holds the net's tensors under their names in it, whole, and in its
metadata the task and its hyper-parameters as JSON, from which the same net can be built again. No optimiser, no
callbacks, nothing that could run code. `--to timm` writes the encoder alone, which timm loads (timm_export.py),
`--to hf` a folder that transformers loads, with the tokenizer (hub_export.py), and `--to run` one task of a joint run
as a run of its own (part_export.py).
"""

import json
from pathlib import Path

from ..checkpoint_reading import DOMAINS, refuse_joint
from ..errors import UserError
from ..generate import WEIGHTS_HELP
from ..parser import Parser
from .part_export import write_part


def export_command(argv: list[str]) -> None:
    """The command; raises UserError for a mistake in the input."""
    parser = Parser("moa export", description=__doc__.partition("\n")[0])
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a run: a file or a folder of shards")
    parser.add_argument(
        "--out", required=True, type=Path, help="file to write, for instance model.safetensors; a folder for hf and run"
    )
    parser.add_argument(
        "--to",
        choices=("safetensors", "timm", "hf", "run"),
        default="safetensors",
        help="safetensors: the whole net in one file (default); timm: the encoder of MAE or DINO, or a classifier, for "
        "timm; hf: a folder for transformers, of a language model and its tokenizer; run: one task of a joint run as "
        "its own run",
    )
    parser.add_argument("--part", choices=DOMAINS, help="run: which task")
    parser.add_argument("--weights", choices=("average", "last"), help=WEIGHTS_HELP)
    parser.add_argument("--import", action="append", default=[], help="hf: Python module to import first")
    options = parser.parse_args(argv)
    if options.part is not None and options.to != "run":
        raise UserError(f"--part goes with --to run, not with --to {options.to}; leave it out")
    if options.to == "run":
        if options.weights is not None:
            raise UserError("a joint run keeps no average of its weights; leave --weights out")
        _refuse(options.out)
        print(f"{options.out}: {write_part(options.ckpt_path, options.part, options.out)} tensors")
        return
    if options.to == "hf":
        _export_to_hub(options.ckpt_path, options.out, options.weights, getattr(options, "import"))
        return
    count, size, call = export(options.ckpt_path, options.out, options.weights, options.to == "timm")
    print(f"{options.out}: {count} tensors, {size:,} bytes")
    if call:
        print(call.replace("FILE", repr(str(options.out))))


def _export_to_hub(checkpoint: str, out: Path, weights: str | None, modules: list[str]) -> None:
    from ..generate import load
    from .hub_export import write_hub_folder

    _refuse(out)
    task, data = load(checkpoint, modules, weights)
    written = write_hub_folder(task.net, data.tokenizer, out)
    print(f"{out}: {written.architecture}, {written.tensors} tensors, {written.bytes:,} bytes")
    if written.reason is not None:
        print(
            f"{written.reason}, so moa-lightning must be installed where it is loaded: import "
            "moa_lightning.huggingface first, or give trust_remote_code=True"
        )


def _refuse(out: Path) -> None:
    if out.exists():
        raise UserError(f"'{out}' exists already; remove it or choose another --out")


def export(checkpoint: str, out: Path, weights: str | None = None, for_timm: bool = False) -> tuple[int, int, str]:
    """Write the weights of a checkpoint.

    Args:
        checkpoint: a file or a folder of shards.
        out: the safetensors file.
        weights: "average" or "last" ones; None: those that the run evaluates.
        for_timm: the encoder or classifier alone, see timm_export.py.

    Returns:
        Number of tensors, bytes of the file, and the line of Python that loads it where that is timm's.

    Raises:
        UserError: the file exists, or the checkpoint is not one of a run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from ..checkpoints import RunCheckpointIO
    from ..optim import net_weights
    from ..run_folder import checkpoint_path

    path = str(checkpoint_path(checkpoint, None))
    _refuse(out)
    content = RunCheckpointIO().load_checkpoint(path)
    tensors = {
        name: tensor.contiguous().clone()  # tied tensors share memory, which safetensors refuses
        for name, tensor in net_weights(content, weights).items()
    }
    if not tensors or "global_step" not in content:
        raise UserError(f"checkpoint '{path}' holds no net; give one that a run of moa has written")
    metadata = {
        "format": "pt",
        "step": str(content["global_step"]),
        "hyper_parameters": json.dumps(content.get("hyper_parameters", {})),
    }
    call = ""
    if for_timm:
        from .timm_export import encoder_of

        refuse_joint(content, path)
        tensors, about, call = encoder_of(tensors, content["hyper_parameters"])
        metadata |= about
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out, metadata)  # it writes a temporary file and renames it
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{out}' cannot be written ({error}); choose another --out") from error
    return len(tensors), out.stat().st_size, call
