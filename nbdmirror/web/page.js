// Keeps the page up to date: whole parts of it come from the server, as it would make them anew.
"use strict";

const AGAIN_MS = 10000;
const LOOK_MS = 1000;
const EVENTS_MAX = 100;
const servers = document.getElementById("servers");
const events = document.getElementById("events");
const connection = document.getElementById("connection");

let source; // of messages
let heardMs; // when anything was heard last
let lost = ""; // why nothing is heard; empty: messages come
let held = ""; // what is to be shown as soon as no text is selected

function say(problem = lost) {
  lost = problem;
  const why = lost || (held && "text is selected");
  const text = why ? `Not live: ${why}` : "Live";
  if (connection.textContent !== text) connection.textContent = text;
  document.body.classList.toggle("stale", Boolean(why));
}

// Not while somebody selects text there: the selection would be lost.
function showServers(html) {
  const selection = document.getSelection();
  const isSelected = !selection.isCollapsed && servers.contains(selection.anchorNode);
  held = isSelected ? html : "";
  if (!isSelected) servers.innerHTML = html;
  say();
}

// New ones alone, so that a screen reader reads these, and not all.
function showEvents(html) {
  const part = document.createElement("template");
  part.innerHTML = html;
  const newest = Number(events.firstElementChild?.dataset.number ?? 0);
  const found = [...part.content.children].filter((item) => Number(item.dataset.number) > newest);
  events.prepend(...found);
  while (events.children.length > EVENTS_MAX) events.lastElementChild.remove();
}

const SHOW = { servers: showServers, events: showEvents, alive: () => {} };

function listen() {
  source?.close();
  source = new EventSource("events");
  heardMs = Date.now();
  source.onopen = () => say("");
  source.onerror = () => {
    const isOver = source.readyState === EventSource.CLOSED;
    say(isOver ? "too many pages are open, trying again" : "trying again");
    if (isOver) setTimeout(listen, AGAIN_MS);
  };
  for (const [kind, show] of Object.entries(SHOW)) {
    source.addEventListener(kind, (message) => {
      heardMs = Date.now();
      show(JSON.parse(message.data));
    });
  }
}

// A connection may be gone without an error: then the server's signs of life are missing.
function look() {
  if (Date.now() - heardMs <= Number(document.body.dataset.silentMs)) return;
  say("nothing is heard of the server, trying again");
  listen();
}

document.addEventListener("selectionchange", () => held && showServers(held));
setInterval(look, LOOK_MS);
listen();
