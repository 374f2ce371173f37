// The page of `mtad serve` in a browser: `npm ci && node --test` here.
//
// MTAD_URL names a running server; without it, and for what only a scripted server does, there is
// the one of mock.mjs. CHROMIUM names the browser.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { chromium } from "playwright-core";
import { start } from "./mock.mjs";

const ARGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const WIDE = { width: 1280, height: 800 };
const NARROW = { width: 360, height: 640 };
const MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> & <b>b</b>";

let browser;
before(async () => {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGS });
});
after(() => browser?.close());

/** Whether the model of a server can chat: the built-in pair only goes on with a text. */
async function modeOf(url) {
  const { data: [model] } = await (await fetch(new URL("v1/models", url))).json();
  if (model.mtad?.chat !== undefined) return model.mtad.chat ? "chat" : "complete";
  const response = await fetch(new URL("v1/chat/completions", url), {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ messages: [{ role: "user", content: "Hello" }], max_tokens: 1 }),
  });
  return response.ok ? "chat" : "complete";
}

/** A page of its own, with what it asked of the server, and a check that it found no fault. */
async function open(url, options = {}, mode = "chat", numbers = {}) {
  const context = await browser.newContext({ viewport: WIDE, ...options });
  await context.addInitScript((numbers) => {
    if (!localStorage["mtad.settings"]) localStorage["mtad.settings"] = JSON.stringify({ numbers });
  }, numbers);
  context.setDefaultTimeout(30_000);
  const page = await context.newPage();
  const faults = [];
  const asked = [];
  page.on("pageerror", (error) => faults.push(String(error)));
  page.on("console", (message) => {
    // Answers with an error status are the page's to show; all else on the console is a fault.
    if (message.type() === "error" && !message.text().startsWith("Failed to load resource")) faults.push(message.text());
  });
  page.on("request", (request) => {
    const { origin, pathname } = new URL(request.url());
    if (origin !== new URL(url).origin) faults.push(`asked ${request.url()}`);
    if (request.method() === "POST") asked.push({ path: pathname, ...request.postDataJSON() });
  });
  await page.goto(url);
  if (mode === "complete") {
    if (options.viewport?.width < 900) await page.click("#settings-button");
    await page.getByText("Complete text", { exact: true }).click();
    if (options.viewport?.width < 900) await page.click("#settings-close");
  }
  const close = async () => {
    await context.close();
    assert.deepEqual(faults, []);
  };
  return { page, asked, close };
}

/** Sends a prompt and waits until `n` answers are complete. */
async function send(page, text, n = 1) {
  await page.fill("#prompt", text);
  await page.press("#prompt", "Enter");
  await ended(page, n);
}

async function ended(page, n) {
  await page.waitForFunction(
    (n) =>
      document.querySelectorAll(".answer").length === n &&
      document.querySelectorAll('.answer[aria-busy="true"]').length === 0 &&
      document.getElementById("stop").hidden,
    n,
  );
}

const figure = (page, name, n = 0) =>
  page.locator(".answer").nth(n).locator(`.figures div:has(dt:text-is("${name}")) dd`).textContent();

/** Sets the slider as a hand does. */
async function slide(page, id, position) {
  await page.locator(id).evaluate((slider, position) => {
    slider.value = position;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  }, position);
}

const overflow = (page) =>
  page.evaluate(() =>
    [document.documentElement, document.getElementById("scroller"), document.getElementById("settings")]
      .filter((element) => element.checkVisibility())
      .map((element) => element.scrollWidth - element.clientWidth),
  );

