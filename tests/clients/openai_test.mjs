// `mtad serve`, asked by OpenAI's own client for JavaScript. `run.sh` starts the servers and says where they are:
// MTAD_URL as it comes, MTAD_KEYED_URL with the key MTAD_KEY, MTAD_NARROW_URL with `--parallel 1 --queue 0`.

import assert from "node:assert/strict";
import { afterEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";

const { MTAD_URL, MTAD_KEYED_URL, MTAD_NARROW_URL, MTAD_KEY } = process.env;
const STORY = "Once upon a time there was a little dog.";
const messages = [{ role: "user", content: STORY }];
// A text that takes its time, whatever the machine: many beams, and what was not yet said is never said, so that it
// does not end before the context does.
const LONG = { max_tokens: 1500, presence_penalty: -100, strategy: "dsbd", gamma: 8, beam_width: 12 };

const clientOf = (url, apiKey = "none") =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0, timeout: 120_000 });
const client = clientOf(MTAD_URL);
const narrow = clientOf(MTAD_NARROW_URL);
const model = (await client.models.list()).data[0].id;

const chat = (options = {}, from = client, how = {}) =>
  from.chat.completions.create({ model, messages, max_tokens: 24, ...options }, how);
const complete = (options = {}, from = client, how = {}) =>
  from.completions.create({ model, prompt: STORY, max_tokens: 24, ...options }, how);

async function metric(url, name) {
  const text = await (await fetch(`${url}/metrics`)).text();
  const lines = text.split("\n").filter((line) => line.startsWith(`${name} `) || line.startsWith(`${name}{`));
  assert.ok(lines.length > 0, `${name} is not there`);
  return lines.map((line) => Number(line.split(" ").at(-1))).reduce((a, b) => a + b);
}

async function idle(url, seconds = 30) {
  const end = Date.now() + 1000 * seconds;
  while ((await metric(url, "mtad_running")) + (await metric(url, "mtad_waiting")) > 0) {
    assert.ok(Date.now() < end, `${url} still has something that runs`);
    await sleep(20);
  }
}

afterEach(() => Promise.all([idle(MTAD_URL), idle(MTAD_NARROW_URL)]));

test("a chat, a completion, and how they were decoded", async () => {
  const answer = await chat({ seed: 1, strategy: "speculative" });
  assert.equal(answer.object, "chat.completion");
  assert.ok(answer.choices[0].message.content.length > 0);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  assert.equal(answer.usage.mtad.strategy, "speculative");
  assert.deepEqual((await chat({ seed: 1, strategy: "speculative" })).choices, answer.choices);
  const completion = await complete({ seed: 1, tau: 0.3, n: 2, logprobs: 1 });
  assert.equal(completion.choices.length, 2);
  assert.ok(completion.choices[0].logprobs.token_logprobs.every((value) => value <= 0));
});

test("a stream joins to the whole", async () => {
  const asked = { seed: 5 };
  let [text, usage, ends] = ["", null, 0];
  for await (const chunk of await chat({ ...asked, stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta.content ?? "";
    ends += chunk.choices[0]?.finish_reason ? 1 : 0;
    usage = chunk.usage ?? usage;
  }
  const whole = await chat(asked);
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(ends, 1);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  let completion = "";
  for await (const chunk of await complete({ ...asked, stream: true })) completion += chunk.choices[0].text;
  assert.equal(completion, (await complete(asked)).choices[0].text);
});

test("the client's own reading of a stream", async () => {
  const stream = client.chat.completions.stream({ model, messages, max_tokens: 24, seed: 5 });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  assert.equal(await stream.finalContent(), text);
  assert.equal(text, (await chat({ seed: 5 })).choices[0].message.content);
});

test("eight streams at once are what each is alone", async () => {
  const read = async (seed) => {
    let text = "";
    for await (const chunk of await chat({ seed, stream: true })) text += chunk.choices[0]?.delta.content ?? "";
    return text;
  };
  const seeds = [...Array(8).keys()];
  const beside = await Promise.all(seeds.map(read));
  for (const seed of seeds) assert.equal(beside[seed], (await chat({ seed })).choices[0].message.content);
});

test("errors have their classes", async () => {
  await assert.rejects(chat({ temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(complete({ strategy: "fastest" }), { status: 400, param: "strategy" });
  await assert.rejects(complete({ prompt: "one ".repeat(20000) }), { status: 400, code: "context_length_exceeded" });
  await assert.rejects(client.models.retrieve("gpt-4o"), OpenAI.NotFoundError);
  await assert.rejects(client.embeddings.create({ model, input: "A dog" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "no_embeddings");
    return true;
  });
  await assert.rejects(clientOf(MTAD_KEYED_URL, "wrong").models.list(), OpenAI.AuthenticationError);
  assert.equal((await clientOf(MTAD_KEYED_URL, MTAD_KEY).models.list()).data[0].id, model);
});

test("a full queue says when to come back, and there is room once a stream was aborted", async () => {
  const stream = await complete({ ...LONG, stream: true }, narrow);
  const chunks = stream[Symbol.asyncIterator]();
  await chunks.next();
  await assert.rejects(complete({}, narrow), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.ok(Number(error.headers.get("retry-after")) >= 1);
    return true;
  });
  stream.controller.abort();
  await idle(MTAD_NARROW_URL, 5);
  assert.ok((await complete({ max_tokens: 3 }, narrow)).choices.length);
});

test("an AbortController ends a stream and a whole answer", async () => {
  for (const stream of [true, false]) {
    const controller = new AbortController();
    const answer = (async () => {
      const answer = await chat({ ...LONG, stream }, client, { signal: controller.signal });
      if (stream) for await (const _ of answer);
    })();
    while ((await metric(MTAD_URL, "mtad_running")) === 0) await sleep(20);
    controller.abort();
    // (A stream that is aborted just ends, as this client has it.)
    if (stream) await answer.catch(() => {});
    else await assert.rejects(answer, OpenAI.APIUserAbortError);
    await idle(MTAD_URL, 5);
  }
});

test("JSON of a schema", async (t) => {
  const schema = {
    type: "object",
    properties: { age: { type: "integer", minimum: 1, maximum: 15 } },
    required: ["age"],
    additionalProperties: false,
  };
  const asked = { max_tokens: 60, response_format: { type: "json_schema", json_schema: { name: "dog", schema } } };
  try {
    const { age } = JSON.parse((await chat(asked)).choices[0].message.content);
    assert.ok(Number.isInteger(age) && age >= 1 && age <= 15);
  } catch (error) {
    if (error.param !== "response_format" || !error.message.includes("not supported")) throw error;
    t.skip(`the server does not have it: ${error.message}`);
  }
});
