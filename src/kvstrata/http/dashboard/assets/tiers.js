// Tiers with their budgets, and the reasons of misses.

import { tierClass } from "./colours.js";
import { byId, el, empty, fill } from "./dom.js";
import { amount, bytes, count, duration, percent } from "./format.js";

const STATES = {
  up: ["✓", "up", "good"],
  down: ["✕", "down: its circuit breaker is open", "bad"],
  bypassed: ["‖", "bypassed by an operator", "warn"],
};

export function showTiers(reports) {
  fill(byId("tiers"), el("ul", { class: "tiers" }, reports.map(tier)));
}

function tier(report) {
  const [sign, words, kind] = STATES[report.state] ?? ["?", report.state, "warn"];
  return el(
    "li",
    { class: `tier ${tierClass(report.name)}` },
    el("h3", {}, el("span", { class: "swatch", "aria-hidden": "true" }), report.name),
    el("span", { class: `state ${kind}` }, el("span", { "aria-hidden": "true" }, `${sign} `), words),
    el("p", { class: "where" }, [report.where, report.codec].filter(Boolean).join(" · ")),
    budget(report),
    el("dl", { class: "facts" }, facts(report).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
  );
}

function budget({ name, used_bytes: used, budget_bytes: allowed }) {
  if (used === null) return el("p", { class: "note" }, "It does not say how much it holds.");
  if (!allowed) return el("p", { class: "note" }, `${bytes(used)} used; no budget is known`);
  const share = Math.min(1, used / allowed);
  const text = `${bytes(used)} of ${bytes(allowed)}, ${percent(used / allowed)}`;
  return el(
    "div",
    { class: "budget" },
    el(
      "div",
      { class: "bar", role: "meter", "aria-label": `${name}: used of its budget`, "aria-valuemin": "0",
        "aria-valuemax": String(allowed), "aria-valuenow": String(Math.min(used, allowed)), "aria-valuetext": text },
      el("span", { style: { width: `${100 * share}%` } }),
    ),
    el("span", {}, text),
  );
}

function facts(report) {
  const of = (name) => report.operations.find((figures) => figures.operation === name);
  const read = of("read");
  const found = [
    ["entries", report.entries === null ? "unknown" : count(report.entries)],
    ["tokens hit", amount(report.hit_tokens)],
  ];
  if (read?.count) found.push(["read p50, p99", `${time(read.p50_seconds)}, ${time(read.p99_seconds)}`]);
  if (report.evictions !== null) found.push(["evicted", count(report.evictions)]);
  if (report.operations.length) {
    found.push(["faults", count(report.errors)], ["queued", bytes(report.queued_bytes)]);
  }
  found.push(["dropped", count(report.dropped_writes)]);
  return found;
}

const time = (seconds) => (seconds === null ? "> 10 s" : duration(seconds));

export function showMisses(totals) {
  const all = Object.entries(totals.miss_tokens).filter(([, tokens]) => tokens > 0);
  all.sort(([, a], [, b]) => b - a);
  const missed = all.reduce((sum, [, tokens]) => sum + tokens, 0);
  if (!missed) {
    fill(byId("misses"), empty(totals.lookups ? "Nothing was missed." : "No look-up yet."));
    return;
  }
  fill(
    byId("misses"),
    el("ul", { class: "misses" }, all.map(([reason, tokens]) =>
      el(
        "li",
        {},
        el("span", {}, reason.replaceAll("_", " ")),
        el("span", { class: "bar miss", "aria-hidden": "true" }, el("span", { style: { width: `${(100 * tokens) / missed}%` } })),
        el("b", {}, amount(tokens)),
        el("span", { class: "note" }, percent(tokens / missed)),
      ),
    )),
  );
}
