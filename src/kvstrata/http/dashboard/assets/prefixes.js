// The stored prefixes that are hit most.

import { heldIn } from "./chips.js";
import { byId, el, empty, fill } from "./dom.js";
import { find } from "./entries.js";
import { ago, amount, count } from "./format.js";

export function showPrefixes(prefixes) {
  const place = byId("prefixes");
  if (!prefixes.length) {
    fill(place, empty("No prefix was hit yet."));
    return;
  }
  const head = ["Prefix", "Hits", "Length", "Brought", "Last hit", "Held in"];
  fill(
    place,
    el(
      "table",
      { class: "wide-table" },
      el("caption", { class: "hidden" }, "Prefixes that look-ups hit, as a whole or as the beginning of more"),
      el("thead", {}, el("tr", {}, head.map((name, i) => el("th", { scope: "col", class: i > 0 && i < 4 ? "number" : null }, name)))),
      el("tbody", {}, prefixes.map(row)),
    ),
  );
}

function row(prefix) {
  const hash = prefix.key.slice(prefix.key.lastIndexOf("@") + 1);
  const cell = (name, css, ...content) => el("td", { class: css, "data-name": name }, ...content);
  return el(
    "tr",
    {},
    el(
      "th",
      { scope: "row" },
      prefix.model_name,
      " ",
      el(
        "button",
        { class: "link", type: "button", title: `Find ${prefix.key}`, on: { click: () => find(prefix.key) } },
        el("code", {}, hash.slice(0, 12)),
      ),
    ),
    cell("Hits", "number", count(prefix.num_hits)),
    cell("Length", "number", `${count(prefix.num_tokens)} tokens`),
    cell("Brought", "number", `${amount(prefix.num_hits * prefix.num_tokens)} tokens`),
    cell("Last hit", null, ago(prefix.last_hit_at)),
    cell("Held in", null, heldIn(prefix.held_in)),
  );
}
