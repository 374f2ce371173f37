// The page: the conversation, what it is asked with, and the keys.

import { ServerError, models, onKeyWanted, sentence, setKey, stream } from "./api.js";
import type { Message, Mode, Model, Strategy } from "./api.js";
import { Answer, sentenceOf } from "./answer.js";
import { afterFrames, announce, button, copy, get, make, nextFrame } from "./dom.js";
import { TAU_STEPS, heeds, load, positionOf, request, save, seed, tauAt } from "./settings.js";
import type { Arm } from "./settings.js";
import { hideTip, watchTokens } from "./tokens.js";

interface Turn {
  mode: Mode;
  prompt: string;
  /** The strategies that answer it: one, or two side by side. */
  arms: 1 | 2;
  answers: Answer[];
  /** The answer that the conversation goes on from. */
  chosen: number;
  element: HTMLLIElement;
  said: HTMLElement;
  row: HTMLElement;
  compared: HTMLElement;
}

const settings = load();
let known: Model[] = [];
let model: Model | undefined;
let turns: Turn[] = [];
const running = new Map<Answer, AbortController>();

const prompt = get<HTMLTextAreaElement>("prompt");
const scroller = get("scroller");

// The models.

function strategies(): Strategy[] {
  return model?.mtad?.strategies ?? [];
}

function strategyOf(arm: Arm): Strategy | undefined {
  return strategies().find(({ name }) => name === arm.strategy);
}

async function loadModels(): Promise<void> {
  try {
    known = await models();
    if (known.length === 0) throw new ServerError("The server has no model.");
    get("problem").replaceChildren();
    const list = get<HTMLSelectElement>("model");
    list.replaceChildren(...known.map(({ id }) => make("option", { value: id }, id)));
    list.hidden = known.length < 2;
    chooseModel(known[0]!);
  } catch (error) {
    showProblem(get("problem"), error, [button("Try again", () => void loadModels())]);
  }
}

function chooseModel(chosen: Model): void {
  model = chosen;
  const draft = chosen.mtad?.draft;
  const names = get("pair");
  names.replaceChildren(
    ...(known.length < 2 ? [make("span", {}, chosen.id)] : []),
    ...(draft ? [make("span", {}, `with ${draft}`)] : []),
  );
  names.title = names.textContent ?? "";
  const usable = strategies().filter(({ needs_draft }) => draft || !needs_draft);
  const preferred = (names: string[]) =>
    names.find((name) => usable.some((other) => other.name === name)) ?? usable[0]?.name ?? "";
  if (!usable.some(({ name }) => name === settings.arm.strategy)) {
    settings.arm.strategy = preferred(["mtad", "sample"]);
  }
  if (!usable.some(({ name }) => name === settings.other.strategy)) {
    settings.other.strategy = preferred(["speculative", "greedy"]);
  }
  if (chosen.mtad?.chat === false) settings.mode = "complete";
  get<HTMLButtonElement>("send").disabled = false;
  showSettings();
}

// The settings.

interface ArmFields {
  arm: () => Arm;
  select: HTMLSelectElement;
  summary: HTMLElement;
  slider: HTMLInputElement;
  value: HTMLElement;
  help: HTMLElement;
  tau: HTMLElement;
}

function armFields(id: string, arm: () => Arm): ArmFields {
  const slider = get<HTMLInputElement>(`${id}-tau`);
  const fields = {
    arm,
    slider,
    select: get<HTMLSelectElement>(`${id}-strategy`),
    summary: get(`${id}-summary`),
    value: get(`${id}-value`),
    help: get(`${id}-tau-help`),
    tau: slider.closest<HTMLElement>(".tau")!,
  };
  slider.max = String(TAU_STEPS);
  slider.addEventListener("input", () => {
    arm().tau = tauAt(slider.valueAsNumber);
    changed();
  });
  fields.select.addEventListener("change", () => {
    arm().strategy = fields.select.value;
    changed();
  });
  return fields;
}

const arms = [armFields("arm", () => settings.arm), armFields("other", () => settings.other)];
const numbers = [...document.querySelectorAll<HTMLInputElement>("input[data-number]")];

function changed(): void {
  save(settings);
  showSettings();
}

