"""``foretell run``: complete one prompt, stream the answer, report what it cost."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foretell.cli import options as o
from foretell.cli.groups import grouped
from foretell.cli.guard import say
from foretell.cli.session import TextOut, check_finished, open_model, read_stdin
from foretell.errors import InvalidRequestError
from foretell.store.aliases import ALIASES, DEFAULT_MODEL

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.llm import LLM
    from foretell.output import RequestOutput

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] PROMPT", help="What to complete (- reads stdin), after the model if not the default."
    ),
]


@grouped
def run(
    choosing: o.Sampling,
    engine: o.Engine,
    words: Words = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="PROMPT is token ids, and so is the output.")] = False,
    system: o.System = None,
    json_output: o.JsonOutput = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, max=128, help="Show each token's probability and its K rivals.", metavar="K"),
    ] = None,
) -> None:
    """Complete one prompt: the text streams to stdout, a summary of what it cost follows on stderr.

    The model's chat template is applied where it has one, unless --raw says not to. The likeliest token is
    taken each time, unless --temperature asks for variety.

    [bold]Examples[/bold]

      foretell run "Why is the sky blue?"
      foretell run gemma3-270m "The capital of France is" -n 20
      cat report.txt | foretell run - --system "Summarise in one sentence."
      foretell run --raw "Once upon a time" --temperature 0.8 --seed 7
      foretell run "2 + 2 =" --raw -n 3 --logprobs 5
      foretell run "Say hi" --json | jq .tpot_seconds
      foretell run ./my-model --ids 12,7,99
    """
    model, prompt = split_words(words or [])
    params = choosing.params(logprobs=logprobs)
    text = read_stdin() if prompt == "-" else prompt
    given = parse_ids(text) if ids else text
    if system is not None and (raw or ids):
        raise typer.BadParameter("--system needs the chat template, --raw and --ids leave it out: choose one")
    if not given:
        raise InvalidRequestError("the prompt is empty: give some text, or - to read it from stdin")
    with open_model(model, **engine.options()) as llm:
        accepted = llm.now  # TTFT counts the chat template and the tokeniser too
        prepared, note = prepare(llm, given, raw=raw, system=system)
        if note and not (quiet or json_output):
            say(note)
        result = generate(llm, prepared, params, ids=ids, show=not json_output, arrival=accepted)
        report(llm, result, json_output=json_output, quiet=quiet)


def split_words(words: list[str]) -> tuple[str, str]:
    """(model, prompt): one word is the prompt, two are model and prompt, none is a prompt piped in."""
    if not words:
        if sys.stdin.isatty():
            raise typer.BadParameter('give a prompt: foretell run "Why is the sky blue?"')
        return DEFAULT_MODEL, "-"
    if len(words) > 2:
        raise typer.BadParameter(f"a model and a prompt, but {len(words)} words came: put the prompt in quotes")
    if len(words) == 2:
        return words[0], words[1]
    if words[0] in ALIASES or words[0].endswith(".gguf") or ("/" in words[0] and Path(words[0]).is_dir()):
        raise typer.BadParameter(f'{words[0]} is a model: give a prompt too, as in foretell run {words[0]} "Hello"')
    return DEFAULT_MODEL, words[0]


def parse_ids(text: str) -> list[int]:
    """ "1, 2 3" → [1, 2, 3]."""
    words = [word for word in re.split(r"[,\s]+", text.strip().strip("[]")) if word]
    bad = next((word for word in words if not re.fullmatch(r"\d{1,10}", word)), None)
    if bad is not None:
        raise InvalidRequestError(f"--ids wants token ids like 12,7,99; {bad[:40]!r} is none")
    return [int(word) for word in words]


def prepare(llm: LLM, given: str | list[int], *, raw: bool, system: str | None) -> tuple[str | list[int], str]:
    """(prompt for the engine, a note for the user or ""): the text goes through the chat template if there is one."""
    if isinstance(given, list) or raw:
        return given, ""
    if llm.tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer: use --ids and give the prompt as token ids")
    if not llm.tokenizer.has_chat_template:
        if system is not None:
            raise InvalidRequestError("this model has no chat template, so --system has no place to go")
        return given, "(no chat template in this model: the text is completed as it is)"
    messages = [] if system is None else [{"role": "system", "content": system}]
    return llm.chat_token_ids([*messages, {"role": "user", "content": given}]), ""


def generate(
    llm: LLM, prompt: str | list[int], params: SamplingParams, *, ids: bool, show: bool, arrival: float
) -> RequestOutput:
    """Run the request to its end, showing text (or ids) as it comes."""
    out, output, first = TextOut(), None, True
    try:
        for update in llm.stream(prompt, params, arrival=arrival):
            output = update.output
            if show and ids:
                out.write(
                    "".join(f"{'' if first and not n else ','}{i}" for n, i in enumerate(update.delta_token_ids))
                )
                first = first and not update.delta_token_ids
            elif show:
                out.write(update.delta_text)
    finally:
        if show and sys.exc_info()[0] is not BrokenPipeError:
            out.end_line()
    assert output is not None, "a stream ends with an update"
    check_finished(output.outputs[0])
    return output


def report(llm: LLM, result: RequestOutput, *, json_output: bool, quiet: bool) -> None:
    from foretell.cli import summary

    if json_output:
        import json

        print(json.dumps(summary.as_dict(llm, result), ensure_ascii=False))
    else:
        summary.print_summary(llm, result, quiet=quiet)