const luminance = (css) => {
  const [r, g, b] = css.match(/[\d.]+/g).slice(0, 3).map((c) => {
    const x = c / 255;
    return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};

describe("with any server", () => {
  let url, mode, server;
  // A seed, so that a model writes the same texts each time.
  const openAny = (options = {}) => open(url, options, mode, { seed: "1", max_tokens: "80" });
  before(async () => {
    server = process.env.MTAD_URL ? null : await start();
    url = process.env.MTAD_URL ?? server.url;
    mode = await modeOf(url);
  });
  after(() => server?.stop());

  test("text streams in, marked by who wrote it", async () => {
    const { page, asked, close } = await openAny();
    await send(page, "Once upon a time");
    const text = await page.textContent(".answer .text");
    assert.ok(text.trim().length > 0);
    const tokens = await page.locator(".answer .token").count();
    assert.ok(tokens > 5, `${tokens} tokens`);
    assert.equal(await page.locator(".answer .token:not(.draft, .target, .forced)").count(), 0);
    const [draft, target] = [".answer .token.draft u", ".answer .token.target u"].map((one) => page.locator(one).first());
    const style = (one) => one.evaluate((u) => {
      const { color, textDecorationThickness, textDecorationLine } = getComputedStyle(u);
      return { color, textDecorationThickness, textDecorationLine };
    });
    const [one, other] = [await style(draft), await style(target)];
    assert.notEqual(one.color, other.color);
    assert.notEqual(one.textDecorationThickness, other.textDecorationThickness, "not by colour alone");
    assert.match(await figure(page, "tokens/s"), /^[\d.,]+$/);
    assert.ok(Number(await figure(page, "tokens/pass")) >= 1);
    assert.equal(asked[0].stream, true);
    assert.equal(asked[0].mtad_tokens, true);
    assert.deepEqual(asked[0].stream_options, { include_usage: true });
    // The same without the marks.
    await page.uncheck("#marks");
    assert.equal((await style(draft)).textDecorationLine, "none");
    assert.equal((await style(draft)).color, (await style(target)).color);
    assert.equal(await page.textContent(".answer .text"), text);
    await close();
  });

  test("a token tells its figures to the pointer and to the keyboard", async () => {
    const { page, close } = await openAny();
    await send(page, "Once upon a time");
    const tip = page.getByRole("tooltip");
    assert.equal(await tip.count(), 0);
    await page.locator(".answer .token.draft u").first().hover();
    await tip.waitFor();
    assert.match(await tip.textContent(), /written by.*draft/);
    assert.match(await tip.textContent(), /log-probability.\d*\.\d+/);
    assert.match(await tip.textContent(), /joint p\/q of block\d/);
    const described = page.locator('[aria-describedby="tip"]');
    assert.equal(await described.count(), 1);
    await page.keyboard.press("Escape");
    assert.equal(await tip.count(), 0);

    await page.locator(".text").focus();
    await page.keyboard.press("ArrowRight");
    await tip.waitFor();
    assert.match(await tip.textContent(), /pass1, token 1 of/);
    await page.keyboard.press("ArrowRight");
    assert.match(await tip.textContent(), /token 2 of|pass2/);
    await page.keyboard.press("ArrowLeft");
    assert.match(await tip.textContent(), /pass1, token 1 of/);
    await page.keyboard.press("Escape");
    assert.equal(await tip.count(), 0);
    assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
    await close();
  });

  test("tau, strategy and numbers reach the next request", async () => {
    const { page, asked, close } = await openAny();
    assert.equal(await page.inputValue("#arm-strategy"), "mtad");
    assert.ok((await page.textContent("#arm-summary")).length > 10);
    await send(page, "Once upon a time");
    assert.equal(asked[0].strategy, "mtad");
    assert.equal(asked[0].tau, 0.1);
    await slide(page, "#arm-tau", 0);
    assert.equal(await page.textContent("#arm-value"), "0");
    await slide(page, "#arm-tau", 61);
    assert.equal(await page.textContent("#arm-value"), "1");
    assert.equal(await page.getAttribute("#arm-tau", "aria-valuetext"), "1");
    await page.click("#more summary");
    await page.fill('[data-number="temperature"]', "0.5");
    await page.fill('[data-number="top_p"]', "0.9");
    await page.fill('[data-number="max_tokens"]', "20");
    await page.fill('[data-number="seed"]', "7");
    await page.fill('[data-number="gamma"]', "3");
    await page.fill('[data-number="beam_width"]', "2");
    await send(page, "There was a dog", 2);
    const { tau, temperature, top_p, max_tokens, seed, gamma, beam_width } = asked[1];
    assert.deepEqual(
      { tau, temperature, top_p, max_tokens, seed, gamma, beam_width },
      { tau: 1, temperature: 0.5, top_p: 0.9, max_tokens: 20, seed: 7, gamma: 3, beam_width: 2 },
    );
    assert.ok(Number(await figure(page, "tokens", 1)) <= 20);
    await page.selectOption("#arm-strategy", "speculative");
    assert.ok(await page.isDisabled("#arm-tau"));
    await send(page, "There was a cat", 3);
    assert.equal(asked[2].strategy, "speculative");
    assert.ok(!("tau" in asked[2]) && !("beam_width" in asked[2]) && asked[2].gamma === 3);
    // A number out of its range is shown, not sent.
    await page.fill('[data-number="top_p"]', "2");
    await page.fill("#prompt", "There was a cow");
    await page.press("#prompt", "Enter");
    assert.equal(asked.length, 3);
    assert.equal(await page.evaluate(() => document.activeElement.dataset.number), "top_p");
    await close();
  });

  test("a message is edited and sent again from there", async () => {
    const { page, asked, close } = await openAny();
    await send(page, "Once upon a time");
    await send(page, "There was a dog", 2);
    await page.locator(".turn").first().getByText("Edit").click();
    await page.keyboard.press("Control+A");
    await page.keyboard.type("One day a bird");
    await page.keyboard.press("Enter");
    const left = mode === "chat" ? 1 : 2;
    await ended(page, left);
    assert.equal(await page.locator(".said-text").first().textContent(), "One day a bird");
    assert.equal(await page.locator(".turn").count(), left);
    const last = asked.at(-1);
    if (mode === "chat") assert.deepEqual(last.messages, [{ role: "user", content: "One day a bird" }]);
    else assert.equal(last.prompt, "One day a bird");
    await close();
  });

  test("two strategies answer side by side", async () => {
    const { page, asked, close } = await openAny();
    await page.check("#compare");
    await page.selectOption("#other-strategy", "sample");
    await send(page, "Once upon a time", 2);
    assert.deepEqual(asked.map(({ strategy }) => strategy), ["mtad", "sample"]);
    assert.equal(asked[0].seed, asked[1].seed);
    const [left, right] = await Promise.all([0, 1].map((n) => page.locator(".answer").nth(n).boundingBox()));
    assert.ok(left.x + left.width <= right.x && left.y === right.y, "beside one another");
    assert.ok(Number(await figure(page, "tokens/pass", 0)) > Number(await figure(page, "tokens/pass", 1)));
    assert.ok(Number(await figure(page, "tokens/pass", 1)) <= 1);
    assert.match(await page.textContent(".compared"), /mtad wrote [\d.]+ times the tokens per pass of sample/);
    await close();
  });

  test("light and dark", async () => {
    for (const colorScheme of ["light", "dark"]) {
      const { page, close } = await openAny({ colorScheme });
      await send(page, "Once upon a time");
      const colours = () => page.evaluate(() => {
        const colour = (selector) => getComputedStyle(document.querySelector(selector)).color;
        const legend = ["draft", "target", "forced"].map((one) => colour(`.legend .${one}`));
        return { paper: getComputedStyle(document.body).backgroundColor, inks: [colour("body"), colour(".help"), ...legend] };
      });
      for (const dark of [colorScheme === "dark", colorScheme !== "dark"]) {
        const { paper, inks } = await colours();
        assert.equal(luminance(paper) < 0.2, dark);
        for (const ink of inks) assert.ok(contrast(ink, paper) >= 4.5, `${ink} on ${paper}`);
        await page.click("#theme");
      }
      // What was chosen last is there again after a reload.
      await page.click("#theme");
      await page.reload();
      const paper = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
      assert.equal(luminance(paper) < 0.2, colorScheme !== "dark");
      await close();
    }
  });

  test("360 pixels are enough", async () => {
    const { page, close } = await openAny({ viewport: NARROW, hasTouch: true, isMobile: true });
    await send(page, `A word: ${"x".repeat(90)}`);
    assert.deepEqual((await overflow(page)).filter((by) => by > 0), []);
    await page.locator(".answer .token.draft u").first().tap();
    await page.getByRole("tooltip").waitFor();
    const tip = await page.locator("#tip").boundingBox();
    assert.ok(tip.x >= 0 && tip.x + tip.width <= NARROW.width);
    // A tap beside the settings closes them.
    await page.click("#settings-button");
    await page.mouse.click(2, 300);
    assert.ok(!(await page.isVisible("#settings")));
    await page.click("#settings-button");
    assert.equal(await page.evaluate(() => document.activeElement.id), "settings-close");
    await page.check("#compare");
    await page.click("#more summary");
    assert.deepEqual((await overflow(page)).filter((by) => by > 0), []);
    await page.keyboard.press("Escape");
    assert.ok(!(await page.isVisible("#settings")));
    assert.equal(await page.evaluate(() => document.activeElement.id), "settings-button");
    await send(page, "Once upon a time", 3);
    assert.deepEqual((await overflow(page)).filter((by) => by > 0), []);
    await close();
  });

  test("all of it by keyboard", async () => {
    const { page, asked, close } = await openAny();
    const at = (selector) => page.evaluate((one) => document.activeElement.matches(one), selector);
    const tabTo = async (selector, press = "Tab") => {
      for (let n = 0; n < 40; n += 1) {
        if (await at(selector)) {
          const outline = await page.evaluate(() => {
            const focused = document.activeElement;
            const shown = focused.type === "radio" ? focused.nextElementSibling : focused;
            return getComputedStyle(shown).outlineStyle;
          });
          assert.notEqual(outline, "none", `${selector} shows that it has the focus`);
          return;
        }
        await page.keyboard.press(press);
      }
      assert.fail(`${selector} is not reached`);
    };
    await page.click("#prompt");
    await page.keyboard.type("Once");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("upon a time");
    await page.keyboard.press("Enter");
    await ended(page, 1);
    assert.match(JSON.stringify(asked[0]), /Once\\nupon a time/);
    await tabTo("#prompt");
    await tabTo(".text", "Shift+Tab");
    await page.keyboard.press("End");
    assert.ok(await at(".token"));
    await page.keyboard.press("Escape");
    await tabTo("#marks");
    await tabTo("input[name=mode]");
    await tabTo("#arm-strategy");
    await tabTo("#arm-tau");
    await page.keyboard.press("ArrowRight");
    assert.equal(await page.textContent("#arm-value"), "0.11");
    await tabTo("#compare");
    await page.keyboard.press("Space");
    await tabTo("#other-strategy");
    await tabTo("summary");
    await page.keyboard.press("Enter");
    await tabTo('[data-number="seed"]');
    await tabTo("#prompt", "Shift+Tab");
    await page.keyboard.type("There was a dog");
    await page.keyboard.press("Enter");
    await ended(page, 3);
    assert.equal(asked[1].tau, 0.11);
    await tabTo("#new", "Shift+Tab");
    await page.keyboard.press("Enter");
    assert.equal(await page.locator(".turn").count(), 0);
    assert.ok(await at("#prompt"));
    await close();
  });

  test("markup in a message stays text", async () => {
    const { page, close } = await openAny();
    await send(page, MARKUP);
    assert.equal(await page.locator(".said-text").textContent(), MARKUP);
    assert.equal(await page.locator(".turn img, .turn script, .turn b").count(), 0);
    assert.equal(await page.title(), "mtad");
    await close();
  });
});

describe("with a scripted server", () => {
  let server;
  before(async () => {
    server = await start();
  });
  after(() => server.stop());

  test("what a model writes is text, with its white space", async () => {
    const { page, close } = await open(server.url);
    await send(page, `say:${MARKUP}\n\n  two  spaces\ttab`);
    assert.equal(await page.textContent(".answer .text"), `${MARKUP}\n\n  two  spaces\ttab`);
    assert.equal(await page.locator(".answer img, .answer script, .answer b").count(), 0);
    assert.equal(await page.title(), "mtad");
    await close();
  });

  test("fenced code has its own type, and a copy is exact", async () => {
    const { page, close } = await open(server.url, { permissions: ["clipboard-read", "clipboard-write"] });
    await send(page, "Show me code");
    const text = await page.textContent(".answer .text");
    const code = await page.locator(".line.code").allTextContents();
    assert.equal(code[0], "```rust\n");
    assert.equal(code.at(-1), "```\n");
    assert.ok(code.includes("    while low < high {\n"));
    assert.match(await page.locator(".line.code").nth(1).evaluate((line) => getComputedStyle(line).fontFamily), /mono/i);
    const clipboard = () => page.evaluate(() => navigator.clipboard.readText());
    await page.getByLabel("Copy this answer").click();
    await page.locator(".answer .actions").getByText("Copied").waitFor();
    assert.equal(await clipboard(), text);
    // Selecting is as exact as the button.
    await page.evaluate(() => getSelection().selectAllChildren(document.querySelector(".answer .text")));
    await page.keyboard.press("Control+C");
    assert.equal(await clipboard(), text);
    await close();
  });

  test("what a grammar forces is marked as such", async () => {
    const { page, close } = await open(server.url);
    await send(page, "Some json");
    const forced = page.locator(".answer .token.forced u").first();
    assert.equal(await forced.evaluate((u) => getComputedStyle(u).textDecorationStyle), "dotted");
    await close();
  });

  test("Escape and the button stop, and the server hears of it", async () => {
    const { page, close } = await open(server.url);
    for (const [n, stop] of [() => page.keyboard.press("Escape"), () => page.click("#stop")].entries()) {
      await page.fill("#prompt", "A slow story");
      await page.press("#prompt", "Enter");
      await page.waitForFunction((n) => document.querySelectorAll(".answer")[n]?.querySelectorAll(".token").length > 3, n);
      assert.ok(!(await page.isVisible("#send")));
      const before = server.seen.aborted;
      await stop();
      await ended(page, n + 1);
      const text = await page.locator(".answer .text").nth(n).textContent();
      assert.ok(text.length > 5 && text.length < 400);
      assert.match(await page.locator(".answer .note").nth(n).textContent(), /Stopped/);
      for (let tries = 0; server.seen.aborted === before && tries < 50; tries += 1) await page.waitForTimeout(20);
      assert.equal(server.seen.aborted, before + 1);
      assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
    }
    await close();
  });

  test("an answer is written again, and the conversation is told", async () => {
    const { page, asked, close } = await open(server.url);
    await send(page, "say:First");
    await page.getByLabel("Regenerate this answer").click();
    await ended(page, 1);
    assert.equal(asked.length, 2);
    assert.notEqual(asked[0].seed, asked[1].seed);
    await send(page, "say:Second", 2);
    assert.deepEqual(asked[2].messages, [
      { role: "user", content: "say:First" },
      { role: "assistant", content: "First" },
      { role: "user", content: "say:Second" },
    ]);
    await close();
  });

  test("of two answers one is gone on from", async () => {
    const { page, asked, close } = await open(server.url);
    await page.check("#compare");
    await page.click("#more summary");
    await page.fill('[data-number="max_tokens"]', "3");
    await send(page, "A story", 2);
    await page.getByText("Go on from this").nth(1).click();
    assert.deepEqual(
      await page.getByText("Go on from this").evaluateAll((all) => all.map((one) => one.ariaPressed)),
      ["false", "true"],
    );
    const second = await page.locator(".answer .text").nth(1).textContent();
    await send(page, "And then?", 4);
    assert.equal(asked[2].messages[1].content, second);
    await close();
  });

  test("errors are sentences, with a way on", async () => {
    const { page, close } = await open(server.url);
    await send(page, "Please fail");
    const problem = page.getByRole("alert").last();
    assert.match(await problem.textContent(), /The server failed\. A pass of the target failed: out of memory\./);
    await send(page, "Are you busy?", 2);
    assert.match(await problem.textContent(), /The server is busy; try again in 2 seconds\. All sequences are taken\./);
    await problem.getByRole("button").click();
    await page.waitForFunction(() => document.querySelectorAll(".problem").length === 1);
    await ended(page, 2);
    assert.ok((await page.locator(".answer .text").nth(1).textContent()).length > 100);
    await send(page, "Now break off", 3);
    assert.match(await problem.textContent(), /The answer broke off: the connection to the server was lost\./);
    assert.ok((await page.locator(".answer .text").nth(2).textContent()).length > 5, "what had come stays");
    await close();
  });

  test("a server that is gone is told of", async () => {
    const gone = await start();
    const { page, close } = await open(gone.url);
    await page.waitForSelector("#send:enabled");
    await gone.stop();
    await send(page, "Hello");
    assert.match(await page.getByRole("alert").textContent(), /The server does not answer\. Is it still running\?/);
    await close();
  });

  test("a key is asked for, kept for the tab, and sent", async () => {
    const guarded = await start({ key: "correct" });
    const { page, close } = await open(guarded.url);
    const dialog = page.getByRole("dialog", { name: "API key" });
    await dialog.waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.id), "key");
    await page.keyboard.type("wrong");
    await page.keyboard.press("Enter");
    await dialog.getByText("The server refused this key.").waitFor();
    await page.keyboard.type("correct");
    await page.keyboard.press("Enter");
    await page.waitForSelector("#send:enabled");
    await send(page, "A story");
    assert.ok((await page.textContent(".answer .text")).length > 100);
    assert.equal(await page.evaluate(() => sessionStorage.getItem("mtad.key")), "correct");
    assert.ok(!(await page.evaluate(() => JSON.stringify(localStorage))).includes("correct"));
    await page.reload();
    await page.waitForSelector("#send:enabled");
    // Without one, the page says why nothing goes.
    await page.evaluate(() => sessionStorage.clear());
    await page.reload();
    await dialog.waitFor();
    await page.keyboard.press("Escape");
    assert.match(await page.getByRole("alert").textContent(), /The server wants an API key/);
    await close();
    await guarded.stop();
  });

  test("a model that cannot chat completes text", async () => {
    const plain = await start({ template: false });
    const { page, asked, close } = await open(plain.url);
    await send(page, "Once upon a time");
    assert.match(await page.getByRole("alert").textContent(), /no chat template/);
    await page.getByText("Complete text instead").click();
    await page.waitForSelector(".answer .token");
    await ended(page, 1);
    assert.equal(asked[1].path, "/v1/completions");
    assert.equal(asked[1].prompt, "Once upon a time");
    assert.ok(await page.isChecked("input[value=complete]"));
    const text = await page.textContent(".answer .text");
    await page.getByLabel("Go on with this text").click();
    await ended(page, 1);
    assert.equal(asked[2].prompt, `Once upon a time${text}`);
    assert.ok((await page.textContent(".answer .text")).startsWith(text));
    await close();
    await plain.stop();
  });

  test("the page follows the text unless it was scrolled up, and is quiet to listeners", async () => {
    const { page, close } = await open(server.url, { viewport: { width: 1280, height: 420 } });
    await page.evaluate(() => {
      window.said = [];
      new MutationObserver(() => window.said.push(document.getElementById("status").textContent)).observe(
        document.getElementById("status"),
        { childList: true, subtree: true, characterData: true },
      );
    });
    const fromEnd = () => page.evaluate(() => {
      const { scrollHeight, scrollTop, clientHeight } = document.getElementById("scroller");
      return scrollHeight - scrollTop - clientHeight;
    });
    await send(page, "A story");
    await send(page, "Another story", 2);
    await page.waitForTimeout(100);
    assert.ok((await fromEnd()) < 2);
    assert.equal((await page.evaluate(() => window.said)).length, 2, "one announcement an answer");
    await page.fill("#prompt", "A slow story");
    await page.press("#prompt", "Enter");
    await page.waitForFunction(() => document.querySelectorAll(".answer")[2]?.querySelectorAll(".token").length > 3);
    await page.hover("#scroller");
    await page.mouse.wheel(0, -300);
    await page.waitForTimeout(400);
    const top = await page.evaluate(() => document.getElementById("scroller").scrollTop);
    await page.waitForTimeout(600);
    assert.equal(await page.evaluate(() => document.getElementById("scroller").scrollTop), top);
    await page.click("#latest");
    await page.waitForTimeout(300);
    assert.ok((await fromEnd()) < 2);
    await page.keyboard.press("Escape");
    await ended(page, 3);
    await close();
  });

  // How long a pause is depends on the machine: it is told, and judged by whoever reads.
  test("thousands of tokens are shown", async (t) => {
    const { page, close } = await open(server.url);
    await page.click("#more summary");
    await page.fill('[data-number="max_tokens"]', "");
    await page.evaluate(() => {
      window.longest = 0;
      new PerformanceObserver((list) => {
        for (const { duration } of list.getEntries()) window.longest = Math.max(window.longest, duration);
      }).observe({ type: "longtask" });
    });
    await send(page, "A long story");
    assert.ok((await page.locator(".answer .token").count()) > 4000);
    const longest = await page.evaluate(() => window.longest);
    t.diagnostic(`longest task: ${longest} ms`);
    await close();
  });
});
