// A server with the interface of `mtad serve` and no model: what it writes follows from the last
// line of the request, so that a test can ask for errors, slowness or odd text.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { join } from "node:path";

// Scripts are compiled; the rest is as it is written.
const folderOf = (name) =>
  new URL(name.endsWith(".js") ? "../../src/serve/page/" : "../../web/page/", import.meta.url).pathname;
const TYPES = {
  html: "text/html; charset=utf-8",
  css: "text/css; charset=utf-8",
  js: "text/javascript; charset=utf-8",
  svg: "image/svg+xml",
};

const STRATEGIES = [
  ["greedy", "the most probable token of the target, one at a time", false, []],
  ["sample", "draws from the target, one token at a time", false, []],
  ["speculative", "speculative sampling: the distribution of the target, exactly", true, ["gamma"]],
  ["mtad", "multi-token joint decoding: blocks whose joint likelihood ratio clears tau", true, ["tau", "gamma", "beam_width", "with_replacement"]],
  ["mmtad", "multi-token joint decoding with all beams verified, as a tree", true, ["tau", "gamma", "beam_width", "with_replacement"]],
  ["specinfer", "lossless speculation on a tree of candidates", true, ["branching", "with_replacement"]],
  ["bild", "the draft goes on while it is sure; the target takes back what it finds too unlikely", true, ["gamma", "fallback", "rollback"]],
  ["auto", "whichever of plain, speculative, mtad and mmtad is the fastest here at tau", true, ["tau"]],
].map(([name, summary, needs_draft, knobs]) => ({ name, summary, needs_draft, knobs }));

const STORY =
  "Once upon a time there was a little lighthouse at the end of a long, grey pier. Every evening its keeper, " +
  "a woman called Mara, climbed the ninety-two steps and lit the lamp. Nobody had asked her to count the steps, " +
  "but she counted them all the same, because a number that comes out right is a small comfort.\n\n" +
  "One night the sum was ninety-three. She went down and counted again: ninety-two. \"So one of us is wrong,\" " +
  "she told the stairs, and she sat down on the lowest step to think about which one it was. The sea went on as " +
  "before. A ship's horn sounded twice, far out, and then the fog closed over it.";

