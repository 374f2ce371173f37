// One answer: its text as it comes, and what it cost.

import { ServerError } from "./api.js";
import type { Chunk, Usage } from "./api.js";
import { make, nextFrame } from "./dom.js";
import { Painter, pieces } from "./tokens.js";
import type { Pass } from "./tokens.js";

export type State = "writing" | "done" | "stopped" | "failed";

/** Figures in the middle of an answer change this often, to be readable. */
const FIGURES_EVERY_MS = 250;
/** The passes that the strip has room for. */
const STRIP_PASSES = 120;
const BAR = { width: 3, gap: 1, token: 4, highest: 36 };

const SVG = "http://www.w3.org/2000/svg";

export class Answer {
  readonly element: HTMLElement;
  /** The text so far, exactly as the server sent it. */
  text = "";
  state: State = "writing";
  /** Why it ended, in the server's word. */
  finish: string | null = null;
  readonly actions = make("div", { class: "actions" });

  private readonly painter: Painter;
  private readonly body: HTMLElement;
  private readonly note = make("div", { class: "note" });
  private readonly figures = make("dl", { class: "figures" });
  private readonly strip = document.createElementNS(SVG, "svg");
  private readonly measured = make(
    "div",
    { class: "measured", hidden: true },
    this.figures,
    make("div", { class: "passes", "aria-hidden": "true" }, make("p", {}, "tokens of each pass"), this.strip),
  );
  private pending: [string, Pass | null][] = [];
  private passes: Pass[] = [];
  private tokens = 0;
  private firstTokens = 0;
  private firstAt = 0;
  private lastAt = 0;
  private usage: Usage | null = null;
  private figuresAt = 0;

  constructor(
    readonly name: string,
    how: string,
    private readonly tau: number | null,
    /** Tokens that the model has room for. */
    private readonly room: number | null,
  ) {
    this.body = make("div", { class: "text", tabindex: 0, role: "group", dir: "auto" });
    this.painter = new Painter(this.body);
    this.strip.setAttribute("class", "strip");
    this.element = make(
      "article",
      { class: "answer", "aria-busy": "true", "aria-label": `Answer by ${name || "the server"}` },
      make("p", { class: "who" }, make("strong", {}, name || "Answer"), " ", make("span", {}, how)),
      this.body,
      this.note,
      this.measured,
      this.actions,
    );
    this.describe();
  }

  /** Goes on where it ended: the figures start anew. */
  resume(): void {
    this.state = "writing";
    this.finish = null;
    this.usage = null;
    this.passes = [];
    this.tokens = this.firstTokens = 0;
    this.firstAt = this.lastAt = 0;
    this.note.replaceChildren();
    this.element.setAttribute("aria-busy", "true");
    nextFrame(this.draw);
  }

