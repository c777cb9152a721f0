"""Images and text side by side, for the joint task: each step has a batch of either, or of the one whose turn it is.

Both modules keep their own samples, seeds, batch sizes and epochs, so a domain sees the batches that a run of its own
would have seen. Which of its batches a domain gives to a step is arithmetic (sampling.StreamBatches), like everything
about positions here, so a run may stop anywhere and go on with another number of devices. Lightning's CombinedLoader
puts the loaders together.
"""

import hashlib
from typing import Any

from lightning.pytorch.utilities import CombinedLoader

from data.base import DataModule, Samples
from data.image_base import ImageModule
from data.sampling import StreamBatches
from data.text import TextModule
from moa_lightning.checkpoint_reading import LANGUAGE, VISION
from moa_lightning.errors import UserError


class Joint(DataModule):
    """Two data modules. A training batch is {"vision": image batch, "language": text batch}, None where a domain has
    no turn, without its name where it never has; evaluation hands out the loaders of vision ([bank, query]), then that
    of language.

    Args:
        vision: the images.
        language: the text.
        vision_ratio, language_ratio: batches of either in the same number of steps, such as 1 and 2. The larger one
            has a batch in every step; the other takes part in as many as its share says, evenly spread; 0: in none.
        epoch_steps: micro-steps in an epoch, which only trainer.max_epochs counts; None: as many as the domain takes
            that needs more of them to see its samples once.

    Raises:
        UserError: ratios that make no sense; in `setup`, what the two modules raise.
    """

    def __init__(
        self,
        vision: ImageModule,
        language: TextModule,
        vision_ratio: int = 1,
        language_ratio: int = 1,
        epoch_steps: int | None = None,
    ) -> None:
        super().__init__()
        ratios = {VISION: vision_ratio, LANGUAGE: language_ratio}
        if min(ratios.values()) < 0 or not any(ratios.values()):
            raise UserError(
                f"data.vision_ratio is {vision_ratio} and data.language_ratio {language_ratio}; give whole numbers of "
                "at least 0, one of them above 0"
            )
        if epoch_steps is not None and epoch_steps < 1:
            raise UserError(f"data.epoch_steps is {epoch_steps}; give at least 1 step or leave it out")
        self.ratios, self.epoch_steps = ratios, epoch_steps
        self.parts: dict[str, Any] = {VISION: vision, LANGUAGE: language}
        self.batch_size = sum(part.batch_size for name, part in self.parts.items() if ratios[name])

    @property
    def num_classes(self) -> int | None:
        """Of the images."""
        return self.parts[VISION].num_classes

    @property
    def tokenizer(self) -> Any:
        """Of the text."""
        return getattr(self.parts[LANGUAGE], "tokenizer", None)

    def prepare_data(self) -> None:
        for part in self.parts.values():
            part.prepare_data()

    def build(self) -> dict[str, Samples]:
        """The splits of both, "vision_train", "language_val" and so on."""
        splits: dict[str, Samples] = {}
        for domain, part in self.parts.items():
            try:
                part.setup(None if self.ratios[domain] else "validate")
            except UserError as error:
                raise UserError(f"data.{domain}: {error}") from error
            splits |= {f"{domain}_{name}": samples for name, samples in part.splits.items()}
        self.faults = [fault for part in self.parts.values() for fault in part.faults]
        return splits

    def setup(self, stage: str | None = None) -> None:
        for part in self.parts.values():
            part.trainer = self.trainer
        if not self.splits:
            self.splits = self.build()

    @property
    def train_samples(self) -> int:
        return sum(self._size(f"{domain}_train") for domain in self.parts)

    @property
    def val_samples(self) -> int:
        return sum(self._size(f"{domain}_val") for domain in self.parts)

    def steps(self) -> int:
        """Micro-steps in an epoch, after `setup`."""
        if self.epoch_steps is not None:
            return self.epoch_steps
        most = max(self.ratios.values())
        sizes = {domain: len(part.splits["train"]) // part.batch_size for domain, part in self.parts.items()}
        return max(-(-sizes[domain] * most // ratio) for domain, ratio in self.ratios.items() if ratio)

    def train_dataloader(self) -> CombinedLoader:
        steps, most = self.steps(), max(self.ratios.values())
        loaders = {}
        for domain, ratio in self.ratios.items():
            if ratio:
                part = self.parts[domain]
                batches = StreamBatches(part.train_batches(None), steps, ratio, most, self._stream_position)
                loaders[domain] = part.train_loader(batches)
        return CombinedLoader(loaders, "min_size")

    def _stream_position(self, steps: int) -> tuple[int, int]:
        """(step since the very beginning, step of this epoch) where training goes on."""
        if self.trainer is None:
            return 0, 0
        _, start = self._position(steps)
        # overfit_batches promises the same few batches again and again
        return (start if self.trainer.overfit_batches else self._done()), start  # type: ignore[attr-defined]

    def val_dataloader(self) -> list[Any]:
        return _flat(*(part.val_dataloader() for part in self.parts.values()))

    def test_dataloader(self) -> list[Any]:
        return _flat(*(part.test_dataloader() for part in self.parts.values() if "test" in part.splits))

    def predict_dataloader(self) -> list[Any]:
        return _flat(*(part.predict_dataloader() for part in self.parts.values()))

    def describe_source(self) -> dict[str, str | int]:
        described = {domain: part.describe() for domain, part in self.parts.items()}
        sources = " and ".join(f"{self.ratios[domain]} x {facts.get('source')}" for domain, facts in described.items())
        facts = {f"{domain}_{key}": value for domain, own in described.items() for key, value in own.items()}
        digests = [str(own.get("sha256")) for own in described.values()]
        digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        return {"source": sources, **facts, **({"sha256": digest} if "None" not in digests else {})}

    def describe(self) -> dict[str, str | int]:
        sizes = {name: sum(self._size(f"{d}_{name}") for d in self.parts) for name in ("train", "val", "test")}
        return {"data": type(self).__name__, **self.describe_source(), **{f"{n}_samples": s for n, s in sizes.items()}}


def _flat(*loaders: Any) -> list[Any]:
    """Loaders and lists of loaders as one list."""
    return [each for found in loaders for each in (found if isinstance(found, list) else [found])]