function showArm(fields: ArmFields): void {
  const arm = fields.arm();
  const draft = model?.mtad?.draft;
  if (fields.select.options.length !== strategies().length) {
    fields.select.replaceChildren(...strategies().map(({ name }) => make("option", { value: name }, name)));
  }
  strategies().forEach(({ needs_draft }, n) => {
    fields.select.options[n]!.disabled = needs_draft && !draft;
  });
  fields.select.value = arm.strategy;
  const strategy = strategyOf(arm);
  fields.summary.textContent = strategy ? sentence(strategy.summary) : "";
  const used = heeds(strategy, "tau");
  fields.slider.disabled = !used;
  fields.tau.classList.toggle("off", !used);
  fields.slider.value = String(positionOf(arm.tau));
  fields.slider.setAttribute("aria-valuetext", String(arm.tau));
  fields.value.textContent = used ? String(arm.tau) : "";
  fields.help.textContent = used
    ? "Lower keeps more of the draft and is faster; higher stays closer to the target."
    : strategy
      ? `${strategy.name} has no tau.`
      : "";
}

function showSettings(): void {
  arms.forEach(showArm);
  get("arm").hidden = strategies().length === 0;
  get("other").hidden = !settings.compare;
  get<HTMLInputElement>("compare").checked = settings.compare;
  get("compare").closest("label")!.hidden = strategies().length < 2;
  for (const radio of document.querySelectorAll<HTMLInputElement>("input[name=mode]")) {
    radio.checked = radio.value === settings.mode;
  }
  const inUse = activeArms().map(strategyOf);
  for (const input of numbers) {
    if (input !== document.activeElement) input.value = settings.numbers[input.dataset.number!] ?? "";
    const { knob } = input.dataset;
    input.disabled = knob !== undefined && !inUse.some((strategy) => heeds(strategy, knob));
  }
  get<HTMLTextAreaElement>("system").value = settings.system;
  const chat = settings.mode === "chat";
  for (const element of document.querySelectorAll<HTMLElement>(".for-chat")) element.hidden = !chat;
  prompt.placeholder = chat ? "Ask something" : "The beginning of a text";
  get("prompt-label").textContent = chat ? "Message" : "Text to complete";
  get<HTMLInputElement>("marks").checked = settings.marks;
  document.body.classList.toggle("unmarked", !settings.marks);
  showStarters();
}

function activeArms(): Arm[] {
  return settings.compare && strategies().length > 1 ? [settings.arm, settings.other] : [settings.arm];
}

const STARTERS: Record<Mode, string[]> = {
  chat: ["Why does ice float on water?", "Write a binary search in Rust.", "Tell me a story about a lighthouse."],
  complete: ["Once upon a time", "The capital of France is", "A good way to begin a letter is"],
};

function showStarters(): void {
  const list = get("starters");
  if (list.dataset.mode === settings.mode) return;
  list.dataset.mode = settings.mode;
  list.replaceChildren(
    ...STARTERS[settings.mode].map((text) =>
      button(text, () => {
        prompt.value = text;
        fit(prompt);
        prompt.focus();
      }),
    ),
  );
}

/** Whether all numbers are in their ranges; shows the first that is not. */
function settingsFit(): boolean {
  const wrong = numbers.find((input) => !input.disabled && !input.checkValidity());
  if (!wrong) return true;
  openSettings(true);
  get<HTMLDetailsElement>("more").open = true;
  wrong.reportValidity();
  return false;
}

// The conversation.

/** What the model is told before a turn's own prompt. */
function history(turn: Turn): Message[] {
  const messages: Message[] = [];
  if (settings.system.trim() !== "") messages.push({ role: "system", content: settings.system });
  for (const earlier of turns.slice(0, turns.indexOf(turn))) {
    const answer = earlier.answers[earlier.chosen];
    // A template wants turns in pairs, so a message that got no answer is not told.
    if (earlier.mode !== "chat" || !answer || answer.text === "") continue;
    messages.push({ role: "user", content: earlier.prompt });
    messages.push({ role: "assistant", content: answer.text });
  }
  return messages;
}

interface Job {
  mode: Mode;
  body: Record<string, unknown>;
  name: string;
  how: string;
  tau: number | null;
}

function jobFor(turn: Turn, arm: Arm, seedNow: number): Job {
  const strategy = strategyOf(arm);
  const how = request(settings, arm, strategy, seedNow);
  const told = ["tau", "gamma", "beam_width", "temperature", "top_p", "top_k", "seed"]
    .filter((field) => how[field] !== undefined)
    .map((field) => `${field.replace("_", "-")} ${how[field]}`);
  const asked =
    turn.mode === "chat"
      ? { messages: [...history(turn), { role: "user", content: turn.prompt }], logprobs: true }
      : { prompt: turn.prompt, logprobs: 1 };
  return {
    mode: turn.mode,
    name: strategy?.name ?? "",
    how: told.join(", "),
    tau: typeof how.tau === "number" ? how.tau : null,
    body: {
      model: model?.id,
      ...asked,
      ...how,
      stream: true,
      stream_options: { include_usage: true },
      mtad_tokens: true,
    },
  };
}