  take(chunk: Chunk): void {
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.finish) this.finish = chunk.finish;
    let pass: Pass | null = null;
    if (chunk.tokens && chunk.tokens.length > 0) {
      pass = { number: this.passes.length + 1, tokens: chunk.tokens, tau: this.tau };
      this.passes.push(pass);
      this.tokens += chunk.tokens.length;
      this.lastAt = performance.now();
      if (this.firstAt === 0) {
        this.firstAt = this.lastAt;
        this.firstTokens = chunk.tokens.length;
      }
    }
    if (chunk.content === "" && !pass && !chunk.usage) return;
    this.text += chunk.content;
    if (chunk.content !== "") this.pending.push([chunk.content, pass]);
    nextFrame(this.draw);
  }

  end(state: State, note: (Node | string)[] = []): void {
    this.state = state;
    this.element.setAttribute("aria-busy", "false");
    this.note.replaceChildren(...note);
    this.describe();
    nextFrame(this.draw);
  }

  /** The figures that two answers are compared by, once the server has told them. */
  get told(): { speed: number; perPass: number } | null {
    const told = this.usage?.mtad;
    return told ? { speed: told.tokens_per_second, perPass: told.block_efficiency } : null;
  }

  /** Its figures in words. */
  get summary(): string {
    return this.rows()
      .map(([term, value]) => `${term} ${value}`)
      .join(", ");
  }

  private describe(): void {
    const what = this.state === "writing" ? "being written" : `${this.tokens} tokens`;
    this.body.setAttribute("aria-label", `Text, ${what}; the arrow keys go through its tokens`);
  }

  private readonly draw = (): void => {
    for (const [content, pass] of this.pending) {
      for (const piece of pieces(content, pass)) this.painter.append(piece);
    }
    this.pending = [];
    const now = performance.now();
    if (this.state === "writing" && now - this.figuresAt < FIGURES_EVERY_MS) return;
    this.figuresAt = now;
    const rows = this.rows().map(([term, value]) =>
      make("div", {}, make("dt", {}, term), make("dd", {}, value)),
    );
    this.measured.hidden = this.tokens === 0 && !this.usage;
    this.figures.replaceChildren(...rows);
    this.drawStrip();
  };

  /** The server's figures where it has told them, and until then what can be seen from here. */
  private rows(): [string, string][] {
    const told = this.usage?.mtad;
    const tokens = this.usage?.completion_tokens ?? this.tokens;
    const rows: [string, string][] = [["tokens", count(tokens)]];
    const seconds = (this.lastAt - this.firstAt) / 1000;
    const seen = seconds > 0.05 ? (this.tokens - this.firstTokens) / seconds : null;
    const speed = told?.tokens_per_second ?? seen;
    if (speed !== null) rows.push(["tokens/s", figure(speed)]);
    const passes = this.passes.length;
    const each = told?.block_efficiency ?? (passes > 0 ? this.tokens / passes : null);
    if (each !== null) rows.push(["tokens/pass", each.toFixed(2)]);
    if (told && told.drafted > 0) {
      rows.push(["drafts kept", `${Math.round((100 * told.accepted) / told.drafted)} %`]);
    }
    if (told?.joules != null) {
      rows.push(["joules", figure(told.joules)]);
      if (tokens > 0) rows.push(["J/token", figure(told.joules / tokens)]);
    }
    if (this.usage && this.room) {
      rows.push(["context", `${count(this.usage.total_tokens)}/${count(this.room)}`]);
    }
    return rows;
  }

  /** A bar for each pass, as high as it let tokens through; the latest ones. */
  private drawStrip(): void {
    const latest = this.passes.slice(-STRIP_PASSES);
    const most = Math.max(1, ...latest.map(({ tokens }) => tokens.length));
    const scale = Math.min(BAR.token, BAR.highest / most);
    const height = most * scale;
    const paths = { draft: "", target: "", forced: "" };
    latest.forEach(({ tokens }, n) => {
      const x = n * (BAR.width + BAR.gap);
      tokens.forEach(({ origin }, above) => {
        const y = height - (above + 1) * scale;
        paths[origin] += `M${x} ${y}h${BAR.width}v${scale}h-${BAR.width}z`;
      });
    });
    const width = Math.max(1, latest.length * (BAR.width + BAR.gap) - BAR.gap);
    this.strip.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.strip.setAttribute("width", String(width));
    this.strip.setAttribute("height", String(height));
    const drawn = Object.entries(paths).map(([origin, d]) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", origin);
      path.setAttribute("d", d);
      return path;
    });
    this.strip.replaceChildren(...drawn);
  }
}

function count(n: number): string {
  return n.toLocaleString("en");
}

function figure(x: number): string {
  if (x >= 100) return count(Math.round(x));
  return x >= 10 ? x.toFixed(1) : x.toPrecision(2);
}

/** An error as a sentence. */
export function sentenceOf(error: unknown): string {
  if (error instanceof ServerError) return error.sentence;
  const said = error instanceof Error ? error.message : String(error);
  return `The page failed: ${said}.`;
}
