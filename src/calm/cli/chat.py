"""`calm chat`: talks to a composition in the terminal."""

from __future__ import annotations

from contextlib import nullcontext

from rich.console import Console

from calm.cli import loading
from calm.cli.arguments import Dtype
from calm.errors import CalmError

HELP = "/quit ends, /reset forgets the conversation, /off and /on switch the composition off and on, /help shows this"


def chat(
    model: loading.Model,
    max_new_tokens: loading.MaxNewTokens = None,
    temperature: loading.Temperature = 0.0,
    top_p: loading.TopP = 1.0,
    top_k: loading.TopK = 0,
    seed: loading.Seed = None,
    anchor: loading.Anchor = None,
    augmenting: loading.Augmenting = None,
    dtype: Dtype = "auto",
    device: loading.Device = None,
) -> None:
    """Talk to a composition. Without a chat template each line is a prompt of its own, and is completed."""
    from transformers import TextStreamer

    from calm.generation import without_defaults

    composed, tokenizer = loading.load(model, anchor, augmenting, dtype, device)
    options = loading.sampling(temperature, top_p, top_k, seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    chats = tokenizer.chat_template is not None
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        "a conversation" if chats else "no chat template: each line is a prompt, and is completed", style="dim"
    )
    console.print(HELP, style="dim")
    messages: list[dict[str, str]] = []
    disabled = False
    while True:
        try:
            line = console.input("[bold cyan]anchor>[/] " if disabled else "[bold cyan]calm>[/] ")
        except EOFError:
            console.print()
            return
        command = line.strip().lower()
        if not command:
            continue
        if command == "/quit":
            return
        if command in ("/off", "/on"):
            disabled = command == "/off"
            console.print("the bare anchor answers" if disabled else "the composition answers", style="dim")
        elif command == "/reset":
            messages = []
        elif command.startswith("/"):
            console.print(HELP, style="dim")
        else:
            if chats:
                messages.append({"role": "user", "content": line})
                inputs = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                inputs = tokenizer(line, return_tensors="pt")
            inputs = inputs.to(composed.device)
            try:
                with without_defaults(composed), composed.composition_disabled() if disabled else nullcontext():
                    outputs = composed.generate(
                        **inputs,
                        **options,
                        max_new_tokens=loading.length(composed, inputs["input_ids"].shape[1], max_new_tokens),
                        pad_token_id=tokenizer.pad_token_id,
                        streamer=streamer,
                    )
            except CalmError as error:  # a conversation that no longer fits is not lost
                console.print(f"{error} (/reset forgets the conversation)", style="red", markup=False, emoji=False)
                messages = messages[:-1]
                continue
            answer = tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