function send(text: string): boolean {
  if (text.trim() === "" || !model || running.size > 0 || !settingsFit()) return false;
  const said = make("div", { class: "said" });
  const row = make("div", { class: "answers" });
  const compared = make("p", { class: "compared" });
  const turn: Turn = {
    mode: settings.mode,
    prompt: text,
    arms: 1,
    answers: [],
    chosen: 0,
    element: make("li", { class: "turn" }, said, row, compared),
    said,
    row,
    compared,
  };
  turns.push(turn);
  get("turns").append(turn.element);
  get("intro").hidden = true;
  showSaid(turn);
  answerTurn(turn);
  return true;
}

/** Has a turn answered anew, as the settings are now. */
function answerTurn(turn: Turn): void {
  const active = activeArms();
  turn.arms = active.length === 2 ? 2 : 1;
  turn.chosen = 0;
  turn.answers = [];
  turn.row.replaceChildren();
  turn.compared.replaceChildren();
  turn.row.classList.toggle("two", turn.arms === 2);
  const seedNow = seed(settings);
  pinned = true;
  active.forEach((arm, n) => void run(turn, n, jobFor(turn, arm, seedNow)));
}

/** Forgets what was said after a turn, since it followed from what now changes. */
function dropAfter(turn: Turn): void {
  stopAll();
  if (turn.mode !== "chat") return;
  for (const later of turns.splice(turns.indexOf(turn) + 1)) later.element.remove();
}

async function run(turn: Turn, n: number, job: Job, going?: Answer): Promise<void> {
  const answer = going ?? new Answer(job.name, job.how, job.tau, model?.mtad?.context ?? null);
  if (going) going.resume();
  else if (turn.answers[n]) turn.answers[n].element.replaceWith(answer.element);
  else turn.row.append(answer.element);
  turn.answers[n] = answer;
  const control = new AbortController();
  running.set(answer, control);
  showRunning();
  showActions(turn);
  const body = going ? { ...job.body, prompt: turn.prompt + going.text } : job.body;
  try {
    for await (const chunk of stream(job.mode, body, control.signal)) answer.take(chunk);
    const cut = answer.finish === "length" ? [note("Ended at the most tokens.")] : [];
    answer.end("done", cut);
    announce(`${job.name || "The server"} has answered. ${answer.text.slice(0, 1000)} ${answer.summary}.`);
  } catch (error) {
    if (control.signal.aborted) {
      answer.end("stopped", [note("Stopped.")]);
      announce("Stopped.");
    } else {
      answer.end("failed");
      showProblem(answer.element.querySelector(".note")!, error, waysOut(turn, n, job, error, going));
    }
  } finally {
    running.delete(answer);
    showRunning();
    if (turns.includes(turn)) showActions(turn);
    showComparison(turn);
  }
}

function note(text: string): HTMLElement {
  return make("p", {}, text);
}

function showProblem(place: Element, error: unknown, ways: HTMLElement[]): void {
  place.replaceChildren(
    make("div", { class: "problem", role: "alert" }, make("p", {}, sentenceOf(error)), ...ways),
  );
}

/** What can be done about an answer that failed. */
function waysOut(turn: Turn, n: number, job: Job, error: unknown, going?: Answer): HTMLElement[] {
  if (error instanceof ServerError && error.code === "no_chat_template") {
    return [
      button("Complete text instead", () => {
        settings.mode = turn.mode = "complete";
        changed();
        showSaid(turn);
        if (running.size === 0) answerTurn(turn);
      }),
    ];
  }
  return [button("Try again", () => void run(turn, n, job, going))];
}

function showSaid(turn: Turn): void {
  const text = make("div", { class: "said-text", dir: "auto" }, turn.prompt);
  const edit = button("Edit", () => editTurn(turn), "Edit this message and send it again");
  turn.said.replaceChildren(
    make("p", { class: "who" }, make("strong", {}, turn.mode === "chat" ? "You" : "Beginning")),
    text,
    make("div", { class: "actions" }, edit),
  );
}

