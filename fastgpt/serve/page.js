"use strict";
const $ = (id) => document.getElementById(id);
const FEEDBACK = "feedback" in document.documentElement.dataset;  // the server keeps thumbs
const FIELDS = ["model", "temperature", "max_tokens", "system", "theme"];
const store = {  // a browser may refuse to store
  read(place, name, otherwise) {
    try { return JSON.parse(place().getItem("fastgpt." + name)) ?? otherwise; } catch { return otherwise; }
  },
  write(place, name, value) {
    try { place().setItem("fastgpt." + name, JSON.stringify(value)); } catch { /* then it lasts as long as the page */ }
  },
};
const local = () => localStorage, session = () => sessionStorage;

/** A message of the AI may have several answers, of which it shows one. */
let messages = store.read(local, "messages", []).map((message) => message.role === "user" || message.answers
  ? message : { role: message.role, answers: [{ content: message.content, note: message.note }], at: 0 });
let views = [];  // of the messages, in their order
let key = store.read(session, "key", "");
let running = null;  // the AbortController of an answer

const headers = () => ({ "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) });
const say = (text) => { $("status").textContent = text; };

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

/** Throw the sentence of an answer other than success; ask for a key where one is missing. */
async function check(answer) {
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  if (answer.status === 401) {
    $("keys").hidden = false;
    $("key").focus();
    throw new Error(key ? "The server does not know this API key." : "The server asks for an API key.");
  }
  throw new Error(body.error?.message ?? `status ${answer.status}`);
}

const answerOf = (message) => (message.answers ? message.answers[message.at] ?? { content: "" } : message);
const save = () => store.write(local, "messages", messages);

function button(text, label, click) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  if (label) made.setAttribute("aria-label", label);
  made.addEventListener("click", click);
  return made;
}

function thumb(rating, label, click) {
  const made = button("", label, click);
  made.append($("thumb").content.cloneNode(true));
  made.className = rating;
  made.title = label;
  return made;
}

/** Show a message; return its article and what shows it again after a change. */
function show(message) {
  const article = document.createElement("article"), head = document.createElement("header");
  const who = document.createElement("h2"), text = document.createElement("p"), note = document.createElement("p");
  const own = message.role === "user";
  article.className = message.role;
  who.textContent = own ? "You" : "AI";
  const label = own ? "Copy your message" : "Copy the answer";
  const copy = button("Copy", label, () => copyText(answerOf(message).content, copy));
  note.className = "note";
  head.append(who, copy);
  article.append(head, text, note);
  const view = { article };
  const foot = own ? null : showFoot(message, view);
  view.update = () => {
    const answer = answerOf(message);
    text.textContent = answer.content;
    note.textContent = answer.note ?? "";
    note.hidden = !note.textContent;
    foot?.update();
  };
  if (foot) article.append(foot.element);
  view.update();
  $("log").append(article);
  views.push(view);
  return view;
}

/** What is below an answer: thumbs, and for the last message another answer, and a choice among its answers. */
function showFoot(message, view) {
  const element = document.createElement("div"), count = document.createElement("span");
  element.className = "foot";
  const thumbs = [["up", "Good answer"], ["down", "Bad answer"]].map(
    ([rating, label]) => thumb(rating, label, () => rate(message, rating, view)));
  const turn = (by) => {
    message.at += by;
    view.update();
    save();
    say(`Answer ${message.at + 1} of ${message.answers.length}`);
  };
  const back = button("‹", "Previous answer", () => turn(-1)), on = button("›", "Next answer", () => turn(1));
  const again = button("Regenerate", "", () => regenerate(message, view, again));
  element.append(...thumbs, again, back, count, on);
  const update = () => {
    const answer = answerOf(message), last = messages.at(-1) === message && !running, n = message.answers.length;
    for (const one of thumbs) {
      one.hidden = !FEEDBACK || !answer.id || answer.cut || (running && messages.at(-1) === message);
      one.setAttribute("aria-pressed", answer.rating === one.className);
    }
    again.hidden = !last;
    for (const one of [back, count, on]) one.hidden = !last || n < 2;
    count.textContent = `${message.at + 1} of ${n}`;
    back.disabled = message.at === 0;
    on.disabled = message.at === n - 1;
  };
  return { element, update };
}

/** Send a thumb; a second press takes it back. */
async function rate(message, rating, view) {
  const answer = answerOf(message), system = answer.system ? [{ role: "system", content: answer.system }] : [];
  const before = [...system, ...plain(messages.slice(0, messages.indexOf(message)))];
  const body = { id: answer.id, rating: answer.rating === rating ? "none" : rating, user: person(), messages: before,
    answer: answer.content, model: answer.model };
  complain("");
  try {
    await check(await fetch("v1/feedback", { method: "POST", headers: headers(), body: JSON.stringify(body) }));
    answer.rating = body.rating;
    say({ up: "Rated as good", down: "Rated as bad", none: "Rating taken back" }[body.rating]);
  } catch (e) {
    complain(e.message);
  }
  view.update();
  save();
}

/** A random name, so that the thumbs of this browser count as those of one user. */
function person() {
  let name = store.read(local, "person", "");
  if (!name) {
    name = Array.from(crypto.getRandomValues(new Uint8Array(12)), (x) => x.toString(16).padStart(2, "0")).join("");
    store.write(local, "person", name);
  }
  return name;
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no clipboard without https, except on this machine
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  say("Copied");
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

/** Yield the JSON of server-sent events. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server ended before the answer did.");
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

const plain = (list) => list.map((message) => ({ role: message.role, content: answerOf(message).content }));

function request(before, system) {
  const body = { stream: true, messages: plain(before) };
  if (system) body.messages.unshift({ role: "system", content: system });
  if ($("model").value) body.model = $("model").value;
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("max_tokens").value) body.max_tokens = Number($("max_tokens").value);
  return body;
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("new").disabled = on;
  $("log").setAttribute("aria-busy", on);  // a screen reader then reads the whole answer once
  for (const view of views) view.update();
}

/** Write the answer to the messages `before` into `answer` as it comes. */
async function receive(answer, view, before) {
  const body = JSON.stringify(request(before, answer.system));
  const got = await check(
    await fetch("v1/chat/completions", { method: "POST", headers: headers(), body, signal: running.signal }));
  const main = document.querySelector("main");
  for await (const event of events(got)) {
    if (event.error) throw new Error(event.error.message);
    answer.id ??= event.id;
    answer.model ??= event.model;
    const choice = event.choices[0];
    if (!choice) continue;
    const below = main.scrollHeight - main.scrollTop - main.clientHeight < 40;
    answer.content += choice.delta.content ?? "";
    if (choice.finish_reason === "length") answer.note = "Cut off: the limit of tokens is reached.";
    view.update();
    if (below) main.scrollTop = main.scrollHeight;
  }
}

/** Add an answer to a reply; if nothing comes, the reply is as before. */
async function answerTo(before, reply, view) {
  const answer = { content: "", system: $("system").value.trim() };
  reply.answers.push(answer);
  reply.at = reply.answers.length - 1;
  complain("");
  running = new AbortController();
  busy(true);
  say("The AI is answering");
  try {
    await receive(answer, view, before);
    if (!answer.content) answer.note = "The answer is empty.";
    say("The answer is complete");
  } catch (e) {
    const stopped = e.name === "AbortError";
    if (!stopped) complain(e.message);
    say(stopped ? "Stopped" : "");
    answer.note = stopped ? "Stopped." : "Cut off by an error.";
    answer.cut = true;
    if (!answer.content) {
      reply.answers.pop();
      reply.at = Math.max(0, reply.answers.length - 1);
    }
  }
  running = null;
  busy(false);
}

async function send(text) {
  const asked = { role: "user", content: text }, reply = { role: "assistant", answers: [], at: 0 };
  messages.push(asked, reply);
  show(asked);
  const view = show(reply);
  document.querySelector("main").scrollTop = document.querySelector("main").scrollHeight;
  await answerTo(messages.slice(0, -1), reply, view);
  if (!reply.answers.length) {  // nothing came: the message may be sent again
    messages.splice(-2);
    for (const { article } of views.splice(-2)) article.remove();
    busy(false);
    $("text").value = text;
  }
  save();
  if ($("keys").hidden) $("text").focus();
}

async function regenerate(message, view, from) {
  if (!settingsAreValid()) return;
  await answerTo(messages.slice(0, messages.indexOf(message)), message, view);
  save();
  if ($("keys").hidden) from.focus();
}

/** Return whether the settings can be used; if not, show them. */
function settingsAreValid() {
  if ($("settings").checkValidity()) return true;
  $("settings").hidden = false;
  $("options").setAttribute("aria-expanded", "true");
  $("settings").reportValidity();
  return false;
}

async function loadModels() {
  try {
    const { data } = await (await check(await fetch("v1/models", { headers: headers() }))).json();
    const wanted = $("model").value || store.read(local, "settings", {}).model;
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === wanted)));
    $("keys").hidden = true;
    complain("");
    $("text").focus();
  } catch (e) {
    complain(e.message);
  }
}

