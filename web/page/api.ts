// What the server is asked, and what it answers.

export interface Strategy {
  name: string;
  summary: string;
  needs_draft: boolean;
  knobs: string[];
}

export interface Model {
  id: string;
  mtad?: {
    draft?: string | null;
    strategies?: Strategy[];
    context?: number;
    /** False where the model is known to have no chat template. */
    chat?: boolean;
  };
}

export type Origin = "draft" | "target" | "forced";

export interface Token {
  id: number;
  text: string;
  origin: Origin;
  log_prob: number | null;
  log_ratio: number | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  total_tokens: number;
  mtad?: {
    strategy: string;
    rounds: number;
    drafted: number;
    accepted: number;
    block_efficiency: number;
    tokens_per_second: number;
    joules: number | null;
  };
}

export type Mode = "chat" | "complete";

export interface Message {
  role: "system" | "user" | "assistant";
  content: string;
}

/** One event of a stream. */
export interface Chunk {
  content: string;
  tokens: Token[] | null;
  finish: string | null;
  usage: Usage | null;
}

interface ErrorBody {
  message?: string;
  code?: string | null;
}

/** The server refused, or could not be reached, or broke off. */
export class ServerError extends Error {
  constructor(
    message: string,
    readonly status = 0,
    readonly code: string | null = null,
    readonly retryAfter: number | null = null,
  ) {
    super(message);
  }

  /** What went wrong, as a sentence for people. */
  get sentence(): string {
    const said = sentence(this.message);
    switch (this.status) {
      case 0:
        return said;
      case 401:
      case 403:
        return `The server wants an API key. ${said}`;
      case 404:
        return `The server does not know what was asked. ${said}`;
      case 429: {
        const wait = this.retryAfter;
        const when = wait === null ? "shortly" : `in ${wait} ${wait === 1 ? "second" : "seconds"}`;
        return `The server is busy; try again ${when}. ${said}`;
      }
      default:
        return this.status >= 500
          ? `The server failed. ${said}`
          : `The server refused the request. ${said}`;
    }
  }
}

export function sentence(text: string): string {
  const trimmed = text.trim();
  if (trimmed === "") return "It did not say why.";
  const first = trimmed.charAt(0).toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

const KEY = "mtad.key";

/** The API key is kept for this tab alone; by a browser that keeps nothing, until a reload. */
let heldKey: string | null = null;
try {
  heldKey = sessionStorage.getItem(KEY);
} catch {
  // Then it is asked for.
}

export function setKey(value: string): void {
  heldKey = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // It is held above.
  }
}

/** Asks the user for a key; whether there is one now. Set by the page. */
let askForKey: (refused: boolean) => Promise<boolean> = async () => false;
let asking: Promise<boolean> | null = null;

export function onKeyWanted(ask: (refused: boolean) => Promise<boolean>): void {
  askForKey = ask;
}

async function send(path: string, init: RequestInit): Promise<Response> {
  for (;;) {
    const used = heldKey;
    const headers = new Headers(init.headers);
    if (used) headers.set("Authorization", `Bearer ${used}`);
    let response: Response;
    try {
      response = await fetch(new URL(path, document.baseURI), { ...init, headers });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new ServerError("The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    const problem = await refusal(response);
    if (response.status !== 401) throw problem;
    // Two answers that run side by side ask once. Where another one got a new key, that is tried.
    if (heldKey === used) {
      asking ??= askForKey(used !== null).finally(() => (asking = null));
      if (!(await asking)) throw problem;
    }
    init.signal?.throwIfAborted();
  }
}

async function refusal(response: Response): Promise<ServerError> {
  let body: ErrorBody = {};
  try {
    body = ((await response.json()) as { error?: ErrorBody }).error ?? {};
  } catch {
    // Something between here and the server may answer with no JSON.
  }
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ServerError(
    body.message ?? response.statusText,
    response.status,
    body.code ?? null,
    Number.isFinite(wait) ? wait : null,
  );
}

export async function models(): Promise<Model[]> {
  const response = await send("v1/models", {});
  return ((await response.json()) as { data: Model[] }).data;
}

interface Event {
  choices?: { delta?: { content?: string | null }; text?: string; finish_reason?: string | null }[];
  mtad?: { tokens?: Token[] };
  usage?: Usage | null;
  error?: ErrorBody;
}

/** The events of an answer, as they come. Ends with an error unless the server said that it is done. */
export async function* stream(
  mode: Mode,
  request: object,
  signal: AbortSignal,
): AsyncGenerator<Chunk> {
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  for await (const data of dataOf(response, signal)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data) as Event;
    if (event.error) {
      throw new ServerError(event.error.message ?? "", 500, event.error.code ?? null);
    }
    const choice = event.choices?.[0];
    yield {
      content: choice?.delta?.content ?? choice?.text ?? "",
      tokens: event.mtad?.tokens ?? null,
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
  throw new ServerError("The answer broke off: the connection to the server was lost.");
}

/** The data of server-sent events, one string each. */
async function* dataOf(response: Response, signal: AbortSignal): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data: string[] = [];
  try {
    for (;;) {
      let part: ReadableStreamReadResult<string>;
      try {
        part = await reader.read();
      } catch (error) {
        if (signal.aborted) throw error;
        return;
      }
      if (part.done) return;
      const lines = (rest + part.value).split(/\r?\n/);
      rest = lines.pop()!;
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
        else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // The server frees the sequence when the connection closes.
    await reader.cancel().catch(() => undefined);
  }
}