function editTurn(turn: Turn): void {
  const field = make("textarea", { "aria-label": "Message", rows: 1 });
  field.value = turn.prompt;
  const close = () => {
    showSaid(turn);
    turn.said.querySelector("button")!.focus();
  };
  const resend = () => {
    if (field.value.trim() === "" || !settingsFit()) return;
    dropAfter(turn);
    turn.prompt = field.value;
    turn.mode = settings.mode;
    showSaid(turn);
    answerTurn(turn);
    prompt.focus();
  };
  const buttons = make(
    "div",
    { class: "actions" },
    button("Send again", resend),
    button("Cancel", close),
  );
  turn.said.replaceChildren(
    make("p", { class: "who" }, make("strong", {}, "Edit")),
    field,
    buttons,
  );
  field.addEventListener("input", () => fit(field));
  field.addEventListener("keydown", (event) => {
    if (sends(event)) {
      event.preventDefault();
      resend();
    } else if (event.key === "Escape" && !event.isComposing) {
      event.stopPropagation();
      close();
    }
  });
  fit(field);
  field.focus();
}

function showActions(turn: Turn): void {
  turn.answers.forEach((answer, n) => {
    const made: HTMLElement[] = [];
    if (answer.state !== "writing") {
      if (answer.text !== "") {
        const copied = button("Copy", async () => {
          copied.textContent = (await copy(answer.text)) ? "Copied" : "Not copied";
          announce(copied.textContent);
          setTimeout(() => (copied.textContent = "Copy"), 1500);
        }, "Copy this answer");
        made.push(copied);
      }
      // One that failed has its own way to try again.
      if (answer.state !== "failed") {
        made.push(
          button("Regenerate", () => {
            if (!settingsFit()) return;
            dropAfter(turn);
            const arm = n === 0 ? settings.arm : settings.other;
            void run(turn, n, jobFor(turn, arm, seed(settings)));
            prompt.focus();
          }, "Regenerate this answer"),
        );
      }
      if (turn.mode === "complete" && answer.text !== "" && answer.state !== "failed") {
        const go = () => {
          if (!settingsFit()) return;
          const arm = n === 0 ? settings.arm : settings.other;
          void run(turn, n, jobFor(turn, arm, seed(settings)), answer);
        };
        made.push(button("Go on", go, "Go on with this text"));
      }
    }
    if (turn.mode === "chat" && turn.answers.length === 2 && answer.state !== "writing") {
      const choose = button("Go on from this", () => {
        turn.chosen = n;
        showActions(turn);
        turn.answers[n]!.actions.querySelector<HTMLElement>("[aria-pressed]")!.focus();
      });
      choose.setAttribute("aria-pressed", String(turn.chosen === n));
      made.push(choose);
    }
    answer.actions.replaceChildren(...made);
  });
}

/** How two answers compare, as a sentence under both. */
function showComparison(turn: Turn): void {
  turn.compared.replaceChildren();
  const [one, two] = turn.answers;
  const [a, b] = [one?.told, two?.told];
  if (!one || !two || !a || !b || !(b.speed > 0) || !(b.perPass > 0)) return;
  const times = (x: number, y: number) => `${(x / y).toFixed(2)} times`;
  const names = one.name === two.name ? ["The first", "the second"] : [one.name, two.name];
  turn.compared.textContent =
    `${names[0]} wrote ${times(a.perPass, b.perPass)} the tokens per pass of ${names[1]}, ` +
    `at ${times(a.speed, b.speed)} its speed.`;
}

function showRunning(): void {
  const busy = running.size > 0;
  const held = document.activeElement;
  const stop = get("stop");
  const sendButton = get("send");
  stop.hidden = !busy;
  sendButton.hidden = busy;
  if (held === stop || held === sendButton) prompt.focus();
}

function stopAll(): void {
  for (const control of running.values()) control.abort();
}

function newChat(): void {
  stopAll();
  turns = [];
  get("turns").replaceChildren();
  get("intro").hidden = false;
  hideTip();
  announce("New chat.");
  prompt.focus();
}

// Scrolling: the page follows the text as long as its end is in view.

let pinned = true;
let lastTop = 0;

function atEnd(): boolean {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
}

function follow(): void {
  if (pinned) scroller.scrollTop = scroller.scrollHeight;
  get("latest").hidden = pinned || running.size === 0;
}

scroller.addEventListener(
  "scroll",
  () => {
    if (atEnd()) pinned = true;
    else if (scroller.scrollTop < lastTop) pinned = false;
    lastTop = scroller.scrollTop;
    get("latest").hidden = pinned;
  },
  { passive: true },
);
afterFrames(follow);
new ResizeObserver(() => nextFrame(follow)).observe(scroller);

