// The entry browser: search a tier, page by page, and delete single entries.

import { ask, get, query, segment } from "./api.js";
import { heldIn } from "./chips.js";
import { byId, el, empty, fill, say } from "./dom.js";
import { bytes, count } from "./format.js";
import { askToken } from "./token.js";

const PAGE = 10;
let searched = null;
let asked = 0;

export function startEntries() {
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  byId("tier").addEventListener("change", search);
  byId("model").addEventListener("change", search);
}

/** Bring the lists to choose from up to date, without disturbing a choice. */
export function showChoices(tiers, models) {
  options(byId("tier"), tiers.map((name) => [name, name]));
  options(byId("model"), [["all", ""], ...[...new Set(models)].sort().map((name) => [name, name])]);
}

function options(select, wanted) {
  const has = [...select.options].map((option) => option.value);
  if (has.join("\n") === wanted.map(([, value]) => value).join("\n")) return;
  const chosen = select.value;
  fill(select, wanted.map(([text, value]) => el("option", { value }, text)));
  if (wanted.some(([, value]) => value === chosen)) select.value = chosen;
}

/** Show the first page of what the form says. */
export async function search() {
  const values = { tier: byId("tier").value, limit: PAGE };
  if (byId("prefix").value) values.prefix = byId("prefix").value.trim();
  if (byId("model").value) values.model_name = byId("model").value;
  searched = values;
  await show("");
}

/** Search l1 for one key, and go there. */
export async function find(key) {
  byId("tier").value = "l1";
  byId("model").value = "";
  byId("prefix").value = key;
  byId("h-entries").scrollIntoView();
  byId("prefix").focus({ preventScroll: true });
  await search();
}

export const wasSearched = () => searched !== null;

async function show(after) {
  const turn = ++asked;
  let page;
  try {
    page = await get(`entries?${query(after ? { ...searched, after } : searched)}`);
  } catch (error) {
    if (turn === asked) say(byId("entries-said"), error.status === 401 ? "Entries are shown with the token only." : `No entries: ${error.message}`);
    return;
  }
  if (turn !== asked) return;
  const place = byId("entries");
  if (!page.entries.length && !after) {
    fill(place, empty(`${searched.tier} holds nothing${searched.prefix || searched.model_name ? " that agrees with this search" : " yet"}.`));
    say(byId("entries-said"), "");
    return;
  }
  if (!after) fill(place, table());
  place.querySelector(".next")?.remove();
  const body = place.querySelector("tbody");
  const first = body.children.length;
  body.append(...page.entries.map(row));
  if (page.next_after) {
    place.append(el("button", { class: "next", type: "button", on: { click: () => show(page.next_after) } }, "Show more"));
  }
  if (after) body.children[first]?.querySelector("button").focus();
  say(byId("entries-said"), `${count(body.children.length)} shown${page.next_after ? "; there are more" : ""}.`);
}

function table() {
  const head = ["Key", "Tokens", "Size", "Held in", ""];
  const cells = head.map((name) => (name ? el("th", { scope: "col" }, name) : el("td", {})));
  return el("table", { class: "wide-table" }, el("caption", { class: "hidden" }, `Entries of ${searched.tier}`), el("thead", {}, el("tr", {}, cells)), el("tbody"));
}

function row(entry) {
  const made = el("tr", { "data-key": entry.key });
  const cell = (name, ...content) => el("td", { "data-name": name }, ...content);
  const end = entry.first_token === null ? null : entry.first_token + entry.num_tokens - 1;
  const state = entry.state && entry.state !== "ready" ? ` (${entry.state})` : "";
  made.append(
    el("th", { scope: "row" }, el("code", {}, entry.key)),
    cell("Tokens", end === null ? "–" : `${count(entry.first_token)} to ${count(end)}${state}`),
    cell("Size", entry.payload_bytes === null ? "–" : bytes(entry.payload_bytes)),
    cell("Held in", heldIn([entry.tier, ...(entry.also_in ?? [])])),
    el("td", {}, el("button", { class: "danger", type: "button", "aria-label": `Delete ${entry.key}`,
      on: { click: () => confirm(entry.key, () => remove(entry.key)) } }, "Delete")),
  );
  return made;
}

/** Ask before deleting; `then` is called when the answer is yes. */
function confirm(key, then) {
  const dialog = byId("delete-dialog");
  say(byId("delete-key"), key);
  byId("delete-cancel").onclick = () => dialog.close();
  byId("delete-form").onsubmit = (event) => {
    event.preventDefault();
    dialog.close();
    then();
  };
  dialog.showModal();
  byId("delete-cancel").focus();
}

async function remove(key) {
  const said = byId("entries-said");
  try {
    const done = await ask("DELETE", `entries/${segment(key)}`);
    const where = [done.l1_entries ? "deleted from l1" : null];
    if (done.queued_in.length) where.push(`being deleted in ${done.queued_in.join(", ")}`);
    if (done.not_asked.length) where.push(`kept by ${done.not_asked.join(", ")}, which cannot be asked now`);
    for (const row of byId("entries").querySelectorAll("tbody tr")) if (row.dataset.key === key) row.remove();
    say(said, `${key}: ${where.filter(Boolean).join("; ") || "no tier held it"}.`);
  } catch (error) {
    if (error.status === 401) {
      say(said, "Nothing was deleted: deleting wants the token.");
      askToken("Deleting wants the token of this server.", () => remove(key));
    } else {
      say(said, `Nothing was deleted: ${error.message}.`);
    }
  }
}
