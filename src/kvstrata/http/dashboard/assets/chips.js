// Names of tiers with their colours.

import { tierClass } from "./colours.js";
import { el } from "./dom.js";

/** Where something is held; `names` may be empty. */
export function heldIn(names) {
  if (!names.length) return el("span", { class: "note" }, "no longer in l1");
  return names.map((name) =>
    el("span", { class: `chip ${tierClass(name)}` }, el("span", { class: "swatch", "aria-hidden": "true" }), name),
  );
}
