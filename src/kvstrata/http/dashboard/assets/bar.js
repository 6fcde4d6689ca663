// A prompt as a bar: which tokens were found where, and why the rest was not.

import { known, tierClass } from "./colours.js";
import { byId, el, fill } from "./dom.js";
import { count } from "./format.js";

const words = (reason) => (reason ?? "").replaceAll("_", " ");

/** What became of a range, in words. */
export function fate(range) {
  if (range.state === "hit") return range.tier;
  if (range.state === "engine") return "engine's own cache";
  return `missed: ${words(range.reason)}`;
}

/** "0 to 511" */
export const span = (range) => `${count(range.first_token)} to ${count(range.first_token + range.num_tokens - 1)}`;

function kind(range) {
  return range.state === "hit" ? `hit ${tierClass(range.tier)}` : range.state;
}

export function tokenBar(request) {
  const label = request.ranges.map((range) => `tokens ${span(range)}: ${fate(range)}`).join("; ");
  return el(
    "div",
    { class: "tokens", role: "img", "aria-label": label || "no tokens" },
    request.ranges.map((range) => {
      const name = range.state === "hit" ? range.tier : range.state === "engine" ? "engine" : words(range.reason);
      return el(
        "span",
        { class: kind(range), style: { "flex-grow": String(range.num_tokens) }, title: `tokens ${span(range)}: ${fate(range)}` },
        el("span", { class: name.length > 5 ? "long" : null }, name),
      );
    }),
  );
}

/** What the bars' colours and patterns mean. */
export function showLegend() {
  const item = (css, text) => el("li", {}, el("span", { class: `sample ${css}`, "aria-hidden": "true" }), text);
  fill(
    byId("legend"),
    known().map((name) => item(`hit ${tierClass(name)}`, `found in ${name}`)),
    item("engine", "the engine had it"),
    item("miss", "missed"),
  );
}
