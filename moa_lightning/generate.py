"""`moa generate`: continue a text with a trained language model.

The checkpoint says what the net is, the config.yaml of its run which data module turned text into tokens, and the
tokenizer.json of its run how (bytes need none); the data themselves are not read. One text is written as it comes;
several (samples of a prompt, or prompts from a file, one a line) are written one after another, each under a line that
counts them. A text ends where the net draws the token between documents, or goes on there with --past_end.
"""

import argparse
import codecs
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from .errors import UserError
from .options import Option, find_class, is_base, parameters_of, without_none
from .parser import Parser, seed

WEIGHTS_HELP = "average or last ones, of a run that keeps an average (default: those that it validates)"


def generate_command(argv: list[str]) -> None:
    """The command; raises UserError for a mistake in the input."""
    options = _parser().parse_args(argv)
    if options.max_new_tokens < 1 or options.num_samples < 1:
        raise UserError("--max_new_tokens and --num_samples must be at least 1")
    from .sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    prompts = _prompts(options)
    device = _device(options.device)
    task, data = load(options.ckpt_path, getattr(options, "import"), options.weights)
    net = task.net.eval().to(device)
    alone = len(prompts) * options.num_samples == 1
    encoded = [data.encode(prompt) for prompt in prompts]
    if [] in encoded:
        raise UserError(f"prompt {encoded.index([]) + 1} is empty; give at least one character to continue")
    for number, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True), start=1):
        _write(net, data, prompt, tokens, number, sampling, options, alone)


