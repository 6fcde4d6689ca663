// The figures at the top.

import { byId, el, fill, say } from "./dom.js";
import { amount, bytes, count, duration, percent } from "./format.js";

const WINDOW_SECONDS = 300;

export function showTiles(history, stats) {
  const now = history.last;
  const lately = history.since(WINDOW_SECONDS);
  show([
    ratio(now, lately),
    ["Tokens from cache", amount(now.hit), `of ${amount(now.asked)} asked for`],
    ["Prefill time saved", ...saved(now, stats)],
    ["Look-ups", lately ? `${amount(lately.lookups / lately.seconds)}/s` : "–", `${count(now.lookups)} in all`],
    ["To engines", lately ? `${bytes(lately.retrieved / lately.seconds)}/s` : "–", `${bytes(now.retrieved)} in all`],
    ["Faults of tiers", count(now.faults), `${count(now.dropped)} stores dropped`],
  ]);
}

function ratio(now, lately) {
  const overall = now.asked ? percent(now.hit / now.asked) : "–";
  if (!lately?.asked) return ["Hit ratio", overall, now.asked ? "since the start" : "no look-up yet"];
  const span = duration(Math.round(lately.seconds));
  return [`Hit ratio, last ${span}`, percent(lately.hit / lately.asked), `${overall} since the start`];
}

function saved(now, stats) {
  const rate = stats.rates.prefill_tokens_per_second;
  if (!rate) return ["–", "no engine has reported its prefill"];
  return [duration(now.saved), `estimate, at ${amount(rate)} tokens/s`];
}

function show(tiles) {
  const list = byId("tiles");
  if (list.children.length !== tiles.length) {
    fill(list, tiles.map(() => el("div", { class: "tile" }, el("dt"), el("dd"), el("dd", { class: "note" }))));
  }
  tiles.forEach(([name, value, note], i) => {
    const [title, main, below] = list.children[i].children;
    say(title, name);
    say(main, value);
    say(below, note);
  });
}
