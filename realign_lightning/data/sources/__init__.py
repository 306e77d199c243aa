"""Where answers about images come from: one class per layout, and :func:`open_source`, which recognises them."""

from realign_lightning.data.sources.base import ImageFile, Source, SourceProblem, SourceRecord
from realign_lightning.data.sources.chat import plain_prompt
from realign_lightning.data.sources.coco import CocoCaptions
from realign_lightning.data.sources.image_folder import ImageFolder
from realign_lightning.data.sources.images import ImageFinder
from realign_lightning.data.sources.layouts import LAYOUTS, guess_layout, open_source
from realign_lightning.data.sources.llava import LlavaInstruct
from realign_lightning.data.sources.pairs import MsSwift, Parquet, RealignJson, ShareGptRanking, TrlPreference
from realign_lightning.data.sources.rows import Row
from realign_lightning.data.sources.shards import Shards
from realign_lightning.data.sources.table import RowSource, fit_key

__all__ = [
    "LAYOUTS",
    "CocoCaptions",
    "ImageFile",
    "ImageFinder",
    "ImageFolder",
    "LlavaInstruct",
    "MsSwift",
    "Parquet",
    "RealignJson",
    "Row",
    "RowSource",
    "Shards",
    "ShareGptRanking",
    "Source",
    "SourceProblem",
    "SourceRecord",
    "TrlPreference",
    "fit_key",
    "guess_layout",
    "open_source",
    "plain_prompt",
]
