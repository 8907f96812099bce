"""calm: compose frozen language models through small trained cross-attention connections (arXiv 2401.02412)."""

from transformers import AutoConfig, AutoModelForCausalLM

from calm.cache import CalmCache
from calm.composition import compose
from calm.config import CalmConfig
from calm.connections import LayerPair
from calm.errors import CalmError, CheckpointError, TokenizerMismatchError, UnsupportedModelError
from calm.model import CalmForCausalLM

__version__ = "0.1.0"

__all__ = [
    "CalmCache",
    "CalmConfig",
    "CalmError",
    "CalmForCausalLM",
    "CheckpointError",
    "LayerPair",
    "TokenizerMismatchError",
    "UnsupportedModelError",
    "__version__",
    "compose",
]

AutoConfig.register("calm", CalmConfig, exist_ok=True)
AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM, exist_ok=True)
