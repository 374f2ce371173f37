// Tokens as text that shows who wrote it, and what is known of the one that is looked at.

import type { Origin, Token } from "./api.js";
import { get, make, nextFrame } from "./dom.js";

/** A pass of the target: the tokens that it let through, and the one that it added. */
export interface Pass {
  number: number;
  tokens: Token[];
  /** The threshold, where the strategy has one. */
  tau: number | null;
}

interface Piece {
  text: string;
  token: Token | null;
  pass: Pass | null;
}

const pieceOf = new WeakMap<Element, Piece>();

/**
 * Which part of the text each token stands for. The text is what counts: a token may hold half a
 * character, and its own text is then not in it.
 */
export function pieces(content: string, pass: Pass | null): Piece[] {
  if (!pass || pass.tokens.length === 0) return content ? [{ text: content, token: null, pass }] : [];
  let at = 0;
  const made = pass.tokens.map((token) => {
    const fits = content.startsWith(token.text, at);
    if (fits) at += token.text.length;
    return { text: fits ? token.text : "", token, pass };
  });
  made.at(-1)!.text += content.slice(at);
  return made.filter((piece) => piece.text !== "");
}

/**
 * Appends text to an element, a line of it to an element each: so a line can become code when it
 * turns out to be some, and nothing that is written is ever moved.
 */
export class Painter {
  private line: HTMLElement | null = null;
  private inCode = false;

  constructor(private readonly root: HTMLElement) {}

  append(piece: Piece): void {
    for (const part of piece.text.split(/(?<=\n)/)) {
      this.line ??= this.root.appendChild(make("div", { class: this.inCode ? "line code" : "line" }));
      const span = make("span", { class: `token ${piece.token?.origin ?? "unknown"}` });
      // The mark is under the word alone, so that the tokens stand apart.
      const word = part.trimStart();
      const lead = part.slice(0, part.length - word.length);
      if (lead !== "") span.append(lead);
      if (word !== "") span.append(make("u", {}, word));
      pieceOf.set(span, piece);
      this.line.append(span);
      const ends = part.endsWith("\n");
      // Only fences need a look at the whole line, and those are short.
      if (ends || this.line.childElementCount < 4) {
        const text = this.line.textContent!;
        const fence = /^ {0,3}```/.test(text);
        if (fence) this.line.classList.add("code", "fence");
        if (ends && fence) this.inCode = this.inCode ? text.trim() !== "```" : true;
      }
      if (ends) this.line = null;
    }
  }
}

const WRITERS: Record<Origin, string> = {
  draft: "draft, accepted by the target",
  target: "target",
  forced: "grammar: nothing else fits",
};

const percent = (x: number): string => `${(100 * x).toPrecision(x < 0.9995 ? 3 : 4)} %`;
const minus = (text: string): string => text.replace("-", "\u2212");

function facts({ token, pass }: Piece): [string, string][] {
  if (!token) return [["written by", "not told by the server"]];
  const rows: [string, string][] = [["written by", WRITERS[token.origin]]];
  if (token.log_prob !== null) {
    const log = minus(token.log_prob.toFixed(3));
    rows.push(["log-probability", `${log}, that is ${percent(Math.exp(token.log_prob))}`]);
  }
  if (token.log_ratio !== null) {
    const ratio = Math.exp(token.log_ratio);
    const bound = pass?.tau != null ? (ratio > pass.tau ? `, above tau ${pass.tau}` : "") : "";
    rows.push(["joint p/q of block", `${ratio.toPrecision(3)}${bound}`]);
  }
  if (pass) {
    const place = pass.tokens.indexOf(token) + 1;
    rows.push(["pass", `${pass.number}, token ${place} of ${pass.tokens.length}`]);
  }
  rows.push(["id", String(token.id)]);
  return rows;
}

// The tip: one for the page, beside the token that the pointer or the keyboard is at.

let shown: Element | null = null;

function block(span: Element): Element[] {
  const pass = pieceOf.get(span)?.pass;
  if (!pass) return [span];
  const all = [span];
  for (const step of [before, next]) {
    for (let at = step(span); at && pieceOf.get(at)?.pass === pass; at = step(at)) all.push(at);
  }
  return all;
}

function next(span: Element): Element | null {
  return span.nextElementSibling ?? span.parentElement!.nextElementSibling?.firstElementChild ?? null;
}

function before(span: Element): Element | null {
  return (
    span.previousElementSibling ?? span.parentElement!.previousElementSibling?.lastElementChild ?? null
  );
}

