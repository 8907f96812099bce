"""What vLLM calls when it starts (entry point group `vllm.general_plugins`): it makes compositions known, no more."""

from __future__ import annotations

from typing import Any

from packaging.specifiers import SpecifierSet

import calm.config  # noqa: F401 - with it, transformers knows the configuration of a composition

ARCHITECTURE = "CalmForCausalLM"

SUPPORTED_VLLM = SpecifierSet(">=0.32.0,<0.33")
"""The versions that the tests ran with: vLLM's interface for models changes from one minor release to the next."""


def is_supported() -> bool:
    """Whether the installed vLLM is one that compositions are served by."""
    import vllm

    return SUPPORTED_VLLM.contains(vllm.__version__.split("+")[0], prereleases=True)


def register() -> None:
    """Tell vLLM of compositions; may be called any number of times, in every process.

    What the model is made of is imported when vLLM loads one. Beside an unsupported vLLM other models are not
    disturbed: the refusal comes with the model, before anything is imported that this vLLM may not have.
    """
    from vllm import ModelRegistry

    from calm.serving.vllm import ending

    ending.leave_interrupts()
    if not is_supported():
        ModelRegistry.register_model(ARCHITECTURE, f"calm.serving.vllm.unsupported:{ARCHITECTURE}")
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(ARCHITECTURE, f"calm.serving.vllm.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Settings


class Settings:
    """vLLM's `VerifyAndUpdateConfig` of compositions; asked before a process that holds weights is started."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Take the anchor's tokenizer where the composition has none, and the limit of `calm serve` on answers.

        Args:
            model_config: vLLM's `ModelConfig`.

        Raises:
            CalmError: If other places of bases are given in another form than expected.
        """
        from calm.serving.vllm import checks, limiting

        checks.complete_references(model_config)
        checks.default_tokenizer(model_config)
        limiting.limit_answers(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what cannot be served, see `checks.check`, and have requests' switches heard of.

        Args:
            vllm_config: vLLM's `VllmConfig`.

        Raises:
            CalmError: With the reason and the way out.
        """
        from calm.serving.vllm import checks

        checks.check(vllm_config)
        from calm.serving.vllm import scheduling, switches

        model_config = vllm_config.model_config
        processor = switches.processor(list(model_config.hf_config.augmenting_configs))
        model_config.logits_processors = [*(model_config.logits_processors or []), processor]
        vllm_config.scheduler_config.scheduler_cls = scheduling.SCHEDULER
