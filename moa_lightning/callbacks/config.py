"""The merged config of a run in its folder, and the tokenizer, so that the folder alone can write text."""

from pathlib import Path

import lightning as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback

from ..run_folder import CONFIG, TOKENIZER, saved_settings


class SaveRunConfig(SaveConfigCallback):
    """Writes <run_dir>/config.yaml, and the tokenizer's file where it needs one; a resumed run keeps these
    and writes config-resumed.yaml."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        log_dir = trainer.log_dir  # a collective call: every process asks
        if not trainer.is_global_zero or log_dir is None:
            return
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = "config-resumed.yaml" if (folder / CONFIG).exists() else CONFIG
        text = self.parser.dump(self.config, skip_none=False)
        (folder / name).write_text(yaml.safe_dump(saved_settings(yaml.safe_load(text)), sort_keys=False))
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is not None and tokenizer.content is not None and not (folder / TOKENIZER).exists():
            (folder / TOKENIZER).write_bytes(tokenizer.content)
