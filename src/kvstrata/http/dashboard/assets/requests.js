// The look-ups that were answered last; each opens to its full explanation.

import { get, segment } from "./api.js";
import { fate, span, tokenBar } from "./bar.js";
import { byId, el, empty, fill, say } from "./dom.js";
import { ago, bytes, count, duration, percent } from "./format.js";

const rows = new Map();

const id = (request) => JSON.stringify([request.request_id, request.answered_at]);

/** Show `requests`, the latest first. A row that is there already stays as it is, opened or not. */
export function showRequests(requests) {
  const place = byId("requests");
  if (!requests.length) {
    rows.clear();
    fill(place, empty("No look-up was answered yet. Point an inference engine at this server."));
    return;
  }
  if (!place.firstElementChild?.matches("ul")) fill(place, el("ul", { class: "requests" }));
  const wanted = new Set(requests.map(id));
  for (const [known, row] of rows) {
    if (!wanted.has(known)) {
      row.remove();
      rows.delete(known);
    }
  }
  let before = null;
  for (const request of requests) {
    const row = rows.get(id(request)) ?? makeRow(request);
    rows.set(id(request), row);
    const next = before ? before.nextSibling : place.firstElementChild.firstChild;
    if (row !== next) place.firstElementChild.insertBefore(row, next);
    before = row;
  }
  tick();
}

/** Bring "12 s ago" up to date. */
export function tick() {
  for (const time of byId("requests").querySelectorAll("time")) {
    say(time, ago(Number(time.dataset.at)));
  }
}

function makeRow(request) {
  const more = el("div", { class: "more" });
  const share = request.num_tokens ? request.num_hit_tokens / request.num_tokens : 0;
  const reason = request.reason ? ` · ${request.reason.replaceAll("_", " ")}` : "";
  return el(
    "li",
    {},
    el(
      "details",
      { on: { toggle: (event) => event.target.open && explain(request, more) } },
      el(
        "summary",
        {},
        el("span", { class: "id" }, request.request_id),
        tokenBar(request),
        el(
          "span",
          { class: "note result" },
          `${percent(share)} of ${count(request.num_tokens)}${reason}`,
        ),
        el("span", { class: "note took" }, duration(request.seconds)),
        el("time", { class: "note", "data-at": String(request.answered_at), datetime: new Date(1000 * request.answered_at).toISOString() }),
      ),
      more,
    ),
  );
}

async function explain(request, place) {
  if (place.childElementCount) return;
  fill(place, el("p", { class: "note" }, "Asking"));
  try {
    const found = await get(`explain/${segment(request.request_id)}`);
    // An id may come again; then the row's own figures are right, without what only this answer has.
    fill(place, explanation(found.answered_at === request.answered_at ? found : request));
  } catch (error) {
    fill(place, el("p", { class: "note" }, `It cannot be explained: ${error.message}`));
  }
}

function explanation(request) {
  return [
    el("p", {}, `${request.model_name}: ${request.detail}.`),
    table(["Tokens", "Fate", "Held by"], request.ranges.map((range) => [span(range), fate(range), range.held_by.join(", ") || "–"])),
    request.decisions.length ? table(["Gate", "Says", "Load", "Compute"], request.decisions.map(decision)) : null,
    request.same_tokens.map((other) =>
      el("p", {}, "The first missing tokens are also held with another ", other.differs_in.join(", ").replaceAll("_", " "), ": ", el("code", {}, other.key)),
    ),
  ];
}

function decision(made) {
  const took = made.actual_load_seconds === null ? "" : `, took ${duration(made.actual_load_seconds)}`;
  const estimate = made.load_seconds === null ? "not measured" : `about ${duration(made.load_seconds)}`;
  return [
    `${made.tier}, ${count(made.num_tokens)} tokens, ${bytes(made.num_bytes)}`,
    made.verdict,
    estimate + took,
    made.prefill_seconds === null ? "not measured" : `about ${duration(made.prefill_seconds)}`,
  ];
}

function table(head, body) {
  return el(
    "table",
    {},
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, body.map((cells) => el("tr", {}, cells.map((cell) => el("td", {}, cell))))),
  );
}
