"""Data modules: text and images, from files, packaged sets, token files or shards, all with the same batch formats.

Text batch: `tokens` and `targets` int64 (B, T) (a target of -100 is not counted), `id` and `seed` int64 (B,), and of a
mixture `source` int64 (B,). Labelled text: `tokens` (B, T), of which the first `lengths` int64 (B,) are real, with
`label` (int64, float32 where it is a number), `id` and `seed`. Image batch in training: `views`, a list of float32
(B, C, H, W), one entry for each view, globals before locals, with `label`, `id` and `seed`; in evaluation `image`,
float32 (B, C, H, W), in place of `views`. An `id` of -1 marks padding. Of images and text together: {"vision": ...,
"language": ...}, see `Joint`.
"""

from data.base import DataModule, Samples
from data.image_shards import ImageShards
from data.images import Images
from data.joint import Joint
from data.mixture import Mixture
from data.rand_augment import RandAugment
from data.text import TextFiles
from data.text_shards import TextShards
from data.text_tasks import LabelledFiles, TextTask
from data.token_files import TokenFiles
from data.transforms import MultiCrop, SingleView, View

__all__ = [
    "DataModule",
    "ImageShards",
    "Images",
    "Joint",
    "LabelledFiles",
    "Mixture",
    "MultiCrop",
    "RandAugment",
    "Samples",
    "SingleView",
    "TextFiles",
    "TextShards",
    "TextTask",
    "TokenFiles",
    "View",
]