const CODE =
  "A binary search halves the range at each step:\n\n```rust\nfn find(sorted: &[i32], wanted: i32) -> Option<usize> {\n" +
  "    let (mut low, mut high) = (0, sorted.len());\n    while low < high {\n        let middle = low + (high - low) / 2;\n" +
  "        match sorted[middle].cmp(&wanted) {\n            Ordering::Equal => return Some(middle),\n" +
  "            Ordering::Less => low = middle + 1,\n            Ordering::Greater => high = middle,\n        }\n    }\n    None\n}\n```\n\n" +
  "It looks at about log2(n) entries, so a million of them take twenty looks.";

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// A small generator, so that a seed gives the same figures again.
function random(seed) {
  let state = (seed >>> 0) || 1;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** What to write for a prompt, and how. */
function plan(prompt) {
  const said = prompt.trim();
  if (said.startsWith("say:")) return { text: said.slice(4), wait: 5 };
  if (/\bcode\b/.test(said)) return { text: CODE, wait: 12 };
  if (/\bslow\b/.test(said)) return { text: STORY, wait: 120 };
  if (/\blong\b/.test(said)) return { text: Array(40).fill(STORY).join("\n\n"), wait: 0 };
  if (/\bjson\b/.test(said)) return { text: '{"name": "Mara", "steps": 92}', wait: 12, forced: true };
  return { text: STORY, wait: 12 };
}

/**
 * Starts a server on a free port of the loopback.
 * @param {{key?: string, template?: boolean, port?: number, meter?: boolean}} options
 */
export async function start({ key, template = true, port = 0, meter = true } = {}) {
  /** Bodies of the requests for text, and how many were broken off by the client. */
  const seen = { requests: [], aborted: 0 };
  let refusals = 0;

  const server = createServer(async (request, response) => {
    const refuse = (status, message, code, headers = {}) => {
      response.writeHead(status, { "content-type": "application/json", ...headers });
      response.end(JSON.stringify({ error: { message, type: "invalid_request_error", code, param: null } }));
    };
    const path = new URL(request.url, "http://mock").pathname;
    if (request.method === "GET" && !path.startsWith("/v1/")) {
      const name = path === "/" ? "index.html" : path.slice(1);
      const type = TYPES[name.split(".").pop()];
      try {
        if (!type || name.includes("/")) throw new Error("no such file");
        const body = await readFile(join(folderOf(name), name));
        response.writeHead(200, { "content-type": type, "content-security-policy": "default-src 'self'" });
        response.end(body);
      } catch {
        refuse(404, `There is nothing at ${path}`, "not_found");
      }
      return;
    }
    if (key && request.headers.authorization !== `Bearer ${key}`) {
      return refuse(401, "This server wants an API key", "invalid_api_key");
    }
    if (path === "/v1/models") {
      response.writeHead(200, { "content-type": "application/json" });
      const mtad = { draft: "llama-68m.Q8_0", strategies: STRATEGIES, context: 2048 };
      return response.end(JSON.stringify({
        object: "list",
        data: [{ id: "llama-2-13b.Q4_K_M", object: "model", created: 0, owned_by: "mtad", mtad }],
      }));
    }
    const chat = path === "/v1/chat/completions";
    if (!chat && path !== "/v1/completions") return refuse(404, `There is nothing at ${path}`, "not_found");

    let raw = "";
    for await (const part of request) raw += part;
    const body = JSON.parse(raw);
    seen.requests.push({ path, body });
    if (chat && !template) return refuse(400, "The model has no chat template", "no_chat_template");
    const prompt = chat ? body.messages.at(-1).content : body.prompt;
    if (/\bfail\b/.test(prompt)) return refuse(500, "a pass of the target failed: out of memory", "internal");
    if (/\bbusy\b/.test(prompt) && refusals++ === 0) {
      return refuse(429, "All sequences are taken", "busy", { "retry-after": "2" });
    }

    response.on("close", () => {
      if (!response.writableFinished) seen.aborted += 1;
    });
    response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
    const { text, wait, forced } = plan(prompt);
    const dice = random(body.seed ?? 0);
    const frame = { id: "x", object: chat ? "chat.completion.chunk" : "text_completion", created: 0, model: body.model };
    const send = (content, tokens, finish_reason = null) => {
      const choice = chat ? { index: 0, delta: { content }, finish_reason } : { index: 0, text: content, finish_reason };
      const mtad = body.mtad_tokens ? { mtad: { tokens } } : {};
      response.write(`data: ${JSON.stringify({ ...frame, choices: [choice], ...mtad })}\n\n`);
    };
    const pieces = text.match(/```|\n|[^\S\n]*[^\s`]{1,7}|[^\S\n]+|`/g) ?? [];
    const gamma = body.gamma ?? 4;
    const began = performance.now();
    let at = 0;
    let [rounds, drafted, accepted] = [0, 0, 0];
    const most = Math.min(pieces.length, body.max_tokens ?? pieces.length);
    while (at < most && !response.destroyed) {
      let run = 0;
      if (!["sample", "greedy"].includes(body.strategy)) {
        const keep = { speculative: 0.62, mtad: 0.9, mmtad: 0.93 }[body.strategy] ?? 0.75;
        while (run < gamma && dice() < keep) run += 1;
        drafted += gamma;
        accepted += run;
      }
      const block = pieces.slice(at, Math.min(at + run + 1, most));
      const joint = Math.log(0.12 + 1.6 * dice());
      const tokens = block.map((piece, n) => ({
        id: 200 + ((at + n) * 7919) % 31000,
        text: piece,
        origin: forced && /[{}":,]/.test(piece) ? "forced" : n < run ? "draft" : "target",
        log_prob: body.logprobs ? -3 * dice() ** 3 : null,
        log_ratio: n < run ? joint : null,
      }));
      send(block.join(""), tokens);
      at += block.length;
      rounds += 1;
      if (/\bbreak off\b/.test(prompt) && rounds === 4) return response.end();
      await pause(wait);
    }
    send("", [], at < pieces.length ? "length" : "stop");
    const seconds = (performance.now() - began) / 1000;
    response.write(`data: ${JSON.stringify({
      ...frame,
      choices: [],
      usage: {
        prompt_tokens: 12,
        completion_tokens: at,
        total_tokens: 12 + at,
        mtad: {
          strategy: body.strategy ?? "mtad", rounds, drafted, accepted,
          block_efficiency: at / rounds, tokens_per_second: at / seconds,
          joules: meter ? at * 0.31 : null,
        },
      },
    })}\n\ndata: [DONE]\n\n`);
    response.end();
  });
  await new Promise((done) => server.listen(port, "127.0.0.1", done));
  return {
    url: `http://127.0.0.1:${server.address().port}/`,
    seen,
    stop: () => new Promise((done) => {
      server.close(done);
      server.closeAllConnections();
    }),
  };
}

// `node tests/web/mock.mjs 8123` serves the page by hand; with `plain` behind it, of a model that cannot chat.
if (process.argv[1] === new URL(import.meta.url).pathname) {
  const [port = "8123", plain] = process.argv.slice(2);
  const { url } = await start({ port: Number(port), template: plain === undefined });
  console.log(url);
}
