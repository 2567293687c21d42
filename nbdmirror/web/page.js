// Keeps the page up to date: whole parts of it come from the server, as it would make them anew.
"use strict";

const AGAIN_MS = 10000;
const EVENTS_MAX = 100;
const servers = document.getElementById("servers");
const events = document.getElementById("events");
const connection = document.getElementById("connection");

function say(text, isStale) {
  if (connection.textContent !== text) connection.textContent = text;
  document.body.classList.toggle("stale", isStale);
}

// Not while somebody selects text there: the selection would be lost.
function showServers(html) {
  const selection = document.getSelection();
  if (!selection.isCollapsed && servers.contains(selection.anchorNode)) return;
  servers.innerHTML = html;
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

function listen() {
  const source = new EventSource("events");
  source.onopen = () => say("Live", false);
  source.addEventListener("servers", (message) => showServers(JSON.parse(message.data)));
  source.addEventListener("events", (message) => showEvents(JSON.parse(message.data)));
  source.onerror = () => {
    const isOver = source.readyState === EventSource.CLOSED;
    say(isOver ? "Not live: too many pages are open, trying again" : "Not live: trying again", true);
    if (isOver) setTimeout(listen, AGAIN_MS);
  };
}

listen();
