"""Who answers questions about images, or none: models on this machine, vLLM, and OpenAI-compatible endpoints."""

from realign_lightning.engines.asking import AnswerBook, EngineError
from realign_lightning.engines.base import Answer, Engine, Form, Question
from realign_lightning.engines.endpoint import EndpointEngine
from realign_lightning.engines.local import LocalEngine
from realign_lightning.engines.memo import Memo, content_key
from realign_lightning.engines.policy import Policy
from realign_lightning.engines.text import TextEngine
from realign_lightning.engines.vllm import VLLMEngine

__all__ = [
    "Answer",
    "AnswerBook",
    "EndpointEngine",
    "Engine",
    "EngineError",
    "Form",
    "LocalEngine",
    "Memo",
    "Policy",
    "Question",
    "TextEngine",
    "VLLMEngine",
    "content_key",
]
