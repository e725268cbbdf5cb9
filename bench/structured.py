"""Random bounded schemas on a real model: how many outputs finish, and whether those that do are valid.

    python bench/structured.py [--model smollm2-135m] [--schemas 200] [--temperature 0]

Prints what must hold, then what came out, then one JSON line. The oracle is the jsonschema library.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

import jsonschema

from foretell import LLM, SamplingParams, StructuredOutput
from tests.schemas import random_schema

PROMPT = "Write one JSON object that describes a person and follows this schema: "


def prompt_of(llm: LLM, schema: object) -> list[int]:
    """As a chat, where the model has been trained for that."""
    text = PROMPT + json.dumps(schema)
    if llm.tokenizer is not None and llm.tokenizer.has_chat_template:
        return llm.chat_token_ids([{"role": "user", "content": text}])
    return llm.preparer.token_ids(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=512)
    args = parser.parse_args()
    print("must hold: at least 90 % finish, 100 % of those are valid")
    rng = Random(args.seed)
    schemas = [random_schema(rng) for _ in range(args.schemas)]
    with LLM(args.model, max_model_len=4096) as llm:
        chats = [prompt_of(llm, schema) for schema in schemas]
        params = [
            SamplingParams(
                structured=StructuredOutput.json_schema(schema),
                temperature=args.temperature,
                max_tokens=args.max_tokens,
            )
            for schema in schemas
        ]
        started = time.perf_counter()
        outputs = llm.generate(chats, params)
        seconds = time.perf_counter() - started
    finished = valid = tokens = 0
    for schema, output in zip(schemas, outputs, strict=True):
        completion = output.outputs[0]
        tokens += len(completion.token_ids)
        if completion.finish_reason != "stop":
            print(f"unfinished ({completion.finish_reason}, {completion.error}): {completion.text[-80:]!r}")
            continue
        finished += 1
        try:
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(completion.text))
            valid += 1
        except (ValueError, jsonschema.ValidationError) as error:
            print(f"INVALID: {completion.text!r}: {str(error).splitlines()[0]} for {json.dumps(schema)}")
    print(f"{finished} of {len(schemas)} finish ({finished / len(schemas):.1%}), {valid} of those are valid")
    figures = {"schemas": len(schemas), "finished": finished, "valid": valid, "tokens": tokens}
    print(json.dumps({**figures, "temperature": args.temperature, "model": args.model, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