function applyTheme() {
  document.documentElement.dataset.theme = $("theme").value;
}

$("write").addEventListener("submit", (e) => {
  e.preventDefault();
  const text = $("text").value.trim();
  if (!text || running || !settingsAreValid()) return;
  $("text").value = "";
  send(text);
});
$("text").addEventListener("keydown", (e) => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing) return;
  e.preventDefault();
  $("write").requestSubmit();
});
document.addEventListener("keydown", (e) => { if (e.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  messages = [];
  views = [];
  $("log").replaceChildren();
  save();
  complain("");
  say("New chat");
  $("text").focus();
});
$("options").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("options").setAttribute("aria-expanded", !$("settings").hidden);
});
$("settings").addEventListener("submit", (e) => e.preventDefault());
$("settings").addEventListener("change", () => {
  store.write(local, "settings", Object.fromEntries(FIELDS.map((name) => [name, $(name).value])));
  applyTheme();
});
$("keys").addEventListener("submit", (e) => {
  e.preventDefault();
  key = $("key").value.trim();
  store.write(session, "key", key);
  loadModels();
});

for (const [name, value] of Object.entries(store.read(local, "settings", {}))) if ($(name)) $(name).value = value;
applyTheme();
if (FEEDBACK) {
  $("kept").textContent = "The conversation is kept in this browser; with a thumb, the server keeps it up to that answer.";
}
messages.forEach(show);
loadModels();
