// Asks the server again and again, and hands what it says to the parts of the page.

import { get, health } from "./api.js";
import { showLegend } from "./bar.js";
import { Charts } from "./charts.js";
import { know } from "./colours.js";
import { byId, say } from "./dom.js";
import { search, showChoices, startEntries, wasSearched } from "./entries.js";
import { duration } from "./format.js";
import { History } from "./history.js";
import { findings, noAnswer, notify } from "./notices.js";
import { showPrefixes } from "./prefixes.js";
import { showRequests, tick } from "./requests.js";
import { showMisses, showTiers } from "./tiers.js";
import { showTiles } from "./tiles.js";
import { askToken, startToken } from "./token.js";

const TURN_MS = 2000;
const REQUEST_TURNS = 2; // what costs the server more is asked less often
const SLOW_TURNS = 4;
const MINUTE = 60;
const NUM_REQUESTS = 15;
const NUM_PREFIXES = 12;

const history = new History();
const charts = new Charts();
let turn = 0;
let timer = null;
let paused = false;
let asking = false;
let runtime = null;
let answeredAt = null;
let lookupsShown = null;

async function once() {
  const [state, stats] = await Promise.all([health(), get("stats")]);
  byId("main").setAttribute("aria-busy", "false");
  know(["l1", ...stats.tiers.map((tier) => tier.name)]);
  history.add(stats);
  showTiles(history, stats);
  charts.draw(history);
  showMisses(stats.totals);
  await Promise.all([slowly(), requests(stats)]);
  showState(state, stats);
  notify(findings(state, stats, runtime, history.since(MINUTE)));
  answeredAt = Date.now() / 1000;
  if (!wasSearched()) await search();
}

async function slowly() {
  if (turn % SLOW_TURNS) return;
  const [tiers, prefixes, namespaces, now] = await Promise.all([
    get("tiers"),
    get(`prefixes?limit=${NUM_PREFIXES}`),
    get("namespaces"),
    get("runtime"),
  ]);
  runtime = now;
  showTiers(tiers);
  showLegend();
  showPrefixes(prefixes);
  showChoices(tiers.map((tier) => tier.name), namespaces.map((namespace) => namespace.model_name));
}

async function requests(stats) {
  if (turn % REQUEST_TURNS || stats.totals.lookups === lookupsShown) {
    tick();
    return;
  }
  showRequests(await get(`requests?limit=${NUM_REQUESTS}`));
  lookupsShown = stats.totals.lookups;
}

function showState(state, stats) {
  const status = byId("status");
  status.dataset.kind = state.status === "ok" ? "good" : "bad";
  say(status, state.status === "ok" ? "Serving" : state.status);
  const sessions = stats.sessions === 1 ? "1 client" : `${stats.sessions} clients`;
  say(byId("about"), `${state.version} · up ${duration(stats.uptime_seconds)} · ${sessions}`);
}

function failed(error) {
  const status = byId("status");
  status.dataset.kind = "bad";
  if (error.status === 401) {
    say(status, "Token wanted");
    byId("main").setAttribute("aria-busy", "true");
    byId("links").hidden = true; // a link carries no token
    const why = "This server shows its figures only with its token.";
    notify([["warn", why, { says: "Enter the token", does: () => askToken(why, null) }]]);
  } else if (error.status === 0) {
    say(status, "No answer");
    notify([noAnswer(answeredAt ?? Date.now() / 1000)]);
    answeredAt ??= Date.now() / 1000;
  } else {
    say(status, "Refused");
    notify([["bad", `The server refused: ${error.message}.`]]);
  }
  turn = -1; // then everything is asked anew
  lookupsShown = null;
}

async function poll() {
  if (asking) return;
  clearTimeout(timer);
  asking = true;
  try {
    await once();
  } catch (error) {
    if (error.status === undefined) throw error;
    failed(error);
  } finally {
    asking = false;
    turn += 1;
    if (!paused && !document.hidden) timer = setTimeout(poll, TURN_MS);
  }
}

function anew() {
  turn = asking ? -1 : 0; // the one under way counts it up
  lookupsShown = null;
  poll();
}

byId("pause").addEventListener("click", (event) => {
  paused = !paused;
  say(event.currentTarget, paused ? "Resume" : "Pause");
  if (paused) clearTimeout(timer);
  else poll();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (!paused) poll();
});
startToken(async () => {
  anew();
  if (wasSearched()) await search();
});
startEntries();
poll();
