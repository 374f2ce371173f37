"""`mtad serve`, asked by OpenAI's own client for Python. `run.sh` starts the servers and says where they are:

MTAD_URL         a server as it comes
MTAD_KEYED_URL   one that asks for the key MTAD_KEY
MTAD_NARROW_URL  one with `--parallel 1 --queue 0`
"""

import asyncio
import json
import os
import re
import time
import urllib.request

import jsonschema
import openai
import pytest

URL, KEYED, NARROW = (os.environ[name].rstrip("/") for name in ("MTAD_URL", "MTAD_KEYED_URL", "MTAD_NARROW_URL"))
KEY = os.environ["MTAD_KEY"]
STORY = "Once upon a time there was a little dog."
SAID = [{"role": "user", "content": STORY}]
# A text that takes its time, whatever the machine: many beams, and what was not yet said is never said, so that it
# does not end before the context does.
LONG = {
    "max_tokens": 1500,
    "presence_penalty": -100,
    "extra_body": {"strategy": "dsbd", "gamma": 8, "beam_width": 12},
}


def client_of(url, key="none", **options):
    # Without retries, as what is tested is the first answer.
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120, **options)


client = client_of(URL)
narrow = client_of(NARROW)
MODEL = client.models.list().data[0].id


def complete(prompt=STORY, client=client, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 24, **options})


def chat(messages=SAID, client=client, **options):
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 24, **options})


