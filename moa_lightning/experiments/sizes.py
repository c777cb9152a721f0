"""How large the nets of a grid are, for budgets in tokens, tokens per parameter or FLOPs.

Measured and not derived from the options, because the net and the data have the last word (matched widths, the
vocabulary, the size of images): the run's command line is parsed as `moa fit` does, the data module reads its data, and
the net is built without values. That takes seconds, so it is done once per combination, in a process of its own, and
kept in the grid's folder under the fingerprint of the combination.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Run


@dataclass(frozen=True)
class Size:
    """Of the net of a run, and of what it consumes."""

    parameters: int
    """trained ones"""
    samples_per_step: int
    """of an optimiser step, over all devices"""
    tokens_per_sample: int | None
    flops_per_sample: float
    """matrix products of forward and backward"""

    def per_step(self, unit: str) -> float:
        """What a step consumes in a budget's unit.

        Raises:
            UserError: tokens of a task that has none.
        """
        if unit == "samples":
            return self.samples_per_step
        if unit == "flops":
            return self.samples_per_step * self.flops_per_sample
        if self.tokens_per_sample is None:
            raise UserError(f"a budget in {unit} needs a task that counts in tokens; images have samples, or flops")
        tokens = self.samples_per_step * self.tokens_per_sample
        return tokens / self.parameters if unit == "tokens_per_parameter" else tokens


def size_key(run: Run) -> str:
    """Names a combination, whatever its seed and its optimiser, on which no size depends."""
    parts = {key: value for key, value in run.fingerprint().items() if key != "seed" and ".optimizer." not in key}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def measure(arguments: Sequence[str]) -> Size:
    """The size of the run that `moa fit ARGUMENTS` would be.

    Raises:
        UserError: what `moa fit` would say.
    """
    import torch

    from moa_lightning.cli import import_modules, resolve_precision, split_arguments
    from moa_lightning.configs import compose, load_config
    from moa_lightning.mistakes import mistakes, quiet
    from moa_lightning.planning.fake import NoValues
    from moa_lightning.planning.settings import read_settings
    from tasks import DINO

    paths, options = split_arguments([*arguments, "--trainer.max_steps=1"])
    fragments = [load_config(path) for path in paths]
    config = compose(fragments)
    options, _ = resolve_precision(config, import_modules(config, options, fragments))
    with mistakes(options, fragments), quiet():
        settings = read_settings(config, options, fragments)
        task, data = settings.new_task(), settings.data
        data.setup("fit")
        for name, value in task.hparams.items():
            if value is None and hasattr(data, name):
                task.hparams[name] = getattr(data, name)
        if isinstance(task, DINO):
            task.view_sizes = [*settings.view_sizes]  # a fit learns them from its batches
        with torch.device("meta"), NoValues():
            task.net = task.build(0)
        parameters = sum(p.numel() for p in task.net.parameters() if p.requires_grad)
        samples = data.batch_size * settings.accumulate
        return Size(parameters, samples, settings.tokens_per_sample, float(task.flops_per_sample()))


def read_sizes(path: Path) -> dict[str, Size]:
    """What has been measured, by key; nothing where the file is missing or damaged."""
    try:
        sizes = {key: Size(**size) for key, size in json.loads(path.read_text()).items()}
        return {key: size for key, size in sizes.items() if size.flops_per_sample}  # once DINO's were taken for 0
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_sizes(path: Path, sizes: dict[str, Size]) -> None:
    """Keep them, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps({key: asdict(size) for key, size in sizes.items()}, indent=1))
    os.replace(draft, path)