export function hideTip(): void {
  if (!shown) return;
  for (const span of block(shown)) span.classList.remove("block", "here");
  shown.removeAttribute("aria-describedby");
  shown = null;
  get("tip").hidden = true;
}

function showTip(span: Element): void {
  const piece = pieceOf.get(span);
  if (!piece || span === shown) return;
  hideTip();
  shown = span;
  for (const other of block(span)) other.classList.add("block");
  span.classList.add("here");
  const tip = get("tip");
  const list = make("dl");
  for (const [term, detail] of facts(piece)) {
    list.append(make("div", {}, make("dt", {}, term), make("dd", {}, detail)));
  }
  const quoted = JSON.stringify(piece.token?.text ?? piece.text);
  tip.replaceChildren(make("p", {}, quoted), list);
  tip.hidden = false;
  span.setAttribute("aria-describedby", "tip");
  place(tip, span);
}

/** Under the token, or above it where there is no room, and within the window. */
function place(tip: HTMLElement, span: Element): void {
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
  const under = at.bottom + 2;
  const top = under + height < innerHeight - 8 ? under : Math.max(8, at.top - height - 2);
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

/** Keeps the tip at its token when the text moves, and takes it away with it. */
function follow(): void {
  if (!shown) return;
  const { top, bottom } = shown.getBoundingClientRect();
  const view = get("scroller").getBoundingClientRect();
  if (!shown.isConnected || bottom < view.top || top > view.bottom) hideTip();
  else place(get("tip"), shown);
}

/** Another token than this one, some way from it; its first piece. */
function other(span: Element, step: (span: Element) => Element | null): Element | null {
  const token = pieceOf.get(span);
  let at = step(span);
  while (at && pieceOf.get(at) === token) at = step(at);
  return at;
}

function focusToken(span: Element | null | undefined): void {
  if (!(span instanceof HTMLElement)) return;
  span.tabIndex = -1;
  span.focus();
  span.scrollIntoView({ block: "nearest" });
  showTip(span);
}

/** Makes the tokens within an element tell about themselves. */
export function watchTokens(root: HTMLElement): void {
  const tokenAt = (target: EventTarget | null): Element | null =>
    target instanceof Element ? target.closest(".token") : null;

  // Text that moves under a pointer at rest is not pointed at.
  let rest = "";
  const placeOf = (event: PointerEvent): string => `${event.screenX} ${event.screenY}`;
  root.addEventListener("pointermove", (event) => (rest = placeOf(event)), { passive: true });
  root.addEventListener("pointerover", (event) => {
    const span = tokenAt(event.target);
    const moved = placeOf(event) !== rest;
    rest = placeOf(event);
    if (span && moved && event.pointerType !== "touch") showTip(span);
  });
  // A finger that is lifted leaves the token at once: a tap shows the tip until the next one.
  root.addEventListener("click", (event) => {
    const span = tokenAt(event.target);
    if (span) showTip(span);
    else hideTip();
  });
  root.addEventListener("pointerout", (event) => {
    if (event.pointerType === "touch" || tokenAt(event.target) !== shown) return;
    if (tokenAt(event.relatedTarget) !== shown) hideTip();
  });
  root.addEventListener("focusout", (event) => {
    if (tokenAt(event.target)) {
      (event.target as HTMLElement).removeAttribute("tabindex");
      hideTip();
    }
  });
  root.addEventListener("scroll", () => nextFrame(follow), { passive: true });

  root.addEventListener("keydown", (event) => {
    const target = event.target as Element;
    const text = target.closest(".text");
    if (!text || event.altKey || event.ctrlKey || event.metaKey) return;
    const span = tokenAt(target);
    const first = text.firstElementChild?.firstElementChild;
    const last = text.lastElementChild?.lastElementChild;
    switch (event.key) {
      case "ArrowRight":
        focusToken(span ? other(span, next) : first);
        break;
      case "ArrowLeft":
        focusToken(span ? other(span, before) : last);
        break;
      case "Home":
        focusToken(first);
        break;
      case "End":
        focusToken(last);
        break;
      default:
        return;
    }
    event.preventDefault();
  });

  // Every line is an element and also ends in a line feed; a copy gets the text as it was written.
  root.addEventListener("copy", (event) => {
    const selection = getSelection();
    if (!selection || selection.isCollapsed || !event.clipboardData) return;
    const range = selection.getRangeAt(0);
    const inside = range.commonAncestorContainer;
    const element = inside instanceof Element ? inside : inside.parentElement;
    if (!element?.closest(".text")) return;
    event.clipboardData.setData("text/plain", range.cloneContents().textContent ?? "");
    event.preventDefault();
  });
}
