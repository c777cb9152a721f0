"""Multiple-choice questions, answered by a language model at every validation and test.

What `moa validate --choices FILE` (also of test and fit) adds. The endings of all questions are dealt out to the
processes in batches, every ending to one of them; all run the same number of batches, as a sharded net needs it, so a
process without a batch of its own reads one that another counts. The sums are added over processes.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..errors import UserError
from ..evaluation.multiple_choice import Continuation, accuracies, as_batch, batches, continuations, read_questions


class MultipleChoice(L.Callback):
    """Logs val/<name>_acc, _acc_norm and _acc_bytes for each file, <name> being its own without the ending.

    Args:
        files: JSONL in HellaSwag's or ARC's format (see evaluation.multiple_choice).

    Raises:
        UserError: two files of one name; in `setup`, what reading them raises, a task that models no language or whose
            experts choose tokens.
    """

    def __init__(self, files: str | list[str]) -> None:
        paths = [files] if isinstance(files, str) else list(files)
        self.files = {Path(path).stem: path for path in paths}
        if len(self.files) < len(paths):
            raise UserError(f"choices {', '.join(paths)} have names in common, under which they are logged; rename one")

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Read the files, before anything has been computed."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(pl_module, "nll"):
            raise UserError("--choices are questions to a language model, which this run has not; leave them out")
        if pl_module.moe.chooses_from_sequences:
            raise UserError(
                "--choices need a net in which a token sees none after it; experts that choose tokens (moe.router) "
                "see an ending whole, and what fills it up: leave --choices out"
            )
        if stage in ("fit", "validate") and "val" not in data.splits:
            raise UserError("--choices are answered at validations, and the data has no val split; give it one")
        length = pl_module.from_data("context_length")
        self.questions = {name: read_questions(path) for name, path in self.files.items()}
        self.rows = {name: continuations(asked, data.encode, length) for name, asked in self.questions.items()}
        self.batch_size = max(1, data.batch_size // trainer.world_size)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._answer("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._answer("test", trainer, pl_module)

    def _answer(self, split: str, trainer: L.Trainer, task: Any) -> None:
        for name, questions in self.questions.items():
            found = accuracies(questions, self._log_likelihoods(self.rows[name], trainer, task))
            for kind, value in found.items():
                task.log(f"{split}/{name}_{kind}", value, sync_dist=True)  # the same on every rank

    def _log_likelihoods(self, rows: list[Continuation], trainer: L.Trainer, task: Any) -> Tensor:
        """Of every row in nats, float64 (rows,), the same on every rank."""
        sums = torch.zeros(len(rows), dtype=torch.float64, device=task.device)
        dealt = batches(rows, self.batch_size)
        rounds = -(-len(dealt) // trainer.world_size)
        with trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):  # many lengths
            for number in range(trainer.global_rank, rounds * trainer.world_size, trainer.world_size):
                own = dealt[number % len(dealt)]
                batch = {key: value.to(task.device) for key, value in as_batch([rows[row] for row in own]).items()}
                found = -task.nll(batch).double().sum(1)
                if number < len(dealt):
                    sums[torch.tensor(own, device=task.device)] = found
        return trainer.strategy.reduce(sums, reduce_op="sum")