def _parser() -> Parser:
    parser = Parser("moa generate", description=__doc__.partition("\n")[0].partition(": ")[2])
    parser.add_argument(
        "--ckpt_path", required=True, help="checkpoint of a language model: a file or a folder of shards"
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="text to continue")
    given.add_argument("--prompt_file", type=Path, help="file with a prompt on each line")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add (default 200)")
    parser.add_argument("--past_end", action="store_true", help="go on where a text ends, after an empty line")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations of each prompt (default 1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the fewest tokens that hold this share of probability")
    parser.add_argument("--min_p", type=float, help="leave out tokens less than this times as likely as the likeliest")
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn, the same for every prompt (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--weights", choices=("average", "last"), help=WEIGHTS_HELP)
    parser.add_argument("--import", action="append", default=[], help="Python module to import first; may be repeated")
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        try:
            options.prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError("--prompt is not text in UTF-8, which the terminal has to send; write it again") from error
        return [options.prompt]
    try:
        lines = options.prompt_file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file '{options.prompt_file}' cannot be read ({error}); give a text file") from error
    if not lines:
        raise UserError(f"--prompt_file '{options.prompt_file}' is empty; write one prompt a line")
    return list(lines)


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device '{name}' cannot be used here; choose auto or cpu") from error
    if device.type == "meta":
        raise UserError("--device 'meta' computes no values; choose auto or cpu")
    return device


def load(checkpoint: str, modules: list[str], weights: str | None = None) -> tuple[Any, Any]:
    """The task with its trained net, and the data module of its run, whose data are not read.

    Args:
        checkpoint: a file or a folder of shards.
        modules: the user's own, to be imported first.
        weights: "average" or "last" ones; None: those that the run evaluates.

    Raises:
        UserError: no checkpoint of a language model, or not in the folder of its run.
    """
    from data import DataModule
    from data.tokenizer import open_tokenizer
    from tasks import LanguageModeling, Task
    from tasks.gpt import check_tokenizer

    from .checkpoint_reading import refuse_joint
    from .checkpoints import RunCheckpointIO
    from .cli import import_modules
    from .configs import load_config
    from .run_folder import CONFIG, TOKENIZER, checkpoint_path, run_of_checkpoint

    path = str(checkpoint_path(checkpoint, None))
    content = RunCheckpointIO().load_checkpoint(path)
    refuse_joint(content, path)
    run = run_of_checkpoint(path)
    if run is None:
        raise UserError(f"no {CONFIG} lies beside '{path}' to say how text becomes tokens; keep it in its run's folder")
    config = load_config(str(run / CONFIG))
    import_modules(config.content, [Option("import", name) for name in modules], [config])
    modules = config.content.get("import") or []
    given = {name: config.content.get(name) for name in ("model", "data")}
    try:
        kind = find_class(Task, _class_path(given["model"]), "model", modules)
        data = made(DataModule, given["data"], "data", modules)
    except UserError as error:
        raise UserError(f"config file '{config.name}': {error}") from error
    if not issubclass(kind, LanguageModeling):
        raise UserError(f"'{path}' is of {kind.__name__}, which writes no text; give one of LanguageModeling")
    if (run / TOKENIZER).is_file():
        data.tokenizer = open_tokenizer(str(run / TOKENIZER))
    check_tokenizer(content, data.tokenizer, "the run's tokenizer")
    return _restored(kind, content, path, weights), data


def _class_path(given: Any) -> Any:
    """The class that a config names for an object; a name may stand there alone."""
    return given.get("class_path") if isinstance(given, dict) else given


def made(kind: Any, given: Any, where: str, modules: list[str]) -> Any:
    """An argument as its type wants it, with an object for each class that a config names there (the sources of a
    mixture). No function is called and no class but one of that type, whatever the config says.

    Args:
        kind: the declared type.
        given: what the config says.
        where: the dotted name of the argument.
        modules: the user's own.

    Raises:
        UserError: another class, an argument that it does not take or lacks.
    """
    wanted = without_none(kind)
    if get_origin(wanted) is dict and isinstance(given, dict):
        return {name: made(get_args(wanted)[1], item, f"{where}.{name}", modules) for name, item in given.items()}
    if not is_base(wanted) or (given is None and wanted is not kind):
        return given
    found = find_class(wanted, _class_path(given), where, modules)
    arguments = (given.get("init_args") or {}) if isinstance(given, dict) else {}
    known = parameters_of(found)
    if unknown := [name for name in arguments if known is not None and name not in known]:
        raise UserError(f"{where}.{unknown[0]} is no option of {found.__name__}; take it out of the config")
    objects = {
        name: made((known or {}).get(name), item, f"{where}.{name}", modules) for name, item in arguments.items()
    }
    try:
        return found(**objects)
    except TypeError as error:
        raise UserError(f"{where} cannot be made from the config: {error}; correct it") from error


def _restored(kind: Any, content: dict[str, Any], path: str, weights: str | None) -> Any:
    try:
        task = kind(**{**content["hyper_parameters"], "compile": False, "activation_checkpointing": False})
        task.configure_model()
        task.load_state_dict(content["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"'{path}' does not hold the net that its settings describe ({reason}); give another"
        ) from error
    task.keep_weights(weights)
    return task


def _write(
    net: Any, data: Any, prompt: str, tokens: list[int], number: int, sampling: Any, options: Any, alone: bool
) -> None:
    import torch

    from .sampling import continuation

    device = next(net.parameters()).device
    start = torch.tensor([tokens] * options.num_samples, device=device)
    generator = torch.Generator().manual_seed(options.seed)
    separator, pieces = data.tokenizer.separator, list(data.tokenizer.pieces)
    pieces[separator] = b"\n\n" if options.past_end else b""
    stop = None if options.past_end else separator
    new = continuation(net, start, options.max_new_tokens, generator, sampling, data.vocab_size, stop)
    if not alone:
        for sample, row in enumerate(torch.cat(list(new), dim=1).tolist(), start=1):
            text = b"".join(pieces[token] for token in row).decode(errors="replace")
            print(f"--- prompt {number}, sample {sample}\n{prompt}{text}", flush=True)
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps the bytes of an unfinished character
    sys.stdout.write(prompt)
    for token in new:
        sys.stdout.write(decoder.decode(pieces[int(token)]))
        sys.stdout.flush()
    print(decoder.decode(b"", final=True), flush=True)
