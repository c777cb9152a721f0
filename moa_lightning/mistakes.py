"""What other packages say, cut down to what helps: errors of jsonargparse, Lightning and torch, and chatter.

jsonargparse nests a message for every level and every alternative of a type; what is wrong stands in the innermost one.
A UserError that was wrapped on its way (by the parser, by a data worker) is found again.
"""

import argparse
import difflib
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .allowed import refusal
from .configs import Fragment, origin
from .errors import UserError
from .options import Option

LONGEST_VALUE, LONGEST_REASON = 60, 200
RESTORING, LOADING = ("restore", "_restore", "resume"), ("load_state_dict", "_load_combined_loader_states")
DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
ADVERTISEMENT = re.compile(r"\s*(HINT:|Find a complete list|For more information|See:? http).*", re.DOTALL)
WORKER = re.compile(r"Caught UserError in DataLoader worker process.*\n\S*UserError: (.*)\Z", re.DOTALL)
DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: \w[\w ]*|exited unexpectedly)"
)
DEAD = (
    "a process that reads data died ({}), most often for lack of memory: lower data.num_workers or data.batch_size, "
    "and go on with --ckpt_path last"
)
HANGING_WORKER = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
PEER = re.compile(r"Connection (closed|reset) by peer|remote process exited")
UNLOADABLE = re.compile(r"Error\(s\) in loading state_dict for (\w+):\s*(.*)", re.DOTALL)
LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"
# what Lightning and torch say of themselves in every run, none of which a user can act on
NOISE = (
    ".*LeafSpec.*is deprecated.*",
    ".*in eval mode at the start of training.*",
    ".*not supported by the model summary.*",
    ".*does not have many workers.*",
    ".*You are using a custom batch sampler.*",
    ".*Total length of `.*` across ranks is zero.*",
    ".*Cannot dispatch to fused implementation.*",
    ".*Detected an existing checkpoint in .*overwriting.*",
    ".*The dirpath has changed from.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*torch.distributed is disabled, unavailable or uninitialized.*",
    ".*LightningCLI's args parameter is intended.*",
    ".*You have overridden `on_before_batch_transfer` in `LightningModule`.*",  # DINO's masks, drawn there
    ".*could be decompression bomb DOS attack.*",  # data.image_base says so itself
    ".*The number of training batches .* is smaller than the logging interval.*",
)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "tuple": "a list"}


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is, or was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            wrapped = WORKER.search(str(seen))
            return UserError(wrapped[1]) if wrapped else seen
        seen = seen.__cause__ or seen.__context__
    return None


def parsing_mistake(message: str, options: list[Option], fragments: list[Fragment]) -> str:
    """The sentence for a message of jsonargparse about a value that does not fit its option."""
    key = ".".join(_keys(message))
    expected = [kind for kind in re.findall(r"Expected an? (.*?)(?:\. Got value: .*)?$", message, re.M) if kind]
    expected = [kind for kind in expected if "NoneType" not in kind and "path" not in kind]
    value = re.search(r"Got value: (.*)$", message, re.M) or re.search(r"Given value: (.*)$", message, re.M)
    denied = DENIED.search(message)
    if denied:
        return refusal(denied[1], f"{key or 'the config'}:")
    if key in ("trainer.callbacks", "trainer.logger"):
        return _list_mistake(key, message)
    if not expected or not key or value is None:
        return _innermost(message)
    typed = any(option.key.removesuffix("+") == key for option in options)
    fragment = None if typed else origin(fragments, key)
    where = f"--{key}" if typed else f"config file '{fragment.name}': {key}" if fragment else key
    if value[1] == "None":
        return f"{where} is left open; give it on the command line, --{key} VALUE"
    given = value[1] if len(value[1]) <= LONGEST_VALUE else value[1][:LONGEST_VALUE] + "..."
    return f"{where} is '{given}'; {_wanted(expected, given)}"


def _list_mistake(key: str, message: str) -> str:
    """The sentence about callbacks or loggers: an unknown class, one that lacks its arguments, or no list at all."""
    unknown = re.search(r"import path string: (\S+)", message)
    lacking = re.search(r"class_path='(?:[\w.]*\.)?(\w+)', init_args=Namespace\((\w+)=None", message)
    if unknown:
        return f"{key}: '{unknown[1]}' is unknown; name a class of Lightning, or the dotted path of your own"
    if lacking:
        return f"{key}: {lacking[1]} needs its {lacking[2]}; add --{key}.{lacking[2]} VALUE"
    return f"{key} is a list; give one in a config file, or add one class with --{key}+ NAME"


