"""The Python interface on the default model: text, stops, n, logprobs, streaming, asyncio, errors, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from foretell import LLM, AsyncLLM, SamplingParams
from foretell.engine_loop import params_of_output
from foretell.errors import ConfigError, ForetellError, InvalidRequestError
from foretell.output import StopStringFilter
from tests.model import models

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(models.prepare("smollm2")), dtype="float32", max_model_len=512, kv_cache_bytes=200_000_000) as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM(str(models.prepare("glassllm")), dtype="float32", block_size=4) as llm:
        yield llm


def blocks_are_free(llm: LLM) -> bool:
    """Once the engine thread has worked off what was posted before."""
    done = threading.Event()
    llm.service.call(lambda engine: done.set())
    assert done.wait(20)
    scheduler = llm.assembly.engine.scheduler
    return not scheduler.requests and all(p.num_free == p.num_blocks for p in scheduler.blocks.pools)


def test_text_is_the_decoded_tokens_and_metrics_are_in_order(llm: LLM) -> None:
    output = llm.generate(PROMPT, GREEDY)[0]
    completion = output.outputs[0]
    assert llm.tokenizer is not None
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert "Paris" in completion.text
    assert output.prompt == PROMPT
    assert output.prompt_token_ids == list(models.info("smollm2").prompt)
    metrics = output.metrics
    assert metrics.first_scheduled is not None
    assert metrics.first_token is not None
    assert metrics.last_token is not None
    assert metrics.arrival <= metrics.first_scheduled <= metrics.first_token <= metrics.last_token
    assert metrics.ttft_seconds is not None
    assert metrics.engine_ttft_seconds is not None
    assert metrics.ttft_seconds >= metrics.engine_ttft_seconds > 0
    assert metrics.tpot_seconds is not None
    assert metrics.num_output_tokens == len(completion.token_ids) == 24
    assert completion.finish_reason == "length"


def test_prompt_forms_give_the_same_tokens_in_order(llm: LLM) -> None:
    ids = list(models.info("smollm2").prompt)
    alone = llm.generate(ids, GREEDY)[0].outputs[0].token_ids
    many = llm.generate([PROMPT, ids, "Once upon a time"], [GREEDY, GREEDY, SamplingParams(max_tokens=3, seed=1)])
    assert [o.outputs[0].token_ids == alone for o in many] == [True, True, False]
    assert len(many[2].outputs[0].token_ids) == 3
    assert llm.generate([], GREEDY) == []


def test_streamed_pieces_add_up_to_the_whole(llm: LLM) -> None:
    whole = llm.generate("List three animals: 🐈", GREEDY)[0].outputs[0]
    updates = list(llm.stream("List three animals: 🐈", GREEDY))
    assert "".join(u.delta_text for u in updates) == whole.text
    assert [t for u in updates for t in u.delta_token_ids] == whole.token_ids
    assert updates[-1].finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_the_output_and_never_leak(llm: LLM, include: bool) -> None:
    whole = llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    stop = whole[9:14]
    at = whole.index(stop)
    params = SamplingParams(
        temperature=0, max_tokens=24, stop=["never seen", stop], include_stop_str_in_output=include
    )
    updates = list(llm.stream(PROMPT, params))
    text = "".join(u.delta_text for u in updates)
    assert text == whole[: at + len(stop)] if include else text == whole[:at]
    completion = updates[-1].output.outputs[0]
    assert completion.finish_reason == "stop"
    assert completion.stop_reason == stop
    assert len(completion.token_ids) < 24
    assert blocks_are_free(llm)


def test_stop_filter_holds_back_every_possible_beginning() -> None:
    for stops in (["abc"], ["aab", "b!"], ["aaa"]):
        for text in ("aabaab!", "abab", "aaaa", "xaxbxcabc", "aabbb!"):
            for include in (False, True):
                filter_, shown = StopStringFilter(stops, include=include), ""
                for i, char in enumerate(text):
                    shown += filter_.push(char)
                    ends = {text[: i + 1].find(s) + len(s): s for s in stops if s in text[: i + 1]}
                    if ends:
                        first = min(ends)
                        assert shown == text[: first if include else first - len(ends[first])]
                        break
                    assert text.startswith(shown)
                else:
                    assert shown + filter_.flush() == text


def test_stop_token_ids_min_tokens_and_ignore_eos(llm: LLM) -> None:
    ids = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    stop = ids[3]
    first = ids.index(stop)
    completion = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[stop]))[0].outputs[
        0
    ]
    assert completion.token_ids == ids[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    longer = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[stop], min_tokens=8))
    assert len(longer[0].outputs[0].token_ids) > 8
    assert stop not in longer[0].outputs[0].token_ids[:8]
    chat = [{"role": "user", "content": "Say hi."}]
    ended = llm.chat(chat, SamplingParams(temperature=0, max_tokens=60))[0].outputs[0]
    assert ended.finish_reason == "stop"
    assert "<|im_end|>" not in ended.text
    ignoring = llm.chat(chat, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))[0].outputs[0]
    assert len(ignoring.token_ids) == 60
    assert ignoring.token_ids[: len(ended.token_ids)] == ended.token_ids


def test_n_outputs_differ_but_repeat_with_their_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    first, second = llm.generate("I like", params)[0], llm.generate(["Hello", "I like"], params)[1]
    texts = [o.text for o in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [o.text for o in second.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2]


def test_n_outputs_share_their_prompt_s_blocks_and_keep_their_tokens(llm: LLM) -> None:
    """Each equals the request with its own seed, alone, whose prompt is computed from scratch."""
    prompt = "Seven cities at the seaside, each with its harbour. " * 4
    params = SamplingParams(n=3, temperature=1.0, seed=9, max_tokens=10)
    counters = llm.assembly.engine.scheduler.counters
    before = counters.prefix_cache_hits
    together = llm.generate(prompt, params)[0]
    assert counters.prefix_cache_hits - before == 2 * ((len(together.prompt_token_ids) - 1) // 16 * 16)
    for index, output in enumerate(together.outputs):
        alone = replace(params_of_output(params, index), n=1, prompt_logprobs=0)  # for which nothing is shared
        assert llm.generate(prompt, alone)[0].outputs[0].token_ids == output.token_ids


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=4)
    completion = llm.generate(PROMPT, params)[0].outputs[0]
    assert completion.logprobs is not None
    assert [item.token_id for item in completion.logprobs] == completion.token_ids
    for item in completion.logprobs:
        assert len(item.top) == 4
        assert item.rank == 1
        assert item.top[0] == (item.token_id, item.logprob)


def test_bad_words_never_appear(llm: LLM) -> None:
    free = llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    assert "Paris" in free
    params = SamplingParams(temperature=0, max_tokens=24, bad_words=["Paris"])
    assert "Paris" not in llm.generate(PROMPT, params)[0].outputs[0].text


def test_prefix_cache_is_used_and_changes_nothing(llm: LLM) -> None:
    prompt = "A long shared beginning. " * 12
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert first.metrics.cached_tokens == 0
    assert second.metrics.cached_tokens >= 16
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_leaving_a_stream_aborts_the_request(llm: LLM) -> None:
    for update in llm.stream(PROMPT, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)):
        if len(update.output.outputs[0].token_ids) == 3:
            break
    assert blocks_are_free(llm)


def test_ctrl_c_ends_generate_at_once_and_the_engine_lives_on(llm: LLM) -> None:
    main, steps = threading.main_thread().ident, 0
    assert main is not None

    def on_step(record: dict[str, Any]) -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            signal.pthread_kill(main, signal.SIGINT)  # the thread that a terminal's Ctrl-C reaches

    llm.service.call(lambda engine: setattr(engine, "on_step", on_step))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 3, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    llm.service.call(lambda engine: setattr(engine, "on_step", None))
    assert steps < 200  # of 400
    assert blocks_are_free(llm)
    assert "Paris" in llm.generate(PROMPT, GREEDY)[0].outputs[0].text


def test_asyncio_requests_are_batched_and_cancelled(llm: LLM) -> None:
    async def scenario() -> None:
        engine = AsyncLLM.__new__(AsyncLLM)
        engine.llm = llm
        outputs = await asyncio.gather(*(engine.generate(PROMPT, GREEDY) for _ in range(4)))
        assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
        pieces = [u.delta_text async for u in engine.stream(PROMPT, GREEDY)]
        assert "".join(pieces) == outputs[0].outputs[0].text
        long = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True)))
        await asyncio.sleep(0)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        with pytest.raises(InvalidRequestError):
            await engine.generate("", GREEDY)

    asyncio.run(scenario())
    assert blocks_are_free(llm)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, 2, 49152], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([1.5], "token ids"),
        ([True], "token ids"),
        ("word " * 600, "context holds 512"),
        ("broken \udce9 text", "Unicode"),
    ],
)
def test_impossible_prompts_are_refused_in_one_line(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate([prompt], GREEDY)
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequestError, match="prompt 1: "):
        llm.generate([PROMPT, prompt], GREEDY)
    assert blocks_are_free(llm)


def test_a_prompt_larger_than_the_whole_cache_is_refused() -> None:
    with LLM(str(models.prepare("glassllm")), dtype="float32", kv_cache_bytes=64 * 2048, block_size=4) as llm:
        room = llm.assembly.max_model_len
        assert room == 64
        with pytest.raises(InvalidRequestError, match="whole KV cache holds 64"):
            llm.generate([5] * 64, GREEDY)
        completion = llm.generate([5] * 60, SamplingParams(temperature=0, ignore_eos=True))[0].outputs[0]
        assert (len(completion.token_ids), completion.finish_reason) == (4, "length")


def test_a_folder_without_a_tokenizer_takes_and_gives_ids(tiny: LLM) -> None:
    assert tiny.tokenizer is None
    completion = tiny.generate([1, 88, 500], SamplingParams(temperature=0, max_tokens=5, detokenize=False))[
        0
    ].outputs[0]
    assert len(completion.token_ids) == 5
    assert completion.text == ""
    for bad in (lambda: tiny.generate("text", GREEDY), lambda: tiny.chat([{"role": "user", "content": "x"}], GREEDY)):
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            bad()
    with pytest.raises(InvalidRequestError, match="need a tokenizer"):
        tiny.generate([1], SamplingParams(stop=["x"]))


def test_one_failing_request_leaves_the_others_alone(tiny: LLM) -> None:
    good = SamplingParams(temperature=0, max_tokens=6)
    bad = SamplingParams(temperature=0, max_tokens=6, allowed_token_ids=[7], bad_token_ids=[[7]])
    alone = tiny.generate([3, 4, 5], good)[0].outputs[0].token_ids
    outputs = tiny.generate([[3, 4, 5], [3, 4, 5], [3, 4, 5]], [good, bad, good])
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "error", "length"]
    assert outputs[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids == alone
    assert "no token may be sampled" in (outputs[1].outputs[0].error or "")


def test_a_step_that_raises_fails_its_requests_and_nothing_else(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.assembly.engine.executor.runner.model  # type: ignore[attr-defined]

    def broken(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", broken)
        output = tiny.generate([3, 4], GREEDY)[0].outputs[0]
        assert output.finish_reason == "error"
        assert "out of memory" in (output.error or "")
    assert tiny.generate([3, 4], GREEDY)[0].outputs[0].finish_reason in ("length", "stop")
    assert blocks_are_free(tiny)


def test_closing_ends_waiting_callers_and_refuses_new_work() -> None:
    llm = LLM(str(models.prepare("glassllm")), dtype="float32")
    stream = llm.stream([5, 6], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(ForetellError, match="closed"):
        list(stream)
    with pytest.raises(ForetellError, match="stopped"):
        llm.generate([5], GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": -1}, "block_size"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes"),
        ({"max_model_len": 10**6}, "beyond the model's context"),
        ({"policy": "best"}, "policy"),
        ({"load_format": "zip"}, "load_format"),
        ({"watermark": 2.0}, "watermark"),
        ({"kernels": "magic"}, "magic"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LLM(str(models.prepare("glassllm")), **options)
    assert "\n" not in str(caught.value)


def test_dummy_weights_run_from_a_bare_config(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ForetellError, match="dummy"):
        LLM(str(tmp_path))
    log = tmp_path / "steps.jsonl"
    with LLM(str(tmp_path), load_format="dummy", step_log=log) as llm:
        outputs = llm.generate([[1, 2, 3], [4, 5]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        assert [len(o.outputs[0].token_ids) for o in outputs] == [4, 4]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(r["tokens"] for r in records) == 5 + 2 * 3
    assert {c["phase"] for r in records for c in r["chunks"]} == {"prefill", "decode"}
    assert all(r["finished"] >= r["started"] for r in records)


def test_a_step_log_that_cannot_be_written_is_named_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step log .* cannot be written"):
        LLM(str(models.prepare("glassllm")), step_log=tmp_path / "missing" / "log.jsonl")


def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    with pytest.raises(ForetellError) as caught:
        LLM(str(tmp_path), step_log=log)  # no model there
    held = {os.path.realpath(entry) for entry in Path("/proc/self/fd").glob("*")}
    assert str(log.resolve()) not in held, caught.value


def test_a_step_log_on_a_full_disk_ends_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(str(models.prepare("glassllm")), dtype="float32", step_log="/dev/full") as llm:
        assert len(llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].token_ids) == 3
    assert "step log ends here" in capsys.readouterr().err
