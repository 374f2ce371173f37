// Small helpers for the document. Text from a model or a user only ever becomes text nodes.
/** A new element. An attribute that is `false` is left out. */
export function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (value !== false)
            element.setAttribute(name, value === true ? "" : String(value));
    }
    element.append(...children);
    return element;
}
/** A button with a word on it. */
export function button(word, act, name = word) {
    const made = make("button", { type: "button", class: "quiet", "aria-label": name }, word);
    made.addEventListener("click", act);
    return made;
}
/** The element of the page with that id. */
export function get(id) {
    return document.getElementById(id);
}
/** Says something to those who listen to the page rather than look at it. */
export function announce(text) {
    get("status").textContent = text;
}
export async function copy(text) {
    try {
        await navigator.clipboard.writeText(text);
        return true;
    }
    catch {
        // Over plain HTTP to another machine there is no clipboard interface.
        const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
        field.value = text;
        const before = document.activeElement;
        document.body.append(field);
        field.select();
        const done = document.execCommand("copy");
        field.remove();
        if (before instanceof HTMLElement)
            before.focus();
        return done;
    }
}
const waiting = new Set();
let after = () => undefined;
/** Does something before the next picture is drawn, once, however often it is asked for until then. */
export function nextFrame(work) {
    if (waiting.size === 0)
        requestAnimationFrame(flush);
    waiting.add(work);
}
/** Is called when a frame's work was done. */
export function afterFrames(work) {
    after = work;
}
function flush() {
    const works = [...waiting];
    waiting.clear();
    for (const work of works)
        work();
    after();
}
