// What an operator should know at once.

import { byId, el, fill } from "./dom.js";
import { bytes, clock, count } from "./format.js";

let shown = null;

/** Show `notices`, [kind, text, action] each; the same ones again change nothing. */
export function notify(notices) {
  const key = JSON.stringify(notices.map(([kind, text]) => [kind, text]));
  if (key === shown) return;
  shown = key;
  const sign = { bad: "✕", warn: "!" };
  fill(
    byId("notices"),
    notices.map(([kind, text, action]) =>
      el(
        "p",
        { class: `notice ${kind}` },
        el("span", { class: "sign", "aria-hidden": "true" }, sign[kind]),
        el("span", {}, text),
        action ? el("button", { type: "button", on: { click: action.does } }, action.says) : null,
      ),
    ),
  );
}

/** What is wrong with a server that answers. */
export function findings(health, stats, runtime, lately) {
  const found = [];
  if (health.status !== "ok") found.push(["bad", `The server is ${health.status}: it does not serve engines now.`]);
  for (const tier of stats.tiers) {
    if (tier.state === "down") found.push(["bad", `Tier ${tier.name} is down (${tier.where}). It is probed every second; what it holds counts as missed meanwhile.`]);
    if (tier.state === "bypassed") found.push(["warn", `Tier ${tier.name} is bypassed by an operator.`]);
  }
  if (runtime?.stores_frozen) found.push(["warn", "Stores are frozen: what is held is served, nothing new is stored."]);
  if (stats.l1.used_bytes > stats.l1.budget_bytes) {
    found.push(["warn", `L1 uses ${bytes(stats.l1.used_bytes)}, more than its budget of ${bytes(stats.l1.budget_bytes)}, until what is in use is given back.`]);
  }
  if (lately?.dropped > 0) found.push(["warn", `${count(lately.dropped)} stores were dropped in the last minute: L1 had no room, or a tier was away or could not keep up.`]);
  if (lately?.faults > 0) found.push(["warn", `Tiers failed ${count(lately.faults)} times in the last minute.`]);
  return found;
}

export const noAnswer = (since) => ["bad", `No answer from the server since ${clock(since)}. Trying again; the figures below are from then.`];