def metric(url, name):
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()
    lines = [line for line in text.splitlines() if re.match(rf"{name}[ {{]", line)]
    assert lines, f"{name} is not in {text}"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def post(path, body):
    """What the client has no method for."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def wait_for(what, done, seconds=30):
    begun = time.monotonic()
    while not done():
        assert time.monotonic() - begun < seconds, f"waited in vain: {what}"
        time.sleep(0.02)


def is_idle(url):
    return metric(url, "mtad_running") == 0 and metric(url, "mtad_waiting") == 0


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    for url in (URL, NARROW):
        wait_for(f"{url} to have nothing that runs", lambda: is_idle(url))


# What is answered.


def test_models():
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert model.object == "model" and model.owned_by == "mtad"
    pair = model.model_extra["mtad"]
    assert {"greedy", "sample", "speculative", "mtad"} <= {strategy["name"] for strategy in pair["strategies"]}
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"


def test_chat():
    answer = chat(seed=1)
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    # The newer name means the same.
    assert chat(seed=1, max_tokens=None, max_completion_tokens=24).choices[0].message.content == choice.message.content


def test_chat_takes_turns_and_parts():
    turns = [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": [{"type": "text", "text": "Once upon"}, {"type": "text", "text": " a time"}]},
        {"role": "assistant", "content": "there was a dog."},
        {"role": "user", "content": "And then?"},
    ]
    assert chat(turns).choices[0].message.content


def test_completion():
    answer = complete(seed=3)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].text and answer.usage.completion_tokens <= 24
    echoed = complete(seed=3, echo=True)
    assert echoed.choices[0].text == STORY + answer.choices[0].text


def test_prompts_are_texts_or_tokens_or_several():
    both = complete(["A dog", "A cat"], temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert [choice.text for choice in both.choices] == [
        complete(prompt, temperature=0).choices[0].text for prompt in ("A dog", "A cat")
    ]
    tokens = post("/tokenize", {"content": "A dog", "add_special": True})["tokens"]
    assert complete(tokens, temperature=0).choices[0].text == both.choices[0].text
    assert post("/detokenize", {"tokens": tokens})["content"].strip() == "A dog"


@pytest.mark.parametrize("include_usage", [True, False])
def test_chat_as_a_stream(include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(chat(seed=5, stream=True, **options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    whole = chat(seed=5)
    assert text == whole.choices[0].message.content
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    if include_usage:
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert chunks[-1].usage.model_extra["mtad"]["strategy"] == "mtad"
        assert all(chunk.usage is None for chunk in chunks[:-1])
    else:
        assert all(chunk.usage is None for chunk in chunks)


def test_completion_as_a_stream_of_several():
    asked = {"n": 3, "seed": 5, "max_tokens": 20}
    texts = {}
    for chunk in complete(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in complete(**asked).choices}


def test_the_clients_own_reading_of_a_stream():
    # (This one takes a text that was cut by its length for an error.)
    asked = {"model": MODEL, "messages": SAID, "max_tokens": 200, "seed": 5, "stop": "."}
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == client.chat.completions.create(**asked).choices[0].message.content


def test_logprobs_of_a_chat():
    answer = chat(seed=2, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0 and bytes(entry.bytes).decode(errors="replace") == entry.token
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert answer.choices[0].message.content in text
    # At temperature 0 a token is the first of its alternatives.
    for entry in chat(temperature=0, logprobs=True, top_logprobs=1).choices[0].logprobs.content:
        assert entry.top_logprobs[0].token == entry.token
    streamed = [
        entry.token
        for chunk in chat(seed=2, logprobs=True, top_logprobs=3, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert streamed == [entry.token for entry in entries]
    assert chat(seed=2).choices[0].logprobs is None


def test_logprobs_of_a_completion():
    choice = complete(seed=2, logprobs=2).choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(len(top) <= 2 for top in told.top_logprobs) and all(value <= 0 for value in told.token_logprobs)
    for offset, token in zip(told.text_offset, told.tokens):
        assert choice.text[offset:].startswith(token) or "\ufffd" in token or offset == len(choice.text)


def test_stop_ends_a_text_and_is_not_part_of_it():
    whole = complete(seed=4, max_tokens=60).choices[0].text
    stop = whole.split(" ")[6]
    answer = complete(seed=4, max_tokens=60, stop=[stop, "nothing like this"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(stop)]
    streamed = complete(seed=4, max_tokens=60, stop=stop, stream=True)
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == answer.choices[0].text


def test_the_same_seed_gives_the_same_text():
    texts = [chat(seed=seed, temperature=1).choices[0].message.content for seed in (11, 11, 12)]
    assert texts[0] == texts[1] != texts[2]
    # Without one texts differ.
    assert len({complete().choices[0].text for _ in range(4)}) > 1


def test_n_answers():
    answer = chat(n=3, seed=20)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    # Each has a seed of its own, one after the other.
    alone = [chat(seed=20 + i).choices[0].message.content for i in range(3)]
    assert [choice.message.content for choice in answer.choices] == alone
    assert answer.usage.prompt_tokens == chat().usage.prompt_tokens


def test_requests_choose_how_they_are_decoded():
    passes = {}
    for strategy in ("greedy", "sample", "speculative", "mtad", "mmtad"):
        usage = complete(seed=1, temperature=0, extra_body={"strategy": strategy}).usage
        told = usage.model_extra["mtad"]
        assert told["strategy"] == strategy
        assert 0 <= told["accepted"] <= told["drafted"]
        assert (told["drafted"] == 0) == (strategy in ("greedy", "sample"))
        passes[strategy] = told["block_efficiency"]
    assert passes["sample"] <= 1.0 < passes["mtad"]
    rounds = {}
    for tau in (0.0, 100.0):
        body = {"strategy": "mtad", "tau": tau, "gamma": 3, "beam_width": 2}
        rounds[tau] = complete(seed=1, extra_body=body).usage.model_extra["mtad"]["rounds"]
    assert rounds[0.0] < rounds[100.0]


def test_greedy_texts_do_not_depend_on_the_strategy():
    texts = {
        complete(temperature=0, extra_body={"strategy": strategy}).choices[0].text
        for strategy in ("greedy", "speculative", "mtad", "mmtad")
    }
    assert len(texts) == 1


def test_who_wrote_each_token():
    chunks = list(complete(seed=1, stream=True, extra_body={"mtad_tokens": True}))
    tokens = [token for chunk in chunks for token in (chunk.model_extra.get("mtad") or {}).get("tokens", [])]
    assert {token["origin"] for token in tokens} <= {"draft", "target", "forced"} and len(tokens) > 5
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices).startswith(tokens[0]["text"])


# What is refused.


@pytest.mark.parametrize(
    "param, options",
    [
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 1.5}),
        ("n", {"n": 0}),
        ("n", {"n": 100000}),
        ("max_tokens", {"max_tokens": 0}),
        ("stop", {"stop": [""]}),
        ("logit_bias", {"logit_bias": {"5": 100}}),
        ("strategy", {"extra_body": {"strategy": "fastest"}}),
        ("tau", {"extra_body": {"tau": -0.5}}),
        ("gamma", {"extra_body": {"gamma": 0}}),
        ("beam_width", {"extra_body": {"beam_width": 0}}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
    ],
)
@pytest.mark.parametrize("ask", [complete, chat])
def test_what_cannot_be_meant(ask, param, options):
    with pytest.raises(openai.BadRequestError) as error:
        ask(**options)
    assert error.value.param == param and error.value.type == "invalid_request_error"
    assert param in error.value.message


def test_what_only_one_of_both_has():
    for param, ask in [
        ("messages", lambda: chat([])),
        ("messages", lambda: chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
        ("top_logprobs", lambda: chat(top_logprobs=3)),
        ("top_logprobs", lambda: chat(logprobs=True, top_logprobs=21)),
        ("prompt", lambda: complete([])),
        ("prompt", lambda: complete([[4_000_000]])),
        ("logprobs", lambda: complete(logprobs=21)),
        ("suffix", lambda: complete(suffix="the end")),
        ("best_of", lambda: complete(best_of=3)),
    ]:
        with pytest.raises(openai.BadRequestError) as error:
            ask()
        assert error.value.param == param, error.value


def test_a_prompt_longer_than_the_context():
    with pytest.raises(openai.BadRequestError) as error:
        complete("one " * 20000)
    assert error.value.code == "context_length_exceeded" and error.value.param == "prompt"


def test_embeddings_are_not_there_and_why():
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model=MODEL, input="A dog")
    assert error.value.code == "no_embeddings" and "embed" in error.value.message


def test_what_the_interface_lacks():
    with pytest.raises(openai.NotFoundError):
        client.moderations.create(input="A dog")


def test_keys():
    assert client_of(KEYED, KEY).models.list().data
    for wrong in ("wrong", KEY[:-1], KEY + "x"):
        with pytest.raises(openai.AuthenticationError) as error:
            complete(client=client_of(KEYED, wrong))
        assert error.value.code == "invalid_api_key" and error.value.status_code == 401


def test_a_full_queue_says_when_to_come_back():
    stream = complete(client=narrow, stream=True, **LONG)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as error:
        complete(client=narrow)
    assert error.value.code == "queue_full"
    assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
    # A client that waits is answered.
    begun = time.monotonic()
    patient = narrow.with_options(max_retries=20)
    stream.close()
    assert complete(client=patient, max_tokens=3).choices[0].text
    assert time.monotonic() - begun < 60


# Who goes away.


def test_a_stream_that_is_closed_ends():
    for ask in (complete, chat):
        before = metric(URL, "mtad_requests_total")
        stream = ask(stream=True, **LONG)
        chunks = iter(stream)
        for _ in range(3):
            next(chunks)
        assert metric(URL, "mtad_running") == 1
        stream.close()
        begun = time.monotonic()
        wait_for("the sequence", lambda: is_idle(URL), seconds=5)
        assert time.monotonic() - begun < 5
        assert metric(URL, "mtad_requests_total") > before


def test_a_client_whose_time_is_up_frees_its_sequence():
    impatient = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        complete(client=impatient, **LONG)
    wait_for("the sequence", lambda: is_idle(URL), seconds=5)


def test_many_at_once():
    async def one(client, seed):
        stream = await client.chat.completions.create(
            model=MODEL, messages=SAID, max_tokens=40, seed=seed, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        return text, usage.completion_tokens

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(8)))

    beside = asyncio.run(all_of_them())
    for seed, (text, tokens) in enumerate(beside):
        alone = chat(seed=seed, max_tokens=40)
        # What runs beside a request changes nothing of its answer.
        assert (text, tokens) == (alone.choices[0].message.content, alone.usage.completion_tokens)


def test_tasks_that_are_cancelled():
    async def cancelled():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120) as client:

            async def read():
                stream = await client.completions.create(model=MODEL, prompt=STORY, stream=True, **LONG)
                async for _ in stream:
                    pass

            tasks = [asyncio.create_task(read()) for _ in range(6)]
            while metric(URL, "mtad_running") < 4:
                await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    ended = asyncio.run(cancelled())
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended
    wait_for("all sequences", lambda: is_idle(URL), seconds=10)


# Texts of a given form.

# Their tokens: a small model may write much white space between what it has to.
FORM = 400
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 15},
        "colour": {"enum": ["brown", "white"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "dog", "schema": SCHEMA, "strict": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a dog up",
            "parameters": {
                "type": "object",
                "properties": {"kind": {"enum": ["small", "large"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["kind", "count"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "say",
            "parameters": {
                "type": "object",
                "properties": {"word": {"enum": ["yes", "no"]}},
                "required": ["word"],
                "additionalProperties": False,
            },
        },
    },
]


def or_skip(ask, param, **options):
    """The answer; a server that has not what `param` asks for is skipped."""
    try:
        return ask(**options)
    except openai.BadRequestError as error:
        refused = "not supported" in error.message or "here" in error.message
        if error.param == param and refused:
            pytest.skip(f"the server does not have it: {error.message}")
        raise


@pytest.mark.parametrize("strategy", ["mtad", "speculative", "sample", "greedy"])
@pytest.mark.parametrize("seed", [1, 2])
def test_json_of_a_schema(strategy, seed):
    body = {"strategy": strategy}
    answer = or_skip(
        chat, "response_format", response_format=NAMED_SCHEMA, max_tokens=FORM, seed=seed, extra_body=body
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_json_of_a_schema_as_a_stream_and_as_a_completion():
    asked = {"response_format": NAMED_SCHEMA, "max_tokens": FORM, "seed": 3}
    whole = or_skip(chat, "response_format", **asked)
    text = "".join(choice.delta.content or "" for chunk in chat(stream=True, **asked) for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    completed = complete(max_tokens=FORM, extra_body={"response_format": NAMED_SCHEMA})
    jsonschema.validate(json.loads(completed.choices[0].text), SCHEMA)


def test_the_clients_own_models_of_answers():
    import pydantic

    class Dog(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        age: int = pydantic.Field(ge=1, le=15)

    def parse(**options):
        return client.chat.completions.parse(model=MODEL, messages=SAID, response_format=Dog, max_tokens=FORM, **options)

    dog = or_skip(parse, "response_format", seed=1).choices[0].message.parsed
    assert isinstance(dog, Dog) and 1 <= dog.age <= 15


def test_a_schema_that_is_none():
    or_skip(chat, "response_format", response_format=NAMED_SCHEMA, max_tokens=FORM)
    for schema in ({"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}):
        wrong = {"type": "json_schema", "json_schema": {"name": "wrong", "schema": schema}}
        with pytest.raises(openai.BadRequestError) as error:
            chat(response_format=wrong)
        assert error.value.param == "response_format", error.value


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_json_of_any_form(seed):
    asked = {"response_format": {"type": "json_object"}, "max_tokens": 200, "temperature": 0.7, "seed": seed}
    answer = or_skip(chat, "response_format", **asked)
    choice = answer.choices[0]
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    "grammar",
    ['root ::= " " ("yes" | "no") ", " [a-z]{3,8} "."', 'start: " " ("yes" | "no") ", " /[a-z]{3,8}/ "."'],
    ids=["gbnf", "lark"],
)
def test_text_of_a_grammar(grammar):
    for seed in range(3):
        answer = or_skip(complete, "grammar", seed=seed, max_tokens=60, extra_body={"grammar": grammar})
        assert re.fullmatch(r" (yes|no), [a-z]{3,8}\.", answer.choices[0].text), answer
        assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError) as error:
        complete(extra_body={"grammar": "root ::= ("})
    assert error.value.param == "grammar"


def test_text_that_matches_as_a_whole():
    # A server that does not know `regex` leaves it alone, as it leaves all that it does not know.
    try:
        complete(max_tokens=1, extra_body={"regex": "("})
        pytest.skip("the server does not have it: a regex that is none was not refused")
    except openai.BadRequestError as error:
        assert error.param == "regex"
        if "not supported" in error.message:
            pytest.skip(f"the server does not have it: {error.message}")
    for seed in range(3):
        answer = complete(seed=seed, max_tokens=60, extra_body={"regex": r" (Lily|Mia)\. She was [a-z]+\."})
        assert re.fullmatch(r" (Lily|Mia)\. She was [a-z]+\.", answer.choices[0].text), answer


def test_a_form_is_kept_beside_others():
    or_skip(chat, "response_format", response_format=NAMED_SCHEMA, max_tokens=FORM)

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=MODEL,
                        messages=SAID,
                        max_tokens=FORM,
                        seed=seed,
                        **({"response_format": NAMED_SCHEMA} if seed % 2 else {}),
                    )
                    for seed in range(12)
                )
            )

    for seed, answer in enumerate(asyncio.run(all_of_them())):
        if seed % 2:
            jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


# Calls of functions.


def check_call(call):
    [tool] = [tool["function"] for tool in TOOLS if tool["function"]["name"] == call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), tool["parameters"])
    assert call.type == "function" and call.id.startswith("call_")


def test_tools_that_may_be_called():
    answer = chat(tools=TOOLS, seed=1)
    choice = answer.choices[0]
    assert choice.message.content or choice.message.tool_calls
    for call in choice.message.tool_calls or []:
        check_call(call)
    # Those that may not be called are not.
    none = chat(tools=TOOLS, tool_choice="none", seed=1).choices[0]
    assert not none.message.tool_calls and none.finish_reason != "tool_calls"
    for wrong in ([{"type": "function"}], [{"type": "magic", "function": {"name": "a"}}]):
        with pytest.raises(openai.BadRequestError) as error:
            chat(tools=wrong)
        assert error.value.param == "tools"


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}], ids=["any", "one"])
def test_a_call_that_is_made_sure_of(choice, seed):
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": FORM, "seed": seed}
    answer = or_skip(chat, "tool_choice", **asked).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
    for call in answer.message.tool_calls:
        check_call(call)
        if choice != "required":
            assert call.function.name == "look_up"
    # As a stream: the parts of each call joined.
    calls = {}
    for chunk in chat(stream=True, **asked):
        for part in (part for choice in chunk.choices for part in choice.delta.tool_calls or []):
            name, arguments = calls.get(part.index, ("", ""))
            calls[part.index] = (name + (part.function.name or ""), arguments + (part.function.arguments or ""))
    whole = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]
    assert [calls[index] for index in sorted(calls)] == whole


def test_what_a_call_gave_is_part_of_the_conversation():
    asked = {"tools": TOOLS, "tool_choice": "required", "max_tokens": FORM, "seed": 1}
    message = or_skip(chat, "tool_choice", **asked).choices[0].message
    given = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "Three dogs."}
    assert chat([*SAID, message.model_dump(exclude_none=True), given], tools=TOOLS, tool_choice="none").choices
