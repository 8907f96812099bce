"""calm: compose frozen language models through small trained cross-attention connections (arXiv 2401.02412)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from calm.config import CalmConfig
from calm.connections import LayerPair
from calm.errors import CalmError, CheckpointError, TokenizerMismatchError, UnsupportedModelError

if TYPE_CHECKING:
    from calm.cache import CalmCache
    from calm.composition import compose
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

# Imported when they are asked for: vLLM imports this package in each of its processes, for the configuration alone.
_LATER = {"CalmCache": "calm.cache", "CalmForCausalLM": "calm.model", "compose": "calm.composition"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


class _Later:
    """Stands for `CalmForCausalLM` in transformers' auto class until somebody loads one."""

    config_class = CalmConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("CalmForCausalLM").from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("CalmForCausalLM")._from_config(*args, **kwargs)


_Later.__name__ = "CalmForCausalLM"
AutoConfig.register("calm", CalmConfig, exist_ok=True)
AutoModelForCausalLM.register(CalmConfig, _Later, exist_ok=True)
