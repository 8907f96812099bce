"""What a composition will cost (parameters, memory, FLOPs, time), worked out before any weight is loaded.

Nothing here is a formula about one architecture. The composed model is built without memory (on PyTorch's meta
device), checked by `compose` itself, and then run and trained on tensors that have shapes but no contents, while
everything is written down (`calm.tracing`): the same matrix products, tensors and caches as in a real run.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from calm import backbones, checkpoint, sources
from calm.calibration import DTYPES, Calibration
from calm.composition import compose
from calm.config import depth_of, width_of
from calm.connections import LayerPair
from calm.errors import CalmError, UnsupportedModelError
from calm.model import CalmForCausalLM
from calm.sources import Source
from calm.tracing import Trace, connections_in_float32, loss_of, shapes_only, update

Base: TypeAlias = PreTrainedModel | PreTrainedConfig | str | os.PathLike[str]

ADAMW_STATES = 2  # running means of the gradient and of its square, each of the parameters' size


@dataclass(frozen=True)
class Part:
    """One part of a composed model: the anchor, an augmenting model cut after its last connected layer, connections.

    Attributes:
        architecture: The configuration's model type, or "connection".
        layers: How many layers run (for the connections: how many there are).
        layers_in_full: How many layers the whole model has.
        width: Width of a layer's output.
        parameters: Number of parameters that are kept in memory; weights tied to one another count once.
        weight_bytes: Bytes that these take.
        cache_bytes: Bytes of the keys and values (or states) kept for `batch_size` sequences of `sequence_length`.
        forward_flops: FLOPs of a forward pass over `batch_size` sequences of `sequence_length`.
    """

    architecture: str
    layers: int
    layers_in_full: int
    width: int
    parameters: int
    weight_bytes: int
    cache_bytes: int
    forward_flops: int


@dataclass(frozen=True)
class Plan:
    """What a composition will cost, as if the bases were not quantized.

    A FLOP is one multiplication or one addition; those of matrix products, convolutions and attention are counted,
    without the savings of kernels that skip what a causal mask hides. Memory is that of tensors; it leaves out what is
    alive only within one operation, and the runtime's own. A training step is that of `calm.training`: a batch
    with every token a label, the loss in chunks, gradients clipped, AdamW; steps that are logged measure the
    connections' attention on top of it.

    Attributes:
        anchor: The anchor.
        augmenting: The truncated augmenting models, by name.
        connections: The connections, all that is trained and saved.
        layer_pairs: The connections one by one.
        num_heads: Heads of every connection.
        attention: `"gated"`, `"normalized"` or `"paper"`.
        sequence_length: Tokens in a sequence.
        batch_size: Sequences in a batch.
        dtype: Of weights and caches. In training the connections, and with them their gradients and optimizer states,
            are in float32 whatever the bases are in (`calm.training`).
        total_parameters: Parameters of all parts; weights that an augmenting model shares with the anchor, because
            both are the same base, count once.
        weight_bytes: Bytes that these take, to run.
        checkpoint_bytes: Size of a checkpoint's weights (`model.safetensors`, or all its shards), as training saves
            them.
        cache_bytes: Bytes of all caches for one batch.
        cache_bytes_per_token: `cache_bytes` by token; with sliding windows or recurrent states it falls as sequences
            get longer.
        inference_bytes: `weight_bytes + cache_bytes`.
        training_weight_bytes: Bytes of all weights in training.
        gradient_bytes: Bytes of the connections' gradients.
        optimizer_bytes: Bytes of AdamW's two states of the connections.
        activation_bytes: Bytes that a training step's forward pass keeps for its backward pass; nothing below the
            first connection is kept, and of the logits only the gradient that they leave.
        training_bytes: The most memory that training takes: weights, optimizer states, and whatever else is alive at
            the step's worst moment (activations with a chunk of logits or with gradients).
        activation_checkpointing: Whether the step recomputes the anchor's activations.
        processes: Processes (one for each GPU) that train together, each on its own batch.
        data_parallel_bytes: `training_bytes` of each of them when every one holds all weights.
        sharded_bytes: The same when weights and optimizer states are sharded over the processes (FSDP2, layer by
            layer): embeddings and heads, and of the layers the largest two, are there whole.
        forward_flops_per_token: FLOPs of a forward pass by token, at `sequence_length`.
        training_step_flops: FLOPs of one training step over one batch. Gradients flow back to the first connection
            only, and only connections get gradients of weights.
        training_step_flops_by_dtype: The same by the dtype that they are computed in.
        training_step_seconds: How long a step of one process takes on the machine of the calibration, if one is given.
            What several processes send to one another is not in it.
        hardware: That machine.
    """

    anchor: Part
    augmenting: dict[str, Part]
    connections: Part
    layer_pairs: list[LayerPair]
    num_heads: int
    attention: str
    sequence_length: int
    batch_size: int
    dtype: str
    total_parameters: int
    weight_bytes: int
    checkpoint_bytes: int
    cache_bytes: int
    cache_bytes_per_token: int
    inference_bytes: int
    training_weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    training_bytes: int
    activation_checkpointing: bool
    processes: int
    data_parallel_bytes: int
    sharded_bytes: int
    forward_flops_per_token: int
    training_step_flops: int
    training_step_flops_by_dtype: dict[str, int]
    training_step_seconds: float | None
    hardware: str | None

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values, under the attributes' names."""
        return asdict(self)


