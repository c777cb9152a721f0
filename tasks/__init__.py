"""One LightningModule per task: the objective, wired from parts of moa_lightning."""

from .base import Task
from .dino import DINO
from .image_classification import ImageClassification
from .joint import Joint
from .language_modeling import LanguageModeling
from .mae import MAE
from .sequence_classification import SequenceClassification

__all__ = ["DINO", "MAE", "ImageClassification", "Joint", "LanguageModeling", "SequenceClassification", "Task"]
