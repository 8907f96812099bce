"""The switches in vLLM's second model runner, which takes it where it has Triton: not run by any test of an engine."""

from typing import Any

from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState


class CalmModelState(DefaultModelState):
    """What vLLM has a model do before each step, outside of CUDA graphs."""

    supports_prompt_embeds = False  # each of the composed models embeds the tokens itself

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Look up what is on for each token; the step's graph reads it where it always is.

        Args:
            input_batch: The step's requests, each with the slot that it keeps.
            req_states: vLLM's own.
        """
        model: Any = self.model
        model.switches.spread(
            input_batch.query_start_loc, input_batch.num_tokens_after_padding, input_batch.idx_mapping
        )
        return super().prepare_inputs(input_batch, req_states)
