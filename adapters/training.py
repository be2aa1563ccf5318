"""Push an adapter to Manylora at the end of its training, from any trainer built on transformers.

    from adapters.training import PushToManylora

    trainer = SFTTrainer(model, peft_config=LoraConfig(...), ...)
    trainer.add_callback(
        PushToManylora("https://lora.example.com", key, tenant="acme", name="sql", alias="prod")
    )
    trainer.train()

The adapter is saved as PEFT saves it, with the trainer's tokenizer, and goes the way of `manylora
adapters push`: over broken lines, and on from where an earlier push stopped. Where the server finds
something wrong with it, or is away, that is logged and the training is as good as ever: what was to
be pushed stays in `manylora-push` of the trainer's output folder, for the command line. The one
file of this package that knows transformers.
"""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adapters.errors import AdapterError, InvalidAdapter, ServerRefused
from adapters.push import Destination, LocalFolder, Server, move_alias, push

logger = logging.getLogger(__name__)

FOLDER_NAME = "manylora-push"


class PushToManylora(TrainerCallback):
    """Pushes at the end of the training, and with `every_save` each checkpoint too.

    `alias` moves when the training ends, never to a checkpoint; `force` moves it also to a version
    that does worse at its own examples. With `raise_on_error` a push that fails is raised
    instead of logged, after the trainer has finished its work or saved its checkpoint.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        tenant: str,
        name: str,
        alias: str | None = None,
        force: bool = False,
        base_model: str | None = None,
        every_save: bool = False,
        raise_on_error: bool = False,
    ) -> None:
        """Raises ValueError for what is no address of a server, or no key."""
        Server(url, key).close()
        self._url, self._key = url, key
        self._to = Destination(tenant, name, base_model)
        self._alias = alias
        self._is_forced = force
        self._every_save = every_save
        self._raise_on_error = raise_on_error
        # What the server called the last version that was pushed.
        self.pushed_model: str | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ask for the tenant now: a wrong key is better found before the training than after."""
        if state.is_world_process_zero:
            self._try("Manylora may not take the adapter later", self._check_server)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._every_save and state.is_world_process_zero:
            folder = _output(args) / f"checkpoint-{state.global_step}"
            self._try(
                "The adapter was not pushed to Manylora", lambda: self._push(folder, alias=None)
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = _output(args) / FOLDER_NAME

        def save_and_push() -> None:
            _save(folder, kwargs["model"], kwargs.get("processing_class"))
            self._push(folder, alias=self._alias)
            shutil.rmtree(folder)

        self._try("The adapter was not pushed to Manylora", save_and_push)

    def _check_server(self) -> None:
        with Server(self._url, self._key) as server:
            server.get(f"/admin/v1/tenants/{quote(self._to.tenant, safe='')}")

    def _push(self, folder: Path, *, alias: str | None) -> None:
        with Server(self._url, self._key) as server:
            version = push(LocalFolder.read(folder), server, self._to)
            self.pushed_model = version["pinned_model"]
            logger.info("manylora_pushed", extra={"model": self.pushed_model})
            if alias is not None:
                route, number = self._to.route, version["number"]
                move_alias(server, route, alias, version=number, is_forced=self._is_forced)

    def _try(self, what: str, work: Callable[[], None]) -> None:
        """Nothing that goes wrong here is worth a training, unless its owner says so."""
        try:
            work()
        except Exception as error:
            if self._raise_on_error:
                raise
            is_told = isinstance(error, AdapterError)
            findings = error.findings if isinstance(error, InvalidAdapter | ServerRefused) else []
            reasons = "".join(f"\n  {f.where}: {f.message}; {f.fix}" for f in findings)
            # Read by whoever watches the training, not by whoever runs a server.
            logger.error("%s: %s%s", what, error, reasons, exc_info=not is_told)


def _output(args: TrainingArguments) -> Path:
    # Trainer puts a name of its own where it was given none.
    assert args.output_dir is not None
    return Path(args.output_dir)


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """What a checkpoint of the trainer has of an adapter. Raises ValueError where it is not whole.

    A model that is sharded over processes has no adapter in this one alone.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # DeepSpeed leaves empty tensors here, FSDP distributed ones.
    if any(each.numel() == 0 or hasattr(each, "placements") for each in trained):
        raise ValueError(
            "the parameters are sharded over processes: save with trainer.save_model(FOLDER), and"
            " push FOLDER with `manylora adapters push`, or push every save"
        )
    if not hasattr(model, "peft_config"):
        raise ValueError("the model that was trained is no PEFT model: there is no adapter to push")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
