"""Saving a composition without its bases, finding them again when it is loaded, and uploading it."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from calm import checkpoint, fingerprints, sources
from calm.config import CalmConfig
from calm.errors import CalmError
from calm.sharding import gathered, is_spread, whole

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class CompositionSaving(PreTrainedModel):
    """What `CalmForCausalLM` changes of transformers' saving and loading: a checkpoint holds the connections only."""

    config: CalmConfig
    anchor: PreTrainedModel
    augmenting: nn.ModuleDict
    connections: nn.ModuleList

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Save the composition parameters (safetensors), the configuration and a model card; never a base's weights.

        An adapter that trains on a base is not among them (a warning says so): PEFT saves it. Of a base whose weights
        have changed, as by an adapter that was merged into it, the new fingerprint is recorded (and warned about), so
        that the composition loads with this base only; quantized and sharded bases are not looked at.

        Args:
            save_directory: Where to; made if missing. A failed save leaves what was there. A composition's files are
                replaced, another model's never.
            is_main_process: False on the other processes of a distributed run, which then write nothing. Where FSDP
                shards the connections every process has to call this, since each has a part of them.
            state_dict: Weights gathered elsewhere (a sharded run), instead of the model's own.
            push_to_hub: Upload what was saved, with a tokenizer that lies beside it, see `push_to_hub` (`repo_id` and
                its other arguments in `kwargs`).
            max_shard_size: Largest weights file, in bytes or as "5GB".
            kwargs: For `push_to_hub`; without it none but what changes nothing, `safe_serialization=True` and the
                `save_function` of Accelerate's recipe.

        Raises:
            CalmError: If an argument is unknown.
            CheckpointError: If the directory holds another model, or cannot be written to.
        """
        if not kwargs.pop("safe_serialization", True):
            raise CalmError("safe_serialization=False: a composition is saved as safetensors only. Leave it out.")
        kwargs.pop("save_function", None)  # transformers has no use for it either
        kwargs = {key: value for key, value in kwargs.items() if value is not None or key not in ("token", "variant")}
        if kwargs and not push_to_hub:
            raise CalmError(
                f"save_pretrained() got {', '.join(f'{key}={value!r}' for key, value in kwargs.items())}, which it "
                "does not know. Leave it out, or pass push_to_hub=True if it is for that."
            )
        weights = self._gathered_connections() if state_dict is None else state_dict
        if not is_main_process:
            return
        if any(weight.requires_grad for base in (self.anchor, self.augmenting) for weight in base.parameters()):
            logger.warning(
                "%s holds the connections only, and not what else is trained, such as an adapter on the anchor: save "
                "that too, with model.anchor.save_pretrained(FOLDER); model.anchor.load_adapter(FOLDER) loads it.",
                os.fspath(save_directory),
            )
        checkpoint.refuse_other_model(save_directory)
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.dtype = next(iter(self.connections.parameters())).dtype
        self._record_changed_bases(config)
        checkpoint.write(save_directory, config, weights, self.generation_config, max_shard_size)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory)))
            _upload(save_directory, repo_id, **kwargs)

    def _record_changed_bases(self, config: CalmConfig) -> None:
        bases: dict[str, tuple[PreTrainedModel, dict[str, Any]]] = {"anchor": (self.anchor, config.anchor_reference)}
        for name, model in self.augmenting.items():
            bases[name] = cast(PreTrainedModel, model), config.augmenting_references.get(name, {})
        adapted: set[int] = set()
        for name, (base, reference) in bases.items():
            weights = set(map(id, base.parameters()))
            if sources.has_adapter(base) or weights & adapted:  # it is put on again after loading
                adapted |= weights
                continue
            if is_spread(base) or not fingerprints.has_changed(base, reference):
                continue
            reference["fingerprint"] = fingerprints.fingerprint(base)
            reference["dtype"] = fingerprints.precision_of(base)
            reference.pop("adapter", None)  # merged by now
            logger.warning(
                "The weights of the %s are not those that this composition was made with, and it holds none of them: "
                "save the whole model that has them, too, and give it when you load the composition, as "
                "from_pretrained(..., %s).",
                "anchor" if name == "anchor" else f"augmenting model {name!r}",
                "anchor=FOLDER" if name == "anchor" else f"augmenting={{{name!r}: FOLDER}}",
            )

    def _gathered_connections(self) -> dict[str, Tensor]:
        with gathered(self.connections):
            weights = self.connections.state_dict(prefix=checkpoint.CONNECTIONS_PREFIX)
            return {name: whole(weight) for name, weight in weights.items()}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload composition",
    ) -> Any:
        """Upload the composition with its model card (which bases, which connections, how many parameters).

        A card that somebody wrote or changed in the repository stays as it is. Of bases that are folders of this
        computer, no more than the folder's name is uploaded: a warning says that whoever loads the composition has to
        give them.

        Args:
            repo_id: `OWNER/NAME`; made if missing.
            private: Whether a new repository is private.
            token: Access token; that of `hf auth login` by default.
            revision: Branch; made if missing.
            create_pr: Open a pull request instead of committing.
            commit_message: The commit's message.

        Returns:
            What `huggingface_hub.HfApi.create_commit` returns.

        Raises:
            CheckpointError: If the repository, or its branch `revision`, holds a model that is no composition; a new
                branch of it or a pull request may be made.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return _upload(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: CalmConfig | None = None,
        anchor: PreTrainedModel | str | os.PathLike[str] | None = None,
        augmenting: Any = None,
        verify_bases: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load a composition; its bases come from where they were, or are given by hand.

        Args:
            pretrained_model_name_or_path: Folder or hub name of the composition.
            model_args: None are accepted.
            config: The composition's configuration, a `CalmConfig`, if already read.
            anchor: The anchor, or where it is now, instead of the recorded reference. Verified, this is what the
                composition records when it is saved again.
            augmenting: The augmenting model(s) likewise: one, or `{name: model or name}`. With `{}` none is loaded, and
                `forward` has to be given `augmenting_outputs`.
            verify_bases: Refuse bases whose weights or configurations are not those trained against.
            kwargs: `revision` and `subfolder` for the composition, `generation_config` instead of its own; those that
                concern finding files (`token`, `cache_dir`, `force_download`, `local_files_only`) for it and the bases;
                everything else (`dtype`, `device_map`, `quantization_config`, `trust_remote_code`, ...) for the bases.

        Returns:
            The composed model in evaluation mode, connections in the anchor's dtype: to train half-precision ones
            further, `model.connections.float()` first.

        Raises:
            CalmError: If an argument is none that a composition is loaded with.
            CheckpointError: If the composition or a base is missing, damaged, of a newer format, or not the right one.
        """
        if model_args:
            raise CalmError(f"from_pretrained() got {model_args!r} after the name: pass arguments by their names.")
        if kwargs.pop("output_loading_info", False):
            raise CalmError(
                "output_loading_info=True: there is nothing to tell, since a composition that lacks weights or has "
                "others is refused. Leave it out."
            )
        if config is not None and not isinstance(config, CalmConfig):
            raise CalmError(
                f"config is a {type(config).__name__}: expected the composition's CalmConfig. Leave it out."
            )
        kwargs.pop("adapter_kwargs", None)
        hub_kwargs: dict[str, Any] = {key: kwargs.pop(key) for key in ("revision", "subfolder") if key in kwargs}
        hub_kwargs |= {key: kwargs[key] for key in sources.HUB_KWARGS if key in kwargs}
        generation_config = kwargs.pop("generation_config", None)
        name = os.fspath(pretrained_model_name_or_path)
        if config is None:
            config = checkpoint.read_config(name, **hub_kwargs)
        kwargs = config.asked_of_bases | kwargs
        anchor_model, augmenting_models = sources.load_bases(config, anchor, augmenting, verify_bases, **kwargs)
        if verify_bases:  # else what is recorded could name weights that its fingerprint refuses
            config = sources.record_given(config, anchor, augmenting)
        model = cls(config, anchor_model, augmenting_models)
        expected = model.connections.state_dict(prefix=checkpoint.CONNECTIONS_PREFIX)
        weights = checkpoint.read_weights(name, expected, **hub_kwargs)
        model.connections.load_state_dict(
            {key.removeprefix(checkpoint.CONNECTIONS_PREFIX): value for key, value in weights.items()}
        )
        model.name_or_path = config.name_or_path = name
        if generation_config is not None:
            model.generation_config = generation_config
        else:
            with suppress(OSError):  # a checkpoint without generation_config.json keeps the anchor's
                model.generation_config = GenerationConfig.from_pretrained(name, **hub_kwargs)
        return model.eval()


def _upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload composition",
) -> Any:
    """Upload a composition that is saved in a folder; arguments and result as for `push_to_hub`."""
    files = checkpoint.uploads(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    there, config = _on_the_hub(api, repo_id, revision)
    if not create_pr:
        checkpoint.refuse_other_files(repo_id, config, there)
        if revision is not None and not revision.startswith("refs/pr"):  # a commit makes no branch
            api.create_branch(repo_id, branch=revision, exist_ok=True)
            there, config = _on_the_hub(api, repo_id, revision)  # a new one begins with the files of main
    if "README.md" in there:
        card = api.hf_hub_download(repo_id, "README.md", revision=revision)
        if not checkpoint.wrote_card(card):
            del files["README.md"]
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationAdd(name, file) for name, file in files.items()]
    if checkpoint.is_composition(config):  # never another model's, in a new branch or a pull request
        operations += [CommitOperationDelete(name) for name in checkpoint.stale_weights(there, files)]
    return api.create_commit(
        repo_id,
        operations,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


def _on_the_hub(api: HfApi, repo_id: str, revision: str | None) -> tuple[list[str], bytes | None]:
    """The names of a repository's files, and its `config.json`; none where the branch is not there yet."""
    try:
        there = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        return [], None
    if "config.json" not in there:
        return there, None
    with open(api.hf_hub_download(repo_id, "config.json", revision=revision), "rb") as file:
        return there, file.read()
