"use strict";
// One page: who rates, one pair after the other, the end. All texts are set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const buttons = [...document.querySelectorAll("[data-choice]")];
const KEYS = { 1: "first", ArrowLeft: "first", 2: "second", ArrowRight: "second", 0: "tie", 9: "both_bad" };
let rater = "";
let pair = null; // what is shown; null on the other screens
let since = 0; // when it was shown, in milliseconds
let busy = false;

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is `fastgpt eval human` still running?");
  }
  const values = await answer.json();
  if (!answer.ok) throw new Error(values.error || `The server answered with ${answer.status}.`);
  return values;
}

// Run an action, one at a time; a failure is shown, and nothing else changes.
async function run(action) {
  if (busy) return;
  busy = true;
  for (const b of buttons) b.disabled = true;
  try {
    await action();
    $("problem").hidden = true;
  } catch (e) {
    $("problem").textContent = e.message;
    $("problem").hidden = false;
    $("problem").scrollIntoView({ block: "nearest" });
  }
  for (const b of buttons) b.disabled = false;
  busy = false;
}

function element(name, text, kind) {
  const e = document.createElement(name);
  e.textContent = text;
  if (kind) e.className = kind;
  return e;
}

// Text between lines of ``` is code; other lines are paragraphs, each with its own direction.
function fill(place, text) {
  place.replaceChildren();
  if (!text.trim()) return place.append(element("p", "(empty)", "empty"));
  text.split(/^[ \t]*```[^\n]*\n?/m).forEach((part, i, parts) => {
    if (i % 2) return place.append(element("pre", part.replace(/\n$/, "")));
    if (i > 0) part = part.replace(/^\n+/, ""); // code has margins
    if (i + 1 < parts.length) part = part.replace(/\n+$/, "");
    if (!part) return;
    for (const line of part.split("\n")) {
      const p = element("p", line || "\u00a0");
      p.dir = "auto";
      place.append(p);
    }
  });
  for (const code of place.querySelectorAll("pre")) {
    code.tabIndex = 0; // a wide one scrolls, also by keyboard
    code.setAttribute("role", "region");
    code.setAttribute("aria-label", "Code");
  }
}

function screen(name) {
  $("welcome").hidden = name !== "welcome";
  $("pair").hidden = name !== "pair";
  $("votes").hidden = name !== "pair";
  $("end").hidden = name !== "end";
  $("progress").hidden = $("who").hidden = name === "welcome";
}

function show(values) {
  $("count").textContent = `${values.done} of ${values.total} rated`;
  $("bar").max = Math.max(1, values.total);
  $("bar").value = values.done;
  if (values.place === null) return finish(values);
  pair = values;
  const messages = values.prompt.map((m) => {
    const box = element("div", "", "message");
    if (m.role) box.append(element("span", m.role, "role"));
    const text = element("div", "", "text");
    fill(text, m.content);
    box.append(text);
    return box;
  });
  $("messages").replaceChildren(...messages);
  fill($("first"), values.first);
  fill($("second"), values.second);
  $("comment").value = values.vote ? values.vote.comment : "";
  $("more").open = Boolean(values.vote && values.vote.comment);
  for (const b of buttons) b.setAttribute("aria-pressed", String(Boolean(values.vote) && values.vote.choice === b.dataset.choice));
  $("ahead").hidden = !values.vote;
  $("back").disabled = values.place === 0;
  screen("pair");
  $("status").textContent = `Pair ${values.place + 1} of ${values.total}.`;
  scrollTo(0, 0);
  $("prompt-title").focus({ preventScroll: true });
  since = performance.now();
}

function finish(values) {
  pair = null;
  $("end-text").textContent = `Thank you, ${rater}. You rated ${values.total} ${values.total === 1 ? "pair" : "pairs"}; you may close this page.`;
  screen("end");
  $("status").textContent = "All pairs are rated.";
  $("end-title").focus();
  $("last").onclick = () => run(() => load(values.total - 1));
}

async function load(place) {
  const query = new URLSearchParams({ rater });
  if (place !== undefined) query.set("place", place);
  show(await ask(`pair?${query}`));
}

function vote(choice) {
  return run(async () => {
    const seconds = (performance.now() - since) / 1000;
    await ask("vote", { rater, place: pair.place, choice, seconds, comment: $("comment").value });
    await load();
  });
}

function start(name) {
  return run(async () => {
    const before = rater;
    rater = name.trim();
    try {
      await load();
    } catch (e) {
      rater = before;
      throw e;
    }
    $("name").textContent = rater;
    localStorage.setItem("rater", rater);
  });
}

async function welcome() {
  const { raters } = await ask("raters");
  $("known").replaceChildren(
    ...raters.map((name) => {
      const b = element("button", name);
      b.type = "button";
      b.onclick = () => start(name);
      return b;
    }),
  );
  $("typed").hidden = raters.length > 0;
  pair = null;
  screen("welcome");
  (raters.length ? $("welcome-title") : $("rater")).focus();
}

function back() {
  if (pair && pair.place > 0) run(() => load(pair.place - 1));
}

$("welcome").onsubmit = (e) => {
  e.preventDefault();
  start($("rater").value);
};
$("leave").onclick = () => {
  localStorage.removeItem("rater");
  run(welcome);
};
$("back").onclick = back;
$("ahead").onclick = () => run(() => load());
for (const b of buttons) b.onclick = () => vote(b.dataset.choice);
$("keys").checked = localStorage.getItem("keys") !== "off";
$("keys").onchange = () => localStorage.setItem("keys", $("keys").checked ? "on" : "off");
document.onkeydown = (e) => {
  const typing = e.target.closest("textarea, input:not([type=checkbox])");
  if (!pair || !$("keys").checked || typing || e.ctrlKey || e.metaKey || e.altKey || e.shiftKey || e.repeat) return;
  if (e.target.closest("pre") && e.key.startsWith("Arrow")) return; // scrolls the code
  if (e.key === "Backspace") back();
  else if (KEYS[e.key]) vote(KEYS[e.key]);
  else return;
  e.preventDefault();
};

const known = localStorage.getItem("rater");
if (known) start(known).then(() => pair || !$("end").hidden || run(welcome));
else run(welcome);
