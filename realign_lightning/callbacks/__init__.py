"""What Lightning users hook in: sample answers, adapter export, evaluation before and after training."""

from realign_lightning.callbacks.evaluation import Evaluation, format_table
from realign_lightning.callbacks.export import AdapterExport, export_folder
from realign_lightning.callbacks.pictures import Row, draw_rows
from realign_lightning.callbacks.samples import SampleAnswers, log_picture

__all__ = [
    "AdapterExport",
    "Evaluation",
    "Row",
    "SampleAnswers",
    "draw_rows",
    "export_folder",
    "format_table",
    "log_picture",
]