def _keys(message: str) -> Iterator[str]:
    for key in re.findall(r'Parser key "(.*?)"', message):
        yield key.replace(".init_args", "")


def _wanted(expected: list[str], given: str) -> str:
    choices = [
        choice for kind in expected for choice in re.findall(r"'([^']+)'", kind) if kind.startswith("typing.Lit")
    ]
    if choices:
        near = difflib.get_close_matches(given, choices, 1, 0.6)
        return f"choose from {', '.join(dict.fromkeys(choices))}" + (f" (did you mean {near[0]}?)" if near else "")
    kinds = [re.sub(r"^<class '(.*)'>$", r"\1", kind).removeprefix("typing.") for kind in expected]
    return "give " + " or ".join(dict.fromkeys(KINDS.get(kind, kind) for kind in kinds))


def _innermost(message: str) -> str:
    """The first line that says something, without what the parser says about its own types."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with", "Expected a <class 'None")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    useful = [line for line in lines if line and not line.startswith((*noise, 'Parser key "'))]
    return useful[0] if useful else message


def loading_mistake(message: str) -> str | None:
    """The sentence for a checkpoint whose weights do not fit the net; None for other messages."""
    found = UNLOADABLE.search(message)
    if found is None:
        return None
    return (
        f"the checkpoint does not fit this {found[1]}: {found[2].splitlines()[0].strip()[:200]}; "
        "leave -c and --model out to use the settings of the checkpoint's own run"
    )


def process_mistake(message: str) -> str | None:
    """The sentence for a data worker that died or hangs, or a process of the run that ended; None for others."""
    dead, hanging = DEAD_WORKER.search(message), HANGING_WORKER.search(message)
    if dead:
        return DEAD.format(dead[1])
    if hanging:
        return f"no batch came in {float(hanging[1]):g} seconds: check that the disk with the data answers"
    if PEER.search(message):
        return "another process of this run has ended, and this one cannot go on alone; the other one says why"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about itself; its launcher stays silent, which ends processes as late as at exit."""
    names = ("lightning", "lightning.pytorch", "lightning.fabric")
    logging.getLogger(LAUNCHER).setLevel(logging.WARNING)
    before = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        for pattern in NOISE:
            warnings.filterwarnings("ignore", pattern)
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def mistakes(options: list[Option], fragments: list[Fragment]) -> Iterator[None]:
    """Exceptions that a user's mistake causes become UserErrors; all others pass."""
    try:
        yield
    except Exception as error:
        found = find_user_error(error)
        if found is not None:
            raise found from error
        sentence = _sentence(error, options, fragments)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _sentence(error: Exception, options: list[Option], fragments: list[Fragment]) -> str | None:
    """What to say about an exception that a user's mistake or the machine caused; None for others."""
    message = str(error)
    if isinstance(error, argparse.ArgumentError) or (
        isinstance(error, ValueError) and "Does not validate against" in message
    ):
        return parsing_mistake(message, options, fragments)
    known = loading_mistake(message) or process_mistake(message) if isinstance(error, RuntimeError) else None
    if known is not None:
        return known
    if isinstance(error, OSError | EOFError) and _while_receiving(error):
        return DEAD.format("exited unexpectedly")
    if isinstance(error, MisconfigurationException):
        return ADVERTISEMENT.sub("", message)
    if _while_loading(error) and "contains only the model" in message:
        return (
            "the checkpoint has weights but no state of training to go on from; start a new run with these weights: "
            "--model.weights_from and its folder"
        )
    if _while_loading(error) and "different number of parameter groups" in message:
        return (
            "the checkpoint's optimiser has other groups of parameters than these options make (model.tie, optimizer): "
            "leave changed ones out, or start a new run"
        )
    if _while_loading(error):
        what = f"{type(error).__name__}: {message[:LONGEST_REASON]}"
        return f"the checkpoint cannot be loaded ({what}); it is damaged or of another program, so give another one"
    return None


def _while_receiving(error: Exception) -> bool:
    """Whether a batch could not be fetched from the process that announced it: it died in between."""
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.endswith("resource_sharer.py") for name in frames)


def _while_loading(error: Exception) -> bool:
    """Whether an exception comes from below Lightning's restoring of a checkpoint, which trusts what it finds there."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        restoring = code.co_filename.endswith("checkpoint_connector.py") and code.co_name.startswith(RESTORING)
        if restoring or code.co_name in LOADING:
            return True
    return False
