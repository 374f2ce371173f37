// Small helpers for the document. Text from a model or a user only ever becomes text nodes.

type Attributes = Record<string, string | number | boolean>;

/** A new element. An attribute that is `false` is left out. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/** A button with a word on it. */
export function button(word: string, act: () => void, name = word): HTMLButtonElement {
  const made = make("button", { type: "button", class: "quiet", "aria-label": name }, word);
  made.addEventListener("click", act);
  return made;
}

/** The element of the page with that id. */
export function get<T extends HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

/** Says something to those who listen to the page rather than look at it. */
export function announce(text: string): void {
  get("status").textContent = text;
}

export async function copy(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Over plain HTTP to another machine there is no clipboard interface.
    const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
    field.value = text;
    const before = document.activeElement;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    if (before instanceof HTMLElement) before.focus();
    return done;
  }
}

const waiting = new Set<() => void>();
let after: () => void = () => undefined;

/** Does something before the next picture is drawn, once, however often it is asked for until then. */
export function nextFrame(work: () => void): void {
  if (waiting.size === 0) requestAnimationFrame(flush);
  waiting.add(work);
}

/** Is called when a frame's work was done. */
export function afterFrames(work: () => void): void {
  after = work;
}

function flush(): void {
  const works = [...waiting];
  waiting.clear();
  for (const work of works) work();
  after();
}