def plan(
    anchor: Base,
    augmenting: Base | Mapping[str, Base],
    connections: int | Iterable[tuple[int, int]] | Mapping[str, int | Iterable[tuple[int, int]]] = 4,
    *,
    num_heads: int | None = None,
    attention: str = "gated",
    sequence_length: int = 512,
    batch_size: int = 1,
    dtype: str = "bfloat16",
    processes: int = 1,
    activation_checkpointing: bool = False,
    calibration: Calibration | None = None,
    revision: str | None = None,
) -> Plan:
    """Work out what `compose` with the same arguments would cost (issue 2, section 3).

    Only configurations and tokenizers are read; of a GGUF file, which holds both, a hub downloads the whole.

    Args:
        anchor: The anchor: hub name, folder, GGUF file, configuration, or a loaded model (for its configuration).
        augmenting: The augmenting model likewise, or several by name.
        connections: As in `compose`.
        num_heads: Heads of a connection; the anchor's number by default.
        attention: `"gated"`, `"normalized"` or `"paper"`.
        sequence_length: Tokens in a sequence, at least 2: a training step is planned, which predicts each from those
            before it.
        batch_size: Sequences in a batch.
        dtype: Of all weights: `"float32"`, `"bfloat16"` or `"float16"`.
        processes: How many train together.
        activation_checkpointing: Train with it, as in a recipe: less memory, more FLOPs.
        calibration: The speed of the machine to train on, from `calm.calibration`.
        revision: Of hub repositories.

    Returns:
        The plan.

    Raises:
        CalmError: Whatever `compose` would refuse (connections, architectures, tokenizers), an unknown dtype, a
            calibration of another one, or sequences longer than the smaller of the models' contexts.
    """
    if dtype not in DTYPES:
        raise CalmError(f"dtype={dtype!r}: expected one of {', '.join(map(repr, DTYPES))}.")
    if calibration is not None:
        calibration.check_dtype(dtype)
    for name, number, least in (
        ("sequence_length", sequence_length, 2),  # a training step predicts a token from one before it
        ("batch_size", batch_size, 1),
        ("processes", processes, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise CalmError(f"{name}={number!r}: expected a whole number, at least {least}.")

    bases = dict(augmenting) if isinstance(augmenting, Mapping) else {"augmenting": augmenting}
    found = {name: Source.parse(b, revision) for name, b in bases.items() if isinstance(b, str | os.PathLike)}
    anchor_source = Source.parse(anchor, revision) if isinstance(anchor, str | os.PathLike) else None
    tokenizers: dict[str, PreTrainedTokenizerBase | None] = {}
    anchor_tokenizer = None
    if anchor_source is not None and any(source != anchor_source for source in found.values()):
        anchor_tokenizer = sources.load_tokenizer(anchor_source)
        tokenizers = {name: sources.load_tokenizer(s) for name, s in found.items() if s != anchor_source}

    anchor_model = _without_memory(AutoModelForCausalLM, anchor, anchor_source, "anchor", DTYPES[dtype])
    models = {}
    for name, base in bases.items():
        # as in compose: one set of weights serves as both
        if (base is anchor and isinstance(base, PreTrainedModel)) or found.get(name, ()) == anchor_source:
            models[name] = anchor_model
        else:
            models[name] = _without_memory(AutoModel, base, found.get(name), "augmenting model", DTYPES[dtype])
    with torch.device("meta"):
        composed = compose(
            anchor_model,
            models,
            connections,
            num_heads=num_heads,
            attention=attention,
            anchor_tokenizer=anchor_tokenizer,
            augmenting_tokenizer=tokenizers,
        )
    composed.connections.to(DTYPES[dtype])  # as `from_pretrained` gives them; a step is counted in float32
    _check_length(composed, sequence_length)
    try:
        return _count(composed, sequence_length, batch_size, dtype, processes, activation_checkpointing, calibration)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        architectures = {anchor_model.config.model_type, *(m.config.model_type for m in models.values())}
        raise UnsupportedModelError(
            f"This composition can be made but not planned: the code of {' or '.join(sorted(architectures))} looks at "
            f"the contents of tensors ({error}). Compose it and measure."
        ) from error


def _without_memory(auto_class: Any, base: Any, source: Source | None, role: str, dtype: torch.dtype) -> Any:
    """A base built from its configuration on the meta device; anything that `compose` refuses is left to it."""
    if source is not None:
        config = sources.load_config(source)
    elif isinstance(base, PreTrainedModel | PreTrainedConfig):
        config = copy.deepcopy(base.config if isinstance(base, PreTrainedModel) else base)
    else:
        raise CalmError(
            f"The {role} is a {type(base).__name__}: expected a hub name, folder, GGUF file, configuration or model."
        )
    backbones.check_supported(config, role)
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=dtype).to("meta")  # some weights are made from arrays
    except ValueError as error:
        raise UnsupportedModelError(f"The {role} has the architecture {config.model_type!r}: {error}") from error


def _check_length(model: CalmForCausalLM, length: int) -> None:
    if model.context_length is not None and length > model.context_length:
        raise CalmError(
            f"sequence_length={length}: the context of {model._context_of} is {model.context_length} tokens, and the "
            "smallest context of the composed models counts."
        )


# -- counting -----------------------------------------------------------------------------------------------------


def _count(
    model: CalmForCausalLM,
    sequence_length: int,
    batch_size: int,
    dtype: str,
    processes: int,
    activation_checkpointing: bool,
    calibration: Calibration | None,
) -> Plan:
    config = model.config
    total_parameters = model.get_nb_trainable_parameters()[1]
    weights = {
        "anchor": list(model.anchor.parameters()),
        "connections": list(model.connections.parameters()),
        **{f"augmenting.{name}": list(m.parameters()) for name, m in model.augmenting.items()},
    }
    weight_bytes, buffer_bytes = _bytes(model.parameters()), _bytes(model.buffers())
    trained_bytes = sum(weight.numel() for weight in weights["connections"]) * torch.float32.itemsize

    trained = model.connections.state_dict(prefix=checkpoint.CONNECTIONS_PREFIX)
    checkpoint_bytes = checkpoint.weights_bytes({name: weight.float() for name, weight in trained.items()})
    whole_bytes = _whole_when_sharded(model)  # before weights that are tied to one another are made apart

    with shapes_only():
        model.to_empty(device="cpu")
        tokens = torch.empty(batch_size, sequence_length, dtype=torch.long)
        flops = {}
        with torch.no_grad():
            with Trace() as composed:
                cache = model(tokens, use_cache=True).past_key_values
            with Trace() as flops["anchor"], model.composition_disabled():
                model(tokens, use_cache=True)
            for name, augmenting in model.augmenting.items():
                with Trace() as flops[f"augmenting.{name}"]:
                    augmenting(input_ids=tokens, use_cache=True)
        optimizer = connections_in_float32(model)
        if activation_checkpointing:
            with warnings.catch_warnings():  # the name that every version 5 knows
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        with Trace() as step:
            loss = loss_of(model, tokens)
            activation_bytes = step.live_bytes
            update(loss, optimizer)

    forward_flops = composed.flops
    forward = {name: trace.flops for name, trace in flops.items()}
    forward["connections"] = forward_flops - sum(forward.values())
    caches = {"anchor": cache.anchor, "connections": cache.cross}
    caches |= {f"augmenting.{name}": part for name, part in cache.augmenting.items()}
    cached = {name: _cache_bytes(part) for name, part in caches.items()}

    def part(name: str, base: PreTrainedConfig | None, layers: int) -> Part:
        return Part(
            architecture="connection" if base is None else base.model_type,
            layers=layers,
            layers_in_full=layers if base is None else depth_of(base),
            width=width_of(config.anchor_config if base is None else base),
            parameters=sum(weight.numel() for weight in weights[name]),
            weight_bytes=_bytes(weights[name]),
            cache_bytes=cached[name],
            forward_flops=forward[name],
        )

    cache_bytes = sum(cached.values())
    optimizer_bytes = ADAMW_STATES * trained_bytes
    training_weight_bytes = weight_bytes - _bytes(weights["connections"]) + trained_bytes
    training_bytes = training_weight_bytes + optimizer_bytes + buffer_bytes + step.peak_bytes
    data_parallel_bytes = sharded_bytes = training_bytes
    if processes > 1:
        data_parallel_bytes += trained_bytes  # buckets to send gradients in
        shared_out = training_weight_bytes + optimizer_bytes
        sharded_bytes += whole_bytes - (shared_out - -(-shared_out // processes))
    step_flops: Counter[str] = Counter()
    for operation in step.operations:
        if operation.flops:
            step_flops[operation.dtype] += operation.flops
    return Plan(
        anchor=part("anchor", config.anchor_config, depth_of(config.anchor_config)),
        augmenting={
            name: part(f"augmenting.{name}", base, backbones.kept_depth(base, config.augmenting_depth(name)))
            for name, base in config.augmenting_configs.items()
        },
        connections=part("connections", None, len(model.connections)),
        layer_pairs=config.layer_pairs,
        num_heads=cast(int, config.num_heads),
        attention=config.attention,
        sequence_length=sequence_length,
        batch_size=batch_size,
        dtype=dtype,
        total_parameters=total_parameters,
        weight_bytes=weight_bytes,
        checkpoint_bytes=checkpoint_bytes,
        cache_bytes=cache_bytes,
        cache_bytes_per_token=cache_bytes // (batch_size * sequence_length),
        inference_bytes=weight_bytes + cache_bytes,
        training_weight_bytes=training_weight_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=optimizer_bytes,
        activation_bytes=activation_bytes,
        training_bytes=training_bytes,
        activation_checkpointing=activation_checkpointing,
        processes=processes,
        data_parallel_bytes=data_parallel_bytes,
        sharded_bytes=sharded_bytes,
        forward_flops_per_token=forward_flops // (batch_size * sequence_length),
        training_step_flops=step_flops.total(),
        training_step_flops_by_dtype=dict(step_flops),
        training_step_seconds=calibration.seconds(step.operations) if calibration else None,
        hardware=calibration.hardware if calibration else None,
    )


def _whole_when_sharded(model: CalmForCausalLM) -> int:
    """Bytes of weights that FSDP2 has whole at a time: what is in no layer, and a layer with the next one on its way.

    Layers and connections are sharded one by one (`model._no_split_modules`); what is in none of them is gathered at
    the beginning of a step and stays.
    """
    units = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    inside = {weight for unit in units for weight in unit.parameters()}
    connections = [sum(weight.numel() for weight in c.parameters()) for c in model.connections]
    largest = max(max(connections) * torch.float32.itemsize, *(_bytes(unit.parameters()) for unit in units))
    return _bytes(set(model.parameters()) - inside) + 2 * largest


def _cache_bytes(cache: Cache) -> int:
    states = (state for layer in cache.layers for state in vars(layer).values())  # tensors, or several by number
    tensors = (t for state in states for t in (state.values() if isinstance(state, dict) else (state,)))
    return sum(t.nbytes for t in tensors if isinstance(t, Tensor))


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)
