"""What Lightning users hook in: sample answers, adapter export, evaluation, and stopping when a scheduler asks."""

from realign_lightning.callbacks.evaluation import Evaluation, format_table
from realign_lightning.callbacks.export import AdapterExport, export_folder
from realign_lightning.callbacks.monitor import RewardMonitor
from realign_lightning.callbacks.pictures import Row, draw_rows
from realign_lightning.callbacks.preemption import EXIT_CODE, Preemption
from realign_lightning.callbacks.samples import SampleAnswers, log_picture

__all__ = [
    "EXIT_CODE",
    "AdapterExport",
    "Evaluation",
    "Preemption",
    "RewardMonitor",
    "Row",
    "SampleAnswers",
    "draw_rows",
    "export_folder",
    "format_table",
    "log_picture",
]
