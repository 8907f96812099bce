"""The plugin is found by vLLM, may be registered again and again, and imports nothing heavy by itself."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

SCRIPT = """
import sys
import vllm
from calm.serving.vllm.plugin import register
register()
register()
from vllm import ModelRegistry
assert "CalmForCausalLM" in ModelRegistry.get_supported_archs()
from transformers import AutoConfig
assert type(AutoConfig.for_model("calm")).__module__ == "calm.config"
assert "vllm.model_executor.models.llama" not in sys.modules
print(*sorted(name for name in sys.modules if name.startswith("calm.serving.")))
"""


def test_vllm_finds_it() -> None:
    (point,) = entry_points(group="vllm.general_plugins", name="calm")
    assert point.value == "calm.serving.vllm.plugin:register"


def test_nothing_heavy_is_imported_until_vllm_asks() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == [
        "calm.serving.vllm",
        "calm.serving.vllm.ending",
        "calm.serving.vllm.plugin",
        "calm.serving.vllm_server",
    ]