// The fields and buttons.

/** As high as the text in it. */
function fit(field: HTMLTextAreaElement): void {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function sends(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

function submit(): void {
  if (send(prompt.value)) {
    prompt.value = "";
    fit(prompt);
  }
}

// On a narrow page the settings lie over the rest of it; on a wide one they are always there.
const narrow = matchMedia("(max-width: 900px)");

function settingsOpen(): boolean {
  return document.body.classList.contains("settings-open");
}

function openSettings(open: boolean): void {
  const opens = open && narrow.matches;
  if (opens === settingsOpen()) return;
  document.body.classList.toggle("settings-open", opens);
  get("settings-button").setAttribute("aria-expanded", String(opens));
  get("top").inert = get("talk").inert = opens;
  get(opens ? "settings-close" : "settings-button").focus();
}

const THEME = "mtad.theme";

function dark(): boolean {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function showTheme(): void {
  const word = dark() ? "Light" : "Dark";
  get("theme").textContent = word;
  get("theme").setAttribute("aria-label", `${word} theme`);
}

function chooseTheme(theme: string): void {
  document.documentElement.dataset.theme = theme;
  showTheme();
}

get("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    submit();
  } else if (/^Page(Up|Down)$/.test(event.key) && prompt.scrollHeight <= prompt.clientHeight) {
    // Where the field has nothing to scroll, these scroll the conversation.
    event.preventDefault();
    const pages = event.key === "PageUp" ? -0.9 : 0.9;
    scroller.scrollBy(0, pages * scroller.clientHeight);
  }
});
prompt.addEventListener("input", () => fit(prompt));
get("stop").addEventListener("click", stopAll);
get("new").addEventListener("click", newChat);
get("latest").addEventListener("click", () => {
  pinned = true;
  follow();
  prompt.focus();
});
get("settings-button").addEventListener("click", () => {
  openSettings(true);
});
document.addEventListener("pointerdown", (event) => {
  if (settingsOpen() && !get("settings").contains(event.target as Node)) openSettings(false);
});
narrow.addEventListener("change", () => openSettings(false));
get("settings-close").addEventListener("click", () => openSettings(false));
get("theme").addEventListener("click", () => {
  const theme = dark() ? "light" : "dark";
  chooseTheme(theme);
  try {
    localStorage.setItem(THEME, theme);
  } catch {
    // Then it holds for this visit.
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);

get("model").addEventListener("change", (event) => {
  const chosen = known.find(({ id }) => id === (event.target as HTMLSelectElement).value);
  if (chosen) chooseModel(chosen);
});
get("compare").addEventListener("change", (event) => {
  settings.compare = (event.target as HTMLInputElement).checked;
  changed();
});
get("marks").addEventListener("change", (event) => {
  settings.marks = (event.target as HTMLInputElement).checked;
  changed();
});
get("system").addEventListener("change", (event) => {
  settings.system = (event.target as HTMLTextAreaElement).value;
  changed();
});
for (const radio of document.querySelectorAll<HTMLInputElement>("input[name=mode]")) {
  radio.addEventListener("change", () => {
    settings.mode = radio.value as Mode;
    changed();
  });
}
for (const input of numbers) {
  input.addEventListener("input", () => {
    settings.numbers[input.dataset.number!] = input.value;
    save(settings);
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || get<HTMLDialogElement>("key-dialog").open) return;
  if (running.size > 0) stopAll();
  else if (settingsOpen()) openSettings(false);
  const inText = document.activeElement?.closest(".text");
  hideTip();
  if (inText) prompt.focus();
});

// The key, where the server wants one.

onKeyWanted(
  (refused) =>
    new Promise((answer) => {
      const dialog = get<HTMLDialogElement>("key-dialog");
      const field = get<HTMLInputElement>("key");
      get("key-why").textContent = refused
        ? "The server refused this key. Is it complete?"
        : "This server wants an API key. It is kept until this tab is closed.";
      field.value = "";
      dialog.returnValue = "";
      get("key-form").onsubmit = () => setKey(field.value.trim());
      get("key-cancel").onclick = () => dialog.close("cancel");
      dialog.onclose = () => answer(dialog.returnValue === "use");
      dialog.showModal();
    }),
);

try {
  const theme = localStorage.getItem(THEME);
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing shows what the system prefers.
}
showTheme();
showSettings();
watchTokens(scroller);
void loadModels();
